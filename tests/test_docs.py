"""The page on connectors: its options, costs, commands, connectors and figure are true."""

from __future__ import annotations

import re
import runpy
import shlex
from pathlib import Path

import pytest
import torch
from random_vlm import make_batch, make_sample, open_gates, small_vlm
from test_vlm import assert_same

from vlbench.config import recipe as recipes
from vlbench.connector import registry
from vlbench.connector.base import Shapes
from vlbench.connector.blank_inputs import blank_inputs
from vlbench.connector.levels import first_level
from vlbench.contract_checks.gradient_comparison import objective_gradients
from vlbench.verbs import VERBS

DOCS = Path(__file__).parent.parent / "docs"
PAGE = (DOCS / "connectors.md").read_text(encoding="utf-8")
COMMANDS = re.findall(r"^    python -m vlbench (.*)$", PAGE, re.MULTILINE)
SHIPPED = sorted(file.stem for file in registry.shipped_folder("connectors").glob("[!_.]*.py"))
SECTIONS = dict(re.findall(r"^### `(\w+)`\n(.*?)(?=^##)", PAGE, re.MULTILINE | re.DOTALL))
BLOCK = re.compile(r"`connectors/(\w+)\.py`:\n\n```python\n(.*?)```", re.DOTALL)
BLOCKS = dict(BLOCK.findall(PAGE))


def written(default: object) -> str:
    """Return a default as a recipe writes it."""
    return str(default).lower() if isinstance(default, bool) else str(default)


def cells(text: str) -> list[list[str]]:
    """Return the rows of the tables in `text` that begin with a name in backticks."""
    rows = re.findall(r"^\| (`\w+` \|.*) \|$", text, re.MULTILINE)
    return [[cell.strip() for cell in row.split(" | ")] for row in rows]


def test_every_connector_has_a_section() -> None:
    assert sorted(SECTIONS) == SHIPPED


@pytest.mark.parametrize("name", SHIPPED)
def test_options_and_defaults_are_those_of_the_signature(name: str) -> None:
    known = {
        key: written(option.default) for key, option in registry.connector_options(name).items()
    }
    told = {row[0].strip("`"): row[1].strip("`") for row in cells(SECTIONS[name])}
    assert told == known


def test_the_costs_are_those_at_6b() -> None:
    told = {row[0].strip("`"): row[1:4] for row in cells(PAGE.partition("### On two cores")[0])}
    shapes = Shapes(1024, (32, 32), 1280, 4096, 32, vision_blocks=32, vision_layer=30)
    known = {}
    for name in SHIPPED:
        with torch.device("meta"):
            one = registry.load_connector(name)(shapes)
            latents = one.count_latents(one(*blank_inputs(one, shapes)))
        count = sum(parameter.numel() for parameter in one.parameters())
        known[name] = [f"{count:,}", str(one.tokens_per_image), str(latents)]
    assert told == known


def test_the_page_has_commands() -> None:
    assert "fit recipe=yivl_blip2" in COMMANDS and len(COMMANDS) >= 12


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_is_understood(
    command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place(tmp_path, monkeypatch)
    verb, *words = shlex.split(command)
    assert verb in VERBS
    if verb in ("fit", "show"):
        recipes.load_recipe(words)


def place(folder: Path, monkeypatch: pytest.MonkeyPatch, page: str = PAGE) -> None:
    """Write a page's own connectors where a user would."""
    (folder / "connectors").mkdir()
    for name, code in BLOCK.findall(page):
        (folder / "connectors" / f"{name}.py").write_text(code, encoding="utf-8")
    monkeypatch.chdir(folder)


@pytest.mark.parametrize(
    ("name", "places", "tokens"), [("mine", 2, 2), ("deep", 1, 1), ("two", 4, 4)]
)
def test_the_connectors_of_the_page_see(
    name: str, places: int, tokens: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place(tmp_path, monkeypatch)
    vlm = open_gates(small_vlm(registry.load_connector(name)))
    batch = make_batch(vlm, [[make_sample(1, images=2), make_sample(2)]])
    assert vlm.connector.tokens_per_image == places
    assert first_level(vlm.visual(batch)).shape == (3, tokens, vlm.model.shapes.lm_width)
    with torch.no_grad():
        seen, counted = (
            vlm(batch).loss_sum,
            vlm.model.merge_embeddings(batch, vlm.visual(batch)).shape,
        )
        batch.pixels = batch.pixels.flip(0)
        assert counted == (*batch.input_ids.shape, vlm.model.shapes.lm_width)
        assert seen.isfinite() and not seen.equal(vlm(batch).loss_sum)


def test_the_page_has_three_connectors() -> None:
    assert sorted(BLOCKS) == ["deep", "mine", "two"]
    assert PAGE.count("```python") == 3


def test_the_figure_is_what_its_script_draws() -> None:
    drawn = runpy.run_path(str(DOCS / "draw_connectors.py"))["draw_page"]()
    assert (DOCS / "connectors.svg").read_text(encoding="utf-8") == drawn
    assert "](connectors.svg)" in PAGE


def test_the_objective_of_a_connector_of_ones_own_does_not_depend_on_the_packing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place(tmp_path, monkeypatch, (DOCS / "objectives.md").read_text(encoding="utf-8"))
    vlm = small_vlm(registry.load_connector("pairs")).to(torch.float64)
    vlm.model.set_objective("clip")
    samples = [make_sample(number, words=number) for number in range(1, 7)]
    whole = objective_gradients(vlm, [samples])
    assert whole[0] > 6
    for rows in ([samples[:1], samples[:0:-1]], [*([one] for one in samples), [make_sample(9, 0)]]):
        assert_same(whole, objective_gradients(vlm, rows), 1e-9)
