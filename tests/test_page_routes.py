"""What the page of `serve` asks its server: files, votes, heat maps; and its words."""

# ruff: noqa: F811  (fixtures are imported, and named again where they are used)

from __future__ import annotations

import base64
import hashlib
import io
import json
import re
import threading
import time
import tomllib
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from page_server import models, serve_page, votes
from PIL import Image

from vlbench.errors import UserError
from vlbench.serve import page_routes
from vlbench.serve.heat_map import HeatMap
from vlbench.serve.page_files import PAGE_FOLDER, page_files
from vlbench.serve.vote_file import VoteFile

__all__ = ["models", "votes"]

VOTE = {"models": ["beta", "alpha"], "question": "q?", "answers": ["b", "a"], "choice": 1}


@pytest.fixture(scope="module")
def served(models, votes):
    with serve_page(models, votes) as address:
        yield address


def request(address: str, body: Any = None, **headers: str) -> tuple[int, Any, Any]:
    """Return status, headers and content of a response, an object where it is JSON."""
    data = None if body is None else json.dumps(body).encode()
    headers = {"Content-Type": "application/json", **headers}
    try:
        response = urllib.request.urlopen(urllib.request.Request(address, data, headers))
    except urllib.error.HTTPError as error:
        response = error
    with response:
        content = response.read()
        is_json = response.headers["Content-Type"] == "application/json"
        return response.status, response.headers, json.loads(content) if is_json else content


def picture_url() -> tuple[str, str]:
    """Return a picture as a data URL, and the hash of its bytes."""
    file = io.BytesIO()
    Image.new("RGB", (8, 4), (9, 9, 9)).save(file, "PNG")
    data = file.getvalue()
    url = f"data:image/png;base64,{base64.b64encode(data).decode()}"
    return url, hashlib.sha256(data).hexdigest()


def test_the_page_loads_nothing_from_elsewhere(served):
    status, headers, content = request(served)
    assert status == 200 and headers["Content-Type"] == "text/html; charset=utf-8"
    assert headers["Content-Security-Policy"].startswith("default-src 'self'; img-src 'self' data:")
    named = re.findall(r'(?:src|href)="([^"#][^"]*)"', content.decode())
    assert len(named) == 4
    for name in named:
        assert request(served + name)[0] == 200
    assert b"<script>" not in content and b"style=" not in content and b" on" not in content
    assert request(f"{served}page/files/..%2Fpage_files.py")[0] == 404


def test_all_files_of_the_page_are_sent_and_packed():
    package = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())["tool"]
    patterns = package["setuptools"]["package-data"]["vlbench.serve"]
    packed = {path for pattern in patterns for path in PAGE_FOLDER.parent.glob(pattern)}
    assert packed == set(page_files().values())
    for path in PAGE_FOLDER.glob("*.js"):
        for name in re.findall(r'from "\./(\w+\.js)"', path.read_text(encoding="utf-8")):
            assert (PAGE_FOLDER / name).is_file()
        assert "http" not in path.read_text(encoding="utf-8")


def test_both_languages_have_the_same_words():
    texts = [(PAGE_FOLDER / f"texts_{name}.js").read_text("utf-8") for name in ("en", "zh")]
    entry = re.compile(r'^  (\w+):\s+"(.*)",$', re.MULTILINE)
    english, chinese = (dict(entry.findall(text)) for text in texts)
    assert english.keys() == chinese.keys() and len(english) > 60
    for key, text in english.items():
        values = set(re.findall(r"\{\w+\}", text))
        assert values == set(re.findall(r"\{\w+\}", chinese[key])), key
    sources = "".join(
        path.read_text("utf-8") for path in PAGE_FOLDER.glob("*.*") if "texts_" not in path.name
    )
    used = set(re.findall(r'"(\w+)"|`(\w+)', sources))
    used_names = {name for pair in used for name in pair}
    unused = {key for key in english if key not in used_names}
    assert unused <= {"introOneText", "introSeveralText", "theme_auto", "theme_light", "theme_dark"}


def test_what_is_known_of_models(served):
    _, _, config = request(f"{served}page/config")
    assert config["votes"] and list(config["models"]) == ["alpha", "beta"]
    alpha = config["models"]["alpha"]
    assert alpha["blank_colour"] == [127, 127, 127]
    assert all(value > 0 for value in alpha["flops"].values())


def test_votes_are_lines(served, votes):
    url, digest = picture_url()
    with ThreadPoolExecutor(4) as pool:
        questions = [f"question {number}\n\u2028" for number in range(12)]
        sent = [{**VOTE, "images": [url], "question": question} for question in questions]
        statuses = list(pool.map(lambda vote: request(f"{served}page/votes", vote)[0], sent))
    assert statuses == [204] * 12
    lines = votes.read_text("utf-8").split("\n")[:-1]
    written = [json.loads(line) for line in lines]
    assert sorted(vote["question"] for vote in written) == sorted(questions)
    assert len({vote.pop("time") for vote in written}) == 12
    vote = written[0]
    del vote["question"]
    assert vote == {
        "models": ["beta", "alpha"],
        "blind": True,
        "image_sha256": [digest],
        "answers": ["b", "a"],
        "choice": 1,
    }


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"models": ["alpha", "alpah"]}, "no model 'alpah' here. Did you mean 'alpha'"),
        ({"models": ["alpha", "alpha"]}, "named twice"),
        ({"models": ["alpha"]}, "models"),
        ({"answers": ["one"]}, "answers: 1 for 2 models"),
        ({"choice": 2}, "choice: 2; allowed are 0 to 1, tie and bad"),
        ({"choice": "best"}, "choice"),
        ({"choice": True}, "choice is a truth value (true); allowed are an index, tie and bad"),
        ({"choice": None}, "choice is null; allowed"),
        ({"question": ""}, "question"),
        ({"images": ["https://127.0.0.1/cat.png"]}, "a data: URL is written as"),
        ({"images": ["data:image/png;base64,$"]}, "no base64"),
        ({"images": ["data:image/png;base64,\u00e9"]}, "no base64"),
        ({"time": "now"}, "time is no key here"),
        ({"question": "a" * 200_001}, "must be a text of at most 200000 characters"),
    ],
)
def test_wrong_votes_are_refused(served, votes, change, told):
    before = votes.read_bytes()
    status, _, content = request(f"{served}page/votes", {**VOTE, "images": [], **change})
    assert status == 400 and told in content["error"]["message"]
    assert votes.read_bytes() == before


def test_no_votes_without_a_file_and_none_where_it_cannot_be_written(models, tmp_path):
    with serve_page(models) as address:
        status, _, content = request(f"{address}page/votes", {**VOTE, "images": []})
    assert status == 404 and "votes=FILE" in content["error"]["message"]
    with pytest.raises(UserError, match="votes=.*cannot be written"):
        VoteFile(tmp_path / "missing" / "votes.jsonl", ["alpha"])


def heat_map_of(served: str, **change: Any) -> tuple[int, Any]:
    url, _ = picture_url()
    content = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": "what?"}]
    asked = {"model": "alpha", "messages": [{"role": "user", "content": content}], "answer": "it"}
    status, _, answer = request(f"{served}page/heat_map", {**asked, **change})
    return status, answer


def test_a_heat_map_over_the_api(served):
    status, answer = heat_map_of(served)
    assert status == 200 and answer["box"] == [0, -0.5, 1, 1.5]
    assert sum(map(sum, answer["rows"])) == pytest.approx(1)
    for change, told in (
        ({"model": "gamma"}, "no model 'gamma'"),
        ({"image": 1}, "has 1 picture, counted from 0"),
        ({"answer": ""}, "answer"),
        ({"messages": [{"role": "user", "content": "no picture"}]}, "has 0 pictures"),
    ):
        status, answer = heat_map_of(served, **change)
        assert status in (400, 404) and told in answer["error"]["message"]


def test_heat_maps_are_computed_one_at_a_time(served, monkeypatch):
    running, was_alone = threading.Semaphore(1), []

    def compute_alone(*_: Any) -> HeatMap:
        was_alone.append(running.acquire(blocking=False))
        time.sleep(0.01)
        running.release()
        return HeatMap(None, (0, 0, 1, 1))

    monkeypatch.setattr(page_routes, "compute_heat_map", compute_alone)
    with ThreadPoolExecutor(16) as pool:
        answers = list(pool.map(lambda _: heat_map_of(served)[0], range(16)))
    assert set(answers) <= {200, 429} and answers.count(200) >= 9 and all(was_alone)


def test_the_key_guards_all_but_files(models):
    with serve_page(models, api_key="secret") as address:
        assert request(address)[0] == 200
        assert request(f"{address}page/files/main.js")[0] == 200
        for path, body in (("config", None), ("votes", {}), ("heat_map", {})):
            assert request(f"{address}page/{path}", body)[0] == 401
        assert request(f"{address}page/config", Authorization="Bearer secret")[0] == 200
