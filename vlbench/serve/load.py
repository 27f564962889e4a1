"""`vlbench.load`: a run, a checkpoint or a released model, ready to answer."""

from __future__ import annotations

import json
from pathlib import Path

import torch

from vlbench import recipe as recipes
from vlbench.mistakes import Mistake, nearest
from vlbench.model.vlm import VLM
from vlbench.model.weights.load import load_release
from vlbench.model.weights.shards import stored
from vlbench.train import checkpoint
from vlbench.train.restore import released, restore

DTYPES = {
    "float32": torch.float32,
    "bf16": torch.bfloat16,
    "bfloat16": torch.bfloat16,
    "fp16": torch.float16,
    "float16": torch.float16,
}
FLOAT32_UP_TO = 4_000_000_000  # bytes


def load(
    path: str | Path, dtype: torch.dtype | str | None = None, device: str | None = None
) -> VLM:
    """Return the model in a run, a checkpoint, or a released model (a folder or a hub id).

    `dtype` is a type of torch or one of the names in DTYPES. None: as the weights are stored, but
    on a CPU float32 if that takes at most FLOAT32_UP_TO bytes, where it is as fast and exact.
    `device` None is the GPU if there is one.
    """
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    if checkpoint.holds(Path(path)):
        folder = checkpoint.find(Path(path))
        vlm = restore(
            folder, recipes.load_file(folder / "recipe.yaml"), _kind(dtype, folder, device), device
        )
        _check_preprocessing(folder, vlm)
    else:
        folder = released(str(path), "model")
        vlm = load_release(folder, _kind(dtype, folder, device), device)
    return vlm.eval()


def _kind(dtype: torch.dtype | str | None, folder: Path, device: str) -> torch.dtype:
    if isinstance(dtype, torch.dtype):
        return dtype
    if dtype is not None:
        if dtype not in DTYPES:
            known = ", ".join(DTYPES)
            raise Mistake(f"dtype is '{dtype}'; known are {known}.{nearest(dtype, DTYPES)}")
        return DTYPES[dtype]
    kind, numbers = stored(folder)
    exact = device.startswith("cpu") and numbers * 4 <= FLOAT32_UP_TO
    return torch.float32 if exact else kind


def _check_preprocessing(folder: Path, vlm: VLM) -> None:
    stored_hash = json.loads((folder / "preprocess.json").read_text())["transform_hash"]
    if stored_hash != vlm.transform.hash():
        raise Mistake(
            f"{folder} was trained with other image preprocessing (hash {stored_hash}, "
            f"this version has {vlm.transform.hash()}): its answers would not be its own"
        )
