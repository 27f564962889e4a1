"""What the log says of the speed: rates, waiting for data, MFU where the device is known."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from vlbench.train import throughput
from vlbench.train.throughput import ThroughputMeter, format_throughput, peak_flops
from vlbench.train.training_module import StepReport


@pytest.mark.parametrize(
    ("name", "tflops"),
    [
        ("NVIDIA H200", 989),
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA L40S", 362),
        ("NVIDIA L4", 121),
        ("NVIDIA GeForce RTX 4090", 165),
        ("Voodoo 2", None),
    ],
)
def test_the_peak_of_a_gpu_is_known_by_its_name(name, tflops, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: name)
    known = peak_flops(torch.device("cuda", 0))
    assert known == (None if tflops is None else tflops * 1e12)


def test_nobody_knows_the_peak_of_a_processor():
    assert peak_flops(torch.device("cpu")) is None


@pytest.fixture
def clock(monkeypatch):
    """A clock that is set by hand."""
    now = SimpleNamespace(time=100.0)
    monkeypatch.setattr(throughput.time, "monotonic", lambda: now.time)
    return now


def training(waited: float = 0.0, flops: Any = None) -> SimpleNamespace:
    """What `ThroughputMeter` sees of a training."""
    report = StepReport(1, tokens=500, images=4)
    device = torch.device("cpu")
    return SimpleNamespace(report=report, data_wait_seconds=waited, device=device, flops=flops)


def test_rates_and_waiting_are_of_the_time_since_the_last_line(clock):
    measured = ThroughputMeter()
    measured.start_measuring(training())
    for _ in range(2):
        clock.time += 5
        measured.count_step(training(waited=1.0), SimpleNamespace(micro_batches=[]))
    row = measured.read_and_reset()
    assert (row["tokens_per_second"], row["images_per_second"]) == (100.0, 0.8)
    assert (row["step_seconds"], row["data_wait"], row["seconds"]) == (5.0, 0.2, 10.0)
    assert (
        row["mfu"] == ""
        and "data wait 20%" in format_throughput(row)
        and "MFU" not in format_throughput(row)
    )
    clock.time += 10
    measured.count_step(training(), SimpleNamespace(micro_batches=[]))
    again = measured.read_and_reset()
    assert (again["tokens_per_second"], again["data_wait"], again["seconds"]) == (50.0, 0.0, 20.0)


def test_mfu_is_what_was_needed_over_what_the_device_can_do(clock, monkeypatch):
    monkeypatch.setattr(throughput, "peak_flops", lambda _: 1000.0)
    measured = ThroughputMeter()
    measured.start_measuring(training(flops=SimpleNamespace(count_flops=lambda batches: 2500.0)))
    clock.time += 5
    measured.count_step(training(), SimpleNamespace(micro_batches=[]))
    row = measured.read_and_reset()
    assert row["mfu"] == 0.5 and "MFU 50%" in format_throughput(row)


def test_a_stage_whose_operations_are_not_known_has_no_mfu(clock, monkeypatch):
    monkeypatch.setattr(throughput, "peak_flops", lambda _: 1000.0)
    measured = ThroughputMeter()
    measured.start_measuring(training())
    clock.time += 1
    measured.count_step(training(), SimpleNamespace(micro_batches=[]))
    assert measured.read_and_reset()["mfu"] == ""
