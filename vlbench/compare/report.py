"""`python -m vlbench report DIR...`: what finished runs say about each other, as Markdown."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from vlbench.compare.runs import Arm, arms, differing, load, matrix, shared
from vlbench.compare.statistics import Difference, Right, bootstrap, compare, holm, interval
from vlbench.mistakes import Mistake
from vlbench.train.run import write_whole

MATCHED = 0.05  # budgets that differ by more are not the same
BUDGET = {
    "parameters": "connector's parameters",
    "tokens": "tokens of a picture",
    "latents": "latents",
    "flops": "prefill FLOPs",
    "cache": "cache bytes of a picture",
}
CLEAR = 0.05  # largest p, after Holm's correction, that is called a difference


@dataclass(frozen=True)
class Pair:
    """Two rows of a comparison, the better one first, and what is known of their difference."""

    better: str
    worse: str
    difference: Difference
    p: float
    """After Holm's correction over all pairs."""
    check: tuple[float, float]
    """The interval of a bootstrap, for comparison."""


def main(words: list[str]) -> int:
    """Compare the runs in the folders `words`, print the report, and write it to `to=FILE.md`."""
    to = [word.removeprefix("to=") for word in words if word.startswith("to=")]
    folders = [Path(word).expanduser() for word in words if not word.startswith("to=")]
    if not folders or len(to) > 1:
        raise Mistake("report takes run folders, and to=FILE.md once: report runs/a runs/b")
    text = report([load(folder) for folder in _runs_in(folders)])
    print(text)
    if to:
        try:
            write_whole(Path(to[0]).expanduser(), text + "\n")
        except OSError as error:
            raise Mistake(f"to={to[0]} cannot be written ({error.strerror})") from error
    return 0


def _runs_in(folders: Sequence[Path]) -> list[Path]:
    """Return the run folders that are given, and the finished ones inside of other folders."""
    found: list[Path] = []
    for folder in folders:
        inside = sorted(file.parent for file in folder.rglob("results.json"))
        own = (folder / "recipe.yaml").is_file()
        if not own and not inside:
            raise Mistake(f"{folder} is no run folder, and none lies in it that is finished")
        found += [folder] if own else inside
    return list(dict.fromkeys(found))


def report(runs: Sequence) -> str:
    """Return the report of finished runs: rows, what they differ in, pairs in plain words."""
    rows = arms(runs)
    seeds, questions = shared(rows)
    answers = {row.name: matrix(row, seeds, questions) for row in rows}
    best_first = sorted(rows, key=lambda row: -answers[row.name].mean())
    lines = ["# Comparison", "", *_heading(rows, seeds, questions), "", *_differences(rows), ""]
    lines += [*_table(best_first, answers), "", *_budgets(best_first), ""]
    if len(rows) > 1:
        lines += ["## Differences", "", *_sentences(pairs(best_first, answers)), ""]
    lines += ["## By kind of question", "", *_by_kind(best_first, answers, questions)]
    return "\n".join(lines)


def pairs(rows: Sequence[Arm], answers: dict[str, Right]) -> list[Pair]:
    """Return all pairs of rows, best rows first, their p-values corrected for their number."""
    both = list(itertools.combinations([row.name for row in rows], 2))
    found = [compare(answers[one], answers[other]) for one, other in both]
    corrected = holm([one.p for one in found])
    return [
        Pair(one, other, difference, p, bootstrap(answers[one], answers[other]))
        for (one, other), difference, p in zip(both, found, corrected, strict=True)
    ]


def _heading(rows: Sequence[Arm], seeds: Sequence[int], questions: Sequence[str]) -> list[str]:
    asked = rows[0].runs[0].results.get("asked_of", "the same questions")
    lines = [
        f"Rows: {len(rows)}; seeds: {', '.join(map(str, seeds))}; questions about {asked}: "
        f"{len(questions)}. Intervals are of 95 %, over seeds and questions."
    ]
    if len(seeds) == 1:
        lines += [
            "",
            "**One seed: what another run would give is not known.**",
        ]
    left = {row.name: len(row.seeds) - len(seeds) for row in rows if len(row.seeds) > len(seeds)}
    if left:
        which = ", ".join(f"{count} of {name}" for name, count in left.items())
        lines += ["", f"Left out, because not every row has the seed: {which}."]
    return lines


def _differences(rows: Sequence[Arm]) -> list[str]:
    keys = differing(rows)
    if not keys:
        return ["The rows have the same recipe."]
    lines = ["What differs:", "", f"| key | {' | '.join(row.name for row in rows)} |"]
    lines += [f"|---|{'---|' * len(rows)}"]
    for key in keys:
        values = [row.runs[0].recipe.get(key, "") for row in rows]
        lines.append(f"| `{key}` | {' | '.join(map(str, values))} |")
    return lines


def _table(rows: Sequence[Arm], answers: dict[str, Right]) -> list[str]:
    lines = ["| row | accuracy | 95 % interval | seeds' spread | unseen | blank | shuffled | s |"]
    lines += ["|---|---:|---:|---:|---:|---:|---:|---:|"]
    for row in rows:
        mean, low, high = interval(answers[row.name])
        by_seed = answers[row.name].mean(axis=1)
        spread = f"{by_seed.std(ddof=1):.3f}" if len(by_seed) > 1 else ""
        others = [_mean(row, name) for name in ("unseen", "blank", "shuffled")]
        seconds = np.mean([run.results.get("seconds", np.nan) for run in row.runs])
        lines.append(
            f"| {row.name} | {mean:.3f} | {low:.3f} to {high:.3f} | {spread} | "
            f"{' | '.join(others)} | {seconds:.0f} |"
        )
    return lines


def _budgets(rows: Sequence[Arm]) -> list[str]:
    """Say what each row costs, and in what rows do not cost the same."""
    budgets = {row.name: row.runs[0].results.get("budget") or {} for row in rows}
    shown = [
        (key, label) for key, label in BUDGET.items() if any(key in b for b in budgets.values())
    ]
    if not shown:
        return []
    lines = [f"| row | {' | '.join(label for _, label in shown)} |", f"|---|{'---:|' * len(shown)}"]
    for name, budget in budgets.items():
        values = [f"{budget[key]:,}" if key in budget else "" for key, _ in shown]
        lines.append(f"| {name} | {' | '.join(values)} |")
    unmatched = [label for key, label in shown if _apart([b.get(key) for b in budgets.values()])]
    if unmatched:
        lines += ["", f"**Not matched within {MATCHED:.0%}: {', '.join(unmatched)}.**"]
    return lines


def _apart(values: Sequence[int | None]) -> bool:
    known = [value for value in values if value is not None]
    return len(known) < len(values) or max(known) > (1 + MATCHED) * min(known)


def _mean(row: Arm, name: str) -> str:
    values = [run.results.get(f"{name}_accuracy") for run in row.runs]
    known = [value for value in values if value is not None]
    return f"{np.mean(known):.3f}" if known else ""


def _sentences(found: Sequence[Pair]) -> list[str]:
    lines = []
    for pair in found:
        text = pair.difference.sentence(pair.better, pair.worse)
        clear = pair.difference.low > 0 and pair.p > CLEAR
        after = f"; p {pair.p:.3f} after Holm's correction over {len(found)} pairs"
        after += ", so this may be chance" if clear else ""
        low, high = (100 * end for end in pair.check)
        lines.append(
            f"- {text}{after}. Smallest difference that this design would have found: "
            f"{100 * pair.difference.detectable:.1f} points. Bootstrap: {low:.1f} to {high:.1f}."
        )
    return lines


def _by_kind(rows: Sequence[Arm], answers: dict[str, Right], questions: Sequence[str]) -> list[str]:
    kinds = rows[0].runs[0].kinds
    groups: dict[str, list[int]] = {}
    for index, one in enumerate(questions):
        for kind in kinds[one]:
            if kind:
                groups.setdefault(kind, []).append(index)
    lines = [f"| questions | {' | '.join(row.name for row in rows)} |"]
    lines += [f"|---|{'---:|' * len(rows)}"]
    for kind, columns in sorted(groups.items()):
        values = [f"{answers[row.name][:, columns].mean():.3f}" for row in rows]
        lines.append(f"| {kind} ({len(columns)}) | {' | '.join(values)} |")
    return lines
