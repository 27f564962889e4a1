"""The model and the micro-batches of a stage as shapes, on torch's `meta` device."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, NamedTuple

import torch

from vlbench.config.model_schema import ModelConfig
from vlbench.config.stage_schema import StageConfig
from vlbench.connector import registry
from vlbench.connector.base import Connector
from vlbench.data.batch_images import assign_image_index, stack_questions
from vlbench.data.own_template import bind_template
from vlbench.data.packing import PackedBatch
from vlbench.data.sample_encoding import IGNORE_INDEX, IMAGE_TOKEN_INDEX
from vlbench.data.tokenizer import Tokenizer
from vlbench.errors import UserError
from vlbench.model.build_vlm import read_view_settings
from vlbench.model.frozen_bf16 import FrozenBF16
from vlbench.model.language_model import TINY_LANGUAGE_FOLDER, build_random_language
from vlbench.model.loaded_vlm import LoadedVLM, assemble_vlm
from vlbench.model.vlm import VLM
from vlbench.train.shape_checks import offline_encoder_and_config
from vlbench.train.trainable_parts import check_objective, freeze_untrained_parts

ROUNDING_ERROR = 1e-9  # of the ratio of two means of whole numbers


class SampleShape(NamedTuple):
    """Size of the mean sample of a stage, or of one row."""

    token_count: float
    """Positions, image positions included."""
    image_count: float
    view_count: float
    """Squares that the vision encoder sees: one for an image that is not tiled."""
    image_positions: float
    """Positions of all images."""
    supervised_tokens: float
    """Positions with a label."""

    @property
    def views_per_image(self) -> int:
        """Views of an image, to the next whole number; 1 where there is no image."""
        return max(1, round(self.view_count / self.image_count)) if self.image_count else 1


class ModelDepth(NamedTuple):
    """The depth of a model."""

    decoder_layers: int
    """Layers of the language model."""
    encoder_blocks: int
    """Blocks of the vision encoder that are computed."""
    second_blocks: int = 0
    """Those of a second vision encoder."""


def build_meta_vlm(
    config: ModelConfig,
    stage_name: str,
    stage: StageConfig,
    precision: str,
    depth: ModelDepth | None = None,
) -> LoadedVLM:
    """Return the model of a stage on `meta`, at its image size, with untrained parts frozen.

    `depth` replaces the numbers of layers; the connector is that of the whole encoder. Nothing is
    downloaded: weights of a hub id are taken to have the architecture of `language.name`.
    """
    folder = Path(config.language.weights).expanduser()
    local = folder.is_dir()
    encoder, language_config = offline_encoder_and_config(config)
    encoder.set_image_size(stage.image_size)
    if depth is not None:
        language_config.num_hidden_layers = depth.decoder_layers
    tokenizer = Tokenizer.load(folder if local else TINY_LANGUAGE_FOLDER)
    template_name = config.language.template
    if template_name == "auto" and not tokenizer.chat_template:
        template_name = "chatml"  # that of a hub's tokenizer is not known, and matters to no shape
    try:
        with torch.device("meta"):
            vlm = assemble_vlm(
                encoder,
                registry.load_connector(config.connector_name),
                config.connector_options,
                build_random_language(language_config),
                tokenizer,
                bind_template(template_name, tokenizer),
                config.language.max_length,
                read_view_settings(config.vision),
            )
            check_objective(vlm.model, stage_name, stage)
            if depth is not None:
                for one, blocks in zip(encoder.encoders(), depth[1:], strict=False):
                    one.shorten(blocks)
            freeze_untrained_parts(vlm.model, stage)
        from_file = config.language.weights not in ("random", "embedded")
        _hold_frozen_language(vlm.model, from_file and precision == "bf16")
    except ValueError as error:
        raise UserError(str(error)) from error
    return vlm


def _hold_frozen_language(vlm: VLM, in_bf16: bool) -> None:
    """Hold the frozen weights of a language model in bfloat16, as training in bf16 does.

    That is so for weights from files in bfloat16, as Yi's; vision encoders have float32. FSDP keeps
    float32, see `memory_estimate.persistent_memory`.
    """
    in_language = {id(parameter) for parameter in vlm.language.parameters()}
    FrozenBF16(vlm, in_bf16, lambda weight: id(weight) in in_language)


def full_row_shape(sample: SampleShape, max_tokens_per_row: int) -> SampleShape:
    """Return a full row as one long sample; a mean sample longer than a row has its own row.

    Attention takes no more memory for one long sample than for several short ones. Where the last
    sample would be cut, the row ends in text.
    """
    length = max(max_tokens_per_row, math.ceil(sample.token_count))
    count = max(1, int(length // sample.token_count))
    views = round(count * sample.view_count)
    image_share = positions = 0.0
    if views:
        per_view = sample.image_positions / sample.view_count
        views = min(views, math.floor((length - 1) / per_view + ROUNDING_ERROR))
        image_share, positions = sample.image_count / sample.view_count, round(views * per_view)
    supervised_share = sample.supervised_tokens / max(
        1.0, sample.token_count - sample.image_positions
    )
    return SampleShape(
        length,
        min(views, max(1, round(views * image_share))),
        views,
        positions,
        min(length, round(supervised_share * (length - positions))),
    )


def build_row_batch(
    row: SampleShape, connector: Connector, pixel_shape: tuple[int, int, int]
) -> PackedBatch:
    """Return a micro-batch of one row: the images, then the text, whose end is supervised.

    Where `connector` reads questions, they are as long as any.

    Call it under a FakeTensorMode and a MemoryTracker: integer tensors are real, pixels are fake.
    """
    length, images, views, positions, supervised = (int(count) for count in row)
    question_length = connector.question_length
    questions = ((0,) * question_length,) * views if question_length else None
    ids = torch.zeros(length, dtype=torch.long)
    labels = torch.full_like(ids, IGNORE_INDEX)
    ids[:positions] = IMAGE_TOKEN_INDEX
    labels[length - supervised :] = 0
    return PackedBatch(
        input_ids=ids[None],
        labels=labels[None],
        position_ids=torch.arange(length)[None],
        sample_index=torch.zeros(1, length, dtype=torch.long),
        image_index=assign_image_index(ids, _share_out(positions, images), 0)[None],
        pixels=torch.zeros(views, *pixel_shape),
        sample_ids=["row"],
        sample_lengths=[[length]],
        supervised_token_count=supervised,
        image_ids=[str(number) for number in range(views)],
        question_ids=stack_questions([questions]),
        **_place_views(row, connector.tokens_per_image),
    ).locate_positions()


def _place_views(row: SampleShape, tokens_per_view: int) -> dict[str, Any]:
    """Return the views of each image of a row, and the visual token at each image position.

    Which token it is matters to no shape. {} where each image is one view.
    """
    images, views, positions = int(row.image_count), int(row.view_count), int(row.image_positions)
    if (images, positions) == (views, views * tokens_per_view):
        return {}
    bounds = torch.tensor([0, *_share_out(views, images)]).cumsum(0)
    return {
        "view_bounds": bounds,
        "visual_index": torch.arange(positions) % max(1, views * tokens_per_view),
    }


def _share_out(total: int, count: int) -> list[int]:
    """Return `count` whole numbers that sum to `total` and differ by 1 at most."""
    return [total * (i + 1) // count - total * i // count for i in range(count)]
