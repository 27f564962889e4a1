"""Compiled blocks: the same losses, few graphs, and all else as it was."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from random_vlm import SMALL, make_batch, make_sample, open_gates, small_vlm
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from torch.utils._python_dispatch import TorchDispatchMode

from vlbench.__main__ import main
from vlbench.connector import registry
from vlbench.data.packing import PackedBatch
from vlbench.model import lora_adapters
from vlbench.model.activation_checkpointing import CHECKPOINTING_MODES
from vlbench.model.compile_blocks import CompiledBlocks
from vlbench.model.loaded_vlm import LoadedVLM
from vlbench.model.packed_attention import SampleBounds

LORA = {"rank": 3, "alpha": 6.0, "dropout": 0.0, "targets": "all-linear"}
LORA |= {"rslora": False, "dora": False, "bits": None}
CASES = [  # connector, what is frozen, what is kept for the backward pass
    ("llava_mlp", "", "none"),
    pytest.param("llava_mlp", "vision", "full", marks=pytest.mark.slow),
    pytest.param("llava_mlp", "lora", "full", marks=pytest.mark.slow),
    pytest.param("flamingo", "language", "selective", marks=pytest.mark.slow),
    pytest.param("deepstack", "vision", "none", marks=pytest.mark.slow),
]


def model(name: str, frozen: str) -> LoadedVLM:
    vlm = open_gates(small_vlm(registry.load_connector(name), SMALL.get(name)))
    if frozen == "lora":
        lora_adapters.add_adapters(vlm.language, "language", **LORA)
        vlm.model.requires_grad_(False)
        for adapter in lora_adapters.adapter_parameters(vlm.language).values():
            adapter.requires_grad_(True)
    elif frozen:
        getattr(vlm, frozen).requires_grad_(False)
    return vlm.train()


def batches(vlm: LoadedVLM) -> list[PackedBatch]:
    """Return micro-batches, each with another length, and numbers of samples and images."""
    rows = [
        [make_sample(1), make_sample(2, images=2)],
        [make_sample(3, words=9)],
        [make_sample(4, images=0)],
    ]
    return [make_batch(vlm, [row]) for row in rows]


def learned(vlm: LoadedVLM) -> list[Tensor]:
    """Return the losses of a few steps, each on all the batches but one."""
    trained = [p for p in vlm.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=1e-2)
    losses = []
    for step in range(3):
        optimizer.zero_grad()
        for batch in [one for number, one in enumerate(batches(vlm)) if number % 3 != step]:
            loss = vlm(batch).loss_sum / batch.supervised_token_count
            loss.backward()
            losses.append(loss.detach())
        optimizer.step()
    return losses


def kernel(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    begins: Tensor,
    _: Tensor,
    longest: int,
    *__: object,
    **___: object,
):
    """Attend over rows laid end to end, as a GPU's kernel does, in a way that can be compiled.

    What comes in 16 bits goes in 32, so that the rest of a model need not be in 16.
    """
    places = torch.arange(len(query))
    own = torch.searchsorted(begins, places, right=True, out_int32=True)
    behind = places[:, None] - places
    sees = (own[:, None] == own) & (behind >= 0) & (behind < longest)
    heads = (one.transpose(0, 1)[None] for one in (query, key, value))
    out = scaled_dot_product_attention(*heads, attn_mask=sees, enable_gqa=True)
    return out[0].transpose(0, 1).float()


def bounds(lengths: list[list[int]], length: int, _: torch.device) -> SampleBounds:
    return SampleBounds(
        torch.tensor([0, *lengths[0]], dtype=torch.int32).cumsum(0), max(lengths[0])
    )


@pytest.fixture
def graphs():
    """Return a function that counts graphs; a limit of recompilations that is met is an error."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True):
        yield lambda: torch._dynamo.utils.counters["stats"]["unique_graphs"]
    torch._dynamo.reset()


@pytest.mark.parametrize("one_call", [pytest.param(False, marks=pytest.mark.slow), True])
@pytest.mark.parametrize(("name", "frozen", "way"), CASES)
def test_compiled_blocks_learn_the_same(name, frozen, way, one_call, graphs, monkeypatch):
    """In one call packed attention is part of the graphs, otherwise it cuts them."""
    monkeypatch.setattr("vlbench.model.packed_attention.find_varlen_attention", lambda: kernel)
    monkeypatch.setattr("vlbench.model.packed_attention.matmul_dtype", lambda _: torch.bfloat16)
    if one_call:
        monkeypatch.setattr("vlbench.model.vlm.sample_bounds", bounds)
    expected = learned(model(name, frozen))
    vlm = model(name, frozen)
    names = list(vlm.model.state_dict())
    vlm.model.enable_activation_checkpointing(way)
    settings = torch._dynamo.config.get_config_copy()
    compiled = CompiledBlocks(vlm.model, backend="aot_eager")
    for ours, theirs in zip(learned(vlm), expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=0)
    made = graphs()
    assert 0 < made <= (6 if one_call else 12)  # of encoder blocks and decoder layers together
    assert list(vlm.model.state_dict()) == names
    ask = vlm.prepare([{"role": "user", "content": "How many?"}])
    assert len(vlm.generate(ask, max_new_tokens=3)[0]) and graphs() == made
    compiled.restore_forward()
    assert torch._dynamo.config.get_config_copy() == settings
    own_forwards = {block for block in vlm.model.modules() if "forward" in vars(block)}
    layers, blocks = set(vlm.language.model.layers), set(vlm.vision.blocks())
    assert own_forwards == (layers if way == "none" else layers | blocks)
    vlm.model.enable_activation_checkpointing("none")
    assert {block for block in vlm.model.modules() if "forward" in vars(block)} == layers


@pytest.fixture
def one_call(monkeypatch):
    """Packed attention is one operation of the graphs, as on a GPU."""
    monkeypatch.setattr("vlbench.model.packed_attention.find_varlen_attention", lambda: kernel)
    monkeypatch.setattr("vlbench.model.packed_attention.matmul_dtype", lambda _: torch.bfloat16)
    monkeypatch.setattr("vlbench.model.vlm.sample_bounds", bounds)


class CountedProducts(TorchDispatchMode):
    """Counts matrix products and attention, in compiled code as well."""

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        return True

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.name()
        self.count += "mm" in name or ("attention" in name and "backward" not in name)
        return func(*args, **(kwargs or {}))


def language_alone() -> LoadedVLM:
    """Return a model whose decoder alone is trained; a trained connector is recomputed in full."""
    vlm = model("llava_mlp", "vision")
    vlm.model.connector.requires_grad_(False)
    return vlm


def backward_products(vlm: LoadedVLM, mode: str, backend: str | None) -> int:
    """Return the number of products of a backward pass, with all that it computes again."""
    vlm.model.enable_activation_checkpointing(mode)
    with CompiledBlocks(vlm.model, backend is not None, backend or "eager"):
        batch = batches(vlm)[0]
        vlm(batch).loss_sum.backward()  # compiles both passes
        loss = vlm(batch).loss_sum
        with CountedProducts() as products:
            loss.backward()
    return products.count


@pytest.mark.parametrize(
    "backend",
    [
        None,
        pytest.param("aot_eager", marks=pytest.mark.slow),
        # divides forward from backward as Inductor does
        pytest.param("aot_eager_decomp_partition", marks=pytest.mark.slow),
    ],
)
def test_selective_computes_no_product_again(backend, graphs, one_call):
    vlm = language_alone()
    found = {mode: backward_products(vlm, mode, backend) for mode in CHECKPOINTING_MODES}
    layers = len(vlm.language.model.layers)
    assert found["selective"] == found["none"]
    assert found["full"] >= found["none"] + 6 * layers  # the last product needs no repetition
    assert bool(graphs()) == (backend is not None)


@pytest.mark.slow
def test_selective_computes_no_product_again_after_inductor(graphs, one_call):
    """Its products are calls of kernels, which a profiler sees."""
    vlm, found = language_alone(), {}
    for mode in CHECKPOINTING_MODES:
        vlm.model.enable_activation_checkpointing(mode)
        with CompiledBlocks(vlm.model):
            vlm(batches(vlm)[0]).loss_sum.backward()
            loss = vlm(batches(vlm)[0]).loss_sum
            with torch.profiler.profile() as profile:
                loss.backward()
        names = [event.name for event in profile.events()]
        found[mode] = sum(name in ("aten::mm", "aten::addmm", "aten::bmm") for name in names)
    assert found["selective"] == found["none"] < found["full"]


def test_fifty_packings_need_no_further_graph(graphs, one_call):
    """Two graphs for the decoder and two for the vision encoder at most: one image is a size of
    its own."""
    vlm = model("llava_mlp", "")
    vlm.model.enable_activation_checkpointing("selective")
    generator = random.Random(0)
    with CompiledBlocks(vlm.model, backend="aot_eager"):
        for number in range(50):
            samples = [
                make_sample(100 * number + k, generator.randint(0, 3), generator.randint(1, 9))
                for k in range(generator.randint(1, 4))
            ]
            vlm(make_batch(vlm, [samples])).loss_sum.backward()
            if number == 9:
                made = graphs()
    assert made == graphs() <= 4


@pytest.mark.slow
def test_torchs_own_compiler_learns_it_too(graphs):
    expected = learned(model("flamingo", ""))
    vlm = model("flamingo", "")
    CompiledBlocks(vlm.model)
    for ours, theirs in zip(learned(vlm), expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=0)


def test_without_a_compiler_there_is_one_line(tmp_path, capsys, graphs):
    from torch._inductor import config

    words = ["recipe=yivl_llava", "only=chat", "trainer.compile=true", f"run={tmp_path / 'run'}"]
    words += ["stages.chat.steps=1", "stages.chat.global_batch_size=2", "log.tensorboard=false"]
    with config.patch({"cpp.cxx": ("no-such-compiler",)}):
        assert main(["fit", *words]) == 2
    said = capsys.readouterr().err.splitlines()
    assert "trainer.compile: the blocks could not be compiled in stage chat" in said[-1]
    assert len(said) == 1
