"""Yi-VL itself: what the authors' code computed from the golden checkpoint is computed here."""

from __future__ import annotations

import hashlib
import json

import pytest
import torch
from golden_release import CASES, CHECKPOINT, GOLDEN, TOLERANCE, case_messages, load_records
from PIL import Image
from torch import Tensor, nn

import vlbench
from vlbench import errors
from vlbench.data.image_processing import ImageFile
from vlbench.data.packing import collate
from vlbench.data.sample import IMAGE_PLACEHOLDER, ChatTurn, Sample
from vlbench.model.generation.answer_text import decode_answer, has_ended
from vlbench.model.generation.growing_answer import eos_token_ids
from vlbench.model.loaded_vlm import LoadedVLM
from vlbench.model.weights.clip_layouts import hf_tensor_names

RECORDS = load_records()
VLM_ = vlbench.load(CHECKPOINT, dtype="float32", device="cpu")


def record(case: dict, name: str) -> Tensor:
    return RECORDS[f"{case['name']}.{name}"]


def assert_near(ours: Tensor, theirs: Tensor, quantity: str) -> None:
    assert ours.shape == theirs.shape
    assert (ours - theirs).abs().max() <= TOLERANCE[quantity], quantity


@pytest.mark.parametrize("case", CASES["cases"], ids=lambda case: case["name"])
@torch.no_grad()
def test_every_step_equals_the_reference(case):
    asked = case_messages(case)
    prompt = VLM_.prompt(asked)
    assert prompt == case["prompt"]
    assert hashlib.sha256(prompt.encode()).hexdigest() == case["prompt_sha256"]
    batch = VLM_.prepare(asked)
    assert batch.position_ids[0].equal(record(case, "position_ids"))
    if case["images"]:
        assert_near(batch.pixels, record(case, "pixel_values"), "pixel_values")
        assert_near(VLM_.features(batch), record(case, "vision_features"), "vision_features")
        assert_near(VLM_.visual(batch), record(case, "projector_out"), "projector_out")
        fused = VLM_.model.merge_embeddings(batch, VLM_.visual(batch))[0]
        assert_near(fused, record(case, "inputs_embeds"), "inputs_embeds")
    logits = VLM_(batch).logits[0]
    if case["has_full_logits"]:
        assert_near(logits, record(case, "logits"), "logits")
    else:
        assert_near(logits[-16:], record(case, "logits_tail"), "logits")
        assert_near(logits.logsumexp(-1), record(case, "logits_logsumexp"), "logits")
        assert logits.argmax(-1).equal(record(case, "logits_argmax"))


@pytest.mark.parametrize("case", CASES["cases"], ids=lambda case: case["name"])
def test_greedy_answers_equal_the_reference(case):
    asked, pieces = case_messages(case), []
    new = VLM_.generate(VLM_.prepare(asked), max_new_tokens=64)
    assert new == [record(case, "generated_ids").tolist()]
    assert VLM_.chat(asked, max_new_tokens=64, stream=pieces.append) == case["text"]
    assert "".join(pieces) == case["text"] and len(pieces) > 5


EOS = eos_token_ids(VLM_.model, VLM_.processor)
STOPS = json.loads((GOLDEN / "stop_cases.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize("case", STOPS, ids=lambda case: case["name"])
def test_answers_stop_and_are_cut_as_in_the_reference(case):
    ids, reason = case["ids"], "end_of_list"
    for length in range(1, len(ids) + 1):
        if has_ended(VLM_.processor, EOS, ids[:length]):
            reason = "eos" if ids[length - 1] == VLM_.tokenizer.eos_token_id else "keyword"
            break
    assert (length, reason) == (case["stops_after"], case["reason"])
    assert decode_answer(VLM_.processor, ids[:length]) == case["text"]


def test_a_tanh_gelu_in_the_projector_would_be_caught():
    case = CASES["cases"][0]
    features = record(case, "vision_features")
    projector = VLM_.connector.released_projector()
    wrong = [nn.GELU("tanh") if isinstance(m, nn.GELU) else m for m in projector]
    with torch.no_grad():
        distance = nn.Sequential(*wrong)(features) - record(case, "projector_out")
    assert distance.abs().max() > 5 * TOLERANCE["projector_out"]


def gradients(vlm: LoadedVLM) -> dict[str, Tensor | None]:
    """Return all gradients under the reference's names."""
    result = {name: p.grad for name, p in vlm.language.named_parameters()}
    for name, parameter in vlm.connector.released_projector().named_parameters():
        result[f"model.mm_projector.{name}"] = parameter.grad
    visual = vlm.vision.visual
    parameters = dict(visual.named_parameters())
    for ours, theirs in hf_tensor_names(len(visual.transformer.resblocks)).items():
        grad = parameters[ours].grad
        parts = [None] * len(theirs) if grad is None else grad.chunk(len(theirs))
        for name, part in zip(theirs, parts, strict=True):
            result[f"model.vision_tower.vision_tower.vision_model.{name}"] = part
    return result


@pytest.mark.parametrize("packed", [False, True], ids=["a row each", "one row"])
@pytest.mark.parametrize("name", CASES["training"])
def test_loss_and_gradients_of_a_training_batch_equal_the_reference(name, packed):
    expected = CASES["training"][name]
    samples = []
    for number, one in enumerate(expected["samples"]):
        turns = [ChatTurn(turn["role"], turn["content"]) for turn in one["conversation"]]
        turns.append(ChatTurn("assistant", one["target"].removesuffix("\n###")))
        images = tuple(ImageFile(GOLDEN / "images" / image) for image in one["images"])
        samples.append(Sample(f"{number}", tuple(turns), images))
    vlm = vlbench.load(CHECKPOINT, dtype=torch.float32)
    encoded = []
    for sample in samples:
        one = vlm.processor.sample_encoder().encode(sample)
        last = len(vlm.tokenizer.encode(f" {sample.turns[-1].text.strip()}\n###"))
        one.labels[: len(one.labels) - 1 - last] = [-100] * (len(one.labels) - 1 - last)
        encoded.append(one)
    rows = [encoded] if packed else [[one] for one in encoded]
    out = vlm(collate(rows, lambda picture: vlm.processor.transform(picture.open())))
    assert out.tokens == expected["n_label_tokens"]
    loss = out.loss_sum / out.tokens
    assert abs(loss.item() - expected["loss"]) <= TOLERANCE["loss"]
    loss.backward()
    ours = gradients(vlm)
    for key, norm in expected["grad_norms"].items():
        if norm is not None and norm >= 1e-4:  # below, it is zero in truth
            relative = abs(ours[key].norm().item() - norm) / norm
            assert relative <= TOLERANCE["grad_norm_relative"], key
    unused = {key for key, grad in ours.items() if grad is None}
    assert unused == {key for key in ours if expected["grad_norms"].get(key) is None}


def test_an_image_is_read_from_memory_as_from_its_file():
    path = GOLDEN / "images" / "wide_rgb.png"
    ask = [{"type": "text", "text": "What?"}]
    batches = [
        VLM_.prepare([{"role": "user", "content": [{"type": "image", "image": image}, *ask]}])
        for image in (path, str(path), Image.open(path))
    ]
    assert all(batch.pixels.equal(batches[0].pixels) for batch in batches)
    assert VLM_.prompt([{"role": "user", "content": "What?"}]).count(IMAGE_PLACEHOLDER) == 0


def test_sixteen_bits_are_scaled_in_memory_as_in_a_file():
    path = GOLDEN / "images" / "gray16_wide.png"
    ask = [{"role": "user", "content": [{"type": "image", "image": path}]}]
    memory = [{"role": "user", "content": [{"type": "image", "image": Image.open(path)}]}]
    assert VLM_.prepare(ask).pixels.equal(VLM_.prepare(memory).pixels)


def test_a_conversation_that_is_too_long_is_refused():
    with pytest.raises(errors.UserError, match="reads fewer than 4096"):
        VLM_.prepare([{"role": "user", "content": "word " * 5000}])
