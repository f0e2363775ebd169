"""The yardstick itself, and the settings that conftest promises."""

import zlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from tests.tolerance import TOLERANCE, rel_err


def test_rel_err_is_the_frobenius_error():
    assert rel_err([[3.0, 4.0]], [[3.0, 4.0]]) == 0.0
    assert rel_err([[3.0, 5.0]], [[3.0, 4.0]]) == pytest.approx(0.2, rel=1e-15)
    assert rel_err(jnp.asarray([1.5], jnp.bfloat16), [1.0]) == 0.5
    assert rel_err([0.0], [0.0]) == 0.0
    assert rel_err([1e-300], [0.0]) == np.inf


@pytest.mark.parametrize("wrong", [np.nan, np.inf, -np.inf])
def test_what_is_not_a_number_never_passes(wrong):
    assert not rel_err([wrong, 1.0], [1.0, 1.0]) < max(TOLERANCE.values())
    assert not rel_err([1.0, 1.0], [wrong, 1.0]) < max(TOLERANCE.values())
    assert not rel_err([wrong], [wrong]) < max(TOLERANCE.values())
    assert not rel_err([wrong], [0.0]) < max(TOLERANCE.values())


def test_a_broadcast_is_no_match():
    with pytest.raises(AssertionError, match=r"shape \(1, 2\) is not the oracle's \(2,\)"):
        rel_err([[1.0, 2.0]], [1.0, 2.0])


def test_promotion_is_never_silent():
    with pytest.raises(ValueError, match="jax_numpy_dtype_promotion=strict"):
        jnp.ones(2, jnp.float32) + jnp.ones(2, jnp.bfloat16)
    with pytest.raises(ValueError, match="rank_promotion"):
        jnp.ones((2, 2)) + jnp.ones(2)
    assert jax.device_count() == 8


def test_adam_runs_under_strict_promotion_and_is_unchanged():
    decay, count, moment = 0.999, jnp.asarray(7, jnp.int32), {"w": jnp.asarray([1.0, -2.0])}
    corrected = optax.tree.bias_correction(moment, decay, count)["w"]
    with jax.numpy_dtype_promotion("standard"):
        as_shipped = optax.tree.bias_correction.__wrapped__(moment, decay, count)["w"]
    assert np.array_equal(corrected, as_shipped)
    # 1 - 0.999**7 keeps the float32 rounding of 0.999**7, which is that much of 0.007.
    assert rel_err(corrected, np.array([1.0, -2.0]) / (1 - decay**7)) < 7 * 2**-24 / 0.007

    optimizer = optax.adam(1e-2)
    optimizer.update(moment, optimizer.init(moment))


def test_the_seed_is_the_name_s(seed, request):
    assert seed == zlib.crc32(request.node.nodeid.encode())
    assert "test_the_seed_is_the_name_s" in request.node.nodeid
