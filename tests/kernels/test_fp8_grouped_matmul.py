"""The grouped FP8 product on every backend against NumPy float64."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.fp8_grouped_matmul import fp8_grouped_matmul, fp8_sorted_matmul
from pallas_kernels.fp8_grouped_matmul.dequantize import dequantize_matrices
from pallas_kernels.grouped_matmul.ragged import ragged_rows_times_matrix
from pallas_kernels.quantize import dequantize_rows
from pallas_kernels.tiles import num_tiles, tiles
from tests.kernels import fp8_oracle
from tests.kernels.backends import PRODUCTS, run, tolerance
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


@pytest.mark.parametrize("backend", PRODUCTS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_product(layout, backend, seed):
    operands, exact = drawn(seed, layout)
    found = run(backend, fp8_grouped_matmul, *operands, out_dtype=jnp.float32)
    for tile in range(len(exact) // 128):  # groups differ tenfold: judged one by one
        here = slice(tile * 128, (tile + 1) * 128)
        assert rel_err(found[here], exact[here]) < tolerance(backend)


# (rows, sizes): skewed, empty, odd, rows behind; all in one; no row in any; fewer rows than groups.
SIZES = [(330, [0, 3, 257, 0, 41]), (128, [0, 128]), (5, [0, 0]), (2, [1, 0, 0, 1])]


def sorted_rows(seed: int, rows: int, sizes: list[int]):
    """The same as `drawn`, for rows without tiles and K that cuts a block."""
    rng, N, K = np.random.default_rng(seed), 64, 192
    x = rng.standard_normal((rows, K)) * np.exp(rng.standard_normal((rows, 1)))
    w = rng.standard_normal((len(sizes), N, K))
    x = fp8_oracle.quantize(x, (1, 128), False)
    matrices = [fp8_oracle.quantize(one, (128, 128), False) for one in w]
    group = np.repeat(np.arange(len(sizes)), sizes)
    wide = [fp8_oracle.dequantize(*one, (128, 128)) for one in matrices]
    exact = np.zeros((rows, N))
    for row, at in enumerate(group):
        exact[row] = fp8_oracle.dequantize(*x, (1, 128))[row] @ wide[at].T
    operands = *x, *(np.stack(parts) for parts in zip(*matrices, strict=True))
    return [jnp.asarray(one) for one in (*operands, np.array(sizes, np.int32))], exact


@pytest.mark.parametrize(
    ("backend", "number"),
    [
        *((name, i) for name in ("dequantize", "dequantize_bf16") for i in range(len(SIZES))),
        ("reference", 2),
        *(pytest.param(name, 2, marks=pytest.mark.thorough) for name in ("gpu", "tpu")),
    ],
)
def test_sorted_rows(number, backend, seed):
    operands, exact = sorted_rows(seed, *SIZES[number])
    found = run(backend, fp8_sorted_matmul, *operands, out_dtype=jnp.float32)
    assert rel_err(found, exact) < tolerance(backend)


def test_a_tpu_has_a_ragged_product_for_it(seed):
    (x, scales, w, w_scales, sizes), exact = sorted_rows(seed, *SIZES[0])
    wide = dequantize_rows(x, scales), dequantize_matrices(w, w_scales)
    found = ragged_rows_times_matrix(*wide, sizes, contract=1, out_dtype=jnp.float32)
    assert rel_err(found, exact) < TOLERANCE["f32"]


@pytest.mark.parametrize("function", [fp8_sorted_matmul, fp8_grouped_matmul])
def test_no_platform_rounds_what_was_dequantized(function, seed):
    if function is fp8_sorted_matmul:
        operands, _ = sorted_rows(seed, *SIZES[1])
    else:
        operands, _ = drawn(seed, "tiles of no group")
    call = functools.partial(function, implementation="dequantize")
    program = str(jax.make_jaxpr(call)(*operands))
    assert program.count("Precision.HIGHEST") == 2 * program.count("dot_general[") > 0


def test_tiles_are_enough_for_any_sizes(seed):
    rng = np.random.default_rng(seed)
    for rows, groups in [(1, 1), (1, 4), (130, 4), (1000, 3), (260, 130)]:
        worst = np.ones(groups, int)[:rows]
        worst[0] += 128 * ((rows - len(worst)) // 128)
        some = rng.multinomial(rows, rng.dirichlet(np.full(groups, 0.3)))
        for sizes in (worst, some):
            assert (-(-sizes // 128)).sum() <= num_tiles(rows, groups)
        assert (-(-worst // 128)).sum() == num_tiles(rows, groups)


def test_rows_go_into_tiles_and_back():
    rows, sizes = 300, np.array([0, 130, 0, 128, 5], np.int32)
    x = 1 + np.arange(rows, dtype=np.float32)[:, None]
    layout = tiles(jnp.asarray(sizes), rows)
    assert layout.group_T.tolist() == [1, 1, 3, 4, -1, -1, -1]
    expected = np.zeros((7 * 128, 1))
    expected[:130], expected[256:384], expected[384:389] = x[:130], x[130:258], x[258:263]
    assert (np.asarray(layout.into(jnp.asarray(x))) == expected).all()
    back = np.asarray(layout.back(jnp.asarray(expected)))
    assert (back[:263] == x[:263]).all()
    assert not back[263:].any()  # places that nobody filled


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
    with pytest.raises(ValueError, match=r"fp8_sorted_matmul wants w of .* with 3 dimensions"):
        fp8_sorted_matmul(*operands[:2], operands[2][0], operands[3], groups)
    with pytest.raises(ValueError, match=r"wants x of float8_e4m3fn .* got float32\("):
        fp8_grouped_matmul(operands[0].astype(jnp.float32), *operands[1:], groups)
    with pytest.raises(ValueError, match=r"fp8_sorted_matmul wants .* and sizes .*\(3,\)"):
        fp8_sorted_matmul(*operands, jnp.zeros(3, jnp.int32))
