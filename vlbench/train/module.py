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

from vlbench import ranks
from vlbench.connector import Connector
from vlbench.data.batch import Batch
from vlbench.data.steps import Step
from vlbench.mistakes import Mistake, nearest
from vlbench.model import lora
from vlbench.model.contrast import pooled
from vlbench.model.flops import StepFlops, step_flops
from vlbench.model.replicated import alike, clip_gradients
from vlbench.model.shard import shard
from vlbench.model.vlm import VLM
from vlbench.schema import Stage, Train
from vlbench.train.agree import Plan, agree, total, totals
from vlbench.train.moments import put_back

SEEN = ("samples", "images", "tokens")
"""What is counted over a whole run, of a `StepReport`."""


@dataclass
class StepReport:
    """What one optimizer step did; numbers are of the global batch."""

    position: int
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


def learning_rate_factor(position: int, steps: int, warmup: float, schedule: str) -> float:
    """Return the share of the peak learning rate at `position` (0 is the first step).

    Linear warm-up over the share `warmup` of the steps, then a half cosine to 0, or constant.
    """
    rising = max(1, round(steps * warmup)) if warmup else 0
    if position < rising:
        return (position + 1) / rising
    if schedule == "constant":
        return 1.0
    return 0.5 * (1 + math.cos(math.pi * (position - rising) / max(1, steps - rising)))


def check_objective(vlm: VLM, name: str, stage: Stage) -> None:
    """Refuse an objective that the connector does not offer, or that the stage does not fit."""
    offered = ("language", *vlm.connector.objectives())
    if stage.objective not in offered:
        raise Mistake(
            f"stages.{name}.objective is '{stage.objective}'; this connector offers "
            f"{', '.join(offered)}.{nearest(stage.objective, offered)}"
        )
    if stage.objective == "language":
        return
    if stage.form != "caption":
        raise Mistake(
            f"stages.{name}.form is '{stage.form}'; objective {stage.objective} learns from "
            "pictures and captions: form=caption"
        )
    if "language" in stage.parts:
        raise Mistake(
            f"stages.{name}.train.language: objective {stage.objective} leaves the language model "
            f"out, so it cannot be trained: stages.{name}.train.language=null"
        )


def freeze(vlm: VLM, stage: Stage) -> None:
    """Make the model ready for a stage: exactly the parts that it names require gradients."""
    vlm.pursue(stage.objective)
    for name, part in vlm.parts():
        how = stage.parts.get(name)
        if how is not None and how.lora is not None:
            lora.adapt(part, f"train.{name}", **asdict(how.lora))
        elif how is not None:
            lora.merge(part)
        part.requires_grad_(False)
        for parameter in trained(vlm, name, how):
            parameter.requires_grad_(True)
    vlm.train()


def trained(vlm: VLM, name: str, how: Train | None) -> list[nn.Parameter]:
    """Return the parameters of part `name` that are trained `how`; [] for a frozen part."""
    if how is None:
        return []
    part = getattr(vlm, name)
    used = vlm.vision.used() if name == "vision" else list(part.parameters())
    if how.lora is None:
        return used
    adapters = {id(parameter) for parameter in lora.adapters(part).values()}
    return [parameter for parameter in used if id(parameter) in adapters]


class Watcher:
    """Something that looks on while a stage trains; every method may be left out."""

    def begin(self, training: Training) -> None:
        """Called before the first step."""

    def after(self, training: Training, step: Step) -> None:
        """Called after every optimizer step; `training.report` says how it went."""

    def end(self, training: Training) -> None:
        """Called after the last step, or when training is stopped."""


class Training(pl.LightningModule):
    """Train the parts of a `VLM` that a stage names.

    Optimisation is manual: Lightning's accumulation divides by a fixed count, whereas here the loss
    of a step is the sum over the supervised tokens divided by their number in the global batch.
    """

    def __init__(
        self,
        vlm: VLM,
        stage: Stage,
        steps: int,
        position: int,
        seed: int,
        watchers: Sequence[Watcher] = (),
        optimizer_state: Mapping[str, Tensor] | None = None,
        seen: Mapping[str, int] | None = None,
    ) -> None:
        """Train `vlm` from `position` to `steps`; `seed` fixes what is random inside a step.

        `optimizer_state` is what a checkpoint at `position` holds, `seen` what the run has learned
        from by then.
        """
        super().__init__()
        self.seen = {name: 0 for name in SEEN} | dict(seen or {})
        self.watchers, self.optimizer_state = watchers, optimizer_state
        self.automatic_optimization = False
        self.vlm, self.stage = vlm, stage
        self.steps, self.position, self.seed = steps, position, seed
        self.report = StepReport(position)
        self.flops: StepFlops | None = None
        self.waited = self._idle_since = 0.0  # seconds for the running step, and since when

    def configure_model(self) -> None:
        """Count what a step takes, and shard the model where the strategy has a mesh."""
        on_gpu = self.trainer.strategy.root_device.type == "cuda"
        if on_gpu and self.stage.objective == "language":  # nobody knows a processor's peak
            self.flops = step_flops(self.vlm)
        if self.device_mesh is not None:
            half = self.trainer.precision == "bf16-mixed"
            shard(self.vlm, self.device_mesh["data_parallel"], half)

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
            for name, part in self.stage.parts.items()
            for some in alike([p for p in getattr(self.vlm, name).parameters() if p.requires_grad])
        ]
        return torch.optim.AdamW(groups, betas=self.stage.betas, fused=True)

    def on_fit_start(self) -> None:
        """Give the optimizer its state back."""
        if self.optimizer_state is not None:
            put_back(self.vlm, self.trainer.optimizers[0], self.optimizer_state)
            self.optimizer_state = None

    def on_train_start(self) -> None:
        """Let the watchers begin."""
        for watcher in self.watchers:
            watcher.begin(self)
        self._idle_since = time.monotonic()

    def on_train_batch_start(self, batch: Step, batch_idx: int) -> None:
        """Note how long the step was waited for."""
        self.waited = time.monotonic() - self._idle_since

    def on_train_batch_end(self, outputs: Any, batch: Step, batch_idx: int) -> None:
        """Let the watchers look at the step."""
        for watcher in self.watchers:
            watcher.after(self, batch)
        self._idle_since = time.monotonic()

    def on_train_end(self) -> None:
        """Let the watchers end."""
        for watcher in self.watchers:
            watcher.end(self)

    def transfer_batch_to_device(self, batch: Step, device: torch.device, _: int) -> Step:
        """Leave the step where it is: micro-batches travel one by one."""
        return batch

    def training_step(self, step: Step, _: int) -> None:
        """Run the micro-batches of a step, then clip and update once."""
        torch.manual_seed(hash((self.seed, step.index)) & 0x7FFFFFFF)
        optimizer: Any = self.optimizers()
        plan = agree(step)
        report = self._start_report(plan, optimizer)
        if plan.supervised:
            self._accumulate(plan, report)
            self._update(optimizer, report)
        else:
            optimizer.step()  # no sample survived: counts the position, changes nothing
        self.position += 1
        report.position = self.position
        self.seen = {name: count + getattr(report, name) for name, count in self.seen.items()}
        self.report = report

    def _start_report(self, plan: Plan, optimizer: Any) -> StepReport:
        factor = learning_rate_factor(
            self.position, self.steps, self.stage.warmup, self.stage.schedule
        )
        for group in optimizer.param_groups:
            group["lr"] = group["peak"] * factor
        optimizer.zero_grad(set_to_none=True)
        return StepReport(
            self.position,
            lr=max(group["lr"] for group in optimizer.param_groups),
            tokens=plan.tokens,
            images=plan.images,
            samples=plan.samples,
        )

    def _accumulate(self, plan: Plan, report: StepReport) -> None:
        """Add up gradients of the loss per supervised token of the global batch."""
        world = ranks.size()
        loss_sum = nothing = torch.zeros((), device=self.device)
        extra: dict[str, Tensor] = {}
        batches = pooled(self.vlm, plan.batches)
        counts = self._counts(batches)
        for number, batch in enumerate(batches):
            with self._synchronise(number == len(batches) - 1):
                out = self.vlm(batch.to(self.device))
                if number == 0:
                    counts |= self._counted(batches, set(out.extra) - set(counts))
                lm_loss = nothing if out.loss_sum is None else out.loss_sum
                loss = lm_loss / plan.supervised
                for name, (value, _) in out.extra.items():
                    share = value / max(1, self._count(counts, name))
                    loss = loss + share
                    extra[name] = extra.get(name, 0) + share.detach()
                self.manual_backward(loss * world)  # DDP and FSDP average over ranks
            loss_sum = loss_sum + lm_loss.detach()
        report.extra = {name: total(float(value)) for name, value in extra.items()}
        own = self.stage.objective != "language"
        report.loss = (
            sum(report.extra.values()) if own else total(float(loss_sum)) / plan.supervised
        )

    def _counts(self, batches: Sequence[Batch]) -> dict[str, int]:
        """Return what the connector's own losses are divided by, where the step alone tells it."""
        connector, objective = self.vlm.connector, self.stage.objective
        if type(connector).counts is Connector.counts:
            return {}
        return totals(connector.counts(batch, objective) for batch in batches)

    def _counted(self, batches: Sequence[Batch], names: set[str]) -> dict[str, int]:
        """Return what losses that `counts` does not name are divided by: all forward passes tell.

        `names` are those of the first micro-batch of this process.
        """
        usual = type(self.vlm.connector).losses is Connector.losses
        if (usual and self.stage.objective == "language") or not total(len(names)):
            return {}
        with torch.no_grad():
            outs = [self.vlm(batch.to(self.device)).extra for batch in batches]
        torch.clear_autocast_cache()  # its copies of weights were made without a graph
        counts = totals({n: int(count) for n, (_, count) in out.items()} for out in outs)
        known = self._counts(batches)
        return {name: count for name, count in counts.items() if name not in known}

    def _count(self, counts: Mapping[str, int], name: str) -> int:
        if name not in counts:
            raise Mistake(
                f"connector {type(self.vlm.connector).__name__}: the loss '{name}' is missing in "
                "the first micro-batch of a step: give a sum and a count of 0 there, or name it in "
                "counts()"
            )
        return counts[name]

    def _update(self, optimizer: Any, report: StepReport) -> None:
        """Clip and step; a loss or gradient that is not finite changes nothing."""
        trained = [p for group in optimizer.param_groups for p in group["params"]]
        clip = self.stage.clip or math.inf
        report.grad_norm = clip_gradients(trained, clip)
        if not (math.isfinite(report.loss) and math.isfinite(report.grad_norm)):
            report.skipped = True
            optimizer.zero_grad(set_to_none=True)  # AdamW leaves parameters without gradient alone
        optimizer.step()

    @contextlib.contextmanager
    def _synchronise(self, last: bool) -> Iterator[None]:
        """Exchange gradients with other ranks in the last micro-batch of a step only."""
        wrapped: Any = self.trainer.strategy.model
        if last or not hasattr(wrapped, "no_sync"):
            yield
        else:
            with wrapped.no_sync():
                yield
