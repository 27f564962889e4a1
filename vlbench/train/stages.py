"""Fit a recipe: its stages one after the other, resumed where they stopped, then the results."""

from __future__ import annotations

import time
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch.utils.data import DataLoader

from vlbench import ranks
from vlbench.data.sources import stage_data
from vlbench.host import kept
from vlbench.mistakes import BadSample, Mistake
from vlbench.model import lora
from vlbench.model.compiled import Compiled
from vlbench.model.compose import compose
from vlbench.model.held import Held
from vlbench.model.vlm import VLM
from vlbench.model.weights.groups import place
from vlbench.schema import PARTS, Recipe, Stage
from vlbench.train import checkpoint, report
from vlbench.train.checkpoint import Position
from vlbench.train.checkpointing import settle
from vlbench.train.frozen import remember
from vlbench.train.join import joined, leave, sharded
from vlbench.train.launch import apart, last, silent
from vlbench.train.legs import Leg, check_data, held_out_batches, plan, steps_of
from vlbench.train.loggers import loggers_of
from vlbench.train.module import Training, Watcher, check_objective, freeze, trained
from vlbench.train.progress import Progress, cut
from vlbench.train.restore import begin, restore
from vlbench.train.run import Run, open_run
from vlbench.train.sizes import check_sizes, check_weights
from vlbench.train.trainer import explained, quiet, root_device, trainer_of
from vlbench.train.watchers import (
    HeldOut,
    Interrupts,
    NotFinite,
    Quarantine,
    Saving,
    set_aside,
)


def fit(recipe: Recipe) -> int:
    """Train the stages of `recipe`, evaluate, and say what to try next; return the exit code."""
    with kept(), quiet(), joined(recipe):
        code = _fit(recipe)
        if not ranks.is_first():
            return silent(code)
        others = ranks.several()
    return last(code) if others else code


def _fit(recipe: Recipe) -> int:
    legs = ranks.together(lambda: plan(recipe))
    if recipe.dry_run:
        from vlbench.train.dry import dry_run

        return dry_run(recipe, legs)
    run = ranks.first(lambda: opened(recipe, legs))
    if run.finished:
        print(f"{run.folder} is finished; these are its results.")
        return report.show_results(run)
    report.show_start(recipe, run, [(leg.name, leg.stage, leg.steps) for leg in legs])
    with Interrupts() as interrupts:
        return Job(recipe, run, legs, interrupts).go()


def opened(recipe: Recipe, legs: list[Leg]) -> Run:
    """Look at data and sizes unless that was done before, and return the open folder of the run."""
    for leg in legs:
        if leg.stage.batch < ranks.size():
            raise Mistake(
                f"stages.{leg.name}.batch is {leg.stage.batch}, fewer than the {ranks.size()} "
                "processes: some would have nothing to do"
            )
    bad: list[BadSample] = []
    if not (recipe.run and Run(Path(recipe.run)).finished):
        bad = check_data(recipe, legs)  # before there is a folder
    if not (recipe.run and Run(Path(recipe.run)).latest):
        check_sizes(recipe, legs)
        check_weights(recipe, legs[0].stage)
    run = open_run(recipe)
    set_aside(run, bad)
    return run


@dataclass
class Job:
    """A recipe being fitted in its run folder."""

    recipe: Recipe
    run: Run
    legs: list[Leg]
    interrupts: Interrupts
    seen: dict[str, int] = field(default_factory=dict)
    """Samples, images and tokens that were learned from by now."""
    began: float = field(default_factory=time.monotonic)
    spent: float = 0.0
    """Seconds that the run had taken when it was stopped."""

    def clock(self) -> float:
        """Return how many seconds the run has taken."""
        return self.spent + time.monotonic() - self.began

    def go(self) -> int:
        """Train what is left, evaluate, report; return the exit code."""
        try:
            vlm, start = ranks.together(lambda: prepare(self.recipe, self.legs, self.run))
            ranks.first(lambda: self.run.record_weights(vlm.origins))
        except Mistake:
            self.run.discard()  # nothing was trained: the same command can be mended and repeated
            raise
        report.show_weights(vlm.origins, self.recipe.seed)
        self.seen, self.spent = start.seen or {}, start.seconds or 0.0
        for leg in self.legs[start.stage :]:
            done = start.step if leg.number == start.stage else 0
            vlm.resize(leg.stage.image_size)
            if done < leg.steps:
                self.train(vlm, leg, done)
            if self.interrupts.agreed()[0]:
                return report.show_interrupted(self.run, self.interrupts.wanted)
            if done < leg.steps and sharded(self.recipe):
                vlm = ranks.together(self.newest)  # whole again: the next stage changes it
        if not ranks.is_first():
            return 0
        if sharded(self.recipe):
            place(vlm.language, torch.float32, "cpu")  # it is still in its file
        leave()
        return self.finish(vlm)

    def newest(self) -> VLM:
        """Return the model of the newest checkpoint."""
        assert self.run.latest is not None
        return restore(self.run.path(self.run.latest), self.recipe, mapped=sharded(self.recipe))

    def train(self, vlm: VLM, leg: Leg, done: int) -> None:
        """Run one stage after its first `done` steps, to its end or until somebody stops it."""
        torch.manual_seed(self.recipe.seed)  # of what the connector builds for the stage alone
        freeze(vlm, leg.stage)
        held = hold(self.recipe, vlm)
        steps = replace(steps_of(vlm, leg), rank=ranks.rank(), world=ranks.size())
        how = settle(self.recipe, vlm, steps, root_device(self.recipe))
        report.show_stage(leg.name, leg.stage, leg.steps, done, vlm)
        if self.recipe.checkpointing == "auto":
            print(f"  checkpointing=auto: {how}")
        offset = sum(other.steps for other in self.legs[: leg.number]) + done
        state = None
        if done:
            position = Position(leg.number, leg.name, done)
            state = checkpoint.load_optimizer(self.run.path(position))
        training = Training(
            vlm,
            leg.stage,
            leg.steps,
            done,
            self.recipe.seed,
            self.watchers(vlm, leg, done),
            state,
            self.seen,
        )
        loggers = loggers_of(self.recipe, self.run, offset) if ranks.is_first() else []
        trainer = trainer_of(self.recipe, loggers, self.run.folder, [self.interrupts])
        workers = stage_data(self.recipe.data, leg.stage).workers
        cache = self.recipe.trainer.feature_cache
        if cache and "vision" not in leg.stage.parts:
            stop = self.interrupts.asked
            steps.features = remember(vlm, steps, Path(cache), trainer, workers, stop)
        loader: DataLoader = DataLoader(
            steps,
            sampler=range(done, leg.steps),
            batch_size=None,
            num_workers=workers,
            worker_init_fn=apart,
            pin_memory=trainer.strategy.root_device.type == "cuda",
        )
        with Compiled(vlm, self.recipe.trainer.compile), explained(leg):
            trainer.fit(training, loader)
        held.release()
        self.seen = training.seen

    def watchers(self, vlm: VLM, leg: Leg, done: int) -> list[Watcher]:
        """Return what looks on while a stage trains, in the order of looking."""
        settings, log = self.recipe.trainer, self.recipe.log
        parts = self.parts_until(leg)
        saving = Saving(
            self.run,
            (leg.number, leg.name),
            parts,
            settings.checkpoint_every,
            settings.keep_last,
            self.interrupts,
            self.clock,
        )
        report.show_disk(vlm, parts, settings.keep_last, self.run.checkpoints)
        held_out = HeldOut(held_out_batches(self.recipe, vlm, leg), log.evaluate_every, saving)
        metrics = self.run.folder / "metrics.csv" if ranks.is_first() else None
        if metrics:
            cut(metrics, [other.name for other in self.legs], leg.name, done)
        offset = sum(other.steps for other in self.legs[: leg.number])
        on_bad = stage_data(self.recipe.data, leg.stage).on_bad
        return [
            held_out,
            NotFinite(leg.name, settings.stop_after_bad, report.say),
            Quarantine(self.run, on_bad, leg.data),
            Progress(leg.name, offset, log.every, metrics, held_out),
            saving,
        ]

    def parts_until(self, leg: Leg) -> list[str]:
        """Return what a checkpoint must hold: all that is trained up to and with `leg`, or random.

        Of a model that began with `init` that is everything.
        """
        legs = self.legs[: leg.number + 1]
        trained = {part for part in PARTS if changes(part, [other.stage for other in legs])}
        trained.add("connector")  # no file has what it begins with
        if self.recipe.init:
            trained |= {"vision", "connector", "language"}
        for part in ("vision", "language"):
            if getattr(self.recipe, part).weights == "random":  # no file has them
                trained.add(part)
        return [part for part in ("vision", "connector", "language") if part in trained]

    def finish(self, vlm: VLM) -> int:
        """Evaluate the trained model, write results and examples, and print them."""
        from vlbench.evaluate.results import write_results

        if self.run.latest is None:  # nothing was trained; the model is kept all the same
            last = self.legs[-1]
            position = Position(last.number, last.name, 0)
            parts = self.parts_until(last)
            where, recipe = self.run.checkpoints, self.run.recipe_file
            checkpoint.Writing(where, position, vlm, parts, None, recipe).end()
        vlm.requires_grad_(False)
        hold(self.recipe, vlm)  # what fitted into memory while it was trained shall still fit
        vlm.to(root_device(self.recipe))  # Lightning took it away
        done = write_results(
            self.recipe,
            self.run,
            vlm,
            self.interrupts.asked,
            self.clock,
        )
        if not done:
            return report.show_interrupted(self.run, self.interrupts.wanted)
        return report.show_results(self.run)


def prepare(recipe: Recipe, legs: list[Leg], run: Run | None) -> tuple[VLM, Position]:
    """Build the model where training begins or goes on, with the newest weights of the run."""
    latest = run.latest if run else None
    start = latest or Position(0, legs[0].name, 0)
    stage = legs[start.stage].stage
    if run and latest:
        vlm = restore(run.path(latest), recipe, mapped=sharded(recipe))
        print(f"resuming {run.folder} after step {latest.step} of {latest.name}")
    elif recipe.init:
        vlm = begin(recipe, stage, sharded(recipe))
    else:
        vlm = compose(recipe, stage.image_size, stage.objective, sharded(recipe))
    vlm.vision.draft = recipe.data.decode == "draft"
    for leg in legs:
        check_objective(vlm, leg.name, leg.stage)
        check_trained(vlm, leg)
        for part, how in leg.stage.parts.items():
            if how.lora:
                name = f"stages.{leg.name}.train.{part}"
                lora.check(getattr(vlm, part), name, how.lora.targets, how.lora.bits)
    return vlm, start


def check_trained(vlm: VLM, leg: Leg) -> None:
    """Refuse a stage that trains only parts without a parameter, as a connector of means alone."""
    ways = leg.stage.parts.items()
    if leg.steps and not any(how.lora or trained(vlm, name, how) for name, how in ways):
        parts = ", ".join(leg.stage.parts)
        raise Mistake(
            f"stages.{leg.name}.train names {parts}, which has no parameters here: nothing would "
            "be trained; train another part, or leave the stage out"
        )


def hold(recipe: Recipe, vlm: VLM) -> Held:
    """Hold frozen weights in 16 bits where training rounds them so; shards need a single type."""
    return Held(vlm, recipe.precision == "bf16" and not sharded(recipe))


def changes(part: str, stages: list[Stage]) -> bool:
    """Tell whether stages change the weights of `part`: adapters do when others replace them."""
    ways = [stage.parts[part].lora for stage in stages if part in stage.parts]
    return any(way is None for way in ways) or any(way != ways[0] for way in ways)
