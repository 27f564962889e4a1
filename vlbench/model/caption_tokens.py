"""Captions as a text encoder reads them: begin, words, end, padding. For stage objectives."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from vlbench.data.tokenizer import Tokenizer
from vlbench.mistakes import Mistake
from vlbench.model.language import TINY
from vlbench.model.weights.hub import fetch

EMBEDDED = "embedded"
FILES = "tokenizer.json or vocab.txt of a BERT"
PATTERNS = ("*.json", "vocab.txt", "model*.safetensors", "pytorch_model*.bin")


@dataclass(frozen=True)
class CaptionTokens:
    """How a text encoder's tokenizer writes a caption; `begin`, `end` and `pad` are ids."""

    encode: Callable[[str], Sequence[int]]
    """Text to ids, nothing put before or after it."""
    vocabulary: int
    """Number of ids."""
    begin: int
    end: int
    pad: int

    def __call__(self, captions: Sequence[str], length: int) -> tuple[Tensor, Tensor]:
        """Return ids and mask (1 at what is not padding), both `[captions, length]` int64.

        A caption that is longer is cut before its end token.
        """
        ids = torch.full((len(captions), length), self.pad)
        mask = torch.zeros(len(captions), length, dtype=torch.long)
        for row, caption in enumerate(captions):
            words = [self.begin, *list(self.encode(caption))[: length - 2], self.end]
            ids[row, : len(words)] = torch.tensor(words)
            mask[row, : len(words)] = 1
        return ids, mask


def caption_tokens(source: str, key: str) -> CaptionTokens:
    """Return the tokens of `source`: "embedded" (the miniatures' own), a BERT folder or hub id.

    `key` names it in a mistake.
    """
    if source == EMBEDDED:
        own = Tokenizer.load(TINY)
        return CaptionTokens(own.encode, own.size, own.bos, own.eos, own.unk)
    folder = bert_folder(source, key)
    from transformers import AutoTokenizer

    try:
        theirs = AutoTokenizer.from_pretrained(folder)
    except Exception as error:  # of a dozen kinds, by what is wrong with which file
        reason = " ".join(str(error).split())[:200]
        raise Mistake(f"{key} is '{source}', which has no tokenizer ({reason})") from error
    if theirs.cls_token_id is None or theirs.sep_token_id is None or theirs.pad_token_id is None:
        raise Mistake(f"{key} is '{source}', whose tokenizer has no [CLS], [SEP] or [PAD]")

    def encode(text: str) -> list[int]:
        return list(theirs.encode(text, add_special_tokens=False))

    special = (theirs.cls_token_id, theirs.sep_token_id, theirs.pad_token_id)
    return CaptionTokens(encode, len(theirs), *special)


def bert_folder(source: str, key: str) -> Path:
    """Return the local folder of a BERT; `key` names it in a mistake."""
    name = source if "/" in source or Path(source).is_dir() else f"google-bert/{source}"
    return fetch(name, key, FILES, "folder of a BERT", PATTERNS)
