"""The page on tiles: its keys, image positions and figure are true."""

from __future__ import annotations

import re
import runpy
from pathlib import Path

import pytest

from vlbench.config.model_schema import TilingConfig
from vlbench.data.image_tiling import ImageTiling, TiledImage
from vlbench.data.native_aspect import choose_patch_grid, keep_aspect
from vlbench.data.view_layout import ViewLayout, ViewSettings

NATIVE = ViewLayout(ViewSettings(None), 384, 576, (24, 24))
DOCS = Path(__file__).parent.parent / "docs"
PAGE = (DOCS / "tiles.md").read_text(encoding="utf-8")
LAYOUTS = (  # of the columns of the table behind the first
    ViewLayout(ViewSettings(ImageTiling(4), "newline"), 336, 576, (24, 24)),
    ViewLayout(ViewSettings(ImageTiling(6, "internvl"), "none"), 448, 256, (16, 16)),
    ViewLayout(ViewSettings(ImageTiling(12, "internvl"), "none"), 448, 256, (16, 16)),
)


def test_keys_and_defaults_are_those_of_the_schema() -> None:
    told = dict(re.findall(r"^\| `(\w+)` \| `(\w+)` \|", PAGE, re.MULTILINE))
    fields = TilingConfig.model_fields.items()
    words = {True: "true", False: "false", None: "null"}
    known = {name: field.default for name, field in fields}
    assert told == {
        name: words[value] if isinstance(value, bool) or value is None else str(value)
        for name, value in known.items()
    }


@pytest.mark.parametrize(
    "row", re.findall(r"^\| (\d+ x \d+) \| (\d+) \| (.*) \|$", PAGE, re.MULTILINE)
)
def test_image_positions_are_those_of_the_layout(row: tuple[str, str, str]) -> None:
    width, height = map(int, row[0].split(" x "))
    assert row[1] == "576"
    for layout, told in zip(LAYOUTS, row[2].split(" | "), strict=True):
        tiling = layout.settings.tiling
        grid = tiling.choose_grid(width, height, layout.side)
        image = TiledImage(None, (width, height), grid, tiling.list_views(grid))  # type: ignore[arg-type]
        assert told == f"{layout.count_positions(image):,} ({grid[0]} x {grid[1]})"


@pytest.mark.parametrize(
    "row", re.findall(r"^\| (\d+) x (\d+).* \| (\d+ x .*) \| (\d+) \| (\d+) \|$", PAGE, re.M)
)
def test_native_grids_are_those_of_the_rule(row: tuple[str, ...]) -> None:
    width, height = int(row[0]), int(row[1])
    rows, columns = choose_patch_grid(width, height, 16, 576)
    assert row[2] == f"{rows} x {columns} = {rows * columns}"
    image = keep_aspect(None, (width, height), 16, 576)  # type: ignore[arg-type]
    assert int(row[3]) == NATIVE.count_positions(image) == rows * (columns + 1)
    assert int(row[4]) == int(576 * min(width, height) / max(width, height))


def test_the_figure_is_what_its_script_draws() -> None:
    drawn = runpy.run_path(str(DOCS / "draw_tiles.py"))["draw"]()
    assert drawn == (DOCS / "tiles.svg").read_text(encoding="utf-8")
