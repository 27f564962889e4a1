"""Tensors written as safetensors, in shards as transformers writes them, one after the other."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor

from vlbench.model.weights.tensor_layout import MAX_SHARD_BYTES, shard_name, write_index


def write_tensors(
    tensors: Iterable[tuple[str, Tensor]], folder: Path, max_shard_bytes: int = MAX_SHARD_BYTES
) -> None:
    """Write tensors into `folder` as safetensors, in shards of at most `max_shard_bytes`.

    They may be made one by one: those of a single shard are in memory at once. One shard is called
    model.safetensors; several get numbers and an index, as in transformers.
    """
    shards: list[list[str]] = []
    pending: dict[str, Tensor] = {}
    total_bytes = shard_bytes = 0

    def flush_shard() -> None:
        save_file(pending, folder / f"{len(shards) + 1}.part", metadata={"format": "pt"})
        shards.append(list(pending))
        pending.clear()

    for name, tensor in unshare_tensors(tensors):
        if pending and shard_bytes + tensor.nbytes > max_shard_bytes:
            flush_shard()
            shard_bytes = 0
        pending[name] = tensor.cpu()
        shard_bytes, total_bytes = shard_bytes + tensor.nbytes, total_bytes + tensor.nbytes
    flush_shard()
    _name_shard_files(shards, total_bytes, folder)


def _name_shard_files(shards: list[list[str]], total_bytes: int, folder: Path) -> None:
    """Give the shards in `folder` their names, and write the index of several."""
    file_names: dict[str, str] = {}
    for number, names in enumerate(shards, 1):
        part, file = folder / f"{number}.part", shard_name(number, len(shards))
        part.chmod(0o644)  # safetensors writes files that nobody else may read
        part.rename(folder / file)
        file_names |= dict.fromkeys(names, file)
    if len(shards) > 1:
        write_index(file_names, total_bytes, folder)


def unshare_tensors(tensors: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
    """Yield tensors as safetensors takes them: contiguous, without shared memory (tied weights)."""
    seen = set()
    for name, tensor in tensors:
        tensor = tensor.detach().contiguous()
        memory = (tensor.data_ptr(), tensor.numel())
        yield name, tensor.clone() if memory in seen else tensor
        seen.add(memory)
