"""Files of weights, read tensor by tensor into memory of their own.

Weights are data, never code: safetensors, or torch's own files with `weights_only=True`. At most
`MMAP_CHUNK_BYTES` of a file are mapped at a time, so that peak memory is what was loaded and little
more, however large the shards are.
"""

from __future__ import annotations

import math
import pickle
import zipfile
from collections.abc import Container, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from vlbench.errors import UserError, one_line
from vlbench.regular_files import open_regular
from vlbench.text_files import read_json, refuse_lfs_pointer

MMAP_CHUNK_BYTES = 1 << 29  # bytes
NESTED_STATE_KEYS = ("model", "model_state_dict", "state_dict")
WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".gguf", ".h5", ".msgpack")
WEIGHT_FILENAMES = ("model.safetensors", "pytorch_model.bin")
"""Files of a model's weights, the preferred one first; NAME.index.json lists shards of one."""


def weight_files(folder: Path) -> list[Path]:
    """Return the files that hold the weights of a Hugging Face folder, one or several shards."""
    for stem in WEIGHT_FILENAMES:
        index = folder / f"{stem}.index.json"
        if (folder / stem).is_file():
            return [folder / stem]
        if index.is_file():
            files = [folder / name for name in sorted(set(_read_weight_map(index).values()))]
            missing = [file.name for file in files if not file.is_file()]
            if missing:
                raise UserError(f"{index} names {', '.join(missing)}, which {folder} does not have")
            return files
    raise UserError(
        f"{folder} has no weights; wanted is one of {', '.join(WEIGHT_FILENAMES)}, or their shards"
        f"{_suggest_other_files(folder)}"
    )


def _suggest_other_files(folder: Path) -> str:
    """Return what else a folder without weights has that looks like some, as the end of a line."""
    if (folder / "adapter_config.json").is_file():
        return (
            ". It holds LoRA adapters: merge them into the model that they were trained on, and "
            "give the merged folder; the projector alone is in non_lora_trainables.bin"
        )
    names = [file.name for file in sorted(folder.glob("*")) if file.suffix in WEIGHT_SUFFIXES]
    return f"; it has {', '.join(names[:3])}" if names else ""


def _read_weight_map(index: Path) -> dict[str, str]:
    """Return the name of the file that has each tensor."""
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not _are_nonempty_strings(weight_map.values()):
        raise UserError(f"{index} has no weight_map from tensors to files")
    outside = [name for name in weight_map.values() if Path(name).name != name]
    if outside:
        raise UserError(f"{index} names a file outside of its folder: {outside[0]}")
    return weight_map


def _are_nonempty_strings(values: Iterable[Any]) -> bool:
    values = list(values)
    return bool(values) and all(isinstance(value, str) and value for value in values)


class TensorHeader(NamedTuple):
    """Shape and type of a tensor in a file."""

    shape: tuple[int, ...]
    dtype: torch.dtype | None
    """None: a type that is not read here, or that torch does not have."""


def read_tensor_headers(file: Path) -> dict[str, TensorHeader]:
    """Return shape and type of every tensor in a file; no values are read."""
    with _open_tensor_file(file) as tensors:
        return {
            name: TensorHeader(tensors.shape(name), tensors.dtype(name)) for name in tensors.names
        }


def read_tensor_shapes(file: Path) -> dict[str, tuple[int, ...]]:
    """Return the shape of every tensor in a file; no values are read."""
    return {name: header.shape for name, header in read_tensor_headers(file).items()}


def check_weight_dtype(name: str, header: TensorHeader, file: Path) -> None:
    """Refuse a tensor that is stored in 8 bits or less: its scales are other tensors."""
    if header.dtype not in WEIGHT_DTYPES:
        stored = str(header.dtype or "a type not known here").removeprefix("torch.")
        raise UserError(
            f"{file}: tensor {name} is stored as {stored}; quantized weights are not read: wanted "
            "are float32, bfloat16 or float16"
        )


def cast_floating(tensor: Tensor, dtype: torch.dtype | None) -> Tensor:
    """Return a tensor as `dtype`; None and whole numbers leave it as it is."""
    return tensor.to(dtype) if dtype and tensor.is_floating_point() else tensor


def stored_dtype_and_numel(folder: Path) -> tuple[torch.dtype, int]:
    """Return the type of the largest tensor in a folder, and the number of weights in all."""
    largest, dtype, total = -1, torch.float32, 0
    for file in weight_files(folder):
        with _open_tensor_file(file) as tensors:
            for name in tensors.names:
                count = math.prod(tensors.shape(name))
                total += count
                if count > largest:
                    largest, dtype = count, tensors.dtype(name) or torch.float32
    return dtype, total


def read_tensors(
    file: Path, names: Iterable[str] | None = None, mmap_names: Container[str] = ()
) -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors of a file (those called `names`, or all), each in memory of its own.

    Those in `mmap_names` stay memory-mapped: they take memory only while they are used.
    """
    with _open_tensor_file(file) as tensors:
        chosen = list(tensors.names if names is None else names)
        chunks = _chunk_tensor_names([(name, _tensor_bytes(tensors, name)) for name in chosen])
    for chunk in chunks:
        with _open_tensor_file(file) as tensors:
            for name in chunk:
                view = tensors.tensor_view(name)
                yield name, view if name in mmap_names else view.clone()


class LazyTensors(Mapping[str, Tensor]):
    """The tensors of several files by name, each read when it is looked up."""

    def __init__(self, files: Iterable[Path]) -> None:
        """Read the names in `files`; of a name in several the last file counts."""
        self._files_by_name = {name: file for file in files for name in read_tensor_shapes(file)}

    def __getitem__(self, name: str) -> Tensor:
        return next(read_tensors(self._files_by_name[name], [name]))[1]

    def __iter__(self) -> Iterator[str]:
        return iter(self._files_by_name)

    def __len__(self) -> int:
        return len(self._files_by_name)


def _chunk_tensor_names(sizes: list[tuple[str, int]]) -> list[list[str]]:
    """Return the names in order, in chunks of at most MMAP_CHUNK_BYTES or of a single tensor."""
    chunks: list[list[str]] = []
    bytes_left = 0
    for name, size in sizes:
        if not chunks or size > bytes_left:
            chunks.append([])
            bytes_left = MMAP_CHUNK_BYTES
        chunks[-1].append(name)
        bytes_left -= size
    return chunks


class _SafetensorsFile:
    """An open safetensors file."""

    def __init__(self, handle: Any) -> None:
        self.handle = handle
        self.names = list(handle.keys())

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self.handle.get_slice(name).get_shape())

    def dtype(self, name: str) -> torch.dtype | None:
        return _SAFETENSORS_DTYPES.get(self.handle.get_slice(name).get_dtype())

    def tensor_view(self, name: str) -> Tensor:
        return self.handle.get_tensor(name)  # type: ignore[no-any-return]


class _TorchFile:
    """An open file of `torch.save`."""

    def __init__(self, state: Mapping[str, Tensor]) -> None:
        self.state = state
        self.names = list(state)

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self.state[name].shape)

    def dtype(self, name: str) -> torch.dtype | None:
        return self.state[name].dtype

    def tensor_view(self, name: str) -> Tensor:
        return self.state[name]


_SAFETENSORS_DTYPES = {
    **{"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16},
    **{"I64": torch.int64, "I32": torch.int32, "I8": torch.int8, "U8": torch.uint8},
    **{"F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "BOOL": torch.bool},
}
WEIGHT_DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
"""Types of weights that are not quantized."""


def _tensor_bytes(tensors: _SafetensorsFile | _TorchFile, name: str) -> int:
    return math.prod(tensors.shape(name)) * (tensors.dtype(name) or torch.float64).itemsize


@contextmanager
def _open_tensor_file(file: Path) -> Iterator[_SafetensorsFile | _TorchFile]:
    """Open a weight file; errors become one line that names it."""
    refuse_lfs_pointer(file)
    if not _is_safetensors(file):
        yield _TorchFile(_load_torch_file(file))
        return
    try:
        with safe_open(file, framework="pt") as handle:
            yield _SafetensorsFile(handle)
    except (SafetensorError, OSError) as error:
        raise UserError(
            f"{file} is torn or no safetensors file: {_loading_error_line(error)}"
        ) from error


def _load_torch_file(file: Path) -> dict[str, Tensor]:
    """Return the tensors in a file of `torch.save`, memory-mapped where its format allows that."""
    try:
        is_zip = zipfile.is_zipfile(file)
        if is_zip and _is_torchscript(file):
            raise UserError(
                f"{file} is a TorchScript program, as OpenAI's own CLIP files are; code in a file "
                "of weights is never executed. Give a file of tensors, or a tag of open_clip such "
                "as vision.weights=openai"
            )
        state = torch.load(file, map_location="cpu", weights_only=True, mmap=is_zip)
    except UserError:
        raise
    except (pickle.UnpicklingError, KeyError, IndexError, AttributeError, TypeError) as error:
        raise UserError(
            f"{file} holds more than tensors, or is torn; code in a file of weights is never "
            "executed. If it is whole, ask its author for safetensors "
            f"({_loading_error_line(error)})"
        ) from error
    except Exception as error:  # of torch, zip and struct, by where the file is torn
        raise UserError(
            f"{file} is torn or no file of weights: {_loading_error_line(error)}"
        ) from error
    for key in NESTED_STATE_KEYS:  # checkpoints of training code
        state = state.get(key, state) if isinstance(state, dict) else state
    has_names = isinstance(state, dict) and all(isinstance(name, str) for name in state)
    if not has_names or not all(isinstance(v, Tensor) for v in state.values()):
        raise UserError(f"{file} does not hold a mapping from names to tensors")
    unusable = [name for name, v in state.items() if v.is_meta or v.layout is not torch.strided]
    if unusable:
        raise UserError(f"{file}: tensor {unusable[0]} is sparse or has no numbers (meta)")
    tensors: dict[str, Tensor] = state
    return tensors


def _is_safetensors(file: Path) -> bool:
    """Tell whether a file is safetensors: by its name, or by the start of its JSON header."""
    with open_regular(file) as opened:
        return file.suffix == ".safetensors" or opened.read(9)[8:] == b"{"


def _is_torchscript(file: Path) -> bool:
    """Tell whether a zip file of torch holds TorchScript: it has constants beside its code."""
    with zipfile.ZipFile(file) as archive:
        return any(name.endswith("/constants.pkl") for name in archive.namelist())


def _loading_error_line(error: Exception) -> str:
    # what stands before it is advice to execute code
    reason = str(error).rpartition("WeightsUnpickler error: ")[-1]
    return one_line(reason, max_lines=1) or type(error).__name__
