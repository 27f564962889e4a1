"""Files of sentencepiece models, as the two manners of the slow Llama tokenizer read them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from sentencepiece import SentencePieceProcessor

from vlbench.errors import UserError
from vlbench.regular_files import MAX_CONFIG_BYTES
from vlbench.text_files import read_config_bytes, refuse_lfs_pointer

_NO_DUMMY_PREFIX = b"\x1a\x02\x18\x00"
"""`normalizer_spec { add_dummy_prefix: false }` of sentencepiece_model.proto (field 3 of both).

Behind a message protocol buffers read it as a change of that one value.
"""


def load_sentencepiece(path: Path, dummy_prefix: bool = True) -> SentencePieceProcessor:
    """Return the model in a file; without `dummy_prefix` it puts no space before a text.

    Raises:
        UserError: there is no such file, or it holds something else.
    """
    if not path.is_file():
        raise UserError(f"there is no tokenizer file {path}, and no tokenizer.json beside it")
    refuse_lfs_pointer(path, MAX_CONFIG_BYTES)
    try:
        if dummy_prefix:
            return SentencePieceProcessor(model_file=str(path))
        return SentencePieceProcessor(model_proto=read_config_bytes(path) + _NO_DUMMY_PREFIX)
    except (RuntimeError, OSError) as error:
        raise UserError(f"{path} is not a sentencepiece model: {error}") from None


def own_role_tokens(pieces: SentencePieceProcessor) -> dict[str, str]:
    """Return the texts of bos, eos and unk that a model itself has, by the names of their roles."""
    ids = {"bos_token": pieces.bos_id(), "eos_token": pieces.eos_id(), "unk_token": pieces.unk_id()}
    return {role: pieces.id_to_piece(token_id) for role, token_id in ids.items() if token_id >= 0}


def find_token_id(
    token: str, pieces: SentencePieceProcessor, added_tokens: Mapping[str, int]
) -> int:
    """Return the id of bos, eos or unk: that of its piece, or of the added token.

    Raises:
        UserError: it is neither.
    """
    piece_id = pieces.piece_to_id(token)
    if pieces.id_to_piece(piece_id) == token:
        return int(piece_id)
    if token not in added_tokens:
        raise UserError(f"the tokenizer has a role for the token '{token}', which it does not hold")
    return added_tokens[token]
