"""What is kept for the backward pass never changes what is learned; `auto` takes what fits."""

from __future__ import annotations

import weakref

import pytest
import torch

from vlbench.config import recipe as recipes
from vlbench.data.batch_sampler import StepDataset
from vlbench.model.activation_checkpointing import CHECKPOINTING_MODES
from vlbench.model.build_vlm import build_vlm
from vlbench.model.loaded_vlm import LoadedVLM
from vlbench.train.auto_checkpointing import (
    choose_checkpointing_mode,
    largest_row,
    set_activation_checkpointing,
)
from vlbench.train.stage_plan import build_stage_steps, plan_stage_runs
from vlbench.train.trainable_parts import freeze_untrained_parts

CONNECTORS = ("yivl_llava", "yivl_qformer", "yivl_flamingo", "yivl_eva")


def ready(recipe: str, *words: str) -> tuple[LoadedVLM, StepDataset]:
    """Return the miniature before its last stage, and the steps of the stage."""
    resolved = recipes.load_recipe([f"recipe={recipe}", "stages.chat.global_batch_size=3", *words])
    leg = plan_stage_runs(resolved.selected_data, resolved.last_stage_data)[-1]
    vlm = build_vlm(resolved.model, leg.stage.image_size)
    freeze_untrained_parts(vlm.model, leg.stage)
    return vlm, build_stage_steps(vlm.processor, leg)


@pytest.mark.parametrize("recipe", CONNECTORS)
@pytest.mark.parametrize("way", CHECKPOINTING_MODES[1:])
def test_gradients_are_those_of_a_step_that_keeps_all(recipe, way):
    found = {}
    vlm, steps = ready(recipe)
    batch = steps[0].micro_batches[0]
    for how in ("none", way):
        vlm.model.enable_activation_checkpointing(how)
        vlm.model.zero_grad(set_to_none=True)
        vlm(batch).loss_sum.backward()
        found[how] = {
            name: p.grad.clone() for name, p in vlm.model.named_parameters() if p.grad is not None
        }
    assert found["none"].keys() == found[way].keys()
    for name, gradient in found["none"].items():
        torch.testing.assert_close(found[way][name], gradient, rtol=0, atol=0, msg=name)


def kept_bytes(vlm: LoadedVLM, steps: StepDataset, way: str) -> int:
    """Return the bytes of tensors that a forward pass keeps for the backward pass."""
    vlm.model.enable_activation_checkpointing(way)
    seen: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        seen[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        vlm(steps[0].micro_batches[0])
    return sum(seen.values())


def test_full_keeps_much_less_than_none():
    vlm, steps = ready("yivl_llava")
    assert kept_bytes(vlm, steps, "full") < 0.7 * kept_bytes(vlm, steps, "none")


def test_the_first_way_that_fits_is_taken():
    peaks = {"none": 90, "selective": 50}
    assert choose_checkpointing_mode(peaks.get, None) == "none"  # no limit is known
    assert choose_checkpointing_mode(peaks.get, 100) == "none"
    assert choose_checkpointing_mode(peaks.get, 60) == "selective"
    assert choose_checkpointing_mode(peaks.get, 40) == "full"
    assert (
        choose_checkpointing_mode({"none": None, "selective": 50}.get, 60) == "selective"
    )  # out of memory


class ScriptedMemory:
    """A GPU that says what it is told, one peak for each mode that is measured."""

    peaks: list[int] = []
    limit = 0
    on_release = staticmethod(lambda: None)

    def __init__(self, _: torch.device) -> None:
        self.left = list(self.peaks)

    def limit_bytes(self) -> int:
        return self.limit

    def reset_peak(self) -> None:
        pass

    def peak_bytes(self) -> int:
        return self.left.pop(0)

    def release_unused(self) -> None:
        type(self).on_release()


@pytest.fixture
def scripted(monkeypatch):
    monkeypatch.setattr("vlbench.train.auto_checkpointing.DeviceMemory", ScriptedMemory)
    return lambda **told: [monkeypatch.setattr(ScriptedMemory, *one) for one in told.items()]


@pytest.mark.parametrize(("spare", "mode"), [(0, "none"), (-1, "selective"), (-51, "full")])
def test_the_state_of_the_optimizer_must_fit_too(spare, mode, scripted):
    vlm, steps = ready("yivl_llava")
    before = {name: tensor.clone() for name, tensor in vlm.model.state_dict().items()}
    trained = sum(p.numel() for p in vlm.parameters() if p.requires_grad)
    scripted(peaks=[100, 50], limit=100 + 8 * trained + spare)
    assert set_mode(vlm, steps, "cpu", "32") == mode
    assert all(torch.equal(before[name], t) for name, t in vlm.model.state_dict().items())
    assert all(parameter.grad is None for parameter in vlm.parameters())


@pytest.mark.parametrize("number", [1, 2])
def test_memory_that_runs_out_is_given_back_before_the_next_mode(number, scripted):
    """It runs out in the first or in the second micro-batch, with an activation in its frames."""
    vlm, steps = ready("yivl_llava")
    alive: list[weakref.ref[torch.Tensor]] = []
    left: list[int] = []

    def run_out(module: torch.nn.Module, args: tuple[torch.Tensor, ...], output: torch.Tensor):
        held = output.clone()
        alive.append(weakref.ref(held))
        if len(alive) == number:
            raise torch.OutOfMemoryError("CUDA out of memory")

    vlm.language.lm_head.register_forward_hook(run_out)
    scripted(
        peaks=[1],
        limit=1 << 60,
        on_release=lambda: left.append(sum(r() is not None for r in alive)),
    )
    assert set_mode(vlm, steps, "cpu", "32") == "selective"
    assert left == [0, 0]


def test_the_measured_row_is_as_long_as_any_may_be_and_has_most_images():
    vlm, steps = ready("yivl_llava", "stages.chat.max_tokens_per_row=300")
    rows = [batch for number in range(20) for batch in steps[number].micro_batches]
    row = largest_row(vlm.model, steps)
    assert len(row.pixels) == max(len(batch.pixels) for batch in rows)
    longest = max(300, vlm.processor.max_length)
    assert row.input_ids.shape == (1, longest) and sum(row.sample_lengths[0]) == longest
    assert torch.isfinite(vlm(row).loss_sum)


def set_mode(vlm: LoadedVLM, steps: StepDataset, device: str, precision: str) -> str:
    """Let a mode be chosen for a device, and return it."""
    return set_activation_checkpointing(
        vlm.model, steps, torch.device(device), "auto", bf16=precision == "bf16", is_sharded=False
    )


def test_auto_without_a_gpu_keeps_all():
    vlm, steps = ready("yivl_llava", "activation_checkpointing=auto")
    assert set_mode(vlm, steps, "cpu", "32") == "none"


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["32", "bf16"])
def test_auto_on_a_gpu_takes_what_fits_and_changes_nothing(precision):
    vlm, steps = ready("yivl_llava")
    before = {name: tensor.clone() for name, tensor in vlm.model.state_dict().items()}
    assert set_mode(vlm, steps, "cuda", precision) == "none"
    assert all(torch.equal(before[name], t.cpu()) for name, t in vlm.model.state_dict().items())
    assert all(parameter.grad is None for parameter in vlm.parameters())
