"""`test-connector`: each way to break the contract fails on its own line, and says what to do."""

from __future__ import annotations

from pathlib import Path

import pytest

from vlbench.__main__ import main
from vlbench.connector import registry
from vlbench.contract_checks.contract_table import CONTRACT

RIGHT = """import torch
from torch import nn
from vlbench.connector import Connector, Shapes


class Mine(Connector):
    def __init__(self, shapes: Shapes, tokens: int = 2) -> None:
        super().__init__()
        self.tokens_per_image = tokens
        self.tokens = tokens
        self.scale = 1 + torch.rand(1, dtype=torch.float64)
        self.fc = nn.Linear(shapes.vision_width, shapes.lm_width * tokens)

    def forward(self, features):
        return self.fc(features.mean(1)).unflatten(-1, (self.tokens, -1))
"""
RETURN = "return self.fc(features.mean(1)).unflatten(-1, (self.tokens, -1))"
MISTAKES = {
    "kwargs": ("tokens: int = 2", "tokens: int = 2, **more", ["built"], "takes **more"),
    "args": ("tokens: int = 2", "*more, tokens: int = 2", ["built"], "takes *more"),
    "tokens": ("self.tokens_per_image = tokens", "", ["shapes"], "[2, 2, 32]"),
    "rank": (RETURN, "return self.fc(features.mean(1))", ["shapes"], "[2, 64] for 2 images"),
    "any_grid": (
        "tokens: int = 2) -> None:",
        "tokens: int = 4) -> None:\n        self.any_grid, self.token_grid = True, shapes.grid",
        ["any_grid"],
        "depends on other patches than its own",
    ),
    "any_count": ("def __init__", "any_grid = True\n\n    def __init__", ["any_grid"], "(2, None"),
    "nan": (RETURN, f"{RETURN} / 0 * 0", ["finite"], "128 of 128 numbers"),
    "random": (RETURN, f"{RETURN} * torch.rand(1)", ["deterministic"], "two results"),
    "random_in_eval": (
        RETURN,
        f"noise = 1 if self.training else torch.rand(1)\n        {RETURN} * noise",
        ["deterministic"],
        "in evaluation",
    ),
    "dropout": (
        "features.mean(1)",
        "nn.functional.dropout(features.mean(1), training=self.training)",
        ["deterministic"],
        "in training",
    ),
    "counter": (
        RETURN,
        f"self.calls = getattr(self, 'calls', 0) + 1\n        {RETURN} * self.calls",
        ["deterministic"],
        "two results",
    ),
    "blind": (
        "features.mean(1)",
        "torch.ones_like(features).mean(1)",
        ["image_use", "diagnostics"],
        "two different images gave the same visual tokens",
    ),
    "idle": (
        "self.tokens = tokens",
        "self.tokens, self.idle = tokens, nn.Parameter(torch.ones(2))",
        ["gradients", "text_alone", "lora"],
        "no gradient for idle",
    ),
    "batch": (RETURN, f"{RETURN} + features.mean()", ["neighbours"], "packing changes connector."),
    "unsaved": (
        RETURN,
        f"{RETURN} * self.scale",
        ["saved_state", "device"],
        "the loss was",
    ),
    "late_layer": (
        RETURN,
        f"if not hasattr(self, 'late'):\n            self.late = nn.Linear(1, 1)\n        {RETURN}",
        ["layers"],
        "forward makes late.bias, late.weight",
    ),
    "in_place": (RETURN, f"features.mul_(2)\n        {RETURN}", ["inputs"], "writes into the feat"),
    "constant": (
        RETURN,
        f"{RETURN} * torch.arange(32, dtype=torch.float64)",
        ["device"],
        "is not on the expected device meta",
    ),
    "value": (
        RETURN,
        f"if features.mean().item() > 9:\n            features = features + 1\n        {RETURN}",
        ["device"],
        "item",
    ),
    "plain_list": (
        "self.tokens = tokens",
        "self.tokens, self.all = tokens, [nn.Linear(2, 2)]",
        ["built"],
        "self.all is a plain list with a Linear in it",
    ),
    "no_forward": (
        "def forward",
        "def foward",
        ["built"],
        "no method forward(self, features).",
    ),
    "metrics": (
        RETURN,
        f"{RETURN}\n\n    def metrics(self):\n        return {{'a': '1'}}",
        ["metrics"],
        "no float: a",
    ),
    "sizes": (
        "def __init__",
        "size_options = {'hidden': (1, 2)}\n\n    def __init__",
        ["size_options"],
        "'hidden'; options: tokens",
    ),
}
"""What is replaced by what, which checks fail then, and words of the first line that does."""


def write_connector(folder: Path, name: str, old: str = "", new: str = "") -> Path:
    """Write the right connector with one change."""
    assert old in RIGHT
    file = folder / f"{name}.py"
    file.write_text(RIGHT.replace(old, new, 1) if old else RIGHT)
    return file


def failed_checks(text: str) -> list[str]:
    return [line.split()[1] for line in text.splitlines() if line.startswith("FAILED")]


def test_a_right_connector_passes_as_a_file_and_by_name(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "connectors").mkdir()
    write_connector(tmp_path / "connectors", "own_one")
    for words in (["own_one"], ["connectors/own_one.py", "connector.tokens=3"]):
        assert main(["test-connector", *words]) == 0
        *lines, summary, last = capsys.readouterr().out.splitlines()
        assert [line.split()[:2] for line in lines[1:]] == [["ok", one.name] for one in CONTRACT]
        assert summary == f"{len(CONTRACT)} of {len(CONTRACT)} checks hold."
        assert last.startswith("Not checked here: ") and "DDP" in last
    assert "tokens=3" in lines[0]


@pytest.mark.parametrize("name", MISTAKES)
def test_a_wrong_connector_fails_on_the_right_line(name, tmp_path, capsys):
    old, new, failing, words = MISTAKES[name]
    assert main(["test-connector", str(write_connector(tmp_path, name, old, new))]) == 1
    text = capsys.readouterr().out
    assert failed_checks(text) == failing
    first = next(line for line in text.splitlines() if line.startswith("FAILED"))
    remedy = next(check.remedy for check in CONTRACT if check.name == failing[0])
    assert words in first and first.endswith(f"What to do: {remedy}.")
    assert "Traceback" not in text and "Not checked here: " in text


TAKES_A_VIEW_FOR_AN_IMAGE = """
from torch import nn
from vlbench.connector.base import Connector, ImagePlaces, Shapes

class Added(Connector):
    inject_layers = (1,)

    def __init__(self, shapes: Shapes) -> None:
        super().__init__()
        self.tokens_per_image = shapes.patches
        self.fc = nn.Linear(shapes.vision_width, shapes.lm_width)

    def forward(self, features):
        return self.fc(features)

    def inject(self, layer, hidden, visual, where: ImagePlaces):
        own = visual[where.image_index.clamp(min=0), where.token_index.clamp(min=0)]
        return hidden + own * (where.token_index >= 0)[..., None]
"""


def test_a_connector_that_takes_a_view_for_an_image_is_told(tmp_path, capsys):
    file = tmp_path / "added.py"
    file.write_text(TAKES_A_VIEW_FOR_AN_IMAGE)
    assert main(["test-connector", str(file)]) == 1
    assert failed_checks(capsys.readouterr().out) == ["views"]
    right = TAKES_A_VIEW_FOR_AN_IMAGE.partition("        own =")[0]
    file.write_text(f"{right}        return hidden + where.own_tokens(visual)\n")
    assert main(["test-connector", str(file)]) == 0


def test_what_its_code_raises_is_shown_by_its_own_frames(tmp_path, capsys):
    file = write_connector(tmp_path, "raises", RETURN, "return self.helper(features)")
    file.write_text(f"{file.read_text()}\n    def helper(self, x):\n        return {{}}['key']\n")
    assert main(["test-connector", str(file)]) == 1
    lines = capsys.readouterr().out.splitlines()
    number = next(k for k, line in enumerate(lines) if line.startswith("FAILED"))
    assert "KeyError: 'key'" in lines[number]
    assert lines[number + 1].strip() == f"{file}:15 in forward: return self.helper(features)"
    assert lines[number + 2].strip() == f"{file}:18 in helper: return {{}}['key']"
    assert lines[number + 3].startswith("2 of ")


def test_an_option_that_does_not_fit_says_where(tmp_path, capsys):
    file = write_connector(tmp_path, "narrow", "self.tokens = tokens", "self.tokens = 7 // tokens")
    assert main(["test-connector", str(file), "connector.tokens=0"]) == 1
    text = capsys.readouterr().out
    assert "FAILED  built" in text and "ZeroDivisionError" in text and f"{file}:10 in" in text
    assert main(["test-connector", str(file), "connector.token=1"]) == 1
    assert "no option 'token'; it takes: tokens. Did you mean" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ([], "test-connector needs NAME|FILE"),
        (["llava_mpl"], "Did you mean 'llava_mlp'?"),
        (["nowhere/mine.py"], "is no file"),
        (["llava_mlp", "linear"], "takes one connector, given 'llava_mlp', 'linear'"),
        (["connector.depth=2"], "takes one connector, given none"),
        (["broken.py"], "broken.py:1: ZeroDivisionError"),
        (["empty.py"], "must define exactly one subclass of Connector, found none"),
    ],
)
def test_mistakes_at_the_command_line_are_one_line(words, told, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "broken.py").write_text("1 / 0\n")
    (tmp_path / "empty.py").write_text("")
    assert main(["test-connector", *words]) == 2
    captured = capsys.readouterr()
    assert told in captured.err and len(captured.err.splitlines()) == 1


def test_a_file_of_ones_own_does_not_get_the_options_of_a_shipped_one(tmp_path, capsys):
    assert main(["test-connector", str(write_connector(tmp_path, "resampler"))]) == 0
    assert "side" not in capsys.readouterr().out.splitlines()[0]
    registry.load_connector("resampler")  # the shipped one again, by its name


def test_a_shipped_connector_passes(capsys):
    assert main(["test-connector", "resampler"]) == 0
    assert "with side=2, heads=2" in capsys.readouterr().out.splitlines()[0]
