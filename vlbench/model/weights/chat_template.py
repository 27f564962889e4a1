"""Which chat template a released model is asked with, and why.

A folder of transformers brings its own as a text of Jinja; LLaVA's own folders bring none, for
their scripts know it (`conv_mode`).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vlbench.files import read_json, read_text

MARKS = {"### Assistant:": "yi_vl", "<|im_start|>": "chatml", "ASSISTANT:": "llava_v1"}
"""What tells a template in the text of a folder's own."""
CONV_MODE = "mm_default"
"""Name of Yi's template in its code; an export says it where it could be taken for LLaVA's."""
_LLAVA = re.compile("llava|vicuna", re.IGNORECASE)


def of_yi_vl(folder: Path, config: Mapping[str, Any]) -> tuple[str, str]:
    """Return the template of a folder in LLaVA's own layout, and why; no reason for Yi-VL itself.

    Yi-VL is told by the LayerNorms of its projector. The chat template that its tokenizer may bring
    is that of the language model alone. A name of "" means that nothing is known, and the reason
    says what there is.
    """
    text = own(folder)
    named = _named(text)
    if str(config["mm_projector_type"]).endswith("_Norm"):
        other = f"its own chat template ({named}) is that of the language model"
        why = f"its projector has Yi-VL's LayerNorms, and {other}"
        return "yi_vl", why if named not in ("", "yi_vl") else ""
    if config.get("conv_mode") == CONV_MODE:
        return "yi_vl", ""
    if text:
        return of_own(text)
    tower, came = str(config["mm_vision_tower"]), str(config.get("_name_or_path") or "")
    if _LLAVA.search(came):
        return "llava_v1", f"it began as '{came}' (_name_or_path), which is LLaVA and not Yi-VL"
    if tower.startswith("./vit/") or "yi-vl" in tower.lower():
        return "yi_vl", "its tower lies as Yi-VL's does, though the projector has no LayerNorms"
    return "llava_v1", f"it is LLaVA and not Yi-VL (its tower is '{tower}', no LayerNorms)"


def of_own(text: str) -> tuple[str, str]:
    """Return the template that a folder's own chat template is like, and why; "" for none known."""
    named = _named(text)
    if not named:
        return "", f"its chat template is none of {', '.join(MARKS.values())}"
    return named, "its own chat template is like it"


def own(folder: Path) -> str:
    """Return the text of the folder's own chat template, "" where it brings none."""
    jinja = folder / "chat_template.jinja"
    text = read_text(jinja) if jinja.is_file() else ""
    for name in ("chat_template.json", "processor_config.json", "tokenizer_config.json"):
        if not text and (folder / name).is_file():
            text = str(read_json(folder / name).get("chat_template") or "")
    return text


def of_hf_llava(folder: Path) -> tuple[str, str]:
    """Return the template of a folder of transformers' LLaVA, and why."""
    text = own(folder)
    if text:
        return of_own(text)
    return "llava_v1", "it is LLaVA and brings no chat template"


def _named(text: str) -> str:
    return next((name for mark, name in MARKS.items() if mark in text), "")
