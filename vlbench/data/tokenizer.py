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

from vlbench.files import read_json, refuse_pointer
from vlbench.mistakes import Mistake

SPECIAL = ("<|startoftext|>", "<|endoftext|>", "<unk>")  # bos, eos, unk of Yi
FILES = (
    *("tokenizer.model", "tokenizer_config.json"),
    *("special_tokens_map.json", "added_tokens.json"),
)
_SPACE = "\u2581"  # how sentencepiece writes a space


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
        special: Sequence[str] = SPECIAL,
        add_bos: bool = False,
        extra: Mapping[str, int] = MappingProxyType({}),
        kept: Collection[str] = (),
    ) -> None:
        self.folder = Path(model_file).parent
        self.files = held(self.folder, FILES)
        self._pieces = _open(Path(model_file))
        self._tokens = {name: _id_of(name, self._pieces, extra) for name in special} | dict(extra)
        self.size = max(self._pieces.get_piece_size(), 1 + max(self._tokens.values()))
        self.bos, self.eos, self.unk = (self._tokens[name] for name in special[:3])
        self.add_bos, self.added = add_bos, dict(extra)
        self.rows = self.size  # of the model's embedding; `limit` says so where it has fewer
        self._names = {index: name for name, index in self._tokens.items()}
        self._kept = {self._tokens[name] for name in kept}
        self.special_added = [name for name in extra if name not in kept and name not in special]
        longest_first = sorted(self._tokens, key=len, reverse=True)
        self._cut = re.compile(f"({'|'.join(map(re.escape, longest_first))})")
        # Where all tokens begin with "<", a text without it needs no cutting.
        self._mark = "<" if all(name.startswith("<") for name in self._tokens) else ""

    @classmethod
    def load(cls, folder: str | Path, below: int | None = None) -> Tokenizer:
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
        roles = zip(("bos_token", "eos_token", "unk_token"), SPECIAL, strict=True)
        special = [_content(config.get(role), default) for role, default in roles]
        model_file = folder / "tokenizer.model"
        named, pieces = _additional(config), _open(model_file)
        size = pieces.get_piece_size()
        added = _added(config, folder, size)
        if below is not None:
            named = [name for name in named if added.get(name, -1) < below]
            added = {name: index for name, index in added.items() if index < below}
        _check_beyond([index for index in added.values() if index >= size], size, folder)
        further = dict(added)
        for name in (name for name in named if name not in special and name not in further):
            known = pieces.id_to_piece(pieces.piece_to_id(name)) == name
            beyond = max(size, 1 + max(further.values(), default=0))
            further[name] = pieces.piece_to_id(name) if known else beyond
        kept = [name for name in further if name not in named and name not in special]
        made = cls(model_file, special, bool(config.get("add_bos_token", False)), further, kept)
        if added and "added_tokens_decoder" not in config and "added_tokens.json" not in made.files:
            made.files |= held(folder, ("tokenizer.json",))  # it alone names them
        return made

    def limit(self, rows: int) -> None:
        """Say that the model has embeddings for the first `rows` ids alone."""
        self.rows = min(self.rows, rows)

    def check(self, ids: Iterable[int]) -> None:
        """Raise a Mistake for an id that the model has no embedding for."""
        beyond = [index for index in ids if index >= self.rows]
        if beyond:
            raise Mistake(
                f"the text holds '{self._names.get(beyond[0], beyond[0])}', which the tokenizer "
                f"knows (id {beyond[0]}) but the model does not (it has {self.rows} embeddings)"
            )

    @property
    def eos_text(self) -> str:
        """The text of the token that ends a text."""
        return self._names[self.eos]

    def save(self, folder: Path) -> None:
        """Write the files that `load` has read into `folder`."""
        for name, content in self.files.items():
            (folder / name).write_bytes(content)

    def encode(self, text: str) -> list[int]:
        """Give the ids of a text; strings of special tokens become their ids."""
        ids = [self.bos] if self.add_bos else []
        parts = self._cut.split(text) if self._mark in text else [text]
        for part in parts:
            special = self._tokens.get(part)
            if special is not None:
                ids.append(special)
            elif part:
                ids.extend(self._pieces.encode(part))
        return ids

    def decode(self, ids: Iterable[int], keep_special: bool = False) -> str:
        """Give the text of ids, without special tokens unless they are kept.

        One leading space is dropped. Raises ValueError for an id that the tokenizer does not have,
        such as an image's.
        """
        ids = list(ids)
        for index in ids:
            if not 0 <= index < self.size:
                raise ValueError(f"no token has the id {index} (allowed: 0 to {self.size - 1})")
        if not keep_special:
            ids = [index for index in ids if index in self._kept or index not in self._names]
        texts, run = [], list[int]()
        for index in ids:
            if index in self._kept:
                texts += [text for text in (self._text(run),) if run and text]
                texts.append(self._names[index])
                run = []
            else:
                run.append(index)
        return " ".join([*texts, self._text(run)] if run else texts)

    def _text(self, ids: list[int]) -> str:
        """Give the text of ids among which every token with a name is special."""
        pieces = [self._names.get(index) or self._pieces.id_to_piece(index) for index in ids]
        if pieces:
            pieces[0] = pieces[0].removeprefix(_SPACE)
        text, run = "", list[str]()
        for index, piece in zip(ids, pieces, strict=True):
            if index not in self._names:
                run.append(piece)
                continue
            # The reference writes a space before ordinary text that ends at a special token.
            text += (" " + self._pieces.decode(run) if run else "") + piece
            run = []
        return text + (self._pieces.decode(run) if run else "")


def held(folder: Path, names: Iterable[str]) -> dict[str, bytes]:
    """Return the files of a folder that are there: it may be a checkpoint that is removed later."""
    return {name: (folder / name).read_bytes() for name in names if (folder / name).is_file()}


def _open(path: Path) -> SentencePieceProcessor:
    if not path.is_file():
        raise Mistake(f"there is no tokenizer file {path}, and no tokenizer.json beside it")
    refuse_pointer(path)
    try:
        return SentencePieceProcessor(model_file=str(path))
    except (RuntimeError, OSError) as error:
        raise Mistake(f"{path} is not a sentencepiece model: {error}") from None


def _content(token: object, default: str) -> str:
    """Give the string of a token, which may be written as an object with `content`."""
    if isinstance(token, dict):
        token = token.get("content")
    return token if isinstance(token, str) else default


def _additional(config: dict[str, object]) -> list[str]:
    """Return the names of special tokens beside bos, eos and unk."""
    named = [config.get("pad_token")]
    for key in ("additional_special_tokens", "extra_special_tokens"):  # until transformers 5, since
        listed = config.get(key)
        named += listed if isinstance(listed, list) else []
    return [name for name in (_content(token, "") for token in named) if name]


def _added(config: dict[str, object], folder: Path, pieces: int) -> dict[str, int]:
    """Return the tokens that a checkpoint adds to its sentencepiece model, with their ids.

    Transformers 5 writes them into tokenizer.json alone, some versions with pieces of
    the model: from there only ids beyond its `pieces` are taken.
    """
    added: dict[str, int] = {}
    decoder = config.get("added_tokens_decoder")
    if isinstance(decoder, dict):
        file = folder / "tokenizer_config.json"
        added = {_content(token, ""): _number(index, file) for index, token in decoder.items()}
    path = folder / "added_tokens.json"
    if path.is_file():
        added |= {name: _number(index, path) for name, index in read_json(path).items()}
    path = folder / "tokenizer.json"
    if not added and path.is_file():
        listed = read_json(path).get("added_tokens") or []
        found = {_content(token, ""): _number(token.get("id"), path) for token in listed}
        added = {name: index for name, index in found.items() if index >= pieces}
    return added


def _number(index: object, path: Path) -> int:
    """Return an id, which a key of JSON writes as a text."""
    if not str(index).isascii() or not str(index).isdigit():
        raise Mistake(f"{path}: the id of an added token is {index!r}; wanted is a whole number")
    return int(str(index))


def _check_beyond(ids: list[int], pieces: int, folder: Path) -> None:
    if sorted(ids) != list(range(pieces, pieces + len(ids))):
        raise Mistake(f"the added tokens of {folder} do not follow its {pieces} pieces: {ids}")


def _id_of(name: str, pieces: SentencePieceProcessor, added: Mapping[str, int]) -> int:
    """Return the id of a token that has a role: that of its piece, or of the token added for it."""
    index = pieces.piece_to_id(name)
    if pieces.id_to_piece(index) == name:
        return int(index)
    if name not in added:
        raise Mistake(f"the tokenizer has a role for the token '{name}', which it does not hold")
    return added[name]
