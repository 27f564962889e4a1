"""Yi's tokenizer: sentencepiece underneath, in the manner of the slow Llama tokenizer.

The strings of the special tokens are cut out first and become their ids; every rest goes to
sentencepiece as it is. This is what the reference does (`legacy=true`); the fast tokenizers of
transformers 5 differ from it on texts with images, odd spaces and broken bytes.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType

from sentencepiece import SentencePieceProcessor

from vlbench.errors import UserError
from vlbench.text_files import read_json, refuse_lfs_pointer

SPECIAL_TOKENS = ("<|startoftext|>", "<|endoftext|>", "<unk>")  # bos, eos, unk of Yi
TOKENIZER_FILES = (
    *("tokenizer.model", "tokenizer_config.json"),
    *("special_tokens_map.json", "added_tokens.json"),
)
_PIECE_SPACE = "\u2581"  # how sentencepiece writes a space


class Tokenizer:
    """Turn text into ids and back.

    `bos`, `eos` and `unk` are ids; `folder` is where its files are. `add_bos` puts `bos` before
    every encoded text, as the `add_bos_token` of a checkpoint asks; Yi-VL does not. `added` (given
    as `extra`) are further tokens that are cut out of a text, with their ids, among the pieces of
    the sentencepiece model or beyond them; those in `kept` are no special tokens and stay in a
    decoded text. `special_added` are the others that are not bos, eos or unk.
    """

    def __init__(
        self,
        model_file: str | Path,
        special_tokens: Sequence[str] = SPECIAL_TOKENS,
        add_bos_token: bool = False,
        added_tokens: Mapping[str, int] = MappingProxyType({}),
        non_special_tokens: Collection[str] = (),
    ) -> None:
        self.folder = Path(model_file).parent
        self.file_contents = read_existing_files(self.folder, TOKENIZER_FILES)
        self._sentencepiece = _load_sentencepiece(Path(model_file))
        self._token_ids = {
            name: _find_token_id(name, self._sentencepiece, added_tokens) for name in special_tokens
        } | dict(added_tokens)
        self.vocab_size = max(
            self._sentencepiece.get_piece_size(), 1 + max(self._token_ids.values())
        )
        self.bos_token_id, self.eos_token_id, self.unk_token_id = (
            self._token_ids[name] for name in special_tokens[:3]
        )
        self.add_bos_token, self.added_tokens = add_bos_token, dict(added_tokens)
        self.embedding_rows = (
            self.vocab_size
        )  # of the model's embedding; `limit` says so where it has fewer
        self._token_names = {index: name for name, index in self._token_ids.items()}
        self._non_special_ids = {self._token_ids[name] for name in non_special_tokens}
        self.added_special_tokens = [
            name
            for name in added_tokens
            if name not in non_special_tokens and name not in special_tokens
        ]
        longest_first = sorted(self._token_ids, key=len, reverse=True)
        self._token_pattern = re.compile(f"({'|'.join(map(re.escape, longest_first))})")
        # Where all tokens begin with "<", a text without it needs no cutting.
        self._token_prefix = "<" if all(name.startswith("<") for name in self._token_ids) else ""

    @classmethod
    def load(cls, folder: str | Path, id_limit: int | None = None) -> Tokenizer:
        """Read `tokenizer.model` and `tokenizer_config.json` of a folder, or `tokenizer.json`.

        Added tokens whose ids are not `below` a number stand for images or fill rows; their strings
        are ordinary text.
        """
        folder = Path(folder)
        if not (folder / "tokenizer.model").is_file() and (folder / "tokenizer.json").is_file():
            from vlbench.data.fast_tokenizer import FastTokenizer  # it needs transformers

            return FastTokenizer(folder)
        config: dict[str, object] = {}
        for path in (folder / "special_tokens_map.json", folder / "tokenizer_config.json"):
            config |= read_json(path) if path.is_file() else {}
        roles = zip(("bos_token", "eos_token", "unk_token"), SPECIAL_TOKENS, strict=True)
        special = [_token_text(config.get(role), default) for role, default in roles]
        model_file = folder / "tokenizer.model"
        named, pieces = _named_special_tokens(config), _load_sentencepiece(model_file)
        size = pieces.get_piece_size()
        added = _read_added_tokens(config, folder, size)
        if id_limit is not None:
            named = [name for name in named if added.get(name, -1) < id_limit]
            added = {name: index for name, index in added.items() if index < id_limit}
        _check_added_ids([index for index in added.values() if index >= size], size, folder)
        further = dict(added)
        for name in (name for name in named if name not in special and name not in further):
            known = pieces.id_to_piece(pieces.piece_to_id(name)) == name
            beyond = max(size, 1 + max(further.values(), default=0))
            further[name] = pieces.piece_to_id(name) if known else beyond
        kept = [name for name in further if name not in named and name not in special]
        made = cls(model_file, special, bool(config.get("add_bos_token", False)), further, kept)
        if (
            added
            and "added_tokens_decoder" not in config
            and "added_tokens.json" not in made.file_contents
        ):
            made.file_contents |= read_existing_files(
                folder, ("tokenizer.json",)
            )  # it alone names them
        return made

    def limit_embeddings(self, embedding_rows: int) -> None:
        """Say that the model has embeddings for the first `rows` ids alone."""
        self.embedding_rows = min(self.embedding_rows, embedding_rows)

    def check_token_ids(self, ids: Iterable[int]) -> None:
        """Raise a Mistake for an id that the model has no embedding for."""
        beyond = [index for index in ids if index >= self.embedding_rows]
        if beyond:
            raise UserError(
                f"the text holds '{self._token_names.get(beyond[0], beyond[0])}', which the "
                "tokenizer "
                f"knows (id {beyond[0]}) but the model does not (it has {self.embedding_rows} "
                "embeddings)"
            )

    @property
    def eos_token(self) -> str:
        """The text of the token that ends a text."""
        return self._token_names[self.eos_token_id]

    def save(self, folder: Path) -> None:
        """Write the files that `load` has read into `folder`."""
        for name, content in self.file_contents.items():
            (folder / name).write_bytes(content)

    def encode(self, text: str) -> list[int]:
        """Give the ids of a text; strings of special tokens become their ids."""
        ids = [self.bos_token_id] if self.add_bos_token else []
        parts = self._token_pattern.split(text) if self._token_prefix in text else [text]
        for part in parts:
            special = self._token_ids.get(part)
            if special is not None:
                ids.append(special)
            elif part:
                ids.extend(self._sentencepiece.encode(part))
        return ids

    def decode(self, ids: Iterable[int], keep_special: bool = False) -> str:
        """Give the text of ids, without special tokens unless they are kept.

        One leading space is dropped. Raises ValueError for an id that the tokenizer does not have,
        such as an image's.
        """
        ids = list(ids)
        for index in ids:
            if not 0 <= index < self.vocab_size:
                raise ValueError(
                    f"no token has the id {index} (allowed: 0 to {self.vocab_size - 1})"
                )
        if not keep_special:
            ids = [
                index
                for index in ids
                if index in self._non_special_ids or index not in self._token_names
            ]
        texts, run = [], list[int]()
        for index in ids:
            if index in self._non_special_ids:
                texts += [text for text in (self._decode_special(run),) if run and text]
                texts.append(self._token_names[index])
                run = []
            else:
                run.append(index)
        return " ".join([*texts, self._decode_special(run)] if run else texts)

    def _decode_special(self, ids: list[int]) -> str:
        """Give the text of ids among which every token with a name is special."""
        pieces = [
            self._token_names.get(index) or self._sentencepiece.id_to_piece(index) for index in ids
        ]
        if pieces:
            pieces[0] = pieces[0].removeprefix(_PIECE_SPACE)
        text, run = "", list[str]()
        for index, piece in zip(ids, pieces, strict=True):
            if index not in self._token_names:
                run.append(piece)
                continue
            # The reference writes a space before ordinary text that ends at a special token.
            text += (" " + self._sentencepiece.decode(run) if run else "") + piece
            run = []
        return text + (self._sentencepiece.decode(run) if run else "")


def read_existing_files(folder: Path, names: Iterable[str]) -> dict[str, bytes]:
    """Return the files of a folder that are there: it may be a checkpoint that is removed later."""
    return {name: (folder / name).read_bytes() for name in names if (folder / name).is_file()}


def _load_sentencepiece(path: Path) -> SentencePieceProcessor:
    if not path.is_file():
        raise UserError(f"there is no tokenizer file {path}, and no tokenizer.json beside it")
    refuse_lfs_pointer(path)
    try:
        return SentencePieceProcessor(model_file=str(path))
    except (RuntimeError, OSError) as error:
        raise UserError(f"{path} is not a sentencepiece model: {error}") from None


def _token_text(token: object, default: str) -> str:
    """Give the string of a token, which may be written as an object with `content`."""
    if isinstance(token, dict):
        token = token.get("content")
    return token if isinstance(token, str) else default


def _named_special_tokens(config: dict[str, object]) -> list[str]:
    """Return the names of special tokens beside bos, eos and unk."""
    named = [config.get("pad_token")]
    for key in ("additional_special_tokens", "extra_special_tokens"):  # until transformers 5, since
        listed = config.get(key)
        named += listed if isinstance(listed, list) else []
    return [name for name in (_token_text(token, "") for token in named) if name]


def _read_added_tokens(config: dict[str, object], folder: Path, piece_count: int) -> dict[str, int]:
    """Return the tokens that a checkpoint adds to its sentencepiece model, with their ids.

    Transformers 5 writes them into tokenizer.json alone, some versions with pieces of
    the model: from there only ids beyond its `pieces` are taken.
    """
    added: dict[str, int] = {}
    decoder = config.get("added_tokens_decoder")
    if isinstance(decoder, dict):
        file = folder / "tokenizer_config.json"
        added = {
            _token_text(token, ""): _parse_token_id(index, file) for index, token in decoder.items()
        }
    path = folder / "added_tokens.json"
    if path.is_file():
        added |= {name: _parse_token_id(index, path) for name, index in read_json(path).items()}
    path = folder / "tokenizer.json"
    if not added and path.is_file():
        listed = read_json(path).get("added_tokens") or []
        found = {_token_text(token, ""): _parse_token_id(token.get("id"), path) for token in listed}
        added = {name: index for name, index in found.items() if index >= piece_count}
    return added


def _parse_token_id(token_id: object, path: Path) -> int:
    """Return an id, which a key of JSON writes as a text."""
    if not str(token_id).isascii() or not str(token_id).isdigit():
        raise UserError(
            f"{path}: the id of an added token is {token_id!r}; wanted is a whole number"
        )
    return int(str(token_id))


def _check_added_ids(ids: list[int], piece_count: int, folder: Path) -> None:
    if sorted(ids) != list(range(piece_count, piece_count + len(ids))):
        raise UserError(
            f"the added tokens of {folder} do not follow its {piece_count} pieces: {ids}"
        )


def _find_token_id(
    token: str, pieces: SentencePieceProcessor, added_tokens: Mapping[str, int]
) -> int:
    """Return the id of a token that has a role: that of its piece, or of the token added for it."""
    index = pieces.piece_to_id(token)
    if pieces.id_to_piece(index) == token:
        return int(index)
    if token not in added_tokens:
        raise UserError(f"the tokenizer has a role for the token '{token}', which it does not hold")
    return added_tokens[token]
