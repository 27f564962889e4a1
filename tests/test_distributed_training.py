"""Two processes train as one: the same losses, checkpoints that fit any number, one voice."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from two_process_commands import (
    QUIET,
    TWO,
    FitCommand,
    read_losses,
    run_fit_command,
    run_in_two_processes,
)

from vlbench.data.scene_world import make_scene

RECIPES = ("yivl_llava", "yivl_qformer", "yivl_flamingo", "yivl_eva")
STRATEGIES = ("ddp", "fsdp2")
LORA = ("stages.chat.train.language.lora.rank=4", "stages.chat.train.language.lr=1e-3")
WAYS = {
    **{name: (f"recipe={name}", "only=chat") for name in RECIPES},
    "lora": ("recipe=yivl_llava", "only=chat", *LORA),
    "frozen": ("recipe=yivl_llava", "only=align_448", "stages.align_448.sample_format=chat"),
}
HALF = "bf16"
# a sample a row in any number of processes: how many a row has changes the rounding to 16 bits
ROWS_ALIKE = "stages.chat.max_tokens_per_row=16"
WAYS[HALF] = ("recipe=yivl_llava", "only=chat", "precision=bf16", ROWS_ALIKE)
NEAR = {HALF: 0.01}  # rounding to 16 bits grows from step to step
STEPS = 6


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, ...]:
    """Words that name conversations of which every second has no image."""
    folder = tmp_path_factory.mktemp("data")
    records = []
    for number in range(24):
        image = {} if number % 2 else {"image": f"{number}.png"}
        place = "" if number % 2 else "<image>\n"
        if image:
            make_scene("processes", 0, number).open().save(folder / f"{number}.png")
        told = [f"{place}What is number {number}?", "It is red. " * (1 + number % 5)]
        turns = [{"from": who, "value": v} for who, v in zip(("human", "gpt"), told, strict=True)]
        records.append({"id": str(number), **image, "conversations": turns})
    (folder / "data.json").write_text(json.dumps(records))
    return f"data.train={folder / 'data.json'}", f"data.images={folder}"


def words(way: str, run: Path, data: tuple[str, ...], *more: str) -> tuple[str, ...]:
    """Return a command: 2 samples a step, one with an image and one without for two processes."""
    stage = "align_448" if way == "frozen" else "chat"
    short = (
        f"stages.{stage}.global_batch_size=2",
        f"stages.{stage}.image_size=56",
        "data.workers=0",
    )
    return (
        *WAYS[way],
        *short,
        f"stages.{stage}.steps=400",
        *data,
        *QUIET,
        f"run={run}",
        *more,
    )


@pytest.fixture(scope="module")
def curves(data, tmp_path_factory) -> dict[tuple[str, str], list[float]]:
    """Losses by way and strategy, in float64 but for one; "alone" is one process."""
    folder = tmp_path_factory.mktemp("curves")
    for way in WAYS:
        assert (
            run_fit_command(
                FitCommand(words(way, folder / f"{way}-alone", data), STEPS, way != HALF)
            )
            == 130
        )
    jobs = [
        FitCommand(
            words(way, folder / f"{way}-{how}", data, TWO, f"trainer.strategy={how}"),
            STEPS,
            is_float64=way != HALF,
        )
        for way in WAYS
        for how in STRATEGIES
    ]
    assert run_in_two_processes(jobs) == [(130, 130)] * len(jobs)
    return {
        (way, how): read_losses(folder / f"{way}-{how}")
        for way in WAYS
        for how in ("alone", *STRATEGIES)
    }


@pytest.mark.parametrize("how", STRATEGIES)
@pytest.mark.parametrize("way", WAYS)
def test_two_processes_have_the_losses_of_one(way, how, curves):
    alone, together = curves[way, "alone"], curves[way, how]
    assert len(alone) == len(together) == STEPS
    assert len(set(alone)) == STEPS  # something is learned
    assert together[0] == pytest.approx(alone[0], rel=1e-6 if way == HALF else 1e-9)
    assert together == pytest.approx(alone, rel=NEAR.get(way, 1e-9))


KINDS = {"one": (), **{how: (TWO, f"trainer.strategy={how}") for how in STRATEGIES}}
CHANGES = [("one", "ddp"), ("one", "fsdp2"), ("ddp", "one"), ("fsdp2", "one"), ("ddp", "fsdp2")]
STOP = 3


@pytest.fixture(scope="module")
def resumed(data, tmp_path_factory) -> dict[tuple[str, str], list[float]]:
    """Losses in float32 of two stages, stopped in the second by one kind, ended by another."""
    folder = tmp_path_factory.mktemp("resumed")

    def job(begins: str, ends: str, now: str, stop: int) -> FitCommand:
        given = ["recipe=yivl_llava", "only=[align_448,chat]", *QUIET, *data, "data.workers=0"]
        for stage, steps in (("align_448", 2), ("chat", 6)):
            settings = (f"steps={steps}", "global_batch_size=4", "image_size=56")
            given += [f"stages.{stage}.{setting}" for setting in settings]
        return FitCommand((*given, f"run={folder / f'{begins}-{ends}'}", *KINDS[now]), stop)

    assert run_fit_command(job("one", "one", "one", 0)) == 0
    todo = [(job(a, b, a, STOP), a, 130) for a, b in CHANGES]
    todo += [(job(a, b, b, 0), b, 0) for a, b in CHANGES]
    for step in (todo[: len(CHANGES)], todo[len(CHANGES) :]):
        assert [run_fit_command(one) for one, kind, _ in step if kind == "one"] == [
            code for _, kind, code in step if kind == "one"
        ]
        assert run_in_two_processes([one for one, kind, _ in step if kind != "one"]) == [
            (code, code) for _, kind, code in step if kind != "one"
        ]
    return {(a, b): read_losses(folder / f"{a}-{b}") for a, b in [("one", "one"), *CHANGES]}


@pytest.mark.parametrize("change", CHANGES, ids=" to ".join)
def test_a_run_goes_on_with_another_number_of_processes(change, resumed):
    assert len(resumed[change]) == 8
    assert resumed[change] == pytest.approx(resumed["one", "one"], rel=1e-3)
    assert resumed[change][0] == pytest.approx(resumed["one", "one"][0], rel=1e-5)
