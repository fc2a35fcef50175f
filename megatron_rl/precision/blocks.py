"""Tiles of a matrix: a view whose axes 1 and 3 run inside a tile, so that one scale per tile broadcasts over them."""

import torch.nn.functional as F
from torch import Tensor


def to_tiles(x_MN: Tensor, tile: tuple[int, int]) -> Tensor:
    """Return x as [tiles down, rows of a tile, tiles across, columns of a tile].

    The result is a view if the tiles fit exactly. Otherwise it is a copy, padded with zeros past the edge.
    """
    rows, columns = tile
    # An empty matrix whose tile has size 0 still has one tile.
    down, across = (-(-size // step) if step else 1 for size, step in zip(x_MN.shape, tile, strict=True))
    extra_rows, extra_columns = down * rows - x_MN.shape[0], across * columns - x_MN.shape[1]
    if extra_rows or extra_columns:
        x_MN = F.pad(x_MN, (0, extra_columns, 0, extra_rows))
    return x_MN.view(down, rows, across, columns)


def to_matrix(tiles: Tensor, shape: tuple[int, int]) -> Tensor:
    """Return the matrix [M, N] of `shape` from its tiles, without the padding (inverse of `to_tiles`)."""
    whole = tiles.view(tiles.shape[0] * tiles.shape[1], tiles.shape[2] * tiles.shape[3])
    return whole[: shape[0], : shape[1]]


def broadcast_tiles(per_tile: Tensor) -> Tensor:
    """Return [tiles down, tiles across] as [tiles down, 1, tiles across, 1]."""
    return per_tile[:, None, :, None]
