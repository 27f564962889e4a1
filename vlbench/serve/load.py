"""`vlbench.load`: a run, a checkpoint or a released model, ready to answer."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from vlbench import recipe as recipes
from vlbench.data.template import template_named
from vlbench.host import kept
from vlbench.mistakes import Mistake, nearest
from vlbench.model.vlm import VLM
from vlbench.model.weights.load import Choice, load_release
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
FLOAT64 = torch.float64  # for comparisons; no name, as nobody trains in it
FLOAT32_UP_TO = 4_000_000_000  # bytes


@kept()
def load(
    path: str | Path,
    dtype: torch.dtype | str | None = None,
    device: torch.device | str | None = None,
    template: str | None = None,
) -> VLM:
    """Return the model in a run, a checkpoint, or a released model (a folder or a hub id).

    `dtype` is a type of torch or one of the names in DTYPES. None: as the weights are stored, but
    on a CPU float32 if that takes at most FLOAT32_UP_TO bytes: exact, and no slower there.
    `device` None is the GPU if there is one. `template` is one of `data.template.TEMPLATES`; None:
    that which the model was trained with, and for a release that of its folder, which is said in a
    line on standard error where it is not Yi-VL's own.
    """
    template_named(template)
    device = str(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    _check_device(device)
    folder = find(path, "model")
    kind = type_named(dtype) or _default_type(folder, device)
    return open_model(folder, kind, device, template).eval()


def find(path: str | Path, key: str) -> Path:
    """Return the folder of a checkpoint or released model; `key` names `path` in a mistake."""
    if not isinstance(path, str | Path) or not str(path):
        raise Mistake(f"{key} is {path!r}; wanted is the path of a run, checkpoint or release")
    path = Path(path).expanduser()
    if checkpoint.holds(path):
        return checkpoint.find(path)
    return released(str(path), key)


def open_model(
    folder: Path, dtype: torch.dtype | None, device: str = "cpu", template: str | None = None
) -> VLM:
    """Return the model in a folder that `find` found; `dtype` None keeps tensors as stored.

    `template` replaces that of the folder.
    """
    if not checkpoint.holds(folder):
        return load_release(folder, dtype, device, Choice(template=template))
    recipe = recipes.load_file(folder / "recipe.yaml")
    if template:
        known: Any = template  # a name of TEMPLATES
        recipe = replace(recipe, language=replace(recipe.language, template=known))
    vlm = restore(folder, recipe, dtype, device)
    _, before = checkpoint.preprocessed(folder)
    if before != vlm.transform.hash():
        raise Mistake(
            f"{folder} was trained with other image preprocessing (hash {before}, "
            f"this version has {vlm.transform.hash()}): its answers would not be its own"
        )
    return vlm


def type_named(dtype: torch.dtype | str | None) -> torch.dtype | None:
    """Return the type that a name of DTYPES means."""
    if dtype is None or (isinstance(dtype, torch.dtype) and dtype in (*DTYPES.values(), FLOAT64)):
        return dtype
    if not isinstance(dtype, str) or dtype not in DTYPES:
        known = ", ".join(DTYPES)
        raise Mistake(f"dtype is '{dtype}'; known are {known}.{nearest(str(dtype), DTYPES)}")
    return DTYPES[dtype]


def _default_type(folder: Path, device: str) -> torch.dtype:
    kind, numbers = stored(folder)
    exact = device.startswith("cpu") and numbers * 4 <= FLOAT32_UP_TO
    return torch.float32 if exact else kind


def _check_device(device: str) -> None:
    if device.partition(":")[0] == "meta":
        raise Mistake("device is 'meta', which holds no numbers; it cannot answer")
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # of torch: no such device, or not built for it
        reason = str(error).splitlines()[0]
        raise Mistake(f"device is '{device}', which cannot be used here ({reason})") from error
