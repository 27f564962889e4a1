"""The guard against NaN and infinite losses and gradients."""

from __future__ import annotations

import math
from collections.abc import Callable

from vlbench.connector.bounded_building import connector_module_name
from vlbench.data.optimizer_step import OptimizerStep
from vlbench.distributed import collectives
from vlbench.errors import UserError
from vlbench.text_tables import list_some
from vlbench.train.callbacks import StageCallback
from vlbench.train.training_module import VLMTrainingModule


class NonFiniteGuard(StageCallback):
    """Name the samples of steps whose loss or gradient is NaN or infinite; stop after several."""

    def __init__(
        self,
        stage_name: str,
        max_nonfinite_steps: int,
        print_line: Callable[[str], None],
        record_divergence: Callable[[str], None],
    ) -> None:
        """Stop a stage after `max_nonfinite_steps` such steps in a row.

        `record_divergence` is called with the reason, in the first process.
        """
        self.stage_name, self.max_nonfinite_steps = stage_name, max_nonfinite_steps
        self.print_line, self.record_divergence = print_line, record_divergence
        self.nonfinite_streak: list[str] = []
        """`loss` or `gradient` for each of the last steps, as long as one was not finite."""

    def on_step_end(self, training: VLMTrainingModule, step: OptimizerStep) -> None:
        """Check the step that was just taken."""
        report = training.report
        if not report.skipped:
            self.nonfinite_streak = []
            return
        # a loss that is not finite makes the gradient so, too
        quantity = "gradient" if math.isfinite(report.loss) else "loss"
        self.nonfinite_streak.append(quantity)
        rank_names = [name for batch in step.micro_batches for name in batch.sample_ids]
        names = [name for rank in collectives.all_gather_objects(rank_names) for name in rank]
        self.print_line(
            f"stage {self.stage_name}, step {training.steps_done}: {quantity} is not finite, "
            f"step skipped; samples: {list_some(names, 8)}; loss {report.loss:.4g}, "
            f"norm of the gradient {report.grad_norm:.4g}"
        )
        streak_steps = len(self.nonfinite_streak)
        is_last = training.steps_done == training.total_steps
        if streak_steps >= self.max_nonfinite_steps or (
            is_last and streak_steps >= training.total_steps
        ):
            reason = self._give_up_message(training)
            if collectives.is_rank_zero():
                self.record_divergence(reason)
            raise collectives.error_for_rank(UserError(reason))

    def _give_up_message(self, training: VLMTrainingModule) -> str:
        quantities = sorted(set(self.nonfinite_streak), reverse=True)
        subject = " or ".join(f"the {quantity}" for quantity in quantities)
        rates = ", ".join(
            f"{part} {train_config.lr:g}"
            for part, train_config in training.stage.trained_parts.items()
        )
        streak_steps = len(self.nonfinite_streak)
        in_a_row = "step" if streak_steps == 1 else "steps in a row"
        fact = (
            f"stage {self.stage_name}: {subject} was not finite in {streak_steps} {in_a_row}, "
            f"up to step {training.steps_done}"
        )
        is_float32 = str(training.trainer.precision).startswith("32")
        other_precision = "" if is_float32 else ", or set precision=32"
        if streak_steps == training.steps_done:  # no step of the stage has changed a weight
            name = connector_module_name(type(training.vlm.connector))
            return (
                f"{fact}; no weight had changed by then, so that lower learning rates change "
                f"nothing: see whether the connector divides by zero (python -m vlbench "
                f"test-connector {name}), and what the stage began with{other_precision}"
            )
        return (
            f"{fact}: lower the learning rates (now {rates}: "
            f"stages.{self.stage_name}.train.PART.lr){other_precision}"
        )
