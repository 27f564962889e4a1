"""`eval task=`: a model takes MMMU and CMMMU in every layout, is stopped, and goes on the same."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from vlbench.__main__ import main
from vlbench.compare.report.task_answers import number_repeats
from vlbench.evaluate import batch_inference

GOLDENS = Path(__file__).parent / "goldens" / "evaluation"
LAYOUTS = [
    ("mmmu", "mmmu_tiny", "validation"),
    ("mmmu", "mmmu_tiny_lmms", "validation"),
    ("cmmmu", "cmmmu_tiny", "val"),
    ("cmmmu", "cmmmu_tiny_lmms", "val"),
    ("cmmmu", "cmmmu_tiny_github", "val"),
]


def take(model: Path, out: Path, task: str, data: str, *words: str) -> int:
    given = [f"model={model}", f"task={task}", f"data={GOLDENS / data}", f"out={out}"]
    batch = [] if any(word.startswith("batch=") for word in words) else ["batch=4"]
    return main(["eval", *given, *batch, *words])


def answers(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "answers.jsonl").read_text().splitlines()]


@pytest.mark.parametrize(("task", "data", "split"), LAYOUTS)
def test_every_layout_is_asked_and_scored(task, data, split, model, tmp_path, capsys):
    assert take(model, tmp_path / "out", task, data, f"split={split}") == 0
    said = capsys.readouterr().out
    scores = json.loads((tmp_path / "out/scores.json").read_text())
    assert scores["n"] == len(answers(tmp_path / "out")) and scores["protocol"] == "yi"
    assert scores["revision"].startswith("sha256 ") and scores["revision"] in said
    assert "Yi-VL-34B" in said and (tmp_path / "out/report.txt").read_text() in said
    # the answers are a file that `score` reads, and gives the same for
    words = [f"task={task}", f"answers={tmp_path / 'out/answers.jsonl'}", "protocol=yi"]
    assert main(["score", *words, f"out={tmp_path / 'again'}"]) == 0
    again = json.loads((tmp_path / "again/scores.json").read_text())
    assert again == {key: scores[key] for key in again}


def test_layouts_of_one_benchmark_give_the_same_answers(model, tmp_path):
    for name in ("cmmmu_tiny", "cmmmu_tiny_github"):
        assert take(model, tmp_path / name, "cmmmu", name) == 0
    assert answers(tmp_path / "cmmmu_tiny") == answers(tmp_path / "cmmmu_tiny_github")


@pytest.mark.parametrize("torn", [False, True])
def test_an_exam_that_was_stopped_ends_as_if_it_had_not_been(torn, model, tmp_path, monkeypatch):
    assert take(model, tmp_path / "whole", "mmmu", "mmmu_tiny") == 0
    real, calls = batch_inference.answer_batch, []

    def stops(*given, **options):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return real(*given, **options)

    monkeypatch.setattr(batch_inference, "answer_batch", stops)
    assert take(model, tmp_path / "out", "mmmu", "mmmu_tiny") == 130
    assert len(answers(tmp_path / "out")) == 8
    if torn:
        file = tmp_path / "out/answers.jsonl"
        file.write_bytes(file.read_bytes()[:-40])
    monkeypatch.setattr(batch_inference, "answer_batch", real)
    assert take(model, tmp_path / "out", "mmmu", "mmmu_tiny") == 0
    for name in ("answers.jsonl", "scores.json", "scored.jsonl", "report.txt"):
        ours = (tmp_path / "out" / name).read_text().replace(str(tmp_path / "out"), "")
        assert ours == (tmp_path / "whole" / name).read_text().replace(str(tmp_path / "whole"), "")


def test_another_exam_in_the_same_folder_is_refused(model, tmp_path, capsys):
    assert take(model, tmp_path / "out", "mmmu", "mmmu_tiny", "limit=3") == 0
    assert take(model, tmp_path / "out", "mmmu", "mmmu_tiny", "limit=3", "protocol=lmms") == 2
    assert "differ in protocol (yi before, lmms now)" in capsys.readouterr().err


def test_answers_of_other_weights_in_the_same_place_are_not_kept(model, tmp_path, capsys):
    copy, out = tmp_path / "model", tmp_path / "out"
    shutil.copytree(model, copy)
    assert take(copy, out, "mmmu", "mmmu_tiny", "limit=3") == 0
    settings = json.loads((out / "settings.json").read_text())
    tensors = load_file(copy / "model.safetensors")
    trained = {name: one + 0.01 for name, one in tensors.items() if name.startswith("connector.")}
    save_file({**tensors, **trained}, copy / "model.safetensors")
    assert take(copy, out, "mmmu", "mmmu_tiny", "limit=3") == 2
    assert f"differ in weights ({settings['weights']} before, " in capsys.readouterr().err
    # folders of earlier versions say nothing of weights
    del settings["weights"]
    (out / "settings.json").write_text(json.dumps(settings))
    assert take(copy, out, "mmmu", "mmmu_tiny", "limit=3") == 0


def test_a_model_that_was_moved_goes_on_with_its_answers(model, tmp_path, monkeypatch):
    place, out = tmp_path / "here", tmp_path / "out"
    shutil.copytree(model, place)
    assert take(place, out, "mmmu", "mmmu_tiny", "limit=3") == 0
    monkeypatch.setattr(batch_inference, "answer_batch", run_out_of_memory)  # nothing is asked
    monkeypatch.chdir(tmp_path)
    assert take("here", out, "mmmu", "mmmu_tiny", "limit=3") == 0
    moved = place.rename(tmp_path / "moved")
    assert take(moved, out, "mmmu", "mmmu_tiny", "limit=3") == 0
    assert json.loads((out / "settings.json").read_text())["model"] == str(moved)


@pytest.mark.parametrize(("split", "tokens"), [("validation", 128), ("test", 512)])
def test_lmms_eval_asks_the_test_split_of_mmmu_in_its_own_way(
    split, tokens, model, tmp_path, monkeypatch
):
    asked = []

    def listen(_vlm, samples, **options):
        asked.extend((one.turns[-1].text, options["max_new_tokens"]) for one in samples)
        return ["A"] * len(samples)

    monkeypatch.setattr(batch_inference, "answer_batch", listen)
    words = [f"split={split}", "protocol=lmms", "limit=3"]
    assert take(model, tmp_path / "out", "mmmu", "mmmu_tiny", *words) == 0
    assert asked and {limit for _, limit in asked} == {tokens}
    assert all(("directly." in text or "phrase." in text) == (tokens == 128) for text, _ in asked)


def run_out_of_memory(*_given, **_options):
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")


def test_settings_may_change_while_no_answer_is_kept(model, tmp_path, monkeypatch, capsys):
    real = batch_inference.answer_batch
    monkeypatch.setattr(batch_inference, "answer_batch", run_out_of_memory)
    assert take(model, tmp_path / "out", "mmmu", "mmmu_tiny", "limit=3", "batch=16") == 1
    said = capsys.readouterr().err.splitlines()
    assert said[-1].startswith("vlbench: out of memory on the GPU") and "batch=" in said[-1]
    assert "Traceback" not in "".join(said)
    monkeypatch.setattr(batch_inference, "answer_batch", real)
    assert take(model, tmp_path / "out", "mmmu", "mmmu_tiny", "limit=3", "protocol=lmms") == 0
    settings = json.loads((tmp_path / "out/settings.json").read_text())
    assert settings["protocol"] == "lmms" and settings["batch"] == 4
    assert len(answers(tmp_path / "out")) == 3


def test_scores_of_answers_that_were_deleted_go_with_them(model, tmp_path, monkeypatch):
    out = tmp_path / "out"
    assert take(model, out, "mmmu", "mmmu_tiny", "limit=3") == 0
    (out / "answers.jsonl").unlink()
    monkeypatch.setattr(batch_inference, "answer_batch", run_out_of_memory)
    assert take(model, out, "mmmu", "mmmu_tiny", "limit=3", "protocol=lmms") == 1
    assert not {"scores.json", "scored.jsonl", "report.txt"} & {one.name for one in out.iterdir()}


def test_a_smaller_batch_goes_on_with_the_answers_that_are_there(model, tmp_path, monkeypatch):
    assert take(model, tmp_path / "whole", "mmmu", "mmmu_tiny") == 0
    real, sizes = batch_inference.answer_batch, []

    def runs_out(vlm, samples, **options):
        sizes.append(len(samples))
        if len(sizes) == 3:
            run_out_of_memory()
        return real(vlm, samples, **options)

    monkeypatch.setattr(batch_inference, "answer_batch", runs_out)
    assert take(model, tmp_path / "out", "mmmu", "mmmu_tiny") == 1 and sizes == [4, 4, 4]
    assert len(answers(tmp_path / "out")) == 8
    assert take(model, tmp_path / "out", "mmmu", "mmmu_tiny", "batch=2") == 0
    assert answers(tmp_path / "out") == answers(tmp_path / "whole")
    assert set(sizes[3:]) <= {1, 2} and sum(sizes[3:]) == len(answers(tmp_path / "out")) - 8
    assert json.loads((tmp_path / "out/settings.json").read_text())["batch"] == 2


def test_a_refusal_says_what_helps_where_the_folder_is_not_named(
    model, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    words = ["eval", f"model={model}", "task=mmmu", f"data={GOLDENS / 'mmmu_tiny'}"]
    assert main([*words, "limit=2"]) == 0 and main([*words, "limit=3"]) == 2
    said = capsys.readouterr().err
    folder = f"evals/{model.name}/mmmu-val-yi"
    assert f"{folder} holds answers under other settings; they differ in questions (2" in said
    assert said.endswith(f"To ask anew, move {folder} away\n")


@pytest.mark.parametrize("name", ["answers.jsonl", "report.txt", "submission.jsonl"])
def test_files_of_a_user_are_not_overwritten(name, model, tmp_path, capsys):
    (tmp_path / name).write_text("mine\n")
    assert take(model, tmp_path, "mmmu", "mmmu_tiny", "limit=2") == 2
    assert f"holds {name} and no settings.json" in capsys.readouterr().err
    assert (tmp_path / name).read_text() == "mine\n" and not (tmp_path / "settings.json").exists()


def test_questions_of_one_id_have_the_same_names_whatever_is_left_out(model, tmp_path):
    """Of three records with one id a second model may not be asked the first one."""
    names = {}
    for is_torn in (False, True):
        data = tmp_path / f"data-{is_torn}"
        shutil.copytree(GOLDENS / "cmmmu_tiny_github", data)
        file = sorted(data.glob("cmmmu-data-val/*/*.jsonl"))[0]
        records = [json.loads(line) for line in file.read_text().splitlines()]
        text = [json.dumps({**one, "id": records[0]["id"]}) for one in records]
        file.write_text("\n".join(text) + "\n", encoding="utf-8")
        if is_torn:
            image = file.parent / records[0]["img_list"][0]
            image.write_bytes(image.read_bytes()[:50])
        out = tmp_path / f"out-{is_torn}"
        assert take(model, out, "cmmmu", str(data)) == 0
        lines = [json.loads(line) for line in (out / "scored.jsonl").read_text().splitlines()]
        names[is_torn] = {
            name: line["options"] or line["answer"] for name, line in number_repeats(lines).items()
        }
    whole, torn = names[False], names[True]
    assert len(whole) - len(torn) == 1 and torn.items() <= whole.items()


def test_answers_of_earlier_versions_are_numbered_in_their_order():
    lines = [{"id": "a"}, {"id": "a"}, {"id": "a", "name": "a#5"}, {"id": 7}]
    assert list(number_repeats(lines)) == ["a", "a#2", "a#5", "7"]
    # no two are named alike, whatever ids there are
    lines = [{"id": "a#2"}, {"id": "a"}, {"id": "a"}, {"id": "a#2"}, {"id": "a"}]
    assert list(number_repeats(lines)) == ["a#2", "a", "a#3", "a#2#2", "a#4"]


def test_what_is_withheld_gives_a_file_to_submit(model, tmp_path, capsys):
    assert take(model, tmp_path / "m", "mmmu", "mmmu_tiny", "split=test", "protocol=official") == 0
    submitted = json.loads((tmp_path / "m/submission.json").read_text())
    assert submitted.keys() == {one["id"] for one in answers(tmp_path / "m")}
    assert "the answers are withheld" in capsys.readouterr().out
    choices = [one for one in answers(tmp_path / "m") if one["type"] == "multiple-choice"]
    assert choices and all(submitted[one["id"]] in "ABCDEFGHI" for one in choices)
    assert take(model, tmp_path / "c", "cmmmu", "cmmmu_tiny", "split=test", "protocol=lmms") == 0
    lines = (tmp_path / "c/submission.jsonl").read_text().splitlines()
    assert all(json.loads(line).keys() == {"id", "type", "response"} for line in lines)


def test_blank_images_are_asked_on_request(model, tmp_path, capsys):
    assert take(model, tmp_path / "out", "mmmu", "mmmu_tiny", "limit=5", "blank=true") == 0
    assert "with blank images: 0." in capsys.readouterr().out
    blind = (tmp_path / "out/blank.jsonl").read_text().splitlines()
    assert len(blind) == len(answers(tmp_path / "out"))


def test_a_question_that_cannot_be_asked_is_named(model, tmp_path):
    data = tmp_path / "data"
    shutil.copytree(GOLDENS / "cmmmu_tiny_github", data)
    image = sorted(data.glob("cmmmu-data-val/*/q_*.png"))[0]
    image.write_bytes(image.read_bytes()[:50])
    assert take(model, tmp_path / "out", "cmmmu", str(data)) == 0
    named = (tmp_path / "out/skipped.jsonl").read_text()
    assert image.name in named
    assert json.loads((tmp_path / "out/scores.json").read_text())["skipped"] == len(
        named.splitlines()
    )


def test_a_question_that_no_rule_scores_is_named(model, tmp_path):
    data = tmp_path / "data"
    shutil.copytree(GOLDENS / "cmmmu_tiny_github", data)
    file = sorted(data.glob("cmmmu-data-val/*/*.jsonl"))[0]
    first, *others = [json.loads(line) for line in file.read_text().splitlines()]
    text = [json.dumps(one, ensure_ascii=False) for one in ({**first, "type": "论述"}, *others)]
    file.write_text("\n".join(text) + "\n", encoding="utf-8")
    assert take(model, tmp_path / "out", "cmmmu", str(data), "protocol=lmms") == 0
    [line] = (tmp_path / "out/skipped.jsonl").read_text().splitlines()
    assert "its type is '论述'; cmmmu has 选择, 判断, 填空" in json.loads(line)["reason"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ["task=mmu"],
            "task is 'mmu'; known are mmmu, cmmmu, own, llava_json. Did you mean 'mmmu'?",
        ),
        (["protocol=offical"], "Did you mean 'official'?"),
        (["batch=0"], "batch must be at least 1, given 0"),
        (["blank=yes"], "blank must be true or false, given 'yes'"),
        (["task=mmmu,cmmmu"], "data= and out= belong to one task"),
        (["split=vall"], "no split 'vall'"),
        (["subjects=Arts"], "Did you mean 'Art'?"),
        (["limt=3"], "Did you mean 'limit'?"),
    ],
)
def test_mistakes_are_one_line_before_the_model_is_loaded(words, message, tmp_path, capsys):
    given = {"task": "mmmu", "data": str(GOLDENS / "mmmu_tiny"), "out": str(tmp_path / "out")}
    given |= dict(word.split("=", 1) for word in words)
    assert main(["eval", "model=nowhere", *(f"{k}={v}" for k, v in given.items())]) == 2
    said = capsys.readouterr().err
    assert message in said and len(said.splitlines()) == 1
    assert not (tmp_path / "out").exists()


def test_compiled_reaches_the_decoding_step_and_gives_the_same_answers(
    model, tmp_path, monkeypatch
):
    compiled_functions = []

    def traced(function, **options):  # the graph is that of the real step; Inductor is left out
        compiled_functions.append(function.__name__)
        return function

    monkeypatch.setattr(torch, "compile", traced)
    assert take(model, tmp_path / "eager", "mmmu", "mmmu_tiny", "limit=6") == 0
    assert not compiled_functions
    assert take(model, tmp_path / "compiled", "mmmu", "mmmu_tiny", "limit=6", "compiled=true") == 0
    assert set(compiled_functions) == {"_decode_step"}
    assert answers(tmp_path / "compiled") == answers(tmp_path / "eager")
