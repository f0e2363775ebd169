"""Causal attention of packed rows on TPU, by the splash kernel that comes with jax.

Blocks of scores that no query may see are skipped, forward and backward, and no score leaves the
chip's own memory. Under context parallelism each device runs it for its queries over all keys.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.pallas.ops.tpu import splash_attention as library
from jax.sharding import PartitionSpec as P

from dsjax import sharding
from dsjax.nn import masks, zigzag
from dsjax.nn.attend import joined
from dsjax.nn.context import Core
from dsjax.nn.masks import Places

# Rows of scores and of keys in a block; smaller ones leave the matrix unit idle between blocks.
BLOCK = 512
LANES = 128


def fits(length: int, num_devices: int) -> bool:
    """Whether rows of `length` tokens, cut over `num_devices`, divide into the kernel's blocks."""
    return length % (LANES * num_devices * num_devices) == 0


class Causal(library.CausalMask):
    """The library's mask; a block that is all visible or all hidden is known by its borders.

    The library looks at every block before it compiles: 2 minutes for 131,072 tokens without this.
    """

    def __getitem__(self, index):
        rows, columns = index
        queries_T = self.q_sequence[rows]
        first, past, _ = columns.indices(self.shape[1])
        shape = len(queries_T), past - first
        if queries_T.max() < first:
            return np.zeros(shape, bool)
        if queries_T.min() >= past - 1:
            return np.ones(shape, bool)
        return super().__getitem__(index)


def core(
    shape: tuple[int, int, int, int], places: Places, *, scale: float, interpret: bool = False
) -> Core:
    """softmax(scale q k) v over the keys that do not come later and lie in the same segment.

    `shape`: of all queries, [B, T, N, X]. Keys are in sequence; queries are too, or lie as
    `dsjax.nn.zigzag` has it. `interpret` runs the kernel on any platform, slowly.
    """
    length, heads = shape[1:3]
    parts = sharding.axis_size("context")
    mask = Causal((length, length), shard_count=parts)
    if places.index_BT is not None:
        mask.q_sequence = zigzag.order(length, parts).astype(mask.q_sequence.dtype)
    block = next(size for size in (BLOCK, 256, LANES) if length // parts % size == 0)
    local_heads = heads // sharding.axis_size("tensor")
    kernel = library.make_splash_mha(
        library.MultiHeadMask([mask] * local_heads),
        block_sizes=library.BlockSizes(
            block_q=block,
            block_kv=block,
            block_q_dkv=block,
            block_kv_dkv=block,
            block_q_dq=block,
            block_kv_dq=block,
        ),
        head_shards=1,
        q_seq_shards=parts,
        interpret=interpret,
    )
    by_queries = None
    if sharding.active():
        where = P(None, *sharding.spec("length"))
        by_queries = kernel.manual_sharding_spec(
            jax.NamedSharding(jax.sharding.get_abstract_mesh(), where)
        )
        kernel = jax.tree.map(jax.reshard, kernel, by_queries)
    segments_BT = places.segments_BT
    if segments_BT is None:
        segments_BT = jnp.zeros_like(places.positions_BT)
    return Core(
        functools.partial(_on_device, scale),
        (kernel, segments_BT, masks.whole_rows(segments_BT, places)),
        (by_queries, sharding.spec("batch", "length"), sharding.spec("batch", None)),
        # The kernel does not say along which axes its result varies.
        checked=False,
    )


def _on_device(scale: float, queries, keys, value_BSNW, operands):
    kernel, segments_BT, segments_BS = operands
    query_BTNX, key_BSNX = joined(queries, keys, value_BSNW.shape[2])

    def row(query_TNX, key_SNX, value_SNW, segments_T, segments_S):
        out_NTW = kernel(
            *(jnp.swapaxes(x, 0, 1) for x in (query_TNX * scale, key_SNX, value_SNW)),
            segment_ids=library.SegmentIds(segments_T, segments_S),
        )
        return jnp.swapaxes(out_NTW, 0, 1).astype(value_SNW.dtype)

    return jax.vmap(row)(query_BTNX, key_BSNX, value_BSNW, segments_BT, segments_BS)
