"""The reports of a comparison in its folder, of the runs that are finished."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from vlbench.compare.experiment.comparison_folder import other_runs_note
from vlbench.compare.experiment.design_cautions import UNTUNED_NOTE, is_untuned
from vlbench.compare.experiment.grid import ComparisonGrid
from vlbench.compare.report.analysis import ComparisonResult, analyze_runs
from vlbench.compare.report.earlier_reports import count_looks, looks_note
from vlbench.compare.report.finished_runs import load_finished_run
from vlbench.compare.report.markdown_report import render_markdown
from vlbench.compare.report.report_command import write_report
from vlbench.compare.report.row_pairs import format_count
from vlbench.compare.report.sweep_summary import describe_sweep
from vlbench.errors import UserError
from vlbench.train.run_folder import RunFolder
from vlbench.train.run_report import print_status

JSON_REPORT = "report.json"
REPORT_FILES = ("report.md", "report.html", JSON_REPORT)
NO_RESULTS = "its folder has no results: it was moved or deleted meanwhile"


def write_reports(
    grid: ComparisonGrid, failed: Mapping[Path, str], unasked: Sequence[str] = ()
) -> int:
    """Write and print the report of the finished runs; return 1 if anything failed, else 0.

    `failed` are folders of runs with the reason, `unasked` sentences on the runs that could not be
    asked their tasks.
    """
    findings = _analyze_grid(grid, failed, unasked)
    if findings:
        paths = [grid.folder / name for name in REPORT_FILES]
        for path in paths:
            write_report(findings, path)  # before printing: stdout may be a closed pipe
        print(f"\n{render_markdown(findings)}\n")
        for path in paths:
            print(f"wrote {path}")
    return 1 if failed or unasked else 0


def _analyze_grid(
    grid: ComparisonGrid, failed: Mapping[Path, str], unasked: Sequence[str]
) -> ComparisonResult | None:
    """Return the comparison of a grid's finished runs, None where that cannot be."""
    finished = [folder for folder in grid.run_folders() if RunFolder(folder).is_finished]
    if not finished:
        return None
    missing = [folder for folder in grid.run_folders() if folder not in finished]
    told = {**dict.fromkeys(missing, NO_RESULTS), **failed}
    sweep = describe_sweep(grid.folder, [row.name for row in grid.rows])
    if not sweep and is_untuned(grid):
        sweep = [UNTUNED_NOTE]
    notes = [*sweep, *unasked, *other_runs_note(grid.folder, grid.run_folders())]
    try:
        runs = [load_finished_run(folder) for folder in finished]
        findings = analyze_runs(runs, told, notes, grid.curve_plan)
    except UserError as error:
        if not failed:
            raise
        folder, reason = next(iter(failed.items()))
        print_status(
            f"no report: {error}. {format_count(len(failed), 'run')} failed, the first: {folder}: "
            f"{reason}"
        )
        return None
    looks = count_looks(grid.folder / JSON_REPORT, len(findings.seeds))
    return replace(findings, looks=tuple(looks), notes=[*findings.notes, *looks_note(looks)])
