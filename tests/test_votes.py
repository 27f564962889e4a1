"""Votes on answers side by side: what is counted, intervals, tests, bad lines, the report."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import stats
from test_report_command import run

from vlbench.__main__ import main
from vlbench.compare.report.vote_records import read_votes
from vlbench.compare.report.vote_report import pair_cells
from vlbench.compare.report.vote_statistics import VoteFindings, analyze_votes, vote_share


def vote(choice: int | str, *models: str, picture: object = "a", **more: Any) -> dict[str, Any]:
    """Return a record as a server writes it; without `models` they are llava and qformer."""
    shown = list(models) or ["llava", "qformer"]
    record = {"time": "2026-05-04T10:11:12+00:00", "models": shown, "blind": True}
    record |= {"question": "What?", "image_sha256": [f"{picture}"]}
    return {**record, "answers": ["A cat."] * len(shown), "choice": choice, **more}


def write(file: Path, votes: Sequence[object]) -> Path:
    """Write records as lines, each with a time of its own; a text is written as it is."""
    lines = [
        one if isinstance(one, str) else json.dumps({**one, "time": f"{number}"})  # type: ignore
        for number, one in enumerate(votes)
    ]
    file.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return file


def analyze(folder: Path, votes: Sequence[object]) -> VoteFindings:
    return analyze_votes(read_votes([write(folder / "votes.jsonl", votes)]))


def test_a_pair_is_counted_by_model_and_not_by_place(tmp_path):
    votes = [vote(0, picture=n) for n in range(4)]
    votes += [vote(1, "qformer", "llava", picture=10 + n) for n in range(3)]
    votes += [vote(1, picture=20), vote("tie"), vote("bad"), vote("bad")]
    (pair,) = analyze(tmp_path, votes).pairs
    assert (pair.better, pair.worse) == ("llava", "qformer")
    assert (pair.wins.count, pair.losses, pair.ties, pair.both_bad) == (7, 1, 1, 2)
    assert pair.shown_first == 8 and pair.shown_together == 11
    assert pair.wins.p_value == pytest.approx(stats.binomtest(7, 8).pvalue)
    low, high = pair.wins.interval_low, pair.wins.interval_high
    wilson = stats.binomtest(7, 8).proportion_ci(method="wilson")
    assert low <= wilson.low < 7 / 8 < wilson.high <= high


def test_votes_that_a_third_model_won_are_votes_in_which_both_were_shown(tmp_path):
    votes = [vote(2, "a", "b", "c", picture=n) for n in range(5)] + [vote(0, "a", "b", "c")]
    findings = analyze(tmp_path, votes)
    (pair,) = [one for one in findings.pairs if {one.better, one.worse} == {"a", "b"}]
    assert (pair.wins.votes, pair.shown_first, pair.shown_together) == (1, 6, 6)
    assert pair_cells(pair)[-1] == "6 of 6"


def test_many_votes_on_their_own_pictures_have_wilsons_interval():
    share = vote_share([(number % 4 > 0, number) for number in range(4000)])
    wilson = stats.binomtest(3000, 4000).proportion_ci(method="wilson")
    ends = (share.interval_low, share.interval_high)
    assert ends == pytest.approx((wilson.low, wilson.high), abs=2e-4)


def test_votes_on_one_picture_are_one_unit(tmp_path):
    (pair,) = analyze(tmp_path, [vote(0, picture="a") for _ in range(50)]).pairs
    assert pair.wins.pictures == 1 and pair.wins.p_value == 1 and not pair.is_significant
    assert pair.wins.interval_low < 0.5
    (pair,) = analyze(tmp_path, [vote(0, picture=n) for n in range(50)]).pairs
    assert pair.wins.pictures == 50 and pair.is_significant
    assert pair.wins.p_value == pytest.approx(2 * 0.5**50)


def test_a_vote_with_two_pictures_joins_them_and_one_without_goes_by_its_question(tmp_path):
    votes = [vote(0, picture="a"), vote(0, picture="b"), vote(0, image_sha256=["a", "b"])]
    votes += [vote(0, image_sha256=[], question=text) for text in ("Who?", "Who?", "Why?")]
    (pair,) = analyze(tmp_path, votes).pairs
    assert pair.wins.pictures == 3


def test_the_best_of_three_wins_against_both_and_says_nothing_of_the_others(tmp_path):
    votes = [vote(2, "a", "b", "c", picture=n) for n in range(9)]
    votes += [vote("bad", "a", "b", "c", picture=9)]
    pairs = {(one.better, one.worse): one for one in analyze(tmp_path, votes).pairs}
    assert pairs["c", "a"].wins.count == pairs["c", "b"].wins.count == 9
    assert pairs["a", "b"].wins.votes == 0 and pairs["a", "b"].wins.share is None
    assert {one.both_bad for one in pairs.values()} == {1}
    assert pairs["c", "a"].corrected_p == pytest.approx(3 * 2 * 0.5**9)


def test_votes_that_were_not_blind_are_apart(tmp_path):
    votes = [vote(0, picture=n) for n in range(3)]
    votes += [vote(1, picture=n, blind=False) for n in range(30)]
    found = analyze(tmp_path, votes)
    assert found.blind_count == 3 and found.first_chosen[2].votes == 3
    assert [one.better for one in found.pairs] == ["llava"]
    assert [(one.better, one.wins.count) for one in found.seen_pairs] == [("qformer", 30)]


def test_a_preference_for_the_first_place_is_told(tmp_path, capsys):
    shown = [("llava", "qformer"), ("qformer", "llava")]
    votes = [vote(int(n % 5 == 0), *shown[n % 2], picture=n) for n in range(100)]
    assert main(["report", f"votes={write(tmp_path / 'v.jsonl', votes)}"]) == 0
    said = capsys.readouterr().out
    assert "the first was chosen in 80.0 % of 100 votes (95 % interval 7" in said
    assert "without a preference 50 %): the first place was preferred." in said
    assert "llava won 50.0 % of 100 votes that decided" in said and "may be chance" in said


BAD_LINES = {
    '{"models": ["a", "b"]': "is not JSON",
    "[1]": "is not a JSON object",
    json.dumps(vote(2)): "choice must be from 0 to 1, tie or bad, given 2",
    json.dumps(vote("ties")): "choice must be an index, tie or bad, given 'ties'. Did you mean",
    json.dumps(vote(0, "a", "a")): "models must be two or more different ones",
    json.dumps(vote(True)): "choice must be a whole number, given true",
    json.dumps(vote(0, blind="yes")): "blind must be true or false, given 'yes'",
    json.dumps(vote(0, image_sha256=None)): "image_sha256 must be a list",
    '{"models": ["a", "b"], "choice": 0}': "blind is missing",
}


def test_bad_lines_are_counted_and_named_and_repeated_ones_counted_once(tmp_path, capsys):
    good = json.dumps(vote(0))
    file = write(tmp_path / "v.jsonl", ["", good, *BAD_LINES, good])
    with file.open("ab") as end:
        end.write(b'\xff\n{"models": ["cut')
    found = read_votes([file, file])
    assert len(found.votes) == 1
    for number, (sentence, said) in enumerate(
        zip(found.bad_lines, BAD_LINES.values(), strict=False)
    ):
        assert sentence.startswith(f"{file} line {number + 3}: {said}")
    assert len(found.bad_lines) == len(BAD_LINES) + 2 and found.repeated == len(BAD_LINES) + 5
    assert main(["report", f"votes={file}"]) == 0
    said = capsys.readouterr().out
    assert "**11 lines left out, as no vote can be read from them:**" in said
    assert "and 6 more" in said and "1 repeated line counted once" in said


@pytest.mark.parametrize(
    ("content", "said"),
    [(None, "does not exist"), ("", "has no vote"), ("x\n", "has no vote; ")],
)
def test_files_without_a_vote_are_refused_in_a_line(content, said, tmp_path, capsys):
    file = tmp_path / "v.jsonl"
    if content is not None:
        file.write_text(content)
    assert main(["report", f"votes={file}"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"vlbench: votes={file} ") and said in line


def test_votes_alone_are_a_report_of_three_forms(tmp_path, capsys):
    votes = [vote(0, "<b>a</b>", "b|c", picture=n) for n in range(5)]
    votes += [vote(1, "<b>a</b>", "b|c", blind=False), "x"]
    file = write(tmp_path / "v.jsonl", votes)
    outs = [f"out={tmp_path / f'v.{suffix}'}" for suffix in ("md", "html", "json")]
    assert main(["report", f"votes={file}", *outs]) == 0
    assert capsys.readouterr().out.startswith("# Votes\n\n5 blind votes in ")
    markdown, html = ((tmp_path / f"v.{suffix}").read_text() for suffix in ("md", "html"))
    assert "| \\<b>a\\</b> over b\\|c | 5 | 0 |" in markdown
    assert "&lt;b&gt;a&lt;/b&gt; over b|c" in html and "<b>a" not in html
    for text in (markdown, html):
        assert "Not blind: who voted here saw the names" in text and "1 line left out" in text
    record = json.loads((tmp_path / "v.json").read_text())["votes"]
    assert (record["blind"], record["not_blind"], len(record["bad_lines"])) == (5, 1, 1)
    assert record["pairs"][0]["win_rate"]["share"] == 1.0


def test_votes_are_a_section_of_a_report_on_runs(tmp_path, capsys):
    run(tmp_path / "a", 0.8, 0)
    file = write(tmp_path / "v.jsonl", [vote(0)])
    words = ["report", str(tmp_path / "a"), f"votes={file},{file}"]
    assert main([*words, f"out={tmp_path / 'v.json'}"]) == 0
    said = capsys.readouterr().out
    assert said.startswith("# Comparison") and "\n## Votes\n" in said
    assert json.loads((tmp_path / "v.json").read_text())["votes"]["pairs"][0]["wins"] == 1


@pytest.mark.slow
def test_the_page_on_runs_has_the_votes_where_there_are_any(tmp_path):
    run(tmp_path / "a", 0.8, 0)
    file = write(tmp_path / "v.jsonl", [vote(0)])
    words = ["report", str(tmp_path / "a"), f"out={tmp_path / 'v.html'}"]
    for more, count in ((f"votes={file}",), 1), ((), 0):
        assert main([*words, *more]) == 0
        assert (tmp_path / "v.html").read_text().count('<h2 id="votes">Votes</h2>') == count


def cover(trials: int, pictures: int, votes: int, spread: float) -> tuple[float, float]:
    """Return how often the interval has the true win rate, and how often p <= 0.05 for equals.

    Pictures differ in how likely one model wins, by a beta distribution around 1/2.
    """
    rng = np.random.default_rng(pictures * votes)
    covered = alarms = 0
    for _ in range(trials):
        chances = rng.beta(spread, spread, pictures).repeat(votes)
        won = rng.random(pictures * votes) < chances
        share = vote_share([(bool(one), number // votes) for number, one in enumerate(won)])
        covered += share.interval_low <= 0.5 <= share.interval_high
        alarms += share.p_value <= 0.05
    return covered / trials, alarms / trials


@pytest.mark.slow
@pytest.mark.parametrize(("pictures", "votes"), [(12, 1), (40, 1), (12, 6), (40, 6)])
@pytest.mark.parametrize("spread", [0.5, 5.0])
def test_intervals_cover_and_equal_models_raise_few_alarms(pictures, votes, spread):
    covered, alarms = cover(600, pictures, votes, spread)
    assert covered >= 0.95 - 2 * 0.0089 and alarms <= 0.05 + 2 * 0.0089


def test_the_interval_covers_with_several_votes_on_a_picture():
    covered, alarms = cover(100, 20, 5, 0.5)
    assert covered >= 0.91 and alarms <= 0.09
