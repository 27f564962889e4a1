"""Tests run beside other work: threads that wait must not spin (see `vlbench.core_sharing`)."""

import os
import signal
import tempfile
from pathlib import Path

import pytest

os.environ.setdefault("GOMP_SPINCOUNT", "20000")
# the hashes of the user's own connectors are not to be written into the real home
os.environ["XDG_STATE_HOME"] = tempfile.mkdtemp(prefix="vlbench-state-")
if "PYTEST_XDIST_WORKER" in os.environ:  # one thread for each of several test processes
    os.environ.setdefault("OMP_NUM_THREADS", "1")
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:  # a shell's background job ignores Ctrl-C
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_addoption(parser: pytest.Parser) -> None:
    """Let the contract suite run on one connector alone."""
    parser.addoption("--connector", help="name of the connector that test_contract.py runs on")


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The checkpoint of a run that was not trained."""
    from vlbench.__main__ import main
    from vlbench.train import checkpoint_files

    run = tmp_path_factory.mktemp("untrained") / "run"
    words = [f"stages.{name}.steps=0" for name in ("align_224", "align_448", "chat")]
    words += ["log.questions=1", "log.examples=0", "log.tensorboard=false", f"run={run}"]
    assert main(["fit", "recipe=yivl_llava", *words]) == 0
    return checkpoint_files.find_checkpoint(run)


@pytest.fixture(scope="session")
def whole_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run, the quick one of `accidental_runs`."""
    from accidental_runs import FIT
    from forked_command import run_command

    folder = tmp_path_factory.mktemp("accidents")
    outcome = run_command([*FIT, "run=whole"], folder, timeout=60)
    assert outcome.code == 0, outcome.words
    return folder / "whole"
