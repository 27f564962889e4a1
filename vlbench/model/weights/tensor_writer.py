"""Tensors written as safetensors, in shards as transformers writes them, by one process or several.

Every process calls the same functions; each writes its share of the shards.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from vlbench.distributed import collectives
from vlbench.model.weights.tensor_files import WEIGHT_FILENAMES

MAX_SHARD_BYTES = 5_000_000_000  # transformers' default


def write_tensors(
    tensors: Iterable[tuple[str, Tensor]], folder: Path, max_shard_bytes: int = MAX_SHARD_BYTES
) -> None:
    """Write tensors into `folder` as safetensors, in shards of at most `max_shard_bytes`.

    One shard is called model.safetensors; several get numbers and an index, as in transformers.
    """
    begin_writing_tensors(tensors, folder, _run_immediately, max_shard_bytes=max_shard_bytes)()


def begin_writing_tensors(
    tensors: Iterable[tuple[str, Tensor]],
    folder: Path,
    submit: Callable[[Callable[[], None]], Future[None]],
    copy: bool = False,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> Callable[[], None]:
    """Start writing shards, and return a function that waits for them and names the files.

    Args:
        tensors: Name and tensor; sharded ones are gathered.
        folder: Where they are written.
        submit: Runs a function now or later, for example in a thread.
        copy: Whether the tensors are copied first: they may then change once this returns.
        max_shard_bytes: Most bytes of one file; a larger tensor has a file of its own.

    Returns:
        The function to call last, in every process.
    """
    shards: list[list[str]] = []
    pending: dict[str, Tensor] = {}
    total_bytes = shard_bytes = 0
    writes: list[Future[None]] = []

    def is_own_shard() -> bool:
        return len(shards) % collectives.world_size() == collectives.rank()

    def flush_shard() -> None:
        if is_own_shard():
            path, shard = folder / f"{len(shards) + 1}.part", dict(pending)
            writes.append(submit(lambda: save_file(shard, path, metadata={"format": "pt"})))
        shards.append(list(pending))
        pending.clear()

    for name, tensor in unshare_tensors(
        (name, collectives.gather_full_tensor(tensor)) for name, tensor in tensors
    ):
        tensor_bytes = tensor.numel() * tensor.element_size()
        if pending and shard_bytes + tensor_bytes > max_shard_bytes:
            flush_shard()
            shard_bytes = 0
        pending[name] = tensor.to("cpu", copy=copy) if is_own_shard() else tensor.new_empty(0)
        shard_bytes, total_bytes = shard_bytes + tensor_bytes, total_bytes + tensor_bytes
    flush_shard()

    def finish_writing() -> None:
        collectives.call_on_all_ranks(lambda: [write.result() for write in writes])
        collectives.call_on_rank_zero(lambda: _name_shard_files(shards, total_bytes, folder))

    return finish_writing


def _run_immediately(call: Callable[[], None]) -> Future[None]:
    """Call a function now; what it raises is raised by the result of the future."""
    future: Future[None] = Future()
    try:
        call()
        future.set_result(None)
    except (OSError, SafetensorError) as error:
        future.set_exception(error)  # other processes still wait for this one's tensors
    return future


def _name_shard_files(shards: list[list[str]], total_bytes: int, folder: Path) -> None:
    """Give the shards in `folder` their names, and write the index of several."""
    for part in folder.glob("*.part"):
        part.chmod(0o644)  # safetensors writes files that nobody else may read
    if len(shards) == 1:
        (folder / "1.part").rename(folder / WEIGHT_FILENAMES[0])
        return
    weight_map: dict[str, str] = {}
    for number, names in enumerate(shards, 1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        (folder / f"{number}.part").rename(folder / file)
        weight_map |= dict.fromkeys(names, file)
    sorted_map = dict(sorted(weight_map.items()))
    index = {"metadata": {"total_size": total_bytes}, "weight_map": sorted_map}
    (folder / f"{WEIGHT_FILENAMES[0]}.index.json").write_text(
        json.dumps(index, indent=2) + "\n", encoding="utf-8"
    )


def unshare_tensors(tensors: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
    """Yield tensors as safetensors takes them: contiguous, without shared memory (tied weights)."""
    seen = set()
    for name, tensor in tensors:
        tensor = tensor.detach().contiguous()
        memory = (tensor.data_ptr(), tensor.numel())
        yield name, tensor.clone() if memory in seen else tensor
        seen.add(memory)
