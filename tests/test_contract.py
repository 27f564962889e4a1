"""The contract: what must hold for every connector that is found, the user's own included.

    python -m pytest tests/test_contract.py                    # all that `list connectors` shows
    python -m pytest tests/test_contract.py --connector mine   # one of them

The checks are those of `python -m vlbench test-connector`; two processes are tried here alone.
"""

from __future__ import annotations

import multiprocessing
import socket

import pytest
import two_process_gradients

from vlbench.connector import registry
from vlbench.contract_checks.contract_table import CONTRACT, ContractCheck
from vlbench.contract_checks.run_contract import build_vlm_to_check, small_options


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "connector_name" in metafunc.fixturenames:
        asked = metafunc.config.getoption("--connector")
        metafunc.parametrize(
            "connector_name", [asked] if asked else list(registry.connector_locations())
        )


@pytest.mark.parametrize("check", CONTRACT, ids=[check.name for check in CONTRACT])
def test_a_connector_keeps_the_contract(check: ContractCheck, connector_name: str) -> None:
    connector = registry.load_connector(connector_name)
    options = small_options(connector_name)
    check.run_check(build_vlm_to_check(connector_name, connector, options))


def test_two_processes_learn_what_one_does(request):
    """Under DDP and FSDP2, on CPUs; all connectors share the two processes."""
    asked = request.config.getoption("--connector")
    names = [asked] if asked else list(registry.connector_locations())
    context = multiprocessing.get_context("spawn")
    answers = context.Queue()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    workers = [
        context.Process(
            target=two_process_gradients.compare_connectors, args=(rank, port, names, answers)
        )
        for rank in range(two_process_gradients.WORLD)
    ]
    for worker in workers:
        worker.start()
    found = [answers.get(timeout=200) for _ in workers]
    for worker in workers:
        worker.join()
    assert found == [[], []]
