"""Rotary positions: published frequency tables, softmax scales, and rotation as complex numbers."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from dsjax.config import Mla, Rope, Yarn
from dsjax.nn import rope
from dsjax.nn.mla import MlaAttention
from tests.tolerance import TOLERANCE, rel_err

V3 = Rope(yarn=Yarn(factor=40.0))
V2 = Rope(yarn=Yarn(factor=40.0, mscale=0.707, mscale_all_dim=0.707))
K2 = Rope(theta=50000.0, yarn=Yarn(factor=32.0, beta_fast=1.0, beta_slow=1.0))

PAIRS = [0, 9, 10, 11, 16, 20, 23, 31]
V3_FREQUENCIES = [1, 0.0749894209, 0.0562341325, 0.0390069266, 0.0055, 7.90569415e-4, 3.33380358e-5]
V3_FREQUENCIES += [3.33380358e-6]
K2_FREQUENCIES = [1, 0.0476886124, 0.0340072782, 0.024250967, 4.47213595e-3, 3.61404677e-5]
K2_FREQUENCIES += [1.31058542e-5, 8.76441291e-7]


@pytest.mark.parametrize(
    ("spec", "golden"), [(V3, V3_FREQUENCIES), (K2, K2_FREQUENCIES)], ids=["V3", "K2"]
)
def test_frequencies_are_the_published_ones(spec, golden):
    # The tables have nine or fewer figures and, K2's, come from float32.
    np.testing.assert_allclose(rope.frequencies(spec, 64)[PAIRS], golden, rtol=3e-7)


def test_without_yarn_frequencies_are_plain_powers():
    found = rope.frequencies(Rope(theta=100.0), 8)
    np.testing.assert_allclose(found, [1.0, 100**-0.25, 0.1, 100**-0.75], rtol=1e-15)


@pytest.mark.parametrize(
    ("spec", "scale"),
    [
        (V3, 0.1352337789),
        (V2, 192**-0.5 * 1.5896261651),
        (K2, 192**-0.5 * 1.34657359**2),
        (Rope(yarn=Yarn(factor=64.0)), 192**-0.5 * 1.41588831**2),
        (Rope(), 192**-0.5),
    ],
    ids=["V3", "V2", "K2", "factor 64", "no YaRN"],
)
def test_softmax_scale_is_the_published_one(spec, scale):
    mla = Mla(
        num_heads=1,
        q_lora_rank=None,
        kv_lora_rank=2,
        qk_nope_head_dim=128,
        qk_rope_head_dim=64,
        v_head_dim=2,
        rope=spec,
    )
    attention = MlaAttention(mla, 2, std=1.0, eps=1e-6, rngs=nnx.Rngs(0))
    assert attention.scale == pytest.approx(scale, rel=5e-9)


def test_cos_and_sin_are_scaled_only_by_unequal_mscales():
    assert rope.amplitude(V3) == rope.amplitude(V2) == rope.amplitude(K2) == 1.0
    unequal = Rope(yarn=Yarn(factor=40.0, mscale=1.0, mscale_all_dim=0.5))
    expected = (0.1 * math.log(40) + 1) / (0.05 * math.log(40) + 1)
    assert rope.amplitude(unequal) == pytest.approx(expected)


@pytest.mark.parametrize("spec", [Rope(), V3, Rope(yarn=Yarn(factor=8.0, mscale_all_dim=0.5))])
def test_neighbours_turn_as_complex_numbers(spec, seed):
    rng = np.random.default_rng(seed)
    x_BTNR = rng.standard_normal((2, 5, 3, 8))
    positions_BT = rng.integers(0, 100, (2, 5))
    angle_BT1I = (positions_BT[..., None] * rope.frequencies(spec, 8))[:, :, None]
    turned = (x_BTNR[..., ::2] + 1j * x_BTNR[..., 1::2]) * np.exp(1j * angle_BT1I)
    expected = np.empty_like(x_BTNR)
    expected[..., ::2], expected[..., 1::2] = turned.real, turned.imag
    with jax.enable_x64(True):
        found = rope.rotate(jnp.asarray(x_BTNR), jnp.asarray(positions_BT, jnp.int32), spec)
    assert rel_err(found, expected * rope.amplitude(spec)) < TOLERANCE["f64"]


def test_angles_are_float32_for_bfloat16_inputs():
    x_BTNR = jnp.zeros((1, 1, 1, 2), jnp.bfloat16).at[..., 0].set(1)
    found = rope.rotate(x_BTNR, jnp.array([[100_001]]), Rope())
    assert found.dtype == jnp.bfloat16
    # In bfloat16 the position itself would be off by hundreds of radians.
    expected = [math.cos(100_001), math.sin(100_001)]
    assert rel_err(found[0, 0, 0], expected) < TOLERANCE["bf16"]
