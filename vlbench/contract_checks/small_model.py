"""A small random model to check connectors on: three encoder blocks, three decoder layers.

An image of 28 pixels has 2 x 2 patches; the vision encoder and the language model are 32 wide.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from open_clip.transformer import VisionTransformer
from PIL import Image
from transformers import LlamaConfig, LlamaForCausalLM

from vlbench.connector.base import Connector
from vlbench.data.chat_template import CHAT_TEMPLATES
from vlbench.data.packing import PackedBatch, collate
from vlbench.data.sample import IMAGE_PLACEHOLDER, ChatTurn, Sample
from vlbench.data.tokenizer import Tokenizer
from vlbench.data.view_layout import ViewSettings
from vlbench.model.decoder_families import DecoderModel
from vlbench.model.language_model import TINY_LANGUAGE_FOLDER
from vlbench.model.loaded_vlm import LoadedVLM, assemble_vlm
from vlbench.model.packed_attention import PACKED_ATTENTION
from vlbench.model.vision_encoder import VisionEncoder

IMAGE_SIDE, PATCH_SIDE, WIDTH = 28, 14, 32
PIXEL_STATISTICS = {"mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5)}
SMALL_OPTIONS: Mapping[str, dict[str, Any]] = {
    "qformer": {
        "queries": 3,
        "width": 16,
        "layers": 2,
        "heads": 2,
        "ffn_width": 24,
        "text": "embedded",
    },
    "instruct_qformer": {"queries": 3, "width": 16, "layers": 2, "heads": 2, "ffn_width": 24},
    "flamingo": {"every": 1, "latents": 3, "depth": 1, "heads": 2, "head_width": 8},
    "eva": {"layers": 1, "head_width": 8},
    "resampler": {"side": 2, "heads": 2},
    "mixed": {"tokens": "avgpool", "every": 1, "heads": 2, "head_width": 8},
    "attention_pool": {"head_width": 8},
    "token_packer": {"width": 16, "head_width": 8},
    "c_abstractor": {"side": 1, "depth": 1, "width": 16},
    "deepstack": {"levels": 2, "blocks": (-1, 0)},
    "dense": {"groups": 1},
    "cross_attention": {"every": 1, "heads": 2, "kv_heads": 1, "head_width": 8, "blocks": (0,)},
}
"""Options of shipped connectors whose defaults are too large for an image of 2 x 2 patches."""


@dataclass(frozen=True)
class NoiseImage:
    """An image of noise that only its seed decides."""

    seed: int
    size: tuple[int, int] = (IMAGE_SIDE, IMAGE_SIDE)
    """Width and height in pixels."""

    @property
    def name(self) -> str:
        """Its name in messages."""
        return f"noise {self.seed}"

    def open(self) -> Image.Image:
        """Return the picture."""
        generator = torch.Generator().manual_seed(self.seed)
        width, height = self.size
        values = torch.randint(0, 255, (height, width, 3), generator=generator)
        return Image.fromarray(values.byte().numpy())


def build_small_vlm(
    connector: type[Connector],
    options: Mapping[str, Any] | None = None,
    tokenizer_folder: Path = TINY_LANGUAGE_FOLDER,
    language: DecoderModel | None = None,
    view_settings: ViewSettings | None = None,
) -> LoadedVLM:
    """Build the model with `connector`, always the same, in training mode.

    Args:
        connector: The connector's class.
        options: Its options.
        tokenizer_folder: A tokenizer, in Hugging Face's layout.
        language: Another language model, 32 wide, than that of `build_small_language`.
        view_settings: How images become views; None: each is one.
    """
    torch.manual_seed(0)
    blocks, heads = 3, 2
    visual = VisionTransformer(
        IMAGE_SIDE, PATCH_SIDE, WIDTH, blocks, heads, mlp_ratio=2.0, output_dim=16
    )
    tokenizer = Tokenizer.load(tokenizer_folder)
    if language is None:
        language = build_small_language(tokenizer.embedding_rows)
    vlm = assemble_vlm(
        VisionEncoder(visual, -2, False, PIXEL_STATISTICS),
        connector,
        dict(options or {}),
        language,
        tokenizer,
        CHAT_TEMPLATES["yi_vl"],
        512,
        view_settings,
    )
    return vlm.train()


def build_small_language(vocabulary: int = 1000) -> DecoderModel:
    """Build the language model, three decoder layers, from the current random state."""
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=WIDTH,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        eos_token_id=2,
    )
    language: DecoderModel = LlamaForCausalLM._from_config(
        config, attn_implementation=PACKED_ATTENTION
    )
    return language


def make_sample(number: int, images: int = 1, words: int = 5) -> Sample:
    """Make a conversation of two answers; its length grows with `words`."""
    tags = f"{IMAGE_PLACEHOLDER}\n" * images
    turns = (
        ChatTurn("human", f"{tags}question {number} " + "word " * words),
        ChatTurn("assistant", f"answer {number} " + "and " * words),
        ChatTurn("human", "more?"),
        ChatTurn("assistant", f"no {number}"),
    )
    return Sample(f"s{number}", turns, tuple(NoiseImage(10 * number + k) for k in range(images)))


def make_question(number: int, images: int = 1, words: int = 5) -> Sample:
    """Make the first question of `make_sample` without its answer."""
    sample = make_sample(number, images, words)
    return replace(sample, turns=sample.turns[:1])


def make_batch(vlm: LoadedVLM, rows: Sequence[Sequence[Sample]]) -> PackedBatch:
    """Encode samples into the rows of one batch, pixels in float32."""
    encoder = vlm.processor.sample_encoder()
    encoded = [[encoder.encode(sample) for sample in row] for row in rows]
    return collate(encoded, vlm.processor.transform.load_pixels)


def make_double_batch(vlm: LoadedVLM, rows: Sequence[Sequence[Sample]]) -> PackedBatch:
    """Encode samples into the rows of one batch, pixels in float64."""
    return make_batch(vlm, rows).to("cpu", torch.float64)


def join_views(batch: PackedBatch, image_counts: Sequence[int], tokens: int) -> PackedBatch:
    """Return a batch whose images are views of fewer: each of so many neighbours in a sample.

    `tokens` are the visual tokens of a view; the texts between them stay.
    """
    bounds = torch.tensor([0, *itertools.accumulate(image_counts)])
    image_of_view = torch.repeat_interleave(torch.tensor(image_counts))
    image_of_view = torch.cat([image_of_view, torch.tensor([-1])])  # the last one is that of -1
    return replace(
        batch,
        image_index=image_of_view[batch.image_index],
        visual_index=torch.arange(len(batch.pixels) * tokens),
        view_bounds=bounds,
    )


def extend_prompt(batch: PackedBatch, token: int) -> PackedBatch:
    """Return a prompt batch of one row with one more token."""
    return replace(
        batch,
        input_ids=torch.cat([batch.input_ids, torch.tensor([[token]])], dim=1),
        position_ids=torch.cat([batch.position_ids, batch.position_ids[:, -1:] + 1], dim=1),
        sample_index=_repeat_last(batch.sample_index),
        image_index=_repeat_last(batch.image_index),
        sample_lengths=[[sum(batch.sample_lengths[0]) + 1]],
    )


def _repeat_last(values: torch.Tensor) -> torch.Tensor:
    return torch.cat([values, values[:, -1:]], dim=1)


def open_gates(vlm: LoadedVLM) -> LoadedVLM:
    """Open the gates of a connector that begins with closed ones: parameters named `...gate`."""
    for name, parameter in vlm.connector.named_parameters():
        if name.endswith("gate"):
            parameter.data.fill_(0.5)
    return vlm
