"""The plug-in for lmms-eval, with the real package: `pip install '.[lmms]'`."""

from __future__ import annotations

import json
from importlib.metadata import entry_points
from pathlib import Path

import pytest

from vlbench.__main__ import main

pytest.importorskip("lmms_eval", reason="an extra that is not installed: vlbench[lmms]")

MMMU = Path(__file__).parent / "goldens" / "evaluation" / "mmmu_tiny_lmms"


@pytest.fixture(scope="module")
def answered(model, tmp_path_factory):
    """What lmms-eval makes of its own task MMMU on local data, asked of the model."""
    import lmms_eval
    from lmms_eval.evaluator import simple_evaluate
    from lmms_eval.tasks import TaskManager

    tasks = tmp_path_factory.mktemp("tasks")
    own = Path(lmms_eval.__file__).parent / "tasks/mmmu/mmmu_val.yaml"
    (tasks / "local.yaml").write_text(
        f"include: {own}\ndataset_path: {MMMU}\ntask: mmmu_val_local\n"
    )
    return simple_evaluate(
        model="vlbench",
        model_args=f"model={model}",
        tasks=["mmmu_val_local"],
        batch_size=4,
        task_manager=TaskManager(include_path=str(tasks), model_name="vlbench"),
        log_samples=True,
    )


def said(answered) -> dict[str, str]:
    """Return the response to every record."""
    found = {}
    for one in answered["samples"]["mmmu_val_local"]:
        text = one["filtered_resps"]
        found[one["mmmu_acc"]["id"]] = text if isinstance(text, str) else text[0]
    return found


def test_it_is_found_by_its_entry_point():
    found = {one.name: one.load() for one in entry_points(group="lmms_eval.models")}
    assert found["vlbench"]().model_id == "vlbench"


def test_the_answers_are_those_of_our_own_protocol(answered, model, tmp_path):
    words = ["task=mmmu", f"data={MMMU}", "protocol=lmms", f"out={tmp_path / 'out'}"]
    assert main(["eval", f"model={model}", *words]) == 0
    lines = (tmp_path / "out/answers.jsonl").read_text().splitlines()
    ours = {one["id"]: one["response"] for one in map(json.loads, lines)}
    assert ours and ours.items() <= said(answered).items()


def test_a_question_that_its_data_cannot_show_is_answered_with_nothing(answered):
    empty = [record for record, text in said(answered).items() if not text]
    assert empty == ["validation_Math_13"]  # it cites image_10 and does not have it
