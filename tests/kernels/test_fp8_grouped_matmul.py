"""The grouped FP8 product on every backend against NumPy float64."""

import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.fp8_grouped_matmul import fp8_grouped_matmul
from tests.kernels import fp8_oracle
from tests.kernels.backends import BACKENDS, run
from tests.tolerance import TOLERANCE, rel_err

# Name -> (groups, group of each tile, N, K).
LAYOUTS = {
    "groups out of order, one twice, one empty": (3, [2, 0, 0], 64, 64),
    "tiles of no group": (2, [1, -1], 192, 128),
}


def drawn(seed: int, layout: str):
    groups, tiles, N, K = LAYOUTS[layout]
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((128 * len(tiles), K)) * np.exp(rng.standard_normal((1, K)))
    w = rng.standard_normal((groups, N, K)) * 10.0 ** np.arange(groups)[:, None, None]
    x = fp8_oracle.quantize(x, (1, 128), False)
    matrices = [fp8_oracle.quantize(one, (128, 128), False) for one in w]
    exact = np.zeros((128 * len(tiles), N))
    rows = fp8_oracle.dequantize(*x, (1, 128))
    for number, group in enumerate(tiles):
        if group >= 0:
            here = slice(number * 128, (number + 1) * 128)
            exact[here] = rows[here] @ fp8_oracle.dequantize(*matrices[group], (128, 128)).T
    operands = *x, *(np.stack(parts) for parts in zip(*matrices, strict=True))
    return [jnp.asarray(one) for one in (*operands, np.array(tiles, np.int32))], exact


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_product(layout, backend, seed):
    operands, exact = drawn(seed, layout)
    found = run(backend, fp8_grouped_matmul, *operands, out_dtype=jnp.float32)
    for tile in range(len(exact) // 128):  # groups differ tenfold: judged one by one
        here = slice(tile * 128, (tile + 1) * 128)
        assert rel_err(found[here], exact[here]) < TOLERANCE["f32"]


def test_a_wrong_group_is_seen(seed):
    (*operands, tiles), exact = drawn(seed, "tiles of no group")
    found = fp8_grouped_matmul(*operands, tiles - 1, out_dtype=jnp.float32)
    assert not rel_err(found, exact) < 0.1


def test_no_rows():
    _, _, N, K = LAYOUTS["tiles of no group"]
    x, w = jnp.zeros((0, K), jnp.float8_e4m3fn), jnp.zeros((2, N, K), jnp.float8_e4m3fn)
    groups = jnp.zeros(0, jnp.int32)
    y = fp8_grouped_matmul(x, jnp.zeros((0, 1)), w, jnp.zeros((2, 2, 1)), groups)
    assert y.shape == (0, N)


def test_bad_input_is_refused(seed):
    (*operands, groups), _ = drawn(seed, "tiles of no group")
    with pytest.raises(ValueError, match=r"and groups \[M/128\]; got .*\(3,\)$"):
        fp8_grouped_matmul(*operands, jnp.zeros(3, jnp.int32))
    with pytest.raises(ValueError, match="wants float8_e4m3fn, got float32 and float8_e4m3fn"):
        fp8_grouped_matmul(operands[0].astype(jnp.float32), *operands[1:], groups)
