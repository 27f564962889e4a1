"""LoRA through peft, injected in place: the vision encoder or language model keeps its class.

Module paths, hooks and packed attention work as before, and base weights stay unchanged until
`merge_adapters`. peft saves and loads the adapters.

With FSDP the language model stays memory-mapped, in 16 bits where its files have 16. Adapters are
created and merged in float32 all the same, layer by layer, so that they begin and end with the same
numbers for any number of processes.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import Field
from safetensors.torch import save_file
from torch import Tensor, nn

from vlbench.compat.peft_internals import (
    base_parameter_name,
    is_adapted_layer,
    is_adapter_name,
    is_targeted,
)
from vlbench.distributed import collectives
from vlbench.errors import UserError, one_line
from vlbench.model.four_bit_layers import check_quantization, quantize_layers
from vlbench.model.multihead_attention import SplitAttention, pack_attention_state
from vlbench.model.vision_encoder import VisionEncoder
from vlbench.model.weights.tensor_writer import unshare_tensors
from vlbench.state_dicts import check_state
from vlbench.strict_values import convert_value
from vlbench.text_files import read_json

ALL_LINEAR = "all-linear"
ADAPTER_NAME = "default"  # peft's name of a single adapter
PEFT_PREFIX = "base_model.model."  # before all names in an adapter's file
ADAPTER_NUMBERS: dict[str, Any] = {
    "r": Annotated[int, Field(ge=1, le=65536)],
    "lora_alpha": Annotated[float, Field(gt=0, le=1e9)],
    "lora_dropout": Annotated[float, Field(ge=0, le=0.99)],
    "use_rslora": bool,
    "use_dora": bool,
}
"""What adapters have beside the names of their layers, with its kind and limits."""
ADAPTER_LABELS = {"peft_version", "inference_mode"}
"""What peft writes beside it, and what does not matter here."""
ADAPTER_WEIGHTS_FILE, ADAPTER_CONFIG_FILE = "adapter_model.safetensors", "adapter_config.json"


def add_adapters(
    part: nn.Module,
    name: str,
    *,
    rank: int,
    alpha: float | None,
    dropout: float,
    targets: str,
    rslora: bool,
    dora: bool,
    bits: int | None,
) -> None:
    """Inject new adapters into `part`; adapters with the same options stay, others are merged.

    Args:
        part: A vision encoder or a language model.
        name: Its name in errors.
        rank: Width of the low-rank update.
        alpha: Scale of the update, divided by the rank; None: twice the rank.
        dropout: Probability that an input of an adapter is dropped.
        targets: "all-linear", or names of Linear layers, separated by commas.
        rslora: Whether alpha is divided by the square root of the rank.
        dora: Whether magnitudes of the weights are trained as well (DoRA).
        bits: 4: keep base weights in 4 bits (QLoRA).

    Raises:
        UserError: when a target is unknown, or 4 bits cannot be had.
    """
    from peft import LoraConfig

    root = _adapted_root(part)
    _split_attention(root)
    config = LoraConfig(
        r=rank,
        lora_alpha=2 * rank if alpha is None else alpha,  # type: ignore[arg-type]  # peft says int
        lora_dropout=dropout,
        target_modules=_target_modules(part, targets, f"{name}.lora.targets"),
        use_rslora=rslora,
        use_dora=dora,
    )
    before = _adapter_config(root)
    if before is None or before.to_dict() != config.to_dict():
        merge_adapters(part)
        _split_attention(root)
        try:
            _inject_adapters(root, config)
        except ValueError as error:
            raise UserError(f"{name}.lora: {one_line(error)}") from error
    if bits == 4:  # also under adapters that a run has loaded
        quantize_layers(root, name)


def check_adapters(part: nn.Module, name: str, targets: str, bits: int | None) -> None:
    """Raise what `add_adapters` would raise; nothing is changed."""
    _target_modules(part, targets, f"{name}.lora.targets")
    if bits == 4:
        check_quantization(name)


def adapter_parameters(part: nn.Module) -> dict[str, nn.Parameter]:
    """Return the parameters of adapters by name; {} when there are none."""
    return {name: p for name, p in part.named_parameters() if is_adapter_name(name)}


def merge_adapters(part: nn.Module) -> None:
    """Add the adapters to the weights that they adapt, and remove them.

    The sum has the wider one of the two types, float32 while a model is trained.
    """
    root = _adapted_root(part)
    for name, layer in list(root.named_modules()):
        if is_adapted_layer(layer):
            _replace_module(root, name, _merge_layer(layer))
    for name, attention in list(root.named_modules()):
        if isinstance(attention, SplitAttention):
            _replace_module(root, name, attention.to_multihead_attention())
    if hasattr(root, "peft_config"):
        del root.peft_config


def _merge_layer(layer: Any) -> nn.Module:
    """Return the Linear layer that computes what an adapted one computes."""
    base: nn.Linear = layer.get_base_layer()
    device = base.weight.device
    dtype = torch.promote_types(base.weight.dtype, layer.lora_A[ADAPTER_NAME].weight.dtype)
    # on the host, as in a run that is resumed; a sum in 16 bits would be rounded twice
    layer.to("cpu", torch.promote_types(dtype, torch.float32))
    layer.merge()
    return base.to(device, dtype)


def base_state_dict(part: nn.Module) -> dict[str, Tensor]:
    """Return the state dict of a part without adapters, by the names that it has without them."""
    state = {
        base_parameter_name(name): value
        for name, value in part.state_dict().items()
        if not is_adapter_name(name)
    }
    for path, module in part.named_modules():
        if isinstance(module, SplitAttention):
            names = [name for name in state if name.startswith(f"{path}.")]
            split = {name.removeprefix(f"{path}."): state.pop(name) for name in names}
            packed = pack_attention_state(split)
            state |= {f"{path}.{name}": value for name, value in packed.items()}
    return state


def save_adapters(part: nn.Module, folder: Path) -> None:
    """Write the adapters of `part` into `folder`, as peft loads them; nothing where none are."""
    root = _adapted_root(part)
    config = _adapter_config(root)
    if config is None:
        return
    state = {
        PEFT_PREFIX + name: collectives.gather_full_tensor(tensor).cpu()
        for name, tensor in _adapter_state(root).items()
    }
    if not collectives.is_rank_zero():
        return
    config = copy.copy(config)
    config.target_modules = sorted(config.target_modules)  # peft writes a set in random order
    config.save_pretrained(str(folder))
    save_file(
        dict(unshare_tensors(state.items())),
        folder / ADAPTER_WEIGHTS_FILE,
        metadata={"format": "pt"},
    )


def load_adapters(part: nn.Module, folder: Path) -> None:
    """Inject the adapters in `folder`, if there are any, into `part`.

    Raises:
        WeightMismatch: names the tensor that does not fit.
        UserError: the configuration has what no adapters of vlbench have.
    """
    if not (folder / ADAPTER_CONFIG_FILE).is_file():
        return
    from peft import load_peft_weights, set_peft_model_state_dict

    config = _read_adapter_config(folder / ADAPTER_CONFIG_FILE)
    root = _adapted_root(part)
    _split_attention(root)
    _inject_adapters(root, config)
    stored = load_peft_weights(str(folder), device="cpu")
    state = {name.removeprefix(PEFT_PREFIX): tensor for name, tensor in stored.items()}
    check_state(_adapter_state(root), state, str(folder / ADAPTER_WEIGHTS_FILE))
    set_peft_model_state_dict(root, state, ADAPTER_NAME)


def _read_adapter_config(file: Path) -> Any:
    """Return peft's configuration from a file that `save_adapters` wrote.

    peft would take patterns of names, which can hang, and starts that decompose every matrix.
    """
    from peft import LoraConfig

    said, defaults = read_json(file), LoraConfig().to_dict()
    names = said.get("target_modules")
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise UserError(f"{file}: target_modules is {names!r:.80}; it must be a list of names")
    for key, kind in ADAPTER_NUMBERS.items():
        try:
            convert_value(said.get(key), kind)
        except ValueError as error:
            raise UserError(f"{file}: {key} {error}") from error
    for key in (defaults.keys() & said.keys()) - ADAPTER_NUMBERS.keys() - ADAPTER_LABELS:
        if key != "target_modules" and said[key] != defaults[key]:
            raise UserError(
                f"{file}: {key} is {said[key]!r:.80}, which adapters of vlbench do not have"
            )
    return LoraConfig(target_modules=names, **{key: said[key] for key in ADAPTER_NUMBERS})


def _adapter_config(root: nn.Module) -> Any:
    """Return peft's configuration of the adapters in a module, None without any."""
    return getattr(root, "peft_config", {}).get(ADAPTER_NAME)


def _adapter_state(root: nn.Module) -> dict[str, Tensor]:
    """Return the adapters of a module by peft's names of them on disk, without its prefix."""
    from peft import get_peft_model_state_dict

    parameters = dict(adapter_parameters(root))
    return get_peft_model_state_dict(  # type: ignore[no-any-return]
        root, parameters, ADAPTER_NAME, save_embedding_layers=False
    )


def _adapted_root(part: nn.Module) -> nn.Module:
    """Return the module that is adapted: of a vision encoder, open_clip's."""
    return part.visual if isinstance(part, VisionEncoder) else part


def _inject_adapters(root: nn.Module, config: Any) -> None:
    """Replace the Linear layers that `config` targets by adapted ones."""
    for name, layer in list(root.named_modules()):
        if isinstance(layer, nn.Linear) and is_targeted(config, name):
            _replace_module(root, name, _adapt_layer(layer, config))
    root.peft_config = {ADAPTER_NAME: config}  # type: ignore[assignment]


def _adapt_layer(layer: nn.Linear, config: Any) -> nn.Module:
    """Return a Linear layer with new adapters in float32 or float64.

    peft would create them, and DoRA's magnitudes, in the type of the weights.
    """
    from peft import inject_adapter_in_model

    config = copy.copy(config)
    config.target_modules = ["layer"]
    stored = layer.weight.data
    if stored.is_floating_point() and stored.dtype.itemsize < 4:
        layer.weight.data = stored.float()
    holder = inject_adapter_in_model(config, nn.ModuleDict({"layer": layer}))
    layer.weight.data = stored
    return holder.get_submodule("layer")


def _replace_module(root: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, own = name.rpartition(".")
    setattr(root.get_submodule(parent), own, module)


def _split_attention(root: nn.Module) -> None:
    """Replace packed attention by four Linear layers, which adapters can target."""
    for name, module in list(root.named_modules()):
        if isinstance(module, nn.MultiheadAttention):
            _replace_module(root, name, SplitAttention(module))


def _target_modules(part: nn.Module, requested: str, key: str) -> list[str]:
    """Return the names of the Linear layers to adapt, among those of blocks that are used."""
    available = sorted(_linear_layer_names(part))
    if requested == ALL_LINEAR:
        return available
    names = [name.strip() for name in requested.strip("[]").split(",")]
    for name in names:
        if not any(path.rpartition(".")[2] == name for path in available):
            known = ", ".join(sorted({path.rpartition(".")[2] for path in available}))
            raise UserError(f"{key} is '{requested}'; known are {ALL_LINEAR} and {known}")
    return [path for path in available if path.rpartition(".")[2] in names]


def _linear_layer_names(part: Any) -> Iterator[str]:
    """Yield the names of Linear layers, adapted or not, in the blocks that a part uses."""
    is_encoder = isinstance(part, VisionEncoder)
    blocks = part.blocks()[: part.used_block_count] if is_encoder else part.model.layers
    used = {id(block) for block in blocks}
    root = _adapted_root(part)
    for path, block in root.named_modules():
        if id(block) in used:
            for name, module in block.named_modules():
                is_inside = is_adapter_name(name) or name.endswith("base_layer")
                if not is_inside and (
                    isinstance(module, nn.Linear) or hasattr(module, "base_layer")
                ):
                    yield f"{path}.{name}"
