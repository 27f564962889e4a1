"""Tests run beside other work: threads that wait must not spin (see `vlbench.__main__.fit`)."""

import os

import pytest

os.environ.setdefault("GOMP_SPINCOUNT", "20000")
if "PYTEST_XDIST_WORKER" in os.environ:  # one thread for each of several test processes
    os.environ.setdefault("OMP_NUM_THREADS", "1")


def pytest_addoption(parser: pytest.Parser) -> None:
    """Let the contract suite run on one connector alone."""
    parser.addoption("--connector", help="name of the connector that test_contract.py runs on")
