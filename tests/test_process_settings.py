"""A program that uses vlbench finds the settings of its process as they were."""

from __future__ import annotations

import json
import logging
import os
import signal
import subprocess
import sys
import threading
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from golden_release import CHECKPOINT
from host_program import changed_settings, process_settings
from PIL import Image

from vlbench.__main__ import main
from vlbench.data.image_processing import open_image
from vlbench.process_settings import (
    ALLOCATOR_VARIABLES,
    avoid_cudnn_attention,
    preserve_process_settings,
)
from vlbench.verbs import VERBS

HOST = Path(__file__).parent / "host_program.py"
STEPS = ("load", "chat", "generate", "main", "export", "fit")
STEPS += ("fit in a thread", "fit with workers")


def run(folder: Path, *words: str) -> dict[str, list[str]]:
    """Return what each step of a program changed; see host_program.py."""
    environment = {k: v for k, v in os.environ.items() if k != "PYTORCH_NVML_BASED_CUDA_CHECK"}
    done = subprocess.run(
        [sys.executable, str(HOST), str(CHECKPOINT), str(folder), *words],
        capture_output=True,
        text=True,
        env=environment,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_a_program_that_has_imported_the_libraries_finds_all_as_it_was(tmp_path):
    assert run(tmp_path, "heavy") == {"import": [], **{step: [] for step in STEPS}}


def test_a_program_that_has_imported_nothing_finds_all_as_it_was(tmp_path):
    assert run(tmp_path, "light") == {"import": [], "load": [], "chat": [], "generate": []}


@pytest.mark.slow
def test_training_from_a_program_that_has_imported_nothing_leaves_all_as_it_was(tmp_path):
    assert run(tmp_path, "cold") == {"import": [], "fit": []}


def test_what_is_changed_inside_is_put_back_when_the_last_thread_leaves():
    before = process_settings()
    inside, leave = threading.Event(), threading.Event()

    def other() -> None:
        with preserve_process_settings():
            inside.set()
            leave.wait(60)

    with preserve_process_settings():
        change()
        assert {"root level", "environment", "warnings", "torch random"} <= set(
            changed_settings(before)
        )
        thread = threading.Thread(target=other)
        thread.start()
        inside.wait(60)
    leave.set()
    thread.join()
    assert not changed_settings(before)


def test_cudnn_attention_is_avoided_on_a_gpu_alone_and_until_the_last_thread_leaves():
    enabled = torch.backends.cuda.cudnn_sdp_enabled
    before = enabled()
    with avoid_cudnn_attention("cpu"):
        assert enabled() == before
    with ThreadPoolExecutor(1) as other:
        inside, leave = threading.Event(), threading.Event()

        def answer() -> None:
            with avoid_cudnn_attention("cuda"):
                inside.set()
                leave.wait(60)

        running = other.submit(answer)
        inside.wait(60)
        with avoid_cudnn_attention("cuda"):
            assert not enabled()
        assert not enabled()
        leave.set()
        running.result()
    assert enabled() == before


@pytest.mark.parametrize("name", [None, *ALLOCATOR_VARIABLES])
def test_a_verb_lets_blocks_of_gpu_memory_grow_unless_the_user_has_said_how(name, monkeypatch):
    for one in ALLOCATOR_VARIABLES:
        monkeypatch.delenv(one, raising=False)
    if name:
        monkeypatch.setenv(name, "max_split_size_mb:64")
    given = {one: os.environ[one] for one in ALLOCATOR_VARIABLES if one in os.environ}
    seen = {}

    def run_verb(words: list[str]) -> int:
        seen.update({one: os.environ[one] for one in ALLOCATOR_VARIABLES if one in os.environ})
        return 0

    monkeypatch.setitem(VERBS, "list", VERBS["list"]._replace(run_verb=run_verb))
    assert main(["list"]) == 0
    assert seen == (given or {"PYTORCH_ALLOC_CONF": "expandable_segments:True"})
    assert {one: os.environ.get(one) for one in given} == given
    assert name or not any(one in os.environ for one in ALLOCATOR_VARIABLES)


def change() -> None:
    logging.getLogger().setLevel(logging.ERROR)
    logging.getLogger().addHandler(logging.NullHandler())
    os.environ["VLBENCH_TEST"] = "1"
    del os.environ["HOME"]
    warnings.simplefilter("ignore")
    torch.manual_seed(3)
    torch.rand(3)
    signal.signal(signal.SIGTERM, lambda *_: None)


def test_images_that_threads_open_leave_warnings_as_they_are(tmp_path):
    """PIL's own are silent even where a program makes errors of them; the program's are heard."""
    palette = Image.new("P", (3, 3))
    palette.save(tmp_path / "a.png", transparency=bytes(3))

    def work() -> None:
        for _ in range(100):
            open_image(tmp_path / "a.png")
            warnings.warn("of the program", UserWarning, stacklevel=1)

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", UserWarning)
        filters, before = warnings.filters, list(warnings.filters)
        with ThreadPoolExecutor(4) as pool:
            done = [pool.submit(work) for _ in range(4)]
        assert [one.result() for one in done] == [None] * 4
        assert warnings.filters is filters and list(filters) == before
        heard = [str(one.message) for one in caught]
    assert heard == ["of the program"] * 400
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert open_image(tmp_path / "a.png").mode == "RGB"


@pytest.fixture(autouse=True)
def as_it_was(monkeypatch):
    monkeypatch.setenv("HOME", os.environ.get("HOME", "/"))
