"""Rounding and block FP8 in float64 that is exact at every step; no type but float64 is used."""

import numpy as np

# Significant bits and the exponent of the smallest step, of each type.
BF16, F16, F32, E4M3 = (8, -133), (11, -24), (24, -149), (4, -9)
BLOCK = 128


def nearest(x: np.ndarray, kind: tuple[int, int]) -> np.ndarray:
    """`x` to the nearest number of a type, half to even; overflow is not looked after."""
    bits, smallest = kind
    _, exponent = np.frexp(x)
    step = np.maximum(exponent - bits, smallest)
    return np.ldexp(np.rint(np.ldexp(x, -step)), step)


def spread(scales: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    """The scale of every number of a weight of `shape`."""
    full = scales.astype(np.float64).repeat(BLOCK, axis=0).repeat(BLOCK, axis=1)
    return full[: shape[0], : shape[1]]


def dequantized(values: np.ndarray, scales: np.ndarray, kind: tuple[int, int]) -> np.ndarray:
    """value * scale, a product that float64 holds, rounded once."""
    return nearest(values.astype(np.float64) * spread(scales, values.shape), kind)


def quantized(weight: np.ndarray, *, ue8m0: bool) -> tuple[np.ndarray, np.ndarray]:
    """FP8 values and scales, both as float64.

    A quotient in float64 is near enough: between it and a tie of FP8 there is a step of 2^-29.
    """
    weight = weight.astype(np.float64)
    rows, columns = weight.shape
    scales = np.empty((-(-rows // BLOCK), -(-columns // BLOCK)))
    for i, j in np.ndindex(scales.shape):
        here = np.s_[i * BLOCK : (i + 1) * BLOCK, j * BLOCK : (j + 1) * BLOCK]
        amax = max(np.abs(weight[here]).max(), float(np.float32(1e-4)))
        scales[i, j] = 2.0 ** np.ceil(np.log2(amax / 448)) if ue8m0 else nearest(amax / 448, F32)
    return nearest(weight / spread(scales, weight.shape), E4M3), scales
