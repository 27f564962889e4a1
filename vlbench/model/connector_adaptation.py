"""A connector's weights at a new image size: adapted by the connector, compared, and loaded."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from vlbench.connector import registry
from vlbench.connector.base import Connector, Shapes
from vlbench.connector.bounded_building import connector_module_name
from vlbench.errors import UserError
from vlbench.model.view_tokens import NEWLINE_NAME
from vlbench.model.weights.tensor_groups import move_and_cast
from vlbench.state_dicts import check_state


def load_adapted_state(
    connector: Connector, old_state: Mapping[str, Tensor], old_shapes: Shapes, shapes: Shapes
) -> None:
    """Load the state dict of the same connector at other shapes, with its type and device.

    Args:
        connector: A new one at `shapes`.
        old_state: Of the connector that it replaces.
        old_shapes: What that one was built for.
        shapes: What the new one was built for.

    Raises:
        UserError: `adapt` fails, or gives tensors that do not fit; it names the connector.
    """
    adapted = _adapt_state(connector, old_state, old_shapes, shapes)
    connector.load_state_dict(adapted, strict=True)
    numbers = [tensor for tensor in adapted.values() if tensor.is_floating_point()]
    if numbers:
        move_and_cast(connector, numbers[0].dtype, numbers[0].device)


def check_adaptation(
    connector: Connector, old_connector: Connector, old_shapes: Shapes, shapes: Shapes
) -> None:
    """Raise a UserError if a stage that changes the image size would fail; both are on `meta`.

    Else it fails when the stages before are trained. An `adapt` that needs numbers cannot run here.
    """
    try:
        _adapt_state(connector, old_connector.state_dict(), old_shapes, shapes)
    except UserError as error:
        cause = error.__cause__
        if not isinstance(cause, NotImplementedError) and "meta" not in str(cause).lower():
            raise


def _adapt_state(
    connector: Connector, old_state: Mapping[str, Tensor], old_shapes: Shapes, shapes: Shapes
) -> dict[str, Tensor]:
    newline = {key: old_state[key] for key in (NEWLINE_NAME,) if key in old_state}
    own_state = {key: tensor for key, tensor in old_state.items() if key not in newline}
    with registry.blame_connector_errors():
        adapted = {**connector.adapt(own_state, old_shapes), **newline}
    before, after = (f"{rows} x {columns}" for rows, columns in (old_shapes.grid, shapes.grid))
    name = connector_module_name(type(connector))
    check_state(
        connector.state_dict(),
        adapted,
        f"connector {name}: a stage changes the image from {before} to {after} patches, and what "
        "adapt() gives does not fit",
    )
    return adapted
