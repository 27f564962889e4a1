"""Families of language models that work here, and what is missing for the others.

A family is an architecture of transformers with the common layout (`model.layers`, embeddings, a
final norm, `lm_head`) whose hidden states, logits and gradients were compared with transformers'
own (`tests/test_decoder_families.py`). Its class computes the layers, so what is special in them
(norms of queries and keys, biases, multipliers, layers without rotary positions) is its own; what
vlbench does itself are the embeddings, the attention and the logits.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import PreTrainedConfig, PreTrainedModel

from vlbench.compat.transformers_internals import decoder_classes, known_model_types
from vlbench.errors import UserError, suggest_name

if TYPE_CHECKING:
    from torch import nn

    class DecoderConfig(PreTrainedConfig):
        """What the configurations of all families have."""

        hidden_size: int
        intermediate_size: int
        num_hidden_layers: int
        num_attention_heads: int
        num_key_value_heads: int
        vocab_size: int
        max_position_embeddings: int
        hidden_act: str
        tie_word_embeddings: bool
        rope_parameters: Any
        eos_token_id: Any

    class DecoderModel(PreTrainedModel):
        """What the models of all families have."""

        config: DecoderConfig
        model: Any
        lm_head: nn.Linear
        generation_config: Any
else:
    DecoderConfig, DecoderModel = PreTrainedConfig, PreTrainedModel

DECODER_FAMILIES: dict[str, str] = {
    "llama": "Llama (Yi, Yi-1.5, Llama 2 and 3, SmolLM2)",
    "mistral": "Mistral (7B from v0.2, Nemo, Small)",
    "qwen2": "Qwen2 (Qwen2.5)",
    "qwen3": "Qwen3 (dense)",
    "olmo2": "OLMo 2",
    "granite": "Granite (3)",
    "smollm3": "SmolLM3",
}
"""`model_type` of a config.json -> what people call it, and examples."""
MISSING_PARTS = {
    **dict.fromkeys(("gemma", "gemma2", "gemma3", "gemma3_text"), "its scaled embeddings"),
    **dict.fromkeys(("cohere", "cohere2"), "one norm for attention and MLP, and its logit_scale"),
    **dict.fromkeys(("phi", "gpt_neox", "gptj", "falcon"), "attention and MLP side by side"),
    **dict.fromkeys(("gpt2", "opt", "bloom"), "learned or linear positions"),
    **dict.fromkeys(("olmo3", "exaone4", "ministral"), "layers with a sliding window"),
    "phi3": "one weight for query, key and value",
    **dict.fromkeys(("mamba", "mamba2", "rwkv", "jamba"), "layers without attention"),
}
"""What is missing here for architectures that people ask for."""
EXPERT_KEYS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")


def family_label(config: PreTrainedConfig) -> str:
    """Return the name of a configuration's family, as "Qwen3"."""
    return DECODER_FAMILIES[config.model_type].partition(" (")[0]


def find_config_class(said: Mapping[str, Any], file: Path) -> type[DecoderConfig]:
    """Return transformers' class for a configuration, read from `file`, of one of the families.

    Raises:
        UserError: names what is missing for another one.
    """
    kind = said.get("model_type")
    reason = _missing_part(kind, said)
    if reason:
        close = suggest_name(str(kind), DECODER_FAMILIES)
        raise UserError(
            f"{file}: model_type is {kind!r}: {reason}; language models that work here are "
            f"{', '.join(DECODER_FAMILIES.values())}.{close}"
        )
    return decoder_classes(str(kind))[0]


def _missing_part(kind: Any, said: Mapping[str, Any]) -> str:
    """Return why a model is not of a family, "" for one that is."""
    code = said.get("auto_map")
    code_class = code.get("AutoModelForCausalLM") if isinstance(code, Mapping) else None
    if kind in DECODER_FAMILIES:
        own_class = decoder_classes(kind)[1].__name__
        if isinstance(code_class, str) and code_class.rpartition(".")[2] != own_class:
            return f"it is code in the folder ({code_class} of auto_map), which is never executed"
        return ""
    if any(said.get(key) for key in EXPERT_KEYS) or "moe" in str(kind) or kind == "mixtral":
        return "a mixture of experts, whose router and the loss that balances it are missing here"
    if said.get("is_encoder_decoder") or _is_encoder_decoder(kind):
        return "an encoder-decoder, and what is trained here are decoders"
    if isinstance(said.get("text_config"), Mapping) or isinstance(
        said.get("vision_config"), Mapping
    ):
        return (
            "a model of several parts; language.weights takes a language model alone, init= a "
            "released vision-language model"
        )
    if isinstance(kind, str) and kind in MISSING_PARTS:
        return f"{MISSING_PARTS[kind]}: missing here"
    if code:
        return "it is code in the folder (auto_map), which is never executed"
    return "it was not compared with transformers"


def _is_encoder_decoder(kind: Any) -> bool:
    known = known_model_types()
    config_class = known[kind] if isinstance(kind, str) and kind in known else None
    return bool(getattr(config_class, "is_encoder_decoder", False))


def settle_attention(config: DecoderConfig, file: Path) -> None:
    """Refuse attention that packed rows cannot have; a window that covers all texts is none.

    Dropout of attention is left out, with a 0 in `config`: nothing here has dropout, since its
    masks would depend on how rows are packed.
    """
    window: Any = getattr(config, "sliding_window", None)
    kinds = getattr(config, "layer_types", None)
    is_used = window is not None and (kinds is None or "sliding_attention" in kinds)
    if is_used and window < config.max_position_embeddings:
        raise UserError(
            f"{file}: sliding_window is {window} of {config.max_position_embeddings} positions, "
            "and attention over packed rows has no window; for texts of at most "
            f"{window} tokens write max_position_embeddings: {window} into a copy of the folder"
        )
    if window is not None:
        config.sliding_window = None
    if kinds is not None:
        unknown = set(kinds) - {"full_attention", "sliding_attention"}
        if unknown:
            raise UserError(
                f"{file}: layer_types has {sorted(unknown)[0]!r}, which is missing here"
            )
        config.layer_types = ["full_attention"] * config.num_hidden_layers
    rope = config.rope_parameters
    if isinstance(rope, Mapping) and rope.get("rope_type") == "longrope":
        raise UserError(
            f"{file}: its rotary positions are 'longrope', which depend on the longest text of a "
            "batch, so that samples of a packed row would change each other"
        )
    if getattr(config, "attention_dropout", 0.0):
        config.attention_dropout = 0.0


def logit_divisor(config: PreTrainedConfig) -> float:
    """Return what the products of `lm_head` are divided by: Granite's `logits_scaling`, else 1."""
    return float(getattr(config, "logits_scaling", 1.0))
