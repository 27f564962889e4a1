"""Square windows of neighbouring patches, and attention inside of each."""

from __future__ import annotations

from torch import Tensor


def check_window(connector: str, option: str, side: int, grid: tuple[int, int]) -> None:
    """Raise a ValueError unless `side` divides rows and columns of `grid`."""
    rows, columns = grid
    if side < 1 or rows % side or columns % side:
        raise ValueError(
            f"connector {connector}: {option} is {side}, which must divide the grid of patches, "
            f"{rows} x {columns}"
        )


def window_grid(grid: tuple[int, int], side: int) -> tuple[int, int]:
    """Return rows and columns of the windows of `side` x `side` patches of a grid."""
    return grid[0] // side, grid[1] // side


def split_windows(features: Tensor, grid: tuple[int, int], side: int) -> Tensor:
    """Cut `[images, patches, width]` into windows `[images x windows, side^2, width]`.

    Windows, and the patches inside of one, are in reading order.
    """
    rows, columns = grid
    squares: Tensor = features.unflatten(1, (rows // side, side, columns // side, side))
    return squares.transpose(2, 3).flatten(3, 4).flatten(0, 2)


def attend_in_windows(queries: Tensor, keys: Tensor, values: Tensor, heads: int) -> Tensor:
    """Let the one query of each window attend to its patches; return `[windows, 1, width]`.

    A sum over a few patches: the kernels of long sequences take no batch of 65,536 windows, which
    a large batch of images has.

    Args:
        queries: `[windows, 1, width]`.
        keys: `[windows, patches of a window, width]`.
        values: Likewise.
        heads: Number of heads, which divides the width.
    """
    q, k, v = (_split_heads(tensor, heads) for tensor in (queries, keys, values))
    scores = (q * k).sum(-1, keepdim=True) * q.shape[-1] ** -0.5
    found: Tensor = (scores.softmax(1) * v).sum(1, keepdim=True).flatten(2)
    return found.to(values.dtype)


def _split_heads(tensor: Tensor, heads: int) -> Tensor:
    split: Tensor = tensor.unflatten(-1, (heads, -1))
    return split


def spread_shares(shares: Tensor, grid: tuple[int, int], side: int) -> Tensor:
    """Turn shares of a window's patches into shares of an image's `[images, windows, patches]`.

    `shares` is `[images x windows, 1, side^2]`, in the order of `split_windows`.
    """
    rows, columns = grid[0] // side, grid[1] // side
    of_image = shares.reshape(-1, rows, columns, side, side)
    spread = of_image.new_zeros(len(of_image), rows, columns, rows, side, columns, side)
    for row in range(rows):
        for column in range(columns):
            spread[:, row, column, row, :, column, :] = of_image[:, row, column]
    return spread.flatten(3).flatten(1, 2)
