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
FEWEST_ROWS = 2
"""Of a step of a fixed shape: compilers make a graph of its own for a single row."""


class CacheView:
    """Keys and values of the first rows and columns: what decoder layers see in a step.

    Layers of transformers (5.17 to 5.24) call `update` alone.
    """

    def __init__(self, keys_values: KeysValues, lengths: Tensor) -> None:
        """Take parts of the cache's own tensors, `[rows, heads, columns, head width]`.

        `lengths` `[rows]` are the positions of each row before the step, 0 where no row is.
        """
        self.keys_values, self.lengths = keys_values, lengths
        self.row_numbers = torch.arange(len(lengths), device=lengths.device)

    @property
    def row_count(self) -> int:
        """Rows of the step, those that are not used included."""
        return len(self.lengths)

    def next_positions(self) -> tuple[Tensor, Tensor]:
        """Return the ids of the next position of each row, and what it attends to.

        These are `[rows, 1]`, and `[rows, 1, 1, columns]` bool, True for a position's own column
        and those before it. A row that is not used sees column 0 alone, which it writes.
        """
        columns = torch.arange(self.keys_values[0][0].shape[2], device=self.lengths.device)
        position_ids = self.lengths[:, None]
        return position_ids, (columns <= position_ids)[:, None, None]

    def update(
        self, keys: Tensor, values: Tensor, layer_index: int, *_: Any, **__: Any
    ) -> tuple[Tensor, Tensor]:
        """Write what a layer computes for the next token, `[rows, heads, 1, head width]`.

        Return all keys and values `[rows, heads, columns, head width]`. Nothing counts until
        `RowCache.end_step`: a step that failed may be done again.
        """
        all_keys, all_values = self.keys_values[layer_index]
        all_keys[self.row_numbers, :, self.lengths] = keys[:, :, 0]
        all_values[self.row_numbers, :, self.lengths] = values[:, :, 0]
        return all_keys, all_values


class RowCache:
    """Keys and values of the rows that are decoded together, one new position a step.

    What is behind the end of a row is zero or old, and masked; it is never nan, which a mask would
    not hide. The tensors have room for the longest row that there was since they were empty.
    """

    def __init__(self, max_rows: int, device: torch.device) -> None:
        """Hold at most `max_rows` rows; memory is taken as they come."""
        self.max_rows = max_rows
        self.lengths: list[int] = []
        """Positions of each row."""
        self._layers: KeysValues = []
        self._fixed_views: dict[tuple[int, int], CacheView] = {}
        self._length_buffer = torch.zeros(max_rows, dtype=torch.long, device=device)

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
            self._layers, self._fixed_views = [], {}
        self._set_lengths(lengths)

    def copy_row(self, row: int) -> KeysValues:
        """Return a copy of a row, `[1, heads, positions, head width]` of each layer."""
        part = slice(row, row + 1), slice(None), slice(self.lengths[row])
        return [(keys[part].clone(), values[part].clone()) for keys, values in self._layers]

    def begin_step(self) -> CacheView:
        """Make room for one more position of each row; return just these rows and positions."""
        shape = self.row_count, max(self.lengths) + 1
        self._reserve(*shape)
        return self._view(*shape)

    def begin_fixed_step(self) -> CacheView:
        """Make room for one more position; return more rows and columns than there are.

        There are few such shapes: rows are powers of two, or all that there may be, and columns a
        multiple of COLUMN_MULTIPLE. A view is the same one until the tensors grow, or are empty.
        """
        rows = max(FEWEST_ROWS, 1 << (self.row_count - 1).bit_length())
        shape = min(rows, self.max_rows), _round_columns(max(self.lengths) + 1)
        self._reserve(*shape)
        if shape not in self._fixed_views:
            self._fixed_views[shape] = self._view(*shape)
        return self._fixed_views[shape]

    def end_step(self) -> None:
        """Count the position that a step has written."""
        self.lengths = [length + 1 for length in self.lengths]
        self._length_buffer[: self.row_count] += 1

    def _view(self, rows: int, columns: int) -> CacheView:
        part = slice(rows), slice(None), slice(columns)
        keys_values = [(keys[part], values[part]) for keys, values in self._layers]
        return CacheView(keys_values, self._length_buffer[:rows])

    def _set_lengths(self, lengths: list[int]) -> None:
        self.lengths = lengths
        padded = lengths + [0] * (self.max_rows - len(lengths))
        self._length_buffer.copy_(torch.tensor(padded))

    def bytes_per_position(self) -> int:
        """Return what one position of one row takes; 0 where there is no row yet."""
        return sum(
            tensor.shape[1] * tensor.shape[3] * tensor.element_size()
            for pair in self._layers
            for tensor in pair
        )

    def bytes_to_grow(self, rows: int, columns: int) -> int:
        """Return by how much the tensors grow for so many rows and columns."""
        if not self._layers:
            return 0
        has_rows, _, has_columns, _ = self._layers[0][0].shape
        new_rows, new_columns = self._grown_shape(rows, columns)
        return (new_rows * new_columns - has_rows * has_columns) * self.bytes_per_position()

    def _grown_shape(self, rows: int, columns: int) -> tuple[int, int]:
        """Return the rows and columns of the tensors once they have room for some."""
        has_rows, _, has_columns, _ = self._layers[0][0].shape
        if rows > has_rows:
            has_rows = min(self.max_rows, max(rows, 2 * has_rows))
        if columns >= has_columns:
            has_columns = _round_columns(columns) + 1  # never all: views have one layout
        return has_rows, has_columns

    def _reserve(self, rows: int, columns: int) -> None:
        """Make room for some rows and columns, layer by layer: never all of them twice."""
        shape = self._grown_shape(rows, columns)
        for index, pair in enumerate(self._layers):
            if pair[0].shape[::2] != shape:
                self._fixed_views = {}
                keys, values = (_enlarge(tensor, *shape) for tensor in pair)
                self._layers[index] = keys, values


def _round_columns(columns: int) -> int:
    return -(-columns // COLUMN_MULTIPLE) * COLUMN_MULTIPLE


def _enlarge(tensor: Tensor, rows: int, columns: int) -> Tensor:
    """Return `[rows, heads, columns, head width]` that begins with `tensor`; the rest is zero."""
    larger = tensor.new_zeros(rows, tensor.shape[1], columns, tensor.shape[3])
    larger[: tensor.shape[0], :, : tensor.shape[2]] = tensor
    return larger
