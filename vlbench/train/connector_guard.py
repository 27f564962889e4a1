"""The guard of a stage's first step: does the optimizer have every layer of the connector?"""

from __future__ import annotations

from collections.abc import Callable

from vlbench.connector.bounded_building import connector_module_name
from vlbench.data.optimizer_step import OptimizerStep
from vlbench.distributed import collectives
from vlbench.errors import UserError
from vlbench.text_tables import list_some
from vlbench.train.callbacks import StageCallback
from vlbench.train.training_module import VLMTrainingModule

SHOWN_NAMES = 4


class ConnectorGuard(StageCallback):
    """Refuse layers that `forward` made in the first step; name parameters without a gradient.

    The optimizer has what there was before the step: other layers are not trained, and a checkpoint
    that holds them fits no connector that is built anew.
    """

    def __init__(self, print_line: Callable[[str], None]) -> None:
        """`print_line` is called with what is worth knowing, in the first process."""
        self.print_line = print_line
        self._names: set[str] | None = None

    def on_stage_start(self, training: VLMTrainingModule) -> None:
        """Note the names of the connector's tensors."""
        self._names = set(training.vlm.connector.state_dict())

    def on_step_end(self, training: VLMTrainingModule, step: OptimizerStep) -> None:
        """Compare them after the first step, and look for gradients."""
        if self._names is None:
            return
        connector, known = training.vlm.connector, self._names
        self._names = None
        name = connector_module_name(type(connector))
        late = [one for one in connector.state_dict() if one not in known]
        if late:
            raise collectives.error_for_rank(
                UserError(
                    f"connector {name}: {list_some(late, SHOWN_NAMES)} did not exist before "
                    "forward ran, so the optimizer does not have them and no checkpoint could be "
                    "loaded: make all layers in __init__, with the sizes that `shapes` has"
                )
            )
        if not training.report.supervised_tokens or "connector" not in training.stage.trained_parts:
            return
        trained = [(key, one) for key, one in connector.named_parameters() if one.requires_grad]
        idle = [key for key, parameter in trained if parameter.grad is None]
        if idle:
            self.print_line(
                f"connector {name}: no gradient reaches {list_some(idle, SHOWN_NAMES)}: they stay "
                "as they begin, and count as its parameters all the same; see python -m vlbench "
                f"test-connector {name}"
            )
