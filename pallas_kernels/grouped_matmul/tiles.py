"""Grouped product as a loop over groups and, inside, over tiles of each group's own rows.

The work is that of the real rows, rounded up to a tile per group, whatever the routing: trip counts
are dynamic, shapes are static. Plain XLA, so it runs everywhere; made for CPU.
"""

import jax
import jax.numpy as jnp
from jax import Array, lax


def _tile(num_rows: int, num_groups: int) -> int:
    """Rows per step: about half of an even share, between 8 and 128, a power of two."""
    share = max(num_rows // (2 * num_groups), 8)
    return min(1 << (share.bit_length() - 1), 128)


def _over_tiles(sizes_G: Array, tile: int, body, carry):
    """Runs carry = body(carry, group, first_row, rows_left) over every tile, groups in order."""
    ends_G = jnp.cumsum(sizes_G)

    def group_body(group, carry):
        end, size = ends_G[group], sizes_G[group]
        prepare, step = body(group)

        def tile_body(index, carry):
            row = end - size + index * tile
            return step(carry, prepare, row, end - row)

        return lax.fori_loop(0, (size + tile - 1) // tile, tile_body, carry)

    return lax.fori_loop(0, sizes_G.shape[0], group_body, carry)


def _padded(x: Array, tile: int) -> Array:
    """A last tile may reach past the end."""
    return jnp.pad(x, ((0, tile), (0, 0)))


def _rows_times_matrix(x_MK: Array, w_GKN: Array, sizes_G: Array, contract: int) -> Array:
    """Each row against its group's matrix, contracting matrix axis `contract` (0: w, 1: w^T)."""
    num_rows, tile = x_MK.shape[0], _tile(x_MK.shape[0], w_GKN.shape[0])
    x_MK = _padded(x_MK, tile)
    wide = jnp.promote_types(x_MK.dtype, jnp.float32)

    def body(group):
        matrix = lax.dynamic_index_in_dim(w_GKN, group, keepdims=False)

        def step(out, matrix, row, _):
            block = lax.dynamic_slice_in_dim(x_MK, row, tile)
            product = lax.dot_general(
                block, matrix, (((1,), (contract,)), ((), ())), preferred_element_type=wide
            )
            # Rows past the group's end are the next group's, which comes later and overwrites them.
            return lax.dynamic_update_slice_in_dim(out, product.astype(out.dtype), row, 0)

        return matrix, step

    out = _over_tiles(
        sizes_G,
        tile,
        body,
        jnp.zeros_like(x_MK, shape=(num_rows + tile, w_GKN.shape[2 - contract])),
    )[:num_rows]
    return jnp.where((jnp.arange(num_rows) < sizes_G.sum())[:, None], out, jnp.zeros_like(out))


def _rows_transposed_times_rows(x_MK: Array, y_MN: Array, sizes_G: Array, dtype) -> Array:
    """sum over a group's rows of x^T y: [G, K, N], the gradient of the group's matrix."""
    tile = _tile(x_MK.shape[0], sizes_G.shape[0])
    x_MK, y_MN = _padded(x_MK, tile), _padded(y_MN, tile)
    wide = jnp.promote_types(x_MK.dtype, jnp.float32)

    def body(group):
        def step(grads, _, row, rows_left):
            mine = jnp.arange(tile)[:, None] < rows_left
            left = lax.dynamic_slice_in_dim(x_MK, row, tile)
            left = jnp.where(mine, left, jnp.zeros_like(left))
            right = lax.dynamic_slice_in_dim(y_MN, row, tile)
            product = lax.dot_general(
                left, right, (((0,), (0,)), ((), ())), preferred_element_type=wide
            )
            return lax.dynamic_update_index_in_dim(grads, grads[group] + product, group, 0)

        return None, step

    shape = (sizes_G.shape[0], x_MK.shape[1], y_MN.shape[1])
    return _over_tiles(sizes_G, tile, body, jnp.zeros_like(x_MK, shape=shape, dtype=wide)).astype(
        dtype
    )


@jax.custom_vjp
def tiles(x_MK: Array, w_GKN: Array, sizes_G: Array) -> Array:
    """See `grouped_matmul`."""
    return _rows_times_matrix(x_MK, w_GKN, sizes_G, contract=0)


def _forward(x_MK, w_GKN, sizes_G):
    return tiles(x_MK, w_GKN, sizes_G), (x_MK, w_GKN, sizes_G)


def _backward(saved, grad_MN):
    x_MK, w_GKN, sizes_G = saved
    grad_x = _rows_times_matrix(grad_MN, w_GKN, sizes_G, contract=1)
    return grad_x, _rows_transposed_times_rows(x_MK, grad_MN, sizes_G, w_GKN.dtype), None


tiles.defvjp(_forward, _backward)
