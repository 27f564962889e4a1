"""Lightning callbacks that a recipe names are called, and refused where they cannot be."""

from __future__ import annotations

from pathlib import Path

import pytest

from vlbench.__main__ import main
from vlbench.config.recipe import load_recipe, save_recipe
from vlbench.connector.kept_source import note_own_callbacks
from vlbench.errors import UserError
from vlbench.train.user_callbacks import build_user_callbacks

MODULE = """
import lightning.pytorch as pl

calls = []

class Recorder(pl.Callback):
    def on_train_start(self, trainer, pl_module):
        calls.append(("start", pl_module.stage.objective, pl_module.steps_done))

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        rates = [group["lr"] for group in trainer.optimizers[0].param_groups]
        (config,) = trainer.lr_scheduler_configs
        assert rates == config.scheduler.get_last_lr()
        calls.append((pl_module.steps_done, pl_module.report.loss > 0, pl_module.report.lr))

class NeedsArguments(pl.Callback):
    def __init__(self, every):
        self.every = every

class Plain:
    pass
"""


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """Return the name of a module with callbacks, which a fresh import finds."""
    name = f"callbacks_of_{tmp_path.name}"
    (tmp_path / f"{name}.py").write_text(MODULE)
    monkeypatch.syspath_prepend(tmp_path)
    return name


def test_a_callback_of_the_recipe_is_called_in_every_stage(module, tmp_path):
    words = ["recipe=yivl_llava", "only=[align_448,chat]", f"trainer.callbacks={module}.Recorder"]
    words += ["stages.align_448.steps=2", "stages.chat.steps=1", "log.questions=1"]
    words += ["stages.align_448.global_batch_size=2", "stages.chat.global_batch_size=2"]
    words += ["stages.align_448.schedule=constant", "stages.align_448.warmup_ratio=1"]
    words += ["data.workers=0", "log.examples=0", f"run={tmp_path / 'run'}"]
    assert main(["fit", *words]) == 0
    calls = __import__(module).calls
    assert [call[:2] for call in calls] == [
        ("start", "language"),
        (1, True),
        (2, True),
        ("start", "language"),
        (1, True),
    ]
    assert calls[2][2] == pytest.approx(2 * calls[1][2])  # the rate of the step, which rises


@pytest.mark.parametrize(
    ("class_path", "message"),
    [
        ("Recorder", "trainer.callbacks has 'Recorder'; a callback is named as module.Class"),
        ("there is.None", "a callback is named as module.Class"),
        ("no_such_module.Recorder", "module no_such_module of no_such_module.Recorder cannot be"),
        ("MODULE.Recoder", "Recoder is missing in module .* Did you mean 'Recorder'?"),
        ("MODULE.Plain", "Plain is no lightning.pytorch.Callback in module"),
        ("MODULE.calls", "calls is no lightning.pytorch.Callback in module"),
        ("MODULE.NeedsArguments", "a callback is made without arguments"),
    ],
)
def test_what_is_no_callback_is_refused_in_one_line(class_path, message, module):
    with pytest.raises(UserError, match=message) as caught:
        build_user_callbacks([class_path.replace("MODULE", module)])
    assert "\n" not in str(caught.value)


def test_the_command_refuses_it_before_there_is_a_run(module, tmp_path, capsys):
    words = ["recipe=yivl_llava", f"trainer.callbacks=[{module}.Nothing]", f"run={tmp_path}/run"]
    assert main(["fit", *words]) == 2
    assert "vlbench: trainer.callbacks: Nothing is missing" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_callbacks_of_lightning_itself_are_found():
    (monitor,) = build_user_callbacks(["lightning.pytorch.callbacks.LearningRateMonitor"])
    assert type(monitor).__name__ == "LearningRateMonitor"


def test_callbacks_of_anothers_run_are_typed_or_trusted(tmp_path: Path) -> None:
    saved = load_recipe(["recipe=yivl_llava", "trainer.callbacks=[theirs.Stranger]"])
    (tmp_path / "run").mkdir()
    save_recipe(saved, tmp_path / "run/recipe.yaml")
    for word in (f"run={tmp_path}/run", f"recipe={tmp_path}/run/recipe.yaml"):
        with pytest.raises(UserError, match="theirs.Stranger"):
            load_recipe([word])
        typed = load_recipe([word, "trainer.callbacks=[theirs.Stranger]"])
        assert typed.trainer.callbacks == ("theirs.Stranger",)
        load_recipe([word, "trust_connector=true"])
        load_recipe([word, "trainer.callbacks=[]"])
    copy = (tmp_path / "run/recipe.yaml").read_text()
    (tmp_path / "run/recipe.yaml").write_text(copy.replace("profile: false\n", ""))
    with pytest.raises(UserError, match="theirs.Stranger"):  # a copy with a key less is one, too
        load_recipe([f"run={tmp_path}/run"])
    note_own_callbacks(["theirs.Stranger"])
    assert load_recipe([f"run={tmp_path}/run"]).trainer == saved.trainer
