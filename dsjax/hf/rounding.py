"""From one floating-point type to a narrower one, rounded once."""

import numpy as np


def rounded(exact: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """`exact` in `dtype`, to nearest, half to even.

    float64 to a 16-bit type goes through float32 in most libraries, which rounds twice: a number
    just above a tie of the narrow type can become that tie on the way.
    """
    if exact.dtype == np.float64 and np.dtype(dtype).itemsize < 4:
        exact = to_odd_float32(exact)
    with np.errstate(over="ignore"):
        return exact.astype(dtype, copy=False)


def to_odd_float32(exact: np.ndarray) -> np.ndarray:
    """float64 to float32, towards zero, with the last bit set where anything was lost.

    Such a number rounds to any type at least two bits shorter as the exact one does: one that lies
    near a tie of the shorter type never becomes that tie.
    """
    with np.errstate(over="ignore"):
        near = exact.astype(np.float32)
    back = near.astype(np.float64)
    lost, away = back != exact, np.abs(back) > np.abs(exact)
    bits = near.view(np.uint32)
    return np.where(lost, (bits - away) | 1, bits).view(np.float32)
