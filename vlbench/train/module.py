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

from vlbench.data.steps import Step
from vlbench.mistakes import Mistake, nearest
from vlbench.model import lora
from vlbench.model.vlm import VLM
from vlbench.schema import Stage, Train

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
        optimizer_state: dict[str, Any] | None = None,
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
        self.waited = self._idle_since = 0.0  # seconds for the running step, and since when

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Return AdamW with one group per trained part."""
        groups = [
            {
                "params": [p for p in getattr(self.vlm, name).parameters() if p.requires_grad],
                "lr": part.lr,
                "peak": part.lr,
                "name": name,
                "weight_decay": part.weight_decay
                if part.weight_decay is not None
                else self.stage.weight_decay,
            }
            for name, part in self.stage.parts.items()
        ]
        return torch.optim.AdamW(groups, betas=self.stage.betas, fused=True)

    def on_fit_start(self) -> None:
        """Give the optimizer its state back, through the strategy that knows its shards."""
        if self.optimizer_state is not None:
            state = {"optimizer_states": [self.optimizer_state]}
            self.trainer.strategy.load_optimizer_state_dict(state)

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
        report = self._start_report(step, optimizer)
        total = self._over_ranks(sum(batch.tokens for batch in step.batches))
        if total:
            self._accumulate(step, total, report)
            self._update(optimizer, report)
        else:
            optimizer.step()  # no sample survived: counts the position, changes nothing
        self.position += 1
        report.position = self.position
        self.seen = {name: count + getattr(report, name) for name, count in self.seen.items()}
        self.report = report

    def _start_report(self, step: Step, optimizer: Any) -> StepReport:
        factor = learning_rate_factor(
            self.position, self.steps, self.stage.warmup, self.stage.schedule
        )
        for group in optimizer.param_groups:
            group["lr"] = group["peak"] * factor
        optimizer.zero_grad(set_to_none=True)
        return StepReport(
            self.position,
            lr=max(group["lr"] for group in optimizer.param_groups),
            tokens=self._over_ranks(sum(sum(map(sum, b.lengths)) for b in step.batches)),
            images=self._over_ranks(sum(len(b.pixels) for b in step.batches)),
            samples=self._over_ranks(sum(len(b.sample_id) for b in step.batches)),
        )

    def _accumulate(self, step: Step, total: int, report: StepReport) -> None:
        """Add up gradients of the loss per supervised token of the global batch."""
        world = self.trainer.world_size
        loss_sum = torch.zeros((), device=self.device)
        extra: dict[str, Tensor] = {}
        counts = self._counts(step)
        for number, batch in enumerate(step.batches):
            with self._synchronise(number == len(step.batches) - 1):
                out = self.vlm(batch.to(self.device))
                lm_loss = out.loss_sum if out.loss_sum is not None else torch.zeros_like(loss_sum)
                loss = lm_loss / total
                for name, (value, count) in out.extra.items():
                    of = counts.get(name) or self._over_ranks(int(count)) * len(step.batches)
                    share = value / max(1, of)
                    loss = loss + share
                    extra[name] = extra.get(name, 0) + share.detach()
                self.manual_backward(loss * world)  # DDP and FSDP average over ranks
            loss_sum += lm_loss.detach()
        report.extra = {name: self._over_ranks(float(value)) for name, value in extra.items()}
        own = self.stage.objective != "language"
        report.loss = (
            sum(report.extra.values()) if own else self._over_ranks(float(loss_sum)) / total
        )

    def _counts(self, step: Step) -> dict[str, int]:
        """Return what the connector's own losses are divided by, where the step alone tells it."""
        objective = self.stage.objective
        each = [self.vlm.connector.counts(batch, objective) for batch in step.batches]
        names = {name for counts in each for name in counts}
        return {n: self._over_ranks(sum(c.get(n, 0) for c in each)) for n in sorted(names)}

    def _update(self, optimizer: Any, report: StepReport) -> None:
        """Clip and step; a loss or gradient that is not finite changes nothing."""
        trained = [p for group in optimizer.param_groups for p in group["params"]]
        clip = self.stage.clip or math.inf
        report.grad_norm = float(nn.utils.clip_grad_norm_(trained, clip))
        if not (math.isfinite(report.loss) and math.isfinite(report.grad_norm)):
            report.skipped = True
            optimizer.zero_grad(set_to_none=True)  # AdamW leaves parameters without gradient alone
        optimizer.step()

    def _over_ranks(self, value: Any) -> Any:
        """Sum a Python number over all ranks."""
        if self.trainer.world_size == 1:
            return value
        total = self.trainer.strategy.reduce(
            torch.tensor(float(value), device=self.device), reduce_op="sum"
        )
        return type(value)(total.item())

    @contextlib.contextmanager
    def _synchronise(self, last: bool) -> Iterator[None]:
        """Exchange gradients with other ranks in the last micro-batch of a step only."""
        wrapped: Any = self.trainer.strategy.model
        if last or not hasattr(wrapped, "no_sync"):
            yield
        else:
            with wrapped.no_sync():
                yield
