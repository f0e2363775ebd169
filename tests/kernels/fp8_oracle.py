"""Block FP8 in NumPy float64, from the table of e4m3's 256 numbers. Nothing of ours in it."""

import ml_dtypes
import numpy as np

E4M3 = np.dtype(ml_dtypes.float8_e4m3fn)
_SIZES = np.arange(127, dtype=np.uint8).view(E4M3).astype(np.float64)
_MIDDLES = (_SIZES[1:] + _SIZES[:-1]) / 2


def nearest(quotient: np.ndarray) -> np.ndarray:
    """e4m3 codes of float64 numbers, half to even; NaN gives NaN."""
    size = np.abs(quotient)
    code = np.searchsorted(_MIDDLES, size, "left")
    tie = (code < 126) & (_MIDDLES[np.minimum(code, 125)] == size)
    code = code + (tie & (code % 2 == 1))
    code = np.where(np.isnan(quotient), 127, code) | (np.signbit(quotient) * 128)
    return code.astype(np.uint8).view(E4M3)


def quantize(
    x: np.ndarray, block: tuple[int, int], power_of_two: bool
) -> tuple[np.ndarray, np.ndarray]:
    """Values and scales, one block at a time. A quotient of two float32 has room in float64: none
    lies so near a tie of e4m3 that rounding it there makes it one."""
    x = np.asarray(x, np.float32)
    rows, columns = (-(-n // size) for n, size in zip(x.shape, block, strict=True))
    values, scales = np.zeros(x.shape, E4M3), np.zeros((rows, columns), np.float32)
    for i in range(rows):
        for j in range(columns):
            here = tuple(slice(at * n, (at + 1) * n) for at, n in zip((i, j), block, strict=True))
            amax = np.abs(x[here]).max()
            scale = max(float(amax), float(np.float32(1e-4))) / 448
            if power_of_two and np.isfinite(amax):
                scale = 2.0 ** np.ceil(np.log2(scale))
            scales[i, j] = scale if np.isfinite(amax) else np.nan
            values[here] = nearest(x[here].astype(np.float64) / scales[i, j].astype(np.float64))
    return values, scales


def dequantize(values: np.ndarray, scales: np.ndarray, block: tuple[int, int]) -> np.ndarray:
    wide = scales.astype(np.float64).repeat(block[0], 0).repeat(block[1], 1)
    return values.astype(np.float64) * wide[: values.shape[0], : values.shape[1]]
