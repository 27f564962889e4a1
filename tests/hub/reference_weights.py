"""Weights of reference implementations: BERT, OpenFlamingo, BLIP-2, LLaVA's projector.

They are as wide as the miniatures, except BERT, which has its own width, two layers and few words.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from .random_weights import random_tensors, state_shapes, write_json, write_shards, write_weights

BERT_LAYERS, BERT_WORDS = 2, 1000
TINY_VISION, TINY_LANGUAGE = 128, 128
"""Widths of the miniatures."""
TINY_DEPTH = 5  # decoder layers of the language miniature


def write_bert(folder: Path) -> None:
    """Write bert-base-uncased: its old names of norms, and the weights in files of four kinds."""
    (folder / "README.md").write_text("# BERT base model (uncased)\n")
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "the", "of", "red", "star", "##s"]
    words += [f"word{number}" for number in range(BERT_WORDS - len(words))]
    (folder / "vocab.txt").write_text("\n".join(words) + "\n")
    write_json({"do_lower_case": True, "model_max_length": 512}, folder / "tokenizer_config.json")
    config = {
        "architectures": ["BertForMaskedLM"],
        "attention_probs_dropout_prob": 0.1,
        "gradient_checkpointing": False,
        "hidden_act": "gelu",
        "hidden_dropout_prob": 0.1,
        "hidden_size": 768,
        "initializer_range": 0.02,
        "intermediate_size": 3072,
        "layer_norm_eps": 1e-12,
        "max_position_embeddings": 512,
        "model_type": "bert",
        "num_attention_heads": 12,
        "num_hidden_layers": BERT_LAYERS,
        "pad_token_id": 0,
        "position_embedding_type": "absolute",
        "transformers_version": "4.6.0.dev0",
        "type_vocab_size": 2,
        "use_cache": True,
        "vocab_size": BERT_WORDS,
    }
    write_json(config, folder / "config.json")
    state = random_tensors(bert_shapes(), 7)
    write_weights(state, folder / "model.safetensors")
    write_weights(state, folder / "pytorch_model.bin")
    (folder / "tf_model.h5").write_bytes(b"not read here")
    (folder / "flax_model.msgpack").write_bytes(b"not read here")


def bert_shapes() -> dict[str, tuple[int, ...]]:
    """Return the tensors of BERT for pretraining under the names of its release of 2018."""
    width, inner = 768, 3072
    shapes: dict[str, tuple[int, ...]] = {
        "bert.embeddings.word_embeddings.weight": (BERT_WORDS, width),
        "bert.embeddings.position_embeddings.weight": (512, width),
        "bert.embeddings.token_type_embeddings.weight": (2, width),
        **_norm_shapes("bert.embeddings.LayerNorm", width),
    }
    for layer in range(BERT_LAYERS):
        start = f"bert.encoder.layer.{layer}"
        for one in ("query", "key", "value"):
            shapes |= _linear_shapes(f"{start}.attention.self.{one}", width, width)
        shapes |= _linear_shapes(f"{start}.attention.output.dense", width, width)
        shapes |= _norm_shapes(f"{start}.attention.output.LayerNorm", width)
        shapes |= _linear_shapes(f"{start}.intermediate.dense", width, inner)
        shapes |= _linear_shapes(f"{start}.output.dense", inner, width)
        shapes |= _norm_shapes(f"{start}.output.LayerNorm", width)
    shapes |= _linear_shapes("bert.pooler.dense", width, width)
    shapes |= {"cls.predictions.bias": (BERT_WORDS,)}
    shapes |= _linear_shapes("cls.predictions.transform.dense", width, width)
    shapes |= _norm_shapes("cls.predictions.transform.LayerNorm", width)
    return shapes | _linear_shapes("cls.seq_relationship", width, 2)


def _linear_shapes(name: str, inner: int, outer: int) -> dict[str, tuple[int, ...]]:
    return {f"{name}.weight": (outer, inner), f"{name}.bias": (outer,)}


def _norm_shapes(name: str, width: int) -> dict[str, tuple[int, ...]]:
    return {f"{name}.gamma": (width,), f"{name}.beta": (width,)}


def tiny_connector(name: str, **options: Any) -> Any:
    """Return a connector with the options that `size=tiny` gives it, on the miniatures' shapes."""
    from vlbench.connector import registry
    from vlbench.connector.base import Shapes

    small = {
        "flamingo": {"every": 1, "latents": 16, "depth": 2, "heads": 4, "head_width": 32},
        "qformer": {"queries": 16, "width": 128, "layers": 4, "heads": 4, "ffn_width": 512},
    }
    with torch.device("meta"):
        shapes = Shapes(16, (4, 4), TINY_VISION, TINY_LANGUAGE, TINY_DEPTH)
        return registry.load_connector(name)(shapes, **small.get(name, {}), **options)


def write_open_flamingo(folder: Path) -> None:
    """Write OpenFlamingo's checkpoint: what it trained, beside an MPT that is not in it."""
    (folder / "README.md").write_text("# OpenFlamingo-3B (CLIP ViT-L/14, MPT-1B)\n")
    shapes: dict[str, tuple[int, ...]] = {"lang_encoder.transformer.wte.weight": (1002, 128)}
    for name, shape in state_shapes(tiny_connector("flamingo").state_dict()).items():
        block = name.split(".")
        if block[0] == "blocks":
            rest = ".".join(block[2:])
            name = f"lang_encoder.transformer.blocks.{block[1]}.gated_cross_attn_layer.{rest}"
        if name != "image_embedding":
            shapes[name] = shape
    write_weights(random_tensors(shapes, 8), folder / "checkpoint.pt")


def write_blip2(folder: Path) -> None:
    """Write BLIP-2 in transformers' layout, encoder, Q-Former and OPT in two shards."""
    (folder / "README.md").write_text("# BLIP-2, OPT-2.7b, pre-trained only\n")
    write_json({"model_type": "blip-2", "num_query_tokens": 16}, folder / "config.json")
    shapes: dict[str, tuple[int, ...]] = {
        "language_model.model.decoder.embed_tokens.weight": (100, TINY_LANGUAGE),
        "vision_model.embeddings.class_embedding": (1, 1, TINY_VISION),
        "vision_model.encoder.layers.0.self_attn.qkv.weight": (3 * TINY_VISION, TINY_VISION),
    }
    names = {"projection": "language_projection", "ln_vision": "vision_model.post_layernorm"}
    for name, shape in state_shapes(tiny_connector("qformer").state_dict()).items():
        start, _, rest = name.partition(".")
        shapes[".".join(filter(None, (names.get(start, start), rest)))] = shape
    write_shards(random_tensors(shapes, 9), folder, 2)


def write_lavis(file: Path) -> Path:
    """Write BLIP-2 after its first stage as LAVIS does: one file, the weights under `model`.

    Its names are those that the recorded reference has, for a connector of `size=tiny`.
    """
    from safetensors import safe_open

    from vlbench.connector.registry import load_connector

    rename = __import__(
        load_connector("qformer").__module__, fromlist=["rename_reference_key"]
    ).rename_reference_key
    golden = golden_file("qformer_stage1/state_dict.safetensors")
    with safe_open(golden, "pt") as recorded:
        names = [name for name in recorded.keys() if "position_ids" not in name]  # noqa: SIM118
    one = tiny_connector("qformer", text="embedded", itc_width=64)
    with torch.device("meta"):
        one.prepare_objective("blip2")
    own = state_shapes(one.state_dict())
    own["text.embeddings.word_embeddings.weight"] = (1001, TINY_VISION)
    own["text.bias"] = (1001,)
    shapes = {name: own[rename(name)] for name in names if rename(name) in own}
    write_weights({"model": random_tensors(shapes, 11)}, file)
    return file


def golden_file(name: str) -> Path:
    """Return a recorded file of the connectors' references."""
    return Path(__file__).parent.parent / "goldens/connectors" / name


def write_llava_projector(folder: Path) -> None:
    """Write LLaVA-1.5's projector after its first stage, as its repositories hold it."""
    write_json({"model_type": "llava", "mm_projector_type": "mlp2x_gelu"}, folder / "config.json")
    shapes = {
        **_linear_shapes("model.mm_projector.0", TINY_VISION, TINY_LANGUAGE),
        **_linear_shapes("model.mm_projector.2", TINY_LANGUAGE, TINY_LANGUAGE),
    }
    write_weights(random_tensors(shapes, 10, torch.bfloat16), folder / "mm_projector.bin")
