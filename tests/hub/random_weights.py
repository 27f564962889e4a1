"""Random weights in files: every tensor differs from every other, and from how a module begins."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

STD = 0.02
PERIOD = 1_000_003


def random_tensors(
    shapes: Mapping[str, tuple[int, ...]], seed: int, dtype: torch.dtype = torch.float32
) -> dict[str, Tensor]:
    """Return random tensors of these shapes; weights of norms are near 1, all else near 0."""
    generator = torch.Generator().manual_seed(seed)
    state = {}
    for name, shape in shapes.items():
        tensor = _normal_numbers(math.prod(shape), generator).to(dtype).reshape(shape)
        norm = len(shape) == 1 and name.endswith(("weight", "gamma"))
        state[name] = tensor.add_(1) if norm else tensor
    return state


def _normal_numbers(count: int, generator: torch.Generator) -> Tensor:
    """Return so many random numbers; those of a large tensor repeat after a prime number of them.

    Then no two rows of it are equal, and a billion numbers are made in seconds.
    """
    numbers = torch.empty(min(count, PERIOD)).normal_(std=STD, generator=generator)
    return numbers if count <= PERIOD else numbers.repeat(-(-count // PERIOD))[:count]


def state_shapes(state: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    """Return the shapes of a state."""
    return {name: tuple(tensor.shape) for name, tensor in state.items()}


def write_weights(state: dict[str, Tensor], file: Path) -> None:
    """Write one file, safetensors or torch's by its suffix."""
    if file.suffix == ".safetensors":
        save_file(state, file, metadata={"format": "pt"})
    else:
        torch.save(state, file)


def write_shards(state: dict[str, Tensor], folder: Path, count: int) -> None:
    """Write model-0000x-of-0000n.safetensors and their index, in the order of the names."""
    names = list(state)
    size = -(-len(names) // count)
    places = {}
    for number in range(count):
        part = names[number * size : (number + 1) * size]
        file = f"model-{number + 1:05d}-of-{count:05d}.safetensors"
        write_weights({name: state[name] for name in part}, folder / file)
        places |= dict.fromkeys(part, file)
    total = sum(tensor.numel() * tensor.element_size() for tensor in state.values())
    index = {"metadata": {"total_size": total}, "weight_map": places}
    write_json(index, folder / "model.safetensors.index.json")


def write_json(value: Any, file: Path) -> None:
    """Write a file of JSON."""
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
