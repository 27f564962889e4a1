"""The language model: Yi, or any folder of the same (Llama) architecture, through transformers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.activations import ACT2FN
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from vlbench.files import read_json
from vlbench.mistakes import Mistake, nearest
from vlbench.model.attention import PACKED
from vlbench.model.weights import hub
from vlbench.model.weights.groups import (
    BUFFERS,
    Group,
    assign_language,
    check_groups,
    load_groups,
    tied,
)
from vlbench.model.weights.hub import fetch
from vlbench.model.weights.origin import expect_loaded
from vlbench.model.weights.quantized import refuse_quantized
from vlbench.model.weights.shards import shapes, weight_files

TINY = Path(__file__).parent / "tiny" / "language"

# Yi-6B-Chat and Yi-34B-Chat, from their config.json (Yi report, arXiv:2403.04652, table 1).
YI: dict[str, dict[str, Any]] = {
    "yi-6b": {
        "hidden_size": 4096,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
        "intermediate_size": 11008,
    },
    "yi-34b": {
        "hidden_size": 7168,
        "num_hidden_layers": 60,
        "num_attention_heads": 56,
        "num_key_value_heads": 8,
        "intermediate_size": 20480,
    },
}
SHARED: dict[str, Any] = {
    "vocab_size": 64000,
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 4096,
    "rope_parameters": {"rope_type": "default", "rope_theta": 5_000_000.0},
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
COUNTS = (
    *("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
    *("num_key_value_heads", "head_dim", "vocab_size", "max_position_embeddings"),
)
"""Keys of a configuration that count something, so that 0 is a mistake."""


def build_language(
    name: str, weights: str, dtype: torch.dtype = torch.float32, mapped: bool = False
) -> LlamaForCausalLM:
    """Build a language model: `name` with "random" or "embedded" weights, else what `weights` is.

    `weights` may be a folder or hub id of Llama's architecture in the Hugging Face layout. With
    `mapped` its weights stay in its files, as they are stored.
    """
    if weights == "random":
        return random_language(config_of(name)).to(dtype=dtype)
    return load_language(language_folder(weights), dtype, mapped)


def language_folder(weights: str) -> Path:
    """Return the folder with the weights and the tokenizer; random weights have the miniature's."""
    if weights in ("embedded", "random"):
        return TINY
    return _folder(weights, hub.PATTERNS)


def tokenizer_folder(weights: str) -> Path:
    """Return the folder with the tokenizer alone, for which no weights are downloaded."""
    return TINY if weights in ("embedded", "random") else _folder(weights, hub.SMALL)


def _folder(weights: str, patterns: tuple[str, ...]) -> Path:
    folder = fetch(weights, "language.weights", hub.LANGUAGE, patterns=patterns)
    if not (folder / "config.json").is_file():
        raise Mistake(f"language.weights is '{weights}', a folder without config.json")
    return folder


def config_of(name: str) -> LlamaConfig:
    """Return the architecture `name`: "tiny", "yi-6b" or "yi-34b"."""
    if name in YI:
        return LlamaConfig(**YI[name], **SHARED)
    if name != "tiny":
        known = ["tiny", *YI]
        raise Mistake(
            f"language.name is '{name}'; known are {', '.join(known)}.{nearest(name, known)}"
        )
    return config_in(TINY)


def config_in(folder: Path) -> LlamaConfig:
    """Return the architecture that a folder's config.json describes, which must be Llama's."""
    refuse_quantized(folder)
    file = folder / "config.json"
    kind = read_json(file).get("model_type")
    if kind != "llama":
        raise Mistake(
            f"{file}: model_type is {kind!r}; language models that work here have Llama's "
            "architecture (Yi, Yi-1.5, Yi-200K, Llama)"
        )
    try:
        found = LlamaConfig(**{k: v for k, v in read_json(file).items() if k != "model_type"})
    except Exception as error:  # the library's own checks, of types and of widths that divide
        raise Mistake(f"{file}: {' '.join(str(error).split())[:300]}") from error
    return checked(found, file)


def checked(config: LlamaConfig, file: Path) -> LlamaConfig:
    """Return a configuration, read from `file`, of which a model can be built."""
    for key in COUNTS:
        if getattr(config, key) < 1:
            raise Mistake(f"{file}: {key} is {getattr(config, key)}; it must be at least 1")
    if config.hidden_act not in ACT2FN:
        close = nearest(config.hidden_act, ACT2FN)
        raise Mistake(f"{file}: hidden_act is '{config.hidden_act}', an unknown activation.{close}")
    try:
        LlamaRotaryEmbedding(config)
    except Exception as error:  # a type nobody knows, or numbers that are none
        raise Mistake(
            f"{file}: its rotary positions cannot be built from {config.rope_parameters} "
            f"({type(error).__name__}: {error})"
        ) from error
    return config


def empty_language(config: LlamaConfig) -> LlamaForCausalLM:
    """Build the architecture without memory for its weights, which are to be loaded.

    It attends over packed rows (model/attention.py).
    """
    config._attn_implementation = PACKED
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    model.model.rotary_emb = LlamaRotaryEmbedding(config)  # follows from the configuration
    return model.train()  # there is no dropout; in eval mode checkpointing would silently be off


def random_language(config: LlamaConfig) -> Any:
    """Build the architecture with fresh weights."""
    config._attn_implementation = PACKED
    return LlamaForCausalLM(config).train()


def load_language(
    folder: Path, dtype: torch.dtype | None, mapped: bool = False
) -> LlamaForCausalLM:
    """Load a folder in the Hugging Face layout, file by file; `dtype` None keeps each its own."""
    model = empty_language(config_in(folder))
    state = model.state_dict()
    stay = ("language",) if mapped else ()
    group = _group(folder, model)
    loaded = load_groups([group], {"language": state}, dtype, "cpu", stay)["language"]
    expect_loaded(state.keys() - tied(model, loaded), loaded, f"language.weights={folder}")
    assign_language(model, loaded)
    model.generation_config.eos_token_id = end_ids(folder, model.config)
    return model


def check_weights(weights: str) -> None:
    """Compare names and shapes of the files that `language.weights` means with its architecture.

    What lies on a hub is downloaded; no number is read.
    """
    if weights != "random":
        folder = language_folder(weights)
        model = empty_language(config_in(folder))
        check_groups([_group(folder, model)], {"language": model.state_dict()})


def _group(folder: Path, model: LlamaForCausalLM) -> Group:
    """Return what to read from a folder for `model`: all of it."""
    files = weight_files(folder)
    spared = tied(model, [name for file in files for name in shapes(file)])
    wanted = {name: ("language", name) for name in model.state_dict() if name not in spared}
    return Group(files, wanted, BUFFERS)


def end_ids(folder: Path, config: LlamaConfig) -> list[int]:
    """Return the ids that end an answer: of generation_config.json, else of the configuration."""
    file = folder / "generation_config.json"
    given = read_json(file).get("eos_token_id") if file.is_file() else None
    ends = config.eos_token_id if given is None else given
    ends = ends if isinstance(ends, list) else [] if ends is None else [ends]
    if not all(type(end) is int for end in ends):
        raise Mistake(f"{file}: eos_token_id is {given!r}; wanted are one or several ids")
    return ends
