"""Files of tensors: read tensor by tensor into memory of their own, written in shards.

Weights are data, never code: safetensors, or torch's own files with `weights_only=True`. While a
file is read at most `CHUNK` bytes of it are mapped, so that the peak is what was loaded and little
more, however large the shards are.
"""

from __future__ import annotations

import json
import math
import pickle
import zipfile
from collections.abc import Callable, Container, Iterable, Iterator, Mapping
from concurrent.futures import Future
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from vlbench import ranks
from vlbench.files import read_json, refuse_pointer
from vlbench.mistakes import Mistake

CHUNK = 1 << 29  # bytes
SHARD = 5_000_000_000  # bytes; the habit of transformers
NESTED = ("model", "model_state_dict", "state_dict")
LIKE_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".gguf", ".h5", ".msgpack")
STEMS = ("model.safetensors", "pytorch_model.bin")
"""Names of a model's weights in the order of preference; `.index.json` after one lists shards."""


def weight_files(folder: Path) -> list[Path]:
    """Return the files that hold the weights of a Hugging Face folder, one or several shards."""
    for stem in STEMS:
        index = folder / f"{stem}.index.json"
        if (folder / stem).is_file():
            return [folder / stem]
        if index.is_file():
            files = [folder / name for name in sorted(set(_weight_map(index).values()))]
            missing = [file.name for file in files if not file.is_file()]
            if missing:
                raise Mistake(f"{index} names {', '.join(missing)}, which {folder} does not have")
            return files
    wanted = f"{folder} has no weights; wanted is one of {', '.join(STEMS)}, or their shards"
    raise Mistake(f"{wanted}{_instead(folder)}")


def _instead(folder: Path) -> str:
    """Return what else a folder without weights has that looks like some, to be put into a line."""
    if (folder / "adapter_config.json").is_file():
        return (
            ". It holds LoRA adapters: merge them into the model that they were trained on, and "
            "give the merged folder; the projector alone is in non_lora_trainables.bin"
        )
    names = [file.name for file in sorted(folder.glob("*")) if file.suffix in LIKE_WEIGHTS]
    return f"; it has {', '.join(names[:3])}" if names else ""


def _weight_map(index: Path) -> dict[str, str]:
    found = read_json(index).get("weight_map")
    if not isinstance(found, dict) or not found or not _all_texts(found.values()):
        raise Mistake(f"{index} has no weight_map from tensors to files")
    strange = [name for name in found.values() if Path(name).name != name]
    if strange:
        raise Mistake(f"{index} names a file outside of its folder: {strange[0]}")
    return found


def _all_texts(values: Iterable[Any]) -> bool:
    return all(isinstance(value, str) and value for value in values)


class Header(NamedTuple):
    """What is known of a tensor before its numbers are read."""

    shape: tuple[int, ...]
    kind: torch.dtype | None
    """None: a type that torch has no name for, or that is not read here."""


def headers(file: Path) -> dict[str, Header]:
    """Return shape and type of every tensor in a file; no tensor is read."""
    with _opened(file) as tensors:
        return {name: Header(tensors.shape(name), tensors.kind(name)) for name in tensors.names}


def shapes(file: Path) -> dict[str, tuple[int, ...]]:
    """Return the shape of every tensor in a file; no tensor is read."""
    return {name: header.shape for name, header in headers(file).items()}


def check_kind(name: str, header: Header, file: Path) -> None:
    """Refuse a tensor of weights that is stored in 8 bits or less, whose scale lies elsewhere."""
    if header.kind not in WEIGHTS:
        kind = str(header.kind or "a type not known here").removeprefix("torch.")
        raise Mistake(
            f"{file}: tensor {name} is stored as {kind}; quantized weights are not read: wanted "
            "are float32, bfloat16 or float16"
        )


def stored(folder: Path) -> tuple[torch.dtype, int]:
    """Return the type of the largest tensor in a folder and how many numbers there are in all."""
    largest, kind, total = -1, torch.float32, 0
    for file in weight_files(folder):
        with _opened(file) as tensors:
            for name in tensors.names:
                count = math.prod(tensors.shape(name))
                total += count
                if count > largest:
                    largest, kind = count, tensors.kind(name) or torch.float32
    return kind, total


def read(
    file: Path, names: Iterable[str] | None = None, mapped: Container[str] = ()
) -> Iterator[tuple[str, Tensor]]:
    """Give the tensors of a file (those called `names`, or all), each in memory of its own.

    Those in `mapped` stay in the file, and take memory where they are used, while they are used.
    """
    with _opened(file) as tensors:
        wanted = list(tensors.names if names is None else names)
        groups = _groups([(name, _bytes(tensors, name)) for name in wanted])
    for group in groups:
        with _opened(file) as tensors:
            for name in group:
                yield name, tensors.view(name) if name in mapped else tensors.view(name).clone()


class Lazy(Mapping[str, Tensor]):
    """The tensors of several files by name, each read when it is asked for."""

    def __init__(self, files: Iterable[Path]) -> None:
        """Look at the names in `files`; the last file that has a name counts."""
        self._where = {name: file for file in files for name in shapes(file)}

    def __getitem__(self, name: str) -> Tensor:
        return next(read(self._where[name], [name]))[1]

    def __iter__(self) -> Iterator[str]:
        return iter(self._where)

    def __len__(self) -> int:
        return len(self._where)


def write(tensors: Iterable[tuple[str, Tensor]], folder: Path, limit: int = SHARD) -> None:
    """Write tensors into `folder` as safetensors, in shards of at most `limit` bytes.

    One shard is called model.safetensors; several get numbers and an index, as in transformers.
    Where several processes train a model all of them call this; each writes its share of shards.
    """
    begin(tensors, folder, _at_once, limit=limit)()


def begin(
    tensors: Iterable[tuple[str, Tensor]],
    folder: Path,
    submit: Callable[[Callable[[], None]], Future[None]],
    copy: bool = False,
    limit: int = SHARD,
) -> Callable[[], None]:
    """Hand the writing of every shard to `submit`, and return what waits for it and ends it.

    With `copy` the tensors may change as soon as this returns. Every process has to call both.
    """
    shards: list[list[str]] = []
    pending: dict[str, Tensor] = {}
    total = size = 0
    written: list[Future[None]] = []

    def mine() -> bool:
        return len(shards) % ranks.size() == ranks.rank()

    def flush() -> None:
        if mine():
            part, some = folder / f"{len(shards) + 1}.part", dict(pending)
            written.append(submit(lambda: save_file(some, part, metadata={"format": "pt"})))
        shards.append(list(pending))
        pending.clear()

    for name, tensor in unshared((name, ranks.whole(tensor)) for name, tensor in tensors):
        more = tensor.numel() * tensor.element_size()
        if pending and size + more > limit:
            flush()
            size = 0
        pending[name] = tensor.to("cpu", copy=copy) if mine() else tensor.new_empty(0)
        size, total = size + more, total + more
    flush()

    def end() -> None:
        ranks.together(lambda: [one.result() for one in written])
        ranks.first(lambda: _name(shards, total, folder))

    return end


def _at_once(call: Callable[[], None]) -> Future[None]:
    """Call something now; what it raises is raised when its result is asked for."""
    done: Future[None] = Future()
    try:
        call()
        done.set_result(None)
    except (OSError, SafetensorError) as error:
        done.set_exception(error)  # other processes still wait for this one's tensors
    return done


def _name(shards: list[list[str]], total: int, folder: Path) -> None:
    """Give the shards in `folder` their names, and write the index of several."""
    for part in folder.glob("*.part"):
        part.chmod(0o644)  # safetensors writes files that nobody else may read
    if len(shards) == 1:
        (folder / "1.part").rename(folder / STEMS[0])
        return
    places: dict[str, str] = {}
    for number, names in enumerate(shards, 1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        (folder / f"{number}.part").rename(folder / file)
        places |= dict.fromkeys(names, file)
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(places.items()))}
    (folder / f"{STEMS[0]}.index.json").write_text(
        json.dumps(index, indent=2) + "\n", encoding="utf-8"
    )


def unshared(tensors: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
    """Give tensors as safetensors takes them: contiguous, no two (tied weights) in one place."""
    seen = set()
    for name, tensor in tensors:
        tensor = tensor.detach().contiguous()
        place = (tensor.data_ptr(), tensor.numel())
        yield name, tensor.clone() if place in seen else tensor
        seen.add(place)


def _groups(sizes: list[tuple[str, int]]) -> list[list[str]]:
    """Return the names in order, in groups of at most CHUNK bytes or of a single tensor."""
    groups: list[list[str]] = []
    room = 0
    for name, size in sizes:
        if not groups or size > room:
            groups.append([])
            room = CHUNK
        groups[-1].append(name)
        room -= size
    return groups


class _Safe:
    """An open safetensors file."""

    def __init__(self, handle: Any) -> None:
        self.handle = handle
        self.names = list(handle.keys())

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self.handle.get_slice(name).get_shape())

    def kind(self, name: str) -> torch.dtype | None:
        return _KINDS.get(self.handle.get_slice(name).get_dtype())

    def view(self, name: str) -> Tensor:
        return self.handle.get_tensor(name)  # type: ignore[no-any-return]


class _Pickled:
    """An open file of torch."""

    def __init__(self, state: Mapping[str, Tensor]) -> None:
        self.state = state
        self.names = list(state)

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self.state[name].shape)

    def kind(self, name: str) -> torch.dtype | None:
        return self.state[name].dtype

    def view(self, name: str) -> Tensor:
        return self.state[name]


_KINDS = {
    **{"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16},
    **{"I64": torch.int64, "I32": torch.int32, "I8": torch.int8, "U8": torch.uint8},
    **{"F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "BOOL": torch.bool},
}
WEIGHTS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
"""Types in which weights are stored as they are."""


def _bytes(tensors: _Safe | _Pickled, name: str) -> int:
    return math.prod(tensors.shape(name)) * (tensors.kind(name) or torch.float64).itemsize


@contextmanager
def _opened(file: Path) -> Iterator[_Safe | _Pickled]:
    """Open a file of tensors; what is wrong with it becomes one line that names it."""
    refuse_pointer(file)
    if not _is_safe(file):
        yield _Pickled(_unpickled(file))
        return
    try:
        with safe_open(file, framework="pt") as handle:
            yield _Safe(handle)
    except (SafetensorError, OSError) as error:
        raise Mistake(f"{file} is torn or no safetensors file: {_line(error)}") from error


def _unpickled(file: Path) -> dict[str, Tensor]:
    """Return the tensors in a file of torch, mapped where its format allows that."""
    try:
        mapped = zipfile.is_zipfile(file)
        if mapped and _is_program(file):
            raise Mistake(
                f"{file} is a TorchScript program, as OpenAI's own CLIP files are; code in a file "
                "of weights is never executed. Give a file of tensors, or a tag of open_clip such "
                "as vision.weights=openai"
            )
        state = torch.load(file, map_location="cpu", weights_only=True, mmap=mapped)
    except Mistake:
        raise
    except (pickle.UnpicklingError, KeyError, IndexError, AttributeError, TypeError) as error:
        raise Mistake(
            f"{file} holds more than tensors, or is torn; code in a file of weights is never "
            f"executed. If it is whole, ask its author for safetensors ({_line(error)})"
        ) from error
    except Exception as error:  # of torch, zip and struct, by where the file is torn
        raise Mistake(f"{file} is torn or no file of weights: {_line(error)}") from error
    for inner in NESTED:  # checkpoints of training code
        state = state.get(inner, state) if isinstance(state, dict) else state
    named = isinstance(state, dict) and all(isinstance(name, str) for name in state)
    if not named or not all(isinstance(v, Tensor) for v in state.values()):
        raise Mistake(f"{file} does not hold a mapping from names to tensors")
    empty = [name for name, v in state.items() if v.is_meta or v.layout is not torch.strided]
    if empty:
        raise Mistake(f"{file}: tensor {empty[0]} is sparse or has no numbers (meta)")
    return state


def _is_safe(file: Path) -> bool:
    """Tell whether a file is safetensors: by its name, or by what follows its header's length."""
    with file.open("rb") as opened:
        return file.suffix == ".safetensors" or opened.read(9)[8:] == b"{"


def _is_program(file: Path) -> bool:
    """Tell whether a zip file of torch holds TorchScript: its constants lie beside its code."""
    with zipfile.ZipFile(file) as archive:
        return any(name.endswith("/constants.pkl") for name in archive.namelist())


def _line(error: Exception) -> str:
    said = str(error).rpartition("WeightsUnpickler error: ")[-1]  # advice to run code is before it
    return said.strip().split("\n")[0][:200] or type(error).__name__
