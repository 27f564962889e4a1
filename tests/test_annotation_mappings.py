"""Annotation files in their published layouts become the tokens of the LLaVA JSON of the same."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from annotation_layouts import LAYOUTS, write_layout

from vlbench.data.chat_template import YI_VL
from vlbench.data.conversation_files import ConversationFiles
from vlbench.data.mapped_sources import mapping_files
from vlbench.data.sample_encoding import SampleEncoder
from vlbench.data.tokenizer import Tokenizer

TINY = Path(__file__).parent / "goldens/yi_vl/tiny_a/checkpoint"


@pytest.fixture(scope="module")
def encoder() -> SampleEncoder:
    return SampleEncoder(Tokenizer.load(TINY), YI_VL, 4, 2048)


def test_every_shipped_mapping_has_a_layout() -> None:
    assert set(mapping_files()) == set(LAYOUTS)


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_layout_has_the_tokens_of_llava(name: str, tmp_path: Path, encoder: Any) -> None:
    expected = write_layout(name, tmp_path)
    (tmp_path / "llava.json").write_text(json.dumps(expected))
    ours, theirs = (
        ConversationFiles(f"{name}:{tmp_path}"),
        ConversationFiles(tmp_path / "llava.json"),
    )
    assert len(ours) == len(theirs) == len(expected)
    assert ours.find_bad_samples() == []
    for index in range(len(ours)):
        mine, reference = encoder.encode(ours[index]), encoder.encode(theirs[index])
        assert mine.sample.turns == reference.sample.turns and mine.sample.id == reference.sample.id
        assert mine.input_ids == reference.input_ids and mine.labels == reference.labels
        assert mine.sample.images == reference.sample.images
        assert not mine.sample.is_untagged and not mine.sample.unread_keys
