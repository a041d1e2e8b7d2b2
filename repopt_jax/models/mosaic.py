"""Feature maps of several sizes laid out in one, so that layers shared by all of them run once.

The first map is at the left, the others are in a column beside it, with a line of zeros between neighbours:

    0 0 0 0 . 1 1
    0 0 0 0 . 1 1
    0 0 0 0 . . .
    0 0 0 0 . 2 .

A 3x3 convolution then gives the same outputs as for each map separately with zero padding, as long as the
lines between the maps are set to zero before each layer (`Mosaic.clear`). The purpose is batch norm: called
once for each map, it would normalise each map by separate statistics in training, but all by a mixture of
them in evaluation, which is another function. Here training and evaluation use one set of statistics, to
which the lines between the maps contribute as well.
"""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np


class Mosaic:
    """The layout for maps of these sizes (height, width).

    `corners` are the (row, column) of each map's first pixel, `shape` is the (height, width) of the whole.
    """

    def __init__(self, sizes: Sequence[tuple[int, int]]):
        self.sizes: tuple[tuple[int, int], ...] = tuple(sizes)
        (height, width), *others = self.sizes
        rows = np.cumsum([0, *(h + 1 for h, _ in others)]).tolist()
        self.corners: tuple[tuple[int, int], ...] = ((0, 0), *((row, width + 1) for row in rows[:-1]))
        beside = 1 + max(w for _, w in others) if others else 0
        self.shape: tuple[int, int] = (max(height, rows[-1] - 1), width + beside)

    @functools.cached_property
    def inside(self) -> np.ndarray:
        """Bool (height, width, 1): True where a map is."""
        mask = np.zeros((*self.shape, 1), bool)
        for (row, column), (h, w) in zip(self.corners, self.sizes):
            mask[row : row + h, column : column + w] = True
        return mask

    @functools.cached_property
    def levels(self) -> np.ndarray:
        """Int (L,): the index of the map that each row of `flat` comes from."""
        return np.repeat(np.arange(len(self.sizes)), [h * w for h, w in self.sizes])

    def pack(self, maps: Sequence[jax.Array]) -> jax.Array:
        """Lays out maps (N, h, w, C) in one map (N, *shape, C)."""
        first, *others = maps
        height, width = self.shape
        left = _extended(first, height, first.shape[2])
        if not others:
            return left
        column = width - first.shape[2]
        rows = [jnp.pad(x, ((0, 0), (0, 1), (1, column - 1 - x.shape[2]), (0, 0))) for x in others]
        right = jnp.concatenate(rows, axis=1)[:, :height]
        return jnp.concatenate([left, _extended(right, height, column)], axis=2)

    def clear(self, x: jax.Array) -> jax.Array:
        """Sets everything between the maps to zero."""
        return x if self.inside.all() else jnp.where(self.inside[None], x, 0)

    def flat(self, x: jax.Array) -> jax.Array:
        """Flattens (N, *shape, C) to (N, L, C): the maps one after the other, each row by row."""
        maps = [
            x[:, row : row + h, column : column + w].reshape(x.shape[0], h * w, x.shape[-1])
            for (row, column), (h, w) in zip(self.corners, self.sizes)
        ]
        return jnp.concatenate(maps, axis=1)


def _extended(x: jax.Array, height: int, width: int) -> jax.Array:
    return jnp.pad(x, ((0, 0), (0, height - x.shape[1]), (0, width - x.shape[2]), (0, 0)))
