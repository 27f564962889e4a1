"""What users would take instead: Hugging Face's Trainer with `LlavaForConditionalGeneration`.

The peer at its best: sdpa, fused AdamW, conversations that are token ids already, pixels that are
made already, batches padded to their longest.
"""

from __future__ import annotations

import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import LlavaForConditionalGeneration, Trainer, TrainerCallback, TrainingArguments

from vlbench.data.sample_encoding import IGNORE_INDEX, IMAGE_TOKEN_INDEX, EncodedSample
from vlbench.model.loaded_vlm import LoadedVLM
from vlbench.model.weights.export_hf_llava import build_llava_config, write_hf_llava


def export_to_transformers(vlm: LoadedVLM) -> Any:
    """Return the same model, weight for weight, as transformers has it."""
    with tempfile.TemporaryDirectory() as folder:
        write_hf_llava(vlm, Path(folder), None)
        return LlavaForConditionalGeneration.from_pretrained(folder, attn_implementation="sdpa")


def build_random_llava(vlm: LoadedVLM, device: torch.device) -> Any:
    """Return a model of the same shapes with random weights, made on `device`."""
    image_id = vlm.language.config.vocab_size
    config = build_llava_config(vlm.model, image_id, image_id + 64)  # products like multiples of 64
    with device:
        return LlavaForConditionalGeneration(config)


def trainer_examples(samples: list[EncodedSample], image_id: int) -> list[dict[str, Any]]:
    """Return conversations as the Trainer takes them; labels are shifted by the model itself."""
    found = []
    for one in samples:
        ids = [image_id if token == IMAGE_TOKEN_INDEX else token for token in one.input_ids]
        labels = [IGNORE_INDEX, *one.labels[:-1]]
        numbers = [image.number for image in one.sample.images]  # type: ignore[attr-defined]
        found.append({"input_ids": ids, "labels": labels, "images": numbers})
    return found


class PaddingCollator:
    """Pad a batch to its longest conversation."""

    def __init__(self, image_pixels: Tensor) -> None:
        """Show `image_pixels`, by image."""
        self.image_pixels = image_pixels

    def __call__(self, batch: list[dict[str, Any]]) -> dict[str, Tensor]:
        """Return what the model takes."""
        longest = max(len(one["input_ids"]) for one in batch)

        def pad_column(key: str, value: int) -> Tensor:
            return torch.tensor([one[key] + [value] * (longest - len(one[key])) for one in batch])

        numbers = [number for one in batch for number in one["images"]]
        ids = pad_column("input_ids", 0)
        lengths = torch.tensor([len(one["input_ids"]) for one in batch])
        made = {
            "input_ids": ids,
            "labels": pad_column("labels", IGNORE_INDEX),
            "attention_mask": (torch.arange(longest)[None] < lengths[:, None]).long(),
        }
        if numbers:
            made["pixel_values"] = self.image_pixels[numbers]
        return made


class TrainerStepTimer(TrainerCallback):
    """Note when every step ends, its loss, and the positions that were read before it ended."""

    def __init__(self) -> None:
        self.times: list[float] = []
        self.losses: list[float] = []
        self.tokens: list[int] = []
        self.tokens_read = 0

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Note the time."""
        self.times.append(time.perf_counter())
        self.tokens.append(self.tokens_read)

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        """Note the loss."""
        if logs and "loss" in logs:
            self.losses.append(logs["loss"])


class TokenCountingTrainer(Trainer):
    """The Trainer, with a count of real positions: padding is none."""

    step_timer: TrainerStepTimer

    def training_step(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        """Count, and train as always."""
        self.step_timer.tokens_read += int(inputs["attention_mask"].sum())
        return super().training_step(model, inputs, *args, **kwargs)


def train(
    model: Any,
    samples: list[EncodedSample],
    image_pixels: Tensor,
    batch: int,
    micro: int,
    lr: float,
    grouped: bool,
    bf16: bool,
    checkpointing: bool,
) -> TrainerStepTimer:
    """Train on all samples in steps of `batch`, `micro` at a time; return what was noted."""
    watch = TrainerStepTimer()
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            output_dir=folder,
            per_device_train_batch_size=micro,
            gradient_accumulation_steps=batch // micro,
            max_steps=len(samples) // batch,
            learning_rate=lr,
            lr_scheduler_type="constant",
            weight_decay=0.0,
            max_grad_norm=1.0,
            optim="adamw_torch_fused",
            bf16=bf16,
            use_cpu=not torch.cuda.is_available(),
            gradient_checkpointing=checkpointing,
            train_sampling_strategy="group_by_length" if grouped else "sequential",
            logging_steps=1,
            save_strategy="no",
            report_to=[],
            remove_unused_columns=False,
            disable_tqdm=True,
            dataloader_num_workers=0,
            seed=0,
        )
        rows = trainer_examples(samples, model.config.image_token_index)
        trainer = TokenCountingTrainer(
            model=model,
            args=arguments,
            train_dataset=rows,
            data_collator=PaddingCollator(image_pixels),
        )
        trainer.step_timer = watch
        trainer.add_callback(watch)
        trainer.train()
    return watch
