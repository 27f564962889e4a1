"""Forty kinds of bad input: each gives one clear line and exit code 2, or is handled.

One table: name, what is done, words expected in the answer.
`python tests/test_user_errors.py` prints the answers.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from vlbench.__main__ import main

FIT = ["fit", "recipe=yivl_llava"]
QUICK = [f"stages.{name}.steps=1" for name in ("align_224", "align_448", "chat")]
ASK = {"from": "human", "value": "<image>\nWhat is it?"}
SAY = {"from": "gpt", "value": "A thing."}


def red(folder: Path, name: str = "red.png", **options: object) -> Path:
    """Write a good image."""
    path = folder / name
    Image.new("RGB", (40, 30), "red").save(path, **options)
    return path


def data(folder: Path, *records: object, text: str | None = None) -> list[str]:
    """Write a data file of `records` beside a good image; return the words that train on it."""
    red(folder)
    file = folder / "data.json"
    file.write_text(json.dumps(records) if text is None else text, encoding="utf-8")
    return [*FIT, *QUICK, f"data.train={file}", f"data.images={folder}"]


def record(image: object = "red.png", turns: object = None, **more: object) -> dict:
    return {"id": "one", "image": image, "conversations": turns or [ASK, SAY], **more}


def torn(folder: Path, kind: str, keep: float) -> list[str]:
    """Train on an image file that is cut off."""
    noise = Image.effect_noise((200, 200), 80).convert("RGB")
    noise.save(folder / f"torn.{kind}")
    whole = (folder / f"torn.{kind}").read_bytes()
    (folder / f"torn.{kind}").write_bytes(whole[: int(len(whole) * keep)])
    return data(folder, record(f"torn.{kind}"))


def not_an_image(folder: Path) -> list[str]:
    (folder / "text.jpg").write_text("this is no picture")
    return data(folder, record("text.jpg"))


def connector_file(folder: Path, source: str) -> list[str]:
    (folder / "connectors").mkdir()
    (folder / "connectors" / "mine.py").write_text(source)
    return [*FIT, "connector.name=mine"]


def other_run(folder: Path) -> list[str]:
    """Name a run folder that another recipe made."""
    from vlbench.config import recipe as recipes

    (folder / "old").mkdir()
    made = recipes.load_recipe(["recipe=yivl_llava", "seed=7"])
    recipes.save_recipe(made, folder / "old" / "recipe.yaml")
    return [*FIT, f"run={folder / 'old'}"]


def strange_folder(folder: Path) -> list[str]:
    (folder / "mine").mkdir()
    (folder / "mine" / "thesis.txt").write_text("mine")
    return [*FIT, f"run={folder / 'mine'}"]


def a_file_as_run(folder: Path) -> list[str]:
    (folder / "file").write_text("")
    return [*FIT, f"run={folder / 'file'}"]


def one_turn(turns: list) -> Callable[[Path], list[str]]:
    return lambda folder: data(folder, record(turns=turns))


LONG = {"from": "human", "value": "<image>\n" + "very " * 5000}
TABLE: list[tuple[str, Callable[[Path], list[str]], str]] = [
    ("no verb", lambda f: ["fitt"], "no verb 'fitt'.*fit"),
    ("misspelt key", lambda f: [*FIT, "sede=1"], "sede.*Did you mean 'seed'"),
    ("misspelt stage", lambda f: [*FIT, "stages.chatt.steps=1"], "chatt.*'chat'"),
    ("misspelt part", lambda f: [*FIT, "stages.chat.train.langauge.lr=1e-3"], "langauge.*language"),
    ("wrong type", lambda f: [*FIT, "stages.chat.steps=many"], "stages.chat.steps.*many"),
    ("half a step", lambda f: [*FIT, "stages.chat.steps=1.5"], "stages.chat.steps.*1.5"),
    (
        "out of range",
        lambda f: [*FIT, "stages.chat.global_batch_size=-5"],
        "stages.chat.global_batch_size.*-5",
    ),
    ("not a number", lambda f: [*FIT, "stages.chat.train.connector.lr=nan"], "lr.*nan"),
    ("no equals sign", lambda f: [*FIT, "seed"], "seed"),
    ("unknown recipe", lambda f: ["fit", "recipe=yivl_lava"], "yivl_lava.*'yivl_llava'"),
    ("no recipe", lambda f: ["fit"], "recipe=NAME"),
    ("unknown size", lambda f: [*FIT, "size=tinny"], "tinny.*'tiny'"),
    ("unknown connector", lambda f: [*FIT, "connector.name=lava_mlp"], "lava_mlp.*llava_mlp"),
    ("unknown option", lambda f: [*FIT, "connector.dept=3"], "dept.*'depth'"),
    ("bad option value", lambda f: [*FIT, "connector.depth=0"], "depth is 0.*at least 1"),
    ("unknown encoder", lambda f: [*FIT, "vision.name=ViT-H14"], "ViT-H14.*'ViT-H-14'"),
    ("an encoder that is no ViT", lambda f: [*FIT, "vision.name=RN50"], "RN50"),
    ("layer out of range", lambda f: [*FIT, "vision.layer=-9"], "vision.layer.*-9"),
    ("unknown objective", lambda f: [*FIT, "stages.chat.objective=blip"], "objective.*blip"),
    ("image size", lambda f: [*FIT, "stages.align_224.image_size=57"], "57.*multiple of 14.*56"),
    ("unknown stage", lambda f: [*FIT, "only=chatt"], "chatt.*'chat'"),
    ("no init", lambda f: [*FIT, f"init={f / 'nothing'}"], "nothing.*run folder"),
    ("broken plug-in", lambda f: connector_file(f, "import nonsense_x\n"), "mine.*nonsense_x"),
    ("plug-in without class", lambda f: connector_file(f, "x = 1\n"), "mine.*Connector"),
    ("missing JSON", lambda f: [*FIT, f"data.train={f / 'no.json'}"], "no.json.*no such file"),
    ("malformed JSON", lambda f: data(f, text='[{"id": 1,]'), "data.json.*line 1"),
    ("empty JSON", lambda f: data(f, text=""), "data.json.*empty"),
    ("JSON of another shape", lambda f: data(f, text='{"a": 1}'), "expected a list"),
    ("record of another shape", lambda f: data(f, ["x"]), "record 1"),
    (
        "no image folder",
        lambda f: [*data(f, record())[:-1], f"data.images={f / 'no'}"],
        "no folder",
    ),
    ("missing image", lambda f: data(f, record("no.png")), "one.*no.png.*not exist"),
    ("truncated image", lambda f: torn(f, "jpg", 0.5), "one.*torn.jpg"),
    ("truncated PNG", lambda f: torn(f, "png", 0.5), "one.*torn.png"),
    ("zero-byte image", lambda f: torn(f, "jpg", 0), "one.*torn.jpg.*empty"),
    ("not an image", not_an_image, "one.*text.jpg"),
    ("images and tags", lambda f: data(f, record(["red.png"] * 2)), "one.*1 image tag.*2 images"),
    ("empty conversation", lambda f: data(f, record() | {"conversations": []}), "one.*empty"),
    ("no assistant turn", one_turn([ASK]), "one.*no assistant"),
    ("unknown role", one_turn([ASK, {"from": "gtp", "value": "x"}]), "one.*gtp.*'gpt'"),
    ("empty answer", one_turn([ASK, {"from": "gpt", "value": " "}]), "one.*empty"),
    ("longer than the context", one_turn([LONG, SAY]), "one.*max_length"),
    ("run of another recipe", other_run, "old.*seed"),
    ("run folder in use", strange_folder, "mine"),
    ("run is a file", a_file_as_run, "file"),
    ("run cannot be written", lambda f: [*FIT, "run=/proc/nowhere"], "/proc/nowhere"),
    ("no data at 6b", lambda f: [*FIT, "size=6b"], "data.train"),
    ("missing weights", lambda f: [*FIT, "language.weights=no/such"], "language.weights.*no/such"),
]


FOUND_IN_TRAINING = {"longer than the context"}  # all others leave no run folder behind


@pytest.mark.parametrize(("name", "make", "words"), TABLE, ids=[row[0] for row in TABLE])
def test_a_mistake_gets_one_clear_line(
    name: str,
    make: Callable[[Path], list[str]],
    words: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(make(tmp_path)) == 2
    said = capsys.readouterr().err.strip()
    assert len(said.splitlines()) == 1 and "Traceback" not in said
    assert re.search(words, said), said
    assert name in FOUND_IN_TRAINING or not list(tmp_path.glob("runs/*"))


def test_all_mistakes_are_told_at_once(capsys: pytest.CaptureFixture[str]) -> None:
    assert (
        main([*FIT, "sede=1", "stages.chat.global_batch_size=0", "connector.dept=2", "size=tiny"])
        == 2
    )
    said = capsys.readouterr().err
    assert len(said.splitlines()) == 3
    assert all(word in said for word in ("sede", "global_batch_size", "dept"))


def test_a_full_disk_is_one_line_and_earlier_checkpoints_stay(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import errno

    from vlbench.model.weights import background_writer
    from vlbench.train import checkpoint_files

    sync_whole, written = background_writer.fsync_path, []

    def sync_full(path: Path) -> None:
        written.append(path)
        if len(written) == 3:  # weights of the second checkpoint; the first has an optimizer too
            raise OSError(errno.ENOSPC, "No space left on device")
        sync_whole(path)

    monkeypatch.setattr(background_writer, "fsync_path", sync_full)
    steps = [
        f"stages.{n}.{k}"
        for n in ("align_224", "align_448", "chat")
        for k in ("global_batch_size=2",)
    ]
    assert main([*FIT, *QUICK, *steps, f"run={tmp_path / 'run'}"]) == 1
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert "disk is full" in said
    assert len(checkpoint_files.list_positions(tmp_path / "run" / "checkpoints")) == 1
    assert not list((tmp_path / "run" / "checkpoints").glob(".writing*"))


def test_odd_images_are_handled_not_refused(tmp_path: Path) -> None:
    Image.new("CMYK", (30, 40), (0, 200, 100, 0)).save(tmp_path / "cmyk.jpg")
    Image.new("I;16", (30, 40), 40000).save(tmp_path / "sixteen.png")
    frames = [Image.new("P", (20, 20), n) for n in (1, 2)]
    frames[0].save(tmp_path / "moving.gif", save_all=True, append_images=frames[1:])
    Image.new("RGB", (1, 1), "blue").save(tmp_path / "dot.png")
    Image.new("RGB", (30000, 2), "blue").save(tmp_path / "strip.png")
    names = ("cmyk.jpg", "sixteen.png", "moving.gif", "dot.png", "strip.png")
    records = [record(name) | {"id": name} for name in names]
    words = [*data(tmp_path, *records), "data.on_bad_sample=stop", f"run={tmp_path / 'run'}"]
    small = [f"stages.{name}.global_batch_size=5" for name in ("align_224", "align_448", "chat")]
    assert main([*words, *small]) == 0
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert results["questions"] == len(names)


def test_bad_samples_of_a_large_set_are_left_out_counted_and_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    records = [record() | {"id": f"good{n}"} for n in range(12)] + [record("no.png")]
    records += [record("no.png") | {"id": "two"}]  # not met by so few steps
    words = [*data(tmp_path, *records), f"run={tmp_path / 'run'}", "log.questions=4"]
    small = [f"stages.{name}.global_batch_size=4" for name in ("align_224", "align_448", "chat")]
    for _ in range(2):  # the second time it is finished
        assert main([*words, *small, "data.on_bad_sample=quarantine"]) == 0
        assert "2 bad samples left out (one: " in capsys.readouterr().out
        lines = (tmp_path / "run" / "quarantine.jsonl").read_text().splitlines()
        assert [json.loads(line)["id"] for line in lines] == ["one", "two"]


def answers() -> None:
    """Print what each mistake is answered with."""
    import contextlib
    import io
    import os
    import tempfile

    for name, make, _ in TABLE:
        with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
            said = io.StringIO()
            with contextlib.redirect_stderr(said):
                code = main(make(Path(folder)))
            print(f"{name}: exit {code}: {said.getvalue().strip().replace(folder + os.sep, '')}")


if __name__ == "__main__":
    sys.exit(answers())
