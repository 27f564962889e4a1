"""An image size that does not suit is told before anything is made, wherever training begins."""

from __future__ import annotations

from pathlib import Path

import pytest
from golden_release import CHECKPOINT

from vlbench.__main__ import main

FIT = ["fit", "recipe=yivl_llava", "run=run", "only=chat", "stages.chat.steps=0"]
FIT += [
    "stages.chat.global_batch_size=4",
    "log.questions=2",
    "log.tensorboard=false",
    "log.examples=0",
]
LATER = ["fit", "recipe=yivl_llava", "run=run", "from=align_448"]


@pytest.mark.parametrize("init", [[], [f"init={CHECKPOINT}"], ["init=first"]])
def test_a_later_stage_of_a_wrong_size_is_refused_before_there_is_a_run(
    init, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    if init == ["init=first"]:
        assert main([*FIT[:2], "run=first", *FIT[3:]]) == 0
    assert main([*LATER, *init, "stages.chat.image_size=100"]) == 2
    said = capsys.readouterr().err
    assert "stages.chat.image_size: image_size is 100" in said and "multiple of 14" in said
    assert len(said.splitlines()) == 1 and not Path("run").exists()


def test_what_the_connector_refuses_is_known_as_early(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    words = ["connector.name=pixel_shuffle", "stages.chat.image_size=70"]
    assert main([*LATER, *words]) == 2
    said = capsys.readouterr().err
    assert said.startswith("vlbench: stages.chat.image_size: ") and len(said.splitlines()) == 1
    assert not Path("run").exists()


def test_a_block_that_is_not_there_is_no_fault_of_the_image_size(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main([*FIT, "connector.name=deepstack", "connector.blocks=[0,1,7]"]) == 2
    assert capsys.readouterr().err.startswith("vlbench: the connector reads block 7 of the vision")


def test_texts_longer_than_the_language_model_reads_are_refused(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main([*FIT, "language.max_length=5000"]) == 2
    said = capsys.readouterr().err
    assert "4096 positions: say language.max_length=4096" in said and not Path("run").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["connector.name=resampler", "connector.side=60"], "an image takes 3600 tokens"),
        (["connector.name=c_abstractor", "connector.side=5"], "at most 4 is allowed"),
    ],
)
def test_what_does_not_go_together_is_told_before_there_is_a_run(
    words, message, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    assert main(["fit", "recipe=yivl_llava", "run=run", *words]) == 2
    said = capsys.readouterr().err
    assert message in said and len(said.splitlines()) == 1 and not Path("run").exists()
