"""Rotary positions as the published checkpoints store them: interleaved pairs, YaRN frequencies."""

import math

import jax.numpy as jnp
import numpy as np
from einops import rearrange
from jaxtyping import Array, Float, Int

from dsjax.config import Rope, Yarn
from dsjax.params import upcast


def _mscale(factor: float, mscale: float) -> float:
    return 0.1 * mscale * math.log(factor) + 1.0 if factor > 1 else 1.0


def frequencies(rope: Rope, dim: int) -> np.ndarray:
    """Radians per position of each of the dim/2 pairs, float64 (YaRN, arXiv 2309.00071 eq. 23).

    Pairs that turn more than `beta_fast` times over the original context keep their frequency,
    those below `beta_slow` are slowed by `factor`, a linear ramp lies between. Applied at every
    position, short ones too, as DeepSeek trained it.
    """
    pairs = np.arange(0, dim, 2, dtype=np.float64)
    base = rope.theta ** (-pairs / dim)
    yarn = rope.yarn
    if yarn is None:
        return base

    def pair_of(rotations: float) -> float:
        turns = yarn.original_context / (2 * math.pi * rotations)
        return dim * math.log(turns) / (2 * math.log(rope.theta))

    low = max(math.floor(pair_of(yarn.beta_fast)), 0)
    high = min(math.ceil(pair_of(yarn.beta_slow)), dim - 1)
    width = high - low if high != low else 0.001
    slowed = np.clip((np.arange(dim // 2) - low) / width, 0.0, 1.0)
    return base / yarn.factor * slowed + base * (1.0 - slowed)


def amplitude(rope: Rope) -> float:
    """The factor on cos and sin: m(mscale) / m(mscale_all_dim), 1 for every DeepSeek checkpoint."""
    yarn: Yarn | None = rope.yarn
    if yarn is None:
        return 1.0
    return _mscale(yarn.factor, yarn.mscale) / _mscale(yarn.factor, yarn.mscale_all_dim)


def softmax_factor(rope: Rope) -> float:
    """m^2, m = 0.1 mscale_all_dim ln(factor) + 1: YaRN's temperature on attention scores."""
    if rope.yarn is None:
        return 1.0
    return _mscale(rope.yarn.factor, rope.yarn.mscale_all_dim) ** 2


def rotate(
    x_BTNR: Float[Array, "B T N R"], positions_BT: Int[Array, "B T"], rope: Rope
) -> Float[Array, "B T N R"]:
    """Turns each pair (x[2i], x[2i+1]) by position * frequency_i; angles in FP32 at least."""
    wide = upcast(x_BTNR)
    even, odd = rearrange(wide, "b t n (i two) -> two b t n i", two=2)
    inv_freq = jnp.asarray(frequencies(rope, x_BTNR.shape[-1]), wide.dtype)
    angle = positions_BT.astype(wide.dtype)[:, :, None, None] * inv_freq[None, None, None]
    cos, sin = amplitude(rope) * jnp.cos(angle), amplitude(rope) * jnp.sin(angle)
    turned = jnp.stack([even * cos - odd * sin, even * sin + odd * cos], axis=-1)
    return rearrange(turned, "b t n i two -> b t n (i two)").astype(x_BTNR.dtype)
