"""The last layer's MLP sees the supervised positions alone, and nothing that is learned changes."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from golden_release import CHECKPOINT
from language_folders import FAMILY_OPTIONS, write_language_folder
from random_vlm import make_batch, make_sample
from torch import Tensor

from vlbench.connector import registry
from vlbench.contract_checks.small_model import build_small_vlm
from vlbench.data.packing import PackedBatch
from vlbench.data.sample_encoding import IGNORE_INDEX
from vlbench.model.activation_checkpointing import CHECKPOINTING_MODES
from vlbench.model.compile_blocks import CompiledBlocks
from vlbench.model.language_model import load_language_model
from vlbench.model.loaded_vlm import LoadedVLM


def model(folder: Any = None) -> LoadedVLM:
    language = None if folder is None else load_language_model(folder, torch.float32)
    return build_small_vlm(registry.load_connector("flamingo"), {"every": 2}, CHECKPOINT, language)


def located(vlm: LoadedVLM, images: int = 2) -> PackedBatch:
    rows = [[make_sample(1), make_sample(2, images=images, words=9)], [make_sample(4, words=30)]]
    return make_batch(vlm, rows).to("cpu")


def learn(vlm: LoadedVLM, batch: PackedBatch) -> tuple[Tensor, dict[str, Tensor], list[int]]:
    """Return the loss, all gradients, and how many positions each layer's MLP saw."""
    seen: list[int] = []
    hooks = [
        layer.mlp.register_forward_pre_hook(
            lambda _, args: seen.append(args[0].flatten(0, -2).shape[0])
        )
        for layer in vlm.language.model.layers
    ]
    vlm.model.zero_grad(set_to_none=True)
    loss = vlm(batch).loss_sum
    seen, counts = [], list(seen)
    loss.backward()
    for hook in hooks:
        hook.remove()
    named = vlm.model.named_parameters()
    return loss.detach(), {name: one.grad for name, one in named if one.grad is not None}, counts


@pytest.mark.parametrize("name", FAMILY_OPTIONS)
def test_every_family_learns_what_it_learns_of_all_positions(name, tmp_path):
    vlm = model(write_language_folder(name, tmp_path / name))
    batch = located(vlm)
    loss, gradients, counts = learn(vlm, batch)
    total = batch.input_ids.numel()
    assert counts == [total] * (len(counts) - 1) + [batch.supervised_token_count]
    batch.supervised_positions = None  # the loss finds them itself, and all are computed
    all_loss, all_gradients, all_counts = learn(vlm, batch)
    assert all_counts == [total] * len(counts)
    torch.testing.assert_close(loss, all_loss, rtol=1e-6, atol=0)
    assert gradients.keys() == all_gradients.keys()
    largest = max(float(gradient.abs().max()) for gradient in all_gradients.values())
    for key, gradient in all_gradients.items():
        # a bias of keys without positions has no gradient but rounding
        bound = max(1e-5 * float(gradient.abs().max()), 1e-7 * largest)
        torch.testing.assert_close(gradients[key], gradient, rtol=0, atol=bound, msg=key)


@pytest.mark.parametrize("mode", CHECKPOINTING_MODES[1:])
def test_what_is_recomputed_sees_the_same_positions(mode):
    vlm = model()
    batch = located(vlm)
    loss, gradients, counts = learn(vlm, batch)
    vlm.model.enable_activation_checkpointing(mode)
    again = learn(vlm, batch)
    assert torch.equal(loss, again[0]) and counts == again[2]
    assert all(torch.equal(again[1][name], one) for name, one in gradients.items())


def test_logits_and_hidden_states_are_those_of_all_positions():
    vlm = model()
    batch = located(vlm)
    visual = vlm.visual(batch)
    with torch.no_grad():
        hidden = vlm.model.hidden_states(batch, visual)
        for_loss = vlm.model.hidden_states(batch, visual, for_loss=True)
        unlabelled = copy.copy(batch)
        unlabelled.labels = None
        logits = vlm(unlabelled).logits
    assert torch.equal(logits, vlm.model.logits(hidden))
    supervised = batch.labels != IGNORE_INDEX
    torch.testing.assert_close(for_loss[supervised], hidden[supervised])
    assert not torch.allclose(for_loss[~supervised], hidden[~supervised])


def test_nothing_supervised_leaves_no_gradient_out():
    vlm = model()
    batch = located(vlm)
    names = learn(vlm, batch)[1].keys()
    batch.labels = torch.full_like(batch.labels, IGNORE_INDEX)
    batch.supervised_positions = batch.supervised_positions[:0]
    loss, gradients, counts = learn(vlm, batch)
    assert loss == 0 and counts[-1] == 0 and gradients.keys() == names
    assert not any(gradient.any() for gradient in gradients.values())


def test_compiled_layers_compute_all_positions(monkeypatch):
    """They share a graph; a last layer with a number of positions of its own would need another."""

    def refuse(*_: object) -> Tensor:
        raise LookupError

    vlm = model()
    batch = located(vlm)
    monkeypatch.setattr("vlbench.model.supervised_mlp._mlp_at", refuse)
    with CompiledBlocks(vlm.model, backend="eager"):
        vlm.train()
        assert torch.isfinite(vlm(batch).loss_sum)
        vlm.eval()
        with pytest.raises(LookupError):
            vlm(batch)
