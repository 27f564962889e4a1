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
    """Write tensors into `folder` as safetensors, in shards of at most `limit` bytes.

    One shard is called model.safetensors; several get numbers and an index, as in transformers.
    Where several processes train a model all of them call this; each writes its share of shards.
    """
    begin_writing_tensors(tensors, folder, _run_immediately, max_shard_bytes=max_shard_bytes)()


def begin_writing_tensors(
    tensors: Iterable[tuple[str, Tensor]],
    folder: Path,
    submit: Callable[[Callable[[], None]], Future[None]],
    copy: bool = False,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> Callable[[], None]:
    """Hand the writing of every shard to `submit`, and return what waits for it and ends it.

    With `copy` the tensors may change as soon as this returns. Every process has to call both.
    """
    shards: list[list[str]] = []
    pending: dict[str, Tensor] = {}
    total = size = 0
    written: list[Future[None]] = []

    def is_own_shard() -> bool:
        return len(shards) % collectives.world_size() == collectives.rank()

    def flush_shard() -> None:
        if is_own_shard():
            part, some = folder / f"{len(shards) + 1}.part", dict(pending)
            written.append(submit(lambda: save_file(some, part, metadata={"format": "pt"})))
        shards.append(list(pending))
        pending.clear()

    for name, tensor in unshare_tensors(
        (name, collectives.gather_full_tensor(tensor)) for name, tensor in tensors
    ):
        more = tensor.numel() * tensor.element_size()
        if pending and size + more > max_shard_bytes:
            flush_shard()
            size = 0
        pending[name] = tensor.to("cpu", copy=copy) if is_own_shard() else tensor.new_empty(0)
        size, total = size + more, total + more
    flush_shard()

    def finish_writing() -> None:
        collectives.call_on_all_ranks(lambda: [one.result() for one in written])
        collectives.call_on_rank_zero(lambda: _name_shard_files(shards, total, folder))

    return finish_writing


def _run_immediately(call: Callable[[], None]) -> Future[None]:
    """Call something now; what it raises is raised when its result is asked for."""
    done: Future[None] = Future()
    try:
        call()
        done.set_result(None)
    except (OSError, SafetensorError) as error:
        done.set_exception(error)  # other processes still wait for this one's tensors
    return done


def _name_shard_files(shards: list[list[str]], total_bytes: int, folder: Path) -> None:
    """Give the shards in `folder` their names, and write the index of several."""
    for part in folder.glob("*.part"):
        part.chmod(0o644)  # safetensors writes files that nobody else may read
    if len(shards) == 1:
        (folder / "1.part").rename(folder / WEIGHT_FILENAMES[0])
        return
    places: dict[str, str] = {}
    for number, names in enumerate(shards, 1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        (folder / f"{number}.part").rename(folder / file)
        places |= dict.fromkeys(names, file)
    index = {"metadata": {"total_size": total_bytes}, "weight_map": dict(sorted(places.items()))}
    (folder / f"{WEIGHT_FILENAMES[0]}.index.json").write_text(
        json.dumps(index, indent=2) + "\n", encoding="utf-8"
    )


def unshare_tensors(tensors: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
    """Give tensors as safetensors takes them: contiguous, no two (tied weights) in one place."""
    seen = set()
    for name, tensor in tensors:
        tensor = tensor.detach().contiguous()
        place = (tensor.data_ptr(), tensor.numel())
        yield name, tensor.clone() if place in seen else tensor
        seen.add(place)
