"""Where tensors lie in safetensors files, known before any value is.

So several processes can write one file at once, each the rows that it has: nothing is gathered, and
the files are those that one process would have written.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from vlbench.model.weights.tensor_files import WEIGHT_FILENAMES

MAX_SHARD_BYTES = 5_000_000_000  # transformers' default
HEADER_ALIGNMENT = 8  # bytes, as safetensors' own writer
DTYPE_NAMES = {
    torch.bool: "BOOL",
    **{torch.uint8: "U8", torch.int8: "I8"},
    **{torch.float8_e5m2: "F8_E5M2", torch.float8_e4m3fn: "F8_E4M3"},
    **{torch.int16: "I16", torch.uint16: "U16", torch.float16: "F16", torch.bfloat16: "BF16"},
    **{torch.int32: "I32", torch.uint32: "U32", torch.float32: "F32"},
    **{torch.float64: "F64", torch.int64: "I64", torch.uint64: "U64"},
}
"""The names of types in a file, in the order of safetensors' own enumeration: it sorts by them."""
_DTYPE_RANKS = {dtype: rank for rank, dtype in enumerate(DTYPE_NAMES)}


class TensorSpec(NamedTuple):
    """Shape and type of a whole tensor."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @classmethod
    def from_tensor(cls, tensor: Tensor) -> TensorSpec:
        """Return those of a tensor; of a sharded one, those of the whole."""
        return cls(tuple(tensor.shape), tensor.dtype)

    @property
    def byte_count(self) -> int:
        """The bytes of its values."""
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True)
class FileLayout:
    """A safetensors file whose values are not written yet."""

    name: str
    header: bytes
    """What comes before the values: the length of the JSON, and the JSON."""
    offsets: dict[str, int]
    """For each tensor the byte of the file at which its values begin."""
    byte_count: int
    """The size of the file."""


def plan_files(
    specs: Mapping[str, TensorSpec], max_shard_bytes: int = MAX_SHARD_BYTES
) -> list[FileLayout]:
    """Return the files for tensors, filled in their order up to `max_shard_bytes` each.

    A larger tensor has a file of its own. A single file is called model.safetensors, several have
    numbers, as in transformers.
    """
    shards: list[list[str]] = [[]]
    shard_bytes = 0
    for name, spec in specs.items():
        if shards[-1] and shard_bytes + spec.byte_count > max_shard_bytes:
            shards.append([])
            shard_bytes = 0
        shards[-1].append(name)
        shard_bytes += spec.byte_count
    return [
        _plan_file(shard_name(number, len(shards)), {name: specs[name] for name in names})
        for number, names in enumerate(shards, 1)
    ]


def shard_name(number: int, count: int) -> str:
    """Return the name of one of `count` files, numbered from 1."""
    if count == 1:
        return WEIGHT_FILENAMES[0]
    return f"model-{number:05d}-of-{count:05d}.safetensors"


def _plan_file(file_name: str, specs: Mapping[str, TensorSpec]) -> FileLayout:
    """Return a file with these tensors, byte for byte as safetensors orders and names them."""
    names = sorted(specs, key=lambda name: (-_DTYPE_RANKS[specs[name].dtype], name.encode()))
    entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
    begin = 0
    for name in names:
        spec, end = specs[name], begin + specs[name].byte_count
        entries[name] = {
            "dtype": DTYPE_NAMES[spec.dtype],
            "shape": list(spec.shape),
            "data_offsets": [begin, end],
        }
        begin = end
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % HEADER_ALIGNMENT)
    header = len(text).to_bytes(8, "little") + text
    starts = {name: len(header) + entries[name]["data_offsets"][0] for name in names}  # type: ignore[index]
    return FileLayout(file_name, header, starts, len(header) + begin)


def create_files(files: Sequence[FileLayout], folder: Path) -> None:
    """Make the files with their headers and full sizes, and the index of several."""
    for file in files:
        with (folder / file.name).open("xb") as handle:
            handle.write(file.header)
            handle.flush()
            os.truncate(handle.fileno(), file.byte_count)
    if len(files) > 1:
        value_bytes = sum(file.byte_count - len(file.header) for file in files)
        write_index(
            {name: file.name for file in files for name in file.offsets}, value_bytes, folder
        )


def write_index(file_names: Mapping[str, str], value_bytes: int, folder: Path) -> None:
    """Write the index of several files: which one has each tensor."""
    index = {
        "metadata": {"total_size": value_bytes},
        "weight_map": dict(sorted(file_names.items())),
    }
    (folder / f"{WEIGHT_FILENAMES[0]}.index.json").write_text(
        json.dumps(index, indent=2) + "\n", encoding="utf-8"
    )
