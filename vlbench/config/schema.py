"""The recipe: every key with its type, default, range and meaning, as pydantic models.

One model for each mapping of the YAML file. `config/recipe.py` fills them from files and the
command line; a recipe is frozen, and `recipe.model_copy(update={...})` gives a changed one.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Sequence
from typing import Annotated, Any, Literal, NamedTuple, Self, get_args, get_origin

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    Field,
    ValidationInfo,
    model_validator,
)
from pydantic.fields import FieldInfo

from vlbench.command_line.arguments import TemplateName
from vlbench.config.encoder_names import EMBEDDED_ENCODERS, check_encoder_name
from vlbench.errors import suggest_name
from vlbench.strict_values import (
    StrictModel,
    convert_value,
    is_null,
    kind_label,
    split_union,
    yaml_text,
)

PartName = Literal["vision", "connector", "language"]
CheckpointingMode = Literal["none", "selective", "full", "auto"]
SampleFormat = Literal["caption", "chat"]
OnBadSample = Literal["auto", "quarantine", "stop"]
PART_NAMES: tuple[str, ...] = get_args(PartName)
EXCLUSIVE_KEYS = (("epochs", "steps"), ("train", "mix"), ("only", "from"))
"""Pairs of keys of one mapping of which one at most has a value."""
MAX_IMAGE_SIZE = 4096  # pixels of a vision encoder's side; those in use have 224 to 1024
MAX_COUNT = 1_000_000_000
"""Largest number of steps, samples, tokens: three orders above what anybody trains with."""
MAX_BATCH_SIZE = 1_000_000
"""CLIP models are trained with up to 164,000."""
MAX_ROW_TOKENS = 1 << 20
"""Eight times the usual longest contexts; `plan` takes half a minute for such a row."""
MAX_DEVICES = 100_000
STAGE_NAME_PATTERN = re.compile(r"[A-Za-z][A-Za-z0-9_]*")


def check_stage_name(name: str, info: ValidationInfo) -> str:
    """Return the name of a stage that the recipe has; a recipe's file may have any."""
    names = (info.context or {}).get("stage_names") or [name]
    if name not in names:
        close = suggest_name(name, names)
        raise ValueError(f"must be a stage, {', '.join(names)}, given '{name}'.{close}")
    if not STAGE_NAME_PATTERN.fullmatch(name):
        raise ValueError(f"must be letters, digits and _, given '{name}'")
    return name


def drop_frozen_parts(parts: Any) -> Any:
    """Return the parts of `train` without those that are null: they are frozen."""
    return {p: v for p, v in parts.items() if not is_null(v)} if isinstance(parts, dict) else parts


def check_embedded_weights(
    part: str, name: str, weights: str, embedded_names: Iterable[str]
) -> None:
    """Raise a ValueError for embedded weights of an encoder or model that has none."""
    if weights == "embedded" and name not in embedded_names:
        known = " and ".join(f"{part}.name={embedded}" for embedded in embedded_names)
        raise ValueError(
            f"has weights 'embedded', which only {known} can have; say which weights "
            f"{part}.name={name} takes, or {part}.weights=random"
        )


def check_row_tokens(value: Any) -> Any:
    """Return `auto` or a number of tokens within limits."""
    if value == "auto":
        return str(value)
    try:
        return convert_value(value, Annotated[int, Field(ge=16, le=MAX_ROW_TOKENS)])
    except ValueError as error:
        raise ValueError(f"{error}; auto is allowed, too") from None


RowTokens = Annotated[int | Literal["auto"], BeforeValidator(check_row_tokens)]
PathText = Annotated[str, AfterValidator(os.path.expanduser)]
"""Text that may be a path, in which a leading `~` is the home folder."""
StageName = Annotated[str, AfterValidator(check_stage_name)]
StageNames = Annotated[tuple[StageName, ...], Field(min_length=1)]
EncoderName = Annotated[PathText, AfterValidator(check_encoder_name)]
BetaNumber = Annotated[float, Field(ge=0, le=0.999999)]


def key(meaning: str, default: Any = ..., **limits: Any) -> Any:
    """Declare a key: its meaning, its default (none: it must be given) and pydantic's limits."""
    return Field(default, description=meaning, **limits)


def section_key(meaning: str, section: type[BaseModel]) -> Any:
    """Declare a mapping of keys; a default is made when a recipe is, so that help needs none."""
    return Field(default_factory=section, description=meaning)


class RecipeSection(StrictModel):
    """A mapping of a recipe, in which only one of two exclusive keys has a value."""

    @model_validator(mode="after")
    def _check_exclusive_keys(self) -> Self:
        given = {name.rstrip("_") for name, value in self if value is not None}
        for pair in EXCLUSIVE_KEYS:
            if given.issuperset(pair):
                raise ValueError(f"takes {pair[0]} or {pair[1]}, not both")
        return self


class VisionEncoderConfig(RecipeSection):
    """The vision encoder."""

    name: EncoderName = key("ViT or EVA of open_clip, tiny, tiny_eva (see list), folder", "tiny")
    weights: PathText = key("embedded (tiny, tiny_eva), random, a tag, file or folder", "embedded")
    layer: int = key("block whose output the connector gets; -1 is the last", -2, ge=-100, le=99)
    norm: bool = key("apply the encoder's final LayerNorm to its features", False)

    @model_validator(mode="after")
    def _check_weights(self) -> Self:
        check_embedded_weights("vision", self.name, self.weights, EMBEDDED_ENCODERS)
        return self


class LanguageModelConfig(RecipeSection):
    """The language model."""

    name: Literal["tiny", "yi-6b", "yi-34b"] = key("architecture, if not of `weights`", "tiny")
    weights: PathText = key("embedded (tiny only), random, a Llama folder or hub id", "embedded")
    template: TemplateName = key("chat template", "yi_vl")
    max_length: int = key(
        "most tokens of a conversation, image positions included", 4096, ge=16, le=MAX_COUNT
    )

    @model_validator(mode="after")
    def _check_weights(self) -> Self:
        check_embedded_weights("language", self.name, self.weights, ["tiny"])
        return self


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


class MixtureSource(RecipeSection):
    """One source of a mixture."""

    train: PathText = key("scenes, or a file in LLaVA's format")
    images: PathText | None = key("folder of its images; null: beside the file", None)
    weight: float = key("how often an epoch takes each sample", 1.0, gt=0)


Mixture = Annotated[tuple[MixtureSource, ...], Field(min_length=1)]


class DataConfig(RecipeSection):
    """Training and held-out data."""

    train: PathText | None = key("scenes, a file in LLaVA's format, or shards", None)
    images: PathText | None = key("folder of images; null: beside the file", None)
    allow_outside: bool = key("read images that lie outside of the folder `images`", False)
    mix: Mixture | None = key("several weighted sources, instead of train", None)
    val: PathText | None = key("held-out samples: a file in LLaVA's format, or shards", None)
    on_bad_sample: OnBadSample = key("leave out and count, or stop; auto: stop above 1 %", "auto")
    workers: int = key("processes that load images, beside one for texts; 0: none", 4, ge=0, le=256)
    decode: Literal["exact", "draft"] = key(
        "large JPEGs: decoded as the reference does, or faster and less exactly", "exact"
    )
    samples: int = key("scenes: images in an epoch", 10000, ge=1, le=MAX_COUNT)
    questions: int = key("scenes: questions per image, in one conversation", 3, ge=1, le=MAX_COUNT)


class StageConfig(RecipeSection):
    """One stage of training."""

    image_size: int = key("side of the images in pixels", ge=8, le=MAX_IMAGE_SIZE)
    sample_format: SampleFormat = key("plain captions of images, or conversations")
    objective: str = key("language, or an objective that the connector offers", "language")
    train: TrainedParts = key("which parts are trained, and how")
    global_batch_size: int = key(
        "samples in an optimizer step, over all devices", ge=1, le=MAX_BATCH_SIZE
    )
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
        for part, settings in self.train.items():
            if settings.lora is not None and part == "connector":
                raise ValueError("has train.connector.lora; a connector is trained whole")
            if settings.lora is not None and settings.lora.bits and part != "language":
                raise ValueError(
                    f"has train.{part}.lora.bits=4, allowed for the language model only"
                )
        return self


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
    keep_last_checkpoints: int = key(
        "checkpoints that are kept, beside the best", 2, ge=1, le=MAX_COUNT
    )
    feature_cache: PathText | None = key("folder of features of frozen encoders", None)
    max_nonfinite_steps: int = key(
        "stop after this many NaN or infinite losses in a row", 5, ge=1, le=MAX_COUNT
    )
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
        given = {"shard_within_node=true": self.shard_within_node}
        given[f"reduce_gradients={self.reduce_gradients}"] = self.reduce_gradients != "auto"
        for setting in (name for name, is_given in given.items() if is_given):
            if self.strategy != "fsdp2":
                raise ValueError(
                    f"has {setting} and strategy={self.strategy}; that needs strategy=fsdp2"
                )
        if self.shard_within_node and self.devices == 1:
            raise ValueError(
                "has shard_within_node=true and devices=1: a machine with one process has nobody "
                "to share a model with; allowed from devices=2 on"
            )
        return self


class LoggingConfig(RecipeSection):
    """Logs and evaluations during training."""

    every_n_steps: int = key("steps between lines of the log", 10, ge=1, le=MAX_COUNT)
    evaluate_every: int = key("steps between held-out evaluations", 200, ge=1, le=MAX_COUNT)
    tensorboard: bool = key("write TensorBoard logs", True)
    wandb: str | None = key("project of Weights & Biases to log to", None)
    questions: int | None = key(
        "questions of a set asked at the end; null: all", None, ge=1, le=MAX_COUNT
    )
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
    activation_checkpointing: CheckpointingMode = key(
        "recompute nothing, what is cheap, or all; auto: what memory asks for", "none"
    )
    dry_run: bool = key("one step of every stage, longest batch first, then stop", False)
    trust_connector: bool = key("run connector code of another's init= or run=; to be typed", False)
    profile: bool = key("write a profiler trace of some steps into the run", False)
    vision: VisionEncoderConfig = section_key("the vision encoder", VisionEncoderConfig)
    language: LanguageModelConfig = section_key("the language model", LanguageModelConfig)
    connector: dict[str, Any] = key("name, and the options of that connector (see list)")
    data: DataConfig = section_key("training and held-out data", DataConfig)
    stages: dict[StageName, StageConfig] = key("the stages of training, in order")
    trainer: TrainerConfig = section_key("devices and checkpoints", TrainerConfig)
    log: LoggingConfig = section_key("logs and evaluations", LoggingConfig)

    @model_validator(mode="after")
    def _check_decoding(self) -> Self:
        for name, stage in self.stages.items():
            if stage.data and stage.data.decode != self.data.decode:
                raise ValueError(
                    f"has stages.{name}.data.decode={stage.data.decode} and data.decode="
                    f"{self.data.decode}: a run decodes images in one way, in training and "
                    "after it; give data.decode"
                )
        return self


class KeyRow(NamedTuple):
    """One line of the table of keys."""

    name: str
    type: str
    default: str
    help: str


def declared_keys(section: type[BaseModel]) -> dict[str, FieldInfo]:
    """Return the keys of a mapping as they are spelled in YAML."""
    return {field.alias or name: field for name, field in section.model_fields.items()}


def section_at(path: Sequence[int | str]) -> type[BaseModel]:
    """Return the model of the mapping at a path of keys and list indices."""
    kind: Any = Recipe
    for part in path:
        if is_section(kind):
            kind = declared_keys(kind)[str(part)].annotation
        else:  # the type of the items of a list or of a mapping with names of its own
            kind = get_args(kind)[get_origin(kind) is dict]
        kind = split_union(kind)[0]
    assert is_section(kind)
    return kind  # type: ignore[no-any-return]


def is_section(kind: Any) -> bool:
    """Tell whether a declared type is a mapping with keys of its own."""
    return isinstance(kind, type) and issubclass(kind, BaseModel)


def key_rows(section: type[BaseModel] = Recipe, prefix: str = "") -> list[KeyRow]:
    """Return the table of all keys in the order of this file, connector options left out."""
    table: list[KeyRow] = []
    for name, field in declared_keys(section).items():
        kind, path, meaning = split_union(field.annotation)[0], prefix + name, field.description
        if path == "connector":
            table.append(KeyRow("connector.name", "str", "", "name of a connector (see list)"))
            table.append(KeyRow("connector.OPTION", "", "", "option of that connector (see list)"))
        elif prefix and name == "data":
            table.append(KeyRow(f"{path}.KEY", "", "null", str(meaning)))
        elif is_section(kind):
            table += key_rows(kind, f"{path}.")
        elif get_origin(kind) is dict:
            holder = "PART" if get_args(kind)[0] is PartName else "NAME"
            table += key_rows(get_args(kind)[1], f"{path}.{holder}.")
        else:
            default = "(needed)" if field.is_required() else yaml_text(field.default)
            table.append(KeyRow(path, kind_label(field.annotation), default, str(meaning)))
    return table
