"""The runner of hostile commands: what a forked child says and takes, and how it is stopped."""

from __future__ import annotations

import os
import signal
import time
import warnings
from pathlib import Path

import torch
from forked_command import run_command, run_forked


def test_a_mistake_is_one_line_in_milliseconds(tmp_path: Path) -> None:
    outcome = run_command(["fitt"], tmp_path, stdin="yes\n")
    assert "no verb 'fitt'" in outcome.assert_one_line()
    assert outcome.stdin_bytes == 0 and outcome.seconds < 10


def test_training_in_a_fork_after_this_process_used_threads(tmp_path: Path) -> None:
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    grown = torch.ones(512, 512, requires_grad=True)
    (grown @ grown).sum().backward()  # OpenMP's pool and autograd are in use here
    torch.set_num_threads(threads)
    steps = [f"stages.{name}.steps=1" for name in ("align_224", "align_448", "chat")]
    words = ["fit", "recipe=yivl_llava", *steps, "run=run", "log.questions=2", "log.examples=0"]
    outcome = run_command(words, tmp_path, timeout=120)
    assert outcome.code == 0, outcome.words
    assert (tmp_path / "run/results.json").is_file() and "align_224" in outcome.stdout


def test_what_a_child_takes_is_measured_and_its_hang_or_greed_ended(tmp_path: Path) -> None:
    def take(count: int) -> int:
        held = bytearray(count)
        held[:: os.sysconf("SC_PAGE_SIZE")] = b"x" * len(held[:: os.sysconf("SC_PAGE_SIZE")])
        return len(held) % 7

    assert 300_000_000 < run_forked(lambda: take(300_000_000), tmp_path).peak_bytes < 400_000_000
    assert run_forked(lambda: time.sleep(60), tmp_path, timeout=0.2).killed == "time"
    ended = run_forked(lambda: os.kill(os.getpid(), signal.SIGTERM), tmp_path)
    assert ended.code == -signal.SIGTERM and not ended.killed


def test_streams_and_warnings_are_the_childs_own(tmp_path: Path) -> None:
    def speak() -> int:
        print(input(), os.getcwd())
        warnings.warn("careful", UserWarning, stacklevel=1)
        raise ValueError("a fault")

    outcome = run_forked(speak, tmp_path, stdin="a line\nanother\n")
    assert outcome.code == 1 and outcome.stdout == f"a line {tmp_path}\n"
    assert "UserWarning: careful" in outcome.stderr and "ValueError: a fault" in outcome.stderr
    assert outcome.stdin_bytes > 0
