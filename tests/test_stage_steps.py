"""How many optimizer steps a stage has."""

from __future__ import annotations

import pytest

from vlbench.config.recipe import load_recipe
from vlbench.train.stage_plan import count_stage_steps


@pytest.mark.parametrize(
    ("length", "steps"),
    [
        ("epochs=0", 0),
        ("epochs=1", 63),
        ("epochs=2", 125),
        ("epochs=0.5", 32),
        ("epochs=0.0001", 1),
        ("steps=0", 0),
        ("steps=7", 7),
    ],
)
def test_steps_of_a_thousand_samples_in_batches_of_16(length: str, steps: int) -> None:
    words = [f"stages.chat.{length}", "stages.chat.global_batch_size=16"]
    stage = load_recipe(["recipe=yivl_llava", *words]).stages["chat"]
    assert count_stage_steps(stage, 1000) == steps
