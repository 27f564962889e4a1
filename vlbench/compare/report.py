"""`python -m vlbench report DIR...`: what finished runs say about each other, in two forms."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from vlbench.compare.findings import Findings, find
from vlbench.compare.markdown import markdown
from vlbench.compare.runs import load
from vlbench.compare.sweep import FOLDER, told
from vlbench.files import write_whole
from vlbench.mistakes import Mistake

FORMS = (".md", ".html")


def main(words: list[str]) -> int:
    """Compare the runs in the folders `words`, print the report, write it to `to=FILE.md|html`."""
    to = [Path(word.removeprefix("to=")).expanduser() for word in words if word.startswith("to=")]
    folders = [Path(word).expanduser() for word in words if not word.startswith("to=")]
    forms = [path.suffix for path in to]
    if not folders or len(set(forms)) < len(forms):
        raise Mistake("report takes run folders, and to=FILE.md and to=FILE.html once each")
    wrong = [path for path in to if path.suffix not in FORMS]
    if wrong:
        raise Mistake(f"to={wrong[0]} is no form of a report: to=FILE.md or to=FILE.html")
    notes = [note for folder in folders for note in told(folder)]
    findings = find([load(folder) for folder in _runs_in(folders)], notes=notes)
    for path in to:
        write(findings, path)
    print(markdown(findings))
    return 0


def write(findings: Findings, path: Path) -> None:
    """Write the report in the form that the file's name says."""
    if path.suffix == ".html":
        from vlbench.compare.page import page  # it imports what draws

        text = page(findings)
    else:
        text = markdown(findings) + "\n"
    try:
        write_whole(path, text)
    except OSError as error:
        raise Mistake(f"to={path} cannot be written ({error.strerror})") from error


def _runs_in(folders: Sequence[Path]) -> list[Path]:
    """Return the run folders that are given, and the finished ones inside of other folders.

    Runs that only tried learning rates are left out.
    """
    found: list[Path] = []
    for folder in folders:
        inside = sorted(
            file.parent
            for file in folder.rglob("results.json")
            if FOLDER not in file.relative_to(folder).parts
        )
        own = (folder / "recipe.yaml").is_file()
        if not own and not inside:
            raise Mistake(f"{folder} is no run folder, and none lies in it that is finished")
        found += [folder] if own else inside
    return list(dict.fromkeys(found))
