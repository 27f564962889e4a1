"""Captions as a text encoder reads them: begin, words, end, padding. For stage objectives."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from vlbench.data.tokenizer import Tokenizer
from vlbench.errors import UserError, one_line
from vlbench.model.language_model import TINY_LANGUAGE_FOLDER
from vlbench.model.weights.hub_download import fetch_hub_folder

EMBEDDED = "embedded"
BERT_FILES_WANTED = "tokenizer.json or vocab.txt of a BERT"
BERT_FILE_PATTERNS = ("*.json", "vocab.txt", "model*.safetensors", "pytorch_model*.bin")


@dataclass(frozen=True)
class CaptionTokenizer:
    """How a text encoder's tokenizer writes a caption; `begin`, `end` and `pad` are ids."""

    encode: Callable[[str], Sequence[int]]
    """Text to ids, nothing put before or after it."""
    vocab_size: int
    """Number of ids."""
    start_token_id: int
    end_token_id: int
    pad_token_id: int

    def __call__(self, captions: Sequence[str], max_length: int) -> tuple[Tensor, Tensor]:
        """Return ids and mask (1 at what is not padding), both `[captions, length]` int64.

        A caption that is longer is cut before its end token.
        """
        ids = torch.full((len(captions), max_length), self.pad_token_id)
        mask = torch.zeros(len(captions), max_length, dtype=torch.long)
        for row, caption in enumerate(captions):
            words = [
                self.start_token_id,
                *list(self.encode(caption))[: max_length - 2],
                self.end_token_id,
            ]
            ids[row, : len(words)] = torch.tensor(words)
            mask[row, : len(words)] = 1
        return ids, mask


def load_caption_tokenizer(source: str, key: str) -> CaptionTokenizer:
    """Return the tokens of `source`: "embedded" (the miniatures' own), a BERT folder or hub id.

    `key` names it in a mistake.
    """
    if source == EMBEDDED:
        own = Tokenizer.load(TINY_LANGUAGE_FOLDER)
        return CaptionTokenizer(
            own.encode, own.vocab_size, own.bos_token_id, own.eos_token_id, own.unk_token_id
        )
    folder = find_bert_folder(source, key)
    from transformers import AutoTokenizer

    try:
        theirs = AutoTokenizer.from_pretrained(folder)
    except Exception as error:  # of a dozen kinds, by what is wrong with which file
        raise UserError(
            f"{key} is '{source}', which has no tokenizer ({one_line(error)})"
        ) from error
    if theirs.cls_token_id is None or theirs.sep_token_id is None or theirs.pad_token_id is None:
        raise UserError(f"{key} is '{source}', whose tokenizer has no [CLS], [SEP] or [PAD]")

    def encode(text: str) -> list[int]:
        return list(theirs.encode(text, add_special_tokens=False))

    special = (theirs.cls_token_id, theirs.sep_token_id, theirs.pad_token_id)
    return CaptionTokenizer(encode, len(theirs), *special)


def find_bert_folder(source: str, key: str) -> Path:
    """Return the local folder of a BERT; `key` names it in a mistake."""
    name = source if "/" in source or Path(source).is_dir() else f"google-bert/{source}"
    return fetch_hub_folder(name, key, BERT_FILES_WANTED, "folder of a BERT", BERT_FILE_PATTERNS)
