"""Groups of weight files: every tensor is wanted, may be ignored, or is a mistake that is named."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vlbench.mistakes import Mistake, nearest
from vlbench.model.weights.shards import read, shapes

BUFFERS = r"(.*\.)?(rotary_emb\.inv_freq|position_ids)"
"""Tensors that older libraries wrote and that follow from the configuration."""

States = Mapping[str, Mapping[str, Tensor]]
"""Part of a model -> key -> tensor; the shapes alone matter, so they may be on `meta`."""


@dataclass(frozen=True)
class Group:
    """Files of weights that belong together, and what their tensors are for."""

    files: list[Path]
    wanted: dict[str, tuple[str, str]]
    """Name of a tensor in the files -> (part of the model, key in that part)."""
    ignored: str
    """Regular expression of names that may be there and are not read."""


def load_groups(
    groups: Sequence[Group],
    states: States,
    dtype: torch.dtype | None,
    device: torch.device | str,
    mapped: Collection[str] = (),
) -> dict[str, dict[str, Tensor]]:
    """Return the tensors of all groups by part and key, as `dtype` (None: as stored) on `device`.

    Those of parts in `mapped` stay in their files, as they are stored.

    All names and shapes are compared with `states` before the first tensor is read; a missing,
    surplus or mis-shaped one is named in a Mistake. One file is open at a time.
    """
    plans = [(group, _checked(group, states)) for group in groups]
    loaded: dict[str, dict[str, Tensor]] = {part: {} for part in states}
    for group, files in plans:
        for file, names in files.items():
            stay = {name for name in names if group.wanted[name][0] in mapped}
            for name, tensor in read(file, names, stay):
                part, key = group.wanted[name]
                kind = dtype or tensor.dtype
                loaded[part][key] = tensor if name in stay else tensor.to(device, kind)
    return loaded


def check_groups(groups: Sequence[Group], states: States) -> None:
    """Compare all names and shapes with `states`, as `load_groups` does; no tensor is read."""
    for group in groups:
        _checked(group, states)


def place(module: nn.Module, dtype: torch.dtype | None, device: torch.device | str) -> None:
    """Move `module` to `device` and its parameters to `dtype`; buffers keep their precision."""
    for parameter in module.parameters():
        parameter.data = parameter.data.to(device=device, dtype=dtype or parameter.dtype)
    module.to(device)


def tied(language: Any) -> set[str]:
    """Return the keys of a language model that repeat others: files may have them or not."""
    return {"lm_head.weight"} if language.config.tie_word_embeddings else set()


def surplus(group: Group) -> Iterator[tuple[str, Tensor]]:
    """Give the tensors of a group that are there and not read."""
    for file in group.files:
        yield from read(file, [name for name in shapes(file) if name not in group.wanted])


def _checked(group: Group, states: States) -> dict[Path, list[str]]:
    """Return which tensors to read from which file."""
    where: dict[str, Path] = {}
    for file in group.files:
        for name, shape in shapes(file).items():
            if name in group.wanted:
                _compare(name, shape, group, states, file)
                if name in where:
                    raise Mistake(f"{file}: tensor {name} is also in {where[name]}")
                where[name] = file
            elif not re.fullmatch(group.ignored, name):
                close = nearest(name, group.wanted)
                raise Mistake(f"{file}: tensor {name} belongs to nothing in this model.{close}")
    missing = [name for name in group.wanted if name not in where]
    if missing:
        more = f", and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise Mistake(f"{group.files[0].parent}: tensor {missing[0]} is missing{more}")
    plan: dict[Path, list[str]] = {}
    for name, file in where.items():
        plan.setdefault(file, []).append(name)
    return plan


def _compare(name: str, shape: tuple[int, ...], group: Group, states: States, file: Path) -> None:
    part, key = group.wanted[name]
    needed = tuple(states[part][key].shape)
    if shape != needed:
        raise Mistake(f"{file}: tensor {name} has shape {shape}, needed is {needed}")
