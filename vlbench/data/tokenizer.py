"""The tokenizers: sentencepiece in the manner of the slow Llama tokenizer, or a tokenizer.json.

The strings of the special tokens are cut out first and become their ids; all other text goes to
sentencepiece. It goes there as it is in the reference (`legacy: true`); with `legacy: false`, as
LLaVA-1.5 has it, no space is put before what follows a special token. The fast tokenizers of
transformers 5 differ from both on texts with images, odd spaces and broken bytes.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

from vlbench.data.added_tokens import (
    check_added_ids,
    listed_special_tokens,
    read_added_tokens,
    token_text,
)
from vlbench.data.sentencepiece_files import (
    find_token_id,
    load_sentencepiece,
    own_role_tokens,
)
from vlbench.data.template_rendering import TEMPLATE_FILE, read_template_text
from vlbench.data.tokenizer_limits import (
    MAX_ADDED_TOKENS,
    check_library_files,
)
from vlbench.errors import UserError, one_line
from vlbench.text_files import read_config_bytes, read_json

SPECIAL_TOKENS = ("<|startoftext|>", "<|endoftext|>", "<unk>")  # bos, eos, unk of Yi
ROLES = ("bos_token", "eos_token", "unk_token")
"""What files call bos, eos and unk."""
SENTENCEPIECE_FILES = (
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    TEMPLATE_FILE,
)
FAST_TOKENIZER_FILES = ("tokenizer.json", *SENTENCEPIECE_FILES[1:])
_PIECE_SPACE = "\u2581"  # how sentencepiece writes a space


class Tokenizer(ABC):
    """Turns text into token ids and back."""

    folder: Path
    """Where its files were read."""
    file_contents: dict[str, bytes]
    """Its files by name, for `save`: the folder may be a checkpoint that is removed later."""
    vocab_size: int
    """Ids are below this number."""
    embedding_rows: int
    """Rows of the model's embedding: `vocab_size`, or fewer after `limit_embeddings`."""
    bos_token_id: int
    """-1 for a tokenizer without this token, as `unk_token_id`."""
    eos_token_id: int
    unk_token_id: int
    add_bos_token: bool = False
    """Whether bos is put before every text; a `tokenizer.json` decides that itself."""
    added_tokens: dict[str, int]
    """Tokens that are cut out of a text beside bos, eos and unk, with their ids."""
    added_special_tokens: list[str]
    """Those of the special tokens that are not bos, eos or unk."""
    _token_names: dict[int, str]
    """The texts of special and added tokens by id."""
    chat_template: str = ""
    """Its own chat template as Jinja; "" for none."""

    @classmethod
    def load(cls, folder: str | Path, id_limit: int | None = None) -> Tokenizer:
        """Read `tokenizer.model` and `tokenizer_config.json` of a folder, or `tokenizer.json`.

        Added tokens whose ids are not below `id_limit` stand for images or pad the embedding; their
        strings are ordinary text.
        """
        folder = Path(folder)
        tokenizer = (
            FastTokenizer(folder)
            if _is_fast(folder)
            else _load_sentencepiece_tokenizer(folder, id_limit)
        )
        tokenizer.chat_template = read_template_text(folder)
        return tokenizer

    @abstractmethod
    def encode(self, text: str, add_bos: bool = True) -> list[int]:
        """Return the ids of a text; strings of special tokens become their ids.

        Without `add_bos` nothing stands before them that the text does not have.
        """

    @abstractmethod
    def decode(self, ids: Iterable[int], keep_special: bool = False) -> str:
        """Return the text of ids, without special tokens unless they are kept."""

    def limit_embeddings(self, embedding_rows: int) -> None:
        """Set the number of ids, from 0, that the model has embeddings for."""
        self.embedding_rows = min(self.embedding_rows, embedding_rows)

    def check_token_ids(self, ids: Iterable[int]) -> None:
        """Raise a UserError for an id that the model has no embedding for."""
        unknown = next((token_id for token_id in ids if token_id >= self.embedding_rows), None)
        if unknown is not None:
            raise UserError(
                f"the text holds '{self._token_names.get(unknown, unknown)}', which the tokenizer "
                f"knows (id {unknown}) but the model does not (it has {self.embedding_rows} "
                "embeddings)"
            )

    @property
    def eos_token(self) -> str:
        """The text of the end-of-text token."""
        return self._token_names[self.eos_token_id]

    @property
    def named_tokens(self) -> dict[str, int]:
        """The texts of special and added tokens, which are cut out of a text, with their ids."""
        return {name: token_id for token_id, name in self._token_names.items()}

    @property
    def role_tokens(self) -> dict[str, str]:
        """The texts of bos, eos and unk as chat templates call them, of those that it has."""
        ids = {"bos_token": self.bos_token_id, "eos_token": self.eos_token_id}
        ids |= {"unk_token": self.unk_token_id}
        return {role: self._token_names[n] for role, n in ids.items() if n in self._token_names}

    def save(self, folder: Path) -> None:
        """Write the files that `load` has read into `folder`."""
        for name, content in self.file_contents.items():
            (folder / name).write_bytes(content)


class SentencePieceTokenizer(Tokenizer):
    """A sentencepiece model with special tokens, as Yi's."""

    def __init__(
        self,
        model_file: str | Path,
        special_tokens: Sequence[str] = SPECIAL_TOKENS,
        add_bos_token: bool = False,
        added_tokens: Mapping[str, int] = MappingProxyType({}),
        non_special_tokens: Collection[str] = (),
        legacy: bool = True,
    ) -> None:
        """Read a sentencepiece model.

        Args:
            model_file: `tokenizer.model`; its folder is searched for the other files.
            special_tokens: the texts of bos, eos and unk.
            add_bos_token: whether bos is put before every encoded text, as a checkpoint's
                `add_bos_token` asks; Yi-VL does not.
            added_tokens: further tokens that are cut out of a text, with their ids, among the
                pieces of the sentencepiece model or beyond them.
            non_special_tokens: those of `added_tokens` that stay in a decoded text.
            legacy: whether sentencepiece puts a space before every part of a text, also behind a
                special token; otherwise one space is put before the whole text.
        """
        self.folder = Path(model_file).parent
        self.file_contents = read_existing_files(self.folder, SENTENCEPIECE_FILES)
        self._sentencepiece = load_sentencepiece(Path(model_file), dummy_prefix=legacy)
        self._legacy = legacy
        self._token_ids = {
            name: find_token_id(name, self._sentencepiece, added_tokens) for name in special_tokens
        } | dict(added_tokens)
        piece_count = self._sentencepiece.get_piece_size()
        self.vocab_size = max(piece_count, 1 + max(self._token_ids.values()))
        self.embedding_rows = self.vocab_size
        self.bos_token_id, self.eos_token_id, self.unk_token_id = (
            self._token_ids[name] for name in special_tokens[:3]
        )
        self.add_bos_token, self.added_tokens = add_bos_token, dict(added_tokens)
        self._token_names = {token_id: name for name, token_id in self._token_ids.items()}
        self._non_special_ids = {self._token_ids[name] for name in non_special_tokens}
        self._unknown_length = len(self._sentencepiece.encode(self._token_names[self.unk_token_id]))
        self.added_special_tokens = [
            name
            for name in added_tokens
            if name not in non_special_tokens and name not in special_tokens
        ]
        longest_first = sorted(self._token_ids, key=len, reverse=True)
        self._token_pattern = re.compile(f"({'|'.join(map(re.escape, longest_first))})")
        # Where all tokens begin with "<", a text without it needs no cutting.
        self._token_prefix = "<" if all(name.startswith("<") for name in self._token_ids) else ""

    def encode(self, text: str, add_bos: bool = True) -> list[int]:
        """Return the ids of a text; strings of special tokens become their ids."""
        ids: list[int] = []
        if text and not self._legacy:
            text = _PIECE_SPACE + text.replace(_PIECE_SPACE, " ")
        parts = self._token_pattern.split(text) if self._token_prefix in text else [text]
        for part in parts:
            special_id = self._token_ids.get(part)
            if special_id is not None:
                ids.append(special_id)
            elif part:
                ids.extend(self._encode_part(part))
        if not self._legacy and self._begins_with_special(ids):
            ids = ids[1:]  # the space that was put before it
        return [self.bos_token_id, *ids] if self.add_bos_token and add_bos else ids

    def _encode_part(self, text: str) -> list[int]:
        """Return the ids of a text without special tokens."""
        if self._legacy or not text.startswith((_PIECE_SPACE, " ")):
            return list(self._sentencepiece.encode(text))
        # at the beginning sentencepiece may drop spaces; as the reference, it is given another one
        unknown = self._token_names[self.unk_token_id]
        return list(self._sentencepiece.encode(unknown + text))[self._unknown_length :]

    def _begins_with_special(self, ids: Sequence[int]) -> bool:
        """Tell whether a lone space stands before a special token at the beginning of a text."""
        return (
            len(ids) > 1
            and self._sentencepiece.piece_to_id(_PIECE_SPACE) == ids[0]
            and ids[1] in self._token_names
            and ids[1] not in self._non_special_ids
        )

    def decode(self, ids: Iterable[int], keep_special: bool = False) -> str:
        """Return the text of ids, without special tokens unless they are kept.

        One leading space is dropped. Raises ValueError for an id that the tokenizer does not have,
        such as IMAGE_TOKEN_INDEX.
        """
        ids = list(ids)
        for token_id in ids:
            if not 0 <= token_id < self.vocab_size:
                raise ValueError(
                    f"no token has the id {token_id} (allowed: 0 to {self.vocab_size - 1})"
                )
        if not keep_special:
            ids = [n for n in ids if n in self._non_special_ids or n not in self._token_names]
        texts: list[str] = []
        run: list[int] = []  # ids between two non-special tokens
        for token_id in ids:
            if token_id in self._non_special_ids:
                texts += [text for text in (self._decode_special(run),) if run and text]
                texts.append(self._token_names[token_id])
                run = []
            else:
                run.append(token_id)
        return " ".join([*texts, self._decode_special(run)] if run else texts)

    def _decode_special(self, ids: list[int]) -> str:
        """Return the text of ids among which every token with a name is special."""
        pieces = [self._token_names.get(n) or self._sentencepiece.id_to_piece(n) for n in ids]
        if pieces:
            pieces[0] = pieces[0].removeprefix(_PIECE_SPACE)
        text, run = "", list[str]()
        for token_id, piece in zip(ids, pieces, strict=True):
            if token_id not in self._token_names:
                run.append(piece)
                continue
            # The reference writes a space before ordinary text that ends at a special token.
            space = " " if self._legacy else ""
            text += (space + self._sentencepiece.decode(run) if run else "") + piece
            run = []
        return text + (self._sentencepiece.decode(run) if run else "")


class FastTokenizer(Tokenizer):
    """The tokenizer of a folder that has `tokenizer.json` alone, as Llama 3's, by transformers."""

    def __init__(self, folder: Path) -> None:
        """Read the tokenizer files of `folder`."""
        try:
            tokenizer = load_library_tokenizer(folder)
            # turns off the file's padding and truncation once, before threads use it
            framed = tokenizer("a", return_special_tokens_mask=True)
        except UserError:
            raise
        except Exception as error:  # of the library: whatever a broken file makes it raise
            reason = one_line(error)
            raise UserError(f"{folder} has no readable tokenizer.json: {reason}") from error
        self._hf_tokenizer = tokenizer
        is_framing = framed["special_tokens_mask"]
        self._before_texts = framed["input_ids"][: (*is_framing, 0).index(0)]
        self.folder, self.added_tokens = folder, {}
        self.file_contents = read_existing_files(folder, FAST_TOKENIZER_FILES)
        self.vocab_size = self.embedding_rows = len(tokenizer)
        if tokenizer.eos_token_id is None:
            raise UserError(f"the tokenizer of {folder} has no token that ends a text (eos_token)")
        self.eos_token_id = tokenizer.eos_token_id
        self.bos_token_id = -1 if tokenizer.bos_token_id is None else tokenizer.bos_token_id
        self.unk_token_id = -1 if tokenizer.unk_token_id is None else tokenizer.unk_token_id
        self._token_names = {
            token_id: name for name, token_id in tokenizer.get_added_vocab().items()
        }
        self._token_names[self.eos_token_id] = tokenizer.eos_token
        if self.bos_token_id >= 0:
            self._token_names[self.bos_token_id] = tokenizer.bos_token
        roles = [role for role in tokenizer.special_tokens_map.values() if isinstance(role, str)]
        self.added_special_tokens = [
            name for name in tokenizer.all_special_tokens if name not in roles
        ]

    def encode(self, text: str, add_bos: bool = True) -> list[int]:
        """Return the ids of a text; what the tokenizer puts before every text is included.

        What it puts behind every text is not: a prompt goes on.
        """
        ids = self._hf_tokenizer.encode(text, add_special_tokens=False)
        return [*self._before_texts, *ids] if add_bos else list(ids)

    def decode(self, ids: Iterable[int], keep_special: bool = False) -> str:
        """Return the text of ids, without special tokens unless they are kept."""
        return str(self._hf_tokenizer.decode(list(ids), skip_special_tokens=not keep_special))


def _is_fast(folder: Path) -> bool:
    """Tell whether a folder's tokenizer is its `tokenizer.json`.

    A sentencepiece model beside it comes first, unless its configuration says `legacy: false`: the
    library then reads the file in that manner, too.
    """
    if not (folder / "tokenizer.json").is_file():
        return False
    file = folder / "tokenizer_config.json"
    is_new = file.is_file() and read_json(file).get("legacy") is False
    return is_new or not (folder / "tokenizer.model").is_file()


def load_library_tokenizer(folder: Path) -> Any:
    """Return the tokenizer of a folder as transformers reads it; code in the folder never runs.

    Without `trust_remote_code=False` transformers asks on standard input whether it may run it.
    """
    from transformers import AutoTokenizer  # slow to import

    check_library_files(folder)
    try:
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=False)  # nosec B615: local
    except ValueError as error:
        if "trust_remote_code" not in str(error):
            raise
        raise UserError(
            f"{folder}: its tokenizer is code in the folder (auto_map of tokenizer_config.json or "
            "config.json), which is never executed; wanted is a tokenizer of transformers"
        ) from error


def read_existing_files(folder: Path, names: Iterable[str]) -> dict[str, bytes]:
    """Return the contents of those files of a folder that exist."""
    paths = {name: folder / name for name in names if (folder / name).is_file()}
    return {name: read_config_bytes(path) for name, path in paths.items()}


def _load_sentencepiece_tokenizer(folder: Path, id_limit: int | None) -> SentencePieceTokenizer:
    """Read a sentencepiece model and what the other files of its folder add to it."""
    config: dict[str, object] = {}
    for path in (folder / "special_tokens_map.json", folder / "tokenizer_config.json"):
        config |= read_json(path) if path.is_file() else {}
    model_file = folder / "tokenizer.model"
    pieces = load_sentencepiece(model_file)
    defaults = dict(zip(ROLES, SPECIAL_TOKENS, strict=True)) | own_role_tokens(pieces)
    role_tokens = [token_text(config.get(role), default) for role, default in defaults.items()]
    piece_count = pieces.get_piece_size()
    listed_special = listed_special_tokens(config)
    added = read_added_tokens(config, folder, piece_count)
    if id_limit is not None:
        listed_special = [name for name in listed_special if added.get(name, -1) < id_limit]
        added = {name: token_id for name, token_id in added.items() if token_id < id_limit}
    if len(added) + len(listed_special) > MAX_ADDED_TOKENS:
        raise UserError(
            f"{folder} adds {len(added) + len(listed_special):,} tokens to its tokenizer; at most "
            f"{MAX_ADDED_TOKENS:,} are read"
        )
    check_added_ids([n for n in added.values() if n >= piece_count], piece_count, folder)
    all_added = dict(added)
    next_free_id = max(piece_count, 1 + max(added.values(), default=0))
    for name in listed_special:
        if name not in role_tokens and name not in all_added:
            is_piece = pieces.id_to_piece(pieces.piece_to_id(name)) == name
            all_added[name] = pieces.piece_to_id(name) if is_piece else next_free_id
            next_free_id += not is_piece
    non_special = [n for n in all_added if n not in listed_special and n not in role_tokens]
    add_bos = bool(config.get("add_bos_token", True))  # LlamaTokenizer's default
    tokenizer = SentencePieceTokenizer(
        model_file,
        role_tokens,
        add_bos,
        all_added,
        non_special,
        legacy=config.get("legacy") is not False,
    )
    named_elsewhere = "added_tokens_decoder" in config or (
        "added_tokens.json" in tokenizer.file_contents
    )
    if added and not named_elsewhere:  # tokenizer.json alone names the added tokens
        tokenizer.file_contents |= read_existing_files(folder, ("tokenizer.json",))
    return tokenizer
