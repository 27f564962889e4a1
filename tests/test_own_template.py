"""`language.template=auto`: what tokenizers' own templates write, and what of it is supervised."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import pytest
from own_templates import CONVERSATION, EXPECTED, OWN_TEMPLATES, TOKENS, write_tokenizer
from transformers import AutoTokenizer

from vlbench.data.chat_template import ChatTemplate
from vlbench.data.image_processing import ImageTransform
from vlbench.data.own_template import bind_template
from vlbench.data.sample import IMAGE_PLACEHOLDER, ChatTurn, Sample
from vlbench.data.sample_encoding import (
    IGNORE_INDEX,
    IMAGE_TOKEN_INDEX,
    SampleEncoder,
    tokenize_pieces,
)
from vlbench.data.tokenizer import Tokenizer
from vlbench.errors import BadSample, UserError
from vlbench.model.weights.exported_template import to_jinja_template
from vlbench.processor import Processor
from vlbench.train.run_report import show_inputs

ENDS = {"chatml": "<|im_end|>", "llama 3": "<|eot_id|>", "mistral v0.3": "</s>"}
ENDS |= {"olmo 2": "<|endoftext|>", "granite": "<|end_of_text|>"}
TEXTS = CONVERSATION[2:]  # without the image


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tokenizer]:
    parent = tmp_path_factory.mktemp("tokenizers")
    return {n: Tokenizer.load(write_tokenizer(parent / n, n)) for n in OWN_TEMPLATES}


def load_template(folder: Path, jinja: str, name: str = "chatml") -> ChatTemplate:
    return bind_template("auto", Tokenizer.load(write_tokenizer(folder, name, jinja)))


def bracketed(template: ChatTemplate, turns: tuple[ChatTurn, ...]) -> str:
    pieces = template.render_pieces(turns)
    return "".join(f"[{text}]" if supervised else text for text, supervised in pieces)


def messages(turns: tuple[ChatTurn, ...]) -> list[dict[str, str]]:
    roles = {"human": "user", "assistant": "assistant", "system": "system"}
    return [{"role": roles[t.role], "content": t.text} for t in turns]


@pytest.mark.parametrize("name", OWN_TEMPLATES)
def test_answers_and_their_ends_are_supervised(name, tokenizers):
    template = bind_template("auto", tokenizers[name])
    assert bracketed(template, CONVERSATION) == EXPECTED[name]
    assert template.stop == ENDS.get(name, "<|im_end|>")
    assert bracketed(pickle.loads(pickle.dumps(template)), CONVERSATION) == EXPECTED[name]


@pytest.mark.parametrize("name", OWN_TEMPLATES)
def test_a_prompt_is_what_an_answer_was_learned_behind(name, tokenizers):
    template = bind_template("auto", tokenizers[name])
    for count in (1, 3, 5):
        pieces = template.render_pieces(CONVERSATION[: count + 1])
        context = "".join(text for text, _ in pieces[: pieces.index(pieces[-1]) + 1])
        answer = next(text for text, supervised in reversed(pieces) if supervised)
        prompt = template.render_prompt(CONVERSATION[:count])
        assert context.startswith(prompt + answer) and prompt.count(IMAGE_PLACEHOLDER) == 1


@pytest.mark.parametrize("name", OWN_TEMPLATES)
def test_ids_are_those_of_transformers(name, tokenizers):
    """Of whole conversations, begin of text and dates included; and labels are the answers."""
    tokenizer = tokenizers[name]
    template = bind_template("auto", tokenizer)
    theirs = AutoTokenizer.from_pretrained(tokenizer.folder, trust_remote_code=False)
    options = {"enable_thinking": False, "date_string": "26 Jul 2024"}
    encoder = SampleEncoder(tokenizer, template, 3, 4096)
    encoded = encoder.encode(Sample("s", TEXTS))
    if name not in ("granite", "smollm 3"):  # which ask for the day of today
        text = theirs.apply_chat_template(messages(TEXTS), tokenize=False, **options)
        assert encoded.input_ids == theirs.encode(text, add_special_tokens=False)
    learned = [label for label in encoded.labels if label != IGNORE_INDEX]
    supervised = [text for text, is_answer in template.render_pieces(TEXTS) if is_answer]
    assert tokenizer.decode(learned, keep_special=True) == "".join(supervised)
    if name in ("llama 3", "mistral v0.3"):  # the template and the tokenizer both begin with it
        assert encoded.input_ids.count(tokenizer.named_tokens[TOKENS[name][0]]) == 1


@pytest.mark.parametrize("name", OWN_TEMPLATES)
def test_what_an_export_writes_gives_the_same_ids(name, tokenizers, tmp_path):
    """With one begin of text, whether the template or the tokenizer writes it; with our date."""
    tokenizer = tokenizers[name]
    theirs = AutoTokenizer.from_pretrained(tokenizer.folder, trust_remote_code=False)
    adds_bos = name in ("llama 3", "mistral v0.3")
    template = bind_template("auto", tokenizer)
    jinja = to_jinja_template(template, adds_bos)
    for turns in (TEXTS[:1], TEXTS[:3]):
        text = theirs.apply_chat_template(messages(turns), chat_template=jinja, tokenize=False)
        assert theirs(text).input_ids == prompt_ids(template, tokenizer, turns)
    assert to_jinja_template(load_template(tmp_path, jinja, name), adds_bos) == jinja
    back = Tokenizer.load(tmp_path)
    ids = prompt_ids(bind_template("auto", back), back, TEXTS[:3])
    assert ids == prompt_ids(template, tokenizer, TEXTS[:3])


def prompt_ids(template: ChatTemplate, tokenizer: Tokenizer, turns: tuple[ChatTurn, ...]) -> list:
    text = template.render_prompt(turns)
    pieces = tokenize_pieces([(text, False)], tokenizer, 1, template.has_all_tokens)
    return [token_id for ids, _ in pieces for token_id in ids]


def test_images_stay_where_they_belong(tokenizers):
    encoder = SampleEncoder(
        tokenizers["llama 3"], bind_template("auto", tokenizers["llama 3"]), 3, 4096
    )
    encoded = encoder.encode(Sample("s", CONVERSATION, (object(),)))
    begin = encoded.input_ids.index(IMAGE_TOKEN_INDEX)
    assert encoded.input_ids[begin : begin + 3] == [IMAGE_TOKEN_INDEX] * 3
    before = tokenizers["llama 3"].decode(encoded.input_ids[:begin], keep_special=True)
    assert before.endswith("user<|end_header_id|>\n\n")


def test_thoughts_of_earlier_turns_are_left_out_and_of_the_last_one_learned(tokenizers):
    template = bind_template("auto", tokenizers["qwen 3"])
    thinking = (
        ChatTurn("human", "a"),
        ChatTurn("assistant", "<think>\nlong\n</think>\n\nb"),
        ChatTurn("human", "c"),
        ChatTurn("assistant", "<think>\nshort\n</think>\n\nd"),
    )
    assert bracketed(template, thinking) == (
        "<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\n[b<|im_end|>]\n"
        "<|im_start|>user\nc<|im_end|>\n<|im_start|>assistant\n"
        "[<think>\nshort\n</think>\n\nd<|im_end|>]\n"
    )


def test_marks_of_a_template_say_where_a_rewritten_answer_lies(tmp_path):
    jinja = (
        "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}{% if m.role == 'assistant' %}"
        "{% generation %}{{ m.content.replace('colour', 'color') }}{% endgeneration %}"
        "{% else %}{{ m.content }}{% endif %}{{ '<|im_end|>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    )
    turns = (ChatTurn("human", "a"), ChatTurn("assistant", "a colour"))
    assert bracketed(load_template(tmp_path, jinja), turns) == (
        "<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\n[a color<|im_end|>]\n"
    )


SYSTEM = ChatTurn("system", "Be brief.")


@pytest.mark.parametrize(
    ("name", "begin"),
    [
        ("chatml", "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n"),
        ("qwen 2.5", "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n"),
        ("qwen 3", "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n"),
        ("olmo 2", "<|endoftext|><|system|>\nBe brief.\n<|user|>\n"),
        ("granite", "<|start_of_role|>system<|end_of_role|>Be brief.<|end_of_text|>\n"),
    ],
)
def test_a_system_prompt_takes_the_place_of_the_templates_own(name, begin, tokenizers):
    template = bind_template("auto", tokenizers[name])
    assert bracketed(template, (SYSTEM, *TEXTS)).startswith(begin)


def test_a_system_prompt_that_a_template_leaves_out_is_no_sample(tokenizers, tmp_path):
    """Mistral's writes it into a last question, so not where a conversation ends in an answer."""
    tokenizer = tokenizers["mistral v0.3"]
    template = bind_template("auto", tokenizer)
    with pytest.raises(BadSample, match="leaves out the text of turn 1"):
        SampleEncoder(tokenizer, template, 3, 4096).encode(Sample("s", (SYSTEM, *TEXTS)))
    prompt = template.render_prompt((SYSTEM, CONVERSATION[2]))
    assert prompt == "<s>[INST] Be brief.\n\n它有多大？[/INST]"
    later = template.render_prompt((SYSTEM, *TEXTS[:3]))
    assert later.endswith("很大。</s>[INST] Be brief.\n\nSure?[/INST]")
    refusing = (
        "{% if messages[0].role == 'system' %}{{ raise_exception('No system role!') }}{% endif %}"
    )
    template = load_template(tmp_path, refusing + OWN_TEMPLATES["qwen 2.5"])
    with pytest.raises(UserError, match="it says: No system role!"):
        template.render_prompt((SYSTEM, CONVERSATION[2]))


def test_a_template_without_prompts_gets_the_header_of_its_answers(tmp_path):
    jinja = (
        "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}"
        "{% endfor %}"
    )
    template = load_template(tmp_path, jinja)
    expected = "<|im_start|>user\nSure?<|im_end|>\n<|im_start|>assistant\n"
    assert template.render_prompt(CONVERSATION[4:5]) == expected
    thinking = (
        jinja + "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n<think>' }}{% endif %}"
    )
    assert load_template(tmp_path, thinking).render_prompt(CONVERSATION[4:5]) == expected


REFUSED = {
    "no end": ("{% for m in messages %}{{ m.content + '\n' }}{% endfor %}", "nothing behind"),
    "no answers": (
        "{% for m in messages if m.role == 'user' %}{{ m.content }}{% endfor %}",
        "leaves out the text of turn 2",
    ),
    "only the last turn": ("{{ messages[-1].content }}</s>", "leaves out the text of turn 1"),
    "twice": (
        "{% for m in messages %}{{ m.content + m.content + '<|im_end|>' }}{% endfor %}",
        "repeats or moves",
    ),
    "backwards": (
        "{% for m in messages[::-1] %}{{ m.content + '<|im_end|>' }}{% endfor %}",
        "repeats or moves",
    ),
    "parts": (
        "{% for m in messages %}{% for part in m.content %}{{ part.text }}{% endfor %}{% endfor %}",
        "leaves out the text",
    ),
    "no jinja": ("{% for m in messages %}", "is no Jinja"),
    "unknown name": ("{{ messages[0].content + what }}", "it says: "),
    "endless": (
        "{% for a in range(99999) %}{% endfor %}" + OWN_TEMPLATES["chatml"],
        "counts through 99,999",
    ),
    "huge": ("{{ 'a' * 9999999999 }}", "multiplies"),
    "deep": ("{% for a in b %}" * 5 + "{% endfor %}" * 5, "more than 4 deep"),
    "escape": ("{{ messages.__class__.__mro__ }}", "it says: "),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_template_in_which_answers_cannot_be_found_is_refused(name, tmp_path):
    jinja, reason = REFUSED[name]
    with pytest.raises(UserError, match=reason) as caught:
        load_template(tmp_path, jinja)
    assert len(caught.value.lines) == 1 and "say language.template=NAME" in str(caught.value)


def test_a_tokenizer_without_a_template_is_said(tmp_path):
    with pytest.raises(UserError, match="no chat template of its own; say language.template=NAME"):
        load_template(tmp_path, "")


BROUGHT = "; the tokenizer brings another one, which language.template=auto takes"


@pytest.mark.parametrize(
    ("jinja", "given", "told", "stop"),
    [
        (OWN_TEMPLATES["qwen 3"], "yi_vl", f"yi_vl{BROUGHT}", "###"),
        (OWN_TEMPLATES["qwen 3"], "auto", "auto, the one that the tokenizer brings", "<|im_end|>"),
        (OWN_TEMPLATES["qwen 3"], "chatml", "chatml", "<|im_end|>"),
        ("", "yi_vl", "yi_vl", "###"),
        ("{{ messages }}", "llava_v1", "llava_v1, as the chat template of the", "<|endoftext|>"),
    ],
)
def test_a_run_says_with_which_template_it_is_asked(jinja, given, told, stop, tmp_path, capsys):
    tokenizer = Tokenizer.load(write_tokenizer(tmp_path, "qwen 3", jinja))
    template = bind_template(given, tokenizer)
    transform = ImageTransform(56, 56, (0.5,) * 3, (0.5,) * 3)
    show_inputs(Processor(tokenizer, template, transform, 1, 64, 64))
    image, conversation = capsys.readouterr().out.splitlines()
    assert image.startswith("an image is padded to 56 x 56")
    assert conversation.startswith(f"a conversation is written with language.template={told}")
    assert f"; answers end at '{stop}" in conversation


@pytest.mark.parametrize("kind", ["file", "list"])
def test_where_a_template_is_found(kind, tmp_path):
    write_tokenizer(tmp_path, "chatml", "")
    if kind == "file":
        (tmp_path / "chat_template.jinja").write_text(OWN_TEMPLATES["qwen 2.5"])
    else:
        file = tmp_path / "tokenizer_config.json"
        named = {"tool_use": "{{ tools }}", "default": OWN_TEMPLATES["qwen 2.5"]}
        listed = [{"name": n, "template": text} for n, text in named.items()]
        file.write_text(json.dumps(json.loads(file.read_text()) | {"chat_template": listed}))
    tokenizer = Tokenizer.load(tmp_path)
    again = tmp_path / "again"
    again.mkdir()
    tokenizer.save(again)
    for one in (tokenizer, Tokenizer.load(again)):
        assert bracketed(bind_template("auto", one), CONVERSATION) == EXPECTED["qwen 2.5"]
