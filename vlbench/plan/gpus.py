"""What GPUs can do and cost: the shipped table, and one of the user's own."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

from vlbench import recipe as recipes
from vlbench.mistakes import Mistake, nearest

GPUS = Path(__file__).parents[1] / "train" / "gpus.yaml"
KEYS = ("tflops", "memory", "price")


class Gpu(NamedTuple):
    """A kind of GPU."""

    name: str
    flops: float
    """Operations per second in 16 bits."""
    memory: float
    """Bytes."""
    price: float | None
    """Of an hour, in US dollars; None if nobody said it."""


def gpu_of(name: str, file: str | None = None) -> Gpu:
    """Return the GPU `name`, in any case, of `file` or of the shipped table.

    A file is YAML, as `H100: {tflops: 989, memory: 79, price: 2.5}`: TFLOP/s of dense products in
    16 bits, memory in GiB, and perhaps US dollars for an hour.
    """
    table = recipes.read(GPUS)
    if file is not None:
        path = Path(file).expanduser()
        table |= {key: _checked(path, key, row) for key, row in recipes.read(path).items()}
    by_lower = {key.lower(): key for key in table}
    key = by_lower.get(name.lower())
    if key is None:
        known, close = ", ".join(table), nearest(name, table)
        raise Mistake(f"gpu is '{name}'; known are {known}, and those of gpus=FILE.yaml.{close}")
    row = table[key]
    return Gpu(key, 1e12 * row["tflops"], 2**30 * row["memory"], row.get("price"))


def _checked(path: Path, name: str, row: Any) -> dict[str, float]:
    """Return what a user's table says of a GPU, if it can be used."""
    if not isinstance(row, dict) or not {"tflops", "memory"} <= row.keys():
        raise Mistake(f"{path}: {name} needs tflops and memory, as {{tflops: 312, memory: 79}}")
    for key, value in row.items():
        if key not in KEYS:
            allowed = ", ".join(KEYS)
            raise Mistake(f"{path}: {name}.{key}; allowed are {allowed}.{nearest(str(key), KEYS)}")
        if isinstance(value, bool) or not isinstance(value, int | float) or value <= 0:
            raise Mistake(f"{path}: {name}.{key} is {value!r}; it must be a number above 0")
    return {str(key): float(value) for key, value in row.items()}
