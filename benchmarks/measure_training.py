"""One measurement in a process of its own: a training, ours or the peer's, as a line of JSON.

    python benchmarks/measure_training.py ours part=chat micro=2048

`step.py` and `memory.py` call it; alone it is good for profiling. With `neighbour=1` another
process is busy all the time: on a machine of two cores it wants one of them.
"""

from __future__ import annotations

import contextlib
import json
import logging
import resource
import subprocess
import sys
import time
import warnings
from collections.abc import Iterator
from typing import Any

import benchmark_model
import torch
from benchmark_model import PackedSteps, make_conversations, random_pixels

from vlbench.config import recipe as recipes
from vlbench.config.schema import TrainerConfig
from vlbench.config.stage_schema import PartTrainConfig, StageConfig
from vlbench.data.optimizer_step import OptimizerStep
from vlbench.data.sample_encoding import EncodedSample
from vlbench.model.loaded_vlm import LoadedVLM
from vlbench.train.callbacks import StageCallback
from vlbench.train.stage_runner import StageRunner
from vlbench.train.training_module import VLMTrainingModule

NEIGHBOUR = "import os\nparent = os.getppid()\nwhile os.getppid() == parent: pass"
BATCH = 16  # conversations in an optimizer step
STEPS = 10
WARM = 2  # steps that are not counted
LR = 1e-4
TRAINED = {
    "chat": ("vision", "connector", "language"),
    "align": ("vision", "connector"),  # the language model is frozen
    "projector": ("connector",),  # so is the encoder
}
IMAGES = {"chat": benchmark_model.IMAGES, "align": (1, 1), "projector": (1, 1)}


class StepTimer(StageCallback):
    """Note when every step ends, its loss and its positions."""

    def __init__(self) -> None:
        self.times: list[float] = []
        self.losses: list[float] = []
        self.tokens: list[int] = []

    def on_step_end(self, training: VLMTrainingModule, step: OptimizerStep) -> None:
        """Note the step."""
        self.times.append(time.perf_counter())
        self.losses.append(training.report.loss)
        self.tokens.append((self.tokens or [0])[-1] + training.report.tokens)


def train_with_vlbench(
    vlm: LoadedVLM,
    samples: list[EncodedSample],
    part: str,
    micro: int,
    bf16: bool,
    known_features: bool,
    checkpointing_mode: str,
) -> StepTimer:
    """Train with vlbench; rows have at most `micro` positions. `known_features`: of the encoder.

    `checkpointing_mode` is what is recomputed.
    """
    recipe = recipes.load_recipe(["recipe=yivl_llava"])
    stage: StageConfig = recipe.stages["chat"].model_copy(
        update={
            "train": {name: PartTrainConfig(lr=LR) for name in TRAINED[part]},
            "grad_clip": 1.0,
            "warmup_ratio": 0.0,
            "schedule": "constant",
            "global_batch_size": BATCH,
        }
    )
    runner = StageRunner(
        trainer_config=TrainerConfig(),
        precision="bf16" if bf16 else "32",
        activation_checkpointing=checkpointing_mode,
        seed=0,
    )
    timer = StepTimer()
    with runner.prepare_stage(vlm.model, stage):
        pixels = random_pixels()
        features = None
        if known_features:
            with torch.no_grad():
                features = vlm.vision(pixels)
        steps: Any = PackedSteps(samples, BATCH, micro, pixels, features)
        runner.set_activation_checkpointing(vlm.model, steps)
        runner.train_stage(vlm.model, part, stage, steps, len(steps), callbacks=[timer])
    return timer


def train_with_trainer(
    vlm: LoadedVLM,
    samples: list[EncodedSample],
    part: str,
    micro: int,
    bf16: bool,
    grouped: bool,
    checkpointing_mode: str,
) -> Any:
    """Train with the Trainer, `micro` conversations at a time."""
    import transformers_trainer

    twin = transformers_trainer.export_to_transformers(vlm)
    parts = {"vision": "vision_tower", "connector": "projector", "language": "language_model"}
    for name, parameter in twin.named_parameters():
        head = "lm_head" in name
        parameter.requires_grad_(
            any(parts[one] in name or (one == "language" and head) for one in TRAINED[part])
        )
    return transformers_trainer.train(
        twin,
        samples,
        random_pixels(),
        BATCH,
        micro,
        LR,
        grouped,
        bf16,
        checkpointing_mode == "full",
    )


@contextlib.contextmanager
def busy_neighbour(is_wanted: bool) -> Iterator[None]:
    """Keep a process busy until the end of `with`."""
    if not is_wanted:
        yield
        return
    process = subprocess.Popen([sys.executable, "-c", NEIGHBOUR])
    try:
        yield
    finally:
        process.kill()
        process.wait()


def main() -> None:
    """Measure what the command line says, and print it."""
    side, *words = sys.argv[1:]
    given = dict(word.split("=") for word in words)
    part, micro = given.get("part", "chat"), int(given["micro"])
    bf16, way = given.get("bf16") == "true", given.get("activation_checkpointing", "none")
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    samples = make_conversations(BATCH * int(given.get("steps", STEPS)), IMAGES[part])
    vlm = benchmark_model.build_small_vlm()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    with busy_neighbour(given.get("neighbour") == "1"):
        if side == "ours":
            watch = train_with_vlbench(
                vlm, samples, part, micro, bf16, given.get("kept") == "true", way
            )
        else:
            watch = train_with_trainer(
                vlm, samples, part, micro, bf16, given.get("grouped") == "true", way
            )
    seconds = watch.times[-1] - watch.times[WARM - 1]
    tokens = watch.tokens[-1] - watch.tokens[WARM - 1]
    told = {
        "tokens_per_second": tokens / seconds,
        "seconds": seconds,
        "tokens": tokens,
        "losses": watch.losses,
        "peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "before": before,
    }
    print(json.dumps(told))


if __name__ == "__main__":
    main()
