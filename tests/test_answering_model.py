"""The questions at the end of a run are asked where the model, and the batch, fit."""

from __future__ import annotations

from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from random_vlm import SMALL, small_vlm

from vlbench.connector import registry
from vlbench.evaluate import batch_inference
from vlbench.evaluate.batch_inference import answer_questions
from vlbench.model.frozen_bf16 import FrozenBF16
from vlbench.model.loaded_vlm import LoadedVLM
from vlbench.train.answering_model import place_for_answers

ASKED = [{"role": "user", "content": "How many?"}]


def trained_model(name: str) -> LoadedVLM:
    """Return a model whose encoder was frozen, with weights that bfloat16 holds."""
    vlm = small_vlm(registry.load_connector(name), SMALL.get(name))
    for parameter in vlm.vision.parameters():
        parameter.data = parameter.data.bfloat16().float()
    return vlm.eval()


@pytest.mark.parametrize("name", ["llava_mlp", "flamingo"])
def test_what_does_not_fit_as_float32_answers_in_bfloat16(name, monkeypatch):
    vlm, told, moves = trained_model(name), [], []
    device, move = torch.device("cpu"), LoadedVLM.to

    def move_if_small(self: LoadedVLM, *args: Any) -> LoadedVLM:
        moves.append(args)
        if args == (device,):
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0")
        return move(self, *args)

    monkeypatch.setattr(LoadedVLM, "to", move_if_small)
    place_for_answers(vlm, partial(FrozenBF16, vlm.model), device, told.append)
    assert moves == [(device,), ("cpu",)]
    assert {parameter.dtype for parameter in vlm.parameters()} == {torch.bfloat16}
    assert not any(parameter.requires_grad for parameter in vlm.parameters())
    assert len(told) == 1 and "asked in bfloat16" in told[0] and "(CUDA out of memory)" in told[0]
    monkeypatch.undo()
    assert vlm.generate(vlm.prepare(ASKED), max_new_tokens=2)[0]


def test_what_fits_stays_as_it_is():
    vlm, told = trained_model("llava_mlp"), []
    before = vlm.generate(vlm.prepare(ASKED), max_new_tokens=4)
    place_for_answers(vlm, partial(FrozenBF16, vlm.model), torch.device("cpu"), told.append)
    assert not told
    assert vlm.generate(vlm.prepare(ASKED), max_new_tokens=4) == before


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("CUDA out of memory"), RuntimeError("another fault")]
)
def test_a_batch_that_does_not_fit_is_halved(error, monkeypatch):
    sizes = []

    def answer(vlm: Any, samples: list[str], **_: Any) -> list[str]:
        sizes.append(len(samples))
        if len(samples) > 20:
            raise error
        return [f"of {sample}" for sample in samples]

    monkeypatch.setattr(batch_inference, "answer_batch", answer)
    monkeypatch.setattr(batch_inference, "max_answer_tokens", lambda *_: 8)
    questions: Any = [SimpleNamespace(sample="x" * (n % 7) + str(n), answer="") for n in range(70)]
    vlm: Any = SimpleNamespace(processor=SimpleNamespace(encode_prompt=str))
    if type(error) is RuntimeError:
        with pytest.raises(RuntimeError, match="another fault"):
            answer_questions(vlm, questions, "test")
        return
    answers = answer_questions(vlm, questions, "test")
    assert answers == [f"of {question.sample}" for question in questions]
    assert sizes == [64, 32, 16, 16, 16, 16, 6]
    sizes.clear()

    def refuse(vlm: Any, samples: list[str], **_: Any) -> list[str]:
        raise error

    monkeypatch.setattr(batch_inference, "answer_batch", refuse)
    with pytest.raises(torch.OutOfMemoryError):  # of a single question: nothing is left to do
        answer_questions(vlm, questions, "test")
