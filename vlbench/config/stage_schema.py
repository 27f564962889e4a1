"""The keys of a recipe's stages: what is trained, on which data, with which optimizer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal, Self

from pydantic import BeforeValidator, model_validator

from vlbench.config.key_types import (
    MAX_COUNT,
    MAX_IMAGE_SIZE,
    BatchSize,
    BetaNumber,
    Count,
    OnBadSample,
    PartName,
    PathText,
    RecipeSection,
    RowTokens,
    SampleFormat,
    drop_frozen_parts,
    key,
)
from vlbench.config.mixture_source import Mixture


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
        "scenes, large_scenes; JSON, JSONL, CSV, Parquet; NAME:FOLDER; a hub id; shards", None
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
    scene_side: int = key("large_scenes: side of the pictures in pixels", 224, ge=112, le=1120)

    @property
    def is_given(self) -> bool:
        """Whether there is something to train on."""
        return self.train is not None or self.mix is not None


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
