"""Limits of the numbers in a configuration: one digit too many is a line, and no full memory."""

from __future__ import annotations

from pathlib import Path

from vlbench.errors import UserError

LARGEST_VALUES = {
    "num_hidden_layers": 1_000,
    "num_attention_heads": 10_000,
    "num_key_value_heads": 10_000,
    "head_dim": 100_000,
    "hidden_size": 200_000,
    "intermediate_size": 1_000_000,
    "vocab_size": 10_000_000,
    "max_position_embeddings": 1_000_000_000,
}
"""About eight times what the largest published models have (Llama 3.1 405B: 126 layers, 16,384 wide
and 53,248 in the MLP; vocabularies of 262,144; rotary positions of ten millions cost nothing)."""


def check_config_number(key: str, value: object, file: Path) -> None:
    """Refuse a number of a configuration that no model has; `file` is named in the error."""
    if type(value) is not int or value < 1:
        raise UserError(f"{file}: {key} is {value}; it must be at least 1")
    largest = LARGEST_VALUES.get(key)
    if largest is not None and value > largest:
        raise UserError(f"{file}: {key} is {value:,}; it must be at most {largest:,}")
