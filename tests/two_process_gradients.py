"""Two processes that share every connector's model: gradients must be those of one process."""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.queues import Queue
from typing import Any

import torch
from random_vlm import SMALL, make_batch, make_sample, open_gates, small_vlm
from torch import Tensor, distributed
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from vlbench.connector import registry
from vlbench.data.packing import PackedBatch
from vlbench.model.fsdp_wrapping import apply_fsdp
from vlbench.model.loaded_vlm import LoadedVLM

WORLD = 2
SHARES = [  # of the two processes in two micro-batches; text alone on one of them
    [[make_sample(1), make_sample(2, images=2)], [make_sample(3, images=0)]],
    [[make_sample(4)], [make_sample(5, images=0), make_sample(6, words=20)]],
]


def open_gated_vlm(name: str) -> LoadedVLM:
    """Return the small model of connector `name` with open gates, the same in every process."""
    return open_gates(small_vlm(registry.load_connector(name), SMALL.get(name))).to(torch.float64)


def process_batches(vlm: LoadedVLM, rank: int) -> list[PackedBatch]:
    """Return the micro-batches of a process."""
    return [make_batch(vlm, [row]).to("cpu", torch.float64) for row in SHARES[rank]]


def compute_gradients(call: object, vlm: LoadedVLM, ranks: list[int]) -> dict[str, Tensor]:
    """Return the gradients of the loss over the samples of `ranks`, as one process sees them."""
    everyone = [batch for rank in range(WORLD) for batch in process_batches(vlm, rank)]
    tokens = sum(batch.supervised_token_count for batch in everyone)
    sizes: dict[str, int] = {}
    for batch in everyone:
        for name, count in vlm.connector.loss_counts(batch).items():
            sizes[name] = sizes.get(name, 0) + count
    for rank in ranks:
        for batch in process_batches(vlm, rank):
            torch.manual_seed(5)  # of the step; what is random follows from it and the sample
            out = call(batch)  # type: ignore[operator]
            loss = out.loss_sum / tokens
            for name, (value, _) in out.extra.items():
                loss = loss + value / sizes[name]
            (loss * WORLD / len(ranks)).backward()
    return {
        name: grad.full_tensor() if isinstance(grad, DTensor) else grad
        for name, grad in (
            (name, parameter.grad) for name, parameter in vlm.model.named_parameters()
        )
        if grad is not None
    }


def compare_gradients(name: str, kind: str, rank: int) -> list[str]:
    """Return what differs between one process and two, under DDP or FSDP2."""
    torch.manual_seed(0)
    alone = open_gated_vlm(name)
    _train_used_blocks(alone)
    expected = compute_gradients(alone.model, alone, list(range(WORLD)))
    together = open_gated_vlm(name)
    _train_used_blocks(together)
    found = compute_gradients(wrap_distributed(together, kind), together, [rank])
    lines = [f"{kind} {name}: no gradient for {one}" for one in expected if one not in found]
    for one, gradient in expected.items():
        scale = max(float(gradient.abs().max()), 1e-9)
        if one in found and float((found[one] - gradient).abs().max()) > 1e-8 * scale + 1e-12:
            lines.append(f"{kind} {name}: another gradient for {one}")
    return lines


def wrap_distributed(vlm: LoadedVLM, kind: str) -> Callable[[PackedBatch], Any]:
    """Return what trains a model in two processes."""
    if kind == "ddp":
        return DistributedDataParallel(vlm.model)
    return apply_fsdp(vlm.model, distributed.device_mesh.init_device_mesh("cpu", (WORLD,)))


def compare_first_stage(rank: int, kind: str) -> list[str]:
    """Return what differs when BLIP-2's pairs lie on one process or on two, unevenly."""
    shares = [[make_sample(1), make_sample(2)], [make_sample(3), make_sample(4), make_sample(5)]]

    def first_stage_gradients(ranks: list[int], parallel: bool) -> dict[str, Tensor]:
        vlm = small_vlm(registry.load_connector("qformer"), SMALL["qformer"])
        vlm.vision.requires_grad_(False)
        vlm.language.requires_grad_(False)
        torch.manual_seed(5)
        vlm.to(torch.float64).model.set_objective("blip2")
        call = wrap_distributed(vlm, kind) if parallel else vlm.model
        samples = [one for number in ranks for one in shares[number]]
        batch = make_batch(vlm, [samples]).to("cpu", torch.float64)
        torch.manual_seed(5)  # images of noise have set another one
        out = call(batch)
        loss = sum(value for value, _ in out.extra.values())
        (loss * (WORLD if parallel else 1)).backward()
        grads = {name: p.grad for name, p in vlm.connector.named_parameters()}
        return {n: g.full_tensor() if isinstance(g, DTensor) else g for n, g in grads.items()}

    together = first_stage_gradients([rank], True)
    alone = call_undistributed(lambda: first_stage_gradients([0, 1], False))
    lines = []
    for name, gradient in alone.items():
        scale = max(float(gradient.abs().max()), 1e-9)
        if float((together[name] - gradient).abs().max()) > 1e-8 * scale + 1e-12:
            lines.append(f"{kind} blip2: another gradient for {name}")
    return lines


def call_undistributed(call: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
    """Call something that must believe that there is no other process."""
    before = distributed.is_initialized
    distributed.is_initialized = lambda: False
    try:
        return call()
    finally:
        distributed.is_initialized = before


def _train_used_blocks(vlm: LoadedVLM) -> None:
    vlm.vision.requires_grad_(False)
    for parameter in vlm.vision.used_parameters():
        parameter.requires_grad_(True)


def compare_connectors(rank: int, port: int, names: list[str], answers: Queue) -> None:
    """Compare every connector as process `rank` of two; put the differences into `answers`."""
    torch.set_num_threads(1)
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    waits = timedelta(seconds=60)
    distributed.init_process_group("gloo", rank=rank, world_size=WORLD, timeout=waits)
    lines = []
    for name in names:
        for kind in ("ddp", "fsdp2"):
            try:
                lines += compare_gradients(name, kind, rank)
            except Exception:
                lines.append(f"{kind} {name}: {traceback.format_exc()}")
                print(lines[-1], file=sys.stderr)
                break
    if "qformer" in names:
        lines += compare_first_stage(rank, "ddp") + compare_first_stage(rank, "fsdp2")
    answers.put(lines)
    distributed.destroy_process_group()
