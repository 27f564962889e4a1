"""The import graph of vlbench: `python tests/import_graph.py` draws it, a line per room.

Every import counts: at the top, inside of functions, and for type checkers alone.
"""

from __future__ import annotations

import ast
from collections import defaultdict
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

PACKAGE = Path(__file__).parents[1] / "vlbench"

LAYERS = (
    ("version", "errors", "stop_signals", "garbage_collection"),
    ("compat", "regular_files"),
    ("file_lock", "system_errors"),
    (
        "text_files",
        "text_tables",
        "strict_values",
        "encoder_names",
        "state_dicts",
        "html_pages",
        "process_settings",
        "core_sharing",
        "new_folder",
        "hub_download",
    ),
    ("printable_streams", "key_errors"),
    ("command_line",),
    ("connector",),
    ("config",),
    ("distributed",),
    ("data",),
    ("processor",),
    ("model",),
    ("miniatures",),
    ("train",),
    ("planner", "check"),
    ("load_model",),
    ("evaluate",),
    ("contract_checks",),
    ("compare", "serve", "fit_command"),
    ("graft",),
    ("listing",),
    ("verbs",),
    ("python_fit", "program_help"),
    ("__init__",),
    ("command_dispatch",),
    ("__main__",),
)
"""Rooms from the bottom to the top; one imports its own, and those of the layers below."""

Graph = dict[str, set[str]]


def room_of(module: str) -> str:
    """Return the room of a dotted module: what stands directly inside of the package."""
    return module.split(".")[1] if "." in module else "__init__"


def module_files() -> dict[str, Path]:
    """Return the file of every module, by its dotted name."""
    files = {}
    for file in sorted(PACKAGE.rglob("*.py")):
        parts = file.relative_to(PACKAGE.parent).with_suffix("").parts
        files[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = file
    return files


def imported_modules(file: Path, modules: set[str]) -> Iterator[str]:
    """Give the modules of the package that a file imports, `from ROOM import MODULE` too."""
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in modules)
        elif isinstance(node, ast.ImportFrom) and node.module:
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                if inner in modules or node.module in modules:
                    yield inner if inner in modules else node.module


def import_graph() -> Graph:
    """Return which modules each module imports."""
    files = module_files()
    return {name: set(imported_modules(file, set(files))) - {name} for name, file in files.items()}


def find_circle(graph: Graph) -> list[str]:
    """Return modules that import each other in a circle, the first one again at the end."""
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        return list(error.args[1])
    return []


def find_upward_imports(graph: Graph) -> list[str]:
    """Return the imports of a room that is not in a lower layer, as `module -> module`."""
    layer_of = {room: index for index, rooms in enumerate(LAYERS) for room in rooms}
    return [
        f"{module} -> {other}"
        for module, others in graph.items()
        for other in sorted(others)
        if room_of(other) != room_of(module)
        and layer_of[room_of(other)] >= layer_of[room_of(module)]
    ]


def draw(graph: Graph) -> str:
    """Return the graph of rooms as text, the top layer first, with the number of imports."""
    counts: dict[str, dict[str, int]] = defaultdict(lambda: defaultdict(int))
    for module, others in graph.items():
        for other in others:
            if room_of(other) != room_of(module):
                counts[room_of(module)][room_of(other)] += 1
    lines = []
    for rooms in reversed(LAYERS):
        for room in rooms:
            arrows = ", ".join(f"{other} ({n})" for other, n in sorted(counts[room].items()))
            lines.append(f"{room:>16} -> {arrows}" if arrows else f"{room:>16}")
    return "\n".join(lines)


if __name__ == "__main__":
    print(draw(import_graph()))
