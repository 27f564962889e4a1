"""Private parts of peft: which modules it has adapted, and how it names their parameters.

Checked with peft 0.21; 0.18 is the oldest that vlbench allows.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import nn

ADAPTER_MARK, BASE_LAYER_MARK = ".lora_", ".base_layer."


def is_adapter_name(name: str) -> bool:
    """Tell whether a parameter or module belongs to an adapter: `.lora_` is in its name.

    If the mark changes, adapters are not trained, and are written as weights of the base model.
    """
    return ADAPTER_MARK in f".{name}"


def base_parameter_name(name: str) -> str:
    """Return the name that a parameter of the base model has without adapters.

    An adapted layer keeps its own weights in `base_layer`.
    """
    return name.replace(BASE_LAYER_MARK, ".")


def is_adapted_layer(module: nn.Module) -> bool:
    """Tell whether a module is an adapted layer: a `tuners.tuners_utils.BaseTunerLayer`.

    Nothing is where peft was not imported, which takes 0.3 s.
    """
    tuners_utils = sys.modules.get("peft.tuners.tuners_utils")
    return tuners_utils is not None and isinstance(module, tuners_utils.BaseTunerLayer)


def is_targeted(config: Any, name: str) -> bool:
    """Tell whether `config` adapts the module `name`: `tuners_utils.check_target_module_exists`.

    It gives a truth value or a match. If it changes, adapters are put into other layers.
    """
    from peft.tuners.tuners_utils import check_target_module_exists

    return bool(check_target_module_exists(config, name))
