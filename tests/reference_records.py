"""Records of the reference connectors: weights, inputs, outputs and gradients of a case."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

GOLDENS = Path(__file__).parent / "goldens/connectors"


def load_record(case: str, name: str) -> dict[str, Tensor]:
    """Return the tensors of `case/name.safetensors`."""
    return load_file(GOLDENS / case / f"{name}.safetensors")


def assert_outputs(ours: Tensor, theirs: Tensor) -> None:
    """Compare with the tolerance that the records allow."""
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=5e-5)


def assert_gradient(ours: Tensor | None, theirs: Tensor, name: str) -> None:
    """Compare max|a-b| / max|a|; entries that are zero in truth are noise."""
    assert ours is not None, f"{name} has no gradient"
    scale = theirs.abs().max()
    assert (ours - theirs).abs().max() <= 1e-3 * scale + 1e-6, name


def assert_gradients(module: nn.Module, grads: dict[str, Tensor]) -> None:
    """Compare every recorded `param.*` gradient with that of the parameter of the same name."""
    parameters = dict(module.named_parameters())
    for name, grad in grads.items():
        if name.startswith("param."):
            key = name.removeprefix("param.")
            assert_gradient(parameters[key].grad, grad, key)
