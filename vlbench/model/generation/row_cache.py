"""The KV cache of rows that come and go: each row has its own length, and is written in place.

A row's positions begin at column 0, whatever the lengths of the others, so that a row joins and
leaves without a change to the others, and a step copies nothing but the new keys and values.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

KeysValues = list[tuple[Tensor, Tensor]]
"""Keys and values of each decoder layer, `[rows, heads, positions, head width]`."""
COLUMN_MULTIPLE = 256
"""Positions by which the tensors grow: seldom enough that copying them takes no time."""


class RowCache:
    """Keys and values of the rows that are decoded together, one new position a step.

    Decoder layers of transformers (5.17 to 5.24) call `update` alone. What is behind the end of a
    row is zero or old, and masked; it is never nan, which a mask would not hide. The tensors have
    room for the longest row that there was since they were empty.
    """

    def __init__(self, max_rows: int) -> None:
        """Hold at most `max_rows` rows; memory is taken as they come."""
        self.max_rows = max_rows
        self.lengths: list[int] = []
        """Positions of each row."""
        self._layers: KeysValues = []
        self._length_tensor = torch.zeros(0, dtype=torch.long)
        self._row_numbers = self._length_tensor

    @property
    def row_count(self) -> int:
        """How many rows there are."""
        return len(self.lengths)

    def add_row(self, keys_values: KeysValues) -> None:
        """Append a row: keys and values `[1, heads, positions, head width]` of each layer."""
        length, row = keys_values[0][0].shape[2], self.row_count
        if not self._layers:
            self._layers = [(keys[:0, :, :0], values[:0, :, :0]) for keys, values in keys_values]
        self._reserve(row + 1, length)
        for target, source in zip(self._layers, keys_values, strict=True):
            for tensor, values in zip(target, source, strict=True):
                tensor[row, :, :length] = values[0]
        self._set_lengths([*self.lengths, length])

    def remove_row(self, row: int) -> None:
        """Remove a row; the last one takes its number. Without rows no memory is held."""
        last = self.row_count - 1
        for pair in self._layers:
            for tensor in pair:
                if row != last:
                    tensor[row] = tensor[last]
                tensor[last].zero_()  # its numbers may be nan
        lengths = self.lengths[:last]
        if row != last:
            lengths[row] = self.lengths[last]
        if not lengths:
            self._layers = []
        self._set_lengths(lengths)

    def copy_row(self, row: int) -> KeysValues:
        """Return a copy of a row, `[1, heads, positions, head width]` of each layer."""
        part = slice(row, row + 1), slice(None), slice(self.lengths[row])
        return [(keys[part].clone(), values[part].clone()) for keys, values in self._layers]

    def begin_step(self) -> tuple[Tensor, Tensor]:
        """Make room for one more position of each row; return their ids, and what they attend to.

        These are `[rows, 1]`, and `[rows, 1, 1, columns]` bool, True for a position's own column
        and those before it.
        """
        column_count = max(self.lengths) + 1
        self._reserve(self.row_count, column_count)
        columns = torch.arange(column_count, device=self._length_tensor.device)
        position_ids = self._length_tensor[:, None]
        return position_ids, (columns <= position_ids)[:, None, None]

    def update(
        self, keys: Tensor, values: Tensor, layer_index: int, *_: Any, **__: Any
    ) -> tuple[Tensor, Tensor]:
        """Write what a layer computes for the next token, `[rows, heads, 1, head width]`.

        Return all keys and values `[rows, heads, columns, head width]`. Nothing counts until
        `end_step`: a step that failed may be done again.
        """
        rows, columns = self._row_numbers, self._length_tensor
        all_keys, all_values = self._layers[layer_index]
        all_keys[rows, :, columns] = keys[:, :, 0]
        all_values[rows, :, columns] = values[:, :, 0]
        part = slice(len(self.lengths)), slice(None), slice(max(self.lengths) + 1)
        return all_keys[part], all_values[part]

    def end_step(self) -> None:
        """Count the position that a step has written."""
        self.lengths = [length + 1 for length in self.lengths]
        self._length_tensor = self._length_tensor + 1

    def _set_lengths(self, lengths: list[int]) -> None:
        device = self._layers[0][0].device if self._layers else torch.device("cpu")
        self.lengths = lengths
        self._length_tensor = torch.tensor(lengths, dtype=torch.long, device=device)
        self._row_numbers = torch.arange(len(lengths), device=device)

    def _reserve(self, rows: int, columns: int) -> None:
        """Make room for some rows and columns, layer by layer: never all of them twice."""
        for index, (keys, values) in enumerate(self._layers):
            has_rows, _, has_columns, _ = keys.shape
            if rows > has_rows or columns > has_columns:
                if rows > has_rows:
                    has_rows = min(self.max_rows, max(rows, 2 * has_rows))
                if columns > has_columns:
                    has_columns = -(-columns // COLUMN_MULTIPLE) * COLUMN_MULTIPLE
                self._layers[index] = (
                    _enlarge(keys, has_rows, has_columns),
                    _enlarge(values, has_rows, has_columns),
                )


def _enlarge(tensor: Tensor, rows: int, columns: int) -> Tensor:
    """Return `[rows, heads, columns, head width]` that begins with `tensor`; the rest is zero."""
    larger = tensor.new_zeros(rows, tensor.shape[1], columns, tensor.shape[3])
    larger[: tensor.shape[0], :, : tensor.shape[2]] = tensor
    return larger
