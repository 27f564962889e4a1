"""Chat templates in the manner of those that tokenizers bring, written anew, and what they write.

`EXPECTED` is the text of `CONVERSATION` by hand; what is supervised stands between the brackets.
"""

from __future__ import annotations

import json
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from vlbench.data.sample import IMAGE_PLACEHOLDER, ChatTurn

CONVERSATION = (
    ChatTurn("human", f"{IMAGE_PLACEHOLDER}\nWhat is it? "),
    ChatTurn("assistant", " A red circle.\n"),
    ChatTurn("human", "它有多大？"),
    ChatTurn("assistant", "很大。"),
    ChatTurn("human", "Sure?"),
    ChatTurn("assistant", "Yes.\n\nQuite."),
)
QUESTION = f"{IMAGE_PLACEHOLDER}\nWhat is it?"
CHATML = (
    "{% if messages[0].role == 'system' %}{% set first = messages[0].content %}{% endif %}"
    "{% if first is defined %}{{ '<|im_start|>system\n' + first + '<|im_end|>\n' }}{% endif %}"
    "{% for m in messages %}{% if m.role == 'user' %}"
    "{{ '<|im_start|>user\n' + m.content + '<|im_end|>\n<|im_start|>assistant\n' }}"
    "{% elif m.role == 'assistant' %}{{ m.content + '<|im_end|>' + '\n' }}{% endif %}{% endfor %}"
)
QWEN_2_5 = """
{%- if messages[0]['role'] == 'system' %}
    {{- '<|im_start|>system\\n' + messages[0]['content'] + '<|im_end|>\\n' }}
{%- else %}
    {{- '<|im_start|>system\\nYou are a helpful assistant.<|im_end|>\\n' }}
{%- endif %}
{%- for m in messages %}
    {%- if m.role in ('user', 'assistant') or (m.role == 'system' and not loop.first) %}
        {{- '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}
"""
QWEN_3 = """
{%- if messages[0].role == 'system' %}
    {{- '<|im_start|>system\\n' + messages[0].content + '<|im_end|>\\n' }}
{%- endif %}
{%- set found = namespace(searching=true, last_question=messages|length - 1) %}
{%- for m in messages[::-1] %}
    {%- if found.searching and m.role == 'user' %}
        {%- set found.searching = false %}
        {%- set found.last_question = messages|length - 1 - loop.index0 %}
    {%- endif %}
{%- endfor %}
{%- for m in messages %}
    {%- if m.role == 'user' %}
        {{- '<|im_start|>user\\n' + m.content + '<|im_end|>\\n' }}
    {%- elif m.role == 'assistant' %}
        {%- set text = m.content %}
        {%- set thoughts = '' %}
        {%- if '</think>' in text %}
            {%- set thoughts = text.split('</think>')[0].rstrip('\\n').split('<think>')[-1].lstrip('\\n') %}
            {%- set text = text.split('</think>')[-1].lstrip('\\n') %}
        {%- endif %}
        {%- if loop.index0 > found.last_question and (loop.last or thoughts) %}
            {{- '<|im_start|>assistant\\n<think>\\n' + thoughts.strip('\\n') + '\\n</think>\\n\\n' + text }}
        {%- else %}
            {{- '<|im_start|>assistant\\n' + text }}
        {%- endif %}
        {{- '<|im_end|>\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}
        {{- '<think>\\n\\n</think>\\n\\n' }}
    {%- endif %}
{%- endif %}
"""  # noqa: E501
LLAMA_3 = """
{{- bos_token }}
{%- if not date_string is defined %}
    {%- set date_string = strftime_now('%d %b %Y') %}
{%- endif %}
{%- if messages[0].role == 'system' %}
    {%- set first = messages[0].content|trim %}
    {%- set messages = messages[1:] %}
{%- else %}
    {%- set first = '' %}
{%- endif %}
{{- '<|start_header_id|>system<|end_header_id|>\\n\\nToday Date: ' + date_string + '\\n\\n' + first + '<|eot_id|>' }}
{%- for m in messages %}
    {{- '<|start_header_id|>' + m.role + '<|end_header_id|>\\n\\n' + m.content|trim + '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
{%- endif %}
"""  # noqa: E501
MISTRAL_V3 = """
{%- if messages[0].role == 'system' %}
    {%- set first = messages[0].content %}
    {%- set turns = messages[1:] %}
{%- else %}
    {%- set turns = messages %}
{%- endif %}
{{- bos_token }}
{%- for m in turns %}
    {%- if (m.role == 'user') != (loop.index0 % 2 == 0) %}
        {{- raise_exception('roles must alternate user and assistant') }}
    {%- endif %}
    {%- if m.role == 'user' and loop.last and first is defined %}
        {{- '[INST] ' + first + '\\n\\n' + m.content + '[/INST]' }}
    {%- elif m.role == 'user' %}
        {{- '[INST] ' + m.content + '[/INST]' }}
    {%- else %}
        {{- ' ' + m.content + eos_token }}
    {%- endif %}
{%- endfor %}
"""
OLMO_2 = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'system' %}"
    "{{ '<|system|>\n' + m.content + '\n' }}{% elif m.role == 'user' %}"
    "{{ '<|user|>\n' + m.content + '\n' }}{% elif not loop.last %}"
    "{{ '<|assistant|>\n' + m.content + eos_token + '\n' }}{% else %}"
    "{{ '<|assistant|>\n' + m.content + eos_token }}{% endif %}"
    "{% if loop.last and add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}{% endfor %}"
)
GRANITE = """
{%- if messages[0].role == 'system' %}
    {%- set first = messages[0].content %}
    {%- set turns = messages[1:] %}
{%- else %}
    {%- set first = "Today's Date: " + strftime_now('%B %d, %Y') + '.\\nYou are Granite.' %}
    {%- set turns = messages %}
{%- endif %}
{{- '<|start_of_role|>system<|end_of_role|>' + first + '<|end_of_text|>\\n' }}
{%- for m in turns %}
    {{- '<|start_of_role|>' + m.role + '<|end_of_role|>' + m.content + '<|end_of_text|>\\n' }}
    {%- if loop.last and add_generation_prompt %}
        {{- '<|start_of_role|>assistant<|end_of_role|>' }}
    {%- endif %}
{%- endfor %}
"""
SMOLLM_3 = """
{%- if enable_thinking is not defined %}{%- set enable_thinking = true %}{%- endif %}
{%- set mode = '/think' if enable_thinking else '/no_think' %}
{{- '<|im_start|>system\\nToday Date: ' ~ strftime_now('%d %B %Y') ~ '\\nReasoning Mode: ' + mode + '\\n\\n' }}
{%- if messages[0].role == 'system' %}
    {{- messages[0].content.replace('/no_think', '').replace('/think', '').rstrip() + '\\n\\n' }}
{%- endif %}
{{- '<|im_end|>\\n' }}
{%- for m in messages %}
    {%- if m.role == 'user' %}
        {{- '<|im_start|>user\\n' + m.content + '<|im_end|>\\n' }}
    {%- elif m.role == 'assistant' %}
        {%- generation %}
        {%- if mode == '/think' %}
            {{- '<|im_start|>assistant\\n' + m.content.lstrip('\\n') + '<|im_end|>\\n' }}
        {%- else %}
            {{- '<|im_start|>assistant\\n<think>\\n\\n</think>\\n' + m.content.lstrip('\\n') + '<|im_end|>\\n' }}
        {%- endif %}
        {%- endgeneration %}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' if mode == '/think' else '<|im_start|>assistant\\n<think>\\n\\n</think>\\n' }}
{%- endif %}
"""  # noqa: E501
OWN_TEMPLATES = {
    "chatml": CHATML,
    "qwen 2.5": QWEN_2_5,
    "qwen 3": QWEN_3,
    "llama 3": LLAMA_3,
    "mistral v0.3": MISTRAL_V3,
    "olmo 2": OLMO_2,
    "granite": GRANITE,
    "smollm 3": SMOLLM_3,
}
EXPECTED = {
    "chatml": (
        f"<|im_start|>user\n{QUESTION} <|im_end|>\n<|im_start|>assistant\n"
        "[A red circle.<|im_end|>]\n<|im_start|>user\n它有多大？<|im_end|>\n<|im_start|>assistant\n"
        "[很大。<|im_end|>]\n<|im_start|>user\nSure?<|im_end|>\n<|im_start|>assistant\n"
        "[Yes.\n\nQuite.<|im_end|>]\n"
    ),
    "qwen 2.5": (
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
        f"<|im_start|>user\n{QUESTION} <|im_end|>\n<|im_start|>assistant\n"
        "[A red circle.<|im_end|>]\n<|im_start|>user\n它有多大？<|im_end|>\n<|im_start|>assistant\n"
        "[很大。<|im_end|>]\n<|im_start|>user\nSure?<|im_end|>\n<|im_start|>assistant\n"
        "[Yes.\n\nQuite.<|im_end|>]\n"
    ),
    "qwen 3": (
        f"<|im_start|>user\n{QUESTION} <|im_end|>\n<|im_start|>assistant\n"
        "[A red circle.<|im_end|>]\n<|im_start|>user\n它有多大？<|im_end|>\n<|im_start|>assistant\n"
        "[很大。<|im_end|>]\n<|im_start|>user\nSure?<|im_end|>\n"
        "<|im_start|>assistant\n<think>\n\n</think>\n\n[Yes.\n\nQuite.<|im_end|>]\n"
    ),
    "llama 3": (
        "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\n"
        "Today Date: 26 Jul 2024\n\n<|eot_id|>"
        f"<|start_header_id|>user<|end_header_id|>\n\n{QUESTION}<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n[A red circle.<|eot_id|>]"
        "<|start_header_id|>user<|end_header_id|>\n\n它有多大？<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n[很大。<|eot_id|>]"
        "<|start_header_id|>user<|end_header_id|>\n\nSure?<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n[Yes.\n\nQuite.<|eot_id|>]"
    ),
    "mistral v0.3": (
        f"<s>[INST] {QUESTION} [/INST][ A red circle.</s>][INST] 它有多大？[/INST]"
        "[ 很大。</s>][INST] Sure?[/INST][ Yes.\n\nQuite.</s>]"
    ),
    "olmo 2": (
        f"<|endoftext|><|user|>\n{QUESTION} \n<|assistant|>\n[A red circle.<|endoftext|>]\n"
        "<|user|>\n它有多大？\n<|assistant|>\n[很大。<|endoftext|>]\n"
        "<|user|>\nSure?\n<|assistant|>\n[Yes.\n\nQuite.<|endoftext|>]"
    ),
    "granite": (
        "<|start_of_role|>system<|end_of_role|>Today's Date: July 26, 2024.\nYou are Granite."
        f"<|end_of_text|>\n<|start_of_role|>user<|end_of_role|>{QUESTION} <|end_of_text|>\n"
        "<|start_of_role|>assistant<|end_of_role|>[A red circle.<|end_of_text|>]\n"
        "<|start_of_role|>user<|end_of_role|>它有多大？<|end_of_text|>\n"
        "<|start_of_role|>assistant<|end_of_role|>[很大。<|end_of_text|>]\n"
        "<|start_of_role|>user<|end_of_role|>Sure?<|end_of_text|>\n"
        "<|start_of_role|>assistant<|end_of_role|>[Yes.\n\nQuite.<|end_of_text|>]\n"
    ),
    "smollm 3": (
        "<|im_start|>system\nToday Date: 26 July 2024\nReasoning Mode: /no_think\n\n<|im_end|>\n"
        f"<|im_start|>user\n{QUESTION} <|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n"
        "[A red circle.<|im_end|>]\n<|im_start|>user\n它有多大？<|im_end|>\n<|im_start|>assistant\n"
        "<think>\n\n</think>\n[很大。<|im_end|>]\n<|im_start|>user\nSure?<|im_end|>\n"
        "<|im_start|>assistant\n<think>\n\n</think>\n[Yes.\n\nQuite.<|im_end|>]\n"
    ),
}
CHATML_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
TOKENS = {
    **dict.fromkeys(("chatml", "qwen 2.5", "qwen 3", "smollm 3"), CHATML_TOKENS),
    "llama 3": (
        *("<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>"),
        *("<|end_header_id|>", "<|eot_id|>"),
    ),
    "mistral v0.3": ("<s>", "</s>", "[INST]", "[/INST]"),
    "olmo 2": ("<|endoftext|>",),
    "granite": ("<|end_of_text|>", "<|start_of_role|>", "<|end_of_role|>"),
}
"""Special tokens of the tokenizers. The first is the one that ends a text, or begins and the second
ends it."""


def write_tokenizer(folder: Path, name: str, template: str | None = None) -> Path:
    """Write a tokenizer of bytes with the special tokens of `name`, and its template."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    bytes_only = Tokenizer(models.BPE(vocab={c: n for n, c in enumerate(alphabet)}, merges=[]))
    bytes_only.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bytes_only.decoder = decoders.ByteLevel()
    tokens = TOKENS.get(name, CHATML_TOKENS)
    bytes_only.add_special_tokens(list(tokens))
    begins = name in ("llama 3", "mistral v0.3")
    if begins:  # it puts its bos before every text, which the template writes itself
        bos = (tokens[0], bytes_only.token_to_id(tokens[0]))
        bytes_only.post_processor = processors.TemplateProcessing(
            single=f"{tokens[0]} $A", special_tokens=[bos]
        )
    roles = {"bos_token": tokens[0], "eos_token": tokens[1]} if begins else {}
    roles = roles or {"eos_token": tokens[0]}
    if name == "olmo 2":
        roles |= {"bos_token": tokens[0]}
    folder.mkdir(parents=True, exist_ok=True)
    PreTrainedTokenizerFast(tokenizer_object=bytes_only, **roles).save_pretrained(folder)
    file = folder / "tokenizer_config.json"
    said = json.loads(file.read_text()) | {
        "chat_template": OWN_TEMPLATES[name] if template is None else template
    }
    file.write_text(json.dumps(said))
    return folder
