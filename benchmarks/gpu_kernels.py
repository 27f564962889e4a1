"""What the kernels under a training step reach: matrix products, copies, attention."""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from gpu_rows import DEVICE, ON_GPU, RunLog, median_seconds
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from vlbench.model.packed_attention import packed_attention, sample_bounds

HEADS, KEY_HEADS, HEAD_WIDTH = 32, 4, 128  # of Yi-6B
SAMPLE_LENGTHS = [1274, 1274, 1274] if ON_GPU else [40, 24]
TOWER_SHAPE = (4, 16, 1025, 80) if ON_GPU else (1, 2, 17, 8)  # ViT-H at 448 pixels
BACKWARD_PRODUCTS = 2.5  # those of flash attention's backward, per one of its forward
TOWER_KERNELS = {
    "default": None,
    "flash": SDPBackend.FLASH_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
}


def measure_kernels(log: RunLog) -> None:
    """Measure the ceilings, forward and backward."""
    measure_products(log)
    measure_decoder_attention(log)
    for name in TOWER_KERNELS if ON_GPU else ["default"]:
        measure_tower_attention(log, name)


def measure_products(log: RunLog) -> None:
    """Measure a large square product, one of the decoder's MLP, and a copy."""
    shapes = {"square": (8192, 8192, 8192), "MLP of Yi-6B": (4096, 4096, 11008)}
    for name, shape in shapes.items():
        rows, inner, columns = shape if ON_GPU else (side // 64 for side in shape)
        left, right = _random_bf16(rows, inner), _random_bf16(columns, inner).t()
        seconds = median_seconds(lambda a=left, b=right: a @ b)
        log.write_row(f"product, {name}", tflops=_tera(2 * rows * inner * columns / seconds))
    source = torch.randint(255, (1 << (31 if ON_GPU else 20),), dtype=torch.uint8, device=DEVICE)
    target = torch.empty_like(source)
    seconds = median_seconds(lambda: target.copy_(source))
    log.write_row("copy", terabytes_per_second=_tera(2 * source.numel() / seconds, 2))


def measure_decoder_attention(log: RunLog) -> None:
    """Measure attention over a packed row, and its distance from samples one by one."""
    length = sum(SAMPLE_LENGTHS)
    query = _random_bf16(1, HEADS, length, HEAD_WIDTH).requires_grad_()
    key, value = (_random_bf16(1, KEY_HEADS, length, HEAD_WIDTH).requires_grad_() for _ in "kv")
    bounds = sample_bounds([SAMPLE_LENGTHS], length, DEVICE)
    module: Any = None

    def attend(**rows: Any) -> Tensor:
        return packed_attention(module, query, key, value, None, **rows)[0]

    rows: dict[str, Any] = {"bounds": bounds} if bounds else {"lengths": [SAMPLE_LENGTHS]}
    work = sum(4 * HEADS * HEAD_WIDTH * n * (n + 1) / 2 for n in SAMPLE_LENGTHS)
    figures = _attention_rates(lambda: attend(**rows), (query, key, value), work)
    each = attend(lengths=[SAMPLE_LENGTHS])
    apart = float((attend(**rows) - each).norm() / each.norm())
    log.write_row("attention of the decoder", **figures, apart_from_one_by_one=f"{apart:.1e}")


def measure_tower_attention(log: RunLog, kernel_name: str) -> None:
    """Measure attention of the vision encoder with a kernel."""
    inputs = tuple(_random_bf16(*TOWER_SHAPE).requires_grad_() for _ in "qkv")
    images, heads, positions, width = TOWER_SHAPE
    backend = TOWER_KERNELS[kernel_name]
    with sdpa_kernel(backend) if backend else contextlib.nullcontext():
        figures = _attention_rates(
            lambda: scaled_dot_product_attention(*inputs),
            inputs,
            4 * images * heads * positions**2 * width,
        )
    log.write_row(f"attention of the encoder, {kernel_name}", **figures)


def _attention_rates(attend: Any, inputs: tuple[Tensor, ...], work: float) -> dict[str, float]:
    gradient = torch.randn_like(attend())
    forward = median_seconds(attend)
    both = median_seconds(lambda: torch.autograd.grad(attend(), inputs, gradient))
    backward = max(both - forward, 1e-9)
    return {
        "forward_tflops": _tera(work / forward),
        "backward_tflops": _tera(BACKWARD_PRODUCTS * work / backward),
    }


def _random_bf16(*shape: int) -> Tensor:
    return torch.randn(*shape, device=DEVICE, dtype=torch.bfloat16)


def _tera(rate: float, digits: int = 1) -> float:
    return round(rate / 1e12, digits)
