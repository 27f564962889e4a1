"""Where the weights of a part come from, and a checksum by which they are known again."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vlbench.distributed import collectives
from vlbench.errors import UserError
from vlbench.text_files import read_json

ORIGINS_FILE = "weights.json"
"""File in a checkpoint that says what the parts of its model began as."""
HASH_CHUNK_NUMEL = 1 << 22  # numbers that are hashed at a time, so that little memory is taken


@dataclass(frozen=True)
class WeightOrigin:
    """What a part of a model began as."""

    source: str
    """A tag, file, folder or hub id; "embedded"; "random"; what a recipe says."""
    sha256: str
    """Of all its tensors, with their names and shapes, as float32."""

    def __str__(self) -> str:
        """Return it as it is shown to people."""
        return f"{self.source} sha {self.sha256[:12]}"


def hash_named_tensors(tensors: Iterable[tuple[str, Tensor]]) -> str:
    """Return the SHA-256 of tensors, in the order of their names.

    Numbers are hashed as float32, so that the sum is the same for weights that are kept in 16 bits
    and for the same weights read as float32. Tensors are hashed side by side by as many threads as
    torch uses.
    """
    named = sorted(tensors, key=lambda pair: pair[0])
    with ThreadPoolExecutor(torch.get_num_threads()) as pool:
        sums = list(pool.map(lambda pair: _hash_tensor(pair[1]), named))
    whole = hashlib.sha256()
    for (name, tensor), one in zip(named, sums, strict=True):
        whole.update(f"{name} {tuple(tensor.shape)} {one}\n".encode())
    return whole.hexdigest()


def _hash_tensor(tensor: Tensor) -> str:
    found = hashlib.sha256()
    for piece in tensor.detach().reshape(-1).split(HASH_CHUNK_NUMEL):
        numbers = piece.float() if piece.is_floating_point() else piece
        found.update(numbers.cpu().contiguous().numpy())
    return found.hexdigest()


def make_weight_origin(source: str, module: torch.nn.Module) -> WeightOrigin:
    """Return the origin of a module that has just been loaded from `source`.

    The sum is "" where there are no numbers (on `meta`), and in all processes but the first.
    """
    state = module.state_dict()
    numbers = collectives.is_rank_zero() and not any(tensor.is_meta for tensor in state.values())
    return WeightOrigin(source, hash_named_tensors(state.items()) if numbers else "")


def check_same_origin(
    part: str, recorded: WeightOrigin | None, current: WeightOrigin, run_path: str
) -> None:
    """Refuse weights of a frozen part that are other ones than those that `where` began with."""
    if recorded and recorded.sha256 and current.sha256 and recorded.sha256 != current.sha256:
        raise UserError(
            f"{part}.weights={current.source} are not the weights that {run_path} began with (sha "
            f"{recorded.sha256[:12]} then, {current.sha256[:12]} now): what was trained does "
            "not fit "
            "them. Bring the old weights back, or begin a new run"
        )


def origins_to_json(origins: Mapping[str, WeightOrigin]) -> dict[str, Any]:
    """Return origins by part as they are written to a file."""
    return {part: asdict(origin) for part, origin in origins.items()}


def read_origins(file: Path, key: str | None = None) -> dict[str, WeightOrigin]:
    """Return the origins in a JSON file (under `key`), {} where it has none."""
    said = read_json(file) if file.is_file() else {}
    found = said.get(key, {}) if key else said
    try:
        return {part: WeightOrigin(**origin) for part, origin in found.items()}
    except (AttributeError, TypeError) as error:
        raise UserError(f"{file}: does not say what weights a run began with") from error


def write_origins(origins: Mapping[str, WeightOrigin], folder: Path) -> None:
    """Write origins by part into the folder of a checkpoint."""
    text = json.dumps(origins_to_json(origins), indent=1)
    (folder / ORIGINS_FILE).write_text(text + "\n", encoding="utf-8")
