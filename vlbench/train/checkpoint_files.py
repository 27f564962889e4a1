"""Checkpoints: folders that stand alone, written whole or not at all.

checkpoints/2-chat-000300/
    model.safetensors     every part that was trained so far, keys `vision.`, `connector.`, ...
    optimizer/            state of the optimizer, by the names of parameters
    position.json         stage, step, held-out loss
    recipe.yaml preprocess.json tokenizer.model tokenizer_config.json
    language/             config of the language model, if its weights are in model.safetensors
    vision/               config of the vision encoder, in open_clip's or timm's format
    second_vision/        and of a second one
    weights.json          the source of each part's first weights, and their checksum
    adapters/PART/        LoRA adapters in peft's layout, if a part has them
    release/              small files of the released model that the run began with, if any

More than 5 GB of tensors are several files and an index, as in transformers. Where several
processes train, each writes the rows that it has into the same files: nothing is gathered, and the
format does not depend on their number.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import platform
import re
import shlex
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from vlbench.config.key_types import ENCODER_PARTS
from vlbench.connector.kept_source import copy_kept_source
from vlbench.distributed import collectives
from vlbench.distributed.machine_limits import free_host_memory
from vlbench.errors import EnvironmentFailure, UserError, one_line
from vlbench.model import lora_adapters
from vlbench.model.build_vlm import LANGUAGE_FOLDER
from vlbench.model.frozen_bf16 import FROZEN_DTYPE
from vlbench.model.loaded_vlm import LoadedVLM
from vlbench.model.vlm import VLM
from vlbench.model.weights.background_writer import BackgroundWriter, FolderWrite, fsync_path
from vlbench.model.weights.own_rows import find_own_rows
from vlbench.model.weights.release_files import write_release_files
from vlbench.model.weights.tensor_files import LazyTensors, weight_files
from vlbench.model.weights.tensor_layout import TensorSpec, create_files, plan_files
from vlbench.model.weights.weight_origin import write_origins
from vlbench.processor import Processor
from vlbench.system_errors import FULL_DISK_REASONS, error_number
from vlbench.text_files import read_json, read_text
from vlbench.train.optimizer_state import named_optimizer_state

RELEASE_FOLDER = "release"
ADAPTERS_FOLDER = "adapters"
OPTIMIZER_FOLDER = "optimizer"
WRITING_PREFIX = ".writing-"  # of the folder of a checkpoint that is not complete
HOST_MEMORY_SHARE = 0.5
"""Share of a machine's free memory that copies may take until they are written."""
CHECKPOINT_NAME = re.compile(r"(\d+)-([A-Za-z0-9_]+)-(\d{6,})")
_POSITION_TYPES = {"stage": int, "name": str, "step": int}


@dataclass(frozen=True)
class RunPosition:
    """A position of a run: `step` optimizer steps of stage number `stage` are done."""

    stage: int
    name: str
    step: int
    loss: float | None = None
    """Held-out loss per supervised token, if it was measured at this step."""
    seen: dict[str, int] | None = None
    """Samples, images, tokens (image positions included) and supervised tokens that the run has
    trained on, and what was cut off at `language.max_length`."""
    seconds: float | None = field(default=None, compare=False)
    """Seconds that the run has taken, without the time in which it was stopped."""

    @property
    def folder_name(self) -> str:
        """Name of the checkpoint's folder; names sort in the order of training."""
        return f"{self.stage}-{self.name}-{self.step:06d}"


def named_part_weights(vlm: VLM, parts: list[str]) -> Iterator[tuple[str, Tensor]]:
    """Yield the weights of `parts`, names prefixed with that of the part.

    What a forward pass may change, so every buffer, is copied.
    """
    for part in parts:
        module: nn.Module = getattr(vlm, part)
        buffers = {buffer.data_ptr() for buffer in module.buffers()}
        for key, value in lora_adapters.base_state_dict(module).items():
            is_buffer = not isinstance(value, DTensor) and value.data_ptr() in buffers
            yield f"{part}.{key}", value.clone() if is_buffer else value


def stored_dtype(tensor: Tensor) -> torch.dtype:
    """Return the type that a checkpoint has a tensor in.

    Frozen weights that a stage holds in bfloat16 are float32 there, as between stages.
    """
    return torch.float32 if tensor.dtype is FROZEN_DTYPE else tensor.dtype


class CheckpointWriter:
    """A checkpoint that is being written by threads while training goes on.

    Where several processes train, all of them start and finish it together.
    """

    def __init__(
        self,
        folder: Path,
        position: RunPosition,
        vlm: LoadedVLM,
        parts: list[str],
        optimizer: Optimizer | None,
        recipe_file: Path,
    ) -> None:
        """Start to copy and to write; the checkpoint counts after `finish_writing`.

        Weights and state of the optimizer must not change before `wait_until_copied` has returned.

        Args:
            folder: The folder of all checkpoints of a run.
            position: Where the run stands.
            vlm: The model.
            parts: The parts whose weights are written.
            optimizer: Its state is written, if given.
            recipe_file: The recipe of the run, which is copied, as the connector's source is.
        """
        self.final_path = folder / position.folder_name
        self.temp_path = folder / f"{WRITING_PREFIX}{position.folder_name}"
        self._writer: BackgroundWriter | None = None
        tensors = {self.temp_path: dict(named_part_weights(vlm.model, parts))}
        if optimizer is not None:
            optimizer_state = dict(named_optimizer_state(vlm.model, optimizer))
            tensors[self.temp_path / OPTIMIZER_FOLDER] = optimizer_state
        writes = [_plan_folder(path, named) for path, named in tensors.items()]
        hosts = collectives.all_gather_objects(platform.node())
        with self._explain_write_errors():
            collectives.call_on_rank_zero(lambda: _make_folders(self.temp_path, writes))
            self._writer = BackgroundWriter(
                writes,
                int(HOST_MEMORY_SHARE * free_host_memory()) // hosts.count(platform.node()),
                vlm.model.device,
                lock_ranges=len(set(hosts)) > 1,
            )
            write_metadata(vlm, self.temp_path, read_text(recipe_file), position)
            collectives.call_on_rank_zero(
                lambda: copy_kept_source(recipe_file.parent, self.temp_path)
            )

    @property
    def is_written(self) -> bool:
        """True when this process has written what it has."""
        assert self._writer is not None
        return self._writer.is_written

    def wait_until_copied(self) -> None:
        """Wait until weights and state of the optimizer may change."""
        assert self._writer is not None
        self._writer.wait_until_copied()

    def finish_writing(self) -> Path:
        """Wait for what all processes write, name the checkpoint, and return its path."""
        assert self._writer is not None
        with self._explain_write_errors():
            collectives.call_on_all_ranks(self._writer.finish)
            collectives.call_on_rank_zero(
                lambda: _publish_checkpoint(self.temp_path, self.final_path)
            )
        return self.final_path

    @contextlib.contextmanager
    def _explain_write_errors(self) -> Iterator[None]:
        """Remove a checkpoint that cannot be written, and raise an error that says why."""
        try:
            yield
        except (OSError, SafetensorError) as error:
            if self._writer is not None:
                self._writer.close()
            shutil.rmtree(self.temp_path, ignore_errors=True)
            raise explain_write_error(error, self.temp_path.parent) from error


def _plan_folder(folder: Path, tensors: Mapping[str, Tensor]) -> FolderWrite:
    """Return which files `tensors` go to, and what this process writes of them."""
    specs = {
        name: TensorSpec(tuple(tensor.shape), stored_dtype(tensor))
        for name, tensor in tensors.items()
    }
    dtypes = {name: spec.dtype for name, spec in specs.items()}
    return FolderWrite(folder, plan_files(specs), dtypes, find_own_rows(tensors))


def _make_folders(temp_path: Path, writes: list[FolderWrite]) -> None:
    """Make the folders of a new checkpoint, and its files with no values yet."""
    shutil.rmtree(temp_path, ignore_errors=True)
    for write in writes:
        write.folder.mkdir(parents=True)
        create_files(write.files, write.folder)


def _publish_checkpoint(temp_path: Path, final_path: Path) -> None:
    """Rename a complete checkpoint to its name, when all files are on the disk."""
    for path in temp_path.rglob("*"):
        fsync_path(path)
    shutil.rmtree(final_path, ignore_errors=True)
    temp_path.rename(final_path)
    fsync_path(final_path.parent)


def write_metadata(vlm: LoadedVLM, folder: Path, recipe_text: str, position: RunPosition) -> None:
    """Write all of a model but its base weights, so that a checkpoint stands alone."""
    for part, module in vlm.model.named_parts():
        lora_adapters.save_adapters(module, folder / ADAPTERS_FOLDER / part)
    if not collectives.is_rank_zero():
        return
    (folder / "preprocess.json").write_text(preprocessing_json(vlm.processor), encoding="utf-8")
    (folder / "recipe.yaml").write_text(recipe_text, encoding="utf-8")
    vlm.tokenizer.save(folder)
    write_release_files(vlm.release_files, folder / RELEASE_FOLDER)
    write_origins(vlm.weight_origins, folder)
    for part, encoder in zip(ENCODER_PARTS, vlm.vision.encoders(), strict=False):
        if encoder.config is not None:
            (folder / part).mkdir()
            encoder.config.save(folder / part)
    config = vlm.language.config.to_dict()
    ends = {"eos_token_id": vlm.language.generation_config.eos_token_id}
    (folder / LANGUAGE_FOLDER).mkdir()
    (folder / LANGUAGE_FOLDER / "config.json").write_text(
        json.dumps(config, indent=1), encoding="utf-8"
    )
    (folder / LANGUAGE_FOLDER / "generation_config.json").write_text(
        json.dumps(ends), encoding="utf-8"
    )
    (folder / "position.json").write_text(json.dumps(asdict(position)), encoding="utf-8")


def explain_write_error(error: OSError | SafetensorError, folder: Path) -> Exception:
    """Return the error for people when `folder` cannot be written, else the error itself."""
    number = error_number(error)
    if number in FULL_DISK_REASONS:
        return EnvironmentFailure(
            f"{FULL_DISK_REASONS[number]}: cannot write in {folder}; earlier checkpoints are "
            "whole. To go on, make room and repeat the command with the run= of this run"
        )
    if number in (errno.EACCES, errno.EROFS, errno.EPERM):
        return UserError(f"{folder} cannot be written ({os.strerror(number)})")
    if isinstance(error, SafetensorError):
        return EnvironmentFailure(f"could not write a checkpoint in {folder}: {one_line(error)}")
    return error


def preprocessing_json(processor: Processor) -> str:
    """Return the JSON of everything between a conversation and the model's input."""
    return json.dumps(
        {
            "transform": asdict(processor.transform),
            "transform_hash": processor.transform.transform_hash(),
            "template": asdict(cast(Any, processor.template)),
            "tokens_per_image": processor.tokens_per_image,
            **_question_fields(processor),
            **_view_fields(processor),
        },
        ensure_ascii=False,
        indent=1,
    )


def _question_fields(processor: Processor) -> dict[str, int]:
    """Return how much of a question the connector reads; {} where it reads none."""
    length = processor.question_length
    return {"question_length": length} if length else {}


def _view_fields(processor: Processor) -> dict[str, Any]:
    """Return how images become views; {} where each is one."""
    settings = processor.view_settings
    return {"views": asdict(settings), "token_grid": processor.token_grid} if settings else {}


def read_position(folder: Path) -> RunPosition:
    """Return the position of the checkpoint in `folder`."""
    file = folder / "position.json"
    fields = read_json(file)
    is_valid = all(type(fields.get(key)) is kind for key, kind in _POSITION_TYPES.items())
    if not is_valid or not fields.keys() <= {*_POSITION_TYPES, "loss", "seen", "seconds"}:
        raise UserError(
            f"{file}: is not the position of a checkpoint ({', '.join(_POSITION_TYPES)})"
        )
    return RunPosition(**fields)


def read_preprocessing(folder: Path) -> tuple[int, str]:
    """Return the image size of a checkpoint in pixels, and the hash of its image transform."""
    file = folder / "preprocess.json"
    fields = read_json(file)
    transform = fields.get("transform")
    crop = transform.get("crop") if isinstance(transform, dict) else None
    if not isinstance(crop, int) or not isinstance(fields.get("transform_hash"), str):
        raise UserError(f"{file}: is not the preprocessing of a checkpoint")
    return crop, fields["transform_hash"]


def list_positions(folder: Path) -> list[RunPosition]:
    """Return the positions of all complete checkpoints in `folder`, oldest first."""
    positions = [
        read_position(path)
        for path in folder.glob("*-*-*")
        if CHECKPOINT_NAME.fullmatch(path.name) and (path / "position.json").is_file()
    ]
    return sorted(positions, key=lambda position: (position.stage, position.step))


def is_run_or_checkpoint(path: Path) -> bool:
    """Tell whether `path` is a checkpoint or a run folder, also one whose checkpoints are gone."""
    if (path / "position.json").is_file() or (path / "checkpoints").is_dir():
        return True
    return (path / "versions.json").is_file() and (path / "recipe.yaml").is_file()


def find_checkpoint(path: Path) -> Path:
    """Return the checkpoint that `path` means: itself, or the newest one of a run folder."""
    if (path / "position.json").is_file():
        return path
    positions = list_positions(path / "checkpoints")
    if not positions:
        raise UserError(
            f"{path} is a run without a checkpoint: its training has just begun, was stopped "
            f"before it wrote the first one, or {path / 'checkpoints'} was emptied since"
        )
    return path / "checkpoints" / positions[-1].folder_name


def read_optimizer_state(path: Path) -> Mapping[str, Tensor]:
    """Return the optimizer state of a checkpoint; a tensor is read when it is used."""
    folder = path / OPTIMIZER_FOLDER
    try:
        return LazyTensors(weight_files(folder))
    except UserError as error:
        reason = "is torn" if any(folder.glob("*.safetensors")) else "is missing"
        raise UserError(
            f"{folder} {reason}, so the run cannot go on as if it had not stopped; begin a new one "
            f"with {shlex.quote(f'init={path}')}, or remove {path} to go on from the one before it"
        ) from error
