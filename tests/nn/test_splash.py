"""The splash kernel in Pallas' interpreter against plain attention, on one device and on a mesh."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsjax import sharding
from dsjax.nn import masks, splash, zigzag
from dsjax.nn.attend import attend
from dsjax.nn.masks import Places
from tests.tolerance import rel_err

B, N, X, W = 2, 2, 24, 16
SCALE = 0.3
pytestmark = pytest.mark.usefixtures("uncached")


def inputs(length: int, seed: int):
    rng = np.random.default_rng(seed)
    shapes = [(B, length, N, X), (B, length, N, X), (B, length, N, W), (B, length, N, W)]
    arrays = [jnp.asarray(rng.standard_normal(shape), jnp.float32) for shape in shapes]
    segments_BT = np.sort(rng.integers(1, 4, (B, length)), axis=1).astype(np.int32)
    segments_BT[1, -9:] = 0
    return arrays, jnp.asarray(segments_BT)


def plain(query, key, value, along, segments_BT):
    with jax.default_matmul_precision("highest"):
        places = Places(segments_BT, segments_BT)
        out = attend((query,), (key,), value, masks.within_rows(places), scale=SCALE)
        return (out * along).sum(), out


def ours(query, key, value, along, segments_BT, *, in_zigzag: bool):
    parts = sharding.axis_size("context")
    if in_zigzag:
        query, along, queries_BT = (zigzag.lay_out(x, parts) for x in (query, along, segments_BT))
    else:
        queries_BT = segments_BT
    query, along = (sharding.reshard(x, *splash.QUERIES) for x in (query, along))
    key, value = (sharding.reshard(x, *splash.KEYS) for x in (key, value))
    out = splash.splash(
        query,
        key,
        value,
        sharding.reshard(queries_BT, "batch", "length"),
        sharding.reshard(segments_BT, "batch", None),
        scale=SCALE,
        in_zigzag=in_zigzag,
        interpret=True,
    )
    value = (out * along).sum()
    if in_zigzag:
        out = zigzag.in_sequence(sharding.reshard(out, "batch", None, None, None), parts)
    return value, out


def check(length: int, mesh: jax.sharding.Mesh, in_zigzag: bool, seed: int) -> None:
    arrays, segments_BT = inputs(length, seed)
    expected = jax.jit(jax.grad(plain, argnums=(0, 1, 2), has_aux=True))(*arrays, segments_BT)
    with jax.set_mesh(mesh):
        function = jax.grad(
            functools.partial(ours, in_zigzag=in_zigzag), argnums=(0, 1, 2), has_aux=True
        )
        found = jax.jit(function)(*arrays, segments_BT)
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert rel_err(one, other) < 1e-5


def test_values_and_gradients_of_packed_rows(seed):
    check(256, sharding.make_mesh(devices=jax.devices()[:1]), False, seed)


@pytest.mark.parametrize("in_zigzag", [False, True], ids=["in sequence", "in zigzag"])
def test_rows_and_heads_cut_over_a_mesh(in_zigzag, seed):
    mesh = sharding.make_mesh(context=2, tensor=2, data=2)
    check(512, mesh, in_zigzag, seed)


def test_which_lengths_fit():
    assert splash.fits(4096, 1) and splash.fits(131072, 16)
    assert not splash.fits(100, 1) and not splash.fits(256, 2)
