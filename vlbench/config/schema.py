"""The recipe: every key with its type, default, range and meaning.

A dataclass per mapping of the YAML file; a trailing underscore is dropped from a key that is a
Python keyword (`from_` is `from`). `config/recipe.py` fills these from files and the command line.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from functools import cache
from typing import Any, Literal, NamedTuple, get_args, get_origin, get_type_hints

from vlbench.config.convert import kind_label, split_union

PartName = Literal["vision", "connector", "language"]
PART_NAMES: tuple[str, ...] = get_args(PartName)


def recipe_key(
    help: str,
    default: Any = dataclasses.MISSING,
    *,
    low: float | None = None,
    above: float | None = None,
    high: float | None = None,
    is_path: bool = False,
) -> Any:
    """Declare a key: its meaning, default, and range (`low` <= or `above` < value <= `high`).

    In the value of a `path` a leading `~` is the home folder.
    """
    limits = {"help": help, "low": low, "above": above, "high": high, "path": is_path}
    if isinstance(default, type):
        return field(default_factory=default, metadata=limits)
    return field(default=default, metadata=limits)


@dataclass(frozen=True, kw_only=True)
class VisionEncoderConfig:
    """The vision tower."""

    name: str = recipe_key(
        "ViT or EVA of open_clip, tiny, tiny_eva (see list), or a folder", "tiny", is_path=True
    )
    weights: str = recipe_key(
        "embedded (tiny, tiny_eva), random, a tag, a file or a folder", "embedded", is_path=True
    )
    layer: int = recipe_key("block whose output is used; -1 is the last", -2, low=-100, high=99)
    norm: bool = recipe_key("apply the tower's final norm to the features", False)


@dataclass(frozen=True, kw_only=True)
class LanguageModelConfig:
    """The language model."""

    name: Literal["tiny", "yi-6b", "yi-34b"] = recipe_key(
        "architecture; weights of a folder bring their own", "tiny"
    )
    weights: str = recipe_key(
        "embedded (tiny only), random, a Llama folder or hub id", "embedded", is_path=True
    )
    template: Literal["yi_vl", "chatml", "llava_v1"] = recipe_key(
        "how turns are written as text", "yi_vl"
    )
    max_length: int = recipe_key(
        "longest conversation in tokens, image places included", 4096, low=16
    )


@dataclass(frozen=True, kw_only=True)
class LoraAdapterConfig:
    """A low-rank adapter (Hu et al. 2021, arXiv:2106.09685), trained instead of the weights."""

    rank: int = recipe_key("of the update of a weight", 64, low=1, high=65536)
    alpha: float | None = recipe_key(
        "the update counts alpha / rank; null: twice the rank", None, above=0
    )
    dropout: float = recipe_key(
        "of what goes into adapters; depends on packing", 0.0, low=0, high=0.99
    )
    targets: str = recipe_key(
        "all-linear, or names of Linear layers as q_proj,v_proj", "all-linear"
    )
    rslora: bool = recipe_key("scale by alpha / sqrt(rank) instead", False)
    dora: bool = recipe_key("train the length of a weight's columns apart (DoRA)", False)
    bits: int | None = recipe_key("4: keep the weights in 4 bits (QLoRA; GPU, language)", None)


@dataclass(frozen=True, kw_only=True)
class PartTrainConfig:
    """How one part is trained in one stage; a part that is not named, or null, is frozen."""

    lr: float = recipe_key("peak learning rate", above=0, high=10)
    weight_decay: float | None = recipe_key("of this part; null: the stage's", None, low=0)
    lora: LoraAdapterConfig | None = recipe_key("train an adapter instead; null: the weights", None)


@dataclass(frozen=True, kw_only=True)
class MixtureSource:
    """One source of a mixture."""

    train: str = recipe_key("scenes, or a file in LLaVA's format", is_path=True)
    images: str | None = recipe_key(
        "folder of its pictures; null: beside the file", None, is_path=True
    )
    weight: float = recipe_key("how often each sample is met in an epoch", 1.0, above=0)


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """What is learned from."""

    train: str | None = recipe_key(
        "scenes, a file in LLaVA's format, a folder of shards or a pattern of tar files",
        None,
        is_path=True,
    )
    images: str | None = recipe_key(
        "folder of the pictures; null: beside the file", None, is_path=True
    )
    mix: tuple[MixtureSource, ...] | None = recipe_key(
        "several weighted sources, instead of train", None
    )
    val: str | None = recipe_key(
        "held-out samples: a file in LLaVA's format, or shards", None, is_path=True
    )
    on_bad_sample: Literal["auto", "quarantine", "stop"] = recipe_key(
        "bad samples: leave out and count, or stop; auto stops above 1 in 100", "auto"
    )
    workers: int = recipe_key("processes that prepare the data; 0: none", 4, low=0, high=256)
    decode: Literal["exact", "draft"] = recipe_key(
        "large JPEGs: as the reference decodes them, or faster and a little otherwise", "exact"
    )
    samples: int = recipe_key("scenes: pictures in an epoch", 10000, low=1)
    questions: int = recipe_key("scenes: questions about a picture, in one conversation", 3, low=1)


@dataclass(frozen=True, kw_only=True)
class StageConfig:
    """One leg of training."""

    image_size: int = recipe_key("pixels of a side", low=8, high=4096)
    sample_format: Literal["caption", "chat"] = recipe_key(
        "plain captions of pictures, or conversations"
    )
    objective: str = recipe_key("language, or an objective that the connector offers", "language")
    train: dict[PartName, PartTrainConfig | None] = recipe_key("which parts are trained, and how")
    global_batch_size: int = recipe_key("samples in an optimizer step, over all devices", low=1)
    max_tokens_per_row: int = recipe_key(
        "most tokens in a packed row; lower it when memory runs out", 4096, low=16
    )
    epochs: float | None = recipe_key("passes over the data", None, low=0)
    steps: int | None = recipe_key("optimizer steps, instead of epochs", None, low=0)
    warmup_ratio: float = recipe_key(
        "share of the steps in which the rate rises", 0.03, low=0, high=1
    )
    schedule: Literal["cosine", "constant"] = recipe_key(
        "learning rate after the warm-up", "cosine"
    )
    grad_clip: float | None = recipe_key(
        "largest norm of the gradient; null: no clipping", 1.0, above=0
    )
    weight_decay: float = recipe_key("AdamW's weight decay", 0.0, low=0)
    adam_betas: tuple[float, float] = recipe_key(
        "AdamW's betas", (0.9, 0.999), low=0, high=0.999999
    )
    data: DataConfig | None = recipe_key("keys of data that differ in this stage", None)

    @property
    def trained_parts(self) -> dict[str, PartTrainConfig]:
        """The parts that are trained, and how."""
        return {str(part): how for part, how in self.train.items() if how is not None}


@dataclass(frozen=True, kw_only=True)
class TrainerConfig:
    """Where it runs and how it survives; changing these keeps a run resumable."""

    accelerator: Literal["auto", "cpu", "gpu", "mps"] = recipe_key("kind of device", "auto")
    strategy: Literal["auto", "ddp", "fsdp2"] = recipe_key(
        "of several processes: ddp (each has the whole model), fsdp2 (each a shard); auto: ddp",
        "auto",
    )
    devices: int = recipe_key("processes on each machine, a GPU each", 1, low=1)
    num_nodes: int = recipe_key("machines", 1, low=1)
    compile: bool = recipe_key(
        "compile decoder layers and tower blocks; pays on GPUs in long runs", False
    )
    checkpoint_every: float = recipe_key(
        "seconds between checkpoints; more where saving would take over 5 % of the time",
        60.0,
        above=0,
    )
    keep_last_checkpoints: int = recipe_key("checkpoints that are kept, beside the best", 2, low=1)
    feature_cache: str | None = recipe_key(
        "folder that keeps the features of frozen towers; null: none", None, is_path=True
    )
    max_nonfinite_steps: int = recipe_key(
        "stop after this many NaN or infinite losses in a row", 5, low=1
    )
    callbacks: tuple[str, ...] | None = recipe_key(
        "Lightning callbacks of your own, as [my_callbacks.Printer]", None
    )

    @property
    def world_size(self) -> int:
        """How many processes train one model."""
        return self.devices * self.num_nodes


@dataclass(frozen=True, kw_only=True)
class LoggingConfig:
    """What is written down."""

    every_n_steps: int = recipe_key("steps between lines of the log", 10, low=1)
    evaluate_every: int = recipe_key("steps between held-out evaluations", 200, low=1)
    tensorboard: bool = recipe_key("write TensorBoard logs", True)
    wandb: str | None = recipe_key("project of Weights & Biases to log to", None)
    questions: int | None = recipe_key(
        "questions of a set that are asked at the end; null: all", None, low=1
    )
    examples: int = recipe_key("pictures in examples.png", 12, low=0, high=100)


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """A whole recipe, resolved: what a run does, and enough to repeat it."""

    recipe: str = recipe_key("name of a recipe (see list), or a YAML file")
    size: str = recipe_key("which tower and language model: tiny, 6b, 34b", "tiny")
    seed: int = recipe_key("of everything random", 0, low=0, high=2**32 - 1)
    run: str | None = recipe_key("folder of the run; null: runs/RECIPE-SIZE-N", None, is_path=True)
    init: str | None = recipe_key(
        "run, checkpoint or released model (folder or hub id) to begin with", None, is_path=True
    )
    only: tuple[str, ...] | None = recipe_key("stages to run, as chat or [align_224,chat]", None)
    from_: str | None = recipe_key("stage to start from", None)
    precision: Literal["32", "bf16"] = recipe_key("of the arithmetic", "32")
    activation_checkpointing: Literal["none", "selective", "full", "auto"] = recipe_key(
        "what is recomputed to save memory: nothing, what is cheap, all; auto: what must be", "none"
    )
    dry_run: bool = recipe_key("one step of every stage, longest batch first, then stop", False)
    profile: bool = recipe_key("write a trace of some steps into the run", False)
    vision: VisionEncoderConfig = recipe_key("the vision tower", VisionEncoderConfig)
    language: LanguageModelConfig = recipe_key("the language model", LanguageModelConfig)
    connector: dict[str, Any] = recipe_key("name, and the options of that connector (see list)")
    data: DataConfig = recipe_key("what is learned from", DataConfig)
    stages: dict[str, StageConfig] = recipe_key("the legs of training, in order")
    trainer: TrainerConfig = recipe_key("where it runs", TrainerConfig)
    log: LoggingConfig = recipe_key("what is written down", LoggingConfig)


class KeyRow(NamedTuple):
    """One line of the table of keys."""

    name: str
    type: str
    default: str
    help: str


@cache
def declared_keys(cls: type) -> dict[str, tuple[Any, dataclasses.Field[Any]]]:
    """Return the keys of a mapping as they are spelled in YAML, with their kinds and fields."""
    kinds = get_type_hints(cls)
    return {f.name.rstrip("_"): (kinds[f.name], f) for f in dataclasses.fields(cls)}


def nested_mapping(kind: Any) -> tuple[str, Any]:
    """Return the placeholder and the dataclass of a key's mapping, ("", None) for a value."""
    inner = split_union(kind)[0][0]
    if dataclasses.is_dataclass(inner):
        return "", inner
    if get_origin(inner) is dict and get_args(inner)[1] is not Any:
        holder = "PART" if get_args(inner)[0] is PartName else "NAME"
        return holder, split_union(get_args(inner)[1])[0][0]
    return "", None


def key_rows(cls: type = Recipe, prefix: str = "") -> list[KeyRow]:
    """Return the table of all keys in the order of this file, `connector`'s options left out."""
    table: list[KeyRow] = []
    for name, (kind, declared) in declared_keys(cls).items():
        holder, inner = nested_mapping(kind)
        path = prefix + name
        if name == "data" and prefix:
            table.append(KeyRow(f"{path}.KEY", "", "null", declared.metadata["help"]))
        elif inner is not None:
            table += key_rows(inner, f"{path}.{holder}." if holder else f"{path}.")
        elif cls is Recipe and name == "connector":
            table.append(KeyRow("connector.name", "str", "", "name of a connector (see list)"))
            table.append(
                KeyRow("connector.OPTION", "", "", "an option of that connector (see list)")
            )
        else:
            table.append(
                KeyRow(path, _type_text(kind), _default_text(declared), declared.metadata["help"])
            )
    return table


def _type_text(kind: Any) -> str:
    inner = split_union(kind)[0][0]
    of_mappings = get_origin(inner) is tuple and dataclasses.is_dataclass(get_args(inner)[0])
    return "[{train, images, weight}, ...] | null" if of_mappings else kind_label(kind)


def _default_text(declared: dataclasses.Field[Any]) -> str:
    value = declared.default
    if value is dataclasses.MISSING:
        return "(needed)"
    if isinstance(value, tuple):
        return f"[{', '.join(str(one) for one in value)}]"
    return (
        {None: "null", True: "true", False: "false"}[value]
        if _is_yaml_constant(value)
        else str(value)
    )


def _is_yaml_constant(value: object) -> bool:
    return value is None or isinstance(value, bool)
