"""`python -m vlbench report RUN...`: compare finished runs, as Markdown, HTML and JSON.

Votes on answers side by side (`votes=FILE`) are a section of it, or without runs all of it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from vlbench.command_line.compare_arguments import ReportArguments
from vlbench.compare.report.analysis import ComparisonResult, analyze_runs
from vlbench.compare.report.curve_plan import find_curve_plan
from vlbench.compare.report.finished_runs import load_finished_run
from vlbench.compare.report.json_report import render_json
from vlbench.compare.report.markdown_report import render_markdown
from vlbench.compare.report.nested_files import files_below
from vlbench.compare.report.sweep_summary import describe_sweep
from vlbench.compare.report.unfinished_runs import find_unfinished_runs, is_trial
from vlbench.compare.report.vote_records import read_votes
from vlbench.compare.report.vote_report import votes_html, votes_json, votes_markdown
from vlbench.compare.report.vote_statistics import VoteFindings, analyze_votes
from vlbench.errors import UserError
from vlbench.system_errors import explain_unwritable
from vlbench.text_files import write_for_people

REPORT_SUFFIXES = (".md", ".html", ".json")


def run_report(arguments: ReportArguments) -> int:
    """Compare runs or votes, print the report, and write it to the files of `out=`."""
    files = _check_report_files([Path(file) for file in arguments.out])
    votes = _analyze_vote_files(arguments.votes)
    findings: ComparisonResult | VoteFindings
    if arguments.runs:
        findings = replace(_compare_folders([Path(run) for run in arguments.runs]), votes=votes)
    elif votes:
        findings = votes
    else:
        raise UserError("report needs RUN... or votes=FILE: folders of runs, or files of votes")
    for file in files:
        write_report(findings, file)
    print(_render_report(findings, ".md"))
    if files:
        print("", *(f"wrote {file}" for file in files), sep="\n")
    return 0


def _check_report_files(files: list[Path]) -> list[Path]:
    """Return the files that the report is written to; a UserError for another suffix, or two."""
    suffixes = [file.suffix for file in files]
    wrong = [file for file in files if file.suffix not in REPORT_SUFFIXES]
    if wrong:
        raise UserError(
            f"out={wrong[0]} is no form of a report: out=FILE.md, out=FILE.html or out=FILE.json"
        )
    if len(set(suffixes)) < len(suffixes):
        raise UserError("report takes out=FILE.md, out=FILE.html and out=FILE.json once each")
    return files


def _analyze_vote_files(names: str | None) -> VoteFindings | None:
    """Return what the votes in files say, whose names have commas between them."""
    if not names:
        return None
    return analyze_votes(read_votes([Path(name).expanduser() for name in names.split(",")]))


def _compare_folders(folders: Sequence[Path]) -> ComparisonResult:
    """Return the comparison of the runs in folders."""
    notes = [note for folder in folders for note in describe_sweep(folder)]
    run_folders = _find_run_folders(folders)
    return analyze_runs(
        [load_finished_run(folder) for folder in run_folders],
        failed=find_unfinished_runs(folders),
        notes=notes,
        plan=find_curve_plan(run_folders),
    )


def write_report(findings: ComparisonResult | VoteFindings, path: Path) -> None:
    """Write the report as HTML, JSON or Markdown, by the suffix of the file."""
    end = "" if path.suffix == ".html" else "\n"
    try:
        write_for_people(path, _render_report(findings, path.suffix) + end)
    except OSError as error:
        raise explain_unwritable(error, f"out={path}") from error


def _render_report(findings: ComparisonResult | VoteFindings, suffix: str) -> str:
    """Return the report as HTML, JSON or Markdown."""
    if isinstance(findings, VoteFindings):
        if suffix == ".html":
            return votes_html(findings)
        return votes_json(findings) if suffix == ".json" else votes_markdown(findings, "#")
    if suffix == ".html":
        from vlbench.compare.report.html_report import render_html  # imports matplotlib

        return render_html(findings)
    return render_json(findings) if suffix == ".json" else render_markdown(findings)


def _find_run_folders(folders: Sequence[Path]) -> list[Path]:
    """Return the given run folders, and the finished runs inside of the other folders.

    The trials of a learning-rate sweep are left out.
    """
    run_folders: list[Path] = []
    for folder in folders:
        nested = [
            file.parent
            for file in files_below(folder, "results.json")
            if _is_run(file.parent) and not is_trial(file.parent)
        ]
        is_run = (folder / "recipe.yaml").is_file()
        if not is_run and not nested:
            raise UserError(f"{folder} is no run folder, and none lies in it that is finished")
        run_folders += [folder] if is_run else nested
    return list(dict.fromkeys(run_folders))


def _is_run(folder: Path) -> bool:
    """Tell whether a results.json is of a run: those of other programs lie alone.

    A run that lacks one of its other files is an error where it is loaded.
    """
    return any((folder / name).is_file() for name in ("recipe.yaml", "answers.jsonl"))
