"""Folders whose weights are quantized (GPTQ, AWQ, bitsandbytes, ...), which are not loaded here."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vlbench.errors import UserError
from vlbench.text_files import read_json

PART_CONFIG_KEYS = ("text_config", "vision_config", "language_config", "llm_config")
QUANTIZATION_FILES = {"quantize_config.json": "gptq", "quant_config.json": "awq"}
"""Where AutoGPTQ and AutoAWQ wrote it before config.json had a key for it."""


def refuse_quantized_folder(folder: Path) -> None:
    """Raise a Mistake for a folder whose small files say that its weights are quantized."""
    file = folder / "config.json"
    if file.is_file():
        refuse_quantized_config(read_json(file), file)
    for name, method in QUANTIZATION_FILES.items():
        if (folder / name).is_file():
            _raise_quantized(folder / name, read_json(folder / name), method)


def refuse_quantized_config(config: Mapping[str, Any], file: Path) -> None:
    """Raise a Mistake for a configuration, read from `file`, of quantized weights."""
    for part in (config, *(config.get(name) for name in PART_CONFIG_KEYS)):
        said = part.get("quantization_config") if isinstance(part, Mapping) else None
        if said:
            _raise_quantized(file, said if isinstance(said, Mapping) else {}, "of an unknown kind")


def _raise_quantized(
    file: Path, quantization_config: Mapping[str, Any], default_method: str
) -> None:
    method = quantization_config.get("quant_method") or default_method
    bits = quantization_config.get("bits") or quantization_config.get("w_bit")
    bits = bits or (
        4
        if quantization_config.get("load_in_4bit")
        else 8
        if quantization_config.get("load_in_8bit")
        else None
    )
    how = f"{method}, {bits} bits" if bits else str(method)
    raise UserError(
        f"{file}: the weights are quantized ({how}), which is not loaded here; take the folder of "
        "the same model in 16 bits"
    )
