"""Training one stage with Lightning: for fit, the dry run, cost probes and benchmarks alike."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import lightning.pytorch as pl
import torch
from lightning.pytorch.loggers import Logger
from torch import Tensor

from vlbench.compat.lightning_internals import detach_callbacks, trainer_device
from vlbench.config.schema import Recipe, TrainerConfig
from vlbench.config.stage_schema import StageConfig
from vlbench.core_sharing import share_cores
from vlbench.data.batch_sampler import StepDataset
from vlbench.data.optimizer_step import StepSource
from vlbench.data.step_loader import StepLoader
from vlbench.distributed import collectives
from vlbench.distributed.process_group import is_fsdp_sharded
from vlbench.model.compile_blocks import CompiledBlocks
from vlbench.model.frozen_bf16 import FrozenBF16
from vlbench.model.loaded_vlm import LoadedVLM
from vlbench.model.vlm import VLM
from vlbench.train import run_report
from vlbench.train.auto_checkpointing import set_activation_checkpointing
from vlbench.train.feature_cache import cache_features
from vlbench.train.lightning_trainer import build_trainer, explain_stage_errors, root_device
from vlbench.train.row_length import choose_row_tokens, gpu_memory_limit
from vlbench.train.trainable_parts import freeze_untrained_parts
from vlbench.train.training_module import VLMTrainingModule


@dataclass(frozen=True, kw_only=True)
class StageRunner:
    """Trains stages, all on the same devices and in the same precision.

    with runner.prepare_stage(vlm, stage):
        runner.set_activation_checkpointing(vlm, steps)
        runner.train_stage(vlm, name, stage, steps, total_steps)
    """

    trainer_config: TrainerConfig
    precision: str
    """`32` or `bf16` (mixed precision)."""
    activation_checkpointing: str
    """none, selective, full or auto."""
    seed: int
    profile_folder: Path | None = None
    """Where a profiler trace of some steps is written, if anywhere."""

    @classmethod
    def from_recipe(cls, recipe: Recipe, profile_folder: Path | None = None) -> StageRunner:
        """Return what trains the stages of a recipe."""
        return cls(
            trainer_config=recipe.trainer,
            precision=recipe.precision,
            activation_checkpointing=recipe.activation_checkpointing,
            seed=recipe.seed,
            profile_folder=profile_folder if recipe.profile else None,
        )

    @property
    def compiles_blocks(self) -> bool:
        """True if blocks are compiled; `auto`, which only a run settles, is not."""
        return self.trainer_config.compile is True

    @property
    def is_sharded(self) -> bool:
        """True if every process holds a shard of the model while it is trained."""
        return is_fsdp_sharded(self.trainer_config)

    @cached_property
    def device(self) -> torch.device:
        """The device that this process trains on; Lightning is asked for it once."""
        return root_device(self.trainer_config)

    def hold_frozen_bf16(self, vlm: VLM) -> FrozenBF16:
        """Hold frozen weights in bfloat16 where autocast rounds them so; shards need one dtype."""
        return FrozenBF16(vlm, self.precision == "bf16" and not self.is_sharded)

    @contextlib.contextmanager
    def prepare_stage(self, vlm: VLM, stage: StageConfig) -> Iterator[None]:
        """Freeze what a stage does not train; frozen weights are float32 again after `with`."""
        torch.manual_seed(self.seed)  # of parameters that the stage adds, as LoRA adapters
        freeze_untrained_parts(vlm, stage)
        frozen_weights = self.hold_frozen_bf16(vlm)
        yield
        frozen_weights.restore_float32()

    def choose_row_tokens(self, vlm: VLM) -> int:
        """Return the tokens of a packed row of a prepared stage, the same in all processes."""
        shards = self.trainer_config.shard_count if self.is_sharded else 1
        own_choice = choose_row_tokens(
            vlm,
            gpu_memory_limit(self.device),
            self.activation_checkpointing,
            bf16=self.precision == "bf16",
            shards=shards,
        )
        return int(collectives.all_gather_numbers([own_choice]).min())

    def set_activation_checkpointing(self, vlm: VLM, steps: StepDataset) -> str:
        """Set what the backward passes of a prepared stage recompute, and return the mode."""
        return set_activation_checkpointing(
            vlm,
            steps,
            self.device,
            self.activation_checkpointing,
            bf16=self.precision == "bf16",
            is_sharded=self.is_sharded,
            is_compiled=self.compiles_blocks,
        )

    def cache_features(
        self, vlm: LoadedVLM, steps: StepDataset, num_workers: int, should_stop: Callable[[], bool]
    ) -> None:
        """Let `steps` read the features of a frozen encoder from `trainer.feature_cache`.

        A sharded stage does without: its processes gather the encoder's blocks together, and a
        micro-batch without features (text alone, or empty) runs them in one process and not in
        another.
        """
        if self.trainer_config.feature_cache is None:
            return
        if self.is_sharded:
            run_report.print_status(
                "trainer.feature_cache is not used: with fsdp2 the processes share the vision "
                "encoder, and each must run it in every micro-batch; ddp uses the cache"
            )
            return
        folder = Path(self.trainer_config.feature_cache)
        trainer = build_trainer(self.trainer_config, self.precision)
        with share_cores(self.device):
            steps.feature_store = cache_features(
                vlm, steps, folder, trainer, num_workers, should_stop
            )

    def train_stage(
        self,
        vlm: VLM,
        stage_name: str,
        stage: StageConfig,
        steps: StepSource,
        total_steps: int,
        *,
        steps_done: int = 0,
        step_numbers: Sequence[int] | None = None,
        optimizer_state: Mapping[str, Tensor] | None = None,
        seen: Mapping[str, int] | None = None,
        callbacks: Sequence[pl.Callback] = (),
        loggers: Sequence[Logger] = (),
        num_workers: int = 0,
    ) -> VLMTrainingModule:
        """Train a prepared stage to its end, or until a callback stops it.

        Args:
            vlm: The model, prepared by `prepare_stage`.
            stage_name: Names the stage in messages.
            stage: Learning rates, schedule and objective.
            steps: The optimizer steps, by number.
            total_steps: How many the stage has.
            steps_done: How many are done already.
            step_numbers: Which of `steps` are taken; None for those from `steps_done` on.
            optimizer_state: State of the optimizer in the checkpoint after `steps_done` steps.
            seen: The `SEEN_COUNTS` of what the run has trained on by then.
            callbacks: Lightning callbacks, called in this order.
            loggers: Where Lightning logs to.
            num_workers: Processes that load micro-batches, beside one that plans steps; 0 for
                this one.

        Returns:
            The Lightning module, which has the report of the last step.

        """
        module = VLMTrainingModule(
            vlm,
            stage,
            total_steps,
            steps_done,
            self.seed,
            optimizer_state,
            seen,
            self.trainer_config,
        )
        trainer = build_trainer(
            self.trainer_config, self.precision, loggers, callbacks, self.profile_folder
        )
        loader = StepLoader(
            steps=steps,
            step_numbers=step_numbers or range(steps_done, total_steps),
            num_workers=num_workers,
            pin_memory=trainer_device(trainer).type == "cuda",
        )
        compiled = CompiledBlocks(vlm, self.compiles_blocks)
        with compiled, explain_stage_errors(stage_name, stage), share_cores(self.device):
            trainer.fit(module, loader)
        detach_callbacks(trainer)
        return module
