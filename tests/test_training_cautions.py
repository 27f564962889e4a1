"""Cautions of a report: rows that were not trained alike, or whose scores leave no room."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from test_report_command import run

from vlbench.compare.report.analysis import analyze_runs
from vlbench.compare.report.comparison_warnings import comparison_warnings
from vlbench.compare.report.finished_runs import load_finished_run
from vlbench.compare.report.learning_trend import find_fall, row_fall
from vlbench.compare.report.score_limits import RowScore, floor_and_ceiling_warnings
from vlbench.compare.report.unequal_spreads import unequal_spreads_warning

LINEAR = "connector.name=linear"
SPENT = {"samples": 9600, "supervised_tokens": 5000}
SPENT |= {"truncated_samples": 0, "lost_supervised_tokens": 0}
STEPS = {"steps": {"align_224": 250, "chat": 450}, "epochs": {"align_224": 1.0, "chat": 2.0}}


def spent(folder: Path, **changes: object) -> Path:
    results = json.loads((folder / "results.json").read_text())
    results["budget"] = {**SPENT, **STEPS, **changes}
    (folder / "results.json").write_text(json.dumps(results))
    return folder


def cautions(*folders: Path) -> str:
    return "\n".join(analyze_runs([load_finished_run(folder) for folder in folders]).warnings)


def pair(folder: Path, *words: str, **changes: object) -> tuple[Path, Path]:
    """Make two runs, of which the second was trained with other words and spent otherwise."""
    first, other = run(folder / "a", 0.8, 0), run(folder / "b", 0.8, 0, LINEAR, *words)
    return spent(first), spent(other, **changes)


def test_rows_that_were_trained_alike_are_told_nothing_of_training(tmp_path):
    said = cautions(*pair(tmp_path))
    assert "One seed" in said and len(said.splitlines()) == 1


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"steps": {"chat": 800}}, "optimizer steps 700 (llava_mlp), 800 (linear)"),
        ({"samples": 12800}, "samples 9,600 (llava_mlp), 12,800 (linear)"),
        ({"epochs": {"chat": 4.5}}, "epochs 3 (llava_mlp), 4.5 (linear)"),
        ({"supervised_tokens": 6000}, "supervised tokens 5,000 (llava_mlp), 6,000 (linear)"),
    ],
)
def test_other_budgets_are_told(changes, words, tmp_path):
    assert f"Training budgets differ: {words}." in cautions(*pair(tmp_path, **changes))


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (
            ["stages.align_224.train.vision=null"],
            "align_224: vision + connector (llava_mlp), connector (linear).",
        ),
        (
            ["stages.chat.train.language.lora.rank=4"],
            "chat: vision + connector + language (llava_mlp), "
            "vision + connector + language as LoRA (linear).",
        ),
    ],
)
def test_other_trained_parts_are_told(words, told, tmp_path):
    assert f"Different parts are trained: {told}" in cautions(*pair(tmp_path, *words))


def test_truncation_is_told_row_by_row(tmp_path):
    cut = {"truncated_samples": 4800, "lost_supervised_tokens": 1000}
    said = cautions(*pair(tmp_path / "one", **cut, supervised_tokens=4000))
    assert (
        "Cut off at language.max_length, unequally: nothing (llava_mlp), 50.0% of samples "
        "and 20.0% of supervised tokens (linear)." in said
    )
    first, other = pair(tmp_path / "both", **cut)
    assert "Cut off at language.max_length, in all rows alike: 50.0%" in cautions(
        spent(first, **cut), other
    )


def test_a_connector_without_its_own_first_stage_is_told(tmp_path):
    first, other = pair(tmp_path, unused_objectives=["blip2"])
    said = cautions(first, other)
    assert "(objective=blip2, as in recipe=yivl_blip2): give it that stage, or weights" in said
    origin = {"weights": {"connector": {"source": "blip2.safetensors", "sha256": ""}}}
    (other / "versions.json").write_text(json.dumps(origin))
    said = cautions(first, other)
    assert "objective=" not in said
    assert "Connectors began differently: at random (llava_mlp), pretrained (linear)." in said


def test_seeds_that_share_their_first_weights_are_told(tmp_path):
    words = ["only=chat", "init=begun"]
    runs = [spent(run(tmp_path / str(seed), 0.8, seed, *words)) for seed in range(2)]
    assert "All seeds of llava_mlp began with the same init=begun" in cautions(*runs)


def test_times_of_other_devices_are_told(tmp_path):
    words = ["trainer.devices=4", "activation_checkpointing=full"]
    said = cautions(*pair(tmp_path, *words))
    assert (
        "Times and memory are of different settings: activation_checkpointing (none, full)" in said
    )
    assert "trainer.devices (1, 4)" in said


def test_two_rows_whose_seeds_spread_differently():
    told = unequal_spreads_warning({"llava": 0.01, "qformer": 0.042}, 1000)
    assert told.startswith("Seeds of qformer spread 4.2 times as far as those of llava.")
    assert not unequal_spreads_warning({"llava": 0.01, "qformer": 0.029}, 1000)
    assert not unequal_spreads_warning({"llava": 0.0, "qformer": 0.002}, 1000)  # of two answers
    assert not unequal_spreads_warning({"a": 0.01, "b": 0.01, "c": 0.1}, 1000)
    assert not unequal_spreads_warning({"a": None, "b": None}, 1000)


def test_floor_and_ceiling():
    good, low = RowScore("a", 0.98, 0.97, 0.2), RowScore("b", 0.25, 0.19, 0.2)
    above = RowScore("c", 0.6, 0.55, 0.2)
    told = floor_and_ceiling_warnings([good, low, above], [("colour", [0.98, 0.2, 0.7])])
    assert [line.split(":")[1] for line in told] == [
        " b (25.0%, blank 20.0%). Longer training or other rates may change everything about them.",
        " a. Differences above it hardly show; harder questions would tell more.",
    ]
    assert floor_and_ceiling_warnings([above, above], [("colour", [0.6, 0.99])]) == []
    (easy,) = floor_and_ceiling_warnings([above, above], [("colour", [0.99, 0.98]), ("x", [0, 1])])
    assert "tell nothing apart: colour." in easy


STEP_COUNT, EVERY = 450, 25


def simulate(rng, kind: str, noise: float, wander: float) -> list[tuple[int, float]]:
    """Draw a curve: a shape, lognormal noise of each point, and wander that neighbours share."""
    steps = np.arange(EVERY, STEP_COUNT + 1, EVERY)
    share = steps / STEP_COUNT
    shapes = {
        "flat": np.ones_like(share),
        "converged": 1 + 8 * np.exp(-12 * share),
        "annealed": 1 - 0.12 * (1 - np.cos(np.pi * np.clip((share - 0.5) / 0.5, 0, 1))) / 2,
        "falling": share**-0.8,
        "late": 2.5 - 1.5 / (1 + np.exp(-12 * (share - 0.85))),
    }
    drift = np.zeros(len(steps))
    for index in range(1, len(steps)):
        drift[index] = 0.7 * drift[index - 1] + rng.normal(0, wander)
    losses = 0.05 * shapes[kind] * np.exp(rng.normal(0, noise, len(steps)) + drift)
    return list(zip(steps.tolist(), losses.tolist(), strict=True))


@pytest.mark.parametrize("seeds", [1, 2, 3, 5])
@pytest.mark.parametrize(
    ("kind", "noise", "wander", "low", "high"),
    [
        ("flat", 0.1, 0.0, 0, 0.05),
        ("flat", 0.3, 0.0, 0, 0.07),
        ("flat", 0.05, 0.05, 0, 0.07),
        ("converged", 0.1, 0.0, 0, 0.05),
        ("annealed", 0.1, 0.0, 0, 0.12),
        ("falling", 0.1, 0.0, 0.9, 1),
        ("late", 0.1, 0.0, 0.9, 1),
    ],
)
def test_rows_that_still_improve_are_found_and_others_left_alone(
    kind, noise, wander, low, high, seeds
):
    rng = np.random.default_rng(seeds)
    trials = 200
    found = sum(
        find_fall([simulate(rng, kind, noise, wander) for _ in range(seeds)]) is not None
        for _ in range(trials)
    )
    assert low <= found / trials <= high


def test_the_fall_is_that_of_the_last_third():
    curve = [(step, 3.0 * step**-0.8) for step in range(50, 451, 50)]
    assert find_fall([curve]) == pytest.approx(1 - 1.5**-0.8)
    assert find_fall([curve[:2]]) is None and find_fall([]) is None
    assert find_fall([curve, [(step, 0.0) for step, _ in curve]]) is None


def test_the_held_out_loss_comes_first_and_training_where_it_is_missing(tmp_path):
    header, lines = "stage,step,loss,held_out_loss,seconds", []
    for step in range(25, 451, 25):
        held_out = 5 / step if step % 100 == 0 or step == 450 else ""
        lines.append(f"chat,{step},1.0,{held_out},9.0")
    (tmp_path / "metrics.csv").write_text("\n".join([header, *lines, "chat,475,,,"]))
    fall = row_fall([tmp_path], "chat")
    assert fall is not None and fall.is_held_out and fall.share == pytest.approx(1 / 3)
    (tmp_path / "metrics.csv").write_text("\n".join([header, *lines[:3]]))
    assert row_fall([tmp_path], "chat") is None
    assert row_fall([tmp_path], "align_224") is None


def test_a_row_that_still_improves_is_told(tmp_path):
    first, other = pair(tmp_path)
    lines = [f"chat,{step},{step**-0.8},,9.0" for step in range(25, 451, 25)]
    (other / "metrics.csv").write_text("\n".join(["stage,step,loss,held_out_loss,seconds", *lines]))
    said = cautions(first, other)
    assert "Still improving at the end" in said and "linear (its training loss fell by 28%" in said


def test_all_rows_that_still_improve_are_in_one_sentence_with_those_of_other_budgets(tmp_path):
    folders = pair(tmp_path)
    lines = [f"chat,{step},{step**-0.8},,9.0" for step in range(25, 451, 25)]
    for folder in folders:
        (folder / "metrics.csv").write_text(
            "\n".join(["stage,step,loss,held_out_loss,seconds", *lines])
        )
    arms = analyze_runs([load_finished_run(folder) for folder in folders]).arms
    said = comparison_warnings(arms, [0], [], {}, compared=[[arm] for arm in arms])
    [sentence] = [one for one in said if "Still improving" in one]
    assert all(f"{name} (its training loss fell" in sentence for name in ("llava_mlp", "linear"))
