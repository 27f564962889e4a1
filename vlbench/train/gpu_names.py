"""Which GPU of gpus.yaml a device is, by the name that its driver gives it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from vlbench.text_files import read_text

if TYPE_CHECKING:
    import torch

GPU_TABLE_FILE = Path(__file__).with_name("gpus.yaml")
# makers, product lines, sockets and memory say nothing about speed; any other word may
_NEUTRAL_WORD = re.compile(
    r"nvidia|amd|tesla|quadro|geforce|instinct|rtx|generation|sxm\d*|oam|hbm\w*|\d+gb?"
)
# A slice of a GPU may keep its name, and has a half of its memory at most; but a V100 of 16 GB is
# whole, and the table has the one of 32 GB.
_LEAST_MEMORY_SHARE = 0.5


def peak_flops(device: torch.device) -> float | None:
    """Return the peak FLOP/s of a device in 16 bits, dense; None if it is not in the table."""
    if device.type != "cuda":
        return None
    import torch

    found = torch.cuda.get_device_properties(device)
    row = find_gpu_row(found.name, found.total_memory, yaml.safe_load(read_text(GPU_TABLE_FILE)))
    return None if row is None else 1e12 * row["tflops"]


def find_gpu_row(
    device_name: str, memory_bytes: int, table: Mapping[str, Mapping[str, Any]]
) -> Mapping[str, Any] | None:
    """Return the row of a table whose key has the same telling words as a device; None for none.

    Words are compared as a whole: an A4000 is no A40, an H100 NVL no H100, and a slice of a GPU
    (MIG, `MIG 3g.40gb` in its name; or much less memory) is none that the table knows.
    """
    words = _telling_words(device_name)
    for name, row in table.items():
        if _telling_words(name) == words:
            is_whole = memory_bytes >= _LEAST_MEMORY_SHARE * 2**30 * row["memory"]
            return row if is_whole else None
    return None


def _telling_words(name: str) -> set[str]:
    words = re.split(r"[\s-]+", name.lower())
    return {word for word in words if word and not _NEUTRAL_WORD.fullmatch(word)}
