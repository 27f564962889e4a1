"""How visual tokens lie over a picture, and which of them is at a place."""

from __future__ import annotations

from typing import NamedTuple


class TokenGrid(NamedTuple):
    """Rows and columns of visual tokens, row by row, which cover a picture."""

    rows: int
    columns: int
    steps: tuple[int, int] = (1, 1)
    """Places that are told apart within a token, down and across: its patches."""

    @classmethod
    def over_patches(cls, token_grid: tuple[int, int], patch_grid: tuple[int, int]) -> TokenGrid:
        """Return the grid of tokens each of which covers some patches."""
        down, across = (
            -(-patches // tokens) for patches, tokens in zip(patch_grid, token_grid, strict=True)
        )
        return cls(*token_grid, (down, across))

    @property
    def places_in_token(self) -> int:
        """Number of places within a token."""
        return self.steps[0] * self.steps[1]

    def locate(self, x: float, y: float) -> tuple[int, int]:
        """Return the token at a point, and the place within it; x and y are from 0 to 1."""
        row, down = _split(y * self.rows, self.rows, self.steps[0])
        column, across = _split(x * self.columns, self.columns, self.steps[1])
        return row * self.columns + column, down * self.steps[1] + across


def _split(at: float, tokens: int, steps: int) -> tuple[int, int]:
    token = min(max(int(at), 0), tokens - 1)
    return token, min(max(int((at - token) * steps), 0), steps - 1)
