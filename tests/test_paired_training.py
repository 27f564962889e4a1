"""Two vision encoders train alike in one process and in two, compiled, recomputed and adapted."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from forked_processes import run_in_processes
from open_clip.transformer import VisionTransformer
from random_vlm import CHECKPOINT, SMALL, make_batch, make_sample
from torch import Tensor, distributed
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from vlbench.connector import registry
from vlbench.contract_checks.small_model import (
    IMAGE_SIDE,
    PATCH_SIDE,
    PIXEL_STATISTICS,
    WIDTH,
    build_small_language,
)
from vlbench.data.chat_template import CHAT_TEMPLATES
from vlbench.data.packing import PackedBatch
from vlbench.data.tokenizer import Tokenizer
from vlbench.model import lora_adapters
from vlbench.model.compile_blocks import CompiledBlocks
from vlbench.model.fsdp_wrapping import apply_fsdp
from vlbench.model.loaded_vlm import LoadedVLM, assemble_vlm
from vlbench.model.paired_encoder import PairedEncoder
from vlbench.model.vision_encoder import VisionEncoder
from vlbench.model.vlm import VLM


def paired_vlm(connector: str = "deepstack") -> LoadedVLM:
    """Return a model with encoders of 3 and 4 blocks, always the same, all that is used trained."""
    torch.manual_seed(0)
    first, second = (
        VisionEncoder(
            VisionTransformer(IMAGE_SIDE, PATCH_SIDE, width, blocks, 2, 2.0, output_dim=16),
            -2,
            False,
            PIXEL_STATISTICS,
        )
        for width, blocks in ((WIDTH, 3), (16, 4))
    )
    pair = PairedEncoder(first, second)
    pair.set_image_size(IMAGE_SIDE)
    tokenizer = Tokenizer.load(CHECKPOINT)
    vlm = assemble_vlm(
        pair,
        registry.load_connector(connector),
        dict(SMALL.get(connector, {})),
        build_small_language(tokenizer.embedding_rows),
        tokenizer,
        CHAT_TEMPLATES["yi_vl"],
        512,
    )
    vlm.model.requires_grad_(False)
    for part in (*pair.encoders(), vlm.connector, vlm.language):
        used = part.used_parameters() if isinstance(part, VisionEncoder) else part.parameters()
        for parameter in used:
            parameter.requires_grad_(True)
    return vlm.train()


def micro_batch(vlm: LoadedVLM) -> PackedBatch:
    return make_batch(vlm, [[make_sample(1), make_sample(2, images=2), make_sample(3, images=0)]])


def gradients(model: VLM) -> dict[str, Tensor]:
    """Return the gradients of the trained parameters, by the names of the unwrapped model."""
    return {
        name: p.grad.full_tensor() if isinstance(p.grad, DTensor) else p.grad
        for name, p in model.named_parameters()
        if p.grad is not None
    }


def plain_gradients(connector: str = "deepstack") -> dict[str, Tensor]:
    vlm = paired_vlm(connector)
    vlm.model(micro_batch(vlm)).loss_sum.backward()
    found = gradients(vlm.model)
    for part in ("vision.", "second_vision."):
        assert any(value.any() for name, value in found.items() if name.startswith(part))
    return found


def differing(found: dict[str, Tensor], expected: dict[str, Tensor]) -> list[str]:
    assert found.keys() == expected.keys()
    return [
        name
        for name, value in expected.items()
        if float((found[name] - value).abs().max()) > 1e-5 * max(1.0, float(value.abs().max()))
    ]


def sharded(vlm: LoadedVLM) -> Any:
    return apply_fsdp(vlm.model, distributed.device_mesh.init_device_mesh("cpu", (2,)))


def replicated(vlm: LoadedVLM) -> Any:
    return DistributedDataParallel(vlm.model)


@pytest.mark.parametrize("wrap", [replicated, sharded])
def test_two_processes_have_the_gradients_of_one(wrap):
    """Both have the same samples, so that their mean is what one has."""
    expected = plain_gradients()

    def compare(rank: int) -> list[str]:
        vlm = paired_vlm()
        wrap(vlm)(micro_batch(vlm)).loss_sum.backward()
        return differing(gradients(vlm.model), expected)

    assert run_in_processes(compare) == [[], []]


@pytest.mark.parametrize("mode", ["selective", "full"])
@pytest.mark.parametrize("backend", ["", pytest.param("aot_eager", marks=pytest.mark.slow)])
def test_recomputed_and_compiled_blocks_learn_the_same(mode, backend):
    vlm = paired_vlm()
    assert len(vlm.model.encoder_blocks()) == 7
    vlm.model.enable_activation_checkpointing(mode)
    with CompiledBlocks(vlm.model, enabled=bool(backend), backend=backend or "eager"):
        vlm.model(micro_batch(vlm)).loss_sum.backward()
    assert not differing(gradients(vlm.model), plain_gradients())


def test_each_encoder_has_adapters_that_learn():
    vlm = paired_vlm()
    for part, encoder in zip(("vision", "second_vision"), vlm.vision.encoders(), strict=True):
        encoder.requires_grad_(False)
        lora_adapters.add_adapters(
            encoder,
            part,
            rank=2,
            alpha=None,
            dropout=0.0,
            targets="all-linear",
            rslora=False,
            dora=False,
            bits=None,
        )
    vlm.model(micro_batch(vlm)).loss_sum.backward()
    for encoder in vlm.vision.encoders():
        adapters = lora_adapters.adapter_parameters(encoder)
        seconds = [p for name, p in adapters.items() if "lora_B" in name]
        assert seconds and all(p.grad is not None and p.grad.any() for p in seconds)


def test_blip2s_first_stage_trains_both():
    vlm = paired_vlm("qformer")
    vlm.model.set_objective("blip2")
    batch = make_batch(vlm, [[make_sample(1), make_sample(2)], [make_sample(3)]])
    sum(value for value, _ in vlm.model(batch).extra.values()).backward()
    for encoder in vlm.vision.encoders():
        used = [p for p in encoder.parameters() if p.requires_grad]
        assert used and all(p.grad is not None for p in used)
        assert any(p.grad.any() for p in used)
