"""The recipe: every key with its type, default, range and meaning, as pydantic models.

One model for each mapping of the YAML file. `config/recipe.py` fills them from files and the
command line; a recipe is frozen, and `recipe.model_copy(update={...})` gives a changed one.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, replace
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import BeforeValidator, Field, model_validator

from vlbench.command_line.arguments import TemplateName
from vlbench.config.encoder_names import EMBEDDED_ENCODERS, is_hub_name
from vlbench.config.key_types import (
    MAX_COUNT,
    MAX_DEVICES,
    MAX_IMAGE_SIZE,
    BatchSize,
    BetaNumber,
    Count,
    EncoderName,
    OnBadSample,
    PartName,
    PathText,
    RecipeSection,
    RowTokens,
    SampleFormat,
    StageName,
    StageNames,
    drop_frozen_parts,
    key,
)
from vlbench.config.mixture_source import Mixture
from vlbench.strict_values import yaml_text


class PretrainedPartConfig(RecipeSection):
    """A part with weights, embedded in this package or from elsewhere."""

    part: ClassVar[str]
    embedded_names: ClassVar[Collection[str]]
    """The names that have embedded weights."""
    name: str
    weights: str

    @model_validator(mode="after")
    def _check_embedded_weights(self) -> Self:
        if self.weights == "embedded" and self.name not in self.embedded_names:
            known = " and ".join(f"{self.part}.name={name}" for name in self.embedded_names)
            raise ValueError(
                f"has weights 'embedded', which only {known} can have; say which weights "
                f"{self.part}.name={self.name} takes, or {self.part}.weights=random"
            )
        return self

    def with_random_weights(self) -> Self:
        """Return it with random weights."""
        return self.model_copy(update={"weights": "random"})


class NamedEncoderConfig(PretrainedPartConfig):
    """A vision encoder, which may be OWNER/NAME on a hub and then has its own weights."""

    embedded_names = EMBEDDED_ENCODERS

    @model_validator(mode="before")
    @classmethod
    def _take_own_weights(cls, given: Any) -> Any:
        """Let OWNER/NAME on a hub have the weights that are there, unless others are given."""
        if isinstance(given, dict) and is_hub_name(str(given.get("name", ""))):
            own = given.get("weights", "embedded") == "embedded"
            return {**given, "weights": given["name"]} if own else given
        return given


class SecondEncoderConfig(NamedEncoderConfig):
    """A second vision encoder, which sees the same image; features are joined by channel."""

    part = "vision.second"

    name: EncoderName = key("as vision.name; features of both are joined by channel")
    weights: PathText = key("as vision.weights", "embedded")
    layer: int = key("as vision.layer", -2, ge=-100, le=99)
    norm: bool = key("as vision.norm", False)
    image_size: int | None = key(
        "side of its images in pixels; null: as many patches as the first",
        None,
        ge=8,
        le=MAX_IMAGE_SIZE,
    )


class VisionEncoderConfig(NamedEncoderConfig):
    """The vision encoder."""

    part = "vision"

    name: EncoderName = key(
        "ViT of open_clip, OWNER/NAME of timm's, tiny (see list), folder", "tiny"
    )
    weights: PathText = key(
        "embedded (tiny, tiny_eva), random, a tag, file or folder; OWNER/NAME: its own", "embedded"
    )
    layer: int = key("block whose output the connector gets; -1 is the last", -2, ge=-100, le=99)
    norm: bool = key("apply the encoder's final LayerNorm to its features", False)
    second: SecondEncoderConfig | None = key("a second vision encoder; null: none", None)

    def with_random_weights(self) -> Self:
        """Return it with random weights, those of the second too."""
        second = self.second and self.second.with_random_weights()
        return self.model_copy(update={"weights": "random", "second": second})


class LanguageModelConfig(PretrainedPartConfig):
    """The language model."""

    part, embedded_names = "language", ("tiny",)

    name: Literal["tiny", "yi-6b", "yi-34b"] = key("architecture, if not of `weights`", "tiny")
    weights: PathText = key("embedded (tiny only), random, a folder or hub id", "embedded")
    template: TemplateName = key("chat template; auto: the tokenizer's own", "yi_vl")
    max_length: int = key(
        "most tokens of a conversation, image positions included", 4096, ge=16, le=MAX_COUNT
    )


@dataclass(frozen=True)
class ModelConfig:
    """What a recipe says of its model."""

    vision: VisionEncoderConfig
    language: LanguageModelConfig
    connector: dict[str, Any]
    """Its name, or a file, and its options."""
    init: str | None
    """What it begins with: a run, a checkpoint, a released model, a file of weights."""
    seed: int
    """Of weights that are random at first."""
    draft_decoding: bool
    """Whether large JPEGs are decoded faster and less exactly."""
    apply_exif: bool
    """Whether photographs are turned as their EXIF orientation says."""

    @property
    def connector_name(self) -> str:
        """The connector's name, or a file."""
        return str(self.connector["name"])

    @property
    def connector_options(self) -> dict[str, Any]:
        """The connector's options."""
        return {key: value for key, value in self.connector.items() if key != "name"}

    def with_random_weights(self) -> ModelConfig:
        """Return it with random weights of vision encoder and language model."""
        vision, language = self.vision.with_random_weights(), self.language.with_random_weights()
        return replace(self, vision=vision, language=language)


class LoraAdapterConfig(RecipeSection):
    """A low-rank adapter (Hu et al. 2021, arXiv:2106.09685), trained instead of the weights."""

    rank: int = key("rank of the update of a weight matrix", 64, ge=1, le=65536)
    alpha: float | None = key("the update times alpha / rank; null: twice the rank", None, gt=0)
    dropout: float = key("dropout on adapter inputs; depends on packing", 0.0, ge=0, le=0.99)
    targets: str = key("all-linear, or names of Linear layers as q_proj,v_proj", "all-linear")
    rslora: bool = key("scale by alpha / sqrt(rank) instead", False)
    dora: bool = key("train the magnitude of weight columns apart (DoRA)", False)
    bits: Literal[4] | None = key("4: frozen weights in 4 bits (QLoRA; GPU, language)", None)


class PartTrainConfig(RecipeSection):
    """How one part is trained in one stage; a part that is not named, or null, is frozen."""

    lr: float = key("peak learning rate", gt=0, le=10)
    weight_decay: float | None = key("weight decay of this part; null: the stage's", None, ge=0)
    lora: LoraAdapterConfig | None = key("train an adapter instead; null: the weights", None)


TrainedParts = Annotated[dict[PartName, PartTrainConfig], BeforeValidator(drop_frozen_parts)]


class DataConfig(RecipeSection):
    """Training and held-out data."""

    train: PathText | None = key(
        "scenes; JSON, JSONL, CSV, Parquet; NAME:FOLDER; a hub id; shards", None
    )
    images: PathText | None = key("folder of images; null: beside the file", None)
    allow_outside: bool = key("read images that lie outside of the folder `images`", False)
    mix: Mixture | None = key("sources, or a YAML file that lists them; instead of train", None)
    val: PathText | None = key("held-out samples, as data.train takes them", None)
    on_bad_sample: OnBadSample = key("leave out and count, or stop; auto: stop above 1 %", "auto")
    workers: int = key("processes that load images, beside one for texts; 0: none", 4, ge=0, le=256)
    decode: Literal["exact", "draft"] = key(
        "large JPEGs: decoded as the reference does, or faster and less exactly", "exact"
    )
    exif: Literal["ignore", "apply"] = key(
        "EXIF orientation of photographs: ignored, as the reference does, or applied", "ignore"
    )
    samples: Count = key("scenes: images in an epoch", 10000)
    questions: Count = key("scenes: questions per image, in one conversation", 3)


class StageConfig(RecipeSection):
    """One stage of training."""

    image_size: int = key("side of the images in pixels", ge=8, le=MAX_IMAGE_SIZE)
    sample_format: SampleFormat = key("plain captions of images, or conversations")
    objective: str = key("language, or an objective that the connector offers", "language")
    train: TrainedParts = key("which parts are trained, and how")
    global_batch_size: BatchSize = key("samples in an optimizer step, over all devices")
    max_tokens_per_row: RowTokens = key(
        "most tokens in a packed row; auto: up to 16384 by GPU memory, else 4096", "auto"
    )
    epochs: float | None = key("passes over the data", None, ge=0, le=MAX_COUNT)
    steps: int | None = key("optimizer steps, instead of epochs", None, ge=0, le=MAX_COUNT)
    warmup_ratio: float = key("share of steps in which the rate rises", 0.03, ge=0, le=1)
    schedule: Literal["cosine", "constant"] = key("learning rate after the warm-up", "cosine")
    grad_clip: float | None = key("largest norm of the gradient; null: no clipping", 1.0, gt=0)
    weight_decay: float = key("AdamW's weight decay", 0.0, ge=0)
    adam_betas: tuple[BetaNumber, BetaNumber] = key("AdamW's betas", (0.9, 0.999))
    data: DataConfig | None = key("keys of data that differ in this stage", None)

    @property
    def trained_parts(self) -> dict[str, PartTrainConfig]:
        """The parts that are trained, and how."""
        return {str(part): settings for part, settings in self.train.items()}

    @model_validator(mode="after")
    def _check_budget_and_adapters(self) -> Self:
        if self.epochs is None and self.steps is None:
            raise ValueError("needs epochs or steps")
        adapters = {part: how.lora for part, how in self.train.items() if how.lora is not None}
        if "connector" in adapters:
            raise ValueError("has train.connector.lora; a connector is trained whole")
        for part in adapters.keys() - {"language"}:
            if adapters[part].bits:
                raise ValueError(f"has train.{part}.lora.bits=4; only train.language takes it")
        return self


@dataclass(frozen=True)
class StageData:
    """What a recipe says of the data of a stage: its own or the common `config`, and `seed`."""

    stage_name: str
    stage: StageConfig
    config: DataConfig
    seed: int


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
    feature_cache: PathText | None = key("folder of features of frozen encoders", None)
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

    @model_validator(mode="after")
    def _check_sharding(self) -> Self:
        for name in ("shard_within_node", "reduce_gradients"):
            value = getattr(self, name)
            if self.strategy != "fsdp2" and value not in (False, "auto"):
                setting = f"{name}={yaml_text(value)} and strategy={self.strategy}"
                raise ValueError(f"has {setting}; that needs strategy=fsdp2")
        if self.shard_within_node and self.devices == 1:
            raise ValueError(
                "has shard_within_node=true and devices=1: a machine with one process has nobody "
                "to share a model with; allowed from devices=2 on"
            )
        return self


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

    def stage_data(self, name: str) -> StageData:
        """Return what is said of the data of a stage."""
        stage = self.stages[name]
        return StageData(name, stage, stage.data or self.data, self.seed)

    @model_validator(mode="after")
    def _check_second_encoder(self) -> Self:
        for name, stage in self.stages.items():
            if "second_vision" in stage.train and self.vision.second is None:
                raise ValueError(
                    f"has stages.{name}.train.second_vision and no second vision encoder: give "
                    "vision.second.name"
                )
        return self

    @model_validator(mode="after")
    def _check_decoding(self) -> Self:
        for name, stage in self.stages.items():
            for option in ("decode", "exif"):
                of_run, of_stage = getattr(self.data, option), getattr(stage.data, option, None)
                if of_stage not in (None, of_run):
                    raise ValueError(
                        f"has stages.{name}.data.{option}={of_stage} and data.{option}={of_run}: "
                        "a run decodes images in one way, in training and after it; give "
                        f"data.{option}"
                    )
        return self
