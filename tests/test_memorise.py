"""Real photographs: a longer training remembers every answer, and by the image."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from vlbench.__main__ import main

STAGES = ("align_224", "align_448", "chat")
PHOTOS = Path(__file__).parent / "goldens" / "photos"


@pytest.mark.slow
def test_photographs_are_memorised_word_for_word(tmp_path: Path) -> None:
    run = tmp_path / "photos"
    data = [f"data.train={PHOTOS / 'photos.json'}", f"data.images={PHOTOS}"]
    steps = [f"stages.{name}.steps={n}" for name, n in zip(STAGES, (60, 60, 600), strict=True)]
    assert main(["fit", "recipe=yivl_llava", *data, *steps, f"run={run}"]) == 0
    results = json.loads((run / "results.json").read_text())
    assert results["accuracy"] == 1.0
    answers = [json.loads(line) for line in (run / "answers.jsonl").read_text().splitlines()]
    exchanged = [a for a in answers if a["set"] == "shuffled" and a["id"].startswith("same-")]
    assert len(exchanged) == 15
    assert sum(not a["correct"] for a in exchanged) >= 0.8 * len(exchanged)
