"""The repositories: real names and layouts, small random weights.

A language model is as wide as `LanguageModelWidths` says: `SMALL` for tests of every day, `REAL`
for Yi-6B's.
Encoders have their real widths, as open_clip asks, and two blocks (`shallow`). What a repository
holds beside what is needed is there as well, so that a command that fetches too much is seen.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from . import benchmark_repositories, reference_weights
from .random_weights import random_tensors, state_shapes, write_json, write_shards, write_weights
from .repository import HubRepository
from .shallow_encoders import shallow_encoders

TESTS = Path(__file__).parent.parent
TINY = TESTS.parent / "vlbench/miniatures/language"
YI_VL = TESTS / "goldens/yi_vl/tiny_a/checkpoint"
LLAVA = "liuhaotian/llava-v1.5-mlp2x-336px-pretrain-vicuna-7b-v1.5"
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


@dataclass(frozen=True)
class LanguageModelWidths:
    """What a language model of Yi's architecture measures."""

    hidden_size: int
    intermediate_size: int
    num_attention_heads: int
    num_key_value_heads: int
    vocab_size: int
    num_hidden_layers: int = 2


SMALL = LanguageModelWidths(64, 172, 4, 2, 1000)
REAL = LanguageModelWidths(4096, 11008, 32, 4, 64000)
"""Yi-6B's, in all but the layers."""


def make_repositories(folder: Path, widths: LanguageModelWidths = SMALL) -> list[HubRepository]:
    """Return all repositories; what they hold is made in `folder` when it is asked for."""
    makers: dict[str, Callable[[Path], None]] = {
        "01-ai/Yi-6B-Chat": partial(write_yi_chat, widths=widths, seed=1),
        "01-ai/Yi-34B-Chat": partial(write_yi_chat, widths=SMALL, seed=2),
        "01-ai/Yi-VL-6B": write_yi_vl,
        "laion/CLIP-ViT-H-14-laion2B-s32B-b79K": write_clip_vit_h,
        "timm/eva02_large_patch14_clip_336.merged2b_s6b_b61k": partial(
            write_open_clip, name="EVA02-L-14-336", seed=4
        ),
        "timm/ViT-B-32-SigLIP2-256": partial(write_open_clip, name="ViT-B-32-SigLIP2-256", seed=5),
        "timm/vit_base_patch32_clip_224.openai": partial(
            write_open_clip, name="ViT-B-32-quickgelu", seed=6
        ),
        "google-bert/bert-base-uncased": reference_weights.write_bert,
        "openflamingo/OpenFlamingo-3B-vitl-mpt1b": reference_weights.write_open_flamingo,
        "Salesforce/blip2-opt-2.7b": reference_weights.write_blip2,
        LLAVA: reference_weights.write_llava_projector,
    }
    data = {
        "MMMU/MMMU": benchmark_repositories.write_mmmu,
        "m-a-p/CMMMU": benchmark_repositories.write_cmmmu,
    }
    return [
        *(HubRepository(name, folder / "models" / name, make) for name, make in makers.items()),
        *(
            HubRepository(name, folder / "datasets" / name, m, "datasets")
            for name, m in data.items()
        ),
    ]


def write_about_files(folder: Path, name: str) -> None:
    """Write the files that every repository has and that nothing reads."""
    (folder / "README.md").write_text(f"---\nlicense: apache-2.0\n---\n# {name}\n")
    (folder / ".gitattributes").write_text("*.safetensors filter=lfs diff=lfs merge=lfs -text\n")


def write_yi_chat(folder: Path, widths: LanguageModelWidths, seed: int) -> None:
    """Write Yi-6B-Chat or Yi-34B-Chat: three shards in bfloat16, their config and tokenizer."""
    write_about_files(folder, "Yi Chat")
    (folder / "LICENSE").write_text("Apache License 2.0\n")
    config = {
        "architectures": ["LlamaForCausalLM"],
        "attention_bias": False,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "hidden_act": "silu",
        "initializer_range": 0.02,
        "max_position_embeddings": 4096,
        "model_type": "llama",
        "pad_token_id": 0,
        "pretraining_tp": 1,
        "rms_norm_eps": 1e-05,
        "rope_scaling": None,
        "rope_theta": 5000000.0,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "transformers_version": "4.35.0",
        "use_cache": True,
        **vars(widths),
    }
    write_json(config, folder / "config.json")
    ends = {"bos_token_id": 1, "do_sample": True, "eos_token_id": [2, 7], "pad_token_id": 0}
    write_json(ends, folder / "generation_config.json")
    for name in ("tokenizer.model", "tokenizer_config.json"):
        shutil.copy(TINY / name, folder / name)
    write_shards(random_tensors(llama_shapes(widths), seed, torch.bfloat16), folder, 3)


def llama_shapes(widths: LanguageModelWidths) -> dict[str, tuple[int, ...]]:
    """Return the tensors of a Llama under the names in its files."""
    width, inner = widths.hidden_size, widths.intermediate_size
    kept = width // widths.num_attention_heads * widths.num_key_value_heads
    layer: dict[str, tuple[int, ...]] = {
        "input_layernorm.weight": (width,),
        "mlp.down_proj.weight": (width, inner),
        "mlp.gate_proj.weight": (inner, width),
        "mlp.up_proj.weight": (inner, width),
        "post_attention_layernorm.weight": (width,),
        "self_attn.k_proj.weight": (kept, width),
        "self_attn.o_proj.weight": (width, width),
        "self_attn.q_proj.weight": (width, width),
        "self_attn.v_proj.weight": (kept, width),
    }
    found: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (widths.vocab_size, width)}
    for number in range(widths.num_hidden_layers):
        found |= {f"model.layers.{number}.{name}": shape for name, shape in layer.items()}
    return found | {"model.norm.weight": (width,), "lm_head.weight": (widths.vocab_size, width)}


def write_yi_vl(folder: Path) -> None:
    """Write Yi-VL-6B: the golden checkpoint, whose numbers the authors' code has computed."""
    shutil.copytree(YI_VL, folder, dirs_exist_ok=True)
    write_about_files(folder, "Yi-VL-6B")
    (folder / "LICENSE").write_text("Apache License 2.0\n")


def build_open_clip(name: str, seed: int) -> tuple[Any, dict[str, Tensor]]:
    """Return a CLIP of open_clip, two blocks deep, and random weights for it."""
    import open_clip

    with shallow_encoders(), torch.random.fork_rng(devices=[]):
        model = open_clip.create_model(name)
    return model, random_tensors(state_shapes(model.state_dict()), seed)


def write_open_clip(folder: Path, name: str, seed: int) -> None:
    """Write a repository of open_clip: its own two files, and one of timm's for another use."""
    import open_clip

    model, state = build_open_clip(name, seed)
    model.load_state_dict(state)
    write_about_files(folder, name)
    with shallow_encoders():
        config = open_clip.get_model_config(name)
    preprocess = open_clip.get_model_preprocess_cfg(model)
    write_json(
        {"model_cfg": config, "preprocess_cfg": preprocess}, folder / "open_clip_config.json"
    )
    write_weights(state, folder / "open_clip_model.safetensors")
    write_weights(state, folder / "open_clip_pytorch_model.bin")
    trunk = {k.removeprefix("visual.trunk."): v for k, v in state.items() if ".trunk." in k}
    if trunk:
        write_weights(trunk, folder / "model.safetensors")
        write_json({"architecture": name, "num_classes": 0}, folder / "config.json")


def write_clip_vit_h(folder: Path) -> None:
    """Write ViT-H-14 as LAION did: open_clip's two files, and the same in Hugging Face's layout."""
    from vlbench.model.weights import clip_layouts

    model, state = build_open_clip("ViT-H-14", 3)
    write_open_clip(folder, "ViT-H-14", 3)
    model.load_state_dict(state)
    vision = clip_layouts.to_hf_vision_config(model.visual)
    config = {
        "architectures": ["CLIPModel"],
        "model_type": "clip",
        "projection_dim": 1024,
        "text_config": {"hidden_size": 64, "num_hidden_layers": 1, "model_type": "clip_text_model"},
        "vision_config": vision,
    }
    write_json(config, folder / "config.json")
    encoder = {
        f"vision_model.{key}": tensor.contiguous()
        for key, tensor in clip_layouts.to_hf_state_dict(model.visual).items()
    }
    rest = {
        "logit_scale": state["logit_scale"],
        "visual_projection.weight": state["visual.proj"].T.contiguous(),
        "text_projection.weight": state["text_projection"].T.contiguous(),
        "text_model.embeddings.token_embedding.weight": state["token_embedding.weight"],
        "text_model.final_layer_norm.weight": state["ln_final.weight"],
    }
    write_weights(encoder | rest, folder / "model.safetensors")
    write_weights(encoder | rest, folder / "pytorch_model.bin")
    processor = {
        "crop_size": 224,
        "do_center_crop": True,
        "do_normalize": True,
        "do_resize": True,
        "image_mean": CLIP_MEAN,
        "image_std": CLIP_STD,
        "resample": 3,
        "size": 224,
    }
    write_json(processor, folder / "preprocessor_config.json")
