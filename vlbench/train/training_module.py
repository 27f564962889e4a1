"""The LightningModule: one Lightning batch is one optimizer step of several micro-batches."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor, nn

from vlbench.compat.lightning_internals import trainer_device, without_gradient_sync
from vlbench.config.schema import PartTrainConfig, StageConfig
from vlbench.connector.base import Connector
from vlbench.data.batch_sampler import OptimizerStep
from vlbench.data.packing import PackedBatch
from vlbench.distributed import collectives
from vlbench.errors import UserError, suggest_name
from vlbench.model import lora_adapters
from vlbench.model.contrastive_loss import add_contrast_pools
from vlbench.model.fsdp_wrapping import apply_fsdp
from vlbench.model.replicated_parameters import clip_gradients, split_by_sharding
from vlbench.model.train_flops import StepFlops, count_step_flops
from vlbench.model.vlm import VLM
from vlbench.train.optimizer_state import restore_optimizer_state
from vlbench.train.step_sync import SyncedStep, all_reduce_counts, all_reduce_sum, sync_step

SEEN_COUNTS = ("samples", "images", "tokens")
"""What is counted over a whole run, of a `StepReport`."""


@dataclass
class StepReport:
    """What one optimizer step did; numbers are of the global batch."""

    steps_done: int
    """Steps of the stage that are done, this one included."""
    loss: float = math.nan
    """Loss per supervised token."""
    grad_norm: float = math.nan
    """Norm of all gradients before clipping."""
    lr: float = 0.0
    """Highest learning rate of the step."""
    tokens: int = 0
    """Positions read, image places included, padding not."""
    images: int = 0
    samples: int = 0
    extra: dict[str, float] = field(default_factory=dict)
    """The connector's own losses."""
    skipped: bool = False
    """True when the loss or a gradient was not finite and nothing was changed."""


def learning_rate_factor(step: int, total_steps: int, warmup_ratio: float, schedule: str) -> float:
    """Return the share of the peak learning rate at `position` (0 is the first step).

    Linear warm-up over the share `warmup` of the steps, then a half cosine to 0, or constant.
    """
    rising = max(1, round(total_steps * warmup_ratio)) if warmup_ratio else 0
    if step < rising:
        return (step + 1) / rising
    if schedule == "constant":
        return 1.0
    return 0.5 * (1 + math.cos(math.pi * (step - rising) / max(1, total_steps - rising)))


def check_objective(vlm: VLM, stage_name: str, stage: StageConfig) -> None:
    """Refuse an objective that the connector does not offer, or that the stage does not fit."""
    offered = ("language", *vlm.connector.objectives())
    if stage.objective not in offered:
        raise UserError(
            f"stages.{stage_name}.objective is '{stage.objective}'; this connector offers "
            f"{', '.join(offered)}.{suggest_name(stage.objective, offered)}"
        )
    if stage.objective == "language":
        return
    if stage.sample_format != "caption":
        raise UserError(
            f"stages.{stage_name}.sample_format is '{stage.sample_format}'; objective "
            f"{stage.objective} learns from "
            "pictures and captions: sample_format=caption"
        )
    if "language" in stage.trained_parts:
        raise UserError(
            f"stages.{stage_name}.train.language: objective {stage.objective} leaves the "
            "language model "
            f"out, so it cannot be trained: stages.{stage_name}.train.language=null"
        )


def freeze_untrained_parts(vlm: VLM, stage: StageConfig) -> None:
    """Make the model ready for a stage: exactly the parts that it names require gradients."""
    vlm.set_objective(stage.objective)
    for name, part in vlm.named_parts():
        how = stage.trained_parts.get(name)
        if how is not None and how.lora is not None:
            lora_adapters.add_adapters(part, f"train.{name}", **asdict(how.lora))
        elif how is not None:
            lora_adapters.merge_adapters(part)
        part.requires_grad_(False)
        for parameter in trained_parameters(vlm, name, how):
            parameter.requires_grad_(True)
    vlm.train()


def trained_parameters(
    vlm: VLM, part_name: str, train_config: PartTrainConfig | None
) -> list[nn.Parameter]:
    """Return the parameters of part `name` that are trained `how`; [] for a frozen part."""
    if train_config is None:
        return []
    part = getattr(vlm, part_name)
    used = vlm.vision.used_parameters() if part_name == "vision" else list(part.parameters())
    if train_config.lora is None:
        return used
    adapters = {id(parameter) for parameter in lora_adapters.adapter_parameters(part).values()}
    return [parameter for parameter in used if id(parameter) in adapters]


class StageCallback:
    """Something that looks on while a stage trains; every method may be left out."""

    def on_stage_start(self, training: VLMTrainingModule) -> None:
        """Called before the first step."""

    def on_step_end(self, training: VLMTrainingModule, step: OptimizerStep) -> None:
        """Called after every optimizer step; `training.report` says how it went."""

    def on_stage_end(self, training: VLMTrainingModule) -> None:
        """Called after the last step, or when training is stopped."""


class VLMTrainingModule(pl.LightningModule):
    """Train the parts of a `VLM` that a stage names.

    Optimisation is manual: Lightning's accumulation divides by a fixed count, whereas here the loss
    of a step is the sum over the supervised tokens divided by their number in the global batch.
    """

    def __init__(
        self,
        vlm: VLM,
        stage: StageConfig,
        total_steps: int,
        steps_done: int,
        seed: int,
        stage_callbacks: Sequence[StageCallback] = (),
        optimizer_state: Mapping[str, Tensor] | None = None,
        seen: Mapping[str, int] | None = None,
    ) -> None:
        """Train `vlm` from `position` to `steps`; `seed` fixes what is random inside a step.

        `optimizer_state` is what a checkpoint at `position` holds, `seen` what the run has learned
        from by then.
        """
        super().__init__()
        self.seen = {name: 0 for name in SEEN_COUNTS} | dict(seen or {})
        self.stage_callbacks, self.optimizer_state = stage_callbacks, optimizer_state
        self.automatic_optimization = False
        self.vlm, self.stage = vlm, stage
        self.total_steps, self.steps_done, self.seed = total_steps, steps_done, seed
        self.report = StepReport(steps_done)
        self.flops: StepFlops | None = None
        self.data_wait_seconds = self._idle_since = (
            0.0  # seconds for the running step, and since when
        )

    def configure_model(self) -> None:
        """Count what a step takes, and shard the model where the strategy has a mesh."""
        on_gpu = trainer_device(self.trainer).type == "cuda"
        if on_gpu and self.stage.objective == "language":  # nobody knows a processor's peak
            self.flops = count_step_flops(self.vlm)
        if self.device_mesh is not None:
            half = self.trainer.precision == "bf16-mixed"
            apply_fsdp(self.vlm, self.device_mesh["data_parallel"], half)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Return AdamW with one group per trained part; what is not sharded is apart."""
        groups = [
            {
                "params": some,
                "lr": part.lr,
                "peak": part.lr,
                "name": name,
                "weight_decay": part.weight_decay
                if part.weight_decay is not None
                else self.stage.weight_decay,
            }
            for name, part in self.stage.trained_parts.items()
            for some in split_by_sharding(
                [p for p in getattr(self.vlm, name).parameters() if p.requires_grad]
            )
        ]
        return torch.optim.AdamW(groups, betas=self.stage.adam_betas, fused=True)

    def on_fit_start(self) -> None:
        """Give the optimizer its state back."""
        if self.optimizer_state is not None:
            restore_optimizer_state(self.vlm, self.trainer.optimizers[0], self.optimizer_state)
            self.optimizer_state = None

    def on_train_start(self) -> None:
        """Let the watchers begin."""
        for watcher in self.stage_callbacks:
            watcher.on_stage_start(self)
        self._idle_since = time.monotonic()

    def on_train_batch_start(self, batch: OptimizerStep, batch_idx: int) -> None:
        """Note how long the step was waited for."""
        self.data_wait_seconds = time.monotonic() - self._idle_since

    def on_train_batch_end(self, outputs: Any, batch: OptimizerStep, batch_idx: int) -> None:
        """Let the watchers look at the step."""
        for watcher in self.stage_callbacks:
            watcher.on_step_end(self, batch)
        self._idle_since = time.monotonic()

    def on_train_end(self) -> None:
        """Let the watchers end."""
        for watcher in self.stage_callbacks:
            watcher.on_stage_end(self)

    def transfer_batch_to_device(
        self, batch: OptimizerStep, device: torch.device, _: int
    ) -> OptimizerStep:
        """Leave the step where it is: micro-batches travel one by one."""
        return batch

    def training_step(self, step: OptimizerStep, _: int) -> None:
        """Run the micro-batches of a step, then clip and update once."""
        torch.manual_seed(hash((self.seed, step.index)) & 0x7FFFFFFF)
        optimizer: Any = self.optimizers()
        plan = sync_step(step)
        report = self._begin_optimizer_step(plan, optimizer)
        if plan.supervised_tokens:
            self._accumulate_gradients(plan, report)
            self._clip_and_update(optimizer, report)
        else:
            optimizer.step()  # no sample survived: counts the position, changes nothing
        self.steps_done += 1
        report.steps_done = self.steps_done
        self.seen = {name: count + getattr(report, name) for name, count in self.seen.items()}
        self.report = report

    def _begin_optimizer_step(self, synced_step: SyncedStep, optimizer: Any) -> StepReport:
        factor = learning_rate_factor(
            self.steps_done, self.total_steps, self.stage.warmup_ratio, self.stage.schedule
        )
        for group in optimizer.param_groups:
            group["lr"] = group["peak"] * factor
        optimizer.zero_grad(set_to_none=True)
        return StepReport(
            self.steps_done,
            lr=max(group["lr"] for group in optimizer.param_groups),
            tokens=synced_step.tokens,
            images=synced_step.images,
            samples=synced_step.samples,
        )

    def _accumulate_gradients(self, synced_step: SyncedStep, report: StepReport) -> None:
        """Add up gradients of the loss per supervised token of the global batch."""
        world = collectives.world_size()
        loss_sum = nothing = torch.zeros((), device=self.device)
        extra: dict[str, Tensor] = {}
        batches = add_contrast_pools(self.vlm, synced_step.micro_batches)
        counts = self._loss_counts(batches)
        for number, batch in enumerate(batches):
            with self._gradient_sync(number == len(batches) - 1):
                out = self.vlm(batch.to(self.device))
                if number == 0:
                    counts |= self._forward_loss_counts(batches, set(out.extra) - set(counts))
                lm_loss = nothing if out.loss_sum is None else out.loss_sum
                loss = lm_loss / synced_step.supervised_tokens
                for name, (value, _) in out.extra.items():
                    share = value / max(1, self._require_loss_count(counts, name))
                    loss = loss + share
                    extra[name] = extra.get(name, 0) + share.detach()
                self.manual_backward(loss * world)  # DDP and FSDP average over ranks
            loss_sum = loss_sum + lm_loss.detach()
        report.extra = {name: all_reduce_sum(float(value)) for name, value in extra.items()}
        own = self.stage.objective != "language"
        report.loss = (
            sum(report.extra.values())
            if own
            else all_reduce_sum(float(loss_sum)) / synced_step.supervised_tokens
        )

    def _loss_counts(self, batches: Sequence[PackedBatch]) -> dict[str, int]:
        """Return what the connector's own losses are divided by, where the step alone tells it."""
        connector, objective = self.vlm.connector, self.stage.objective
        if type(connector).loss_counts is Connector.loss_counts:
            return {}
        return all_reduce_counts(connector.loss_counts(batch, objective) for batch in batches)

    def _forward_loss_counts(
        self, batches: Sequence[PackedBatch], loss_names: set[str]
    ) -> dict[str, int]:
        """Return what losses that `counts` does not name are divided by: all forward passes tell.

        `names` are those of the first micro-batch of this process.
        """
        usual = type(self.vlm.connector).losses is Connector.losses
        if (usual and self.stage.objective == "language") or not all_reduce_sum(len(loss_names)):
            return {}
        with torch.no_grad():
            outs = [self.vlm(batch.to(self.device)).extra for batch in batches]
        torch.clear_autocast_cache()  # its copies of weights were made without a graph
        counts = all_reduce_counts({n: int(count) for n, (_, count) in out.items()} for out in outs)
        known = self._loss_counts(batches)
        return {name: count for name, count in counts.items() if name not in known}

    def _require_loss_count(self, counts: Mapping[str, int], loss_name: str) -> int:
        if loss_name not in counts:
            raise UserError(
                f"connector {type(self.vlm.connector).__name__}: the loss '{loss_name}' is "
                "missing in "
                "the first micro-batch of a step: give a sum and a count of 0 there, or name it in "
                "loss_counts()"
            )
        return counts[loss_name]

    def _clip_and_update(self, optimizer: Any, report: StepReport) -> None:
        """Clip and step; a loss or gradient that is not finite changes nothing."""
        trained = [p for group in optimizer.param_groups for p in group["params"]]
        clip = self.stage.grad_clip or math.inf
        report.grad_norm = clip_gradients(trained, clip)
        if not (math.isfinite(report.loss) and math.isfinite(report.grad_norm)):
            report.skipped = True
            optimizer.zero_grad(set_to_none=True)  # AdamW leaves parameters without gradient alone
        optimizer.step()

    @contextlib.contextmanager
    def _gradient_sync(self, is_last: bool) -> Iterator[None]:
        """Exchange gradients with other ranks in the last micro-batch of a step only."""
        with contextlib.nullcontext() if is_last else without_gradient_sync(self.trainer):
            yield
