"""Limits of a tokenizer's files: numbers that no tokenizer has are a line, and no long wait."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from vlbench.data.tokenizer_patterns import check_patterns
from vlbench.errors import UserError
from vlbench.regular_files import MAX_CONFIG_BYTES
from vlbench.text_files import read_json, refuse_lfs_pointer

MAX_ADDED_TOKENS = 20_000
"""Three times as many as any tokenizer in use adds (6,242 of Gemma 3): texts are cut at each."""
MAX_ID_DIGITS = 12
MAX_VOCABULARY = 1_000_000
"""Of a tokenizer.json: four times Gemma's 262,144; two millions take the library half a minute."""
LIBRARY_FILES = ("tokenizer.json", "tokenizer_config.json", "vocab.txt", "vocab.json", "merges.txt")


def check_library_files(folder: Path) -> None:
    """Refuse a folder's tokenizer files with which the library would hang, before it has them."""
    for name in LIBRARY_FILES:
        if (folder / name).exists():
            refuse_lfs_pointer(folder / name, MAX_CONFIG_BYTES)
    file = folder / "tokenizer.json"
    if file.exists():
        said = read_json(file)
        check_vocabulary_size(said, file)
        check_patterns(said, file)


def check_vocabulary_size(said: dict[str, Any], file: Path) -> None:
    """Refuse a tokenizer.json with more entries than the library reads in seconds."""
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
