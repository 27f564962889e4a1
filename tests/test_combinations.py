"""Every vision encoder with every connector and language model: trained, resumed, exported.

The parts are small and random, in the layouts of their libraries. Of the table a diagonal runs by
default, in which each part is met with each kind of the others; the rest is slow.
"""

from __future__ import annotations

import itertools
import shutil
from pathlib import Path

import pytest
import torch
from hub.small_encoders import write_small_clip, write_timm
from language_folders import write_language_folder
from PIL import Image
from safetensors.torch import load_file

import vlbench
from vlbench.__main__ import main
from vlbench.train import checkpoint_files

ENCODERS = {"clip": 56, "siglip": 64}
"""With a class token, and without; the image sizes in pixels give 4 x 4 patches."""
LANGUAGES = ("llama", "qwen3", "granite")
CONNECTORS = {
    "llava_mlp": [],
    "qformer": ["queries=3", "width=16", "layers=2", "heads=2", "ffn_width=24", "text=embedded"],
    "cross_attention": ["every=2", "heads=2", "kv_heads=1", "head_width=8", "blocks=[0]"],
    "deepstack": ["levels=2", "blocks=[-1,0]"],
}
TABLE = list(itertools.product(ENCODERS, LANGUAGES, CONNECTORS))
DIAGONAL = {
    ("clip", "llama", "deepstack"),
    ("clip", "granite", "cross_attention"),
    ("siglip", "qwen3", "llava_mlp"),
    ("siglip", "granite", "qformer"),
}
CELLS = [
    pytest.param(*cell, marks=() if cell in DIAGONAL else pytest.mark.slow, id=" ".join(cell))
    for cell in TABLE
]
SHORT = ["fit", "recipe=yivl_llava", "only=chat", "stages.chat.steps=2", "run=run"]
SHORT += ["stages.chat.global_batch_size=2", "data.samples=6", "data.questions=1"]
SHORT += ["data.workers=0", "language.max_length=192", "log.questions=1", "log.examples=0"]
SHORT += ["log.tensorboard=false", "trainer.checkpoint_every=0.001"]


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folders of all encoders and language models."""
    folder = tmp_path_factory.mktemp("parts")
    for name in ENCODERS:
        (folder / name).mkdir()
    write_small_clip(folder / "clip")
    siglip = "timm/vit_base_patch16_siglip_224.v2_webli"
    write_timm(folder / "siglip", siglip, ENCODERS["siglip"])
    for name in LANGUAGES:
        write_language_folder(name, folder / name)
    return folder


def weights(run: Path) -> dict[str, torch.Tensor]:
    return load_file(checkpoint_files.find_checkpoint(run) / "model.safetensors")


def answer_logits(folder: str) -> torch.Tensor:
    vlm = vlbench.load(folder, dtype="float32", device="cpu")
    parts = [{"type": "image", "image": Image.linear_gradient("L").convert("RGB")}]
    content = [*parts, {"type": "text", "text": "What?"}]
    with torch.no_grad():
        logits: torch.Tensor = vlm(vlm.prepare([{"role": "user", "content": content}])).logits
    return logits


@pytest.mark.parametrize(("encoder", "language", "connector"), CELLS)
def test_any_three_are_trained_resumed_and_exported(
    encoder, language, connector, parts, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    options = [f"connector.{word}" for word in (f"name={connector}", *CONNECTORS[connector])]
    words = [*SHORT, *options, f"stages.chat.image_size={ENCODERS[encoder]}"]
    words += [f"vision.name={parts / encoder}", f"vision.weights={parts / encoder}"]
    words.append(f"language.weights={parts / language}")
    assert main(words) == 0
    whole = weights(Path("run"))
    first, last = sorted(Path("run/checkpoints").iterdir())
    begun = load_file(first / "model.safetensors")
    for part in ("vision", "connector", "language"):
        names = [name for name in whole if name.startswith(f"{part}.")]
        assert any(not whole[name].equal(begun[name]) for name in names), part
    shutil.rmtree(last)
    Path("run/results.json").unlink()
    assert main(words) == 0
    again = weights(Path("run"))
    assert again.keys() == whole.keys()
    assert all(again[name].equal(whole[name]) for name in whole)
    assert main(["export", "model=run", "out=out", "format=vlbench"]) == 0
    assert answer_logits("out").equal(answer_logits("run"))
    if encoder == "clip":
        capsys.readouterr()
        assert main(["export", "model=run", "out=llava", "format=hf_llava"]) == 2
        told = capsys.readouterr().err
        assert told.count("\n") == 1 and "transformers' LLaVA" in told  # it has no such connector


def test_the_diagonal_has_every_part():
    assert DIAGONAL <= set(TABLE) and len(TABLE) == 24
    for index, every in enumerate((ENCODERS, LANGUAGES, CONNECTORS)):
        assert {cell[index] for cell in DIAGONAL} == set(every)
