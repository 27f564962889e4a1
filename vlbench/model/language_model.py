"""The language model: Yi, or a folder of another family of decoders, with transformers."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn
from transformers import LlamaConfig
from transformers.activations import ACT2FN

from vlbench import hub_download
from vlbench.compat.transformers_internals import (
    decoder_classes,
    rotary_embedding,
    set_attention,
)
from vlbench.errors import UserError, one_line, suggest_name
from vlbench.hub_download import fetch_hub_folder
from vlbench.model.config_limits import check_config_number
from vlbench.model.decoder_families import (
    DecoderConfig,
    DecoderModel,
    find_config_class,
    settle_attention,
)
from vlbench.model.packed_attention import PACKED_ATTENTION
from vlbench.model.weights.quantized_weights import refuse_quantized_folder
from vlbench.model.weights.tensor_files import read_tensor_shapes, weight_files
from vlbench.model.weights.tensor_groups import (
    BUFFER_PATTERN,
    TensorGroup,
    check_tensor_groups,
    load_language_state,
    load_tensor_groups,
    missing_tied_keys,
)
from vlbench.state_dicts import check_names
from vlbench.text_files import read_json

TINY_LANGUAGE_FOLDER = Path(__file__).parents[1] / "miniatures" / "language"

# Yi-6B-Chat and Yi-34B-Chat, from their config.json (Yi report, arXiv:2403.04652, table 1).
YI_CONFIGS: dict[str, dict[str, Any]] = {
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
SHARED_YI_CONFIG: dict[str, Any] = {
    "vocab_size": 64000,
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 4096,
    "rope_parameters": {"rope_type": "default", "rope_theta": 5_000_000.0},
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
POSITIVE_KEYS = (
    *("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
    *("num_key_value_heads", "head_dim", "vocab_size", "max_position_embeddings"),
)
"""Keys of a configuration whose values must be at least 1."""
UNFIT_VALUES = (LookupError, TypeError, ValueError, AttributeError, AssertionError)
"""What the library raises for a configuration whose values do not go together."""


def build_language_model(
    name: str, weights: str, dtype: torch.dtype = torch.float32, mmap_weights: bool = False
) -> DecoderModel:
    """Build a language model: `name` with "random" or "embedded" weights, else what `weights` is.

    `weights` may be a folder or hub id in the Hugging Face layout, of a family that
    `model.decoder_families` has. With
    `mmap_weights` its weights stay in its files, as they are stored.
    """
    if weights == "random":
        model = build_random_language(named_language_config(name))
        nn.Module.to(model, dtype=dtype)
        return model
    return load_language_model(language_folder(weights), dtype, mmap_weights)


def language_folder(weights: str) -> Path:
    """Return the folder with weights and tokenizer; for random weights, the miniature's."""
    if weights in ("embedded", "random"):
        return TINY_LANGUAGE_FOLDER
    return _find_language_folder(
        weights, hub_download.LANGUAGE_CONTENTS, hub_download.DOWNLOAD_PATTERNS
    )


def tokenizer_folder(weights: str) -> Path:
    """Return the folder with configuration and tokenizer; no weights are downloaded for it."""
    if weights in ("embedded", "random"):
        return TINY_LANGUAGE_FOLDER
    return _find_language_folder(
        weights, hub_download.TOKENIZER_CONTENTS, hub_download.TOKENIZER_PATTERNS
    )


def _find_language_folder(
    weights: str, expected_files: str, file_patterns: tuple[str, ...]
) -> Path:
    folder = fetch_hub_folder(weights, "language.weights", expected_files, patterns=file_patterns)
    if not (folder / "config.json").is_file():
        raise UserError(f"language.weights is '{weights}', a folder without config.json")
    return folder


def named_language_config(name: str) -> DecoderConfig:
    """Return the architecture `name`: "tiny", "yi-6b" or "yi-34b"."""
    if name in YI_CONFIGS:
        config: Any = LlamaConfig(**YI_CONFIGS[name], **SHARED_YI_CONFIG)
        return cast(DecoderConfig, config)
    if name != "tiny":
        known = ["tiny", *YI_CONFIGS]
        raise UserError(
            f"language.name is '{name}'; known are {', '.join(known)}.{suggest_name(name, known)}"
        )
    return read_language_config(TINY_LANGUAGE_FOLDER)


def read_language_config(folder: Path) -> DecoderConfig:
    """Return the architecture that a folder's config.json describes, of one of the families."""
    refuse_quantized_folder(folder)
    file = folder / "config.json"
    return parse_language_config(read_json(file), file)


def parse_language_config(said: Mapping[str, Any], file: Path) -> DecoderConfig:
    """Return the architecture that a configuration, read from `file`, describes."""
    config_class = find_config_class(said, file)
    try:
        found = config_class(**{key: said[key] for key in said if key != "model_type"})
    except Exception as error:  # the library's own checks, of types and of widths that divide
        raise UserError(f"{file}: {one_line(error)}") from error
    return check_language_config(found, file)


def check_language_config(config: DecoderConfig, file: Path) -> DecoderConfig:
    """Return a configuration, read from `file`, of which a model can be built."""
    for key in POSITIVE_KEYS:
        if key != "head_dim" or getattr(config, key, None) is not None:  # not all families have it
            check_config_number(key, getattr(config, key), file)
    if config.num_attention_heads % config.num_key_value_heads:
        raise UserError(
            f"{file}: num_key_value_heads is {config.num_key_value_heads}, which must divide "
            f"num_attention_heads={config.num_attention_heads}"
        )
    if config.hidden_act not in ACT2FN:
        close = suggest_name(config.hidden_act, ACT2FN)
        raise UserError(
            f"{file}: hidden_act is '{config.hidden_act}', an unknown activation.{close}"
        )
    try:
        rotary_embedding(config)
    except Exception as error:  # an unknown rope_type, or values of a wrong type
        raise UserError(
            f"{file}: its rotary positions cannot be built from {config.rope_parameters} "
            f"({type(error).__name__}: {error})"
        ) from error
    settle_attention(config, file)
    return config


def build_empty_language(config: DecoderConfig) -> DecoderModel:
    """Build the architecture without memory for its weights, which are to be loaded.

    It attends over packed rows (model/packed_attention.py).
    """
    set_attention(config, PACKED_ATTENTION)
    with torch.device("meta"):
        model = _new_model(config)
    model.model.rotary_emb = rotary_embedding(config)  # follows from the configuration
    model.train()  # there is no dropout; in eval mode checkpointing would silently be off
    return model


def build_random_language(config: DecoderConfig) -> DecoderModel:
    """Build the architecture with fresh weights."""
    set_attention(config, PACKED_ATTENTION)
    model = _new_model(config)
    model.train()
    return model


def _new_model(config: DecoderConfig) -> DecoderModel:
    try:
        model: DecoderModel = decoder_classes(config.model_type)[1](config)
    except UNFIT_VALUES as error:
        raise UserError(
            f"no language model can be built from its config.json (model_type {config.model_type}; "
            f"{type(error).__name__}: {one_line(error)})"
        ) from error
    return model


def load_language_model(
    folder: Path, dtype: torch.dtype | None, mmap_weights: bool = False
) -> DecoderModel:
    """Load a folder in the Hugging Face layout, file by file; `dtype` None keeps each its own."""
    model = build_empty_language(read_language_config(folder))
    state = model.state_dict()
    stay = ("language",) if mmap_weights else ()
    group = _tensor_group(folder, model)
    loaded = load_tensor_groups([group], {"language": state}, dtype, "cpu", stay)["language"]
    check_names(
        state.keys() - missing_tied_keys(model, loaded), loaded, f"language.weights={folder}"
    )
    load_language_state(model, loaded)
    model.generation_config.eos_token_id = read_eos_token_ids(folder, model.config)
    return model


def check_language_weights(weights: str) -> None:
    """Compare tensor names and shapes of the files of `language.weights` with its architecture.

    Files of a hub are downloaded; no tensor is read.
    """
    if weights != "random":
        folder = language_folder(weights)
        model = build_empty_language(read_language_config(folder))
        check_tensor_groups([_tensor_group(folder, model)], {"language": model.state_dict()})


def _tensor_group(folder: Path, model: DecoderModel) -> TensorGroup:
    """Return the tensors to read from a folder: all of `model`, tied weights excepted."""
    files = weight_files(folder)
    spared = missing_tied_keys(model, [name for file in files for name in read_tensor_shapes(file)])
    wanted = {name: ("language", name) for name in model.state_dict() if name not in spared}
    return TensorGroup(files, wanted, BUFFER_PATTERN)


def read_eos_token_ids(folder: Path, config: DecoderConfig) -> list[int]:
    """Return the ids that end an answer: of generation_config.json, else of the configuration."""
    file = folder / "generation_config.json"
    given = read_json(file).get("eos_token_id") if file.is_file() else None
    ends = config.eos_token_id if given is None else given
    ends = ends if isinstance(ends, list) else [] if ends is None else [ends]
    if not all(type(end) is int for end in ends):
        raise UserError(f"{file}: eos_token_id is {given!r}; wanted are one or several ids")
    return ends
