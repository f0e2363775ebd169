"""Pairs of a row and a destination, sorted by destination, and rows moved along them and back.

Moving is a gather both ways, forward and backward: autodiff of a gather is a scatter-add, which is
slow on CPU and TPU and not deterministic on GPU.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

# Pairs of a device: they are counted in FP32, which has all whole numbers up to here.
MOST_PAIRS = 2**24
# Pairs that are counted at once.
COUNTED = 256


class Block(NamedTuple):
    """A buffer of U places for rows.

    `pair_U`: the pair j * M + m that a place belongs to (any pair where `used_U` is false).
    `place_JM`: the place of each pair; U if it has none here.
    """

    pair_U: Int[Array, " U"]
    used_U: Bool[Array, " U"]
    place_JM: Int[Array, "J M"]

    @property
    def row_U(self) -> Int[Array, " U"]:
        return self.pair_U % self.place_JM.shape[1]


class Pairs(NamedTuple):
    """Sorted by destination, stably; pairs with none stand behind.

    `pair_P`: the pair j * M + m at each rank. `rank_JM`: its inverse. `size_A`: pairs of each
    destination, and `start_A` the rank of the first.
    """

    pair_P: Int[Array, " P"]
    rank_JM: Int[Array, "J M"]
    to_JM: Int[Array, "J M"]
    start_A: Int[Array, " A"]
    size_A: Int[Array, " A"]

    @property
    def total(self) -> Int[Array, ""]:
        return self.size_A.sum(dtype=jnp.int32)

    def between(self, low: Int[Array, ""], room: int) -> tuple[Block, Int[Array, " A"]]:
        """The ranks [low, low + room) as a block, and how many of each destination it holds."""
        rank_U = low + jnp.arange(room, dtype=jnp.int32)
        inside_JM = (self.rank_JM >= low) & (self.rank_JM < jnp.minimum(low + room, self.total))
        block = self._block(
            rank_U, rank_U < self.total, jnp.where(inside_JM, self.rank_JM - low, room)
        )
        end_A = jnp.clip(self.start_A + self.size_A, low, low + room)
        return block, end_A - jnp.clip(self.start_A, low, low + room)

    def for_each(self, low: Int[Array, ""], room: int) -> Block:
        """`room` places for each destination in turn: of its own pairs [low, low + room)."""
        num = self.size_A.shape[0]
        own_AU = low + jnp.broadcast_to(jnp.arange(room, dtype=jnp.int32), (num, room))
        own_JM = self.rank_JM - self.start_A.at[self.to_JM].get(mode="clip") - low
        inside_JM = (self.to_JM < num) & (own_JM >= 0) & (own_JM < room)
        return self._block(
            (self.start_A[:, None] + own_AU).reshape(-1),
            (own_AU < self.size_A[:, None]).reshape(-1),
            jnp.where(inside_JM, self.to_JM * room + own_JM, num * room),
        )

    def _block(self, rank_U, used_U, place_JM) -> Block:
        return Block(self.pair_P.at[rank_U].get(mode="clip"), used_U, place_JM)


def pairs_by(to_JM: Int[Array, "J M"], num: int) -> Pairs:
    """Every row with each of its destinations; `num` or more is none.

    ValueError for more pairs than can be counted, or told apart by 32 bits.
    """
    to_P = jnp.minimum(to_JM, num).reshape(-1)
    num_pairs = to_P.shape[0]
    # They are numbered in 32 bits together with their destinations.
    if num_pairs > (most := min(MOST_PAIRS, (2**31 - 1) // (num + 1))):
        raise ValueError(
            f"{num_pairs} pairs of token and expert on one device are more than the {most} that "
            f"can be sorted to {num} destinations; give a device fewer tokens at a time: a smaller "
            "batch.micro in training, fewer rows or shorter prompts otherwise, or more devices"
        )
    # One number for each pair, in the order wanted: of all ways to sort, TPU's compiler and chip
    # take least time for this one. How many equal ones come before a pair needs no sorting.
    pair_P = jnp.arange(num_pairs, dtype=jnp.int32)
    pair_P = jax.lax.sort(to_P * num_pairs + pair_P, is_stable=False) % num_pairs
    before_P, size_all = _counted(to_P, num + 1)
    earlier_AA = jnp.tri(num + 1, k=-1, dtype=bool)
    start_all = jnp.where(earlier_AA, size_all[None], 0).sum(1, dtype=jnp.int32)
    rank_JM = (start_all[to_P] + before_P).reshape(to_JM.shape)
    return Pairs(pair_P, rank_JM, to_JM, start_all[:num], size_all[:num])


def first_marked(is_KM: Bool[Array, "K M"], number: int) -> Bool[Array, "J K M"]:
    """[j, k, m]: is k the j-th marked column of row m? For j < `number`, without sorting."""
    earlier_KK = jnp.tri(len(is_KM), k=-1, dtype=bool)
    rank_KM = (is_KM[None] & earlier_KK[:, :, None]).sum(1, dtype=jnp.int32)
    wanted_J = jnp.arange(number, dtype=jnp.int32)
    return is_KM[None] & (rank_KM[None] == wanted_J[:, None, None])


def _counted(to_P: Int[Array, " P"], num: int) -> tuple[Int[Array, " P"], Int[Array, " A"]]:
    """For each p how many q < p have to[q] = to[p], and how many p there are of each value."""
    num_pairs = to_P.shape[0]
    missing = -num_pairs % COUNTED
    to_GC = jnp.pad(to_P, (0, missing), constant_values=num).reshape(-1, COUNTED)
    hits_GCA = to_GC[..., None] == jnp.arange(num, dtype=jnp.int32)[None, None]
    # Products of zeros and ones, exact: a matrix unit counts them faster than anything else.
    earlier_CC = jnp.tri(COUNTED, k=-1, dtype=jnp.bfloat16)
    inside_GCA = jnp.einsum(
        "GCA,XC->GXA", hits_GCA.astype(jnp.bfloat16), earlier_CC, preferred_element_type=jnp.float32
    ).astype(jnp.int32)
    # So is a count of up to 256 in BF16; a cumulative sum would take seconds to compile.
    size_GA = hits_GCA.sum(1, dtype=jnp.int32)
    earlier_GG = jnp.tri(len(size_GA), k=-1, dtype=jnp.bfloat16)
    start_GA = jnp.einsum(
        "XG,GA->XA", earlier_GG, size_GA.astype(jnp.bfloat16), preferred_element_type=jnp.float32
    ).astype(jnp.int32)
    before_GCA = inside_GCA + start_GA[:, None]
    before_P = jnp.where(hits_GCA, before_GCA, 0).sum(-1, dtype=jnp.int32)
    return before_P.reshape(-1)[:num_pairs], size_GA.sum(0, dtype=jnp.int32)


@jax.custom_vjp
def placed(x_MD: Float[Array, "M D"], block: Block) -> Float[Array, "U D"]:
    """Rows in their places; unused places hold any row."""
    return x_MD[block.row_U]


placed.defvjp(
    lambda x_MD, block: (placed(x_MD, block), block),
    lambda block, grad_UD: (_collected(grad_UD, block.place_JM), None),
)


@jax.custom_vjp
def collected(y_UD: Float[Array, "U D"], block: Block) -> Float[Array, "M D"]:
    """The sum of what stands in each row's places: the transpose of `placed`."""
    return _collected(y_UD, block.place_JM)


collected.defvjp(
    lambda y_UD, block: (collected(y_UD, block), block),
    lambda block, grad_MD: (grad_MD[block.row_U], None),
)


@jax.custom_vjp
def combined(
    y_UD: Float[Array, "U D"], weight_JM: Float[Array, "J M"], block: Block
) -> Float[Array, "M D"]:
    """The sum of what stands in each row's places, times the weight that the row gives it."""
    return _collected(y_UD, block.place_JM, weight_JM)


def _combined_forward(y_UD, weight_JM, block):
    return combined(y_UD, weight_JM, block), (y_UD, weight_JM, block)


def _combined_backward(saved, grad_MD):
    y_UD, weight_JM, block = saved
    wide = np.promote_types(y_UD.dtype, jnp.float32)
    grad_UD = grad_MD[block.row_U].astype(wide)
    weight_U = weight_JM.reshape(-1)[block.pair_U]
    of_y = (grad_UD * weight_U[:, None].astype(wide)).astype(y_UD.dtype)
    of_weight_U = (grad_UD * y_UD.astype(wide)).sum(-1).astype(weight_JM.dtype)
    of_weight = of_weight_U.at[block.place_JM].get(mode="fill", fill_value=0)
    return of_y, of_weight, None


combined.defvjp(_combined_forward, _combined_backward)


def _collected(y_UD, place_JM, weight_JM=None):
    """One gather for each of the J columns, added in at least FP32."""
    wide = np.promote_types(y_UD.dtype, jnp.float32)

    def column(j: int):
        rows_MD = y_UD.at[place_JM[j]].get(mode="fill", fill_value=0).astype(wide)
        return rows_MD if weight_JM is None else rows_MD * weight_JM[j, :, None].astype(wide)

    return sum(map(column, range(1, len(place_JM))), start=column(0)).astype(y_UD.dtype)
