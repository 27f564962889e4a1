"""Tokenised captions for stage objectives: start token, text, end token, padding."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from vlbench.data.tokenizer import Tokenizer, load_library_tokenizer
from vlbench.errors import UserError, one_line
from vlbench.hub_download import fetch_hub_folder
from vlbench.model.language_model import TINY_LANGUAGE_FOLDER

EMBEDDED = "embedded"
BERT_FILES_WANTED = "tokenizer.json or vocab.txt of a BERT"
BERT_FILE_PATTERNS = ("*.json", "vocab.txt", "model*.safetensors", "pytorch_model*.bin")


@dataclass(frozen=True)
class CaptionTokenizer:
    """A text encoder's tokenizer and the special tokens that it puts around a caption."""

    encode: Callable[[str], Sequence[int]]
    """Text to ids, without special tokens."""
    vocab_size: int
    """Number of ids."""
    start_token_id: int
    end_token_id: int
    pad_token_id: int

    def __call__(self, captions: Sequence[str], max_length: int) -> tuple[Tensor, Tensor]:
        """Return ids and mask (0 at padding), both `[captions, max_length]` int64.

        A longer caption is cut before its end token.
        """
        ids = torch.full((len(captions), max_length), self.pad_token_id)
        mask = torch.zeros(len(captions), max_length, dtype=torch.long)
        for row, caption in enumerate(captions):
            tokens = [
                self.start_token_id,
                *list(self.encode(caption))[: max_length - 2],
                self.end_token_id,
            ]
            ids[row, : len(tokens)] = torch.tensor(tokens)
            mask[row, : len(tokens)] = 1
        return ids, mask


def load_caption_tokenizer(source: str, key: str) -> CaptionTokenizer:
    """Return the tokenizer of `source`: "embedded" (the miniatures'), a BERT folder or a hub id.

    Errors call it `key`.
    """
    if source == EMBEDDED:
        tiny = Tokenizer.load(TINY_LANGUAGE_FOLDER)
        return CaptionTokenizer(
            tiny.encode, tiny.vocab_size, tiny.bos_token_id, tiny.eos_token_id, tiny.unk_token_id
        )
    folder = find_bert_folder(source, key)
    try:
        tokenizer = load_library_tokenizer(folder)
    except UserError:
        raise
    except Exception as error:  # of a dozen kinds, by what is wrong with which file
        raise UserError(
            f"{key} is '{source}', which has no tokenizer ({one_line(error)})"
        ) from error
    special_ids = (tokenizer.cls_token_id, tokenizer.sep_token_id, tokenizer.pad_token_id)
    if None in special_ids:
        raise UserError(f"{key} is '{source}', whose tokenizer has no [CLS], [SEP] or [PAD]")

    def encode(text: str) -> list[int]:
        return list(tokenizer.encode(text, add_special_tokens=False))

    return CaptionTokenizer(encode, len(tokenizer), *special_ids)


def find_bert_folder(source: str, key: str) -> Path:
    """Return the local folder of a BERT, downloaded if needed; errors call it `key`."""
    name = source if "/" in source or Path(source).is_dir() else f"google-bert/{source}"
    return fetch_hub_folder(name, key, BERT_FILES_WANTED, "folder of a BERT", BERT_FILE_PATTERNS)
