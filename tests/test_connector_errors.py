"""A researcher's connector with a mistake in it: one line, with the place in the file."""

from __future__ import annotations

import pytest

from vlbench.__main__ import main

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
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_one_line(mistake, tmp_path, monkeypatch, capsys):
    right, wrong, said = MISTAKES[mistake]
    (tmp_path / "connectors").mkdir()
    (tmp_path / "connectors/mine.py").write_text(FILE.replace(right, wrong))
    monkeypatch.chdir(tmp_path)
    words = [
        "connector.name=mine",
        "only=chat",
        "stages.chat.steps=1",
        "stages.chat.global_batch_size=4",
    ]
    words += ["stages.chat.image_size=56", "data.workers=0", "log.tensorboard=false"]
    assert main(["fit", "recipe=yivl_llava", *words]) == 2
    told = capsys.readouterr().err
    assert said in told and len(told.splitlines()) == 1
