"""LLaVA's projector in files: `mm_projector.bin`, `non_lora_trainables.bin`, or a whole model.

The single Linear layer of LLaVA v1 is `model.mm_projector.weight` and `.bias`. Later MLPs number
their layers: `model.mm_projector.0.weight`. TinyLLaVA writes `_connector.`, transformers
`multi_modal_projector.linear_1.` and `linear_2.`, and LLaMA-Factory for Yi-VL `linear_1.` to
`linear_4.`, of which the second and the fourth are LayerNorms.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from torch import Tensor, nn

from vlbench.command_line.overrides import format_override
from vlbench.connector.base import Connector
from vlbench.errors import UserError

PROJECTOR_NAME_PATTERN = re.compile(
    r"(?:.*\.)?(?:mm_projector|multi_modal_projector|_connector)\.(?P<inside>.+)"
    r"|(?P<bare>(?:\d+\.)?(?:weight|bias))"
)
HF_LAYER_NUMBERS = {"linear_1": "0", "linear_2": "2"}
"""transformers' names of layers -> their index in LLaVA's `nn.Sequential`."""
YI_VL_LAYER_NUMBERS = {"linear_1": "0", "linear_2": "1", "linear_3": "3", "linear_4": "4"}
"""LLaMA-Factory's names of the layers of Yi-VL's projector, likewise."""
OTHER_PARTS_PATTERN = (
    r"(model\.)*(embed_tokens|layers|norm|vision_tower|image_newline|language_model|vision_model)\b.*"
    r"|lm_head\..*"
)
"""Names of the other parts of a LLaVA; files of projectors may hold `embed_tokens`."""


def read_mm_projector(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the projector in `weights` by its keys in LLaVA's `nn.Sequential`.

    Raises:
        ValueError: when there is none, or a tensor is there twice.
    """
    state: dict[str, Tensor] = {}
    has_norms = any(name.endswith("multi_modal_projector.linear_4.weight") for name in weights)
    layer_numbers = YI_VL_LAYER_NUMBERS if has_norms else HF_LAYER_NUMBERS
    for name in weights:
        match = PROJECTOR_NAME_PATTERN.fullmatch(name)
        if match is None:
            continue
        layer, _, kind = (match["inside"] or match["bare"]).rpartition(".")
        key = f"{layer_numbers.get(layer, layer) or 0}.{kind}"
        if key in state:
            raise ValueError(f"{key} of the projector is there twice, the second time as {name}")
        state[key] = weights[name]
    if not state:
        examples = ", ".join(list(weights)[:3])
        raise ValueError(f"no tensor is called mm_projector.0.weight or the like ({examples}, ...)")
    return state


def check_projector_options(
    state: Mapping[str, Tensor], projector: nn.Sequential, option_prefix: str
) -> None:
    """Compare the layers of `projector` with those in `state`.

    Args:
        state: The weights, by the keys of LLaVA's `nn.Sequential`.
        projector: The layers that they are for.
        option_prefix: Before the suggested options, for example "connector.name=llava_mlp ".

    Raises:
        ValueError: names the options with which a projector has the layers in `state`.
    """
    depth, norm, ratio = stored_layers = _projector_depth_norm_ratio(state)
    if depth and stored_layers != _projector_depth_norm_ratio(projector.state_dict()):
        options: dict[str, bool | float] = {"depth": depth, "norm": norm}
        options |= {"mlp_ratio": ratio} if ratio != 1 else {}
        words = [format_override(f"connector.{key}", value) for key, value in options.items()]
        plural = "s" if depth > 1 else ""
        raise ValueError(
            f"the weights are {depth} Linear layer{plural} {'with' if norm else 'without'} "
            f"LayerNorms: say {option_prefix}{' '.join(words)}"
        )


def _projector_depth_norm_ratio(state: Mapping[str, Tensor]) -> tuple[int, bool, float]:
    """Return the number of Linear layers, whether LayerNorms follow, and the ratio of widths.

    The ratio is the output width of the first Linear layer divided by that of the last.
    """
    weights = {key: tensor for key, tensor in state.items() if key.endswith(".weight")}
    linear_keys = [key for key, tensor in weights.items() if tensor.dim() == 2]
    linear_keys.sort(key=lambda key: int(re.sub(r"\D", "", key) or 0))
    widths = [len(weights[key]) for key in linear_keys]
    ratio = widths[0] / widths[-1] if len(widths) > 1 else 1.0
    return len(linear_keys), len(weights) > len(linear_keys), ratio


def require_projector(connector: Connector, layout_name: str) -> nn.Sequential:
    """Return the layers of a connector that released layouts can hold.

    Raises:
        UserError: when it is no projector of Linear layers.
    """
    projector = connector.released_projector()
    if projector is None:
        raise UserError(
            f"connector {type(connector).__name__} does not fit into {layout_name}, which "
            "holds a projector of Linear layers as wide as the language model; format=vlbench "
            "keeps every connector"
        )
    return projector


def projector_depth_and_norm(projector: nn.Sequential) -> tuple[int, bool]:
    """Return the number of Linear layers, and whether a LayerNorm follows each of them."""
    depth = sum(isinstance(layer, nn.Linear) for layer in projector)
    return depth, any(isinstance(layer, nn.LayerNorm) for layer in projector)


def projector_tensor_name(key: str, projector: nn.Sequential) -> str:
    """Return transformers' name of the tensor `key` of a projector, behind the prefix.

    With LayerNorms it is LLaMA-Factory's.
    """
    number, kind = key.split(".")
    _, has_norms = projector_depth_and_norm(projector)
    layer_numbers = YI_VL_LAYER_NUMBERS if has_norms else HF_LAYER_NUMBERS
    names = {number: name for name, number in layer_numbers.items()}
    return f"{names[number]}.{kind}"
