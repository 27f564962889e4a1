"""Limits of a tokenizer's files: numbers that no tokenizer has are a line, and no long wait."""

from __future__ import annotations

from pathlib import Path

from vlbench.errors import UserError
from vlbench.text_files import read_json

MAX_ADDED_TOKENS = 20_000
"""Three times as many as any tokenizer in use adds (6,242 of Gemma 3): texts are cut at each."""
MAX_ID_DIGITS = 12
MAX_VOCABULARY = 1_000_000
"""Of a tokenizer.json: four times Gemma's 262,144; two millions take the library half a minute."""
LARGE_TOKENIZER_BYTES = 10_000_000
"""Smaller files of tokenizers cannot have so many entries that reading them takes long."""


def check_vocabulary_size(file: Path) -> None:
    """Refuse a tokenizer.json with more entries than the library reads in seconds."""
    if file.stat().st_size < LARGE_TOKENIZER_BYTES:
        return
    said = read_json(file)
    model = said.get("model")
    lists = [said.get("added_tokens")]
    lists += [model.get("vocab"), model.get("merges")] if isinstance(model, dict) else []
    largest = max((len(e) for e in lists if isinstance(e, list | dict)), default=0)
    if largest > MAX_VOCABULARY:
        raise UserError(
            f"{file}: has a list of {largest:,} entries; at most {MAX_VOCABULARY:,} are read"
        )


def parse_token_id(token_id: object, path: Path) -> int:
    """Return an id, which may be written as text (keys of JSON are)."""
    text = str(token_id)
    if not text.isascii() or not text.isdigit() or len(text) > MAX_ID_DIGITS:
        raise UserError(
            f"{path}: the id of an added token is {token_id!r}; expected is a whole number of at "
            f"most {MAX_ID_DIGITS} digits"
        )
    return int(text)
