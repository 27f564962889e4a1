"""`vlbench.load`: a run, a checkpoint or a released model, ready to answer."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch

from vlbench.command_line.arguments import ChatArguments, EvalArguments
from vlbench.config import recipe as recipes
from vlbench.connector import kept_source
from vlbench.data.chat_template import check_template_name
from vlbench.errors import UserError, one_line, suggest_name
from vlbench.model.loaded_vlm import LoadedVLM
from vlbench.model.weights.load_release import ReleaseOverrides, load_release
from vlbench.model.weights.tensor_files import stored_dtype_and_numel
from vlbench.process_settings import preserve_process_settings
from vlbench.train import checkpoint_files
from vlbench.train.resume import find_released_model, load_checkpoint

DTYPE_NAMES = {
    "float32": torch.float32,
    "bf16": torch.bfloat16,
    "bfloat16": torch.bfloat16,
    "fp16": torch.float16,
    "float16": torch.float16,
}
COMPARISON_DTYPE = torch.float64  # for comparisons; no name, as nobody trains in it
MAX_FLOAT32_BYTES = 4_000_000_000  # bytes


@preserve_process_settings()
def load_model(
    path: str | Path,
    dtype: torch.dtype | str | None = None,
    device: torch.device | str | None = None,
    template: str | None = None,
    trust_connector: bool = False,
) -> LoadedVLM:
    """Return the model in a run, a checkpoint, or a released model, in evaluation mode.

    Args:
        path: A run, a checkpoint, or a released model (a folder or a hub id).
        dtype: A type of torch or a name of DTYPE_NAMES. None: as the weights are stored, but on a
            CPU float32 if that takes at most MAX_FLOAT32_BYTES: exact, and no slower there.
        device: None is the GPU if there is one.
        template: A name of `data.chat_template.CHAT_TEMPLATES`. None: the one of the training, or
            of the released model's folder; a line on standard error names it if it is not Yi-VL's.
        trust_connector: Run the code of a connector that came with a folder of somebody else.
    """
    check_template_name(template)
    device = str(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    _check_usable_device(device)
    folder = find_model_folder(path, "model")
    kind = parse_dtype(dtype) or _default_dtype(folder, device)
    return load_model_folder(folder, kind, device, template, trust_connector).eval()


def load_chosen_model(arguments: ChatArguments | EvalArguments) -> LoadedVLM:
    """Return the model that the words of a command choose."""
    return load_model(
        arguments.model,
        arguments.dtype,
        arguments.device,
        arguments.template,
        arguments.trust_connector,
    )


def find_model_folder(path: str | Path, key: str) -> Path:
    """Return the folder of a checkpoint or released model; `key` names `path` in errors."""
    if not isinstance(path, str | Path) or not str(path):
        raise UserError(f"{key} is {path!r}; wanted is the path of a run, checkpoint or release")
    path = Path(path).expanduser()
    if checkpoint_files.is_run_or_checkpoint(path):
        return checkpoint_files.find_checkpoint(path)
    return find_released_model(str(path), key)


def load_model_folder(
    folder: Path,
    dtype: torch.dtype | None,
    device: str = "cpu",
    template: str | None = None,
    trust_connector: bool = False,
) -> LoadedVLM:
    """Return the model in a folder of `find_model_folder`; `dtype` None: as stored.

    `template` replaces that of the folder; `trust_connector` is explained at `load_model`.
    """
    if not checkpoint_files.is_run_or_checkpoint(folder):
        return load_release(folder, dtype, device, ReleaseOverrides(template_name=template))
    config = recipes.load_recipe_file(folder / "recipe.yaml").model
    # a connector that `./connectors` lacks, or has otherwise, is the one kept in the checkpoint
    name = kept_source.locate_source(config.connector, folder, trust_connector)
    config = replace(config, connector={**config.connector, "name": name})
    if template:
        language = config.language.model_copy(update={"template": template})
        config = replace(config, language=language)
    vlm = load_checkpoint(folder, config, dtype, device)
    _, before = checkpoint_files.read_preprocessing(folder)
    transform = vlm.processor.transform
    transform_hash = transform.transform_hash()
    if before not in (transform_hash, transform.transform_hash(counts_idle_draft=True)):
        raise UserError(
            f"{folder} was trained with other image preprocessing (hash {before}, "
            f"this version has {transform_hash}): its answers would not be its own"
        )
    return vlm


def parse_dtype(dtype: torch.dtype | str | None) -> torch.dtype | None:
    """Return the type of a name of DTYPE_NAMES."""
    if dtype is None or (
        isinstance(dtype, torch.dtype) and dtype in (*DTYPE_NAMES.values(), COMPARISON_DTYPE)
    ):
        return dtype
    if not isinstance(dtype, str) or dtype not in DTYPE_NAMES:
        known = ", ".join(DTYPE_NAMES)
        raise UserError(
            f"dtype is '{dtype}'; known are {known}.{suggest_name(str(dtype), DTYPE_NAMES)}"
        )
    return DTYPE_NAMES[dtype]


def _default_dtype(folder: Path, device: str) -> torch.dtype:
    kind, numbers = stored_dtype_and_numel(folder)
    exact = device.startswith("cpu") and numbers * 4 <= MAX_FLOAT32_BYTES
    return torch.float32 if exact else kind


def _check_usable_device(device: str) -> None:
    if device.partition(":")[0] == "meta":
        raise UserError("device is 'meta', whose tensors have no values; it cannot answer")
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # no such device, or torch built without it
        raise UserError(
            f"device is '{device}', which cannot be used here ({one_line(error, max_lines=1)})"
        ) from error
