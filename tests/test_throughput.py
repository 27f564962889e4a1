"""What the log says of the speed: rates, waiting for data, MFU where the device is known."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from vlbench.train import throughput
from vlbench.train.gpu_names import peak_flops
from vlbench.train.step_report import StepReport
from vlbench.train.throughput import ThroughputMeter, format_throughput

GIB = 2**30
CARDS = {  # what drivers call them, GiB that they show, TFLOP/s
    "NVIDIA H200": (139.8, 989),
    "NVIDIA H200 NVL": (139.8, 835),
    "NVIDIA H100 80GB HBM3": (79.1, 989),
    "NVIDIA H100 PCIe": (79.1, 756),
    "NVIDIA H100 NVL": (93.1, 835),
    "NVIDIA H100 80GB HBM3 MIG 3g.40gb": (39.5, None),
    "NVIDIA H100-2-20C": (20, None),  # of a hypervisor
    "NVIDIA H100": (19.6, None),  # of another one
    "NVIDIA H800": (79.1, 989),
    "NVIDIA H20": (95.1, 148),
    "NVIDIA GH200 480GB": (94.5, 989),
    "NVIDIA B200": (178.4, 2250),
    "NVIDIA A100-SXM4-80GB": (79.2, 312),
    "NVIDIA A100-SXM4-40GB": (39.4, 312),
    "NVIDIA A100 80GB PCIe": (79.2, 312),
    "NVIDIA A100-PCIE-40GB": (39.4, 312),
    "NVIDIA A100 80GB PCIe MIG 3g.40gb": (39.5, None),
    "NVIDIA A800-SXM4-80GB": (79.2, 312),
    "NVIDIA A800": (79.2, 312),
    "NVIDIA A800 80GB PCIe": (79.2, 312),
    "NVIDIA A40": (44.4, 150),
    "NVIDIA A10": (22, 125),
    "NVIDIA A10G": (22, None),
    "NVIDIA A4000": (15.7, None),
    "NVIDIA RTX A4000": (15.7, None),
    "NVIDIA RTX A6000": (47.4, 155),
    "NVIDIA RTX 6000 Ada Generation": (47.4, 364),
    "Quadro RTX 6000": (23.6, None),
    "NVIDIA L40S": (44.4, 362),
    "NVIDIA L40": (44.4, 181),
    "NVIDIA L4": (22, 121),
    "Tesla T4": (14.6, 65),
    "Tesla V100-SXM2-16GB": (15.8, 125),
    "Tesla V100-PCIE-32GB": (31.7, 112),
    "NVIDIA GeForce RTX 4090": (23.5, 165),
    "NVIDIA GeForce RTX 4090 Laptop GPU": (15.6, None),
    "NVIDIA GeForce RTX 3090 Ti": (23.5, None),
    "AMD Instinct MI300X": (191.5, 1307),
    "Voodoo 2": (0.01, None),
}


def show_card(name: str, gib: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let torch see a GPU of this name and memory."""
    properties = SimpleNamespace(name=name, total_memory=int(gib * GIB))
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: properties)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: name)


@pytest.mark.parametrize("name", CARDS)
def test_the_peak_of_a_gpu_is_known_by_its_name(name, monkeypatch):
    gib, tflops = CARDS[name]
    show_card(name, gib, monkeypatch)
    known = peak_flops(torch.device("cuda", 0))
    assert known == (None if tflops is None else tflops * 1e12)


def test_a_gpu_without_a_known_peak_is_named(clock, monkeypatch, capsys):
    show_card("NVIDIA RTX A4000", 15.7, monkeypatch)
    seen = training(flops=SimpleNamespace(count_flops=lambda batches: 1.0))
    seen.device = torch.device("cuda", 0)
    ThroughputMeter().start_measuring(seen)
    assert "MFU is not known" in (said := capsys.readouterr().out) and "RTX A4000" in said
    show_card("NVIDIA A40", 44.4, monkeypatch)
    ThroughputMeter().start_measuring(seen)
    assert not capsys.readouterr().out


def test_training_on_the_cpu_beside_a_gpu_has_the_memory_of_the_process(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert throughput.peak_memory() > 1e8  # torch alone takes more


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
