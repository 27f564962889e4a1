"""`trainer.compile=auto`: on a GPU and for long runs alone, once for a run."""

from __future__ import annotations

import dataclasses

import pytest

from vlbench.__main__ import main
from vlbench.config import recipe as recipes
from vlbench.train import compile_choice
from vlbench.train.compile_choice import choose_compile
from vlbench.train.stage_plan import plan_stage_runs

TINY = ("recipe=yivl_llava", "only=chat")


def choice(*words: str, steps: int | None = None) -> tuple[bool, str]:
    """Return the choice for a recipe, its stages with the number of steps of a large run."""
    recipe = recipes.load_recipe([*TINY])
    stage_runs = plan_stage_runs(recipe.selected_data, recipe.last_stage_data)
    if steps is not None:
        stage_runs = [dataclasses.replace(one, total_steps=steps) for one in stage_runs]
    recipe = recipes.load_recipe([*TINY, *words])
    return choose_compile(recipe.trainer, recipe.run, recipe.model, stage_runs)


@pytest.fixture
def gpu(monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr(compile_choice, "peak_flops", lambda _: 989e12)
    monkeypatch.setattr(compile_choice, "missing_gpu_compiler", lambda: "")


def test_without_a_gpu_nothing_is_compiled():
    assert choice(steps=10**6) == (False, "")


def test_a_long_run_on_a_gpu_is_compiled(gpu):
    real = ("size=6b", "language.weights=random", "data.train=x.json", "data.images=x")
    assert choice(steps=10)[0] is False
    compiles, reason = choice(*real, steps=5000)
    assert compiles and "of training" in reason
    assert choice(*real, steps=50)[0] is False
    assert choice(*real, "trainer.accelerator=cpu", steps=5000) == (False, "")


@pytest.mark.parametrize("told", ["true", "false"])
def test_what_is_told_is_done(told, gpu):
    assert choice(f"trainer.compile={told}", steps=1) == (told == "true", "")


@pytest.mark.parametrize(
    ("lacks", "said"), [("Triton", "no Triton"), ("gcc", "no C compiler"), ("Python.h", "python3-")]
)
def test_without_what_triton_needs_nothing_is_compiled(lacks, said, gpu, monkeypatch, tmp_path):
    """Images of containers often have no C compiler; the first step would fail."""
    monkeypatch.undo()
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr(compile_choice, "peak_flops", lambda _: 989e12)
    for name, made in (("gcc", tmp_path / "bin" / "gcc"), ("Python.h", tmp_path / "Python.h")):
        made.parent.mkdir(exist_ok=True)
        if lacks != name:
            made.touch(0o755)
    monkeypatch.setattr("torch.utils._triton.has_triton", lambda: lacks != "Triton")
    monkeypatch.setattr("sysconfig.get_path", lambda _: str(tmp_path))
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    monkeypatch.delenv("CC", raising=False)
    words = ("size=6b", "language.weights=random", "data.train=x.json", "data.images=x")
    compiles, reason = choice(*words, steps=5000)
    assert not compiles and said in reason
    (tmp_path / "bin" / "gcc").touch(0o755)
    (tmp_path / "Python.h").touch()
    monkeypatch.setattr("torch.utils._triton.has_triton", lambda: True)
    assert choice(*words, steps=5000)[0]


@pytest.mark.parametrize("recorded", [True, False])
def test_a_run_goes_on_as_it_began(recorded, gpu, tmp_path):
    recipe = recipes.load_recipe([*TINY, f"trainer.compile={str(recorded).lower()}"])
    recipes.save_recipe(recipe, tmp_path / "recipe.yaml")
    found = choice(f"run={tmp_path}", steps=1 if recorded else 10**9)
    assert found == (recorded, "as the run began")


def test_a_run_records_its_choice_and_other_words_are_refused(tmp_path, capsys):
    words = [*TINY, "stages.chat.steps=1", "stages.chat.global_batch_size=2", "log.questions=1"]
    words += ["log.tensorboard=false", "log.examples=0", f"run={tmp_path / 'run'}"]
    assert main(["fit", *words]) == 0
    assert "trainer.compile" not in capsys.readouterr().out
    assert recipes.load_recipe_file(tmp_path / "run" / "recipe.yaml").trainer.compile is False
    assert main(["fit", *TINY, "trainer.compile=ture"]) == 2
    assert (
        "trainer.compile must be one of auto, true, false, given 'ture'" in capsys.readouterr().err
    )
