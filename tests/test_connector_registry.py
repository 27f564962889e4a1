"""Connectors by name: drop-in files, shipped files, entry points, and what goes wrong with them."""

from __future__ import annotations

import importlib.metadata
import multiprocessing
import pickle
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal, get_args

import pytest

from vlbench.config.recipe import load_recipe
from vlbench.connector import registry
from vlbench.connector.base import Connector
from vlbench.errors import UserError

MINE = """
from torch import nn
from vlbench.connector import Connector

class Mine(Connector):
    def __init__(self, shapes, bias=True):
        super().__init__()
        self.tokens_per_image = shapes.patches
        self.proj = nn.Linear(shapes.vision_width, shapes.lm_width, bias=bias)

    def forward(self, features):
        return self.proj(features)
"""


@pytest.fixture
def drop(tmp_path, monkeypatch):
    """Return a function that writes `connectors/NAME.py` in an otherwise empty working folder."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "connectors").mkdir()

    def write(text: str, name: str = "mine") -> Path:
        path = tmp_path / "connectors" / f"{name}.py"
        path.write_text(text, encoding="utf-8")
        return path

    return write


def refused(name: str) -> str:
    """Return the words with which `name` is refused."""
    with pytest.raises(UserError) as caught:
        registry.load_connector(name)
    return str(caught.value)


def test_threads_that_ask_at_once_wait_for_the_file_to_be_executed(drop):
    """Its first line lets the others come while it is executed."""
    drop("import time\ntime.sleep(0.3)\n" + MINE)
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(registry.load_connector, ["mine"] * 4))
    assert len(set(found)) == 1 and found[0].__name__ == "Mine"


def entry(monkeypatch: pytest.MonkeyPatch, *values: str) -> None:
    """Pretend that packages declare these `name = value` entry points."""
    made = [
        importlib.metadata.EntryPoint(*value.split(" = "), group=registry.ENTRY_POINT_GROUP)
        for value in values
    ]
    monkeypatch.setattr(importlib.metadata, "entry_points", lambda group: made)


def test_shipped_connectors_are_found_from_anywhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert "llava_mlp" in registry.connector_locations()
    assert issubclass(registry.load_connector("llava_mlp"), Connector)


def test_the_checkout_itself_shadows_nothing(monkeypatch):
    monkeypatch.chdir(registry.shipped_folder("connectors").parent)
    assert len(registry.find_connectors()["llava_mlp"]) == 1


def test_a_dropped_file_is_a_connector(drop):
    drop(MINE)
    cls = registry.load_connector("mine")
    assert cls is registry.load_connector("mine") and cls.__name__ == "Mine"
    assert (
        registry.connector_options("mine")
        == registry.connector_options(cls)
        == {"bias": (bool, True)}
    )
    assert pickle.loads(pickle.dumps(cls)) is cls


def test_another_process_unpickles_its_class(drop):
    drop(MINE)
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        assert (
            pool.apply(registry.connector_options, (registry.load_connector("mine"),))[
                "bias"
            ].default
            is True
        )


def test_a_file_of_the_same_name_elsewhere_is_another_class(drop, tmp_path, monkeypatch):
    drop(MINE)
    first = registry.load_connector("mine")
    other = tmp_path / "other"
    (other / "connectors").mkdir(parents=True)
    (other / "connectors" / "mine.py").write_text(MINE.replace("Mine", "Other"))
    monkeypatch.chdir(other)
    assert registry.load_connector("mine").__name__ == "Other" != first.__name__


def test_only_the_one_asked_for_is_loaded(drop):
    drop("raise RuntimeError('must not run')", "broken")
    drop(MINE)
    registry.load_connector("mine")
    assert {"broken", "mine", "llava_mlp"} <= set(registry.connector_locations())


def test_names_are_exact(drop):
    drop(MINE, "mlp")
    message = refused("mpl")
    assert re.search(r"no connector .mpl.; known: .*llava_mlp, .*mlp.*", message)
    assert "Did you mean 'mlp'?" in message


def test_a_shadow_of_a_shipped_connector_is_refused(drop):
    path = drop(MINE, "llava_mlp")
    message = refused("llava_mlp")
    assert "defined twice" in message and str(path) in message
    assert str(registry.shipped_folder("connectors") / "llava_mlp.py") in message


def test_entry_points(drop, monkeypatch):
    llava = f"{registry.load_connector('llava_mlp').__module__}:LlavaMLP"
    entry(monkeypatch, f"theirs = {llava}", "wrong = json:dumps", "gone = no_such_module:X")
    assert registry.load_connector("theirs") is registry.load_connector("llava_mlp")
    assert list(registry.connector_options("theirs")) == ["depth", "norm", "mlp_ratio"]
    assert "not a subclass of Connector" in refused("wrong")
    assert "ModuleNotFoundError" in refused("gone") and "no_such_module:X" in refused("gone")


def test_two_entry_points_or_one_and_a_shipped_connector_are_refused(drop, monkeypatch):
    entry(monkeypatch, "twin = a:A", "twin = b:B", "llava_mlp = c:C")
    assert "a:A" in refused("twin") and "b:B" in refused("twin")
    assert "c:C" in refused("llava_mlp") and "llava_mlp.py" in refused("llava_mlp")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("x = 1\n", "exactly one subclass of Connector, found none"),
        (MINE + "\nclass Two(Mine):\n    pass\n", "found Mine, Two"),
        ("\nimport no_such_thing\n", "mine.py:2: ModuleNotFoundError: No module"),
        ("\n\n1 / 0\n", "mine.py:3: ZeroDivisionError: division by zero"),
        ("class Mine(:\n", "mine.py: SyntaxError: invalid syntax (mine.py, line 1)"),
    ],
)
def test_files_that_cannot_be_used_are_one_line(drop, text, expected):
    drop(text)
    message = refused("mine")
    assert expected in message and "\n" not in message


def test_private_classes_and_imported_connectors_do_not_count(drop):
    drop(MINE + "\nclass _Helper(Mine):\n    pass\n")
    assert registry.load_connector("mine").__name__ == "Mine"
    drop(
        "from vlbench.connector import registry\n"
        "Base = registry.load_connector('llava_mlp')\n"
        "class Deep(Base):\n"
        "    def __init__(self, shapes, depth: int = 4):\n"
        "        super().__init__(shapes, depth)\n",
        "deep",
    )
    assert registry.connector_options("deep") == {"depth": (int, 4)}
    assert registry.resolve_options("deep", {"depth": 2})[1] == []


def test_a_dataclass_beside_the_connector(drop):
    drop(
        "from __future__ import annotations\nfrom dataclasses import dataclass\n"
        "@dataclass\nclass Part:\n    width: int = 3\n" + MINE.replace("\nfrom", "\nfrom", 1)
    )
    assert registry.connector_options("mine")["bias"].kind is bool
    assert registry.load_connector("mine").__name__ == "Mine"


SIGNATURE = """
from typing import Literal, Optional
from vlbench.connector import Connector

class Mine(Connector):
    def __init__(self, shapes, a: int, b: float | None = None, c: Optional[str] = None, *,
                 d: tuple[int, ...] = (1, 2), e: Literal["x", "y"] = "x", f=None):
        super().__init__()
"""


def test_text_and_class_tell_the_same_signature(drop):
    drop(SIGNATURE)
    from_text = registry.connector_options("mine")
    from_class = registry.connector_options(registry.load_connector("mine"))
    assert list(from_text) == list("abcdef") and from_text == from_class
    assert from_text["e"].kind == Literal["x", "y"] and from_text["f"].kind is Any
    assert set(get_args(from_text["b"].kind)) == {float, type(None)}


@pytest.mark.parametrize(
    ("annotation", "typed", "value"),
    [
        ("list[list[int]]", "[[1,2],[3]]", ((1, 2), (3,))),
        ("tuple[int, str]", "[1,2]", (1, "2")),
        ("tuple[Part, ...]", "[x]", ("x",)),
        ("list[nn.Module]", "[x]", ("x",)),
        ("tuple[()]", "[x]", "[x]"),
        ("Part.Missing", "3", 3),
    ],
)
def test_nested_and_unknown_annotations(drop, annotation, typed, value):
    drop(
        "from __future__ import annotations\nfrom torch import nn\nclass Part: pass\n"
        + SIGNATURE.replace("a: int", f"a: {annotation} = 1")
    )
    words = ["recipe=yivl_llava", "connector.name=mine", f"connector.a={typed}"]
    assert load_recipe(words).connector["a"] == value


def test_a_computed_default_is_asked_of_the_class(drop):
    drop("WIDTH = 4 * 8\n" + MINE.replace("bias=True", "width: int = WIDTH"))
    assert registry.connector_options("mine") == {"width": (int, 32)}


def test_options_are_checked(drop):
    drop(SIGNATURE)
    assert (
        registry.resolve_options("mine", {"a": 1, "b": 2, "d": [4, 5], "e": "y", "f": 3})[1] == []
    )
    values, _ = registry.resolve_options("mine", {"a": 1, "b": 2, "d": [4]})
    assert values == {"a": 1, "b": 2.0, "c": None, "d": (4,), "e": "x", "f": None}
    lines = registry.resolve_options("mine", {"b": "2", "d": [True], "e": "z", "cc": 1})[1]
    expected = ("has no option 'cc'", "connector.a is missing", "connector.b must be a number")
    for words in (*expected, "connector.d must be a whole number, given true", "one of x, y"):
        assert any(words in line for line in lines), (words, lines)
    assert len(lines) == 5


@pytest.mark.parametrize("default", ["1", "2 * WIDTH"], ids=["from text", "from the class"])
def test_no_option_is_called_as_the_connectors_own_key(drop, default):
    drop("WIDTH = 4\n" + MINE.replace("bias=True", f"bias=True, name: int = {default}"))
    with pytest.raises(UserError, match="an option is called 'name', and connector.name of a"):
        load_recipe(["recipe=yivl_llava", "connector.name=mine"])


def test_looking_does_not_import_torch(drop):
    drop(MINE)
    program = (
        "import sys; from vlbench.connector import registry\n"
        "assert registry.resolve_options('mine', {'bais': 1})[1]\n"
        "registry.connector_options('llava_mlp')\n"
        "assert 'torch' not in sys.modules"
    )
    root = str(Path(registry.__file__).parents[2])
    subprocess.run([sys.executable, "-c", program], check=True, env={"PYTHONPATH": root})
