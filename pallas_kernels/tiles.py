"""Rows of groups, laid out in tiles of 128 rows that each belong to one group.

Of rows sorted by group (`tiles`), every group begins with a tile of its own and fills its last one
up with zeros: DeepGEMM's contiguous layout. How many tiles there are is known from the shapes: as
many as the worst sizes need. Where every group has the same places for rows (`places`), it has the
tiles of those: DeepGEMM's masked layout.
"""

from typing import NamedTuple

import jax.numpy as jnp
from jax import Array

from pallas_kernels.quantize.shapes import BLOCK, num_blocks


def num_tiles(num_rows: int, num_groups: int) -> int:
    """Enough for any sizes: each group that has rows at all wastes at most 127 of a tile."""
    return (num_rows + (BLOCK - 1) * min(num_rows, num_groups)) // BLOCK


class Tiles(NamedTuple):
    """T tiles of M sorted rows; `group_T` is -1 for those that no group needs."""

    group_T: Array
    row_TB: Array
    mine_TB: Array
    place_M: Array

    def into(self, x_MK: Array) -> Array:
        """Rows in tiles [128 T, K], zeros where there is none."""
        x_TBK = jnp.where(self.mine_TB[..., None], x_MK.at[self.row_TB].get(mode="clip"), 0)
        return x_TBK.reshape(-1, x_MK.shape[1])

    def back(self, y_PN: Array) -> Array:
        """Rows [M, N] from tiles; those behind the last group from where that would go on."""
        return y_PN[self.place_M]


def tiles(sizes_G: Array, num_rows: int) -> Tiles:
    """The layout of `num_rows` rows sorted by group."""
    number_T = jnp.arange(num_tiles(num_rows, sizes_G.shape[0]), dtype=jnp.int32)
    row_M = jnp.arange(num_rows, dtype=jnp.int32)
    end_G, tiles_G = jnp.cumsum(sizes_G), (sizes_G + BLOCK - 1) // BLOCK
    tile_end_G = jnp.cumsum(tiles_G)
    start_G, first_G = end_G - sizes_G, tile_end_G - tiles_G

    group_T = _group(number_T, tile_end_G)
    row_T = start_G[group_T] + (number_T - first_G[group_T]) * BLOCK
    row_TB = row_T[:, None] + jnp.arange(BLOCK, dtype=jnp.int32)[None]
    used_T = number_T < tile_end_G[-1]
    mine_TB = used_T[:, None] & (row_TB < end_G[group_T][:, None])

    group_M = _group(row_M, end_G)
    place_M = first_G[group_M] * BLOCK + row_M - start_G[group_M]
    return Tiles(jnp.where(used_T, group_T, -1), row_TB, mine_TB, place_M)


class Places(NamedTuple):
    """G times T tiles of groups with M places; `group_T` is -1 for those without a row."""

    group_T: Array
    sizes_G: Array
    num_places: int

    def into(self, x_GMK: Array) -> Array:
        """Places in tiles [128 G T, K]; what lies in those that no row takes is left there."""
        missing = -self.num_places % BLOCK
        return jnp.pad(x_GMK, ((0, 0), (0, missing), (0, 0))).reshape(-1, x_GMK.shape[2])

    def back(self, y_PN: Array) -> Array:
        """Places [G, M, N] from tiles, zeros in those that no row takes."""
        y_GPN = y_PN.reshape(self.sizes_G.shape[0], -1, y_PN.shape[1])
        return masked(y_GPN[:, : self.num_places], self.sizes_G)


def places(sizes_G: Array, num_places: int) -> Places:
    """The layout of groups that each have `num_places` places for rows."""
    group_G, first_T = (
        jnp.arange(n, dtype=jnp.int32) for n in (sizes_G.shape[0], num_blocks(num_places))
    )
    is_used_GT = first_T[None] * BLOCK < sizes_G[:, None]
    return Places(jnp.where(is_used_GT, group_G[:, None], -1).reshape(-1), sizes_G, num_places)


def masked(y_GMN: Array, sizes_G: Array) -> Array:
    """Zeros in the places that no row takes."""
    place_M = jnp.arange(y_GMN.shape[1], dtype=jnp.int32)
    return jnp.where((place_M[None] < sizes_G[:, None])[..., None], y_GMN, 0)


def counts(tile_groups: Array, num_groups: int) -> Array:
    """How many tiles each group has."""
    group_G = jnp.arange(num_groups, dtype=jnp.int32)
    return (tile_groups[:, None] == group_G[None]).sum(0, dtype=jnp.int32)


def _group(number_A: Array, end_G: Array) -> Array:
    """The group of each number, the last one for those behind all groups."""
    group_A = (number_A[:, None] >= end_G[None]).sum(1, dtype=jnp.int32)
    return jnp.minimum(group_A, end_G.shape[0] - 1)
