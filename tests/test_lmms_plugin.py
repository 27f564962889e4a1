"""The plug-in for lmms-eval against stand-ins for the few things that it takes from the package."""

from __future__ import annotations

import importlib
import sys
from dataclasses import dataclass
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from golden_release import CHECKPOINT
from PIL import Image

from vlbench.errors import UserError

NAMES = ("lmms_eval", "lmms_eval.api", "lmms_eval.api.instance", "lmms_eval.api.model")
PLUGIN = "vlbench.evaluate.lmms_plugin"


class Base:
    """The beginning of `lmms_eval.api.model.lmms`."""

    def __init__(self) -> None:
        self.task_dict: dict[str, Any] = {}


@dataclass
class Instance:
    """A request: (text, generation options, images of a document, its number, task, split)."""

    args: tuple


@pytest.fixture
def plugin(monkeypatch):
    """The module, imported with the stand-ins."""
    for name in NAMES:
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    sys.modules["lmms_eval.api.instance"].Instance = Instance
    sys.modules["lmms_eval.api.model"].lmms = Base
    state = SimpleNamespace(process_index=0, num_processes=1, device="cpu")
    monkeypatch.delitem(sys.modules, PLUGIN, raising=False)
    module = importlib.import_module(PLUGIN)
    monkeypatch.setattr(module, "Accelerator", lambda: state)
    yield module
    sys.modules.pop(PLUGIN, None)


def image(colour: str) -> Image.Image:
    return Image.new("RGB", (30, 20), colour)


def answers(plugin, shown: list[Any], given: dict[str, Any], **args: Any) -> list[str]:
    """Ask about every thing in `shown` as one task does, document by document."""
    model = plugin.VlbenchModel(**{"model": str(CHECKPOINT), **args})
    model.task_dict = {"task": {"val": shown}}
    several = [
        Instance(("What?", given, lambda document: document, n, "task", "val"))
        for n in range(len(shown))
    ]
    return model.generate_until(several)


def test_a_single_image_is_a_list_of_one(plugin, capsys):
    red, blue = image("red"), image("blue")
    given = {"max_new_tokens": 6}
    lists = answers(plugin, [[red], [blue], []], given)
    assert answers(plugin, [red, (blue,), None], given) == lists
    assert all(lists) and "not asked" not in capsys.readouterr().out


@pytest.mark.parametrize(("size", "batch"), [("auto", 16), ("auto:4", 16), ("3", 3), (2, 2)])
def test_batch_sizes_of_lmms_eval_are_understood(size, batch, plugin):
    model = plugin.VlbenchModel(model=str(CHECKPOINT), batch_size=size, max_batch_size=None)
    assert model.answer_batch_size == batch
    model.task_dict = {"task": {"val": [image("red")] * 3}}
    asked = [
        Instance(("What?", {"max_new_tokens": 3}, lambda d: d, n, "task", "val")) for n in (0, 1)
    ]
    assert len(model.generate_until(asked)) == 2


@pytest.mark.parametrize("name", ["model", "pretrained"])
def test_the_model_is_called_as_lmms_eval_calls_it(name, plugin):
    model = plugin.VlbenchModel(**{name: str(CHECKPOINT)}, template="llava_v1")
    assert model.vlm.processor.template.name == "llava_v1"


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ({}, r"--model_args needs model=PATH \(or pretrained=\)"),
        ({"model": "a", "pretrained": "b"}, "given are model and pretrained"),
        ({"model": "a", "batch_size": "many"}, "batch_size is 'many'; allowed are whole numbers"),
        ({"model": "a", "batch_size": 0}, "batch_size is '0'"),
        ({"run": "a", "model": "b"}, "model_args has run.*Did you mean 'model'"),
        ({"model": "a", "dtpe": "bf16"}, "model_args has dtpe.*Did you mean 'dtype'"),
        ({"model": "a", "template": "vicuna"}, "template is 'vicuna'; known are auto, yi_vl"),
    ],
)
def test_mistakes_are_one_line(args, message, plugin):
    with pytest.raises(UserError, match=message) as caught:
        plugin.VlbenchModel(**args)
    assert len(str(caught.value).splitlines()) == 1


def test_what_cannot_be_asked_is_named_and_options_without_effect_too(plugin, capsys):
    given = {"max_new_tokens": 3, "repetition_penalty": 1.2, "until": ["\n\n"], "do_sample": False}
    found = answers(plugin, [image("red"), ["video.mp4"]], given)
    assert found[0] and not found[1]
    said = capsys.readouterr().out
    assert "1 of 2 questions not asked" in said and "has str beside its text" in said
    assert "generation options that are not used: repetition_penalty" in said


def test_a_search_over_beams_is_refused(plugin):
    with pytest.raises(UserError, match="no search over beams"):
        answers(plugin, [image("red")], {"num_beams": 3})


def test_a_question_that_is_asked_again_is_sampled_again(plugin):
    """lmms-eval asks several times for scores over several answers; runs repeat each other."""
    given = {"max_new_tokens": 12, "temperature": 1.0}
    drawn = answers(plugin, [image("red")] * 3, given)
    assert len(set(drawn)) == 3 and answers(plugin, [image("red")] * 3, given) == drawn
