"""`python -m vlbench report RUN...`: compare finished runs, as Markdown, HTML and JSON."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from vlbench.command_line.compare_arguments import ReportArguments
from vlbench.compare.report.analysis import ComparisonResult, analyze_runs
from vlbench.compare.report.curve_plan import find_curve_plan
from vlbench.compare.report.finished_runs import load_finished_run
from vlbench.compare.report.json_report import render_json
from vlbench.compare.report.markdown_report import render_markdown
from vlbench.compare.report.sweep_summary import SWEEP_FOLDER, describe_sweep
from vlbench.errors import UserError
from vlbench.system_errors import explain_unwritable
from vlbench.text_files import write_for_people

REPORT_SUFFIXES = (".md", ".html", ".json")


def run_report(arguments: ReportArguments) -> int:
    """Compare runs, print the report, and write it to the files of `out=`."""
    folders = [Path(folder) for folder in arguments.runs]
    files = [Path(file) for file in arguments.out]
    suffixes = [file.suffix for file in files]
    wrong = [file for file in files if file.suffix not in REPORT_SUFFIXES]
    if wrong:
        raise UserError(
            f"out={wrong[0]} is no form of a report: out=FILE.md, out=FILE.html or out=FILE.json"
        )
    if len(set(suffixes)) < len(suffixes):
        raise UserError("report takes out=FILE.md, out=FILE.html and out=FILE.json once each")
    notes = [note for folder in folders for note in describe_sweep(folder)]
    run_folders = _find_run_folders(folders)
    findings = analyze_runs(
        [load_finished_run(folder) for folder in run_folders],
        notes=notes,
        plan=find_curve_plan(run_folders),
    )
    for file in files:
        write_report(findings, file)
    print(render_markdown(findings))
    if files:
        print("", *(f"wrote {file}" for file in files), sep="\n")
    return 0


def write_report(findings: ComparisonResult, path: Path) -> None:
    """Write the report as HTML, JSON or Markdown, by the suffix of the file."""
    if path.suffix == ".html":
        from vlbench.compare.report.html_report import render_html  # imports matplotlib

        text = render_html(findings)
    elif path.suffix == ".json":
        text = render_json(findings) + "\n"
    else:
        text = render_markdown(findings) + "\n"
    try:
        write_for_people(path, text)
    except OSError as error:
        raise explain_unwritable(error, f"out={path}") from error


def _find_run_folders(folders: Sequence[Path]) -> list[Path]:
    """Return the given run folders, and the finished runs inside of the other folders.

    The trials of a learning-rate sweep are left out.
    """
    run_folders: list[Path] = []
    for folder in folders:
        nested = sorted(
            file.parent
            for file in folder.rglob("results.json")
            if SWEEP_FOLDER not in file.relative_to(folder).parts
        )
        is_run = (folder / "recipe.yaml").is_file()
        if not is_run and not nested:
            raise UserError(f"{folder} is no run folder, and none lies in it that is finished")
        run_folders += [folder] if is_run else nested
    return list(dict.fromkeys(run_folders))
