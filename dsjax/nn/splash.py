"""Causal attention of packed rows on TPU, by the splash kernel that comes with jax.

Blocks of scores that no query may see are skipped, forward and backward, and no score leaves the
chip's own memory. Under context parallelism each device runs it for its queries over all keys.
"""

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu import splash_attention as library
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int

from dsjax import sharding
from dsjax.nn import zigzag

# Rows of scores and of keys in a block; smaller ones leave the matrix unit idle between blocks.
BLOCK = 512
LANES = 128
QUERIES = ("batch", "length", "heads", None)
KEYS = ("batch", None, "heads", None)


def fits(length: int, num_devices: int) -> bool:
    """Whether rows of `length` tokens, cut over `num_devices`, divide into the kernel's blocks."""
    return length % (LANES * num_devices * num_devices) == 0


def splash(
    query_BTNX: Float[Array, "B T N X"],
    key_BSNX: Float[Array, "B S N X"],
    value_BSNW: Float[Array, "B S N W"],
    segments_BT: Int[Array, "B T"],
    segments_BS: Int[Array, "B S"],
    *,
    scale: float,
    in_zigzag: bool = False,
    interpret: bool = False,
) -> Float[Array, "B T N W"]:
    """softmax(scale q k) v over the keys that do not come later and lie in the same segment.

    Keys are in sequence; queries are too, or lie as `dsjax.nn.zigzag` has it. `interpret` runs the
    kernel on any platform, slowly.
    """
    length, heads = query_BTNX.shape[1:3]
    parts = sharding.axis_size("context")
    mask = library.CausalMask((length, length), shard_count=parts)
    if in_zigzag:
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

    def local(kernel, query_BTNX, key_BSNX, value_BSNW, segments_BT, segments_BS):
        def row(query_TNX, key_SNX, value_SNW, segments_T, segments_S):
            out_NTW = kernel(
                jnp.swapaxes(query_TNX * scale, 0, 1),
                jnp.swapaxes(key_SNX, 0, 1),
                jnp.swapaxes(value_SNW, 0, 1),
                segment_ids=library.SegmentIds(segments_T, segments_S),
            )
            return jnp.swapaxes(out_NTW, 0, 1).astype(value_SNW.dtype)

        return jax.vmap(row)(query_BTNX, key_BSNX, value_BSNW, segments_BT, segments_BS)

    operands = (query_BTNX, key_BSNX, value_BSNW, segments_BT, segments_BS)
    if not sharding.active():
        return local(kernel, *operands)
    where = jax.NamedSharding(jax.sharding.get_abstract_mesh(), P(None, *sharding.spec("length")))
    by_queries = kernel.manual_sharding_spec(where)
    kernel = jax.tree.map(jax.reshard, kernel, by_queries)
    specs = (
        by_queries,
        sharding.spec(*QUERIES),
        sharding.spec(*KEYS),
        sharding.spec(*KEYS),
        sharding.spec("batch", "length"),
        sharding.spec("batch", None),
    )
    # The kernel does not say along which axes its result varies.
    return jax.shard_map(local, in_specs=specs, out_specs=sharding.spec(*QUERIES), check_vma=False)(
        kernel, *operands
    )
