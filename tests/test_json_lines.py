"""Files of a JSON object per line: texts with odd line ends survive, so do files cut by a kill."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from test_eval_command import take
from test_report_command import run as finished_run

from vlbench.__main__ import main
from vlbench.compare.experiment.run_jobs import TrainingJob
from vlbench.compare.report import finished_runs as compare_runs
from vlbench.errors import BadSample, UserError
from vlbench.evaluate import batch_inference
from vlbench.text_files import append_json_lines, format_json_lines, read_json_lines, split_lines
from vlbench.train import quarantine, run_report
from vlbench.train.run_folder import RunFolder

ROOT = Path(__file__).parents[1]
ODD = "a\u2028b\u2029c\x85d\x0be\x0cf\x1cg\r\nh\ud83d"
"""Every character at which str.splitlines cuts, and half of a surrogate pair."""


def test_lines_end_with_line_feeds_alone():
    assert (
        split_lines("") == [] and split_lines("\n") == [""] and split_lines("a\r\nb") == ["a", "b"]
    )
    assert split_lines("a\u2028b\x85\n\nc\n") == ["a\u2028b\x85", "", "c"]


@pytest.mark.parametrize("cut", [1, 5, 40])
def test_what_is_written_is_read_again_and_added_to(cut, tmp_path):
    file = tmp_path / "x.jsonl"
    assert read_json_lines(file) == []
    records = [{"id": ODD}, {"id": "\u732b", "text": ODD}]
    file.write_text(format_json_lines(records), encoding="utf-8")
    assert read_json_lines(file) == records
    file.write_bytes(file.read_bytes()[:-cut])  # also in the middle of a letter
    assert read_json_lines(file) == records[:1]
    append_json_lines(file, records[1:])
    assert read_json_lines(file) == records


@pytest.mark.parametrize(("line", "words"), [("[1]", "not a JSON object"), ("{", "not JSON")])
def test_a_line_that_is_no_object_is_named(line, words, tmp_path):
    (tmp_path / "x.jsonl").write_text(f'{{"a": 1}}\n{line}\n{{"a": 1}}\n')
    with pytest.raises(UserError, match=f"x.jsonl: line 2 is {words}"):
        read_json_lines(tmp_path / "x.jsonl")


def test_no_text_is_cut_by_splitlines():
    """Messages of other libraries are, where one line is wanted."""
    message = re.compile(r"str\(error\)(\.strip\(\))?\.splitlines\(\)")
    found = [
        f"{file.relative_to(ROOT)}:{number}"
        for folder in ("vlbench", "benchmarks", "connectors")
        for file in (ROOT / folder).rglob("*.py")
        for number, line in enumerate(file.read_text(encoding="utf-8").split("\n"), 1)
        if ".splitlines(" in line and not message.search(line)
    ]
    assert not found


def test_bad_samples_with_odd_names_are_read_again(tmp_path, capsys):
    run = RunFolder(tmp_path)
    odd = ODD[:-1]  # the report is printed: half of a pair is for streams that main() prepares
    quarantine.quarantine_samples(run, [BadSample(odd, "torn"), BadSample("two", odd)])
    quarantine.quarantine_samples(run, [BadSample(odd, "torn"), BadSample("three", "torn")])
    assert len(read_json_lines(run.quarantine_file)) == 3
    results = {"questions": 1, "asked_of": "x", "seconds": 1, "peak_memory_bytes": 1}
    run.results_file.write_text(json.dumps(results))
    assert run_report.show_results(run) == 0
    assert "3 bad samples left out" in capsys.readouterr().out


def test_bad_samples_are_noted_again_after_a_kill_in_the_middle_of_a_line(tmp_path):
    run = RunFolder(tmp_path)
    quarantine.quarantine_samples(run, [BadSample("one", "torn"), BadSample("two", "torn")])
    run.quarantine_file.write_bytes(run.quarantine_file.read_bytes()[:-9])
    quarantine.quarantine_samples(run, [BadSample("one", "torn"), BadSample("two", "torn")])
    assert [line["id"] for line in read_json_lines(run.quarantine_file)] == ["one", "two"]


def test_an_exam_with_odd_answers_goes_on(model, tmp_path, monkeypatch):
    monkeypatch.setattr(
        batch_inference, "answer_batch", lambda _, samples, **o: [ODD] * len(samples)
    )
    for name in ("whole", "out"):
        assert take(model, tmp_path / name, "mmmu", "mmmu_tiny", "limit=6") == 0
    file = tmp_path / "out/answers.jsonl"
    whole = file.read_bytes()
    file.write_bytes(whole[:-30])
    assert take(model, tmp_path / "out", "mmmu", "mmmu_tiny", "limit=6") == 0
    assert file.read_bytes() == whole and len(read_json_lines(file)) == 6


def test_runs_with_odd_answers_are_compared(tmp_path):
    folder = finished_run(tmp_path / "a", 0.5, 0)
    lines = read_json_lines(folder / "answers.jsonl")
    odd = [{**line, "id": f"{line['id']}{ODD}", "answer": ODD, "truth": ODD} for line in lines]
    (folder / "answers.jsonl").write_text(format_json_lines(odd), encoding="utf-8")
    found = compare_runs.load_finished_run(folder)
    assert len(found.correct) == 300 and set(found.answers_and_truths.values()) == {(ODD, ODD)}
    assert main(["report", str(folder), f"out={tmp_path / 'report.md'}"]) == 0


def test_the_last_line_of_a_log_is_whole(tmp_path):
    job = TrainingJob("x", (), tmp_path / "seed0")
    job.log_file.write_text("one\nvlbench: sample a\u2028b: is bad\n", encoding="utf-8")
    assert job.last_log_line == "sample a\u2028b: is bad"
