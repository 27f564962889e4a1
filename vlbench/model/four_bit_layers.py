"""The language model's Linear layers in 4 bits (NF4), for adapters on them: QLoRA.

Dettmers et al. 2023, arXiv:2305.14314. bitsandbytes quantizes weights when they are moved to a GPU.
"""

from __future__ import annotations

import importlib.util
from typing import Any

import torch
from torch import nn

from vlbench.compat.peft_internals import is_adapter_name
from vlbench.errors import UserError


def check_quantization(name: str) -> None:
    """Raise a UserError if 4 bits cannot be had here; `name` is that of the part."""
    if not torch.cuda.is_available() or importlib.util.find_spec("bitsandbytes") is None:
        raise UserError(
            f"{name}.lora.bits is 4, which needs a GPU and bitsandbytes (pip install "
            "bitsandbytes); without them leave it out"
        )


def quantize_layers(language: Any, name: str) -> None:
    """Let the Linear layers of decoder layers, adapted or not, keep their weights in 4 bits.

    Adapters and biases stay as they are, and so do layers that are in 4 bits already. `language`
    is a language model of transformers; `name` is its name in a UserError.
    """
    check_quantization(name)
    for layer in language.model.layers:
        for path, module in list(layer.named_modules()):
            if type(module) is nn.Linear and not is_adapter_name(path):
                parent, _, own = path.rpartition(".")
                setattr(layer.get_submodule(parent), own, _quantized_layer(module))


def _quantized_layer(linear: nn.Linear) -> nn.Module:
    """Return a layer of bitsandbytes with the weights and the bias of a Linear layer."""
    import bitsandbytes

    # without values: they would be drawn at random, and replaced
    quantized: nn.Module = bitsandbytes.nn.Linear4bit(
        linear.in_features,
        linear.out_features,
        bias=False,
        compute_dtype=torch.bfloat16,
        quant_type="nf4",
        device="meta",
    )
    quantized.weight = bitsandbytes.nn.Params4bit(
        linear.weight.data, requires_grad=False, quant_type="nf4"
    )
    quantized.bias = linear.bias
    return quantized
