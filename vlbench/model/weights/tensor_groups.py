"""Groups of weight files: every tensor is loaded, or may be ignored, or is refused by name."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vlbench.errors import UserError
from vlbench.model.weights.tensor_files import (
    check_weight_dtype,
    read_tensor_headers,
    read_tensor_shapes,
    read_tensors,
)
from vlbench.state_dicts import (
    WeightMismatch,
    describe_missing,
    describe_shapes,
    describe_unexpected,
)

BUFFER_PATTERN = r"(.*\.)?(rotary_emb\.inv_freq|position_ids)"
"""Buffers that older libraries wrote; they follow from the configuration."""

HEAD_KEY, EMBEDDING_KEY = "lm_head.weight", "model.embed_tokens.weight"
"""Keys of a language model that may be tied."""

PartStates = Mapping[str, Mapping[str, Tensor]]
"""Part of a model -> key -> tensor; only shapes are used, so they may be on `meta`."""


@dataclass(frozen=True)
class TensorGroup:
    """Weight files that belong together, and what their tensors are for."""

    files: list[Path]
    tensor_targets: dict[str, tuple[str, str]]
    """Name of a tensor in the files -> (part of the model, key in that part)."""
    ignored_pattern: str
    """Regular expression of names that may be in the files and are not read."""


def load_tensor_groups(
    groups: Sequence[TensorGroup],
    states: PartStates,
    dtype: torch.dtype | None,
    device: torch.device | str,
    mmap_parts: Collection[str] = (),
) -> dict[str, dict[str, Tensor]]:
    """Return the tensors of all groups by part and key. One file is open at a time.

    Args:
        groups: The files.
        states: What is needed: all names and shapes are compared before the first value is read.
        dtype: Type of the tensors; None keeps each as it is stored.
        device: Where they are loaded to.
        mmap_parts: Parts whose tensors stay memory-mapped, as they are stored.

    Raises:
        WeightMismatch: names a tensor that is missing, surplus or of another shape.
    """
    plans = [(group, _plan_tensor_reads(group, states)) for group in groups]
    loaded: dict[str, dict[str, Tensor]] = {part: {} for part in states}
    for group, names_by_file in plans:
        for file, names in names_by_file.items():
            mmap_names = {name for name in names if group.tensor_targets[name][0] in mmap_parts}
            for name, tensor in read_tensors(file, names, mmap_names):
                part, key = group.tensor_targets[name]
                if name not in mmap_names:
                    tensor = tensor.to(device, dtype or tensor.dtype)
                loaded[part][key] = tensor
    return loaded


def check_tensor_groups(groups: Sequence[TensorGroup], states: PartStates) -> None:
    """Compare all names and shapes with `states`, as `load_tensor_groups` does; read no values."""
    for group in groups:
        _plan_tensor_reads(group, states)


def move_and_cast(module: nn.Module, dtype: torch.dtype | None, device: torch.device | str) -> None:
    """Move `module` to `device` and cast its parameters to `dtype`; buffers keep their type."""
    for parameter in module.parameters():
        parameter.data = parameter.data.to(device=device, dtype=dtype or parameter.dtype)
    module.to(device)


def missing_tied_keys(language: Any, file_keys: Collection[str] = ()) -> set[str]:
    """Return the key that files with `file_keys` need not have, as head and embedding are tied.

    Either of the two is enough, as for transformers; files may have both.
    """
    if not language.config.tie_word_embeddings:
        return set()
    return {HEAD_KEY} - set(file_keys) or {EMBEDDING_KEY} - set(file_keys)


def load_language_state(language: Any, state: Mapping[str, Tensor]) -> None:
    """Load a language model strictly; of tied tensors one is enough."""
    tied = {
        key: state[EMBEDDING_KEY if key == HEAD_KEY else HEAD_KEY]
        for key in missing_tied_keys(language, state)
    }
    language.load_state_dict({**state, **tied}, assign=True)
    tie_word_embeddings(language)


def tie_word_embeddings(language: Any) -> None:
    """Tie head and embedding of a loaded language model, where its configuration says so.

    Where they differ, the files hold a head of their own: then the configuration is corrected, as
    transformers does.
    """
    if not language.config.tie_word_embeddings:
        return
    if torch.equal(language.lm_head.weight, language.model.embed_tokens.weight):
        language.tie_weights()
    else:
        language.config.tie_word_embeddings = False


def summarize_tensor_names(tensor_names: Iterable[str]) -> str:
    """Return the number of tensors by part, as "vision_tower (390), norm (1)"."""
    counts = Counter(name.removeprefix("model.").partition(".")[0] for name in tensor_names)
    return ", ".join(f"{part} ({number})" for part, number in counts.items())


def summarize_unused_tensors(groups: Sequence[TensorGroup]) -> str:
    """Return which tensors the files of `groups` hold that are not read, by part."""
    return summarize_tensor_names(
        name
        for group in groups
        for file in group.files
        for name in read_tensor_shapes(file)
        if name not in group.tensor_targets
    )


def read_unused_tensors(group: TensorGroup) -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors in the files of a group that are not read into the model."""
    for file in group.files:
        yield from read_tensors(
            file, [name for name in read_tensor_shapes(file) if name not in group.tensor_targets]
        )


def _plan_tensor_reads(group: TensorGroup, states: PartStates) -> dict[Path, list[str]]:
    """Return the names to read from each file, after comparing names and shapes with `states`."""
    file_by_name: dict[str, Path] = {}
    for file in group.files:
        for name, header in read_tensor_headers(file).items():
            if name in group.tensor_targets:
                _check_tensor_shape(name, header.shape, group, states, file)
                check_weight_dtype(name, header, file)
                if name in file_by_name:
                    raise UserError(f"{file}: tensor {name} is also in {file_by_name[name]}")
                file_by_name[name] = file
            elif not re.fullmatch(group.ignored_pattern, name):
                reason = describe_unexpected(name, group.tensor_targets)
                raise WeightMismatch(reason, str(file))
    missing = [name for name in group.tensor_targets if name not in file_by_name]
    if missing:
        searched = group.files[0] if len(group.files) == 1 else group.files[0].parent
        raise WeightMismatch(describe_missing(missing), str(searched))
    names_by_file: dict[Path, list[str]] = {}
    for name, file in file_by_name.items():
        names_by_file.setdefault(file, []).append(name)
    return names_by_file


def _check_tensor_shape(
    name: str, shape: tuple[int, ...], group: TensorGroup, states: PartStates, file: Path
) -> None:
    part, key = group.tensor_targets[name]
    needed = tuple(states[part][key].shape)
    if shape != needed:
        raise WeightMismatch(describe_shapes(name, shape, needed), str(file))
