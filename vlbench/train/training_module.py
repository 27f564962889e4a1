"""The LightningModule of a stage: one Lightning batch is one optimizer step of micro-batches."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, Self

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

from vlbench.compat.lightning_internals import is_ddp_trainer, trainer_device
from vlbench.config.schema import TrainerConfig
from vlbench.config.stage_schema import StageConfig
from vlbench.connector.base import Connector
from vlbench.data.optimizer_step import OptimizerStep, StepCounts
from vlbench.data.packing import PackedBatch
from vlbench.distributed import collectives
from vlbench.errors import UserError
from vlbench.model.contrastive_loss import add_contrast_pools
from vlbench.model.fsdp_wrapping import apply_fsdp, build_shard_mesh
from vlbench.model.replicated_parameters import clip_gradients, split_by_sharding
from vlbench.model.train_flops import StepFlops, count_step_flops
from vlbench.model.vlm import VLM
from vlbench.train.gradient_sync import (
    defer_gradient_sync,
    device_memory,
    put_gradients_into_buckets,
    reduces_once_per_step,
    whole_gradient_bytes,
    without_gradients,
)
from vlbench.train.lr_schedule import build_lr_scheduler
from vlbench.train.optimizer_state import restore_optimizer_state
from vlbench.train.step_report import SEEN_COUNTS, StepReport
from vlbench.train.step_sync import (
    all_reduce_counts,
    all_reduce_sum,
    pad_micro_batches,
    sync_lost_samples,
    sync_step,
)


class VLMTrainingModule(pl.LightningModule):
    """Train the parts of a `VLM` that a stage names.

    Optimization is manual: Lightning's gradient accumulation divides by a fixed count, whereas here
    the loss of an optimizer step is the sum over all supervised tokens of the global batch, divided
    by their number.

    A callback finds here `vlm`, `stage`, `steps_done` of `total_steps` (optimizer steps of this
    stage), and `report`, the `StepReport` of the newest step.
    """

    def __init__(
        self,
        vlm: VLM,
        stage: StageConfig,
        total_steps: int,
        steps_done: int,
        seed: int,
        optimizer_state: Mapping[str, Tensor] | None = None,
        seen: Mapping[str, int] | None = None,
        trainer_config: TrainerConfig | None = None,
    ) -> None:
        """Prepare to train from optimizer step `steps_done` to `total_steps`.

        Args:
            vlm: The model, its trained parts marked by `requires_grad`.
            stage: Objective, trained parts, learning rates and schedule.
            total_steps: Optimizer steps of the whole stage.
            steps_done: Optimizer steps of the stage that a checkpoint has already.
            seed: Fixes what is random inside of a step, together with the step's number.
            optimizer_state: State of the optimizer in that checkpoint, by `KEY.PARAMETER_NAME`.
            seen: The `SEEN_COUNTS` of what the run has trained on by then.
            trainer_config: How FSDP2 shards the model and when it reduces gradients.
        """
        super().__init__()
        self.automatic_optimization = False
        self.vlm, self.stage, self.seed = vlm, stage, seed
        self.total_steps, self.steps_done = total_steps, steps_done
        self.optimizer_state = optimizer_state
        # a checkpoint of a version that counted less goes on with what it has
        self.seen = dict(seen) if seen else dict.fromkeys(SEEN_COUNTS, 0)
        self.trainer_config = trainer_config or TrainerConfig()
        self.reduces_once = True
        """Whether a sharded model keeps whole gradients and reduces them once a step."""
        self.keeps_gradients = False
        """Whether gradients stay where they are between steps, set to zero: in DDP's buckets."""
        self.report = StepReport(steps_done)
        self.flops: StepFlops | None = None
        self.data_wait_seconds = 0.0
        """Seconds that the running step was waited for."""
        self._idle_since = 0.0

    def configure_model(self) -> None:
        """Count the FLOPs of a step, and shard the model if the strategy has a device mesh."""
        on_gpu = trainer_device(self.trainer).type == "cuda"
        if on_gpu and self.stage.objective == "language":  # MFU needs a peak, which no CPU has
            self.flops = count_step_flops(self.vlm)
        if self.device_mesh is not None:
            self._shard_model()

    def _shard_model(self) -> None:
        """Shard the model over the processes of the strategy."""
        device, config = trainer_device(self.trainer), self.trainer_config
        mesh = build_shard_mesh(device.type, config.shard_count)
        apply_fsdp(self.vlm, mesh, bf16=self.trainer.precision == "bf16-mixed")
        self.reduces_once = reduces_once_per_step(
            config.reduce_gradients,
            whole_gradient_bytes(self.vlm.parameters()),
            device_memory(device),
        )

    def configure_optimizers(self) -> tuple[list[torch.optim.Optimizer], list[LambdaLR]]:
        """Return AdamW and its learning-rate schedule.

        Every trained part is a parameter group; where some of its parameters are sharded and others
        are not, it is two.
        """
        stage = self.stage
        groups = [
            {
                "params": parameters,
                "lr": part.lr,
                "name": name,
                "weight_decay": part.weight_decay
                if part.weight_decay is not None
                else stage.weight_decay,
            }
            for name, part in stage.trained_parts.items()
            for parameters in split_by_sharding(
                [p for p in getattr(self.vlm, name).parameters() if p.requires_grad]
            )
        ]
        optimizer = torch.optim.AdamW(groups, betas=stage.adam_betas, fused=True)
        scheduler = build_lr_scheduler(
            optimizer, self.steps_done, self.total_steps, stage.warmup_ratio, stage.schedule
        )
        return [optimizer], [scheduler]

    def on_fit_start(self) -> None:
        """Restore the state of the optimizer from a checkpoint."""
        if self.optimizer_state is not None:
            restore_optimizer_state(self.vlm, self.trainer.optimizers[0], self.optimizer_state)
            self.optimizer_state = None

    def on_train_start(self) -> None:
        """Let gradients lie in DDP's buckets from the first step on; start the clock of waiting."""
        self.keeps_gradients = is_ddp_trainer(self.trainer)
        if self.keeps_gradients:
            put_gradients_into_buckets(self.trainer, self.vlm)
        self._idle_since = time.monotonic()

    def on_train_batch_start(self, batch: OptimizerStep, batch_idx: int) -> None:
        """Note how long the step was waited for."""
        self.data_wait_seconds = time.monotonic() - self._idle_since

    def on_train_batch_end(self, outputs: Any, batch: OptimizerStep, batch_idx: int) -> None:
        """Start the clock again; the callbacks have run by now."""
        self._idle_since = time.monotonic()

    def configure_callbacks(self) -> list[pl.Callback]:
        """Return what Lightning calls behind the callbacks of the Trainer."""
        return [_LeftoverState()]

    def cpu(self) -> Self:
        """Leave the model where it is: Lightning calls this after every stage.

        The next stage and the questions at the end need it on the same device.
        """
        return self

    def transfer_batch_to_device(
        self, batch: OptimizerStep, device: torch.device, _: int
    ) -> OptimizerStep:
        """Leave the step on the CPU: its micro-batches are loaded and moved one at a time."""
        return batch

    def training_step(self, step: OptimizerStep, _: int) -> None:
        """Run the micro-batches of a step, then clip gradients and update the weights once."""
        torch.manual_seed(hash((self.seed, step.index)) & 0x7FFFFFFF)
        optimizer: Any = self.optimizers()
        if self._needs_whole_step():
            started = time.monotonic()
            step.load_micro_batches()
            self.data_wait_seconds += time.monotonic() - started
        counts = sync_step(step)
        optimizer.zero_grad(set_to_none=not self.keeps_gradients)
        report = StepReport(
            self.steps_done, lr=max(group["lr"] for group in optimizer.param_groups)
        )
        report.count_step(counts)
        if counts.supervised_tokens:
            self._accumulate_gradients(step, counts, report, optimizer)
        if report.supervised_tokens:
            self._clip_and_update(optimizer, report)
        else:
            self._pass_over_update(optimizer)  # all samples were bad
        scheduler: Any = self.lr_schedulers()
        scheduler.step()
        self.steps_done += 1
        report.steps_done = self.steps_done
        self.seen = {name: count + getattr(report, name) for name, count in self.seen.items()}
        self.report = report

    def _needs_whole_step(self) -> bool:
        """Tell whether the losses of a micro-batch depend on all others of the step.

        The language loss needs the number of supervised tokens alone, which is known ahead.
        """
        connector = type(self.vlm.connector)
        has_own_losses = connector.losses is not Connector.losses
        counts_losses = connector.loss_counts is not Connector.loss_counts
        return self.stage.objective != "language" or has_own_losses or counts_losses

    def _measure_waiting(self, batches: Iterator[PackedBatch]) -> Iterator[PackedBatch]:
        """Yield micro-batches; add how long they were waited for to `data_wait_seconds`."""
        while True:
            started = time.monotonic()
            batch = next(batches, None)
            self.data_wait_seconds += time.monotonic() - started
            if batch is None:
                return
            yield batch

    def _accumulate_gradients(
        self, step: OptimizerStep, counts: StepCounts, report: StepReport, optimizer: Any
    ) -> None:
        """Add up the gradients of the loss per supervised token of the global batch."""
        world_size = collectives.world_size()
        known_bad_samples = len(step.bad_samples)
        loss_sum = zero = torch.zeros((), device=self.device)
        extra: dict[str, Tensor] = {}
        batches: Iterable[PackedBatch] = pad_micro_batches(
            self._measure_waiting(step.take_micro_batches()), counts.micro_batches
        )
        loss_counts: dict[str, int] = {}
        if self._needs_whole_step():
            batches = add_contrast_pools(self.vlm, list(batches))
            loss_counts = self._loss_counts(batches)
        for index, batch in enumerate(batches):
            is_last = index == counts.micro_batches - 1
            with contextlib.nullcontext() if is_last else self._defer_gradient_sync():
                out = self.vlm(batch.to(self.device))
                if index == 0 and isinstance(batches, list):
                    new_names = set(out.extra) - set(loss_counts)
                    loss_counts |= self._forward_loss_counts(batches, new_names)
                lm_loss = zero if out.loss_sum is None else out.loss_sum
                loss = lm_loss / counts.supervised_tokens
                for name, (value, _) in out.extra.items():
                    mean = value / max(1, self._require_loss_count(loss_counts, name))
                    loss = loss + mean
                    extra[name] = extra.get(name, 0) + mean.detach()
                self.manual_backward(loss * world_size)  # DDP and FSDP average over ranks
            loss_sum = loss_sum + lm_loss.detach()
        self._count_lost_samples(step, known_bad_samples, report, optimizer)
        # by the names that all processes agreed on: one may have no loss of a name
        report.extra = {name: all_reduce_sum(float(extra.get(name, 0))) for name in loss_counts}
        if self.stage.objective == "language":
            total = all_reduce_sum(float(loss_sum))
            report.loss = total / report.supervised_tokens if report.supervised_tokens else math.nan
        else:
            report.loss = sum(report.extra.values())

    def _count_lost_samples(
        self, step: OptimizerStep, known_bad_samples: int, report: StepReport, optimizer: Any
    ) -> None:
        """Correct what was counted ahead by the samples whose images could not be opened.

        The loss was divided by their supervised tokens as well; gradients are multiplied by what
        that was too much.
        """
        counts = sync_lost_samples(step, known_bad_samples)
        if counts is None:
            return
        planned_tokens = report.supervised_tokens
        report.count_step(counts)
        if not counts.supervised_tokens:
            optimizer.zero_grad(set_to_none=not self.keeps_gradients)
            return
        for parameter in _trained_parameters(optimizer):
            if parameter.grad is not None:
                parameter.grad.mul_(planned_tokens / counts.supervised_tokens)

    def _loss_counts(self, batches: Sequence[PackedBatch]) -> dict[str, int]:
        """Return the divisors of the connector's own losses that follow from the batches alone."""
        connector, objective = self.vlm.connector, self.stage.objective
        if type(connector).loss_counts is Connector.loss_counts:
            return {}
        return all_reduce_counts(connector.loss_counts(batch, objective) for batch in batches)

    def _forward_loss_counts(
        self, batches: Sequence[PackedBatch], loss_names: set[str]
    ) -> dict[str, int]:
        """Return the divisors of other losses of the connector, counted by forward passes.

        `loss_names` are those of this process' first micro-batch whose divisors are not known.
        """
        has_own_losses = type(self.vlm.connector).losses is not Connector.losses
        if not has_own_losses and self.stage.objective == "language":
            return {}
        if not all_reduce_sum(len(loss_names)):
            return {}
        with torch.no_grad():
            outs = [self.vlm(batch.to(self.device)).extra for batch in batches]
        torch.clear_autocast_cache()  # its copies of weights have no autograd graph
        counts = all_reduce_counts(
            {name: int(count) for name, (_, count) in out.items()} for out in outs
        )
        known_counts = self._loss_counts(batches)
        return {name: count for name, count in counts.items() if name not in known_counts}

    def _require_loss_count(self, counts: Mapping[str, int], loss_name: str) -> int:
        if loss_name not in counts:
            raise UserError(
                f"connector {type(self.vlm.connector).__name__}: the loss '{loss_name}' is missing "
                "in the first micro-batch of a step: give a sum and a count of 0 there, or name it "
                "in loss_counts()"
            )
        return counts[loss_name]

    def _clip_and_update(self, optimizer: Any, report: StepReport) -> None:
        """Clip gradients and update; if the loss or a gradient is not finite, change nothing."""
        max_norm = self.stage.grad_clip or math.inf
        report.grad_norm = clip_gradients(_trained_parameters(optimizer), max_norm)
        if math.isfinite(report.loss) and math.isfinite(report.grad_norm):
            optimizer.step()
        else:
            report.skipped = True
            self._pass_over_update(optimizer)

    def _pass_over_update(self, optimizer: Any) -> None:
        """Count a step that changes no weight: AdamW passes over parameters without gradient."""
        with without_gradients(_trained_parameters(optimizer)):
            optimizer.step()

    def _defer_gradient_sync(self) -> AbstractContextManager[Any]:
        return defer_gradient_sync(self.trainer, self.vlm, self.reduces_once)


def _trained_parameters(optimizer: Any) -> list[nn.Parameter]:
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


class _LeftoverState(pl.Callback):
    """Drops gradients and state of the optimizer when a stage ends, which nobody needs any more.

    Its last checkpoint has been written by then. Lightning would move both to the host.
    """

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Drop them at the regular end."""
        pl_module.zero_grad(set_to_none=True)
        for optimizer in trainer.optimizers:
            optimizer.state.clear()

    def on_exception(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException
    ) -> None:
        """Drop them before an error is reported, which would take as long otherwise."""
        self.on_train_end(trainer, pl_module)
