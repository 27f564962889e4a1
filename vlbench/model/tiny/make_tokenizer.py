"""Make the miniature tokenizer: sentencepiece BPE with Yi's habits and Yi's special ids."""

from __future__ import annotations

import io
import json
import re
import string
from collections.abc import Iterator
from pathlib import Path

import sentencepiece

from vlbench.data.sample import Turn
from vlbench.data.scene_text import CELLS, LANGUAGES, NUMBERS, ZH, caption, questions
from vlbench.data.scene_world import scene
from vlbench.data.scenes import DESCRIBE
from vlbench.data.template import YI_VL
from vlbench.data.tokenizer import Tokenizer

PIECES = 1000
# Ids 3 to 9; those of Yi that matter are 6 and 7.
SYMBOLS = (
    "<|Human|>",
    "<|Assistant|>",
    "<|System|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|im_sep|>",
    "\n",
)
_NEWLINE = "<|nl-placeholder|>"  # the trainer cannot take "\n" itself
_BOUND = "\t"  # no piece reaches across it
# Chinese has no spaces; without bounds "green star" would become one piece, or never be met.
_ZH_UNITS = (
    *(
        "这是一个",
        "好奇的人类",
        "和一个人工智能助手",
        "之间的对话",
        "假设你",
        "扮演这个AI助手的角色",
    ),
    *(
        "仔细阅读",
        "所有的图像",
        "并对人类的问题",
        "做出信息丰富",
        "有帮助",
        "详细的",
        "和礼貌的回答",
    ),
    *("图中有", "几个", "物体", "什么颜色", "什么形状", "在哪里", "哪一边", "描述这张图片"),
    *("左边", "右边", "上边", "下边", "，", "。", "：", "？", "、", "的", "是", "在", "有"),
    *CELLS["zh"],
    *NUMBERS["zh"],
    *ZH.values(),
)
_CONFIG = {
    "tokenizer_class": "LlamaTokenizer",
    "bos_token": "<|startoftext|>",
    "eos_token": "<|endoftext|>",
    "unk_token": "<unk>",
    "pad_token": "<unk>",
    "add_bos_token": False,
    "add_eos_token": False,
    "legacy": True,
    "clean_up_tokenization_spaces": False,
    "model_max_length": 4096,
    "padding_side": "right",
    "sp_model_kwargs": {},
}
# Ordinary words, so that other text is not spelt letter by letter.
_COMMON = (
    "the of and a to in is it you that he was for on are with as I his they be at one have this "
    "from or had by hot but some what there we can out other were all your when up use word how "
    "said an each she which do their time if will way about many then them would write like so "
    "these her long make thing see him two has look more day could go come did my sound no most "
    "number who over know water than call first people may down side been now find any new work "
    "part take get place made live where after back little only round man year came show every "
    "good me give our under name very through just form much great think say help low line "
    "before turn cause same mean differ move right boy old too does tell sentence set three want "
    "air well also play small end put home read hand port large spell add even land here must big "
    "high such follow act why ask men change went light kind off need house picture try us again "
    "white brown grey pink orange photo image shows table cat dog street building tree sky"
)


def make(folder: Path) -> dict[str, int]:
    """Train the tokenizer, write it to `folder` in Hugging Face's layout, and give its figures."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer.model").write_bytes(_with_newline(_train()))
    text = json.dumps(_CONFIG, indent=2) + "\n"
    (folder / "tokenizer_config.json").write_text(text, encoding="utf-8")
    tokenizer = Tokenizer.load(folder)
    prompt = tokenizer.encode(YI_VL.system + YI_VL.after_system)
    return {"pieces": tokenizer.size, "system_prompt_tokens": len(prompt)}


def _train() -> bytes:
    model = io.BytesIO()
    symbols = [_NEWLINE if symbol == "\n" else symbol for symbol in SYMBOLS]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=_lines(),
        model_writer=model,
        model_type="bpe",
        vocab_size=PIECES,
        character_coverage=1.0,
        normalization_rule_name="identity",
        add_dummy_prefix=False,
        remove_extra_whitespaces=False,
        split_digits=True,
        allow_whitespace_only_pieces=True,
        byte_fallback=True,
        hard_vocab_limit=True,
        max_sentence_length=16384,
        num_threads=1,
        user_defined_symbols=symbols,
        pretokenization_delimiter=_BOUND,
        unk_id=0,
        bos_id=1,
        eos_id=2,
        pad_id=-1,
        bos_piece="<|startoftext|>",
        eos_piece="<|endoftext|>",
        minloglevel=2,
    )
    return model.getvalue()


def _lines() -> Iterator[str]:
    """Give the text to learn pieces from: the world, the system prompt, and every ASCII sign."""
    units = re.compile(
        "(" + "|".join(sorted(map(re.escape, _ZH_UNITS), key=len, reverse=True)) + ")"
    )
    for line in _world():
        yield units.sub(rf"{_BOUND}\1{_BOUND}", line)
    for _ in range(3000):
        yield units.sub(rf"{_BOUND}\1{_BOUND}", YI_VL.system)
    for _ in range(40):
        yield _COMMON
    for _ in range(20):
        yield from (
            f"{sign} " for sign in string.ascii_letters + string.digits + string.punctuation
        )
    for language in LANGUAGES:
        yield from CELLS[language]


def _world(scenes: int = 1500) -> Iterator[str]:
    """Give captions and all questions with their answers, alone and as lines of conversations."""
    for index in range(scenes):
        told = scene("tokenizer", 0, index)
        for language in LANGUAGES:
            asked = [(one.text, one.answer) for one in questions(told, language)]
            for question, answer in [(DESCRIBE[language], caption(told, language)), *asked]:
                turns = Turn("human", question), Turn("assistant", answer)
                yield from (question, answer)
                yield from "".join(text for text, _ in YI_VL.pieces(turns)).split("\n")[2:]


def _with_newline(model: bytes) -> bytes:
    """Write the true newline over its stand-in."""
    from sentencepiece import sentencepiece_model_pb2

    proto = sentencepiece_model_pb2.ModelProto()  # type: ignore[attr-defined]
    proto.ParseFromString(model)
    for piece in proto.pieces:
        if piece.piece == _NEWLINE:
            piece.piece = "\n"
    return bytes(proto.SerializeToString())
