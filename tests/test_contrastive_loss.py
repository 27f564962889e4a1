"""Pairs are compared with those of the global batch, however it is packed and shared out."""

from __future__ import annotations

import csv
import weakref
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
from kept_gradients import KeptGradients
from random_vlm import SMALL, make_batch, make_sample, small_vlm
from test_vlm import assert_same
from torch import Tensor
from torch.utils.data import DataLoader
from two_process_commands import QUIET, TWO, FitCommand, run_fit_command, run_in_two_processes

from vlbench.config import recipe as recipes
from vlbench.config.stage_schema import PartTrainConfig
from vlbench.connector import registry
from vlbench.data.optimizer_step import OptimizerStep
from vlbench.distributed import collectives
from vlbench.model import blip2_objective
from vlbench.model.contrastive_loss import add_contrast_pools
from vlbench.model.loaded_vlm import LoadedVLM
from vlbench.train.callbacks import held_out_losses
from vlbench.train.step_report import StepReport
from vlbench.train.trainable_parts import freeze_untrained_parts
from vlbench.train.training_module import VLMTrainingModule

PAIRS = 32
PACKINGS = {
    "4 x 8": [list(range(first, first + 8)) for first in range(0, PAIRS, 8)],
    "32 x 1": [[number] for number in range(PAIRS)],
    "unlike, in another order": [
        [31],
        list(range(30, 14, -1)),
        [0, 5, 3],
        [1, 2, 4, *range(6, 15)],
    ],
}


def prepared(vision: bool = False) -> LoadedVLM:
    """Return the small model in BLIP-2's first stage, in float64; `vision`: its encoder learns."""
    qformer = registry.load_connector("qformer")
    vlm = small_vlm(qformer, {**SMALL["qformer"], "itc_width": 8})
    torch.manual_seed(5)
    freeze_untrained_parts(vlm.model, stage_of(vision))
    vlm.connector.text.temp.data.fill_(0.3)  # small random weights: draws differ all the same
    return vlm.to(torch.float64)


def stage_of(vision: bool):
    """Return the stage, without clipping; rates that change nothing."""
    stage = recipes.load_recipe(["recipe=yivl_blip2"]).stages["blip2"]
    stage.train["connector"] = PartTrainConfig(lr=1e-9)
    if vision:
        stage.train["vision"] = PartTrainConfig(lr=1e-9)
    return stage


def step(vlm: LoadedVLM, packing: Sequence[Sequence[int]]) -> OptimizerStep:
    """Return one step over 32 pairs, in rows of the given numbers of samples."""
    rows = [[make_sample(number, words=number % 7) for number in row] for row in packing]
    return OptimizerStep(0, [make_batch(vlm, [row]).to("cpu", torch.float64) for row in rows])


def learned(packing: Sequence[Sequence[int]], vision: bool) -> tuple[StepReport, dict[str, Tensor]]:
    """Return what a training step tells and its gradients."""
    vlm = prepared(vision)
    training = VLMTrainingModule(vlm.model, stage_of(vision), 1, 0, seed=3)
    kept = KeptGradients()
    trainer = pl.Trainer(accelerator="cpu", max_steps=1, barebones=True, callbacks=[kept])
    trainer.fit(training, DataLoader([step(vlm, packing)], batch_size=None))
    return training.report, kept.gradients


@pytest.fixture(scope="module", params=[False, True], ids=["frozen encoder", "trained encoder"])
def whole(request) -> tuple[bool, StepReport, dict[str, Tensor]]:
    """The step of one micro-batch with all pairs, as the reference takes it."""
    return request.param, *learned([list(range(PAIRS))], request.param)


@pytest.mark.parametrize("packing", PACKINGS)
def test_a_step_is_the_same_however_it_is_packed(packing, whole):
    vision, report, grads = whole
    found, other = learned(PACKINGS[packing], vision)
    assert found.extra == pytest.approx(report.extra, rel=1e-9)
    assert report.extra["itc"] > 3 and found.loss == pytest.approx(report.loss, rel=1e-9)
    assert (
        "connector.text.temp" in grads
        and any(name.startswith("vision.") for name in grads) == vision
    )
    assert_same((report.loss, grads), (found.loss, other), 1e-9)


class Live:
    """Bytes of what is kept for backward passes, and their peak."""

    def __init__(self) -> None:
        self.now = self.most = 0

    def keep(self, tensor: Tensor) -> Kept:
        """Count a tensor until it is let go."""
        kept, size = Kept(tensor), tensor.nbytes
        self.now += size
        self.most = max(self.most, self.now)
        weakref.finalize(kept, self.drop, size)
        return kept

    def drop(self, size: int) -> None:
        self.now -= size


@dataclass(eq=False)
class Kept:
    tensor: Tensor


def test_a_step_keeps_the_graph_of_one_micro_batch():
    peaks = []
    for packing in ([list(range(PAIRS))], PACKINGS["4 x 8"], PACKINGS["32 x 1"]):
        live = Live()
        with torch.autograd.graph.saved_tensors_hooks(live.keep, lambda kept: kept.tensor):
            learned(packing, True)
        peaks.append(live.most)
    assert peaks[1] < peaks[0] / 3 and peaks[2] < peaks[0] / 12


def test_negatives_follow_from_the_sample_and_not_from_its_place(monkeypatch):
    drawn: dict[str, tuple[str, str]] = {}
    real = blip2_objective.Blip2Objective.select_negative_pairs

    def noted(packing: Sequence[Sequence[int]]) -> dict[str, tuple[str, str]]:
        drawn.clear()
        learned(packing, False)
        return dict(drawn)

    def negatives(self, pairs, own, seeds):
        chosen = real(self, pairs, own, seeds)
        names = sorted(f"s{number}" for number in range(PAIRS))
        for seed, image, caption in zip(seeds, *map(Tensor.tolist, chosen), strict=True):
            drawn[seed] = (names[image], names[caption])
        return chosen

    monkeypatch.setattr(blip2_objective.Blip2Objective, "select_negative_pairs", negatives)
    first = noted([list(range(PAIRS))])
    assert len(first) == PAIRS and len({image for image, _ in first.values()}) > PAIRS / 4
    assert all(seed.split()[-1] not in names for seed, names in first.items())
    assert all(noted(packing) == first for packing in PACKINGS.values())


def test_equal_ids_are_told_apart_by_where_they_stand_in_the_stream():
    vlm = prepared()
    batch = make_batch(vlm, [[replace(make_sample(number), id="same") for number in (1, 2)]])
    keys = replace(batch, stream_index=[41, 40]).sample_keys()
    assert len(set(keys)) == 2 and keys[::-1] == replace(batch, stream_index=[40, 41]).sample_keys()


def test_the_held_out_loss_does_not_depend_on_the_packing():
    vlm = prepared()
    found = [
        held_out_losses(vlm.model, step(vlm, packing).micro_batches)
        for packing in ([list(range(PAIRS))], *PACKINGS.values())
    ]
    assert found[0]["itc"] > 3
    for one in found[1:]:
        assert one == pytest.approx(found[0], rel=1e-9)


def test_a_trial_of_one_process_asks_no_other(monkeypatch):
    vlm = prepared()
    for name in ("all_gather_objects", "all_gather_rows", "fetch_rows"):
        monkeypatch.setattr(collectives, name, lambda *_: pytest.fail("asked others"))
    batch = add_contrast_pools(
        vlm.model, step(vlm, [[1, 2, 3]]).micro_batches, all_processes=False
    )[0]
    losses = {name: value for name, (value, _) in vlm(batch).extra.items()}
    assert len(batch.contrast_pool.local_indices) == 3 and all(
        value.isfinite() for value in losses.values()
    )


def test_in_bfloat16_every_parameter_learns_from_every_micro_batch(whole):
    """What autocast keeps of the pass without a graph must not stand in for weights."""
    vision, _, exact = whole
    for packing in PACKINGS.values():
        vlm = prepared(vision).to(torch.float32)
        training = VLMTrainingModule(vlm.model, stage_of(vision), 1, 0, seed=3)
        kept = KeptGradients()
        trainer = pl.Trainer(
            accelerator="cpu",
            precision="bf16-mixed",
            max_steps=1,
            barebones=True,
            callbacks=[kept],
        )
        batches = [one.to("cpu", torch.float32) for one in step(vlm, packing).micro_batches]
        trainer.fit(training, DataLoader([OptimizerStep(0, batches)], batch_size=None))
        assert training.report.extra["itc"] == pytest.approx(3.465, abs=0.05)
        itg = "connector.text.dense.weight"  # draws differ by rounding, so ITM's gradients do
        found = kept.gradients
        assert (found[itg] - exact[itg]).abs().max() < 0.05 * exact[itg].abs().max()
        assert found.keys() == exact.keys()


def words(run: Path, *more: str) -> tuple[str, ...]:
    """Return a command: BLIP-2's first stage alone, 7 pairs a step."""
    stage = (
        "only=blip2",
        "stages.blip2.global_batch_size=7",
        "stages.blip2.steps=2",
        "data.workers=0",
    )
    return ("recipe=yivl_blip2", *stage, *QUIET, "data.samples=40", f"run={run}", *more)


def told(run: Path) -> list[dict[str, float]]:
    """Return what every step of a run said that must not depend on how it was computed."""
    names = ("loss", "grad_norm", "itc", "itm", "itg", "held_out_itc", "held_out_itm")
    with (run / "metrics.csv").open() as file:
        return [{name: float(row[name] or 0) for name in names} for row in csv.DictReader(file)]


ENCODER = "stages.blip2.train.vision.lr=1e-4"
WAYS = {
    "alone": (),
    "alone, trained encoder": (ENCODER,),
    "ddp": (TWO, "trainer.strategy=ddp", "stages.blip2.max_tokens_per_row=60"),
    "ddp, trained encoder": (TWO, "trainer.strategy=ddp", ENCODER),
    "fsdp2": (TWO, "trainer.strategy=fsdp2", "stages.blip2.max_tokens_per_row=60"),
}


@pytest.fixture(scope="module")
def curves(tmp_path_factory) -> dict[str, list[dict[str, float]]]:
    """What runs in float64 told, by way."""
    folder = tmp_path_factory.mktemp("contrast")
    runs = {way: folder / str(number) for number, way in enumerate(WAYS)}
    jobs = {
        way: FitCommand(words(runs[way], *more), 2, is_float64=True) for way, more in WAYS.items()
    }
    two = [way for way, more in WAYS.items() if TWO in more]
    assert [run_fit_command(jobs[way]) for way in WAYS if way not in two] == [130] * (
        len(WAYS) - len(two)
    )
    assert run_in_two_processes([jobs[way] for way in two]) == [(130, 130)] * len(two)
    return {way: told(run) for way, run in runs.items()}


@pytest.mark.slow
@pytest.mark.parametrize("way", [way for way in WAYS if not way.startswith("alone")])
def test_runs_tell_the_same_whatever_computes_them(way, curves):
    expected = curves["alone, trained encoder" if "trained encoder" in way else "alone"]
    assert len(curves[way]) == len(expected) == 2
    assert expected[0]["itc"] > 1.5 and expected[-1]["held_out_itc"] > 2
    for one, other in zip(curves[way], expected, strict=True):
        assert one == pytest.approx(other, rel=1e-8)


def test_a_stopped_stage_goes_on_as_if_it_had_not_been(tmp_path):
    rows = ("stages.blip2.max_tokens_per_row=100",)
    assert run_fit_command(FitCommand(words(tmp_path / "whole", *rows))) == 0
    assert run_fit_command(FitCommand(words(tmp_path / "parts", *rows), 1)) == 130
    assert run_fit_command(FitCommand(words(tmp_path / "parts", *rows))) == 0
    ends = [
        next((tmp_path / name / "checkpoints").glob("0-blip2-000002"))
        for name in ("whole", "parts")
    ]
    states = [(end / "model.safetensors").read_bytes() for end in ends]
    assert states[0] == states[1] and told(tmp_path / "whole") == told(tmp_path / "parts")
