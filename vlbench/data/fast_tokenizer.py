"""The tokenizer of a folder that has `tokenizer.json` alone, as Llama 3's, by transformers."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from vlbench.data.tokenizer import Tokenizer, held
from vlbench.files import refuse_pointer
from vlbench.mistakes import Mistake

FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")


class FastTokenizer(Tokenizer):
    """Turn text into ids and back with the tokenizer that `tokenizer.json` holds."""

    def __init__(self, folder: Path) -> None:
        """Read the tokenizer files of `folder`."""
        from transformers import AutoTokenizer

        refuse_pointer(folder / "tokenizer.json")
        try:
            self._fast = AutoTokenizer.from_pretrained(folder)
            self._fast.encode("")  # turns off the file's padding and truncation, before threads do
        except Exception as error:  # of the library: whatever a broken file makes it raise
            raise Mistake(f"{folder} has no readable tokenizer.json: {error}") from error
        self.folder, self.added = folder, {}
        self.files = held(folder, FILES)
        self.size = self.rows = len(self._fast)
        if self._fast.eos_token_id is None:
            raise Mistake(f"the tokenizer of {folder} has no token that ends a text (eos_token)")
        self.eos = self._fast.eos_token_id
        self.bos = -1 if self._fast.bos_token_id is None else self._fast.bos_token_id
        self.unk = -1 if self._fast.unk_token_id is None else self._fast.unk_token_id
        self._names = {index: name for name, index in self._fast.get_added_vocab().items()}
        self._names[self.eos] = self._fast.eos_token
        roles = [role for role in self._fast.special_tokens_map.values() if isinstance(role, str)]
        self.special_added = [name for name in self._fast.all_special_tokens if name not in roles]

    def encode(self, text: str) -> list[int]:
        """Give the ids of a text; what the tokenizer puts before every text is included."""
        return list(self._fast.encode(text))

    def decode(self, ids: Iterable[int], keep_special: bool = False) -> str:
        """Give the text of ids, without special tokens unless they are kept."""
        return str(self._fast.decode(list(ids), skip_special_tokens=not keep_special))
