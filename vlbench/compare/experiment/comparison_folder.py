"""Which folders are a comparison's own: in no other one are files overwritten.

A comparison writes its command first, so that one that was killed while it began is known by that.
Earlier versions wrote none; their folders hold runs, and files of known names.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from vlbench.compare.report.curve_plan import CURVE_FILE
from vlbench.compare.report.nested_files import files_below
from vlbench.compare.report.sweep_record import SWEEP_FILE
from vlbench.compare.report.unfinished_runs import is_trial
from vlbench.errors import UserError
from vlbench.file_lock import LOCK_FILE
from vlbench.text_files import read_text
from vlbench.text_tables import list_some

COMMAND_FILE, PROBE_FILE = "command.txt", "plan.json"
COMMAND_BEGINNING = "python -m vlbench compare"
FILES_BESIDE_RUNS = {
    *("report.md", "report.html", "report.json", "array.sh", "commands.txt"),
    *(PROBE_FILE, SWEEP_FILE, CURVE_FILE),
}
CACHE_FOLDER = "features"  # of `freeze=vision`
MAX_DEPTH = 3  # of runs in a comparison: CURVE/BUDGET/SEED, or sweep/ROW/TRIAL
MAX_NAMED = 3  # other things that the refusal names


def check_comparison_folder(folder: Path) -> None:
    """Refuse a `run=` of compare that holds anything but a comparison."""
    if not folder.is_dir():  # new, or refused where it is made
        return
    entries = sorted(folder.iterdir())
    command = folder / COMMAND_FILE
    if command.is_file():
        if read_text(command).startswith(COMMAND_BEGINNING):
            return
        others = [command]
    else:
        has_runs = any(_holds_runs_alone(entry, MAX_DEPTH) for entry in entries)
        others = [entry for entry in entries if not _is_own(entry, has_runs)]
    if others:
        named = list_some([entry.name for entry in others], MAX_NAMED)
        raise UserError(
            f"run={folder} is a folder with other things in it ({named}), in which a "
            "comparison would overwrite files; name a new one"
        )


def other_runs_note(folder: Path, run_folders: Sequence[Path]) -> list[str]:
    """Return a sentence on finished runs in a comparison's folder that its report leaves out.

    They are those of rows or seeds that an earlier command named; `run_folders` are those of this
    one. [] where there are none; trials of a sweep are no rows.
    """
    own = {*run_folders}
    others = [
        file.parent.relative_to(folder).as_posix()
        for file in files_below(folder, "results.json")
        if file.parent not in own
        and (file.parent / "recipe.yaml").is_file()
        and not is_trial(file.parent)
    ]
    if not others:
        return []
    return [
        f"Not in this report, as the command does not name their rows or seeds: "
        f"{list_some(others, MAX_NAMED)}. "
        f"`report {folder}` compares all runs of the folder."
    ]


def _is_own(entry: Path, has_runs: bool) -> bool:
    """Tell whether an entry of a folder without a command is a comparison's."""
    if entry.name.startswith("."):
        return entry.name.startswith((LOCK_FILE, f".{COMMAND_FILE}."))  # a killed one left them
    if entry.is_dir():
        return _holds_runs_alone(entry, MAX_DEPTH) or (has_runs and entry.name == CACHE_FOLDER)
    return has_runs and (entry.name in FILES_BESIDE_RUNS or entry.suffix == ".log")


def _holds_runs_alone(folder: Path, depth: int) -> bool:
    """Tell whether a folder is a run, or holds runs and their logs alone, at most so deep."""
    if not folder.is_dir() or depth == 0:
        return False
    if (folder / "recipe.yaml").is_file():
        return True
    inner = [entry for entry in folder.iterdir() if not entry.name.startswith(".")]
    return any(entry.is_dir() for entry in inner) and all(
        entry.suffix == ".log" or _holds_runs_alone(entry, depth - 1) for entry in inner
    )
