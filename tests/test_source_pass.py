"""The pass of `check`: it tells how long it takes, and forgets what it has read."""

from __future__ import annotations

import io
import json
import tracemalloc
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from vlbench.check import source_pass
from vlbench.check.findings import CUT, ODD, REFUSED, DataFinding, FindingLog, RefusedSamples
from vlbench.check.sample_checks import StageCheck
from vlbench.check.source_pass import GoodSamples, Pace, SourcePass
from vlbench.data import json_scan
from vlbench.data.chat_template import YI_VL
from vlbench.data.conversation_files import ConversationFiles
from vlbench.data.image_processing import ImageFile
from vlbench.data.sample import IMAGE_PLACEHOLDER, ChatTurn, Sample
from vlbench.data.sample_encoding import IMAGE_TOKEN_INDEX, SampleEncoder


class Letters:
    """A tokenizer whose tokens are letters."""

    bos_token_id = None

    def encode(self, text: str, add_bos: bool = True) -> Sequence[int]:
        return [ord(letter) % 256 for letter in text]

    def check_token_ids(self, ids: Sequence[int]) -> None:
        """All are known."""


def check(file: Path | str) -> tuple[SourcePass, StageCheck, list[dict[str, object]]]:
    stage_check = StageCheck("chat", str(file), SampleEncoder(Letters(), YI_VL, 4, 1 << 20))
    lines = io.StringIO()
    checked = SourcePass(ConversationFiles(file), [stage_check], YI_VL, FindingLog(lines), 1)
    checked.check_files()
    return checked, stage_check, [json.loads(line) for line in lines.getvalue().splitlines()]


def test_counts_are_those_of_the_samples_that_are_cut(tmp_path):
    answer = ChatTurn("assistant", "a" * 100)
    turns = [ChatTurn("human", f"{IMAGE_PLACEHOLDER}?"), answer] * 2
    sample = Sample("s", tuple(turns), (ImageFile("0.png"), ImageFile("1.png")))
    whole = SampleEncoder(Letters(), YI_VL, 4, 1 << 20)
    ids = whole.encode(sample).input_ids
    second_image = [at for at, token in enumerate(ids) if token == IMAGE_TOKEN_INDEX][4]
    cut = replace(whole, max_length=second_image - 50)  # within the first answer
    stage_check = StageCheck("chat", "s", cut)
    [finding] = stage_check.check_sample(sample)
    expected = cut.encode(sample)
    assert finding.kind == CUT and len(expected.sample.images) == 1
    assert stage_check.image_count == 1
    assert list(stage_check.token_counts) == [len(expected.input_ids)] == [cut.max_length]
    assert stage_check.supervised_tokens == expected.supervised_token_count


def write(file: Path, count: int, letters: int) -> None:
    with file.open("w") as lines:
        for number in range(count):
            answer = f"{number} " + "a" * letters
            turns = [{"from": "human", "value": "?"}, {"from": "gpt", "value": answer}]
            lines.write(json.dumps({"id": f"r{number}", "conversations": turns}) + "\n")


def test_texts_are_forgotten(tmp_path, monkeypatch):
    monkeypatch.setattr(source_pass, "CHUNK_SAMPLES", 16)
    monkeypatch.setattr(json_scan, "CHUNK_BYTES", 1 << 16)
    write(tmp_path / "data.jsonl", 150, 10_000)
    tracemalloc.start()
    try:
        _, stage_check, found = check(tmp_path / "data.jsonl")
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert len(stage_check.token_counts) == 150 and not found
    assert peak < 1_500_000  # the texts have as much


def test_repeated_records_and_ids_are_found_once_read_again(tmp_path):
    write(tmp_path / "data.jsonl", 4, 1)
    lines = (tmp_path / "data.jsonl").read_text().splitlines()
    same_id = lines[3].replace('"r3"', '"r0"')
    (tmp_path / "data.jsonl").write_text("\n".join([*lines[:3], same_id, lines[1], "{}"]))
    checked, stage_check, found = check(tmp_path / "data.jsonl")
    assert [one["what"] for one in found if one["kind"] == "twice"] == [
        "record 5 has the images and turns of record 2 (r1)",
        "record 4 has the id of an earlier one (ids are only labels)",
    ]
    assert [one["record"] for one in found if one["kind"] == "refused"] == [6]
    good = GoodSamples(checked.summary)
    assert [sample.id for sample in good[:]] == ["r0", "r1", "r2", "r0", "r1"]
    assert len(stage_check.token_counts) == 5


def test_the_time_that_is_left_is_told_once(monkeypatch, capsys):
    clock = iter([0.0, 1.0, 6.0, 7.0])
    monkeypatch.setattr(source_pass.time, "monotonic", lambda: next(clock))
    pace = Pace("data.json", 1_000_000)
    for done in (500, 3_000, 4_000):
        pace.note_done(done)
    told = capsys.readouterr().out.splitlines()
    assert told == ["data.json: 3,000 of 1,000,000 records in 6 s, about 33 minutes left"]


def test_findings_are_counted_and_only_the_first_are_kept():
    lines = io.StringIO()
    log, refused = FindingLog(lines), RefusedSamples()
    found = [
        DataFinding(REFUSED, "data.json", f"r{record}", "is bad", record=record)
        for record in range(1, 1001)
    ]
    found.append(DataFinding(REFUSED, "data.json", "r0", "is cut", "chat", record=2000))
    for finding in (*found, DataFinding(ODD, "data.json", "r0", "is odd")):
        log.add(finding)
        refused.note(finding)
    assert len(lines.getvalue().splitlines()) == log.counts[REFUSED] + 1 == 1002
    assert len(log.first_ones[REFUSED]) == 5
    (first,), count = refused.of_stage("chat")
    assert (first.sample_id, count) == ("r1", 1001)
    assert refused.of_stage("align_224")[1] == 1000
    assert RefusedSamples().of_stage("chat") == ([], 0)


@pytest.mark.parametrize("text", ["", "a" * 70])
def test_a_hash_is_the_same_in_every_process(text):
    from vlbench.check.repeated_samples import short_hash

    assert short_hash(text) == short_hash(text.encode()) < 1 << 64
