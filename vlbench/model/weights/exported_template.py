"""Chat templates as the Jinja of a folder for transformers, whose messages have parts."""

from __future__ import annotations

import re

from vlbench.data.chat_template import ChatTemplate, FixedTemplate
from vlbench.data.own_template import BOS_LEFT_OUT, OwnTemplate
from vlbench.data.template_rendering import TEMPLATE_DATE
from vlbench.errors import UserError

IMAGE_TOKEN = "<image>"
OWN_TEMPLATE_MARK = "{#- the language model's own template, below, gets messages without parts -#}"
"""Begins the Jinja that an export with `language.template=auto` writes."""
TEXT_OF_PARTS = (
    "{%- macro text(content) -%}"
    "{%- if content is string -%}{{ content }}{%- else -%}"
    "{%- for part in content -%}"
    "{%- if not loop.first and not (part['type'] == 'image' and "
    "loop.previtem['type'] == 'image') -%}{{ '\\n' }}{%- endif -%}"
    f"{{{{ {IMAGE_TOKEN!r} if part['type'] == 'image' else part['text'] }}}}"
    "{%- endfor -%}{%- endif -%}"
    "{%- endmacro -%}"
)
"""The macro `text`: the content of a message with IMAGE_TOKEN in place of its images."""


def to_jinja_template(template: ChatTemplate, adds_bos: bool = False) -> str:
    """Return a Jinja chat template that writes what a `ChatTemplate` writes.

    With `adds_bos` the tokenizer puts its begin of text before every text, so that a template of
    its own must not.
    """
    if isinstance(template, FixedTemplate):
        return _from_fixed_template(template)
    if isinstance(template, OwnTemplate):
        return _from_own_template(template, adds_bos)
    raise UserError(f"the chat template {template.name} cannot be exported; use format=vlbench")


def _from_own_template(template: OwnTemplate, adds_bos: bool) -> str:
    """Return a tokenizer's own template behind what makes its messages and options ours."""
    own = template.renderer.text
    if own.startswith(OWN_TEMPLATE_MARK):
        return own
    if template.header != "":
        raise UserError(
            "the chat template of the tokenizer writes no prompts of its own, which this layout "
            "needs; use format=vlbench"
        )
    formats = dict.fromkeys(re.findall(r"strftime_now\(\s*['\"]([^'\"]+)['\"]\s*\)", own))
    dates = {text: TEMPLATE_DATE.strftime(text) for text in formats}
    bos = BOS_LEFT_OUT + "{%- set bos_token = '' -%}" if adds_bos else ""
    return (
        f"{OWN_TEMPLATE_MARK}{TEXT_OF_PARTS}{bos}"
        f"{{%- macro strftime_now(format) -%}}{{{{ {dates!r}[format] }}}}{{%- endmacro -%}}"
        "{%- set flat = namespace(messages=[]) -%}"
        "{%- for message in messages -%}"
        "{%- set content = text(message['content']) -%}"
        "{%- if message['role'] == 'assistant' -%}{%- set content = content|trim -%}{%- endif -%}"
        "{%- set flat.messages = flat.messages + "
        "[{'role': message['role'], 'content': content}] -%}"
        "{%- endfor -%}"
        "{%- set messages = flat.messages -%}"
        "{%- set enable_thinking = false -%}"
        "{%- set add_generation_prompt = messages[-1]['role'] == 'user' -%}"
        f"{own}"
    )


def _from_fixed_template(template: FixedTemplate) -> str:
    text = TEXT_OF_PARTS + (
        "{%- if messages[0]['role'] == 'system' -%}"
        "{%- set system = text(messages[0]['content']) -%}{%- set turns = messages[1:] -%}"
        "{%- else -%}"
        f"{{%- set system = {template.system!r} -%}}{{%- set turns = messages -%}}"
        "{%- endif -%}"
    )
    head = f"{{{{ {template.before_system!r} + system + {template.after_system!r} }}}}"
    text += f"{{%- if system -%}}{head}{{%- endif -%}}" if template.before_system else head
    return text + (
        "{%- for turn in turns -%}"
        "{%- if turn['role'] == 'user' -%}"
        f"{{{{ {template.before_human!r} + text(turn['content']) + {template.before_answer!r} }}}}"
        "{%- else -%}"
        f"{{{{ {template.answer_start!r} + text(turn['content']) | trim + "
        f"{template.answer_end!r} }}}}"
        f"{{%- if not loop.last -%}}{{{{ {template.after_answer!r} }}}}{{%- endif -%}}"
        "{%- endif -%}"
        "{%- endfor -%}"
    )
