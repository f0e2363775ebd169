"""Grouped product as one batched product over even shares, and a loop over what exceeds them.

Every group has room for a quarter more rows than an even share: with balanced routing the whole
work is one batched matrix product of 1.25 times the useful size. Rows of a group beyond its room
go through a loop over tiles whose trip count is dynamic, so no routing costs G times the work and
shapes stay static. An even share counts all rows given: where many of them belong to no group (the
tokens of other devices), the room is too large by that factor. Plain XLA, so it runs everywhere;
made for CPU.
"""

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.typing import DTypeLike

from pallas_kernels.grouped_matmul.gradients import differentiable

ROOM = 1.25
TILE = 64


class _Layout(NamedTuple):
    """Where M sorted rows stand. Group g owns rows start_G[g] to end_G[g]; `room` is static."""

    start_G: Array
    end_G: Array
    room: int

    @property
    def rows_GB(self) -> tuple[Array, Array]:
        """Row number of each place in the groups' blocks, and whether the group owns it."""
        row_GB = self.start_G[:, None] + jnp.arange(self.room, dtype=jnp.int32)[None]
        return row_GB, row_GB < self.end_G[:, None]


def _layout(sizes_G: Array, num_rows: int) -> _Layout:
    groups = sizes_G.shape[0]
    share = num_rows / groups
    # Few rows (decode) leave most groups empty: the loop alone does less work.
    room = 8 * round(ROOM * share / 8 + 0.5) if share >= 16 else 0
    end_G = jnp.cumsum(sizes_G)
    return _Layout(end_G - sizes_G, end_G, room)


def _in_blocks(x_MK: Array, layout: _Layout) -> Array:
    """Rows in blocks [G, room, K]; places that the group does not fill hold any row."""
    return x_MK.at[layout.rows_GB[0]].get(mode="clip")


def _in_rows(blocks_GBN: Array, layout: _Layout, num_rows: int) -> Array:
    """Back from blocks to M rows; rows that had no place in a block are zeros."""
    row_M = jnp.arange(num_rows, dtype=jnp.int32)
    group_M = (row_M[:, None] >= layout.end_G[None]).sum(1, dtype=jnp.int32)
    group_M = jnp.minimum(group_M, layout.end_G.shape[0] - 1)
    place_M = row_M - layout.start_G[group_M]
    placed_M = (place_M < layout.room) & (row_M < layout.end_G[-1])
    flat = blocks_GBN.reshape(-1, blocks_GBN.shape[-1])
    rows = flat.at[group_M * layout.room + place_M].get(mode="clip")
    return jnp.where(placed_M[:, None], rows, 0)


def _over_the_rest(layout: _Layout, num_rows: int, step, carry):
    """carry = step(carry, group, first, mine) for tiles of the rows that had no room.

    A tile begins with row `first`; `mine` [R, 1] says which of its rows are the group's and had no
    room. With balanced routing there is no tile.
    """
    tile = min(TILE, num_rows)
    first_G = layout.start_G + layout.room
    tiles_G = jnp.maximum(-(-(layout.end_G - first_G) // tile), 0)
    behind_G = jnp.cumsum(tiles_G)

    def body(index, carry):
        group = (index >= behind_G).sum(dtype=jnp.int32)
        wanted = first_G[group] + (index - behind_G[group] + tiles_G[group]) * tile
        # A last tile would reach past the end; it begins earlier and takes only what is its own.
        first = jnp.minimum(wanted, num_rows - tile)
        row_R1 = first + jnp.arange(tile, dtype=jnp.int32)[:, None]
        mine_R1 = (row_R1 >= wanted) & (row_R1 < layout.end_G[group])
        return step(carry, group, first, mine_R1)

    return lax.fori_loop(0, behind_G[-1], body, carry)


def rows_times_matrix(
    x_MK: Array,
    w_GKN: Array,
    sizes_G: Array,
    contract: int,
    out_dtype: DTypeLike | None = None,
) -> Array:
    """Each row against its group's matrix, contracting matrix axis `contract` (0: w, 1: w^T).

    `out_dtype=None` is that of x.
    """
    out_dtype = x_MK.dtype if out_dtype is None else out_dtype
    num_rows, wide = x_MK.shape[0], np.promote_types(x_MK.dtype, jnp.float32)
    layout = _layout(sizes_G, num_rows)
    if layout.room:
        batched = (((2,), (contract + 1,)), ((0,), (0,)))
        product = lax.dot_general(
            _in_blocks(x_MK, layout), w_GKN, batched, preferred_element_type=wide
        )
        out = _in_rows(product.astype(out_dtype), layout, num_rows)
    else:
        out = jnp.zeros_like(x_MK, shape=(num_rows, w_GKN.shape[2 - contract]), dtype=out_dtype)

    def step(out, group, first, mine_R1):
        tile = lax.dynamic_slice_in_dim(x_MK, first, len(mine_R1))
        matrix = lax.dynamic_index_in_dim(w_GKN, group, keepdims=False)
        product = lax.dot_general(
            tile, matrix, (((1,), (contract,)), ((), ())), preferred_element_type=wide
        )
        there = lax.dynamic_slice_in_dim(out, first, len(mine_R1))
        rows = jnp.where(mine_R1, product.astype(out.dtype), there)
        return lax.dynamic_update_slice_in_dim(out, rows, first, 0)

    return _over_the_rest(layout, num_rows, step, out)


def rows_transposed_times_rows(
    x_MK: Array, y_MN: Array, sizes_G: Array, out_dtype: DTypeLike
) -> Array:
    """sum over a group's rows of x^T y: [G, K, N], the gradient of the group's matrix."""
    wide = np.promote_types(x_MK.dtype, jnp.float32)
    num_rows = x_MK.shape[0]
    layout = _layout(sizes_G, num_rows)
    if layout.room:
        # Both factors: a NaN of another group's row times zero would be one here.
        mine_GB1 = layout.rows_GB[1][..., None]
        left, right = (jnp.where(mine_GB1, _in_blocks(one, layout), 0) for one in (x_MK, y_MN))
        batched = (((1,), (1,)), ((0,), (0,)))
        grads = lax.dot_general(left, right, batched, preferred_element_type=wide)
    else:
        shape = (sizes_G.shape[0], x_MK.shape[1], y_MN.shape[1])
        grads = jnp.zeros_like(x_MK, shape=shape, dtype=wide)

    def step(grads, group, first, mine_R1):
        left, right = (
            jnp.where(mine_R1, lax.dynamic_slice_in_dim(one, first, len(mine_R1)), 0)
            for one in (x_MK, y_MN)
        )
        product = lax.dot_general(
            left, right, (((0,), (0,)), ((), ())), preferred_element_type=wide
        )
        return lax.dynamic_update_index_in_dim(grads, grads[group] + product, group, 0)

    return _over_the_rest(layout, num_rows, step, grads).astype(out_dtype)


blocks = differentiable(rows_times_matrix, rows_transposed_times_rows)
