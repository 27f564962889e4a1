"""The tutorial's notebook is executed, is stored without outputs, and is a page of the site."""

from __future__ import annotations

import ast
import json
import runpy
from pathlib import Path
from typing import Any

import pytest

DOCS = Path(__file__).parent.parent / "docs"
NOTEBOOK = DOCS / "tutorials" / "first_model.ipynb"
CELLS: list[dict[str, Any]] = json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]
CODE = [cell for cell in CELLS if cell["cell_type"] == "code"]


def test_it_is_stored_without_outputs_and_its_code_is_python():
    assert len(CODE) >= 5
    for cell in CODE:
        assert cell["outputs"] == [] and cell["execution_count"] is None
        ast.parse("".join(cell["source"]))


def test_the_site_has_its_cells():
    hooks = runpy.run_path(str(DOCS / "site_hooks.py"))
    text = hooks["notebook_text"](NOTEBOOK)
    assert text.startswith("\nFrom nothing") and text.count("```python\n") == len(CODE)
    assert "{{ notebook: first_model.ipynb }}" in NOTEBOOK.with_suffix(".md").read_text("utf-8")


@pytest.mark.slow
def test_it_runs_from_top_to_bottom_and_shows_pictures(tmp_path):
    import nbformat
    from nbclient import NotebookClient

    notebook = nbformat.read(NOTEBOOK, as_version=4)
    resources = {"metadata": {"path": str(tmp_path)}}
    NotebookClient(notebook, timeout=600, resources=resources).execute()
    nbformat.validate(notebook)
    pages = [
        output["data"]["text/html"]
        for cell in notebook.cells
        for output in cell.get("outputs", [])
        if "text/html" in output.get("data", {})
    ]
    assert len(pages) == 2 and all("data:image/png;base64," in page for page in pages)
    texts = [output.get("text", "") for output in notebook.cells[-1]["outputs"]]
    assert "".join(texts).count("accuracy") == 2
    assert {folder.name for folder in (tmp_path / "runs").iterdir()} == {"mlp", "qformer"}
