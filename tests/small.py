"""A small random model for tests: tower of 3 blocks, decoder of 3 layers, golden tokenizer."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from open_clip.transformer import VisionTransformer
from PIL import Image
from transformers import LlamaConfig, LlamaForCausalLM

from vlbench.connector import Connector
from vlbench.data.batch import Batch, collate
from vlbench.data.sample import PLACEHOLDER, Sample, Turn, encode
from vlbench.data.template import TEMPLATES
from vlbench.data.tokenizer import Tokenizer
from vlbench.model.attention import PACKED
from vlbench.model.vision import Tower
from vlbench.model.vlm import VLM

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
"""Options of connectors whose defaults are too large for a picture of 2 x 2 patches."""


@dataclass(frozen=True)
class Noise:
    """A picture of noise that only its seed decides."""

    seed: int

    @property
    def name(self) -> str:
        return f"noise {self.seed}"

    def open(self) -> Image.Image:
        values = torch.randint(
            0, 255, (28, 28, 3), generator=torch.Generator().manual_seed(self.seed)
        )
        return Image.fromarray(values.byte().numpy())


def small_vlm(connector: type[Connector], options: dict[str, Any] | None = None) -> VLM:
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
    language = LlamaForCausalLM._from_config(config, attn_implementation=PACKED)
    vlm = VLM(
        Tower(visual, -2, False, HALF),
        connector,
        options or {},
        language,
        Tokenizer.load(CHECKPOINT),
        TEMPLATES["yi_vl"],
        512,
    )
    return vlm.train()


def sample(number: int, images: int = 1, words: int = 5) -> Sample:
    """Make a conversation of two answers; its length grows with `words`."""
    tags = f"{PLACEHOLDER}\n" * images
    turns = (
        Turn("human", f"{tags}question {number} " + "word " * words),
        Turn("assistant", f"answer {number} " + "and " * words),
        Turn("human", "more?"),
        Turn("assistant", f"no {number}"),
    )
    return Sample(f"s{number}", turns, tuple(Noise(10 * number + k) for k in range(images)))


def batch_of(vlm: VLM, rows: list[list[Sample]]) -> Batch:
    """Encode samples into the rows of one batch."""
    per_image = vlm.connector.tokens_per_image
    encoded = [
        [encode(one, vlm.template, vlm.tokenizer, per_image, vlm.max_length) for one in row]
        for row in rows
    ]
    return collate(encoded, lambda picture: vlm.transform(picture.open()))


def opened(vlm: VLM) -> VLM:
    """Open the gates of a connector that begins with closed ones."""
    for name, parameter in vlm.connector.named_parameters():
        if name.endswith("gate"):
            parameter.data.fill_(0.5)
    return vlm
