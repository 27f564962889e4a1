"""Parquet files as training data: any row by its number, and the same steps after any stop."""

from __future__ import annotations

import io
import os
import pickle
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from accidental_runs import newest_weights
from forked_command import run_command
from PIL import Image

from vlbench.data import parquet_records
from vlbench.data.batch_sampler import StepDataset
from vlbench.data.chat_template import YI_VL
from vlbench.data.conversation_files import ConversationFiles
from vlbench.data.image_processing import ImageTransform
from vlbench.data.parquet_files import choose_split, find_parquet_files
from vlbench.data.parquet_records import ParquetRecords
from vlbench.data.sample_encoding import SampleEncoder
from vlbench.data.shuffle import SourceMixture
from vlbench.data.step_loader import StepLoader
from vlbench.data.tokenizer import Tokenizer
from vlbench.errors import BadSample, UserError
from vlbench.train import checkpoint_files

TINY = Path(__file__).parent / "goldens/yi_vl/tiny_a/checkpoint"
TRANSFORM = ImageTransform(28, 28, (0.5,) * 3, (0.25,) * 3)
ROWS, ROWS_PER_GROUP, FILES = 60, 7, 3
STEPS, BATCH = 8, 12
IMAGE_STRUCT = pa.struct({"bytes": pa.binary(), "path": pa.string()})


def picture(number: int) -> bytes:
    stream = io.BytesIO()
    colours = np.random.default_rng(number).integers(0, 256, (5, 6, 3), np.uint8)
    Image.fromarray(colours).save(stream, "PNG")
    return stream.getvalue()


def row(number: int) -> dict[str, Any]:
    images = [{"bytes": picture(number), "path": None}] if number % 5 else []
    return {
        "id": str(number),
        "images": images,
        "texts": [{"user": f"What is {number}?", "assistant": f"It is {number}."}],
    }


def write_rows(file: Path, rows: list[dict[str, Any]]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    kinds = {"images": pa.list_(IMAGE_STRUCT)}
    columns = {name: pa.array([one[name] for one in rows], kinds.get(name)) for name in rows[0]}
    pq.write_table(pa.table(columns), file, row_group_size=ROWS_PER_GROUP)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data set of three files in the layout of the hub, and a split for validation."""
    path = tmp_path_factory.mktemp("parquet")
    per_file = ROWS // FILES
    for number in range(FILES):
        rows = [row(one) for one in range(number * per_file, (number + 1) * per_file)]
        write_rows(path / f"data/train-{number:05d}-of-{FILES:05d}.parquet", rows)
    write_rows(path / "data/validation-00000-of-00001.parquet", [row(1000)])
    return path


def test_any_row_is_reached_by_its_number(folder):
    source = ConversationFiles(folder)
    assert len(source) == ROWS
    for number in (59, 0, 33, 7, 6, 20, 19):
        sample = source[number]
        assert sample.id == str(number) and f"What is {number}?" in sample.turns[0].text
        assert len(sample.images) == bool(number % 5)
        if sample.images:
            ours = np.asarray(sample.images[0].open())
            assert np.array_equal(ours, np.asarray(Image.open(io.BytesIO(picture(number)))))
    again = pickle.loads(pickle.dumps(source))
    assert again[33].turns == source[33].turns and again[33].images[0].open().size == (6, 5)


def test_a_plan_of_texts_reads_no_image_where_all_rows_have_one(folder, tmp_path, monkeypatch):
    write_rows(tmp_path / "all.parquet", [row(number) for number in range(1, 5)])
    seen = []
    read_block = parquet_records._read_block

    def watch(block: Any, with_images: bool) -> Any:
        loaded = read_block(block, with_images)
        seen.append(loaded.table.nbytes)
        return loaded

    monkeypatch.setattr(parquet_records, "_read_block", watch)
    source = ConversationFiles(tmp_path / "all.parquet")
    samples = [source[number] for number in range(4)]
    assert [len(sample.images) for sample in samples] == [1] * 4 and len(seen) == 1
    assert samples[2].images[0].open().size == (6, 5)
    assert len(seen) == 2 and seen[1] > seen[0] + 4 * 100  # the files of four images


@pytest.mark.parametrize("block_bytes", [1, 2000, 1 << 25])
def test_a_large_row_group_is_read_in_parts(folder, monkeypatch, block_bytes):
    monkeypatch.setattr(parquet_records, "BLOCK_BYTES", block_bytes)
    records = ParquetRecords("x", find_parquet_files(str(folder)))
    sizes = {block.row_count for block in records.blocks}
    assert max(sizes) <= ROWS_PER_GROUP and (block_bytes > 1 or sizes == {1})
    assert [records.read_record(n)["id"] for n in range(ROWS)] == list(map(str, range(ROWS)))


def test_many_sources_take_no_more_memory_than_a_few(tmp_path, monkeypatch):
    for number in range(6):
        rows = [row(one) for one in range(5 * number + 1, 5 * number + 5)]
        write_rows(tmp_path / f"{number}.parquet", rows)
    sources = [ConversationFiles(tmp_path / f"{number}.parquet") for number in range(6)]
    recent = parquet_records.recent_blocks
    recent._blocks.clear()
    sources[0][0].images[0].open()
    most = 3 * recent.held_bytes
    monkeypatch.setattr(parquet_records, "CACHE_BYTES", most)
    for turn in range(4):  # in turn, as a mixture takes them
        for source in sources:
            assert source[turn].images[0].open().size == (6, 5)
            assert 0 < recent.held_bytes <= most


def test_a_pass_takes_every_row_once_and_few_blocks_at_a_time(folder):
    source = ConversationFiles(folder)
    order = source.pass_order("0")
    passed = [order(position) for position in range(ROWS)]
    assert sorted(passed) == list(range(ROWS)) and passed != list(range(ROWS))
    ends = np.cumsum(source.records.block_counts)
    blocks = [int(ends.searchsorted(index, side="right")) for index in passed]
    assert len(ends) == 9 and len(set(blocks[:16])) <= 8


class Steps:
    """The steps of a rank, as numbers that are equal only if all bits of a step are."""

    def __init__(self, folder: Path, rank: int, world_size: int) -> None:
        self.steps = StepDataset(
            mixture=SourceMixture([(ConversationFiles(folder), 1.0)], seed=3),
            encoder=SampleEncoder(Tokenizer.load(TINY), YI_VL, 4, 512),
            image_transform=TRANSFORM,
            global_batch_size=BATCH,
            max_tokens_per_row=128,
            total_steps=STEPS,
            rank=rank,
            world_size=world_size,
        )

    def run(self, first: int, last: int, workers: int) -> list[list[torch.Tensor]]:
        """Load steps `first` to `last` - 1 in a loader of their own, as a resumed run does."""
        found = []
        for step in StepLoader(
            steps=self.steps, step_numbers=range(first, last), num_workers=workers
        ):
            tensors: list[torch.Tensor] = []
            for batch in step.take_micro_batches():
                tensors += [batch.input_ids, batch.labels, batch.pixels]
            found.append(tensors)
        return found


def assert_equal(ours: list[list[torch.Tensor]], theirs: list[list[torch.Tensor]]) -> None:
    assert len(ours) == len(theirs) > 0
    for one, other in zip(ours, theirs, strict=True):
        assert len(one) == len(other) > 0
        assert all(map(torch.equal, one, other))


@pytest.mark.parametrize("world_size", [1, 2])
def test_a_run_that_stops_in_the_middle_goes_on_with_the_same_bits(folder, world_size):
    for rank in range(world_size):
        whole = Steps(folder, rank, world_size).run(0, STEPS, 0)
        for workers in (0, 1, 3) if rank == world_size - 1 else (0,):
            rest = Steps(folder, rank, world_size).run(3, STEPS, workers)
            assert_equal(rest, whole[3:])


def test_two_ranks_take_what_one_takes(folder):
    one = SourceMixture([(ConversationFiles(folder), 1.0)], seed=3)
    ids = [one[position].id for position in range(2 * ROWS)]
    assert sorted(ids[:ROWS]) == sorted(ids[ROWS:]) and ids[:ROWS] != ids[ROWS:]
    other = SourceMixture([(ConversationFiles(folder), 1.0)], seed=3)
    assert [other[position].id for position in range(1, 2 * ROWS, 2)] == ids[1::2]


LAYOUTS: dict[str, tuple[list[str], str, list[int]]] = {
    "data": (["data/train-00000-of-00001", "data/test-00000-of-00001"], "", [0]),
    "its split": (["data/train-00000-of-00001", "data/test-00000-of-00001"], "test", [1]),
    "converted": (["default/train/0000", "default/train/0001", "default/test/0000"], "", [0, 1]),
    "subsets": (["a/train-00000-of-00001", "b/train-00000-of-00001"], "", [0, 1]),
    "val is validation": (["val-00000-of-00001", "train-00000-of-00001"], "validation", [0]),
    "another name": (["train_sft-00000-of-00001", "test_sft-00000-of-00001"], "", [0]),
    "no split": (["part.0", "part.1"], "", [0, 1]),
    "asked beside files without one": (["ai2d", "textvqa_train"], "train", [1]),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_the_files_of_a_split_are_found_in_the_layouts_of_datasets(name):
    stems, split, chosen = LAYOUTS[name]
    files = [Path(f"{stem}.parquet") for stem in stems]
    assert choose_split("d", files, split) == [files[number] for number in chosen]


def test_files_without_a_split_are_not_left_out_beside_one_that_has_it():
    files = [Path(f"{name}.parquet") for name in ("ai2d", "chartqa", "textvqa_train")]
    with pytest.raises(UserError) as caught:
        choose_split("d", files)
    assert "2 Parquet files that tell no split (ai2d.parquet, chartqa.parquet)" in str(caught.value)
    assert "d:train reads the latter alone" in str(caught.value)
    with pytest.raises(UserError, match=r"tell no split \(extra\.parquet\), and 1 of the split"):
        choose_split("d", [Path("extra.parquet"), Path("train_sft-00000-of-00001.parquet")])


def test_a_split_is_named_behind_a_colon(folder):
    assert [ConversationFiles(f"{folder}:validation")[0].id] == ["1000"]
    with pytest.raises(UserError, match=r"no split 'test'; it has train, validation, of which"):
        ConversationFiles(f"{folder}:test")


def test_a_missing_file_and_a_damaged_one_are_one_line(folder, tmp_path):
    write_rows(tmp_path / "a/train-00001-of-00002.parquet", [row(1)])
    with pytest.raises(UserError, match="of 2 files 1 are missing: 00000-of-00002"):
        ConversationFiles(tmp_path / "a")
    whole = (folder / "data/train-00000-of-00003.parquet").read_bytes()
    (tmp_path / "b").mkdir()
    (tmp_path / "b/x.parquet").write_bytes(whole[:-100])
    with pytest.raises(UserError, match=r"x\.parquet: is damaged or cut off") as caught:
        ConversationFiles(tmp_path / "b")
    assert "\n" not in str(caught.value)
    (tmp_path / "b/x.parquet").write_bytes(whole[:300] + b"\xff" * 400 + whole[700:])
    source = ConversationFiles(tmp_path / "b")
    bad = source.find_bad_samples()
    assert bad and all("x.parquet: is damaged" in str(one) for one in bad)


def test_a_file_that_changes_is_a_bad_sample(tmp_path):
    write_rows(tmp_path / "x.parquet", [row(1)])
    source = ConversationFiles(tmp_path / "x.parquet")
    os.utime(tmp_path / "x.parquet", (1, 1))
    with pytest.raises(BadSample, match="is another file than it was"):
        source[0]


def family(pid: int) -> list[int]:
    """Return a process and all that it has started, which may be in sessions of their own."""
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return [pid, *(one for child in children for one in family(int(child)))]


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
@pytest.mark.parametrize("workers", [0, 1, 3])
def test_a_run_that_is_killed_ends_with_the_weights_of_one_that_is_not(
    folder, tmp_path, workers, processes
):
    words = ["fit", "recipe=yivl_llava", "only=chat", f"data.train={folder}"]
    words += ["stages.chat.steps=12", "stages.chat.global_batch_size=6", "log.questions=1"]
    words += ["log.examples=0", "log.tensorboard=false", "log.every_n_steps=1"]
    words += ["trainer.checkpoint_every=0.001", f"trainer.devices={processes}"]
    run = tmp_path / "killed"
    rest = [*words, f"data.workers={workers}", "run=killed"]
    child = subprocess.Popen(
        [sys.executable, "-m", "vlbench", *rest], cwd=tmp_path, start_new_session=True
    )
    while child.poll() is None and not list(run.glob("checkpoints/*-chat-00000[2-9]")):
        time.sleep(0.01)
    for pid in family(child.pid):
        os.kill(pid, signal.SIGKILL)
    assert child.wait() == -signal.SIGKILL and not (run / "results.json").exists()
    assert 1 <= checkpoint_files.list_positions(run / "checkpoints")[-1].step < 12
    for last in (rest, [*words, "data.workers=0", "run=whole"]):
        done = run_command(last, tmp_path, timeout=300)
        assert done.code == 0, done.words
    ours, theirs = newest_weights(run), newest_weights(tmp_path / "whole")
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_an_image_is_looked_up_beside_the_file_that_names_it(tmp_path):
    for name in "ab":
        rows = [{"image": "1.png", "query": "What?", "response": f"It is {name}."}]
        write_rows(tmp_path / name / "train.parquet", rows)
        (tmp_path / name / "1.png").write_bytes(picture(ord(name)))
    source = ConversationFiles(tmp_path)
    assert [sample.turns[-1].text for sample in source] == ["It is a.", "It is b."]
    assert [one.images[0].name for one in source] == [f"{tmp_path}/{one}/1.png" for one in "ab"]
    named = ConversationFiles(tmp_path, tmp_path / "a")
    assert [one.images[0].name for one in named] == [f"{tmp_path}/a/1.png"] * 2


def test_the_bytes_of_another_image_of_that_name_are_not_dropped(tmp_path):
    images = [{"bytes": picture(number), "path": "0001.png"} for number in range(2)]
    columns = {
        "image": pa.array(images[:1], IMAGE_STRUCT),
        "before": pa.array(images[1:], IMAGE_STRUCT),
        **{name: pa.array([text]) for name, text in (("query", "What?"), ("response", "That."))},
    }
    pq.write_table(pa.table(columns), tmp_path / "train.parquet")
    with pytest.raises(BadSample, match="'before' is not read; name the file in 'image'"):
        ConversationFiles(tmp_path)[0]
