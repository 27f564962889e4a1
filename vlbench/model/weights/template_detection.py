"""Which chat template a released model is asked with, and why.

A folder of transformers brings its own as a text of Jinja; LLaVA's own folders bring none, for
their scripts know it (`conv_mode`).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vlbench.text_files import read_json, read_text

TEMPLATE_MARKERS = {"### Assistant:": "yi_vl", "<|im_start|>": "chatml", "ASSISTANT:": "llava_v1"}
"""What tells a template in the text of a folder's own."""
YI_VL_CONV_MODE = "mm_default"
"""Name of Yi's template in its code; an export says it where it could be taken for LLaVA's."""
_LLAVA_NAME_PATTERN = re.compile("llava|vicuna", re.IGNORECASE)


def detect_yi_vl_template(folder: Path, config: Mapping[str, Any]) -> tuple[str, str]:
    """Return the template of a folder in LLaVA's own layout, and why; no reason for Yi-VL itself.

    Yi-VL is told by the LayerNorms of its projector. The chat template that its tokenizer may bring
    is that of the language model alone. A name of "" means that nothing is known, and the reason
    says what there is.
    """
    text = read_jinja_template(folder)
    named = _find_template_name(text)
    if str(config["mm_projector_type"]).endswith("_Norm"):
        other = f"its own chat template ({named}) is that of the language model"
        why = f"its projector has Yi-VL's LayerNorms, and {other}"
        return "yi_vl", why if named not in ("", "yi_vl") else ""
    if config.get("conv_mode") == YI_VL_CONV_MODE:
        return "yi_vl", ""
    if text:
        return match_jinja_template(text)
    tower, came = str(config["mm_vision_tower"]), str(config.get("_name_or_path") or "")
    if _LLAVA_NAME_PATTERN.search(came):
        return "llava_v1", f"it began as '{came}' (_name_or_path), which is LLaVA and not Yi-VL"
    if tower.startswith("./vit/") or "yi-vl" in tower.lower():
        return "yi_vl", "its tower lies as Yi-VL's does, though the projector has no LayerNorms"
    return "llava_v1", f"it is LLaVA and not Yi-VL (its tower is '{tower}', no LayerNorms)"


def match_jinja_template(jinja_text: str) -> tuple[str, str]:
    """Return the template that a folder's own chat template is like, and why; "" for none known."""
    named = _find_template_name(jinja_text)
    if not named:
        return "", f"its chat template is none of {', '.join(TEMPLATE_MARKERS.values())}"
    return named, "its own chat template is like it"


def read_jinja_template(folder: Path) -> str:
    """Return the text of the folder's own chat template, "" where it brings none."""
    jinja = folder / "chat_template.jinja"
    text = read_text(jinja) if jinja.is_file() else ""
    for name in ("chat_template.json", "processor_config.json", "tokenizer_config.json"):
        if not text and (folder / name).is_file():
            text = str(read_json(folder / name).get("chat_template") or "")
    return text


def detect_hf_llava_template(folder: Path) -> tuple[str, str]:
    """Return the template of a folder of transformers' LLaVA, and why."""
    text = read_jinja_template(folder)
    if text:
        return match_jinja_template(text)
    return "llava_v1", "it is LLaVA and brings no chat template"


def _find_template_name(jinja_text: str) -> str:
    return next((name for mark, name in TEMPLATE_MARKERS.items() if mark in jinja_text), "")
