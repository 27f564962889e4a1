"""The recipe: every key with its type, default, range and meaning, as pydantic models.

`model_schema` has those of the model's parts, `stage_schema` those of stages, `data_schema` those
of their data. A recipe is frozen; `recipe.model_copy(update={...})` gives a changed one.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, ValidationInfo

from vlbench.config.data_schema import DataConfig
from vlbench.config.key_types import Count, PathText, RecipeSection, key
from vlbench.config.model_schema import LanguageModelConfig, ModelConfig, VisionEncoderConfig
from vlbench.config.stage_schema import StageConfig, StageData
from vlbench.errors import suggest_name
from vlbench.strict_values import yaml_text

MAX_DEVICES = 100_000


def check_stage_name(name: str, info: ValidationInfo) -> str:
    """Return the name of a stage that the recipe has; a recipe's file may have any."""
    names = (info.context or {}).get("stage_names") or [name]
    if name not in names:
        close = suggest_name(name, names)
        raise ValueError(f"must be a stage, {', '.join(names)}, given '{name}'.{close}")
    if not re.fullmatch("[A-Za-z][A-Za-z0-9_]*", name):
        raise ValueError(f"must be letters, digits and _, given '{name}'")
    return name


StageName = Annotated[str, AfterValidator(check_stage_name)]
StageNames = Annotated[tuple[StageName, ...], Field(min_length=1)]


class TrainerConfig(RecipeSection):
    """Devices, processes and checkpoints; a run may be resumed with other values."""

    accelerator: Literal["auto", "cpu", "gpu", "mps"] = key("kind of device", "auto")
    strategy: Literal["auto", "ddp", "fsdp2"] = key(
        "several processes: ddp (replicas), fsdp2 (shards); auto: ddp", "auto"
    )
    devices: int = key("processes on each machine, a GPU each", 1, ge=1, le=MAX_DEVICES)
    num_nodes: int = key("machines", 1, ge=1, le=MAX_DEVICES)
    shard_within_node: bool = key("fsdp2: shards in a machine, replicas between machines", False)
    reduce_gradients: Literal["auto", "step", "micro_batch"] = key(
        "fsdp2: once a step, whole until then, or every micro-batch; auto: by memory", "auto"
    )
    compile: Literal["auto", True, False] = key(
        "compile decoder layers and encoder blocks; auto: on a GPU, if the run is long", "auto"
    )
    checkpoint_every: float = key("seconds; more where saving takes over 5 %", 60.0, gt=0)
    keep_last_checkpoints: Count = key("checkpoints that are kept, beside the best", 2)
    feature_cache: PathText | None = key("folder of features of frozen encoders; not fsdp2", None)
    max_nonfinite_steps: Count = key("stop after this many NaN or infinite losses in a row", 5)
    callbacks: tuple[str, ...] = key("Lightning callbacks, as [my_callbacks.Printer]", ())

    @property
    def world_size(self) -> int:
        """How many processes train one model."""
        return self.devices * self.num_nodes

    @property
    def shard_count(self) -> int:
        """Over how many processes fsdp2 shards a model."""
        return self.devices if self.shard_within_node else self.world_size

    def find_conflicts(self) -> Iterator[str]:
        """Yield what is wrong with how gradients and shards are shared."""
        for name in ("shard_within_node", "reduce_gradients"):
            value = getattr(self, name)
            if self.strategy != "fsdp2" and value not in (False, "auto"):
                setting = f"{name}={yaml_text(value)} and strategy={self.strategy}"
                yield f"has {setting}; that needs strategy=fsdp2"
        if self.shard_within_node and self.devices == 1:
            yield (
                "has shard_within_node=true and devices=1: a machine with one process has nobody "
                "to share a model with; allowed from devices=2 on"
            )


class LoggingConfig(RecipeSection):
    """Logs and evaluations during training."""

    every_n_steps: Count = key("steps between lines of the log", 10)
    evaluate_every: Count = key("steps between held-out evaluations", 200)
    tensorboard: bool = key("write TensorBoard logs", True)
    wandb: str | None = key("project of Weights & Biases to log to", None)
    questions: Count | None = key("questions of a set asked at the end; null: all", None)
    examples: int = key("images in examples.png", 12, ge=0, le=100)
    information_probes: bool = key("probe where information on scenes is lost", False)


class Recipe(RecipeSection):
    """A whole recipe, resolved: what a run does, and enough to repeat it."""

    recipe: str = key("name of a recipe (see list), or a YAML file")
    size: str = key("vision encoder and language model: tiny, 6b, 34b", "tiny")
    seed: int = key("seed of everything random", 0, ge=0, le=2**32 - 1)
    run: PathText | None = key("folder of the run; null: runs/RECIPE-SIZE-N", None)
    init: PathText | None = key("run, checkpoint or released model to begin with", None)
    only: StageNames | None = key("stages to run, as chat or [align_224,chat]", None)
    from_: StageName | None = key("stage to start from", None, alias="from")
    precision: Literal["32", "bf16"] = key("precision of the arithmetic", "32")
    activation_checkpointing: Literal["none", "selective", "full", "auto"] = key(
        "recompute nothing, what is cheap, or all; auto: what memory asks for", "none"
    )
    dry_run: bool = key("one step of every stage, longest batch first, then stop", False)
    trust_connector: bool = key("run connector code of another's init= or run=; to be typed", False)
    profile: bool = key("write a profiler trace of some steps into the run", False)
    vision: VisionEncoderConfig = Field(default_factory=VisionEncoderConfig)
    language: LanguageModelConfig = Field(default_factory=LanguageModelConfig)
    connector: dict[str, Any] = key("name, and the options of that connector (see list)")
    data: DataConfig = Field(default_factory=DataConfig)
    stages: dict[StageName, StageConfig] = key("the stages of training, in order")
    trainer: TrainerConfig = Field(default_factory=TrainerConfig)
    log: LoggingConfig = Field(default_factory=LoggingConfig)

    @property
    def model(self) -> ModelConfig:
        """What the model is built from."""
        return ModelConfig(
            vision=self.vision,
            language=self.language,
            connector=self.connector,
            init=self.init,
            seed=self.seed,
            draft_decoding=self.data.decode == "draft",
            apply_exif=self.data.exif == "apply",
        )

    @property
    def selected_stages(self) -> dict[str, StageConfig]:
        """The stages that `from` and `only` select, in order."""
        names = list(self.stages)
        later = names[names.index(self.from_) :] if self.from_ else names
        return {name: self.stages[name] for name in later if not self.only or name in self.only}

    @property
    def last_stage_data(self) -> StageData:
        """The data of the last stage, which the questions at the end are about."""
        return self.stage_data(list(self.stages)[-1])

    @property
    def selected_data(self) -> tuple[StageData, ...]:
        """The data of the stages that `from` and `only` select, in order."""
        return tuple(self.stage_data(name) for name in self.selected_stages)

    @property
    def data_by_key(self) -> dict[str, DataConfig]:
        """The common data, and those that stages have of their own, by their keys."""
        own = {f"stages.{name}.data": stage.data for name, stage in self.stages.items()}
        return {"data": self.data, **{key: data for key, data in own.items() if data}}

    def stage_data(self, name: str) -> StageData:
        """Return what is said of the data of a stage."""
        stage = self.stages[name]
        return StageData(name, stage, stage.data or self.data, self.seed)

    def find_conflicts(self) -> Iterator[str]:
        """Yield what is wrong between stages, their data and the model."""
        for name, stage in self.stages.items():
            if "second_vision" in stage.train and self.vision.second is None:
                yield (
                    f"has stages.{name}.train.second_vision and no second vision encoder: give "
                    "vision.second.name"
                )
            if self.vision.tiling is not None and stage.objective != "language":
                yield (
                    f"has vision.tiling and stages.{name}.objective={stage.objective}, which "
                    "compares captions with images of one view; give vision.tiling=null"
                )
            data = stage.data or self.data
            for option in ("decode", "exif"):
                own, common = getattr(data, option), getattr(self.data, option)
                if own != common:
                    yield (
                        f"has stages.{name}.data.{option}={own} and data.{option}={common}: a run "
                        f"decodes images in one way, in training and after it; give data.{option}"
                    )
