"""A researcher's connector with a mistake in it: one line, with the place in the file."""

from __future__ import annotations

import pytest
import torch

from vlbench.__main__ import main
from vlbench.connector.base import Connector, Shapes
from vlbench.model.connector_adaptation import load_adapted_state

FILE = """from torch import nn
from vlbench.connector import Connector

class Mine(Connector):
    def __init__(self, shapes):
        super().__init__()
        self.tokens_per_image = shapes.patches
        self.proj = nn.Linear(shapes.vision_width, shapes.lm_width)

    def forward(self, features):
        return self.proj(features)
"""
CLASS = "class Mine(Connector):\n"
MISTAKES = {
    "a patch too few": (
        "(features)\n",
        "(features[:, 1:])\n",
        "forward gave [4, 15, 128]",
    ),
    "a wrong width": ("shapes.lm_width)", "shapes.lm_width + 1)", "promised is [4, 16, 128]"),
    "no tokens_per_image": ("self.tokens_per_image =", "self.tokens =", "promised is [4, 1, 128]"),
    "a typo in forward": ("self.proj(f", "self.projj(f", "mine.py:11: AttributeError: 'Mine' obj"),
    "a typo in __init__": ("nn.Linear", "nn.Linea", "mine.py:8: AttributeError: module 'torch.nn'"),
    "a wrong input": ("shapes.vision_width,", "7,", "mine.py:11: RuntimeError: mat1 and mat2"),
    "a number that is not whole": (
        "= shapes.patches",
        "= shapes.patches / 1",
        "tokens_per_image is 16.0; wanted is a whole number of at least 1",
    ),
    "no return in forward": ("return self.proj", "self.proj", "forward gave NoneType; promised is"),
    "a list of levels": (
        "return self.proj(features)",
        "return [self.proj(features)]",
        "forward gave list; promised is a tensor [images, tokens, width], or a tuple of them",
    ),
    "a layer that there is not": (
        CLASS,
        f"{CLASS}    inject_layers = (99,)\n",
        "inject_layers names layer 99, and the language model has",
    ),
    "a tuple without its comma": (
        CLASS,
        f"{CLASS}    inject_layers = (1)\n",
        "inject_layers is 1; wanted are whole numbers in a tuple, as (3,) for one",
    ),
    "a block without its comma": (
        CLASS,
        f"{CLASS}    vision_layers = (-2)\n",
        "vision_layers is -2; wanted are whole numbers in a tuple",
    ),
    "no embedding of image positions": (
        CLASS,
        f"{CLASS}    replaces_image_tokens = False\n",
        "image_embedding, a parameter [lm_width] = [128]; given is None",
    ),
    "no return in inject": (
        CLASS,
        f"{CLASS}    inject_layers = (0,)\n"
        "    def inject(self, layer, hidden, visual, where):\n        hidden + 1\n",
        "inject gave NoneType for layer 0; promised is [",
    ),
    "no forward": (
        "def forward",
        "def forwards",
        "Mine has no method forward(self, features)",
    ),
    "no inject": (
        CLASS,
        f"{CLASS}    inject_layers = (0,)\n",
        "Mine has no method inject(self, layer, hidden, visual, where), and it names inject_l",
    ),
    "layers in a list": (
        "self.proj = ",
        "self.layers = [nn.Linear(2, 2)]\n        self.proj = ",
        "self.layers is a plain list with a Linear in it, which would not be trained, moved",
    ),
    "parameters in a mapping of lists": (
        "self.proj = ",
        "self.gates = {'a': [nn.Parameter(nn.Linear(2, 2).weight)]}\n        self.proj = ",
        "self.gates is a plain dict with a Parameter in it",
    ),
    "a lazy layer": (
        "nn.Linear(shapes.vision_width, ",
        "nn.LazyLinear(",
        "proj.weight has no shape before the first forward (a lazy layer)",
    ),
    "a layer that forward makes": (
        "        return self.proj(features)\n",
        "        if not hasattr(self, 'late'):\n"
        "            self.late = nn.Linear(128, 128)\n"
        "        return self.proj(self.late(features))\n",
        "connector mine: late.weight, late.bias did not exist before forward ran",
    ),
    "a loss that is no pair": (
        "        return self.proj(features)\n",
        "        return self.proj(features)\n"
        "    def losses(self, features, visual, batch):\n        return {'x': visual.mean()}\n",
        "its losses are Tensor for 'x'; promised is {name: (sum, count)}",
    ),
    "a loss that is not a sum": (
        "        return self.proj(features)\n",
        "        return self.proj(features)\n"
        "    def losses(self, features, visual, batch):\n        return {'x': (visual, 3)}\n",
        "128] as the sum of 'x'; promised is",
    ),
    "a file that ends the program": (CLASS, f"raise SystemExit(3)\n{CLASS}", "py:4: SystemExit: 3"),
    "too short in inject": (
        CLASS,
        f"{CLASS}    inject_layers = (0,)\n"
        "    def inject(self, layer, hidden, visual, where):\n        return hidden[:, 1:]\n",
        "the shape of hidden",
    ),
}


ONE_STEP = [
    "recipe=yivl_llava",
    "connector.name=mine",
    "only=chat",
    "stages.chat.steps=1",
    "stages.chat.global_batch_size=4",
    "stages.chat.image_size=56",
    "data.workers=0",
    "log.tensorboard=false",
]


@pytest.fixture
def write_connector(tmp_path, monkeypatch):
    """Return what writes the file of the connector `mine`, in the folder of the command."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "connectors").mkdir()
    return (tmp_path / "connectors/mine.py").write_text


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_one_line(write_connector, mistake, capsys):
    right, wrong, said = MISTAKES[mistake]
    write_connector(FILE.replace(right, wrong))
    assert main(["fit", *ONE_STEP]) == 2
    told = capsys.readouterr().err
    assert said in told and len(told.splitlines()) == 1


def test_parameters_without_a_gradient_are_named(write_connector, capsys):
    unused = FILE.replace("self.proj =", "self.extra = nn.Linear(3, 3)\n        self.proj =")
    write_connector(unused)
    assert main(["fit", *ONE_STEP, "log.questions=2", "log.examples=1"]) == 0
    said = capsys.readouterr()
    assert "mine: no gradient reaches extra.weight, extra.bias:" in said.out + said.err


def test_a_plain_list_of_layers_that_torch_knows_is_no_mistake(write_connector, capsys):
    listed = FILE.replace("lm_width)\n", "lm_width)\n        self.order = [self.proj]\n")
    write_connector(listed)
    assert main(["fit", *ONE_STEP, "log.questions=2", "log.examples=1"]) == 0
    said = capsys.readouterr()
    assert "no gradient" not in said.out + said.err


POSITIONS = FILE.replace(
    "        self.proj =",
    "        self.places = nn.Parameter(torch.zeros(shapes.patches, 1))\n        self.proj =",
).replace("from torch import nn", "import torch\nfrom torch import nn")


@pytest.mark.parametrize(
    ("adapt", "said"),
    [
        ("", "tensor places has shape (16, 1), needed is (64, 1)"),
        ("        return {}\n", "tensor places is missing"),
        ("        return old_state['place']\n", "mine.py:16: KeyError: 'place'"),
    ],
)
def test_a_later_stage_that_would_fail_is_refused_before_the_first(
    write_connector, adapt, said, tmp_path, capsys
):
    method = f"\n    def adapt(self, old_state, old_shapes):\n{adapt}" if adapt else ""
    write_connector(POSITIONS + method)
    assert main(["fit", "recipe=yivl_llava", "connector.name=mine"]) == 2
    told = capsys.readouterr()
    assert said in told.err and len(told.err.splitlines()) == 1
    assert not (tmp_path / "runs").exists() or not list((tmp_path / "runs").iterdir())


def test_an_adapt_that_needs_numbers_is_left_to_the_stage(write_connector, capsys):
    method = (
        "\n    def adapt(self, old_state, old_shapes):\n"
        "        scale = float(old_state['places'].abs().max())\n"
        "        return {**old_state, 'places': torch.full((64, 1), scale)}\n"
    )
    write_connector(POSITIONS + method)
    steps = [f"stages.{name}.steps=1" for name in ("align_224", "align_448", "chat")]
    batches = [f"stages.{name}.global_batch_size=2" for name in ("align_224", "align_448", "chat")]
    words = ["recipe=yivl_llava", "connector.name=mine", *steps, *batches, "log.questions=1"]
    assert main(["fit", *words, "log.tensorboard=false", "run=run"]) == 0, capsys.readouterr().err


def shapes_of(side: int) -> Shapes:
    return Shapes(side * side, (side, side), vision_width=4, lm_width=4, lm_layers=2)


@pytest.mark.parametrize("has_buffer", [False, True])
def test_a_connector_without_parameters_is_adapted(has_buffer):
    class Plain(Connector):
        def __init__(self, shapes: Shapes) -> None:
            super().__init__()
            self.tokens_per_image = shapes.patches
            if has_buffer:
                self.register_buffer("order", torch.arange(3))

    old, new = Plain(shapes_of(2)), Plain(shapes_of(3))
    load_adapted_state(new, old.state_dict(), shapes_of(2), shapes_of(3))
    assert new.state_dict().keys() == old.state_dict().keys()


def test_a_connector_that_fails_does_not_hide_the_table(tmp_path, monkeypatch, capsys):
    (tmp_path / "connectors").mkdir()
    broken = FILE.replace("return self.proj(features)", "return self.proj(features.item())")
    (tmp_path / "connectors/mine.py").write_text(broken)
    (tmp_path / "connectors/typo.py").write_text(FILE.replace("nn.Linear", "nn.Linea"))
    monkeypatch.chdir(tmp_path)
    assert main(["list", "connectors", "size=tiny"]) == 0
    told = capsys.readouterr().out
    assert "\nllava_mlp " in told
    assert "mine does not fit: " in told and "mine.py:11: RuntimeError" in told
    assert "typo does not fit: " in told and "typo.py:8: AttributeError" in told
