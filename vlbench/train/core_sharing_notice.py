"""The line that tells that other processes use the cores of a training."""

from __future__ import annotations

from collections.abc import Callable

from vlbench.core_sharing import process_watch
from vlbench.data.optimizer_step import OptimizerStep
from vlbench.train.callbacks import StageCallback
from vlbench.train.training_module import VLMTrainingModule


class CoreSharingNotice(StageCallback):
    """Print one line in a run when other processes begin to want the cores of the training.

    Data workers of the run are such processes as well, and come and go; a line for each change
    would say little. The line comes after a step, in the thread that prints everything else.
    """

    def __init__(self, print_line: Callable[[str], None]) -> None:
        """Begin with cores that were not shared; one object is for all stages of a run."""
        self.print_line, self.was_sharing = print_line, False

    def on_step_end(self, training: VLMTrainingModule, step: OptimizerStep) -> None:
        """Print the line if the cores are shared for the first time."""
        if process_watch().is_sharing and not self.was_sharing:
            self.was_sharing = True
            self.print_line(
                "other processes use the cores too (data workers of this run may be among them): "
                "meanwhile threads sleep where they wait for each other, which changes no result"
            )
