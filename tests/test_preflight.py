"""The data of all stages are looked at before the first; a record's identity is its place."""

from __future__ import annotations

import contextlib
import functools
import io
import json
import tarfile
import time
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from forked_processes import run_in_processes
from PIL import Image

from vlbench.__main__ import main
from vlbench.config import recipe as recipes
from vlbench.config.data_schema import MixtureSource
from vlbench.data.batch_sampler import StepDataset
from vlbench.data.chat_template import YI_VL
from vlbench.data.chosen_samples import take_part
from vlbench.data.conversation_files import ConversationFiles
from vlbench.data.image_processing import ImageTransform
from vlbench.data.preflight import inspect_source
from vlbench.data.sample_encoding import SampleEncoder
from vlbench.data.shuffle import SourceMixture
from vlbench.data.tokenizer import Tokenizer
from vlbench.distributed import collectives
from vlbench.errors import BadSample, UserError
from vlbench.train import dry_run, run_report, stage_plan
from vlbench.train.quarantine import QuarantineCallback, quarantine_samples
from vlbench.train.run_folder import RunFolder
from vlbench.train.trainable_parts import check_trainable_params

TINY = Path(__file__).parent / "goldens/yi_vl/tiny_a/checkpoint"
LOOKS = {
    "fit": ["fit"],
    "dry run": ["fit", "dry_run=true"],
    "check": ["check"],
    "plan": ["plan"],
}
ONLY = ("only=chat", "stages.chat.steps=1", "stages.chat.global_batch_size=2")


def record(image: str | None = "a.png", **keys: Any) -> dict[str, Any]:
    tag = "<image>\n" if image else ""
    turns = [{"from": "human", "value": f"{tag}Colour?"}, {"from": "gpt", "value": "red"}]
    return {**({"image": image} if image else {}), "conversations": turns} | keys


def write(folder: Path, name: str, *records: Any) -> Path:
    (folder / name).write_text(json.dumps(records))
    return folder / name


def plan(recipe: recipes.Recipe) -> list[stage_plan.StageRun]:
    return stage_plan.plan_stage_runs(recipe.selected_data, recipe.last_stage_data)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working folder, with an image and data that are good."""
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (8, 8), "red").save(tmp_path / "a.png")
    write(tmp_path, "good.json", *(record(id=str(n)) for n in range(4)))
    write(tmp_path, "gone.json", *(record("no.png", id=str(n)) for n in range(4)))
    write(tmp_path, "text.json", *(record(None, id=str(n)) for n in range(4)))
    return tmp_path


def refused(words: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """Return the one line with which a command is refused, before there is a run."""
    verb, *more = words
    assert main([verb, "recipe=yivl_llava", *more]) == 2
    said = capsys.readouterr().err
    assert len(said.splitlines()) == 1 and not Path("runs").exists()
    return said


@pytest.mark.parametrize("verb", LOOKS.values(), ids=LOOKS)
@pytest.mark.parametrize(
    ("val", "words"),
    [
        ("nothere.json", "data.val: nothere.json: there is no such file"),
        ("good.txt", "data.val: good.txt: line 1"),
        ("folder", "data.val: folder: holds no shards.json"),
        ("gone.json", "no.png: does not exist (and 3 more of 4 samples). No good sample is left"),
    ],
)
def test_held_out_samples_of_the_last_stage_are_looked_at_first(folder, capsys, verb, val, words):
    (folder / "folder").mkdir()
    (folder / "good.txt").write_text("good")
    data = ["data.train=good.json", "data.on_bad_sample=quarantine", f"stages.chat.data.val={val}"]
    said = refused([*verb, *data], capsys)
    assert words in said and "data.val" in said


def test_what_is_asked_at_the_end_is_opened_though_its_stage_is_not_run(folder, capsys):
    data = ["data.train=good.json", "stages.chat.data.val=nothere.json", "only=align_224"]
    assert "nothere.json: there is no such file" in refused(["fit", *data], capsys)


def test_held_out_samples_may_be_shards(folder):
    assert main(["pack", "data=good.json", "out=shards"]) == 0
    words = ["recipe=yivl_llava", *ONLY, "data.train=good.json", "data.val=shards"]
    (leg,) = plan(recipes.load_recipe(words))
    assert leg.val_source is not None and len(leg.val_source) == 4 and leg.val_source[0].images


def test_shards_that_are_not_there_are_told_before_the_first_step(folder, capsys):
    assert main(["pack", "data=good.json", "out=shards", "samples=2"]) == 0
    (folder / "shards/000001.tar").unlink()
    data = ["data.train=good.json", "stages.chat.data.val=shards"]
    assert "000001.tar: does not exist (and 1 more of 4" in refused(["fit", *data], capsys)
    recipe = recipes.load_recipe(["recipe=yivl_llava", *ONLY, "data.train=shards"])
    with pytest.raises(UserError, match="and 1 more of 4 samples"):
        stage_plan.check_data(plan(recipe))


def test_the_records_of_shards_are_looked_at_before_the_first_step(folder, capsys, monkeypatch):
    image = (folder / "a.png").read_bytes()
    for number in range(4):
        with tarfile.open(f"{number}.tar", "w") as tar:
            for key in range(50):
                bad = {"image": "no.jpg"} if number == 1 and key < 2 else {}
                text = json.dumps({**record("a.png", mystery="?"), **bad}).encode()
                for name, data in ((f"{key:02d}.png", image), (f"{key:02d}.json", text)):
                    member = tarfile.TarInfo(name)
                    member.size = len(data)
                    tar.addfile(member, io.BytesIO(data))
    words = ["recipe=yivl_llava", *ONLY, "data.train={0..3}.tar"]
    assert len(stage_plan.check_data(plan(recipes.load_recipe(words)))) == 2  # of 200
    said = capsys.readouterr().out
    assert "2 of 200 samples are bad and left out, the first: " in said
    assert "keys that are not read: 'mystery' (198 records)" in said
    with pytest.raises(UserError, match="its shard has no image no.jpg"):
        stage_plan.check_data(plan(recipes.load_recipe([*words, "data.on_bad_sample=stop"])))
    source = plan(recipes.load_recipe(words))[0].data.sources[0]
    for missing, bad in ((2, 2), (0, 52)):  # of the first 100 samples none, and 50
        (folder / f"{missing}.tar").unlink()
        report = inspect_source(source, max_inspected_samples=100)
        assert (report.inspected_samples, report.bad_sample_count) == (100, bad)
        assert any(f"{missing}.tar: does not exist" in one.reason for one in report.bad_samples)


@pytest.mark.parametrize("members", [{"0.png": b"?"}, {"0.png": b"", "0.txt": b"red"}])
def test_shards_without_a_usable_sample_are_refused_before_the_first_step(folder, capsys, members):
    with tarfile.open("bad.tar", "w") as tar:
        for name, data in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    first = ["data.train=good.json", "data.on_bad_sample=quarantine"]
    own = "stages.align_448.data.train=good.json"
    for data in ([own, "stages.align_448.data.val=bad.tar"], ["stages.chat.data.train=bad.tar"]):
        for verb in LOOKS.values():
            said = refused([*verb, *first, *data], capsys)
            assert "bad.tar" in said and ("has no text" in said or "is empty" in said)


def test_an_image_that_git_lfs_has_not_fetched_is_called_so(folder, capsys):
    (folder / "a.png").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\n")
    assert "a.png: is a Git-LFS pointer" in refused(["fit", "data.train=good.json"], capsys)


def test_stages_share_a_file_that_is_open(folder):
    planned = plan(recipes.load_recipe(["recipe=yivl_llava", "data.train=good.json"]))
    assert len({id(source) for leg in planned for source in leg.all_sources}) == 1


def test_held_out_samples_without_an_image_are_told(folder, capsys):
    words = ["recipe=yivl_llava", *ONLY, "data.train=good.json", "data.val=text.json"]
    recipe = recipes.load_recipe(words)
    assert stage_plan.check_data(plan(recipe)) == []
    assert "text.json: no sample has an image, so no question" in capsys.readouterr().out


def test_held_out_samples_of_a_stage_of_captions_without_an_image_are_told(folder, capsys):
    steps = ("stages.align_224.steps=1", "stages.align_224.global_batch_size=2")
    words = ["recipe=yivl_llava", "only=align_224", *steps, "data.train=good.json"]
    for val, told in (("text.json", True), ("good.json", False)):
        recipe = recipes.load_recipe([*words, f"data.val={val}"])
        stage_plan.check_data(plan(recipe))
        line = "stage align_224: data.val text.json has no image"
        assert (line in capsys.readouterr().out) == told


def test_what_a_stage_of_captions_leaves_out_is_told_once(folder, capsys):
    further = [{"from": "human", "value": "<image>And?"}, {"from": "gpt", "value": "blue"}]
    talk = record(["a.png", "a.png"], id="talk")
    talk["conversations"] += further
    write(folder, "talk.json", talk, record(id="1"), record(None, id="2"))
    steps = [f"stages.{name}.steps=1" for name in ("align_224", "chat")]
    steps += [f"stages.{name}.global_batch_size=2" for name in ("align_224", "chat")]
    words = ["recipe=yivl_llava", "only=align_224,chat", *steps, "data.train=talk.json"]
    stage_plan.check_data(plan(recipes.load_recipe(words)))
    told = "of 1 of 3 samples further answers (1) and images (1) are left out: a caption is"
    said = capsys.readouterr().out
    assert said.count(told) == 1 and f"stage align_224: talk.json: {told}" in said
    assert main(["check", *words]) == 0
    assert capsys.readouterr().out.count("of 1 of 2 samples further answers (1) and images") == 1


@pytest.mark.parametrize(("more", "told"), [([], True), (["trainer.devices=2"], False)])
def test_a_strategy_of_several_processes_is_told_of_where_there_is_one(capsys, more, told):
    recipe = recipes.load_recipe(["recipe=yivl_llava", "trainer.strategy=fsdp2", *more])
    run_report.show_run_start("", recipe.trainer, recipe.model, [], {})
    assert ("strategy=fsdp2 changes nothing in one process" in capsys.readouterr().out) == told


def test_every_stage_judges_bad_samples_as_it_says(folder, capsys):
    write(folder, "half.json", record(id="x"), record("no.png", id="y"))
    data = [
        "data.train=half.json",
        "data.on_bad_sample=quarantine",
        "stages.chat.data.on_bad_sample=stop",
    ]
    assert "no.png: does not exist" in refused(["fit", *data], capsys)


@pytest.mark.parametrize(
    ("bad", "policy", "words"),
    [
        (2, "auto", ""),
        (4, "quarantine", ""),
        (4, "auto", "(and 3 more of 200 inspected of 300 samples). Mend the data"),
        (1, "stop", "does not exist. Mend the data"),
    ],
)
def test_bad_samples_among_those_inspected_are_judged_by_their_share(
    folder, monkeypatch, capsys, bad, policy, words
):
    """3 of 300 may be bad, and those among 200 inspected by as much less."""
    some = functools.partial(inspect_source, max_inspected_samples=200)
    monkeypatch.setattr(stage_plan, "inspect_source", some)
    records = [record(None if n >= bad else "no.png", id=str(n)) for n in range(299)]
    write(folder, "many.json", *records, record(id="299"))
    data = [*ONLY, "data.train=many.json", f"data.on_bad_sample={policy}"]
    stage_runs = plan(recipes.load_recipe(["recipe=yivl_llava", *data]))
    with pytest.raises(UserError) if words else contextlib.nullcontext() as caught:
        assert len(stage_plan.check_data(stage_runs)) == bad
    said = capsys.readouterr().out
    assert said.startswith("many.json: 200 of 300 samples were inspected") and "check" in said
    if words:
        assert words in str(caught.value)
    else:
        assert f"{bad} of 200 inspected of 300 samples are bad and left out" in said


def test_one_process_inspects_the_data_of_a_dry_run(folder, monkeypatch):
    recipe = recipes.load_recipe(["recipe=yivl_llava", *ONLY, "data.train=good.json"])
    runner: Any = SimpleNamespace()
    inspected = []
    monkeypatch.setattr(dry_run, "check_data", lambda _: inspected.append(collectives.rank()))
    monkeypatch.setattr(dry_run, "check_stage_shapes", lambda *_: pytest.skip("this far"))

    def begin(_: int) -> list[int]:
        with contextlib.suppress(pytest.skip.Exception):
            next(dry_run.measure_stages(runner, recipe.model, []))
        return inspected

    assert run_in_processes(begin) == [[0], []]


def test_the_others_begin_when_the_first_process_has_ended(folder):
    def read_or_make(rank: int) -> str:
        def read() -> str:
            file = Path("index")
            if not file.exists():
                time.sleep(0.1 if rank == 0 else 0)
                file.write_text(f"made by {rank}")
            return file.read_text()

        return collectives.call_on_rank_zero_first(read)

    assert run_in_processes(read_or_make) == ["made by 0"] * 2


@pytest.mark.parametrize("verb", LOOKS.values(), ids=LOOKS)
def test_captions_without_an_image_are_refused(folder, capsys, verb):
    said = refused([*verb, "data.train=text.json"], capsys)
    assert "stage align_224 learns captions of images (sample_format=caption)" in said


def test_captions_whose_images_are_all_bad_are_refused(folder, capsys):
    texts = [record(None, id="t"), record("no.png", id="p")]
    write(folder, "mixed.json", *texts)
    said = refused(["fit", "data.train=mixed.json", "data.on_bad_sample=quarantine"], capsys)
    assert "learns captions of images" in said


def test_an_objective_of_images_is_refused_without_them(folder, capsys):
    assert main(["fit", "recipe=yivl_blip2", "data.train=text.json"]) == 2
    said = capsys.readouterr().err
    assert "learns captions of images" in said and len(said.splitlines()) == 1


@pytest.mark.parametrize("verb", LOOKS.values(), ids=LOOKS)
def test_a_stage_that_trains_nothing_is_refused(folder, capsys, verb):
    parts = [f"stages.chat.train.{part}=null" for part in ("vision", "connector", "language")]
    assert "stages.chat.train names no part" in refused([*verb, *ONLY, *parts], capsys)
    none = recipes.load_recipe(["recipe=yivl_llava", "stages.chat.steps=0", "only=chat", *parts])
    assert plan(none)[0].total_steps == 0  # nothing is to be trained


def test_a_part_without_parameters_is_no_part_to_train():
    part = torch.nn.Identity()
    vlm: Any = SimpleNamespace(connector=part)
    stage: Any = SimpleNamespace(trained_parts={"connector": SimpleNamespace(lora=None)})
    with pytest.raises(UserError, match="names connector, which has no parameters"):
        check_trainable_params(vlm, "chat", stage, 2)
    vlm.connector = torch.nn.Linear(1, 1)
    check_trainable_params(vlm, "chat", stage, 2)


# ---- identity


def test_bad_records_with_equal_ids_are_counted_and_noted_one_by_one(folder):
    write(folder, "equal.json", *(record("no.png", id="000000") for _ in range(3)), record())
    words = ["recipe=yivl_llava", *ONLY, "data.train=equal.json", "data.on_bad_sample=quarantine"]
    recipe = recipes.load_recipe(words)
    bad = stage_plan.check_data(plan(recipe))
    assert [one.record_identity for one in bad] == [("equal.json", n) for n in (1, 2, 3)]
    run = RunFolder(folder)
    for _ in range(2):  # as when it is resumed
        quarantine_samples(run, bad)
    lines = [json.loads(line) for line in run.quarantine_file.read_text().splitlines()]
    assert [(line["id"], line["source"], line["record"]) for line in lines] == [
        ("000000", "equal.json", n) for n in (1, 2, 3)
    ]


def test_check_counts_refused_records_with_equal_ids_and_tells_of_ids_once(folder, capsys):
    bad = [record("no.png", id="same") | {"conversations": turns(n)} for n in (8, 9)]
    good = [record(id="same") | {"conversations": turns(n)} for n in range(4)]
    write(folder, "equal.json", *bad, *good)
    words = ["data.train=equal.json", "data.on_bad_sample=quarantine", "only=chat", "out=out"]
    assert main(["check", "recipe=yivl_llava", *words]) == 0
    lines = [json.loads(line) for line in (folder / "out/findings.jsonl").read_text().splitlines()]
    assert [line["record"] for line in lines if line["kind"] == "refused"] == [1, 2]
    (twice,) = [line["what"] for line in lines if line["kind"] == "twice"]
    assert "has the id of an earlier one, as 4 others do" in twice
    assert main(["check", "recipe=yivl_llava", *words[:1], "only=chat", "out=out"]) == 2
    assert "(and 1 more of 6 samples)" in capsys.readouterr().err


def turns(number: int) -> list[dict[str, str]]:
    return [
        {"from": "human", "value": f"<image>\nColour {number}?"},
        {"from": "gpt", "value": "red"},
    ]


def test_samples_with_equal_ids_have_names_of_their_own_in_a_batch(folder):
    """What is random in a connector follows from these names."""
    for name in ("one.json", "two.json"):
        write(folder, name, *(record(id="same") for _ in range(3)))
    sources = [(ConversationFiles(folder / name, folder), 1.0) for name in ("one.json", "two.json")]
    steps = StepDataset(
        mixture=SourceMixture(sources, 0),
        encoder=SampleEncoder(Tokenizer.load(TINY), YI_VL, tokens_per_image=4, max_length=512),
        image_transform=ImageTransform(8, 8, (0.5,) * 3, (0.5,) * 3),
        global_batch_size=6,
        max_tokens_per_row=4096,
        total_steps=1,
    )
    (batch,) = steps[0].micro_batches
    assert set(batch.sample_ids) == {
        *(f"same (record {n})" for n in (1, 2, 3)),
        *(f"same (record {n} of source 2)" for n in (1, 2, 3)),
    }
    assert len(set(batch.image_ids)) == 6


def test_bad_samples_name_their_record_also_when_their_images_are_broken(folder):
    (folder / "b.png").write_bytes(b"no picture")
    write(
        folder,
        "equal.json",
        record(id="same"),
        record("b.png", id="same"),
        record(id="x") | {"image": ""},
    )
    steps = StepDataset(
        mixture=SourceMixture([(ConversationFiles("equal.json"), 1.0)], 0),
        encoder=SampleEncoder(Tokenizer.load(TINY), YI_VL, tokens_per_image=4, max_length=512),
        image_transform=ImageTransform(8, 8, (0.5,) * 3, (0.5,) * 3),
        global_batch_size=3,
        max_tokens_per_row=4096,
        total_steps=1,
    )
    bad = {one.record_identity: str(one) for one in steps[0].bad_samples}
    assert set(bad) == {("equal.json", 2), ("equal.json", 3)}
    assert bad["equal.json", 2].startswith("sample same (record 2): ")


# ---- what is noticed while a stage trains


class World:
    """A source of so many samples that is never read."""

    def __init__(self, name: str, count: int) -> None:
        self.name, self.count = name, count

    def __len__(self) -> int:
        return self.count


def training(position: int, steps: int, **report: Any) -> Any:
    told = {"samples": 0, "loss": 1.0, "skipped": False, **report}
    return SimpleNamespace(steps_done=position, total_steps=steps, report=SimpleNamespace(**told))


def quarantine(folder: Path, count: int, on_bad_sample: str = "auto") -> QuarantineCallback:
    source: Any = World("here", count)
    return QuarantineCallback(RunFolder(folder), on_bad_sample, SourceMixture([(source, 1.0)], 0))


def test_bad_samples_that_a_part_leaves_out_do_not_count_here(folder):
    quarantine_samples(
        RunFolder(folder), [BadSample("x", "y").with_origin("here", n) for n in range(1, 6)]
    )
    source: Any = World("here", 1000)
    part = MixtureSource(train="here", sampling="end:250")
    mixture = SourceMixture([take_part(source, part, 0)], 0)
    watcher = QuarantineCallback(RunFolder(folder), "auto", mixture)
    for record in (751, 1000):
        watcher.record_bad_samples([BadSample("same", "y").with_origin("here", record)])
    with pytest.raises(UserError, match="and 2 more of 250 samples"):
        watcher.record_bad_samples([BadSample("same", "y").with_origin("here", 900)])


@pytest.mark.parametrize(
    ("weights", "allowed"),
    [((0.1,), 10), ((1,), 10), ((2,), 10), ((1, 0.5), 10)],  # of 1,000 records, each once
)
def test_bad_samples_are_a_share_of_the_records_whatever_an_epoch_takes(folder, weights, allowed):
    source: Any = World("here", 1000)
    parts = [take_part(source, MixtureSource(train="here", weight=one), 0) for one in weights]
    bad = [BadSample("x", "y").with_origin("here", n) for n in range(1, allowed + 2)]
    quarantine_samples(RunFolder(folder), bad[:allowed])  # as before training, of all records
    watcher = QuarantineCallback(RunFolder(folder), "auto", SourceMixture(parts, 0))
    watcher.record_bad_samples(bad[:1])
    with pytest.raises(UserError, match=f"and {allowed} more of 1000 samples"):
        watcher.record_bad_samples(bad[-1:])


def test_good_samples_are_left_while_a_record_is_good(folder):
    source: Any = World("here", 100)
    part = take_part(source, MixtureSource(train="here", weight=0.1), 0)
    watcher = QuarantineCallback(RunFolder(folder), "quarantine", SourceMixture([part], 0))
    bad = [BadSample("x", "y").with_origin("here", n) for n in range(1, 101)]
    watcher.record_bad_samples(bad[:99])
    with pytest.raises(UserError, match="No good sample is left"):
        watcher.record_bad_samples(bad[99:])


def test_bad_samples_of_other_stages_do_not_count_here(folder):
    quarantine_samples(
        RunFolder(folder), [BadSample("x", "y").with_origin("elsewhere", n) for n in range(1, 6)]
    )
    watcher = quarantine(folder, 200)
    watcher.record_bad_samples([BadSample("same", "y").with_origin("here", 1)])
    watcher.record_bad_samples(
        [
            BadSample("same", "y").with_origin("here", 2),
            BadSample("same", "y").with_origin("here", 1),
        ]
    )
    lines = RunFolder(folder).quarantine_file.read_text().splitlines()
    assert Counter(json.loads(line)["source"] for line in lines) == {"elsewhere": 5, "here": 2}
    with pytest.raises(UserError, match="and 2 more of 200 samples"):
        watcher.record_bad_samples([BadSample("same", "y").with_origin("here", 3)])


def test_a_stage_in_which_no_step_had_a_sample_is_a_mistake(folder):
    watcher = quarantine(folder, 200)
    step: Any = SimpleNamespace(index=0, bad_samples=[], skipped_samples=2)
    watcher.on_stage_start(training(0, 2))
    watcher.on_step_end(training(1, 2), step)
    with pytest.raises(UserError, match="nothing was learned in 2 steps: 4 samples have no image"):
        watcher.on_step_end(training(2, 2), step)
    watcher = quarantine(folder, 200)
    watcher.on_stage_start(training(1, 2))  # before it was stopped it may have learned
    watcher.on_step_end(training(2, 2), step)
