"""Train the miniature tokenizer: sentencepiece BPE with Yi's options and special token ids."""

from __future__ import annotations

import io
import json
import re
import string
from collections.abc import Iterator
from pathlib import Path

import sentencepiece

from vlbench.data.chat_template import YI_VL
from vlbench.data.sample import ChatTurn
from vlbench.data.scene_albums import PICTURE_NAMES, album_heading
from vlbench.data.scene_dataset import CAPTION_PROMPTS
from vlbench.data.scene_families import (
    FAMILY_WEIGHTS,
    list_picture_questions,
    make_pictures,
    picture_caption,
)
from vlbench.data.scene_text import CELL_NAMES, CHINESE_WORDS, LANGUAGES, NUMBER_WORDS
from vlbench.data.tokenizer import Tokenizer

VOCAB_SIZE = 1000
# Ids 3 to 9; those of Yi that matter are 6 and 7.
SPECIAL_SYMBOLS = (
    "<|Human|>",
    "<|Assistant|>",
    "<|System|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|im_sep|>",
    "\n",
)
_NEWLINE_PLACEHOLDER = "<|nl-placeholder|>"  # the trainer cannot take "\n" itself
_PIECE_BOUNDARY = "\t"  # no piece reaches across it
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
    *("图中有", "几个", "物体", "图中写着", "哪些字母", "哪个物体", "上有", "圆点", "什么", "里"),
    *PICTURE_NAMES["zh"],
    *("什么颜色", "什么形状", "在哪里", "哪一边", "描述这张图片"),
    *("左边", "右边", "上边", "下边", "，", "。", "：", "？", "、", "的", "是", "在", "有"),
    *CELL_NAMES["zh"],
    *NUMBER_WORDS["zh"],
    *CHINESE_WORDS.values(),
)
_TOKENIZER_CONFIG = {
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
_COMMON_WORDS = (
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


def create_tokenizer(folder: Path) -> dict[str, int]:
    """Train the tokenizer, write it in Hugging Face's layout, and return its figures."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer.model").write_bytes(_restore_newline(_train_sentencepiece()))
    text = json.dumps(_TOKENIZER_CONFIG, indent=2) + "\n"
    (folder / "tokenizer_config.json").write_text(text, encoding="utf-8")
    tokenizer = Tokenizer.load(folder)
    prompt = tokenizer.encode(YI_VL.system + YI_VL.after_system)
    return {"pieces": tokenizer.vocab_size, "system_prompt_tokens": len(prompt)}


def _train_sentencepiece() -> bytes:
    model = io.BytesIO()
    symbols = [_NEWLINE_PLACEHOLDER if symbol == "\n" else symbol for symbol in SPECIAL_SYMBOLS]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=_training_lines(),
        model_writer=model,
        model_type="bpe",
        vocab_size=VOCAB_SIZE,
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
        pretokenization_delimiter=_PIECE_BOUNDARY,
        unk_id=0,
        bos_id=1,
        eos_id=2,
        pad_id=-1,
        bos_piece="<|startoftext|>",
        eos_piece="<|endoftext|>",
        minloglevel=2,
    )
    return model.getvalue()


def _training_lines() -> Iterator[str]:
    """Give the text to learn pieces from: the world, the system prompt, and every ASCII sign."""
    units = re.compile(
        "(" + "|".join(sorted(map(re.escape, _ZH_UNITS), key=len, reverse=True)) + ")"
    )
    written = re.compile(r"(?<=[\"A-Z])(?=[\"A-Z])")  # every letter of "HALO" is a piece
    for line in _scene_lines():
        line = written.sub(_PIECE_BOUNDARY, line)
        yield units.sub(rf"{_PIECE_BOUNDARY}\1{_PIECE_BOUNDARY}", line)
    for _ in range(3000):
        yield units.sub(rf"{_PIECE_BOUNDARY}\1{_PIECE_BOUNDARY}", YI_VL.system)
    for _ in range(40):
        yield _COMMON_WORDS
    for _ in range(20):
        yield from (
            f"{sign} " for sign in string.ascii_letters + string.digits + string.punctuation
        )
    for language in LANGUAGES:
        yield from CELL_NAMES[language]


def _scene_lines(scene_count: int = 1500) -> Iterator[str]:
    """Give captions and all questions with their answers, alone and as lines of conversations.

    Every fourth number has pictures of all families, as they have more questions than gist alone.
    """
    for index in range(scene_count):
        for family in FAMILY_WEIGHTS if index % 4 == 0 else ("gist",):
            pictures = make_pictures(family, "tokenizer", 0, index, has_dot=index % 8 == 0)
            for language in LANGUAGES:
                asked = [
                    (one.text, one.answer) for one in list_picture_questions(pictures, language)
                ]
                if len(pictures) > 1:
                    yield from album_heading([""] * len(pictures), language).split("\n")
                else:
                    caption = picture_caption(pictures[0], language)
                    asked.append((CAPTION_PROMPTS[language], caption))
                for question, answer in asked:
                    turns = ChatTurn("human", question), ChatTurn("assistant", answer)
                    yield from (question, answer)
                    text = "".join(text for text, _ in YI_VL.render_pieces(turns))
                    yield from text.split("\n")[2:]


def _restore_newline(model: bytes) -> bytes:
    """Write the true newline over its stand-in."""
    from sentencepiece import sentencepiece_model_pb2

    proto = sentencepiece_model_pb2.ModelProto()  # type: ignore[attr-defined]
    proto.ParseFromString(model)
    for piece in proto.pieces:
        if piece.piece == _NEWLINE_PLACEHOLDER:
            piece.piece = "\n"
    return bytes(proto.SerializeToString())
