"""`python -m vlbench compare`: train every run of a grid, then report. The folder says everything.

A finished run is not repeated, an interrupted one goes on, a failed one is named and does not sink
the rest. Stages that are alike in recipe, seed and what came before are trained once.
"""

from __future__ import annotations

import ctypes
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from vlbench import recipe as recipes
from vlbench.compare import grid as grids
from vlbench.compare.findings import find
from vlbench.compare.grid import Grid, Row
from vlbench.compare.markdown import markdown
from vlbench.compare.report import write
from vlbench.compare.runs import load
from vlbench.files import read_json
from vlbench.layers import flat, plain
from vlbench.schema import Recipe
from vlbench.train.run import Run, open_run

REPORTS = ("report.md", "report.html")
PR_SET_PDEATHSIG = 1  # of Linux' prctl
FREE = ("run", "trainer", "log", "only", "from", "dry_run", "profile", "recipe")
"""Keys that change nothing in what a stage learns."""


def run_grid(grid: Grid) -> int:
    """Run every run of `grid` that is not finished, and report; return the exit code."""
    _show_plan(grid)
    failed: dict[Path, str] = {}
    began, trained = time.monotonic(), 0
    jobs = [(row, seed) for seed in grid.seeds for row in grid.rows]
    for number, (row, seed) in enumerate(jobs, 1):
        folder = grid.run_folder(row, seed)
        title = f"[{number}/{len(jobs)}] {row.name}, seed {seed}"
        if Run(folder).finished:
            print(f"{title}: done before, {_accuracy(folder)}", flush=True)
            continue
        print(f"{title}: {_share(grid, row, seed)}trains, log in {_log(folder)}", flush=True)
        code = _fit([*row.of_seed(seed), f"run={folder}"], _log(folder))
        if code == 130:
            print(f"stopped; to go on: repeat the command with run={grid.folder}", file=sys.stderr)
            return 130
        if code:
            failed[folder] = _last_line(_log(folder))
            print(f"{title}: failed: {failed[folder]}", file=sys.stderr, flush=True)
            continue
        trained += 1
        left = (time.monotonic() - began) / trained * (len(jobs) - number)
        print(f"{title}: {_accuracy(folder)}; about {left / 60:.0f} minutes left", flush=True)
    return _finish(grid, failed)


def _finish(grid: Grid, failed: dict[Path, str]) -> int:
    """Write the report of what is finished, and name what failed; return the exit code."""
    done = [load(folder) for folder in _folders(grid) if Run(folder).finished]
    if done:
        findings = find(done, failed)
        print(f"\n{markdown(findings)}\n")
        for name in REPORTS:
            write(findings, grid.folder / name)
            print(f"wrote {grid.folder / name}")
    return 1 if failed else 0


def _show_plan(grid: Grid) -> None:
    """Say what will be run and what there is already."""
    done = sum(Run(folder).finished for folder in _folders(grid))
    count = len(grid.rows) * len(grid.seeds)
    print(
        f"comparison in {grid.folder}: {len(grid.rows)} rows x {len(grid.seeds)} seeds = {count} "
        f"runs, {done} of them finished"
    )
    for row in grid.rows:
        recipe = grids.load(row, grid.seeds[0])
        steps = ", ".join(
            f"{name} {stage.steps if stage.steps is not None else f'{stage.epochs} epochs'}"
            for name, stage in recipe.stages.items()
        )
        print(f"  {row.name}: connector {recipe.connector['name']}; steps: {steps}")
    shared = sum(_partner(grid, row, seed) is not None for seed in grid.seeds for row in grid.rows)
    if shared:
        print(f"  {shared} runs begin with stages that another one has trained alike")
    times = [read_json(f / "results.json") for f in _folders(grid) if Run(f).finished]
    if times:
        mean = sum(one.get("seconds", 0) for one in times) / len(times)
        print(f"  about {mean * (count - done) / 60:.0f} minutes, by the runs that are finished")


def _fit(words: list[str], log: Path) -> int:
    """Run `fit` in a process of its own, its output in `log`; it saves when this one is stopped."""
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("a", encoding="utf-8") as file:
        process = subprocess.Popen(
            [sys.executable, "-m", "vlbench", "fit", *words],
            stdout=file,
            stderr=file,
            start_new_session=True,  # Ctrl-C comes from here, once: a second one would kill it
            preexec_fn=_end_with_parent,
        )
        before = signal.signal(signal.SIGTERM, lambda *_: process.send_signal(signal.SIGTERM))
        try:
            return process.wait()
        except KeyboardInterrupt:
            process.send_signal(signal.SIGINT)
            process.wait()
            return 130
        finally:
            signal.signal(signal.SIGTERM, before)


def _end_with_parent() -> None:
    """Ask Linux to end this process, with time to save, when the one that started it is killed."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


def _share(grid: Grid, row: Row, seed: int) -> str:
    """Give a new run the stages that a finished one has trained alike; say so."""
    folder, found = grid.run_folder(row, seed), _partner(grid, row, seed)
    if found is None or (folder / "recipe.yaml").is_file():
        return ""
    partner, stages = found
    source = Run(grid.run_folder(partner, seed))
    if not source.finished:
        return ""
    recipe = recipes.load([*row.of_seed(seed), f"run={folder}"])
    run = open_run(recipe)
    for number, name in enumerate(stages):
        for checkpoint in sorted(source.checkpoints.glob(f"{number}-{name}-*"))[-1:]:
            shutil.copytree(checkpoint, run.checkpoints / checkpoint.name)
            recipes.save(recipe, run.checkpoints / checkpoint.name / "recipe.yaml")
    shutil.copy(source.folder / "metrics.csv", run.folder / "metrics.csv")
    return f"{', '.join(stages)} as in {partner.name}; "


def _partner(grid: Grid, row: Row, seed: int) -> tuple[Row, list[str]] | None:
    """Return an earlier row that begins alike with this seed, and the stages that are alike."""
    own = grids.load(row, seed)
    for other in grid.rows[: grid.rows.index(row)]:
        stages = alike(own, grids.load(other, seed))
        if stages:
            return other, stages
    return None


def alike(one: Recipe, other: Recipe) -> list[str]:
    """Return the first stages that two recipes train alike; never all of them."""
    ours, theirs = flat(plain(one)), flat(plain(other))

    def rest(recipe: dict[str, Any]) -> dict[str, Any]:
        return {k: v for k, v in recipe.items() if k.split(".")[0] not in (*FREE, "stages")}

    names = list(one.stages)
    if names != list(other.stages) or rest(ours) != rest(theirs):
        return []
    found: list[str] = []
    for name in names[:-1]:
        start = f"stages.{name}."
        stage = {k: v for k, v in ours.items() if k.startswith(start)}
        if stage != {k: v for k, v in theirs.items() if k.startswith(start)}:
            break
        found.append(name)
    return found


def _folders(grid: Grid) -> list[Path]:
    return [grid.run_folder(row, seed) for seed in grid.seeds for row in grid.rows]


def _log(folder: Path) -> Path:
    return folder.with_name(f"{folder.name}.log")


def _accuracy(folder: Path) -> str:
    results = read_json(folder / "results.json")
    return f"accuracy {results['accuracy']:.3f} in {results['seconds']:.0f} s"


def _last_line(log: Path) -> str:
    lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
    return lines[-1].removeprefix("vlbench: ") if lines else "no output"
