"""What is kept for the backward pass never changes what is learned; `auto` takes what fits."""

from __future__ import annotations

import pytest
import torch

from vlbench.config import recipe as recipes
from vlbench.data.batch_sampler import StepDataset
from vlbench.model.activation_checkpointing import CHECKPOINTING_MODES
from vlbench.model.build_vlm import build_vlm
from vlbench.model.loaded_vlm import LoadedVLM
from vlbench.train.auto_checkpointing import choose_checkpointing_mode, set_activation_checkpointing
from vlbench.train.stage_plan import build_stage_steps, plan_stage_runs
from vlbench.train.trainable_parts import freeze_untrained_parts

CONNECTORS = ("yivl_llava", "yivl_qformer", "yivl_flamingo", "yivl_eva")


def ready(recipe: str, *words: str) -> tuple[LoadedVLM, StepDataset]:
    """Return the miniature before its last stage, and the steps of the stage."""
    resolved = recipes.load_recipe([f"recipe={recipe}", "stages.chat.global_batch_size=3", *words])
    leg = plan_stage_runs(resolved)[-1]
    vlm = build_vlm(resolved, leg.stage.image_size)
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
