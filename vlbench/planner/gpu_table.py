"""Speed, memory and price of GPUs: the shipped table, and a table of the user."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

from vlbench.errors import UserError, suggest_name
from vlbench.text_files import read_yaml
from vlbench.train.gpu_names import GPU_TABLE_FILE, find_gpu_row

GPU_KEYS = ("tflops", "memory", "price")


class GpuSpec(NamedTuple):
    """A GPU model."""

    name: str
    flops_per_second: float
    """Peak of dense matrix products in 16 bits."""
    memory_bytes: float
    price_per_hour: float | None
    """US dollars; None if not known."""


def find_gpu(name: str, table_file: str | None = None) -> GpuSpec:
    """Return the GPU `name`, in upper or lower case, of `table_file` or of the shipped table.

    A table is YAML, as `H100: {tflops: 989, memory: 79, price: 2.5}`: TFLOP/s of dense matrix
    products in 16 bits, memory in GiB, and optionally US dollars per hour.
    """
    table = read_yaml(GPU_TABLE_FILE)
    if table_file is not None:
        path = Path(table_file).expanduser()
        table |= {key: _validate_gpu(path, key, row) for key, row in read_yaml(path).items()}
    by_lower = {key.lower(): key for key in table}
    key = by_lower.get(name.lower())
    if key is None:
        known, close = ", ".join(table), suggest_name(name, table)
        raise UserError(f"gpu is '{name}'; known are {known}, and those of gpus=FILE.yaml.{close}")
    row = table[key]
    return GpuSpec(key, 1e12 * row["tflops"], 2**30 * row["memory"], row.get("price"))


def local_gpu() -> GpuSpec:
    """Return the first GPU of this machine, with the memory that it has; there must be one.

    Its speed is that of the table, 0 where the table does not know it.
    """
    import torch

    found = torch.cuda.get_device_properties(0)
    row = find_gpu_row(found.name, found.total_memory, read_yaml(GPU_TABLE_FILE)) or {}
    return GpuSpec(found.name, 1e12 * row.get("tflops", 0.0), found.total_memory, row.get("price"))


def _validate_gpu(path: Path, name: str, row: Any) -> dict[str, float]:
    """Return the entry of a GPU in a user's table; a UserError if it is not valid."""
    if not isinstance(row, dict) or not {"tflops", "memory"} <= row.keys():
        raise UserError(f"{path}: {name} needs tflops and memory, as {{tflops: 312, memory: 79}}")
    for key, value in row.items():
        if key not in GPU_KEYS:
            allowed = ", ".join(GPU_KEYS)
            raise UserError(
                f"{path}: {name}.{key}; allowed are {allowed}.{suggest_name(str(key), GPU_KEYS)}"
            )
        if isinstance(value, bool) or not isinstance(value, int | float) or value <= 0:
            raise UserError(f"{path}: {name}.{key} is {value!r}; it must be a number above 0")
    return {str(key): float(value) for key, value in row.items()}
