"""The tokenizer of a folder that has `tokenizer.json` alone, as Llama 3's, by transformers."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from vlbench.data.tokenizer import Tokenizer, read_existing_files
from vlbench.errors import UserError
from vlbench.text_files import refuse_lfs_pointer

FAST_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")


class FastTokenizer(Tokenizer):
    """Turn text into ids and back with the tokenizer that `tokenizer.json` holds."""

    def __init__(self, folder: Path) -> None:
        """Read the tokenizer files of `folder`."""
        from transformers import AutoTokenizer

        refuse_lfs_pointer(folder / "tokenizer.json")
        try:
            self._hf_tokenizer = AutoTokenizer.from_pretrained(folder)
            self._hf_tokenizer.encode(
                ""
            )  # turns off the file's padding and truncation, before threads do
        except Exception as error:  # of the library: whatever a broken file makes it raise
            raise UserError(f"{folder} has no readable tokenizer.json: {error}") from error
        self.folder, self.added_tokens = folder, {}
        self.file_contents = read_existing_files(folder, FAST_TOKENIZER_FILES)
        self.vocab_size = self.embedding_rows = len(self._hf_tokenizer)
        if self._hf_tokenizer.eos_token_id is None:
            raise UserError(f"the tokenizer of {folder} has no token that ends a text (eos_token)")
        self.eos_token_id = self._hf_tokenizer.eos_token_id
        self.bos_token_id = (
            -1 if self._hf_tokenizer.bos_token_id is None else self._hf_tokenizer.bos_token_id
        )
        self.unk_token_id = (
            -1 if self._hf_tokenizer.unk_token_id is None else self._hf_tokenizer.unk_token_id
        )
        self._token_names = {
            index: name for name, index in self._hf_tokenizer.get_added_vocab().items()
        }
        self._token_names[self.eos_token_id] = self._hf_tokenizer.eos_token
        roles = [
            role for role in self._hf_tokenizer.special_tokens_map.values() if isinstance(role, str)
        ]
        self.added_special_tokens = [
            name for name in self._hf_tokenizer.all_special_tokens if name not in roles
        ]

    def encode(self, text: str) -> list[int]:
        """Give the ids of a text; what the tokenizer puts before every text is included."""
        return list(self._hf_tokenizer.encode(text))

    def decode(self, ids: Iterable[int], keep_special: bool = False) -> str:
        """Give the text of ids, without special tokens unless they are kept."""
        return str(self._hf_tokenizer.decode(list(ids), skip_special_tokens=not keep_special))
