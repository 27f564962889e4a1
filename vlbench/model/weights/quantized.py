"""Folders whose weights are quantized (GPTQ, AWQ, bitsandbytes, ...), which are not loaded here."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vlbench.files import read_json
from vlbench.mistakes import Mistake

INNER = ("text_config", "vision_config", "language_config", "llm_config")
FILES = {"quantize_config.json": "gptq", "quant_config.json": "awq"}
"""Where AutoGPTQ and AutoAWQ wrote it before config.json had a key for it."""


def refuse_quantized(folder: Path) -> None:
    """Raise a Mistake for a folder whose small files say that its weights are quantized."""
    file = folder / "config.json"
    if file.is_file():
        refuse_config(read_json(file), file)
    for name, method in FILES.items():
        if (folder / name).is_file():
            _refuse(folder / name, read_json(folder / name), method)


def refuse_config(config: Mapping[str, Any], file: Path) -> None:
    """Raise a Mistake for a configuration, read from `file`, of quantized weights."""
    for part in (config, *(config.get(name) for name in INNER)):
        said = part.get("quantization_config") if isinstance(part, Mapping) else None
        if said:
            _refuse(file, said if isinstance(said, Mapping) else {}, "of an unknown kind")


def _refuse(file: Path, said: Mapping[str, Any], usual: str) -> None:
    method = said.get("quant_method") or usual
    bits = said.get("bits") or said.get("w_bit")
    bits = bits or (4 if said.get("load_in_4bit") else 8 if said.get("load_in_8bit") else None)
    how = f"{method}, {bits} bits" if bits else str(method)
    raise Mistake(
        f"{file}: the weights are quantized ({how}), which is not loaded here; take the folder of "
        "the same model in 16 bits"
    )
