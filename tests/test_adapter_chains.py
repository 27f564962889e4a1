"""Adapters of every kind, of weights stored in any type: the same in one process and in two."""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path

import pytest
import torch
from two_process_commands import QUIET, TWO, FitCommand, run_fit_command, run_in_two_processes

from vlbench.model.language_model import TINY_LANGUAGE_FOLDER
from vlbench.model.weights.tensor_files import read_tensors, weight_files
from vlbench.model.weights.tensor_writer import write_tensors

WAYS = {
    "alone": (),
    "ddp": (TWO, "trainer.strategy=ddp"),
    "fsdp2": (TWO, "trainer.strategy=fsdp2"),
}
KINDS = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
ADAPTERS = {
    "lora": ("rank=4",),
    "dora": ("rank=3", "dora=true"),
    "rslora": ("rank=5", "rslora=true"),
    "whole": (),
}
STEPS = {"align_224": 2, "align_448": 2, "chat": 3}  # the last stage alone has a third one
CHAINS = ["dora-lora-whole", "lora-rslora-dora", "rslora-dora-whole"]
FAST = ("bf16", CHAINS[0], "32")


def words(chain: str, precision: str) -> list[str]:
    """Return what trains the language model through three stages, as `chain` says."""
    given = ["recipe=yivl_llava", f"precision={precision}", "data.workers=0", *QUIET]
    for (stage, steps), kind in zip(STEPS.items(), chain.split("-"), strict=True):
        settings = [f"steps={steps}", "global_batch_size=4", "image_size=56", "warmup_ratio=0"]
        settings += ["train.vision=null", "train.language.lr=3e-4", "train.connector.lr=1e-4"]
        settings += [f"train.language.lora.{one}" for one in ADAPTERS[kind]]
        given += [f"stages.{stage}.{one}" for one in settings]
    return given


def stored(folder: Path, kind: torch.dtype) -> Path:
    """Write the miniature as a language model of which every number needs all bits of `kind`."""
    folder.mkdir()
    generator = torch.Generator().manual_seed(0)
    tensors = [
        (name, (value.float() * (1 + 0.1 * torch.rand(value.shape, generator=generator))).to(kind))
        for file in weight_files(TINY_LANGUAGE_FOLDER)
        for name, value in read_tensors(file)
    ]
    write_tensors(tensors, folder)
    for file in TINY_LANGUAGE_FOLDER.iterdir():
        if file.is_file() and "safetensors" not in file.name:
            shutil.copy(file, folder)
    return folder


def rows(run: Path) -> list[dict[str, float]]:
    """Return the loss and the norm of the gradient of every step."""
    with (run / "metrics.csv").open() as file:
        return [{k: float(row[k]) for k in ("loss", "grad_norm")} for row in csv.DictReader(file)]


def check(folder: Path, kind: str, chain: str, precision: str) -> None:
    """Train by every way, and compare."""
    weights = stored(folder / "weights", KINDS[kind])
    given = [*words(chain, precision), f"language.weights={weights}"]
    jobs = {
        w: FitCommand((*given, f"run={folder / w}", *how), stop_step=3) for w, how in WAYS.items()
    }
    assert run_fit_command(jobs["alone"]) == 130
    assert run_in_two_processes([jobs["ddp"], jobs["fsdp2"]]) == [(130, 130)] * 2
    alone = rows(folder / "alone")
    assert len(alone) == sum(STEPS.values())
    # AdamW turns rounding where gradients are nearly zero into steps, and these grow
    exact = 1e-4 if precision == "32" else 2e-2
    for way in ("ddp", "fsdp2"):
        together = rows(folder / way)
        assert len(together) == len(alone)
        assert together[0]["loss"] == pytest.approx(alone[0]["loss"], rel=exact / 100)
        for step, (one, other) in enumerate(zip(alone, together, strict=True)):
            assert other["loss"] == pytest.approx(one["loss"], rel=exact), (way, step)
            # the norm feels them before the loss does; what began rounded had thrice the norm
            norm = pytest.approx(one["grad_norm"], rel=1e-2 if precision == "32" else 0.4)
            assert other["grad_norm"] == norm, (way, step)
    newest = sorted((folder / "fsdp2/checkpoints").iterdir())[-1]
    assert json.loads((newest / "position.json").read_text())["step"] == 3
    compare(newest, folder / "alone/checkpoints" / newest.name, precision)


def compare(folder: Path, other: Path, precision: str) -> None:
    """Compare two checkpoints: the same tensors, and all weights within a share of their norm.

    In bf16 what begins at 0 is left out, biases and LoRA's B: AdamW's first steps are the signs of
    the gradients, which rounding turns where these are small.
    """
    share, left_out = (0.02, ()) if precision == "32" else (0.1, (".bias", "lora_B.weight"))
    files = sorted(one.relative_to(folder) for one in folder.rglob("*.safetensors"))
    assert files == sorted(one.relative_to(other) for one in other.rglob("*.safetensors"))
    for file in files:
        theirs = dict(read_tensors(other / file))
        mine = dict(read_tensors(folder / file))
        assert {n: (v.shape, v.dtype) for n, v in mine.items()} == {
            n: (v.shape, v.dtype) for n, v in theirs.items()
        }
        for name, value in mine.items():
            if file.parent.name != "optimizer" and not name.endswith(left_out):
                apart = float((value - theirs[name]).norm())
                assert apart <= share * float(theirs[name].norm()), (file, name)


@pytest.mark.slow
def test_a_chain_of_adapters_in_16_bits(tmp_path):
    check(tmp_path, *FAST)


@pytest.mark.slow
@pytest.mark.parametrize("chain", CHAINS)
@pytest.mark.parametrize(
    ("kind", "precision"), [*((kind, "32") for kind in KINDS), ("bf16", "bf16"), ("fp32", "bf16")]
)
def test_a_chain_of_adapters(kind, precision, chain, tmp_path):
    check(tmp_path, kind, chain, precision)
