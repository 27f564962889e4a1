"""Checkpoints: folders that stand alone, written whole or not at all.

checkpoints/2-chat-000300/
    model.safetensors     every part that was trained so far, keys `vision.`, `connector.`, ...
    optimizer/            the optimizer of the open stage, by the names of parameters
    position.json         stage, step, held-out loss
    recipe.yaml preprocess.json tokenizer.model tokenizer_config.json
    language/             config of the language model, if its weights are in model.safetensors
    vision/               config of the vision encoder, in open_clip's format
    weights.json          what each part began as: its source, and a checksum of its weights
    adapters/PART/        LoRA adapters in peft's layout, if a part has them
    release/              the small files of the released model that the run began with, if any

More than 5 GB of tensors are several files and an index, as in transformers; where several
processes train, each writes some of them. A checkpoint does not tell how many there were.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path

from safetensors import SafetensorError
from torch import Tensor
from torch.optim import Optimizer

from vlbench import ranks
from vlbench.files import read_json
from vlbench.mistakes import Mistake
from vlbench.model import lora
from vlbench.model.compose import LANGUAGE, VISION
from vlbench.model.held import HELD
from vlbench.model.vlm import VLM
from vlbench.model.weights.origin import write_origins
from vlbench.model.weights.release import write_files
from vlbench.model.weights.shards import Lazy, begin, weight_files
from vlbench.train.moments import moments

RELEASE = "release"
ADAPTERS = "adapters"
OPTIMIZER = "optimizer"
NAME = re.compile(r"(\d+)-([A-Za-z0-9_]+)-(\d{6,})")
_KINDS = {"stage": int, "name": str, "step": int}


@dataclass(frozen=True)
class Position:
    """Where a run stands: `step` optimizer steps of stage number `stage` are done."""

    stage: int
    name: str
    step: int
    loss: float | None = None
    """Held-out loss per supervised token, if it was measured at this step."""
    seen: dict[str, int] | None = None
    """Samples, images and tokens (places included) that the run has learned from by then."""
    seconds: float | None = field(default=None, compare=False)
    """What the run has taken by then, the time in which it was stopped left out."""

    @property
    def folder(self) -> str:
        """Name of the checkpoint's folder; names sort in the order of training."""
        return f"{self.stage}-{self.name}-{self.step:06d}"


def weights_of(vlm: VLM, parts: list[str]) -> Iterator[tuple[str, Tensor]]:
    """Give the state of `parts`, keys prefixed with the part's name.

    Weights that a stage holds in 16 bits are written as the float32 that they are between stages.
    """
    for part in parts:
        for key, value in lora.base_state(getattr(vlm, part)).items():
            yield f"{part}.{key}", value.float() if value.dtype is HELD else value


class Writing:
    """A checkpoint on its way to the disk: training goes on while files are written.

    Where several processes train, all of them begin and end it together.
    """

    def __init__(
        self,
        folder: Path,
        position: Position,
        vlm: VLM,
        parts: list[str],
        optimizer: Optimizer | None,
        recipe_file: Path,
    ) -> None:
        """Copy what is to be written, and begin; nothing is kept of it before `end`."""
        self.final = folder / position.folder
        self.path = folder / f".writing-{position.folder}"
        self._pool = ThreadPoolExecutor(1)
        self._tasks: list[Future[None]] = []
        with self._explained():
            ranks.first(lambda: _make(self.path, optimizer is not None))
            self._ends = [begin(weights_of(vlm, parts), self.path, self._submit, copy=True)]
            if optimizer is not None:
                kept = moments(vlm, optimizer)
                self._ends.append(begin(kept, self.path / OPTIMIZER, self._submit, copy=True))
            describe(vlm, self.path, recipe_file.read_text(encoding="utf-8"), position)

    def _submit(self, call: Callable[[], None]) -> Future[None]:
        self._tasks.append(self._pool.submit(call))
        return self._tasks[-1]

    @property
    def done(self) -> bool:
        """True when this process has written its share."""
        return all(task.done() for task in self._tasks)

    def end(self) -> Path:
        """Wait for the files of all processes, name the checkpoint, and return its path."""
        with self._explained():
            for end in self._ends:
                end()
            ranks.first(lambda: _rename(self.path, self.final))
        self._pool.shutdown()
        return self.final

    @contextlib.contextmanager
    def _explained(self) -> Iterator[None]:
        """Leave nothing behind of a checkpoint that cannot be written, and say why."""
        try:
            yield
        except (OSError, SafetensorError) as error:
            self._pool.shutdown()
            shutil.rmtree(self.path, ignore_errors=True)
            if isinstance(error, OSError):
                raise out_of_space(error, self.path.parent) from error
            text = f"could not write a checkpoint in {self.path.parent}: {error}"
            raise Mistake(text) from error


def _make(writing: Path, optimizer: bool) -> None:
    """Make the folders of a checkpoint that begins."""
    shutil.rmtree(writing, ignore_errors=True)
    writing.mkdir(parents=True)
    if optimizer:
        (writing / OPTIMIZER).mkdir()


def _rename(writing: Path, final: Path) -> None:
    """Give a checkpoint that is whole its name."""
    for path in writing.rglob("*"):
        _flush(path)
    shutil.rmtree(final, ignore_errors=True)
    writing.rename(final)
    _flush(final.parent)


def describe(vlm: VLM, folder: Path, recipe: str, position: Position) -> None:
    """Write everything about a model but its weights, so that a checkpoint stands alone."""
    for part, module in vlm.parts():
        lora.save(module, folder / ADAPTERS / part)
    if not ranks.is_first():
        return
    (folder / "preprocess.json").write_text(preprocessing(vlm), encoding="utf-8")
    (folder / "recipe.yaml").write_text(recipe, encoding="utf-8")
    vlm.tokenizer.save(folder)
    write_files(vlm.release, folder / RELEASE)
    write_origins(vlm.origins, folder)
    if vlm.vision.config is not None:
        (folder / VISION).mkdir()
        vlm.vision.config.save(folder / VISION)
    config = vlm.language.config.to_dict()
    ends = {"eos_token_id": vlm.language.generation_config.eos_token_id}
    (folder / LANGUAGE).mkdir()
    (folder / LANGUAGE / "config.json").write_text(json.dumps(config, indent=1), encoding="utf-8")
    (folder / LANGUAGE / "generation_config.json").write_text(json.dumps(ends), encoding="utf-8")
    (folder / "position.json").write_text(json.dumps(asdict(position)), encoding="utf-8")


def out_of_space(error: OSError, folder: Path) -> Exception:
    """Return a clear mistake for a full disk or an unwritable folder, else the error itself."""
    if error.errno == errno.ENOSPC:
        return Mistake(f"the disk is full: cannot write in {folder}; earlier checkpoints are whole")
    if error.errno in (errno.EACCES, errno.EROFS, errno.EPERM):
        return Mistake(f"{folder} cannot be written ({error.strerror})")
    return error


def preprocessing(vlm: VLM) -> str:
    """Return the JSON of everything between a conversation and the model's input."""
    return json.dumps(
        {
            "transform": asdict(vlm.transform),
            "transform_hash": vlm.transform.hash(),
            "template": asdict(vlm.template),
            "tokens_per_image": vlm.connector.tokens_per_image,
        },
        ensure_ascii=False,
        indent=1,
    )


def _flush(path: Path) -> None:
    """Make the operating system write `path` out, so that a power cut cannot tear it."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def position(folder: Path) -> Position:
    """Return where the checkpoint in `folder` stands."""
    file = folder / "position.json"
    said = read_json(file)
    whole = all(type(said.get(key)) is kind for key, kind in _KINDS.items())
    if not whole or not said.keys() <= {*_KINDS, "loss", "seen", "seconds"}:
        raise Mistake(f"{file}: is not the position of a checkpoint ({', '.join(_KINDS)})")
    return Position(**said)


def preprocessed(folder: Path) -> tuple[int, str]:
    """Return the image size of a checkpoint in pixels, and the hash of its image transform."""
    file = folder / "preprocess.json"
    said = read_json(file)
    crop = transform.get("crop") if isinstance(transform := said.get("transform"), dict) else None
    if not isinstance(crop, int) or not isinstance(said.get("transform_hash"), str):
        raise Mistake(f"{file}: is not the preprocessing of a checkpoint")
    return crop, said["transform_hash"]


def positions(folder: Path) -> list[Position]:
    """Return the positions of all whole checkpoints in `folder`, oldest first."""
    found = []
    for path in folder.glob("*-*-*"):
        if NAME.fullmatch(path.name) and (path / "position.json").is_file():
            found.append(position(path))
    return sorted(found, key=lambda p: (p.stage, p.step))


def holds(path: Path) -> bool:
    """Tell whether `path` is a checkpoint or a folder with checkpoints."""
    return (path / "position.json").is_file() or (path / "checkpoints").is_dir()


def find(path: Path) -> Path:
    """Return the checkpoint that `path` means: itself, or the newest one of a run folder."""
    if (path / "position.json").is_file():
        return path
    found = positions(path / "checkpoints")
    if not found:
        raise Mistake(f"{path} is neither a run folder with checkpoints nor a checkpoint")
    return path / "checkpoints" / found[-1].folder


def load_optimizer(path: Path) -> Mapping[str, Tensor]:
    """Return the optimizer state of a checkpoint, read when it is asked for."""
    folder = path / OPTIMIZER
    try:
        return Lazy(weight_files(folder))
    except Mistake as error:
        reason = "is torn" if any(folder.glob("*.safetensors")) else "is missing"
        raise Mistake(
            f"{folder} {reason}, so the run cannot go on as if it had not stopped; begin a new one "
            f"with init={path}, or remove {path} to go on from the checkpoint before it"
        ) from error


def prune(folder: Path, keep_last: int) -> None:
    """Remove checkpoints beyond the last `keep_last`, but keep the best of the newest stage.

    The newest checkpoint of a stage that is over stays, without its optimizer.
    """
    found = positions(folder)
    newest = {p.stage: p for p in found}
    keep = {p.folder for p in found[-keep_last:]} | {p.folder for p in newest.values()}
    judged = [p for p in found if p.loss is not None and p.stage == found[-1].stage]
    if judged:
        keep.add(min(judged, key=lambda p: p.loss or 0.0).folder)
    for position in found:
        path = folder / position.folder
        if position.folder not in keep:
            shutil.rmtree(path)
        elif position.stage < found[-1].stage and (path / OPTIMIZER).exists():
            shutil.rmtree(path / OPTIMIZER)
