"""The splash kernel in Pallas' interpreter against plain attention, on one device and on a mesh."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas.ops.tpu import splash_attention as library

from dsjax import sharding
from dsjax.nn import context, masks, splash, zigzag
from dsjax.nn.attend import attend
from dsjax.nn.masks import Places
from tests.tolerance import rel_err

# Heads, latent, width of a head's key, of the key that heads share, of a value.
B, N, C, H, R, W = 2, 2, 12, 16, 8, 16
SCALE = 0.3
pytestmark = pytest.mark.usefixtures("uncached")


def inputs(length: int, seed: int):
    """Queries, latents and shared keys, the weight that unfolds, a direction for the gradient."""
    rng = np.random.default_rng(seed)
    shapes = [(B, length, N, H + R), (B, length, C), (B, length, R), (C, N, H + W)]
    shapes.append((B, length, N, W))
    arrays = [jnp.asarray(rng.standard_normal(shape) * 0.5, jnp.float32) for shape in shapes]
    segments_BT = np.sort(rng.integers(1, 4, (B, length)), axis=1).astype(np.int32)
    segments_BT[1, -9:] = 0
    return arrays, jnp.asarray(segments_BT)


def unfold(tokens, up_CNX):
    latent_BSC, rope_BSR = tokens
    both = jnp.einsum("BSC,CNX->BSNX", latent_BSC, up_CNX)
    return (both[..., :H], rope_BSR), both[..., H:]


def plain(query, latent, rope, up, along, segments_BT):
    with jax.default_matmul_precision("highest"):
        keys, value = unfold((latent, rope), up)
        seen = masks.within_rows(Places(segments_BT, segments_BT))
        out = attend((query[..., :H], query[..., H:]), keys, value, seen, scale=SCALE)
        return (out * along).sum(), out


def ours(query, latent, rope, up, along, segments_BT, *, in_zigzag: bool):
    parts = sharding.axis_size("context")
    pieces = query, latent, rope, along, segments_BT
    if in_zigzag:
        pieces = [zigzag.lay_out(x, parts) for x in pieces]
    *pieces, segments_BT = (sharding.reshard(x, *LIE[x.ndim]) for x in pieces)
    query, latent, rope, along = pieces
    places = Places(segments_BT, segments_BT, segments_BT if in_zigzag else None)
    core = splash.core(query.shape, places, scale=SCALE, interpret=True)
    out = context.over_rows(
        core,
        (query[..., :H], query[..., H:]),
        (latent, rope),
        sharding.reshard(up, None, "heads", None),
        unfold,
        in_zigzag=in_zigzag,
    )
    value = (out * along).sum()
    if in_zigzag:
        out = zigzag.in_sequence(sharding.reshard(out, "batch", None, None, None), parts)
    return value, out


# The logical axes of arrays with so many dimensions.
LIE = {2: ("batch", "length"), 3: ("batch", "length", None), 4: context.QUERIES}


def check(length: int, mesh: jax.sharding.Mesh, in_zigzag: bool, seed: int) -> None:
    arrays, segments_BT = inputs(length, seed)
    by = {"argnums": (0, 1, 2, 3), "has_aux": True}
    expected = jax.jit(jax.grad(plain, **by))(*arrays, segments_BT)
    with jax.set_mesh(mesh):
        found = jax.jit(jax.grad(functools.partial(ours, in_zigzag=in_zigzag), **by))(
            *arrays, segments_BT
        )
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert rel_err(one, other) < 1e-5


def test_values_and_gradients_of_packed_rows(seed):
    check(256, sharding.make_mesh(devices=jax.devices()[:1]), False, seed)


@pytest.mark.parametrize(
    "in_zigzag",
    [
        pytest.param(False, id="in sequence", marks=pytest.mark.thorough),
        pytest.param(True, id="in zigzag"),
    ],
)
def test_rows_and_heads_cut_over_a_mesh(in_zigzag, seed):
    mesh = sharding.make_mesh(context=2, tensor=2, data=2)
    check(512, mesh, in_zigzag, seed)


@pytest.mark.parametrize("in_zigzag", [False, True], ids=["in sequence", "in zigzag"])
def test_blocks_of_the_mask_are_those_of_the_library(in_zigzag):
    ours, theirs = splash.Causal((64, 64)), library.CausalMask((64, 64))
    if in_zigzag:
        ours.q_sequence = theirs.q_sequence = zigzag.order(64, 4).astype(np.int32)
    counted = set()
    for row, column in np.ndindex(16, 16):
        block = slice(4 * row, 4 * row + 4), slice(4 * column, 4 * column + 4)
        np.testing.assert_array_equal(ours[block], theirs[block])
        counted.add(int(ours[block].sum()))
    assert counted == {0, 10, 16}


def test_which_lengths_fit():
    assert splash.fits(4096, 1) and splash.fits(131072, 16)
    assert not splash.fits(100, 1) and not splash.fits(256, 2)
