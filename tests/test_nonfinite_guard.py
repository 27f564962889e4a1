"""A step that is not finite is skipped; a line says what was not finite, and what helps."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest

from vlbench.errors import UserError
from vlbench.train.nonfinite_guard import NonFiniteGuard
from vlbench.train.step_report import StepReport


def step(*names: str) -> Any:
    return SimpleNamespace(micro_batches=[SimpleNamespace(sample_ids=list(names))])


def training(position: int, loss: float, norm: float, precision: str = "bf16-mixed") -> Any:
    report = StepReport(position, loss=loss, grad_norm=norm)
    report.skipped = not (math.isfinite(loss) and math.isfinite(norm))
    parts = {"connector": SimpleNamespace(lr=10.0), "language": SimpleNamespace(lr=2e-5)}
    stage = SimpleNamespace(trained_parts=parts)
    trainer = SimpleNamespace(precision=precision)
    return SimpleNamespace(
        report=report, steps_done=position, total_steps=9, stage=stage, trainer=trainer
    )


@pytest.mark.parametrize(
    ("loss", "norm", "what"),
    [
        (math.nan, math.nan, "loss"),
        (math.inf, math.nan, "loss"),
        (2.5, math.inf, "gradient"),
        (2.5, math.nan, "gradient"),
    ],
)
def test_a_line_says_what_was_not_finite(loss, norm, what):
    said: list[str] = []
    NonFiniteGuard("chat", 5, said.append, said.append).on_step_end(
        training(3, loss, norm), step("a", "b")
    )
    (line,) = said
    assert line.startswith(f"stage chat, step 3: {what} is not finite, step skipped; samples: a, b")
    assert line.endswith(f"; loss {loss:.4g}, norm of the gradient {norm:.4g}")


def test_finite_steps_say_nothing_and_begin_anew():
    said: list[str] = []
    watcher = NonFiniteGuard("chat", 2, said.append, said.append)
    for number, norm in enumerate([math.inf, 1.0, math.inf, 1.0], 1):
        watcher.on_step_end(training(number, 2.5, norm), step("a"))
    assert len(said) == 2


@pytest.mark.parametrize(
    ("losses", "what"),
    [
        ([2.5, 2.5], "the gradient was"),
        ([math.nan, math.nan], "the loss was"),
        ([2.5, math.nan], "the loss or the gradient was"),
    ],
)
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_several_in_a_row_end_the_stage_with_what_helps(losses, what, precision):
    noted: list[str] = []
    watcher = NonFiniteGuard("chat", 2, lambda _: None, noted.append)
    watcher.on_step_end(training(4, losses[0], math.inf, precision), step("a"))
    with pytest.raises(UserError) as caught:
        watcher.on_step_end(training(5, losses[1], math.inf, precision), step("a"))
    said = str(caught.value)
    assert noted == [said]
    assert f"stage chat: {what} not finite in 2 steps in a row, up to step 5" in said
    assert "connector 10, language 2e-05: stages.chat.train.PART.lr" in said
    assert ("precision=32" in said) == (precision != "32-true") and "\n" not in said


def test_learning_rates_are_not_blamed_where_no_weight_has_changed():
    class Mine:
        pass

    watcher = NonFiniteGuard("chat", 2, lambda _: None, lambda _: None)
    first, second = (training(number, math.nan, math.nan, "32-true") for number in (1, 2))
    first.vlm = second.vlm = SimpleNamespace(connector=Mine())
    watcher.on_step_end(first, step("a"))
    with pytest.raises(UserError) as caught:
        watcher.on_step_end(second, step("a"))
    said = str(caught.value)
    assert "the loss was not finite in 2 steps in a row, up to step 2; no weight had" in said
    assert "test-connector test_nonfinite_guard" in said and "PART.lr" not in said
