"""`python -m vlbench report DIR...`: compare finished runs, as Markdown and HTML."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from vlbench.compare.report.analysis import ComparisonResult, analyze_runs
from vlbench.compare.report.finished_runs import SWEEP_FOLDER, describe_sweep, load_finished_run
from vlbench.compare.report.markdown_report import render_markdown
from vlbench.errors import UserError
from vlbench.text_files import write_atomically

REPORT_SUFFIXES = (".md", ".html")


def run_report(arguments: list[str]) -> int:
    """Compare the runs in the folders `words`, print the report, write it to `to=FILE.md|html`."""
    to = [
        Path(word.removeprefix("to=")).expanduser() for word in arguments if word.startswith("to=")
    ]
    folders = [Path(word).expanduser() for word in arguments if not word.startswith("to=")]
    forms = [path.suffix for path in to]
    if not folders or len(set(forms)) < len(forms):
        raise UserError("report takes run folders, and to=FILE.md and to=FILE.html once each")
    wrong = [path for path in to if path.suffix not in REPORT_SUFFIXES]
    if wrong:
        raise UserError(f"to={wrong[0]} is no form of a report: to=FILE.md or to=FILE.html")
    notes = [note for folder in folders for note in describe_sweep(folder)]
    findings = analyze_runs(
        [load_finished_run(folder) for folder in _find_run_folders(folders)], notes=notes
    )
    for path in to:
        write_report(findings, path)
    print(render_markdown(findings))
    return 0


def write_report(findings: ComparisonResult, path: Path) -> None:
    """Write the report as HTML or Markdown, by the suffix of the file."""
    if path.suffix == ".html":
        from vlbench.compare.report.html_report import render_html  # imports matplotlib

        text = render_html(findings)
    else:
        text = render_markdown(findings) + "\n"
    try:
        write_atomically(path, text)
    except OSError as error:
        raise UserError(f"to={path} cannot be written ({error.strerror})") from error


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
