"""Who holds which tokens, by hand; what they see, by counting; attention over it, unchanged."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsjax import sharding
from dsjax.nn import masks, zigzag
from dsjax.nn.attend import attend
from dsjax.nn.masks import Places, Visibility
from tests.tolerance import TOLERANCE, rel_err

SIZES = [(2, 1), (12, 3), (16, 1), (16, 2), (16, 4), (16, 8), (40, 4), (48, 8)]


def seen_by_device(token_T: np.ndarray, num_devices: int) -> list[int]:
    """Visible pairs of each device, counted one by one; the row lies as `token_T` says."""
    return [
        sum(1 for query in piece for key in range(len(token_T)) if key <= query)
        for piece in token_T.reshape(num_devices, -1).tolist()
    ]


def test_the_order_by_hand():
    assert zigzag.order(8, 2).tolist() == [0, 1, 6, 7, 2, 3, 4, 5]
    assert zigzag.inverse(8, 2).tolist() == [0, 1, 4, 5, 6, 7, 2, 3]
    assert zigzag.order(6, 3).tolist() == [0, 5, 1, 4, 2, 3]
    assert zigzag.order(4, 1).tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize(("length", "num_devices"), SIZES)
def test_device_i_holds_chunks_i_and_2n_minus_1_minus_i(length, num_devices):
    size = length // (2 * num_devices)
    pieces = zigzag.order(length, num_devices).reshape(num_devices, 2, size)
    for i in range(num_devices):
        for chunk, found in zip((i, 2 * num_devices - 1 - i), pieces[i].tolist(), strict=True):
            assert found == [chunk * size + offset for offset in range(size)]


@pytest.mark.parametrize(("length", "num_devices"), SIZES)
def test_every_device_sees_as_many_pairs(length, num_devices):
    token_T = zigzag.order(length, num_devices)
    each = length * (length + 1) // (2 * num_devices)
    assert seen_by_device(token_T, num_devices) == [each] * num_devices
    # The same from the mask that the layers use.
    visibility = Visibility(jnp.asarray(token_T[None]), jnp.arange(length)[None])
    pieces = np.asarray(visibility.matrix()).reshape(num_devices, -1)
    assert pieces.sum(1).tolist() == [each] * num_devices


def test_contiguous_pieces_are_not_balanced():
    first, *_, last = seen_by_device(np.arange(48), 8)
    assert (first, last) == (21, 273)


@pytest.mark.parametrize(("length", "num_devices"), SIZES)
def test_every_device_has_as_many_blocks_to_compute(length, num_devices):
    # What a kernel that skips masked blocks saves: blocks as large as a chunk, some key visible.
    chunk = length // (2 * num_devices)
    token_T = zigzag.order(length, num_devices)
    seen_TS = token_T[:, None] >= np.arange(length)
    blocks = seen_TS.reshape(num_devices, 2, chunk, 2 * num_devices, chunk).any((2, 4))
    assert blocks.sum((1, 2)).tolist() == [2 * num_devices + 1] * num_devices


@pytest.mark.parametrize(("length", "num_devices"), SIZES)
def test_order_and_inverse_undo_each_other(length, num_devices):
    token_T, place_T = zigzag.order(length, num_devices), zigzag.inverse(length, num_devices)
    np.testing.assert_array_equal(token_T[place_T], np.arange(length))
    np.testing.assert_array_equal(place_T[token_T], np.arange(length))


@pytest.mark.parametrize("num_devices", [1, 2, 4])
@pytest.mark.parametrize(("shape", "axis"), [((16,), 0), ((2, 16), 1), ((3, 2, 16, 5), -2)])
def test_arrays_lie_as_the_order_says(shape, axis, num_devices, seed):
    x = np.random.default_rng(seed).integers(0, 100, shape).astype(np.int32)
    laid = zigzag.lay_out(jnp.asarray(x), num_devices, axis=axis)
    np.testing.assert_array_equal(laid, np.take(x, zigzag.order(16, num_devices), axis))
    back = zigzag.in_sequence(laid, num_devices, axis=axis)
    np.testing.assert_array_equal(back, x)
    undone = zigzag.in_sequence(jnp.asarray(x), num_devices, axis=axis)
    np.testing.assert_array_equal(undone, np.take(x, zigzag.inverse(16, num_devices), axis))


def test_the_gradient_goes_back_where_it_came_from_without_scatter(seed):
    rng = np.random.default_rng(seed)
    weight_BTD = rng.standard_normal((2, 16, 3)).astype(np.float32)

    def loss(x_BTD):
        return (zigzag.lay_out(x_BTD, 4) * weight_BTD).sum()

    found = jax.grad(loss)(jnp.zeros((2, 16, 3)))
    np.testing.assert_array_equal(found, weight_BTD[:, zigzag.inverse(16, 4)])
    program = str(jax.make_jaxpr(jax.grad(loss))(jnp.zeros((2, 16, 3))))
    assert "concatenate" in program
    assert "scatter" not in program and "gather" not in program


def test_pieces_on_the_mesh():
    x_BT = jnp.tile(jnp.arange(16, dtype=jnp.int32), (2, 1))

    @jax.jit
    def cut(x_BT):
        whole_BT = sharding.reshard(x_BT, "batch", None)
        return sharding.reshard(zigzag.lay_out(whole_BT, 4), "batch", "length")

    @jax.jit
    def gathered(x_BT):
        return zigzag.in_sequence(sharding.reshard(x_BT, "batch", None), 4)

    with jax.set_mesh(sharding.make_mesh(data=2, context=4)):
        laid_BT = cut(sharding.reshard(x_BT, "batch", "length"))
        back_BT = gathered(laid_BT)
    held = {
        shard.index[1].start or 0: shard.data[0].tolist() for shard in laid_BT.addressable_shards
    }
    assert held == {0: [0, 1, 14, 15], 4: [2, 3, 12, 13], 8: [4, 5, 10, 11], 12: [6, 7, 8, 9]}
    np.testing.assert_array_equal(back_BT, x_BT)


@pytest.mark.parametrize("packed", [False, True], ids=["one document", "packed"])
def test_attention_over_rows_that_lie_so(packed, seed):
    # Queries as they lie, keys in sequence, visibility by the tokens' own places.
    rng, (B, T, N, H) = np.random.default_rng(seed), (2, 16, 2, 3)
    segments_BT = np.array([[1] * 7 + [2] * 9, [1] * 3 + [2] * 10 + [0] * 3])
    token_T = zigzag.order(T, 4)
    with jax.enable_x64(True):
        query, key, value = (jnp.asarray(rng.standard_normal((B, T, N, H))) for _ in range(3))
        segments = jnp.asarray(segments_BT) if packed else None
        places = Places(jnp.tile(jnp.arange(T), (B, 1)), segments)
        expected = attend((query,), (key,), value, masks.within_rows(places), scale=0.5)
        visibility = Visibility(
            jnp.asarray(token_T[None]),
            jnp.arange(T)[None],
            zigzag.lay_out(segments, 4) if packed else None,
            segments,
        )
        found = attend((zigzag.lay_out(query, 4),), (key,), value, visibility, scale=0.5)
    assert rel_err(found, np.asarray(expected)[:, token_T]) < TOLERANCE["f64"]


@pytest.mark.parametrize(("length", "num_devices"), [(12, 4), (8, 3), (7, 1), (8, 0)])
def test_lengths_that_do_not_divide_are_refused(length, num_devices):
    message = f"a length of {length} does not divide into two chunks for each of {num_devices} dev"
    with pytest.raises(ValueError, match=message):
        zigzag.order(length, num_devices)
    with pytest.raises(ValueError, match=message):
        zigzag.lay_out(jnp.zeros((1, length)), num_devices)
