"""The chat template that a released model was trained with, recognised from its small files.

Folders of transformers hold a Jinja template. LLaVA's own folders hold none, because its scripts
choose one by name (`conv_mode`).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vlbench.data.chat_template import CHAT_TEMPLATES, EOS_MARK
from vlbench.data.own_template import MESSAGE_ROLES, read_own_template
from vlbench.data.sample import ChatTurn
from vlbench.data.template_rendering import TemplateRefusal, TemplateRenderer, default_template
from vlbench.data.tokenizer import Tokenizer
from vlbench.model.weights.exported_template import OWN_TEMPLATE_MARK
from vlbench.text_files import read_json, read_text

PROBE = (
    ChatTurn("human", "QUESTION-1"),
    ChatTurn("assistant", "ANSWER-1"),
    ChatTurn("human", "QUESTION-2"),
)
"""The conversation by whose text templates are compared."""
YI_VL_CONV_MODE = "mm_default"
"""Yi-VL's name of its template; an export writes it where LLaVA's would be recognised."""
MAX_SHOWN_TEXT = 80  # characters
_TOKEN = "(<[^<>]+>)"  # a begin or an end of text that a Jinja template spells out
_LLAVA_NAME_PATTERN = re.compile("llava|vicuna", re.IGNORECASE)


def detect_yi_vl_template(folder: Path, config: Mapping[str, Any]) -> tuple[str, str]:
    """Return the chat template of a folder in LLaVA's own layout, and why it is that one.

    Yi-VL is recognised by the LayerNorms of its projector, and has no reason. A Jinja template of
    its tokenizer belongs to the language model without images. The name is "" where no template is
    known; the reason then says what was found.
    """
    jinja_text = read_jinja_template(folder)
    if str(config["mm_projector_type"]).endswith("_Norm"):
        return _describe_yi_vl(jinja_text)
    if config.get("conv_mode") == YI_VL_CONV_MODE:
        return "yi_vl", ""
    if jinja_text:
        return match_jinja_template(jinja_text)
    encoder = str(config["mm_vision_tower"])
    base_model = str(config.get("_name_or_path") or "")
    if _LLAVA_NAME_PATTERN.search(base_model):
        reason = f"it began as '{base_model}' (_name_or_path), which is LLaVA and not Yi-VL"
        return "llava_v1", reason
    if encoder.startswith("./vit/") or "yi-vl" in encoder.lower():
        reason = "its vision encoder lies as Yi-VL's does, though the projector has no LayerNorms"
        return "yi_vl", reason
    reason = f"it is LLaVA and not Yi-VL (its vision encoder is '{encoder}', no LayerNorms)"
    return "llava_v1", reason


def _describe_yi_vl(jinja_text: str) -> tuple[str, str]:
    """Return Yi-VL's template, and why, where the folder's own is another one."""
    name = _find_template_name(jinja_text)
    if not jinja_text or name == "yi_vl":
        return "yi_vl", ""
    named = f" ({name})" if name else ""
    return "yi_vl", (
        f"its projector has Yi-VL's LayerNorms, and its own chat template{named} is that of the "
        "language model"
    )


def match_jinja_template(jinja_text: str) -> tuple[str, str]:
    """Return the chat template that a Jinja template stands for, and why; "" for none."""
    name = _find_template_name(jinja_text)
    if name:
        return name, "its own chat template is like it"
    try:
        begins = _render_probe(jinja_text).partition(PROBE[0].text)[0][:MAX_SHOWN_TEXT]
    except TemplateRefusal:
        begins = ""
    shown = f" (before a first question it writes {begins!r})" if begins else ""
    return "", f"its chat template is none of {', '.join(CHAT_TEMPLATES)}{shown}"


def read_jinja_template(folder: Path) -> str:
    """Return the text of the folder's Jinja chat template, "" where it has none."""
    file = folder / "chat_template.jinja"
    text = read_text(file) if file.is_file() else ""
    for name in ("chat_template.json", "processor_config.json", "tokenizer_config.json"):
        if not text and (folder / name).is_file():
            text = default_template(read_json(folder / name).get("chat_template"))
    return text


def detect_hf_llava_template(folder: Path, has_layer_norms: bool = False) -> tuple[str, str]:
    """Return the chat template of a folder of transformers' LLaVA, and why it is that one.

    A projector with LayerNorms is Yi-VL's, whatever template its language model brought.
    """
    jinja_text = read_jinja_template(folder)
    if jinja_text.startswith(OWN_TEMPLATE_MARK):
        return "auto", ""
    if has_layer_norms:
        return _describe_yi_vl(jinja_text)
    if jinja_text:
        return match_jinja_template(jinja_text)
    return "llava_v1", "it is LLaVA and has no chat template of its own"


def brings_other_template(name: str, tokenizer: Tokenizer) -> bool:
    """Tell whether a tokenizer brings a chat template that is not like the one called `name`.

    Raises:
        UserError: it brings one in whose texts answers cannot be found.
    """
    text = tokenizer.chat_template
    if name == "auto" or not text or match_jinja_template(text)[0] == name:
        return False
    read_own_template(tokenizer)
    return True


def _find_template_name(jinja_text: str) -> str:
    """Return the name of the template that writes what a Jinja template writes, "" for none.

    Spaces and ends of texts do not count, and Jinja may leave out the system prompt, as those of
    LLaVA-1.5's folders do. Other models have the same marks of roles behind a prompt of their own.
    """
    try:
        written = _without_spaces(_render_probe(jinja_text)) if jinja_text else ""
    except TemplateRefusal:
        return ""
    for name, template in CHAT_TEMPLATES.items():
        for turns in (PROBE, (ChatTurn("system", ""), *PROBE)):
            known = _without_spaces(template.render_prompt(turns))
            head, answer, tail = map(re.escape, known.partition(PROBE[1].text))
            if re.fullmatch(f"{_TOKEN}?{head}{answer}{_TOKEN}?{tail}", written):
                return name
    return ""


def _render_probe(jinja_text: str) -> str:
    """Return what a Jinja template makes of PROBE, EOS_MARK for ends of texts.

    A processor's has messages with parts, a tokenizer's has them without.

    Raises:
        TemplateRefusal: nothing that has the turns of PROBE in it.
    """
    renderer = TemplateRenderer(jinja_text, (("bos_token", ""), ("eos_token", EOS_MARK)))
    renderer.check_form()
    refusal = TemplateRefusal("it leaves out the text of a turn")
    for has_parts in (False, True):
        messages = [
            {
                "role": MESSAGE_ROLES[turn.role],
                "content": [{"type": "text", "text": turn.text}] if has_parts else turn.text,
            }
            for turn in PROBE
        ]
        try:
            text = renderer.render(messages, is_prompt=True)
        except TemplateRefusal as error:
            refusal = error
            continue
        if all(turn.text in text for turn in PROBE):
            return text
    raise refusal


def _without_spaces(text: str) -> str:
    return "".join(text.replace(EOS_MARK, "").split())
