"""Weights in memory against weights in files, tensor by tensor."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

POSITIONS = ("positional_embedding", "trunk.pos_embed")


def load_tensors(files: Iterable[Path]) -> dict[str, Tensor]:
    """Return the tensors in files, read by the libraries themselves."""
    from safetensors.torch import load_file

    found: dict[str, Tensor] = {}
    for file in files:
        safe = file.suffix == ".safetensors"
        found |= load_file(file) if safe else torch.load(file, weights_only=True)
    assert found
    return found


def matching_files(folder: Path, pattern: str) -> list[Path]:
    """Return files in a folder, of which there must be some."""
    found = sorted(folder.glob(pattern))
    assert found, f"no {pattern} in {folder}"
    return found


def assert_language_model(language: Any, folder: Path) -> None:
    """Assert that a language model is the one in the safetensors of a folder."""
    stored = load_tensors(matching_files(folder, "model*.safetensors"))
    wanted = {name: stored[name] for name in stored if "mm_projector" not in name}
    wanted = {name: wanted[name] for name in wanted if "vision_tower" not in name}
    assert_same_state(language.state_dict(), wanted)


def assert_vision_encoder(visual: Any, file: Path) -> None:
    """Assert that a vision encoder is the one in a file of open_clip, at its own image size."""
    stored = load_tensors([file])
    wanted = {
        name.removeprefix("visual."): stored[name] for name in stored if name.startswith("visual.")
    }
    own = visual.state_dict()
    for name in (name for name in POSITIONS if name in wanted):
        wanted[name] = resize_positions(wanted[name], own[name].shape[-2])
    assert_same_state(own, wanted)


def resize_positions(positions: Tensor, count: int) -> Tensor:
    """Return position embeddings for `count` tokens: bicubic, the class token's stays.

    There is a class token where one less than all is a square.
    """
    flat = positions.reshape(-1, positions.shape[-1])
    if len(flat) == count:
        return positions
    extra = 0 if math.isqrt(len(flat)) ** 2 == len(flat) else 1
    old, new = math.isqrt(len(flat) - extra), math.isqrt(count - extra)
    grid = flat[extra:].T.reshape(1, -1, old, old)
    options: dict[str, Any] = {"mode": "bicubic", "antialias": True, "align_corners": False}
    grid = torch.nn.functional.interpolate(grid, size=(new, new), **options)
    found = torch.cat([flat[:extra], grid.flatten(2)[0].T])
    return found.reshape(*positions.shape[:-2], *found.shape)


def assert_same_state(own: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> None:
    """Assert that two states have the same names and numbers; resized positions nearly."""
    assert own.keys() == wanted.keys(), own.keys() ^ wanted.keys()
    for name, tensor in wanted.items():
        found = own[name].float()
        same = torch.equal(found, tensor.float())
        near = name in POSITIONS and torch.allclose(found, tensor.float(), atol=1e-6)
        assert same or near, f"{name}: {(found - tensor.float()).abs().max()}"
