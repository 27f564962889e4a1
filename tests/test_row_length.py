"""`max_tokens_per_row=auto`: what a card has memory for, the same for a run's whole life."""

from __future__ import annotations

import json

import pytest
from random_vlm import small_vlm

from vlbench.__main__ import main
from vlbench.config.schema import TrainerConfig
from vlbench.connector import registry
from vlbench.distributed import collectives
from vlbench.planner import training_plan
from vlbench.planner.options import parse_plan_options
from vlbench.train import stage_runner
from vlbench.train.row_length import choose_row_tokens, longest_fitting_row, model_bytes
from vlbench.train.run_folder import RunFolder
from vlbench.train.stage_runner import StageRunner

YI_6B = {"none": 8.1e6, "selective": 3.1e6, "full": 0.66e6}
"""Bytes of a token: 32 blocks of 4096 channels."""


@pytest.mark.parametrize(
    ("mode", "spare_bytes", "row_tokens"),
    [
        ("auto", 60e9, 16384),
        ("auto", 30e9, 8192),
        ("auto", 14e9, 4096),  # not 16384 with full recomputation, which costs a third more
        ("auto", 12e9, 16384),  # where it is needed anyway
        ("auto", 1e9, 4096),
        ("none", 60e9, 4096),
        ("none", 70e9, 8192),
        ("full", 12e9, 16384),
        ("full", -1e9, 4096),
    ],
)
def test_rows_grow_with_memory_and_not_at_the_price_of_recomputation(mode, spare_bytes, row_tokens):
    assert longest_fitting_row(spare_bytes, YI_6B, mode) == row_tokens


def test_rows_follow_from_the_model_and_the_card():
    vlm = small_vlm(registry.load_connector("linear")).model
    assert choose_row_tokens(vlm, None, "auto", bf16=True) == 4096
    assert choose_row_tokens(vlm, 80e9, "none", bf16=True) == 16384
    assert choose_row_tokens(vlm, model_bytes(vlm, True) + 1e5, "full", bf16=True) == 4096
    trained = model_bytes(vlm, True)
    assert trained == 18 * sum(parameter.numel() for parameter in vlm.parameters())
    vlm.requires_grad_(False)
    assert model_bytes(vlm, True) == trained / 9


def test_a_run_keeps_the_rows_that_it_began_with(tmp_path):
    run = RunFolder(tmp_path)
    run.versions_file.write_text('{"python": "3.12"}')
    assert run.keep_row_tokens("chat", 8192) == 8192
    assert run.keep_row_tokens("align", 16384) == 16384
    assert run.keep_row_tokens("chat", 4096) == 8192  # it goes on, on a smaller card
    recorded = json.loads(run.versions_file.read_text())
    assert recorded == {"python": "3.12", "max_tokens_per_row": {"chat": 8192, "align": 16384}}


def test_the_choice_is_shown_recorded_and_taken(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(stage_runner, "gpu_memory_limit", lambda _: 80e9)
    run = tmp_path / "run"
    words = ["recipe=yivl_llava", "only=chat", "stages.chat.steps=1", "data.workers=0"]
    words += ["stages.chat.max_tokens_per_row=auto", f"run={run}", "log.questions=1"]
    assert main(["fit", *words, "log.examples=0", "log.tensorboard=false"]) == 0
    assert "max_tokens_per_row=auto: 16384" in capsys.readouterr().out
    assert json.loads((run / "versions.json").read_text())["max_tokens_per_row"] == {"chat": 16384}
    assert "max_tokens_per_row: auto" in (run / "recipe.yaml").read_text()


def test_a_model_that_is_sharded_within_a_machine_is_divided_by_its_gpus_alone(monkeypatch):
    counts = []

    def note(*_: object, shards: int, **__: object) -> int:
        counts.append(shards)
        return 4096

    monkeypatch.setattr(stage_runner, "choose_row_tokens", note)
    monkeypatch.setattr(training_plan, "choose_row_tokens", note)
    monkeypatch.setattr(collectives, "world_size", lambda: 128)
    monkeypatch.setattr(StageRunner, "is_sharded", True)
    settings = {"devices": 8, "num_nodes": 16, "strategy": "fsdp2", "accelerator": "cpu"}
    vlm = small_vlm(registry.load_connector("linear")).model
    for is_within in (False, True):
        trainer = TrainerConfig(**settings, shard_within_node=is_within)
        runner = StageRunner(
            trainer_config=trainer, precision="bf16", activation_checkpointing="full", seed=0
        )
        assert runner.choose_row_tokens(vlm) == 4096
        words = [f"trainer.{name}={value}" for name, value in settings.items()]
        words += ["recipe=yivl_llava", "size=34b", "stages.chat.max_tokens_per_row=auto"]
        words += [f"trainer.shard_within_node={str(is_within).lower()}"]
        assert training_plan.stage_row_tokens(parse_plan_options(words), "chat", vlm, 1e11) == 4096
    assert counts == [128, 128, 8, 8]
