"""What the config.json of published language models say, without what only weights need."""

from __future__ import annotations

from typing import Any

PUBLISHED_CONFIGS: dict[str, dict[str, Any]] = {
    "Yi-1.5-6B-Chat": {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        **{"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32},
        **{"num_attention_heads": 32, "num_key_value_heads": 4, "vocab_size": 64000},
        **{"max_position_embeddings": 4096, "rope_theta": 5000000.0, "rope_scaling": None},
        **{"rms_norm_eps": 1e-06, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0},
        **{"attention_bias": False, "attention_dropout": 0.0, "tie_word_embeddings": False},
        **{"hidden_act": "silu", "pretraining_tp": 1, "torch_dtype": "bfloat16"},
    },
    "Llama-3.2-1B-Instruct": {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        **{"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16},
        **{"num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128256},
        **{"max_position_embeddings": 131072, "rope_theta": 500000.0, "head_dim": 64},
        "rope_scaling": {
            **{"factor": 32.0, "high_freq_factor": 4.0, "low_freq_factor": 1.0},
            **{"original_max_position_embeddings": 8192, "rope_type": "llama3"},
        },
        **{"bos_token_id": 128000, "eos_token_id": [128001, 128008, 128009]},
        **{"rms_norm_eps": 1e-05, "tie_word_embeddings": True, "torch_dtype": "bfloat16"},
    },
    "Mistral-7B-Instruct-v0.3": {
        "architectures": ["MistralForCausalLM"],
        "model_type": "mistral",
        **{"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32},
        **{"num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 32768},
        **{"max_position_embeddings": 32768, "rope_theta": 1000000.0, "sliding_window": None},
        **{"rms_norm_eps": 1e-05, "bos_token_id": 1, "eos_token_id": 2},
        **{"attention_dropout": 0.0, "tie_word_embeddings": False, "torch_dtype": "bfloat16"},
    },
    "Qwen2.5-0.5B-Instruct": {
        "architectures": ["Qwen2ForCausalLM"],
        "model_type": "qwen2",
        **{"hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24},
        **{"num_attention_heads": 14, "num_key_value_heads": 2, "vocab_size": 151936},
        **{"max_position_embeddings": 32768, "rope_theta": 1000000.0, "max_window_layers": 21},
        **{"sliding_window": 32768, "use_sliding_window": False, "tie_word_embeddings": True},
        **{"rms_norm_eps": 1e-06, "bos_token_id": 151643, "eos_token_id": 151645},
    },
    "Qwen3-0.6B": {
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        **{"hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 28},
        **{"num_attention_heads": 16, "num_key_value_heads": 8, "vocab_size": 151936},
        **{"max_position_embeddings": 40960, "rope_theta": 1000000, "rope_scaling": None},
        **{"head_dim": 128, "max_window_layers": 28, "sliding_window": None},
        **{"use_sliding_window": False, "tie_word_embeddings": True, "attention_bias": False},
        **{"rms_norm_eps": 1e-06, "bos_token_id": 151643, "eos_token_id": 151645},
    },
    "OLMo-2-0425-1B-Instruct": {
        "architectures": ["Olmo2ForCausalLM"],
        "model_type": "olmo2",
        **{"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16},
        **{"num_attention_heads": 16, "num_key_value_heads": 16, "vocab_size": 100352},
        **{"max_position_embeddings": 4096, "rope_theta": 500000, "rope_scaling": None},
        **{"rms_norm_eps": 1e-06, "eos_token_id": 100257, "pad_token_id": 100277},
        "tie_word_embeddings": False,
    },
    "granite-3.3-2b-instruct": {
        "architectures": ["GraniteForCausalLM"],
        "model_type": "granite",
        **{"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 40},
        **{"num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 49159},
        **{"max_position_embeddings": 131072, "rope_theta": 10000000.0, "rope_scaling": None},
        **{"attention_multiplier": 0.015625, "embedding_multiplier": 12.0},
        **{"logits_scaling": 8.0, "residual_multiplier": 0.22, "tie_word_embeddings": True},
        **{"rms_norm_eps": 1e-05, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0},
    },
    "SmolLM3-3B": {
        "architectures": ["SmolLM3ForCausalLM"],
        "model_type": "smollm3",
        **{"hidden_size": 2048, "intermediate_size": 11008, "num_hidden_layers": 36},
        **{"num_attention_heads": 16, "num_key_value_heads": 4, "vocab_size": 128256},
        **{"max_position_embeddings": 65536, "rope_theta": 5000000.0, "rope_scaling": None},
        **{"no_rope_layer_interval": 4, "no_rope_layers": [1, 1, 1, 0] * 9},
        **{"layer_types": ["full_attention"] * 36, "sliding_window": None},
        **{"use_sliding_window": False, "mlp_bias": False, "attention_bias": False},
        **{"rms_norm_eps": 1e-06, "bos_token_id": 128000, "eos_token_id": 128012},
        **{"pad_token_id": 128004, "pretraining_tp": 2},
    },
}
"""Name of the repository -> config.json, as its owner writes it."""
