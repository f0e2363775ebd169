"""How far a result may lie from its oracle: the error, and its bounds named by their cause."""

import numpy as np
from numpy.typing import ArrayLike

TOLERANCE = {
    # Sums in another order over a whole tiny model in float64 (eps 1.1e-16), with room for depth.
    "f64": 1e-9,
    # The same in float32 (eps 6e-8): a few hundred roundings that do not all cancel.
    "f32": 1e-5,
    # bfloat16 keeps 8 bits of mantissa: one rounding of the result costs at most 2**-9 of it.
    "bf16": 2.0**-8,
}


def rel_err(actual: ArrayLike, expected: ArrayLike) -> float:
    """|actual - expected| / |expected| in the Frobenius norm, in float64.

    NaN in either gives NaN, which fails every `rel_err(...) < bound`: compare that way round.
    Against an oracle of zeros only zeros pass (0.0), all else is infinitely wrong. Shapes must be
    equal.
    """
    a, e = np.asarray(actual, np.float64), np.asarray(expected, np.float64)
    if a.shape != e.shape:
        raise AssertionError(f"shape {a.shape} is not the oracle's {e.shape}")
    if not e.any():
        return float("inf") if a.any() else 0.0
    with np.errstate(invalid="ignore"):  # inf - inf
        return float(np.linalg.norm(a - e) / np.linalg.norm(e))
