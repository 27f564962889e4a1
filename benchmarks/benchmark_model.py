"""Yi-VL-6B at a thousandth of its size, and conversations of the lengths that people train on.

The language model keeps what decides ratios: the share of the vocabulary's projection in the
parameters (4.5 % as in Yi-6B), grouped queries, the proportion of the MLP. The encoder is a ninth
of it, as ViT-H is of Yi-6B. Weights are random: nothing here learns anything.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset
from transformers import LlamaConfig, LlamaForCausalLM

from vlbench.connector import registry
from vlbench.data.chat_template import CHAT_TEMPLATES
from vlbench.data.optimizer_step import LoadedRow, OptimizerStep, RowPlan, StepPlan
from vlbench.data.packing import collate, pack_samples
from vlbench.data.sample import LazyImage, Sample
from vlbench.data.sample_encoding import IGNORE_INDEX, IMAGE_TOKEN_INDEX, EncodedSample
from vlbench.data.tokenizer import Tokenizer
from vlbench.model.language_model import SHARED_YI_CONFIG, TINY_LANGUAGE_FOLDER
from vlbench.model.loaded_vlm import LoadedVLM, assemble_vlm
from vlbench.model.packed_attention import PACKED_ATTENTION
from vlbench.model.vision_encoder import VisionEncoder
from vlbench.model.weights import clip_layouts

WIDTH, LAYERS, VOCABULARY = 256, 8, 1000
IMAGE_SIZE, PATCH = 112, 14
LOG_MEAN, LOG_SIGMA, SHORTEST, LONGEST = 4.8, 0.8, 24, 1024  # tokens of text in a conversation
SUPERVISED = (0.2, 0.8)  # share of the text that is answers
IMAGES = (0, 3)  # of a conversation
IMAGE_COUNT = 64  # different ones


def build_small_vlm(seed: int = 0) -> LoadedVLM:
    """Return the small model with LLaVA's plain projector, which both sides have."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        hidden_size=WIDTH,
        num_hidden_layers=LAYERS,
        num_attention_heads=8,
        num_key_value_heads=1,
        intermediate_size=WIDTH * 11008 // 4096,
        **{**SHARED_YI_CONFIG, "vocab_size": VOCABULARY},
    )
    language = LlamaForCausalLM(config)
    language.set_attn_implementation(PACKED_ATTENTION)
    encoder = {
        "hidden_size": 96,
        "intermediate_size": 384,
        "num_hidden_layers": 6,
        "num_attention_heads": 3,
        "image_size": IMAGE_SIZE,
        "patch_size": PATCH,
        "hidden_act": "gelu",
    }
    visual = clip_layouts.build_clip_vit(encoder)
    for parameter in visual.parameters():
        if parameter.dim() > 1:
            nn.init.normal_(parameter, std=0.02)
    return assemble_vlm(
        VisionEncoder(visual, -2, False, {"mean": (0.5,) * 3, "std": (0.25,) * 3}),
        registry.load_connector("llava_mlp"),
        {"norm": False, "depth": 2},
        language,
        Tokenizer.load(TINY_LANGUAGE_FOLDER),
        CHAT_TEMPLATES["yi_vl"],
        4096,
    )


@dataclass(frozen=True)
class NumberedImage:
    """An image that is only a number; its pixels are in `pixels`."""

    number: int

    @property
    def name(self) -> str:
        """Name it."""
        return f"image {self.number}"

    def open(self) -> None:
        """Refuse: the pixels are made already."""
        raise NotImplementedError


def random_pixels(seed: int = 0) -> Tensor:
    """Return the pixels of all images, `[IMAGE_COUNT, 3, IMAGE_SIZE, IMAGE_SIZE]`."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(IMAGE_COUNT, 3, IMAGE_SIZE, IMAGE_SIZE, generator=generator)


def make_conversations(
    count: int,
    images: tuple[int, int] = IMAGES,
    seed: int = 0,
    per_image: int = (IMAGE_SIZE // PATCH) ** 2,
    vocabulary: int = VOCABULARY,
) -> list[EncodedSample]:
    """Return conversations as token ids: images first, then text, the answers at its end."""
    generator = torch.Generator().manual_seed(seed)
    found = []
    for number in range(count):
        drawn = torch.randn(1, generator=generator).item()
        length = round(min(max(math.exp(LOG_MEAN + LOG_SIGMA * drawn), SHORTEST), LONGEST))
        low, high = SUPERVISED
        share = low + (high - low) * torch.rand(1, generator=generator).item()
        shown = int(torch.randint(images[0], images[1] + 1, (1,), generator=generator))
        text = torch.randint(3, vocabulary, (length,), generator=generator).tolist()
        image_numbers = [(number * IMAGES[1] + place) % IMAGE_COUNT for place in range(shown)]
        answer = max(1, round(length * share))
        found.append(encode_conversation(str(number), text, answer, image_numbers, per_image))
    return found


def encode_conversation(
    name: str, text: list[int], answer: int, image_numbers: list[int], per_image: int
) -> EncodedSample:
    """Return images, by number, and then a text of which the last `answer` ids are learned."""
    ids = [IMAGE_TOKEN_INDEX] * (per_image * len(image_numbers)) + text
    labels = [IGNORE_INDEX] * (len(ids) - answer - 1) + text[-answer:] + [IGNORE_INDEX]
    shown: tuple[LazyImage, ...] = tuple(map(NumberedImage, image_numbers))  # type: ignore[arg-type]
    return EncodedSample(ids, labels, Sample(name, (), shown), per_image)


class PackedSteps(Dataset[OptimizerStep]):
    """Steps of `batch` conversations each, packed into rows of at most `max_tokens_per_row`."""

    def __init__(
        self,
        samples: list[EncodedSample],
        batch: int,
        max_tokens_per_row: int,
        image_pixels: Tensor,
        features: Tensor | None = None,
    ) -> None:
        """Show `image_pixels`, by image; or `features` of a frozen encoder, where it has run."""
        self.samples, self.batch, self.max_tokens_per_row = samples, batch, max_tokens_per_row
        self.image_pixels, self.features = image_pixels, features

    def __len__(self) -> int:
        return len(self.samples) // self.batch

    def __getitem__(self, index: int) -> OptimizerStep:
        """Make step `index` with all of its micro-batches."""
        rows = [self.load_row(row) for row in self.plan_step(index).rows]
        return OptimizerStep(index, [row.batch for row in rows if row.batch is not None])

    def plan_step(self, index: int) -> StepPlan:
        """Plan step `index`."""
        if not 0 <= index < len(self):
            raise IndexError(index)
        start = index * self.batch
        some = self.samples[start : start + self.batch]
        rows = []
        for row in pack_samples(some, self.max_tokens_per_row):
            image_count = sum(len(some[place].sample.images) for place in row)
            plan = RowPlan(
                stream_index=[start + place for place in row],
                sample_lengths=[len(some[place].input_ids) for place in row],
                image_count=image_count,
                view_count=image_count,
                supervised_token_count=sum(some[place].supervised_token_count for place in row),
            )
            rows.append(plan)
        return StepPlan(index, rows)

    def load_row(self, row: RowPlan) -> LoadedRow:
        """Make the micro-batch of a planned row."""
        chosen = [self.samples[place] for place in row.stream_index]
        batch = collate([chosen], lambda image: self.image_pixels[image.number])  # type: ignore[attr-defined]
        if self.features is not None:
            numbers = [p.number for one in chosen for p in one.sample.images]  # type: ignore[attr-defined]
            batch = dataclasses.replace(batch, features=self.features[numbers])
        return LoadedRow(batch)
