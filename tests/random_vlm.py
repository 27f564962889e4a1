"""A small random model for tests: three encoder blocks, three decoder layers, golden tokenizer."""

from __future__ import annotations

from dataclasses import dataclass
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
from vlbench.model.loaded_vlm import LoadedVLM, assemble_vlm
from vlbench.model.packed_attention import PACKED_ATTENTION
from vlbench.model.vision_encoder import VisionEncoder

CHECKPOINT = Path(__file__).parent / "goldens" / "yi_vl" / "checkpoint"
HALF = {"mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5)}
SMALL = {
    "qformer": {
        "queries": 3,
        "width": 16,
        "layers": 2,
        "heads": 2,
        "ffn_width": 24,
        "text": "embedded",
    },
    "flamingo": {"every": 1, "latents": 3, "depth": 1, "heads": 2, "head_width": 8},
    "eva": {"layers": 1, "head_width": 8},
    "resampler": {"side": 2, "heads": 2},
    "mixed": {"tokens": "avgpool", "every": 1, "heads": 2, "head_width": 8},
    "c_abstractor": {"side": 1, "depth": 1, "width": 16},
}
"""Options of connectors whose defaults are too large for an image of 2 x 2 patches."""


@dataclass(frozen=True)
class NoiseImage:
    """An image of noise that only its seed decides."""

    seed: int

    @property
    def name(self) -> str:
        return f"noise {self.seed}"

    def open(self) -> Image.Image:
        values = torch.randint(
            0, 255, (28, 28, 3), generator=torch.Generator().manual_seed(self.seed)
        )
        return Image.fromarray(values.byte().numpy())


def small_vlm(connector: type[Connector], options: dict[str, Any] | None = None) -> LoadedVLM:
    """Build the model with `connector`, always the same."""
    torch.manual_seed(0)
    visual = VisionTransformer(28, 14, 32, 3, 2, 2.0, output_dim=16)
    config = LlamaConfig(
        vocab_size=1600,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        eos_token_id=2,
    )
    language = LlamaForCausalLM._from_config(config, attn_implementation=PACKED_ATTENTION)
    vlm = assemble_vlm(
        VisionEncoder(visual, -2, False, HALF),
        connector,
        options or {},
        language,
        Tokenizer.load(CHECKPOINT),
        CHAT_TEMPLATES["yi_vl"],
        512,
    )
    return vlm.train()


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


def make_batch(vlm: LoadedVLM, rows: list[list[Sample]]) -> PackedBatch:
    """Encode samples into the rows of one batch."""
    encoder = vlm.processor.sample_encoder()
    encoded = [[encoder.encode(sample) for sample in row] for row in rows]
    return collate(encoded, lambda image: vlm.processor.transform(image.open()))


def open_gates(vlm: LoadedVLM) -> LoadedVLM:
    """Open the gates of a connector that begins with closed ones."""
    for name, parameter in vlm.connector.named_parameters():
        if name.endswith("gate"):
            parameter.data.fill_(0.5)
    return vlm
