"""The recipe: every key with its type, default, range and meaning.

A dataclass per mapping of the YAML file; a trailing underscore is dropped from a key that is a
Python keyword (`from_` is `from`). `recipe.py` fills these from files and the command line.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from functools import cache
from typing import Any, Literal, NamedTuple, get_args, get_origin, get_type_hints

from vlbench.values import label, unwrap

Part = Literal["vision", "connector", "language"]
PARTS: tuple[str, ...] = get_args(Part)


def key(
    help: str,
    default: Any = dataclasses.MISSING,
    *,
    low: float | None = None,
    above: float | None = None,
    high: float | None = None,
    path: bool = False,
) -> Any:
    """Declare a key: its meaning, default, and range (`low` <= or `above` < value <= `high`).

    In the value of a `path` a leading `~` is the home folder.
    """
    limits = {"help": help, "low": low, "above": above, "high": high, "path": path}
    if isinstance(default, type):
        return field(default_factory=default, metadata=limits)
    return field(default=default, metadata=limits)


@dataclass(frozen=True, kw_only=True)
class Vision:
    """The vision tower."""

    name: str = key(
        "ViT or EVA of open_clip, tiny, tiny_eva (see list), or a folder", "tiny", path=True
    )
    weights: str = key(
        "embedded (tiny, tiny_eva), random, a tag, a file or a folder", "embedded", path=True
    )
    layer: int = key("block whose output is used; -1 is the last", -2, low=-100, high=99)
    norm: bool = key("apply the tower's final norm to the features", False)


@dataclass(frozen=True, kw_only=True)
class Language:
    """The language model."""

    name: Literal["tiny", "yi-6b", "yi-34b"] = key(
        "architecture; weights of a folder bring their own", "tiny"
    )
    weights: str = key(
        "embedded (tiny only), random, a Llama folder or hub id", "embedded", path=True
    )
    template: Literal["yi_vl", "chatml", "llava_v1"] = key("how turns are written as text", "yi_vl")
    max_length: int = key("longest conversation in tokens, image places included", 4096, low=16)


@dataclass(frozen=True, kw_only=True)
class Lora:
    """A low-rank adapter (Hu et al. 2021, arXiv:2106.09685), trained instead of the weights."""

    rank: int = key("of the update of a weight", 64, low=1, high=65536)
    alpha: float | None = key("the update counts alpha / rank; null: twice the rank", None, above=0)
    dropout: float = key("of what goes into adapters; depends on packing", 0.0, low=0, high=0.99)
    targets: str = key("all-linear, or names of Linear layers as q_proj,v_proj", "all-linear")
    rslora: bool = key("scale by alpha / sqrt(rank) instead", False)
    dora: bool = key("train the length of a weight's columns apart (DoRA)", False)
    bits: int | None = key("4: keep the weights in 4 bits (QLoRA; GPU, language)", None)


@dataclass(frozen=True, kw_only=True)
class Train:
    """How one part is trained in one stage; a part that is not named, or null, is frozen."""

    lr: float = key("peak learning rate", above=0, high=10)
    weight_decay: float | None = key("of this part; null: the stage's", None, low=0)
    lora: Lora | None = key("train an adapter instead; null: the weights", None)


@dataclass(frozen=True, kw_only=True)
class Mix:
    """One source of a mixture."""

    train: str = key("scenes, or a file in LLaVA's format", path=True)
    images: str | None = key("folder of its pictures; null: beside the file", None, path=True)
    weight: float = key("how often each sample is met in an epoch", 1.0, above=0)


@dataclass(frozen=True, kw_only=True)
class Data:
    """What is learned from."""

    train: str | None = key(
        "scenes, a file in LLaVA's format, a folder of shards or a pattern of tar files",
        None,
        path=True,
    )
    images: str | None = key("folder of the pictures; null: beside the file", None, path=True)
    mix: tuple[Mix, ...] | None = key("several weighted sources, instead of train", None)
    val: str | None = key("held-out samples: a file in LLaVA's format, or shards", None, path=True)
    on_bad: Literal["auto", "quarantine", "stop"] = key(
        "bad samples: leave out and count, or stop; auto stops above 1 in 100", "auto"
    )
    workers: int = key("processes that prepare the data; 0: none", 4, low=0, high=256)
    decode: Literal["exact", "draft"] = key(
        "large JPEGs: as the reference decodes them, or faster and a little otherwise", "exact"
    )
    samples: int = key("scenes: pictures in an epoch", 10000, low=1)
    questions: int = key("scenes: questions about a picture, in one conversation", 3, low=1)


@dataclass(frozen=True, kw_only=True)
class Stage:
    """One leg of training."""

    image_size: int = key("pixels of a side", low=8, high=4096)
    form: Literal["caption", "chat"] = key("plain captions of pictures, or conversations")
    objective: str = key("language, or an objective that the connector offers", "language")
    train: dict[Part, Train | None] = key("which parts are trained, and how")
    batch: int = key("samples in an optimizer step, over all devices", low=1)
    row_tokens: int = key(
        "most tokens in a packed row; lower it when memory runs out", 4096, low=16
    )
    epochs: float | None = key("passes over the data", None, low=0)
    steps: int | None = key("optimizer steps, instead of epochs", None, low=0)
    warmup: float = key("share of the steps in which the rate rises", 0.03, low=0, high=1)
    schedule: Literal["cosine", "constant"] = key("learning rate after the warm-up", "cosine")
    clip: float | None = key("largest norm of the gradient; null: no clipping", 1.0, above=0)
    weight_decay: float = key("AdamW's weight decay", 0.0, low=0)
    betas: tuple[float, float] = key("AdamW's betas", (0.9, 0.999), low=0, high=0.999999)
    data: Data | None = key("keys of data that differ in this stage", None)

    @property
    def parts(self) -> dict[str, Train]:
        """The parts that are trained, and how."""
        return {str(part): how for part, how in self.train.items() if how is not None}


@dataclass(frozen=True, kw_only=True)
class Trainer:
    """Where it runs and how it survives; changing these keeps a run resumable."""

    accelerator: Literal["auto", "cpu", "gpu", "mps"] = key("kind of device", "auto")
    strategy: Literal["auto", "ddp", "fsdp2"] = key(
        "of several processes: ddp (each has the whole model), fsdp2 (each a shard); auto: ddp",
        "auto",
    )
    devices: int = key("processes on each machine, a GPU each", 1, low=1)
    num_nodes: int = key("machines", 1, low=1)
    compile: bool = key("compile decoder layers and tower blocks; pays on GPUs in long runs", False)
    checkpoint_every: float = key(
        "seconds between checkpoints; more where saving would take over 5 % of the time",
        60.0,
        above=0,
    )
    keep_last: int = key("checkpoints that are kept, beside the best", 2, low=1)
    feature_cache: str | None = key(
        "folder that keeps the features of frozen towers; null: none", None, path=True
    )
    stop_after_bad: int = key("stop after this many NaN or infinite losses in a row", 5, low=1)

    @property
    def processes(self) -> int:
        """How many processes train one model."""
        return self.devices * self.num_nodes


@dataclass(frozen=True, kw_only=True)
class Log:
    """What is written down."""

    every: int = key("steps between lines of the log", 10, low=1)
    evaluate_every: int = key("steps between held-out evaluations", 200, low=1)
    tensorboard: bool = key("write TensorBoard logs", True)
    wandb: str | None = key("project of Weights & Biases to log to", None)
    questions: int | None = key(
        "questions of a set that are asked at the end; null: all", None, low=1
    )
    examples: int = key("pictures in examples.png", 12, low=0, high=100)


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """A whole recipe, resolved: what a run does, and enough to repeat it."""

    recipe: str = key("name of a recipe (see list), or a YAML file")
    size: str = key("which tower and language model: tiny, 6b, 34b", "tiny")
    seed: int = key("of everything random", 0, low=0, high=2**32 - 1)
    run: str | None = key("folder of the run; null: runs/RECIPE-SIZE-N", None, path=True)
    init: str | None = key(
        "run, checkpoint or released model (folder or hub id) to begin with", None, path=True
    )
    only: tuple[str, ...] | None = key("stages to run, as chat or [align_224,chat]", None)
    from_: str | None = key("stage to start from", None)
    precision: Literal["32", "bf16"] = key("of the arithmetic", "32")
    checkpointing: Literal["none", "selective", "full", "auto"] = key(
        "what is recomputed to save memory: nothing, what is cheap, all; auto: what must be", "none"
    )
    dry_run: bool = key("one step of every stage, longest batch first, then stop", False)
    profile: bool = key("write a trace of some steps into the run", False)
    vision: Vision = key("the vision tower", Vision)
    language: Language = key("the language model", Language)
    connector: dict[str, Any] = key("name, and the options of that connector (see list)")
    data: Data = key("what is learned from", Data)
    stages: dict[str, Stage] = key("the legs of training, in order")
    trainer: Trainer = key("where it runs", Trainer)
    log: Log = key("what is written down", Log)


class Row(NamedTuple):
    """One line of the table of keys."""

    name: str
    type: str
    default: str
    help: str


@cache
def keys(cls: type) -> dict[str, tuple[Any, dataclasses.Field[Any]]]:
    """Return the keys of a mapping as they are spelled in YAML, with their kinds and fields."""
    kinds = get_type_hints(cls)
    return {f.name.rstrip("_"): (kinds[f.name], f) for f in dataclasses.fields(cls)}


def nested(kind: Any) -> tuple[str, Any]:
    """Return the placeholder and the dataclass of a key's mapping, ("", None) for a value."""
    inner = unwrap(kind)[0][0]
    if dataclasses.is_dataclass(inner):
        return "", inner
    if get_origin(inner) is dict and get_args(inner)[1] is not Any:
        holder = "PART" if get_args(inner)[0] is Part else "NAME"
        return holder, unwrap(get_args(inner)[1])[0][0]
    return "", None


def rows(cls: type = Recipe, prefix: str = "") -> list[Row]:
    """Return the table of all keys in the order of this file, `connector`'s options left out."""
    table: list[Row] = []
    for name, (kind, declared) in keys(cls).items():
        holder, inner = nested(kind)
        path = prefix + name
        if name == "data" and prefix:
            table.append(Row(f"{path}.KEY", "", "null", declared.metadata["help"]))
        elif inner is not None:
            table += rows(inner, f"{path}.{holder}." if holder else f"{path}.")
        elif cls is Recipe and name == "connector":
            table.append(Row("connector.name", "str", "", "name of a connector (see list)"))
            table.append(Row("connector.OPTION", "", "", "an option of that connector (see list)"))
        else:
            table.append(Row(path, _type(kind), _default(declared), declared.metadata["help"]))
    return table


def _type(kind: Any) -> str:
    inner = unwrap(kind)[0][0]
    of_mappings = get_origin(inner) is tuple and dataclasses.is_dataclass(get_args(inner)[0])
    return "[{train, images, weight}, ...] | null" if of_mappings else label(kind)


def _default(declared: dataclasses.Field[Any]) -> str:
    value = declared.default
    if value is dataclasses.MISSING:
        return "(needed)"
    if isinstance(value, tuple):
        return f"[{', '.join(str(one) for one in value)}]"
    return {None: "null", True: "true", False: "false"}[value] if _named(value) else str(value)


def _named(value: object) -> bool:
    return value is None or isinstance(value, bool)
