"""The FP8 product of groups with places on every backend against NumPy float64."""

import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.fp8_masked_matmul import IMPLEMENTATIONS, fp8_masked_matmul
from tests.kernels import fp8_oracle
from tests.kernels.backends import run, tolerance
from tests.tolerance import rel_err

# Name -> (places, sizes, N, K).
SHAPES = {
    "few places": (12, [12, 0, 5], 64, 128),
    "more than a tile": (136, [136, 3], 64, 192),
}


def drawn(seed: int, shape: str):
    places, sizes, N, K = SHAPES[shape]
    rng = np.random.default_rng(seed)
    exact = np.zeros((len(sizes), places, N))
    groups = []
    for group, size in enumerate(sizes):
        x = fp8_oracle.quantize(rng.standard_normal((places, K)), (1, 128), False)
        w = fp8_oracle.quantize(10.0**group * rng.standard_normal((N, K)), (128, 128), False)
        wide = fp8_oracle.dequantize(*x, (1, 128)), fp8_oracle.dequantize(*w, (128, 128))
        exact[group, :size] = wide[0][:size] @ wide[1].T
        # Whatever was left in places that are not used.
        x[0].view(np.uint8)[size:], x[1][size:] = 0x7F, np.nan
        groups.append((*x, *w))
    operands = [jnp.asarray(np.stack(parts)) for parts in zip(*groups, strict=True)]
    return [*operands, jnp.asarray(sizes, jnp.int32)], exact


@pytest.mark.parametrize("backend", IMPLEMENTATIONS)
@pytest.mark.parametrize("shape", SHAPES)
def test_product(shape, backend, seed):
    operands, exact = drawn(seed, shape)
    found = run(backend, fp8_masked_matmul, *operands, out_dtype=jnp.float32)
    for one, other in zip(found, exact, strict=True):  # groups differ tenfold
        assert rel_err(one, other) < tolerance(backend)


def test_a_wrong_size_is_seen(seed):
    (*operands, sizes), exact = drawn(seed, "few places")
    found = fp8_masked_matmul(*operands, sizes - 1, out_dtype=jnp.float32)
    assert not rel_err(found, exact) < 0.01


def test_bad_input_is_refused(seed):
    (*operands, sizes), _ = drawn(seed, "few places")
    with pytest.raises(ValueError, match=r"and sizes \[G\]; got .*\(2,\)$"):
        fp8_masked_matmul(*operands, sizes[:2])
    with pytest.raises(ValueError, match=r"wants sizes of int32 or int64 .* got float32\(3,\)"):
        fp8_masked_matmul(*operands, sizes.astype(jnp.float32))
    with pytest.raises(ValueError, match=r"wants x of float8_e4m3fn .* got float32\("):
        fp8_masked_matmul(operands[0].astype(jnp.float32), *operands[1:], sizes)
