"""The keys of a recipe's stages: what is trained, on which data, with which optimizer."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from vlbench.config.data_schema import DataConfig
from vlbench.config.key_types import MAX_COUNT, ImageSize, PartName, RecipeSection, key
from vlbench.strict_values import convert_value, is_null

SampleFormat = Literal["caption", "chat"]
MAX_ROW_TOKENS = 1 << 20  # eight times the usual longest contexts; `plan` takes half a minute
BatchSize = Annotated[int, Field(ge=1, le=1_000_000)]  # CLIP is trained with up to 164,000
BetaNumber = Annotated[float, Field(ge=0, le=0.999999)]


def check_row_tokens(value: Any) -> Any:
    """Return `auto` or a number of tokens within limits."""
    if value == "auto":
        return str(value)
    try:
        return convert_value(value, Annotated[int, Field(ge=16, le=MAX_ROW_TOKENS)])
    except ValueError as error:
        raise ValueError(f"{error}; auto is allowed, too") from None


def drop_frozen_parts(parts: Any) -> Any:
    """Return the parts of `train` without those that are null: they are frozen."""
    return {p: v for p, v in parts.items() if not is_null(v)} if isinstance(parts, dict) else parts


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


class StageConfig(RecipeSection):
    """One stage of training."""

    image_size: ImageSize = key("side of the images in pixels")
    sample_format: SampleFormat = key("plain captions of images, or conversations")
    objective: str = key("language, or an objective that the connector offers", "language")
    train: Annotated[dict[PartName, PartTrainConfig], BeforeValidator(drop_frozen_parts)] = key(
        "which parts are trained, and how"
    )
    global_batch_size: BatchSize = key("samples in an optimizer step, over all devices")
    max_tokens_per_row: Annotated[int | Literal["auto"], BeforeValidator(check_row_tokens)] = key(
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

    def find_conflicts(self) -> Iterator[str]:
        """Yield what is wrong with the length of the stage, and with its adapters."""
        if self.epochs is None and self.steps is None:
            yield "needs epochs or steps"
        adapters = {part: how.lora for part, how in self.train.items() if how.lora}
        if "connector" in adapters:
            yield "has train.connector.lora; a connector is trained whole"
        for part, lora in adapters.items():
            if lora.bits and part != "language":
                yield f"has train.{part}.lora.bits=4; only train.language takes it"


@dataclass(frozen=True)
class StageData:
    """What a recipe says of the data of a stage: its own or the common `config`, and `seed`."""

    stage_name: str
    stage: StageConfig
    config: DataConfig
    seed: int
