"""The arithmetic of block FP8, element by element, as every backend does it.

    scale = max(amax, 1e-4) / 448          value = x / scale, in e4m3

Both quotients are the exact ones rounded once, half to even, though nothing here divides: GPUs and
compilers differ in the last bit of a quotient, and that bit decides ties. An estimate picks the two
neighbours, and products that float32 holds exactly pick between them. So all backends, and the
NumPy converter of a checkpoint, agree to the bit. Plain jnp on float32, fit for kernel bodies.
"""

import jax.numpy as jnp
import numpy as np
from jax import Array, lax

LARGEST = 448.0
# Blocks with nothing larger in them are quantized as if there were (DeepSeek's own rule).
SMALLEST_AMAX = 1e-4

_INFINITY = 0x7F800000
_SIGN = np.int32(-(2**31))
# float32 keeps 23 bits after the point and e4m3 three.
_STEP = np.int32(1 << 20)
_SMALLEST_NORMAL = 2.0**-6


def _bits(x: Array) -> Array:
    return lax.bitcast_convert_type(x, jnp.int32)


def _float(bits: Array) -> Array:
    return lax.bitcast_convert_type(bits, jnp.float32)


def _halves(x: Array) -> tuple[Array, Array]:
    """x as the exact sum of two floats of 12 bits: their products with short numbers are exact."""
    high = _float(_bits(x) & np.int32(-(1 << 12)))
    return high, x - high


def magnitude(x: Array) -> Array:
    """|x| as int32 that order alike, infinity above all numbers and NaN above infinity."""
    return _bits(x) & ~_SIGN


def scales(amax: Array, *, power_of_two: bool) -> Array:
    """Scale of a block from the largest `magnitude` in it: NaN where that is not finite.

    With `power_of_two` ("ue8m0") the power of two at or above amax / 448.
    """
    largest = jnp.maximum(_float(amax), SMALLEST_AMAX)
    estimate = largest * (1 / LARGEST)
    high, low = _halves(estimate)
    error = (largest - high * LARGEST) - low * LARGEST
    scale = estimate + error * (1 / LARGEST)
    if power_of_two:
        scale = _float((_bits(scale) + np.int32(0x7FFFFF)) & np.int32(_INFINITY))
    return jnp.where(amax < _INFINITY, scale, jnp.nan)


def nearest(x: Array, scale: Array, inverse: Array) -> Array:
    """x / scale rounded to e4m3, as float32 that a cast to e4m3 keeps; NaN where the scale is NaN.

    `inverse` is 1 / scale to a few units in the last place. Nothing in x may be larger than 448
    times its scale. The sign of a zero is kept.
    """
    size = _float(magnitude(x))
    quotient = size * inverse
    # Below the smallest normal number e4m3 goes in even steps, those of the binade above it: there
    # all numbers are handled, and shifted back.
    shift = jnp.where(quotient < _SMALLEST_NORMAL, jnp.float32(_SMALLEST_NORMAL), jnp.float32(0))
    below = _bits(quotient + shift) & -_STEP
    middle = _float(below | (_STEP >> 1)) - shift
    high, low = _halves(scale)
    # Is |x| above middle * scale? Left of it the difference is exact where it matters.
    excess, rest = size - middle * high, middle * low
    is_odd = (below & _STEP) != 0
    up = (excess > rest) | ((excess == rest) & is_odd)
    rounded = _float(jnp.where(up, below + _STEP, below)) - shift
    return _float(_bits(rounded) | (_bits(x) & _SIGN))


def encoded(x: Array) -> Array:
    """`nearest`'s numbers as e4m3: the cast, which XLA's CPU does in more than all steps before."""
    size, sign = magnitude(x), (_bits(x) >> 24) & 0x80
    # The exponent's bias is 127 here and 7 there. Below its normal numbers e4m3 counts steps.
    normal = (size >> 20) - ((127 - 7) << 3)
    steps = (_float(size) * 2.0**9).astype(jnp.int32)
    code = jnp.where(_float(size) < _SMALLEST_NORMAL, steps, normal)
    code = jnp.where(size > _INFINITY, 0x7F, code) | sign
    return lax.bitcast_convert_type(code.astype(jnp.uint8), jnp.float8_e4m3fn)
