"""Quantized weights (GPTQ, AWQ, bitsandbytes, ...), which are refused."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vlbench.errors import UserError
from vlbench.text_files import read_json

PART_CONFIG_KEYS = ("text_config", "vision_config", "language_config", "llm_config")
QUANTIZATION_FILES = {"quantize_config.json": "gptq", "quant_config.json": "awq"}
"""Files of AutoGPTQ and AutoAWQ from before config.json had a key for it -> the method."""


def refuse_quantized_folder(folder: Path) -> None:
    """Raise a UserError for a folder whose small files say that its weights are quantized."""
    file = folder / "config.json"
    if file.is_file():
        refuse_quantized_config(read_json(file), file)
    for name, method in QUANTIZATION_FILES.items():
        if (folder / name).is_file():
            _raise_quantized(folder / name, read_json(folder / name), method)


def refuse_quantized_config(config: Mapping[str, Any], file: Path) -> None:
    """Raise a UserError for a configuration, read from `file`, of quantized weights."""
    for part in (config, *(config.get(name) for name in PART_CONFIG_KEYS)):
        quantization = part.get("quantization_config") if isinstance(part, Mapping) else None
        if quantization:
            known = quantization if isinstance(quantization, Mapping) else {}
            _raise_quantized(file, known, "of an unknown kind")


def _raise_quantized(
    file: Path, quantization_config: Mapping[str, Any], default_method: str
) -> None:
    method = quantization_config.get("quant_method") or default_method
    bits = quantization_config.get("bits") or quantization_config.get("w_bit")
    for key, key_bits in (("load_in_4bit", 4), ("load_in_8bit", 8)):  # bitsandbytes
        bits = bits or (key_bits if quantization_config.get(key) else None)
    description = f"{method}, {bits} bits" if bits else str(method)
    raise UserError(
        f"{file}: the weights are quantized ({description}), which is not loaded here; "
        "take the folder of the same model in 16 bits"
    )
