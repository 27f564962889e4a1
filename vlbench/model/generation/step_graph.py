"""CUDA graphs of the decoding step: one launch per token in place of hundreds."""

from __future__ import annotations

import threading
from collections.abc import Callable

import torch
from torch import Tensor

DecodeStep = Callable[[], Tensor]
"""Reads and writes tensors that stay where they are; returns logits `[rows, vocabulary]`."""
STEPS_BEFORE_CAPTURE = 4
"""Steps that are launched one by one: answers of a few tokens are not worth a graph, and libraries
allocate and load kernels at the first one, which a capture does not allow."""
_CAPTURE_LOCK = threading.Lock()  # the start of a capture frees memory, which another one forbids


def capture_cuda_graph(step: DecodeStep, device: torch.device) -> DecodeStep:
    """Record what `step` launches on `device`, without running it; return what launches it again.

    The tensor that is returned is the same at every call. Other threads may use the GPU meanwhile.
    """
    graph = torch.cuda.CUDAGraph()
    with _CAPTURE_LOCK, torch.cuda.device(device):  # streams are those of the current device
        stream = torch.cuda.Stream()
        with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
            logits = step()

    def replay_graph() -> Tensor:
        graph.replay()
        return logits

    return replay_graph


class StepGraph:
    """One step that is run again and again: launched the first times, then as a CUDA graph."""

    def __init__(self, device: torch.device | None) -> None:
        """Record on `device`; None: on none, as where a step is no sequence of kernels of a GPU."""
        self._device = device
        self._launched_count = 0
        self._replay: DecodeStep | None = None

    def run(self, step: DecodeStep) -> Tensor:
        """Run a step, the same at every call; it is not kept, as what it reads may be large."""
        if self._device is not None and self._launched_count == STEPS_BEFORE_CAPTURE:
            self._replay = self._replay or capture_cuda_graph(step, self._device)
        if self._replay is not None:
            return self._replay()
        self._launched_count += 1
        return step()
