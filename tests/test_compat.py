"""Each touch point with a private part of a library: what breaks here was changed upstream.

A test that fails names the function of `vlbench.compat` that has to learn the new version.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import inspect
import operator
import signal
import subprocess
import sys
import time
import weakref
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import lightning.pytorch as pl
import pytest
import torch
from PIL import Image
from torch import distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from transformers import (
    AttentionInterface,
    DynamicCache,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaModel,
    StaticCache,
)
from two_process_commands import group_threads

from vlbench.compat import (
    fake_tensors,
    lightning_internals,
    peft_internals,
    torch_internals,
    transformers_internals,
    uvicorn_internals,
    vision_internals,
)

LLAMA = {
    "hidden_size": 8,
    "intermediate_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "vocab_size": 11,
}


def small_llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**LLAMA)).eval()


def filled_cache() -> DynamicCache:
    """Return the cache of a small Llama that has read one row of 5 positions."""
    model = small_llama()
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model.model(
            input_ids=torch.arange(5)[None],
            use_cache=True,
            **{transformers_internals.cache_argument_name(): cache},
        )
    return cache


# torch


def test_parameter_slots_take_a_plain_tensor():
    layer = nn.Linear(2, 2, bias=False)
    weight = layer.weight
    torch_internals.parameter_slots(layer)["weight"] = torch.zeros(2, 2)
    assert not layer(torch.ones(2)).any(), "nn.Linear no longer reads nn.Module._parameters"
    torch_internals.parameter_slots(layer)["weight"] = weight
    assert layer.weight is weight


def test_buffer_slots_are_what_a_module_reads():
    norm = nn.BatchNorm1d(2)
    torch_internals.buffer_slots(norm)["running_mean"] = torch.full((2,), 7.0)
    assert norm.running_mean[0] == 7, "modules no longer read nn.Module._buffers"


@pytest.mark.parametrize("kind", ["register_forward_pre_hook", "register_forward_hook"])
def test_forward_hooks_are_seen(kind):
    layer = nn.Linear(2, 2)
    assert not torch_internals.has_forward_hooks(layer)
    handle = getattr(layer, kind)(lambda *_: None)
    assert torch_internals.has_forward_hooks(layer), f"{kind} notes its hooks elsewhere"
    handle.remove()
    assert not torch_internals.has_forward_hooks(layer)


def test_a_copied_module_has_children_and_hooks_of_its_own():
    outer = nn.Sequential(nn.Linear(2, 2))
    outer.register_forward_hook(lambda *_: None)
    rebound = []

    def rebind(value):
        rebound.append(value)
        return value

    copied = object.__new__(nn.Sequential)
    torch_internals.copy_module_attributes(outer, copied, rebind)
    assert copied._modules is not outer._modules and outer[0] in rebound
    assert copied._forward_hooks is not outer._forward_hooks, "hooks of a copy are the original's"
    x = torch.ones(1, 2)
    assert copied(x).equal(outer(x))


def test_tensors_are_scaled_in_place():
    tensors = [torch.ones(2), torch.ones(3)]
    torch_internals.scale_in_place(tensors, 0.5)
    assert all((tensor == 0.5).all() for tensor in tensors), "torch._foreach_mul_ changed"


def test_compiler_errors_are_known_by_their_module():
    from torch._dynamo import exc
    from torch._inductor.exc import InvalidCxxCompiler

    assert torch_internals.is_compiler_error(InvalidCxxCompiler())
    assert torch_internals.is_compiler_error(exc.TorchDynamoException("x"))
    assert not torch_internals.is_compiler_error(RuntimeError("x"))


def test_a_c_compiler_that_triton_does_not_find_is_known_by_its_text():
    said = "Failed to find C compiler. Please specify via CC environment variable."
    assert torch_internals.is_compiler_error(RuntimeError(said))


def test_compiler_settings_are_put_back():
    from torch import _dynamo

    before = _dynamo.config.recompile_limit, _dynamo.config.optimize_ddp
    with torch_internals.compiler_settings(recompile_limit=77, optimize_ddp=False):
        assert _dynamo.config.recompile_limit == 77, "torch._dynamo.config.patch changed"
    assert (_dynamo.config.recompile_limit, _dynamo.config.optimize_ddp) == before
    with pytest.raises(AttributeError), torch_internals.compiler_settings(recompile_limits=1):
        pass


class ProcessConfig:
    """A configuration that all threads share, and that forgets overlaps, as that of torch 2.11."""

    def __init__(self) -> None:
        self._config = {"recompile_limit": SimpleNamespace(user_override=8)}
        self.recompile_limit, self.optimize_ddp = 8, True

    @contextlib.contextmanager
    def patch(self, **settings):
        before = {name: getattr(self, name) for name in settings}
        vars(self).update(settings)
        yield
        vars(self).update(before)


@pytest.mark.parametrize("own_torch", [True, False])
def test_compiler_settings_of_threads_that_overlap_are_put_back(monkeypatch, own_torch):
    """The first thread leaves while the second is inside, and the second leaves last."""
    from torch import _dynamo

    if not own_torch:
        monkeypatch.setattr(_dynamo, "config", ProcessConfig())
    read = operator.attrgetter("recompile_limit", "optimize_ddp")
    before = read(_dynamo.config)
    with ThreadPoolExecutor(1) as first, ThreadPoolExecutor(1) as second:
        one = torch_internals.compiler_settings(recompile_limit=32, optimize_ddp=False)
        other = torch_internals.compiler_settings(recompile_limit=64)
        first.submit(one.__enter__).result()
        second.submit(other.__enter__).result()
        first.submit(one.__exit__, None, None, None).result()
        assert second.submit(read, _dynamo.config).result() == (64, before[1])
        second.submit(other.__exit__, None, None, None).result()
        found = [thread.submit(read, _dynamo.config).result() for thread in (first, second)]
    assert [*found, read(_dynamo.config)] == [before] * 3


def test_it_is_known_whether_threads_share_the_compilers_settings():
    from torch import _dynamo

    by_thread = torch_internals.has_settings_by_thread(_dynamo.config)
    with _dynamo.config.patch(recompile_limit=77), ThreadPoolExecutor(1) as other:
        seen = other.submit(lambda: _dynamo.config.recompile_limit).result()
    assert (seen != 77) == by_thread, "user_override of torch._dynamo.config's settings changed"


@pytest.mark.parametrize("causal", [True, False])
def test_options_of_the_variable_length_kernel_are_known(causal):
    assert torch_internals.find_varlen_attention(causal) is not None, (
        "torch.nn.attention.varlen.varlen_attn moved, or has neither window_size nor is_causal"
    )


def test_arguments_of_the_variable_length_kernel():
    from torch.nn.attention.varlen import varlen_attn

    names = list(inspect.signature(varlen_attn).parameters)
    expected = ["query", "key", "value", "cu_seq_q", "cu_seq_k", "max_q", "max_k"]
    assert names[: len(expected)] == expected and "scale" in names


def test_attention_to_all_positions_never_takes_the_kernel_of_cudnn(monkeypatch):
    """torch 2.14 builds its plan again at every call."""
    from torch.nn.attention import varlen

    windows = []

    def note(query, key, value, *given, window_size, scale=None):
        windows.append(window_size)
        return query

    monkeypatch.setattr(varlen, "varlen_attn", note)
    attend = torch_internals._load_varlen_attention(causal=False)
    assert attend is not None
    with fake_tensors.FakeTensorMode():
        query = torch.empty(400, 4, 64, device="cuda", dtype=torch.bfloat16)
        starts = torch.empty(3, device="cuda", dtype=torch.int32)
        attend(query, query, query, starts, starts, 400, 130)
    assert windows == [(400, 400)]  # no position is outside of it
    if not hasattr(varlen, "_can_use_cudnn"):  # torch 2.11 has flash attention alone
        return
    monkeypatch.setattr(varlen, "_should_use_cudnn", lambda _: True)
    assert varlen._can_use_cudnn(query, query, query, 400, [-1, -1])
    assert not varlen._can_use_cudnn(query, query, query, 400, list(windows[0]))


def test_names_of_operations_that_checkpointing_keeps():
    kept = {str(operation) for operation in torch_internals.expensive_operations()}
    wanted = (*torch_internals.MATMUL_OPERATIONS, *torch_internals.ATTENTION_OPERATIONS)
    missing = [name for name in wanted if f"aten.{name}.default" not in kept]
    assert not missing, f"torch.ops.aten no longer has {missing}"
    assert f"torch_attn.{torch_internals.VARLEN_OPERATION}.default" in kept


def test_variable_length_attention_is_registered_before_it_is_looked_for(monkeypatch):
    """Its operation exists once its module is imported, which a step does after this."""
    looked = []
    find = torch_internals.find_varlen_attention
    monkeypatch.setattr(torch_internals, "find_varlen_attention", lambda: looked.append(find()))
    torch_internals.expensive_operations.__wrapped__()
    assert looked and looked[0] is not None


def test_attention_of_a_cpu_is_counted_with_grouped_heads_too():
    query = torch.rand(1, 2, 4, 8, requires_grad=True)
    forward = 2 * 2 * 2 * 4 * 4 * 8  # two products of 2 heads, 4 positions, width 8
    for key in (query, torch.rand(1, 1, 4, 8)):
        with torch_internals.make_flop_counter() as counter:
            nn.functional.scaled_dot_product_attention(
                query, key, key, enable_gqa=True
            ).sum().backward()
        assert counter.get_total_flops() == 3 * forward, "attention on a CPU has another operation"


def test_attention_of_a_gpu_is_counted():
    with fake_tensors.FakeTensorMode(allow_non_fake_inputs=True):
        query = torch.empty(1, 2, 4, 8, device="cuda", dtype=torch.bfloat16)
        with torch_internals.make_flop_counter() as counter:
            torch.ops.aten._scaled_dot_product_flash_attention(query, query[:, :1], query[:, :1])
    assert counter.get_total_flops() == 2 * 2 * 2 * 4 * 4 * 8


def test_the_note_of_the_data_loader_is_put_back():
    from torch.utils.data._utils import signal_handling

    before = signal_handling._SIGCHLD_handler_set
    restore = torch_internals.sigchld_flag_restorer()
    signal_handling._SIGCHLD_handler_set = not before
    restore()
    assert signal_handling._SIGCHLD_handler_set == before
    assert signal_handling.__name__ == torch_internals.SIGCHLD_MODULE
    assert "_SIGCHLD_handler_set" in inspect.getsource(signal_handling._set_SIGCHLD_handler)


def test_a_device_mesh_forgets_its_process_group():
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        deadline = time.monotonic() + 20  # a thread takes its name after it has begun
        while not group_threads():
            assert mesh.get_group() and time.monotonic() < deadline
            time.sleep(0.01)
    finally:
        distributed.destroy_process_group()
    assert group_threads()
    torch_internals.forget_process_groups()
    assert not group_threads() and mesh.size() == 1


def test_fake_tensors_have_shapes_and_addresses():
    seen = []

    class Recorder(fake_tensors.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            seen.append(func)
            return func(*args, **(kwargs or {}))

    with fake_tensors.FakeTensorMode(allow_non_fake_inputs=True), Recorder():
        made = torch.empty(1 << 40, dtype=torch.float32)
        made.to(torch.bfloat16)
        with fake_tensors.unset_fake_temporarily():
            real = torch.ones(2)
    assert isinstance(made, fake_tensors.FakeTensor)
    assert not isinstance(real, fake_tensors.FakeTensor)
    assert made.fake_device.type == "cpu"
    assert any(fake_tensors.is_type_cast(operation) for operation in seen), "casts are other ops"
    assert fake_tensors.storage_address(made) == fake_tensors.storage_address(made.view(2, -1))
    assert fake_tensors.storage_address(real) != fake_tensors.storage_address(torch.ones(2))
    assert fake_tensors.tree_leaves(({"a": 1}, [2])) == [1, 2]
    assert fake_tensors.is_device_query(torch.ops.prim.device.default)


def test_a_simulated_step_asks_for_an_accelerator_once(monkeypatch):
    asked, is_there = [], torch.cuda.is_available()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: asked.append(1) or is_there)
    mode = fake_tensors.ShapeMode(allow_non_fake_inputs=True)
    assert mode.avoid_device_init != is_there
    with mode:
        for rows in range(71, 75):  # of shapes that torch has no record of
            assert torch.empty(rows, 7).cumsum(1).shape == (rows, 7)
    assert len(asked) == 1, "torch asks elsewhere"


# transformers


def test_the_cache_has_an_argument():
    name = transformers_internals.cache_argument_name()
    assert name in inspect.signature(LlamaModel.forward).parameters, (
        "LlamaModel.forward takes its cache by another name"
    )


def test_layers_get_hidden_states_and_unknown_keywords():
    model, seen = small_llama().model, []

    def hook(module, args, kwargs):
        hidden = transformers_internals.decoder_layer_input(args, kwargs)
        seen.append((hidden.shape, kwargs.get("image_index")))
        return transformers_internals.replace_decoder_layer_input(args, kwargs, 0 * hidden)

    model.layers[1].register_forward_pre_hook(hook, with_kwargs=True)
    out = model(inputs_embeds=torch.rand(1, 3, 8), image_index="x", use_cache=False)
    assert seen == [((1, 3, 8), "x")], "LlamaModel no longer hands keywords on to its layers"
    assert not out.last_hidden_state.any(), "a hook no longer replaces the input of a layer"


def test_attention_is_chosen_by_name():
    called = []

    def attend(module, query, key, value, mask, **kwargs):
        called.append(mask)
        return query.transpose(1, 2), None

    AttentionInterface.register("compat_test", attend)
    config = LlamaConfig(**LLAMA)
    transformers_internals.set_attention(config, "compat_test")
    LlamaModel(config)(inputs_embeds=torch.rand(1, 3, 8), use_cache=False)
    assert len(called) == 2, "config._attn_implementation no longer chooses the attention"


def test_a_mask_of_four_dimensions_is_passed_through():
    masks = []

    def attend(module, query, key, value, mask, **kwargs):
        masks.append(mask)
        return query.transpose(1, 2), None

    AttentionInterface.register("compat_mask_test", attend)
    config = LlamaConfig(**LLAMA)
    transformers_internals.set_attention(config, "compat_mask_test")
    mask = transformers_internals.passed_through_mask(torch.device("cpu"))
    LlamaModel(config)(
        inputs_embeds=torch.rand(1, 3, 8),
        attention_mask=mask,
        position_ids=torch.tensor([[0, 0, 1]]),
        use_cache=False,
    )
    assert all(given is mask for given in masks), "transformers makes another mask of an empty one"


def test_sdpa_attention_and_its_mask():
    attend, make_mask = transformers_internals.sdpa_attention()
    query, key = torch.rand(1, 2, 3, 4), torch.rand(1, 1, 3, 4)
    module = SimpleNamespace(num_key_value_groups=2, is_causal=True)
    out, _ = attend(module, query, key, key, None, scaling=0.5, dropout=0.0)
    expected = nn.functional.scaled_dot_product_attention(
        query, key, key, is_causal=True, scale=0.5, enable_gqa=True
    )
    torch.testing.assert_close(out, expected.transpose(1, 2))
    assert callable(make_mask)


def test_rotary_embedding_replaces_that_of_a_model_without_memory():
    config = LlamaConfig(**LLAMA)
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    assert model.model.rotary_emb.inv_freq.is_meta, "rotary_emb is no part of LlamaModel any more"
    model.model.rotary_emb = transformers_internals.rotary_embedding(config)
    assert not any(buffer.is_meta for buffer in model.buffers()), "there are other buffers"


def test_a_cache_is_cropped():
    cache = filled_cache()
    transformers_internals.crop_kv_cache(cache, 3)
    assert cache.get_seq_length() == 3, "DynamicCache.crop has another meaning"
    transformers_internals.crop_kv_cache(cache, 3)
    assert cache.get_seq_length() == 3


def test_a_cache_is_repeated_and_its_layers_have_keys_and_values():
    cache = filled_cache()
    transformers_internals.repeat_kv_cache(cache, 4)
    layers = transformers_internals.kv_cache_layers(cache)
    assert len(layers) == 2 and layers is cache.layers
    for layer in layers:
        assert layer.keys.shape == layer.values.shape == (4, 1, 5, 4)


def test_a_static_cache_knows_the_next_position():
    cache = StaticCache(config=LlamaConfig(**LLAMA), max_cache_len=8)
    for layer_index, layer in enumerate(filled_cache().layers):
        cache.update(layer.keys, layer.values, layer_index)
    position = transformers_internals.static_cache_position(cache)
    assert position.tolist() == [5] and position.dtype == torch.int64, (
        "StaticLayer counts otherwise"
    )
    assert cache.layers[0].keys.shape[2] == 8


def test_pil_image_processor_of_llava():
    processor = transformers_internals.pil_llava_image_processor()(
        do_pad=True, size={"shortest_edge": 8}, crop_size={"height": 8, "width": 8}, resample=3
    )
    assert processor.do_pad and processor.crop_size["height"] == 8


def test_pil_image_processor_of_llava_next():
    processor = transformers_internals.pil_llava_next_image_processor()(
        size={"shortest_edge": 8},
        crop_size={"height": 8, "width": 8},
        resample=3,
        image_grid_pinpoints=[[8, 16], [16, 8]],
    )
    inputs = processor(Image.new("RGB", (32, 16)), return_tensors="pt")
    assert inputs["pixel_values"].shape == (1, 3, 3, 8, 8)  # the thumbnail and two tiles
    assert inputs["image_sizes"].tolist() == [[16, 32]]


def test_text_embeddings_of_blip2():
    from transformers import Blip2QFormerConfig

    config = Blip2QFormerConfig(hidden_size=8, vocab_size=5, max_position_embeddings=4)
    embeddings = transformers_internals.blip2_text_embeddings(config)
    assert embeddings(input_ids=torch.tensor([[1, 2]])).shape == (1, 2, 8)


# peft


def test_names_and_classes_of_adapted_layers():
    from peft import LoraConfig, inject_adapter_in_model

    config = LoraConfig(r=2, target_modules=["layer"], use_dora=True)
    holder = inject_adapter_in_model(config, nn.ModuleDict({"layer": nn.Linear(3, 3)}))
    assert peft_internals.is_adapted_layer(holder["layer"]), "BaseTunerLayer is no base any more"
    assert not peft_internals.is_adapted_layer(nn.Linear(3, 3))
    names = [name for name, _ in holder.named_parameters()]
    base = [name for name in names if not peft_internals.is_adapter_name(name)]
    assert sorted(map(peft_internals.base_parameter_name, base)) == ["layer.bias", "layer.weight"]
    assert len(names) == 5, f"DoRA has three tensors beside weight and bias: {names}"


def test_targets_are_matched_by_full_name_or_suffix():
    from peft import LoraConfig

    config = LoraConfig(target_modules=["q_proj", "layers.1.v_proj"])
    matched = [
        peft_internals.is_targeted(config, name)
        for name in ("a.q_proj", "layers.1.v_proj", "layers.0.v_proj", "my_q_proj")
    ]
    assert matched == [True, True, False, False], "peft matches target_modules in another way"


# open_clip and timm


OPEN_CLIP = {"image_size": 32, "layers": 2, "width": 64, "head_width": 32, "patch_size": 8}
TIMM = {
    "timm_model_name": "vit_tiny_patch16_224",
    "timm_model_pretrained": False,
    "timm_pool": "token",
    "timm_proj": "linear",
    "image_size": 224,
}


@pytest.mark.parametrize(
    ("config", "blocks", "width", "patch"), [(OPEN_CLIP, 2, 64, 8), (TIMM, 12, 192, 16)]
)
def test_layout_of_a_vision_encoder(config, blocks, width, patch):
    visual = vision_internals.build_open_clip_encoder(16, dict(config), False)
    assert vision_internals.has_timm_trunk(visual) == (config is TIMM)
    assert vision_internals.has_encoder_blocks(visual)
    assert len(vision_internals.encoder_blocks(visual)) == blocks
    assert vision_internals.encoder_width(visual) == width
    side = config["image_size"]
    assert vision_internals.encoder_image_size(visual) == side
    assert vision_internals.encoder_grid(visual) == (side // patch,) * 2
    vision_internals.set_encoder_image_size(visual, 64)
    assert vision_internals.encoder_image_size(visual) == 64, "the image size is kept elsewhere"
    assert vision_internals.encoder_grid(visual) == (64 // patch,) * 2
    assert vision_internals.patch_projection(visual).shape == (width, 3, patch, patch)
    vision_internals.keep_encoder_blocks(visual, 1)
    features = visual.forward_intermediates(
        torch.zeros(1, 3, 64, 64),
        indices=[0],
        stop_early=True,
        normalize_intermediates=False,
        intermediates_only=True,
        output_fmt="NLC",
        output_extra_tokens=True,
    )
    assert features["image_intermediates"][0].shape == (1, (64 // patch) ** 2, width)
    assert features["image_intermediates_prefix"][0].shape == (1, 1, width)


def test_a_naflexvit_takes_patches_of_any_grid():
    args = {"embed_dim": 32, "depth": 2, "num_heads": 2, "patch_size": 8}
    visual = vision_internals.build_timm_encoder("naflexvit_base_patch16_siglip", args, 32).eval()
    assert vision_internals.takes_any_grid(visual)
    assert vision_internals.encoder_grid(visual) == (4, 4)
    vision_internals.set_encoder_image_size(visual, 64)
    assert vision_internals.encoder_grid(visual) == (8, 8)
    assert not vision_internals.has_class_token(visual)
    assert vision_internals.patch_projection(visual).shape == (32, 192)
    inputs = vision_internals.naflex_inputs(visual, torch.rand(2, 3, 32, 32), [(2, 7), (5, 3)])
    assert inputs["patches"].shape == (2, 16, 192)
    assert inputs["attn_mask"].sum(-1).flatten().tolist() == [14, 15]
    assert inputs["patch_coord"][0, 13].tolist() == [1, 6]
    assert inputs["patch_coord"][1, 14].tolist() == [4, 2]
    out = visual.forward_intermediates(
        inputs, indices=[0], stop_early=True, intermediates_only=True, output_fmt="NLC"
    )
    assert out["image_intermediates"][0].shape == (2, 16, 32)
    timm_vit = vision_internals.build_timm_encoder("vit_tiny_patch16_224", {}, 32)
    assert not vision_internals.takes_any_grid(timm_vit)


def test_a_resnet_has_no_blocks():
    config = {"image_size": 32, "layers": [1, 1, 1, 1], "width": 8}
    assert not vision_internals.has_encoder_blocks(
        vision_internals.build_open_clip_encoder(8, config, False)
    )


def test_classes_of_timm():
    block = vision_internals.timm_eva_block()(8, 2, qkv_fused=False, swiglu_mlp=True)
    assert block(torch.rand(1, 3, 8)).shape == (1, 3, 8)
    stage = vision_internals.timm_regnet_stage()(
        1, 4, 8, stride=1, dilation=1, act_layer=nn.SiLU, norm_layer=nn.BatchNorm2d
    )
    assert stage(torch.rand(1, 4, 3, 3)).shape == (1, 8, 3, 3)
    eva = vision_internals.timm_eva()(img_size=28, patch_size=14, embed_dim=8, depth=1, num_heads=2)
    assert len(eva.blocks) == 1


# lightning


def test_a_trainer_has_device_precision_and_no_gradient_sync_alone():
    trainer = pl.Trainer(
        accelerator="cpu", devices=1, precision="bf16-mixed", logger=False, barebones=True
    )
    assert lightning_internals.trainer_device(trainer) == torch.device("cpu")
    with lightning_internals.autocast_context(trainer):
        assert torch.is_autocast_enabled("cpu"), "precision_plugin.forward_context does no autocast"
    with lightning_internals.without_gradient_sync(trainer):
        pass
    lightning_internals.set_autocast_context(trainer, torch.no_grad)
    with trainer.precision_plugin.train_step_context():
        assert not torch.is_grad_enabled(), "autocast_context_manager is called no more"


class _Regression(pl.LightningModule):
    """Learns one number."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(1, 1)

    def training_step(self, batch, _):
        return self.layer(batch).sum()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)


class _Signals:
    """Batches; notes what handles SIGTERM when they are asked for."""

    def __init__(self):
        self.found = []

    def __iter__(self):
        for _ in range(2):
            self.found.append(signal.getsignal(signal.SIGTERM))
            yield torch.ones(1, 1)


def test_a_trainer_takes_no_signal():
    trainer = pl.Trainer(accelerator="cpu", max_epochs=1, barebones=True)
    lightning_internals.leave_signals_alone(trainer)
    before, batches = signal.getsignal(signal.SIGTERM), _Signals()
    trainer.fit(_Regression(), batches)
    assert batches.found == [before] * 2, "register_signal_handlers is called no more"


def test_a_callback_that_is_used_again_does_not_hold_a_trained_module():
    callback, module = pl.Callback(), _Regression()
    trainer = pl.Trainer(accelerator="cpu", max_epochs=1, barebones=True, callbacks=[callback])
    trainer.fit(module, torch.utils.data.DataLoader(torch.ones(1, 1)))
    assert callback.log.__self__ is module, "Lightning gives callbacks no `log` any more"
    lightning_internals.detach_callbacks(trainer)
    trained = weakref.ref(module)
    del trainer, module
    gc.collect()
    assert trained() is None


def test_a_wrapped_model_is_asked_for_no_sync():
    entered = []

    class Wrapped:
        def no_sync(self):
            entered.append(True)
            return torch.no_grad()

    trainer = SimpleNamespace(strategy=SimpleNamespace(model=Wrapped()))
    with lightning_internals.without_gradient_sync(trainer):
        assert entered == [True]
    assert hasattr(nn.parallel.DistributedDataParallel, "no_sync")
    source = inspect.getsource(pl.strategies.DDPStrategy.configure_ddp)
    assert "self.model = self._setup_model" in source, "DDP's wrapped model is kept elsewhere"


def test_no_library_is_imported_before_it_is_needed():
    modules = "torch_internals, transformers_internals, peft_internals, vision_internals"
    code = (
        f"import sys\nfrom vlbench.compat import {modules}, lightning_internals\n"
        "heavy = {'torch', 'transformers', 'peft', 'open_clip', 'timm', 'lightning'}\n"
        "assert not peft_internals.is_adapted_layer(None)\n"
        "assert not heavy & set(sys.modules), heavy & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_uvicorn_tells_whether_a_request_is_in_progress() -> None:
    uvicorn = pytest.importorskip("uvicorn")
    from uvicorn.server import ServerState

    async def answer(scope, receive, send):
        await asyncio.sleep(0.3)
        await send({"type": "http.response.start", "status": 204, "headers": []})
        await send({"type": "http.response.body", "body": b""})

    async def talk() -> tuple[bytes, bytes, bytes]:
        protocol = uvicorn_internals.limited_protocol(2, 0.1, 1, bad_request_body=b"{}")
        config = uvicorn.Config(answer, http=protocol, lifespan="off", log_config=None)
        config.load()
        options = {"config": config, "server_state": ServerState(), "app_state": {}}
        server = await asyncio.get_running_loop().create_server(
            lambda: protocol(**options), "127.0.0.1", 0
        )
        async with server:
            port = server.sockets[0].getsockname()[1]
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            asking, asked = await asyncio.open_connection("127.0.0.1", port)
            asked.write(b"GET / HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n")
            nothing, something = await reader.read(), await asking.read()
            reader, garbled = await asyncio.open_connection("127.0.0.1", port)
            garbled.write(b"\x00\r\n\r\n")
            refusal = await reader.read()
            for one in (writer, asked, garbled):
                one.close()
        return nothing, something, refusal

    nothing, something, refusal = asyncio.run(talk())
    assert nothing == b"" and something.startswith(b"HTTP/1.1 204")
    assert refusal.startswith(b"HTTP/1.1 400 ") and b"application/json" in refusal
    assert refusal.endswith(b"\r\n\r\n{}")
