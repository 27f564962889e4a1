"""What imports what: modules form layers, without circles and without arrows upwards."""

from __future__ import annotations

from pathlib import Path

from import_graph import (
    LAYERS,
    draw,
    find_circle,
    find_upward_imports,
    import_graph,
    imported_modules,
    room_of,
)


def test_every_room_has_a_layer():
    rooms = {room_of(module) for module in import_graph()}
    assert rooms <= {room for layer in LAYERS for room in layer}


def test_no_circle():
    assert find_circle(import_graph()) == []


def test_nothing_imports_upwards():
    graph = import_graph()
    assert find_upward_imports(graph) == [], "\n" + draw(graph)


def test_all_kinds_of_imports_count(tmp_path: Path):
    file = tmp_path / "module.py"
    file.write_text(
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from a.b import c\n"
        "def late():\n    import a.d\n    from a import e\n"
    )
    assert set(imported_modules(file, {"a.b", "a.d", "a.e"})) == {"a.b", "a.d", "a.e"}


def test_a_circle_and_an_upward_arrow_are_found():
    graph = {"v.data": {"v.train"}, "v.train": {"v.data"}, "v.errors": set()}
    assert set(find_circle(graph)) == {"v.data", "v.train"}
    assert find_upward_imports(graph) == ["v.data -> v.train"]
