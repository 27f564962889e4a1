"""`size=6b` as a user walks it: three stages, a kill, resume, chat, MMMU, export, and more.

With Yi-6B's real widths it takes some gigabytes; a narrow model walks the same way. Layers are two
in both. The language model learns by an adapter, as who has little memory lets it.
"""

from __future__ import annotations

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from hub.client import use_hub
from hub.documented_commands import ROOT
from hub.model_repositories import REAL, SMALL, LanguageModelWidths, make_repositories
from hub.server import FakeHub, serve_hub
from hub.shallow_encoders import shallow_environment
from hub.weight_comparison import assert_same_state, load_tensors, matching_files
from hub_command_table import DATA, FIT, STAGES
from test_hub_commands import write_data

from vlbench.model.weights.weight_origin import read_origins

LORA = "stages.chat.train.language.lora.rank=4 stages.chat.train.language.lr=1e-3"
BUDGET = " ".join(
    f"stages.{name}.{key}" for name in STAGES for key in ("steps=3", "global_batch_size=1")
)
SIZES = "stages.align_224.image_size=112 stages.align_448.image_size=224 stages.chat.image_size=224"
QUIET = "data.workers=0 log.every_n_steps=1 log.questions=1 log.examples=0 log.tensorboard=false"
WALK = f"{FIT} {DATA} {BUDGET} {LORA} {SIZES} {QUIET}"
YI, YI_VL = "01-ai/Yi-6B-Chat", "yi_vl"
MEMORY = 14 * 2**20  # kilobytes that a process may take
MISSING = {"vision_tower", "mm_projector"}


@pytest.fixture(params=[SMALL, REAL], ids=["small", "real"])
def hub(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[FakeHub]:
    """The hub, with a language model of these widths; processes find it and shallow encoders."""
    widths: LanguageModelWidths = request.param
    for name, value in shallow_environment().items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("PYTHONPATH", f"{ROOT}{os.pathsep}{os.environ['PYTHONPATH']}")
    monkeypatch.chdir(tmp_path)
    write_data(tmp_path)
    with serve_hub(make_repositories(tmp_path / "made", widths)) as hub:
        use_hub(monkeypatch, hub, tmp_path / "home")
        yield hub
    shutil.rmtree(tmp_path, ignore_errors=True)  # ten gigabytes


def start(command: str) -> subprocess.Popen[str]:
    """Start a command of vlbench as people type it."""
    words = [sys.executable, *command.split()[1:]]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    return subprocess.Popen(words, text=True, start_new_session=True, **pipes)


def do(command: str) -> str:
    """Run a command, and return what it prints."""
    process = start(command)
    told, _ = process.communicate()
    assert process.returncode == 0, told[-3000:]
    return told


def killed_in(stage: str, command: str) -> None:
    """Start a command, and kill it as soon as its run has a checkpoint of `stage`."""
    process = start(command)
    while not list(Path("run/checkpoints").glob(f"*-{stage}-*")):
        assert process.poll() is None, process.communicate()[0][-3000:]
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()


@pytest.mark.slow
@pytest.mark.parametrize("trains_on", [False, True], ids=["once", "twice"])
def test_from_the_hub_to_a_release_of_ones_own(hub: FakeHub, trains_on: bool) -> None:
    killed_in("align_448", f"{WALK} run=run trainer.checkpoint_every=0.0001")
    origins = read_origins(Path("run/versions.json"), "weights")
    assert not Path("run/results.json").exists()
    hub.forget()
    told = do(f"{WALK} run=run")
    assert "align_448" in told and Path("run/results.json").is_file() and not hub.fetched()
    assert read_origins(Path("run/versions.json"), "weights") == origins
    assert origins["language"].source == YI and origins["vision"].source == "laion2b_s32b_b79k"
    do("python -m vlbench chat model=run image=FOLDER/0.png question=What? max_new_tokens=2")
    do("python -m vlbench eval model=run task=mmmu limit=2")
    (scores,) = Path("run/eval").glob("*/mmmu-val-yi/scores.json")
    assert json.loads(scores.read_text())["revision"] == f"hub {hub['MMMU/MMMU'].commit}"
    do("python -m vlbench export model=run out=mine format=yi_vl merge_lora=true")
    stored = load_tensors(matching_files(Path("mine"), "model*.safetensors"))
    theirs = load_tensors(matching_files(hub[YI].folder, "model*.safetensors"))
    kept = ("embed_tokens", "norm", "lm_head")  # what the adapter has not changed
    names = [name for name in theirs if any(one in name for one in kept)]
    assert set(theirs) == {name for name in stored if not any(one in name for one in MISSING)}
    assert_same_state({n: stored[n] for n in names}, {n: theirs[n] for n in names})
    changed = "model.layers.0.self_attn.q_proj.weight"
    assert not stored[changed].float().equal(theirs[changed].float())
    shutil.rmtree("run")  # gigabytes of checkpoints
    if trains_on:
        told = do(
            f"{FIT} init=mine only=chat {DATA} {LORA} {SIZES} {QUIET} stages.chat.steps=1 "
            "stages.chat.global_batch_size=1 run=on"
        )
        assert "init mine" in told and Path("on/results.json").is_file()
    assert resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss < MEMORY
