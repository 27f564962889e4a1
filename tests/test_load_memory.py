"""A machine without memory for a language model is told before Linux ends the run."""

from __future__ import annotations

import pytest

from vlbench.__main__ import main
from vlbench.config import recipe as recipes
from vlbench.train import load_memory
from vlbench.train.load_memory import describe_small_memory

REAL = ("recipe=yivl_llava", "language.weights=random", "data.train=x.json", "data.images=x")


@pytest.mark.parametrize(
    ("size", "processes", "free", "said"),
    [
        ("34b", 1, 128e9, "takes 137.6 GB of this machine's memory, and 128.0 GB are free"),
        ("34b", 1, 200e9, ""),
        ("6b", 8, 128e9, "takes 24.2 GB of this machine's memory for each of 8 processes, and"),
        ("6b", 1, 128e9, ""),
    ],
)
def test_too_little_memory_is_told(size, processes, free, said, monkeypatch):
    monkeypatch.setattr(load_memory, "free_host_memory", lambda: int(free))
    found = describe_small_memory(recipes.load_recipe([*REAL, f"size={size}"]).model, processes)
    assert said in found and bool(said) == bool(found)


def test_a_run_tells_it_before_it_loads(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(load_memory, "free_host_memory", lambda: 1000)
    words = ["fit", "recipe=yivl_llava", "language.weights=random", "only=chat", "data.samples=50"]
    words += ["stages.chat.steps=1", "stages.chat.global_batch_size=2", "log.tensorboard=false"]
    assert main([*words, "log.questions=1", "log.examples=0", f"run={tmp_path / 'run'}"]) == 0
    told = capsys.readouterr()
    assert "fsdp2, which leaves the weights in their files" in told.out + told.err
    monkeypatch.setattr(load_memory, "free_host_memory", lambda: 10**15)
    assert main([*words, "log.questions=1", "log.examples=0", f"run={tmp_path / 'more'}"]) == 0
    told = capsys.readouterr()
    assert "leaves the weights" not in told.out + told.err
