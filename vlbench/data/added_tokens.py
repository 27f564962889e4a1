"""Which tokens the small files of a checkpoint add to its sentencepiece model."""

from __future__ import annotations

from pathlib import Path

from vlbench.data.tokenizer_limits import parse_token_id
from vlbench.errors import UserError
from vlbench.text_files import read_json


def token_text(token: object, default: str) -> str:
    """Return the text of a token, which may be written as an object with `content`."""
    if isinstance(token, dict):
        token = token.get("content")
    return token if isinstance(token, str) else default


def listed_special_tokens(config: dict[str, object]) -> list[str]:
    """Return the texts of the special tokens beside bos, eos and unk."""
    tokens = [config.get("pad_token")]
    # transformers 4 writes the first key, transformers 5 the second
    for key in ("additional_special_tokens", "extra_special_tokens"):
        listed = config.get(key)
        tokens += listed if isinstance(listed, list) else []
    return [name for name in (token_text(token, "") for token in tokens) if name]


def read_added_tokens(config: dict[str, object], folder: Path, piece_count: int) -> dict[str, int]:
    """Return the tokens that a checkpoint adds to its sentencepiece model, with their ids.

    transformers 5 writes them into tokenizer.json alone, in some versions together with pieces of
    the model: only ids from `piece_count` on are taken from there.
    """
    added: dict[str, int] = {}
    decoder = config.get("added_tokens_decoder")
    if isinstance(decoder, dict):
        file = folder / "tokenizer_config.json"
        added = {
            token_text(token, ""): parse_token_id(index, file) for index, token in decoder.items()
        }
    path = folder / "added_tokens.json"
    if path.is_file():
        added |= {name: parse_token_id(index, path) for name, index in read_json(path).items()}
    path = folder / "tokenizer.json"
    if not added and path.is_file():
        for token in read_json(path).get("added_tokens") or []:
            token_id = parse_token_id(token.get("id"), path)
            if token_id >= piece_count:
                added[token_text(token, "")] = token_id
    return added


def check_added_ids(ids: list[int], piece_count: int, folder: Path) -> None:
    """Refuse ids of added tokens that do not follow the pieces of the model."""
    if sorted(ids) != list(range(piece_count, piece_count + len(ids))):
        raise UserError(
            f"the added tokens of {folder} do not follow its {piece_count} pieces: {ids}"
        )
