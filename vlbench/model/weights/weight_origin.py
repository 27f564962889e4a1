"""What the weights of a part were loaded from, and a checksum that identifies them."""

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
"""File of a checkpoint with the origin of each part."""
SAMPLED_NUMBERS = 64  # of a tensor: a training changes nearly all of those that it changes any of
HASH_CHUNK_NUMEL = 1 << 22  # numbers hashed at a time, so that little memory is taken


@dataclass(frozen=True)
class WeightOrigin:
    """What a part of a model was loaded from."""

    source: str
    """A tag, file, folder or hub id, "embedded" or "random", as in a recipe."""
    sha256: str
    """Of the part's tensors as float32, with names and shapes."""

    def __str__(self) -> str:
        """Return the source and the beginning of the checksum."""
        return f"{self.source} sha {self.sha256[:12]}"


def hash_named_tensors(tensors: Iterable[tuple[str, Tensor]]) -> str:
    """Return the SHA-256 of tensors, in the order of their names.

    Numbers are hashed as float32, so that weights in 16 bits and the same weights cast to float32
    have the same checksum. As many threads as torch uses hash one tensor each.
    """
    named = sorted(tensors, key=lambda pair: pair[0])
    with ThreadPoolExecutor(torch.get_num_threads()) as pool:
        tensor_sums = list(pool.map(lambda pair: _hash_tensor(pair[1]), named))
    digest = hashlib.sha256()
    for (name, tensor), tensor_sum in zip(named, tensor_sums, strict=True):
        digest.update(f"{name} {tuple(tensor.shape)} {tensor_sum}\n".encode())
    return digest.hexdigest()


def sample_weights(module: torch.nn.Module) -> str:
    """Return a SHA-256 of about SAMPLED_NUMBERS of every tensor, which takes no time.

    It tells models of different trainings apart, not those that differ in a few numbers.
    """
    return hash_named_tensors(
        (f"{name} {tuple(tensor.shape)}", _sample_numbers(tensor))
        for name, tensor in module.state_dict().items()
    )


def _sample_numbers(tensor: Tensor) -> Tensor:
    numbers = tensor.detach().reshape(-1)
    return numbers[:: max(1, len(numbers) // SAMPLED_NUMBERS)]


def _hash_tensor(tensor: Tensor) -> str:
    digest = hashlib.sha256()
    for chunk in torch.split(tensor.detach().reshape(-1), HASH_CHUNK_NUMEL):
        numbers = chunk.float() if chunk.is_floating_point() else chunk
        digest.update(numbers.cpu().contiguous().numpy().data)
    return digest.hexdigest()


def make_weight_origin(source: str, module: torch.nn.Module) -> WeightOrigin:
    """Return the origin of a module that was just loaded from `source`.

    The checksum is "" for tensors without values (on `meta`), and on all ranks but the first.
    """
    state = module.state_dict()
    has_values = not any(tensor.is_meta for tensor in state.values())
    hashed = collectives.is_rank_zero() and has_values
    return WeightOrigin(source, hash_named_tensors(state.items()) if hashed else "")


def check_same_origin(
    part: str, recorded: WeightOrigin | None, current: WeightOrigin, run_path: str
) -> None:
    """Refuse weights of a frozen part that are not those that the run began with."""
    if recorded and recorded.sha256 and current.sha256 and recorded.sha256 != current.sha256:
        raise UserError(
            f"{part}.weights={current.source} are not the weights that {run_path} began with (sha "
            f"{recorded.sha256[:12]} then, {current.sha256[:12]} now): what was trained does "
            "not fit them. Bring the old weights back, or begin a new run"
        )


def origins_to_json(origins: Mapping[str, WeightOrigin]) -> dict[str, Any]:
    """Return origins by part in the form of their JSON file."""
    return {part: asdict(origin) for part, origin in origins.items()}


def read_origins(file: Path, key: str | None = None) -> dict[str, WeightOrigin]:
    """Return the origins in a JSON file (under `key`), {} where it has none."""
    content = read_json(file) if file.is_file() else {}
    origins = content.get(key, {}) if key else content
    try:
        for origin in origins.values():
            if not all(isinstance(value, str) for value in origin.values()):
                raise TypeError("its values are text")
        return {part: WeightOrigin(**origin) for part, origin in origins.items()}
    except (AttributeError, TypeError) as error:
        raise UserError(f"{file}: does not say what weights a run began with") from error


def write_origins(origins: Mapping[str, WeightOrigin], folder: Path) -> None:
    """Write origins by part into the folder of a checkpoint."""
    text = json.dumps(origins_to_json(origins), indent=1)
    (folder / ORIGINS_FILE).write_text(text + "\n", encoding="utf-8")
