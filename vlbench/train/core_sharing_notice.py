"""The line that tells why training has become slower, or fast again."""

from __future__ import annotations

from collections.abc import Callable

from vlbench.core_sharing import process_watch
from vlbench.data.optimizer_step import OptimizerStep
from vlbench.train.callbacks import StageCallback
from vlbench.train.training_module import VLMTrainingModule


class CoreSharingNotice(StageCallback):
    """Print a line when other processes begin or cease to want the cores of the training.

    The lines come after a step, in the thread that prints everything else.
    """

    def __init__(self, print_line: Callable[[str], None]) -> None:
        """Begin with cores that are not shared; one object is for all stages of a run."""
        self.print_line, self.is_sharing = print_line, False

    def on_step_end(self, training: VLMTrainingModule, step: OptimizerStep) -> None:
        """Print a line if that has changed since the last step."""
        is_sharing = process_watch().is_sharing
        if is_sharing and not self.is_sharing:
            self.print_line(
                "other processes use the cores too: threads that wait now sleep, which is slower "
                "and changes no result"
            )
        elif self.is_sharing and not is_sharing:
            self.print_line("the cores are free again")
        self.is_sharing = is_sharing
