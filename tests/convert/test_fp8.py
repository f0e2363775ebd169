"""Block FP8: every product and quotient rounded once, against float64 that is exact."""

import gzip
import json
from fractions import Fraction
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

import exact
from dsjax.hf import fp8
from dsjax.hf.rounding import rounded

CHECKPOINTS = Path(__file__).parents[3] / "shared" / "checkpoints"
E4M3 = np.dtype(ml_dtypes.float8_e4m3fn)
TYPES = {
    "bf16": (np.dtype(ml_dtypes.bfloat16), exact.BF16),
    "f16": (np.dtype(np.float16), exact.F16),
    "f32": (np.dtype(np.float32), exact.F32),
}
# Every FP8 code that is a number, in a block of its own shape.
CODES = np.array([c for c in range(256) if c & 0x7F != 0x7F], np.uint8).view(E4M3)


def double_rounding_scales(rng: np.random.Generator) -> np.ndarray:
    """Scales for which float32 products, rounded again, give another BF16 number.

    Some FP8 value times the scale lies so close to a tie of BF16 that float32 takes it for the tie.
    """
    ties = (2 * rng.integers(128, 256, 400) + 1) * 2.0**-18
    scales = (ties / rng.choice([1.125, 1.375, 1.625, 1.875], 400)).astype(np.float32)
    positive = CODES.astype(np.float32)[:127]
    twice = (positive * scales[:, None]).astype(ml_dtypes.bfloat16).astype(np.float64)
    once = exact.nearest(positive.astype(np.float64) * scales[:, None].astype(float), exact.BF16)
    return scales[(twice != once).any(axis=1)]


@pytest.mark.parametrize("name", TYPES)
def test_each_product_is_rounded_once(name: str, seed: int):
    rng = np.random.default_rng(seed)
    dtype, kind = TYPES[name]
    treacherous = double_rounding_scales(rng)
    assert len(treacherous) > 50
    scales = np.concatenate(
        [treacherous, 2.0 ** rng.integers(-20, 8, 20), rng.uniform(1e-9, 100, 100)]
    ).astype(np.float32)
    if name != "f16":  # whose numbers end at 65,504
        # Products that are subnormal, or smaller than the smallest number, or nearly the largest.
        ends = [1e-38, 1e-40, 3e-45, 1.4e-45, 2.0**-126, 7.0e35]
        scales = np.concatenate([scales, np.array(ends, np.float32)])
    values = np.zeros((1, len(scales) * 128), E4M3)
    for j in range(len(scales)):
        values[0, j * 128 : (j + 1) * 128] = rng.permutation(CODES)[:128]
    found = fp8.dequantize(values, scales[None], dtype).astype(np.float64)
    expected = exact.dequantized(values, scales[None], kind)
    np.testing.assert_array_equal(found, expected)
    np.testing.assert_array_equal(np.signbit(found), np.signbit(expected))


def test_overflow_is_infinite_and_nan_stays_nan():
    values = np.array([[0x7E, 0xFE, 0x7F, 0xFF]], np.uint8).view(E4M3)
    scales = np.array([[3e38]], np.float32)
    found = fp8.dequantize(values, scales, np.dtype(ml_dtypes.bfloat16)).astype(np.float32)
    np.testing.assert_array_equal(found, [[np.inf, -np.inf, np.nan, np.nan]])


def test_bare_exponents_are_scales_too():
    exponents = np.array([[120, 127, 130]], np.uint8).view(ml_dtypes.float8_e8m0fnu)
    values = np.random.default_rng(0).permutation(np.tile(CODES, 2))[None, :300]
    found = fp8.dequantize(values, exponents, np.dtype(np.float32))
    expected = exact.dequantized(values, np.array([[2.0**-7, 1.0, 8.0]]), exact.F32)
    np.testing.assert_array_equal(found, expected)


def test_a_slice_is_a_slice_of_the_whole(seed: int):
    rng = np.random.default_rng(seed)
    values = rng.choice(CODES, (300, 400))
    scales = rng.uniform(1e-5, 1e-3, (3, 4)).astype(np.float32)
    whole = exact.dequantized(values, scales, exact.BF16)
    lazy = fp8.Dequantized("w", values, scales, np.dtype(ml_dtypes.bfloat16))
    for _ in range(200):
        (top, bottom), (left, right) = (
            sorted(rng.integers(0, n + 1, 2).tolist()) for n in values.shape
        )
        part = lazy[slice(top, bottom), slice(left, right)]
        np.testing.assert_array_equal(part.astype(float), whole[top:bottom, left:right])


@pytest.mark.parametrize("ue8m0", [False, True])
@pytest.mark.parametrize("dtype", [ml_dtypes.bfloat16, np.float16, np.float32])
def test_quantize_rounds_each_quotient_once(ue8m0: bool, dtype: type, seed: int):
    rng = np.random.default_rng(seed)
    weight = rng.normal(0, 0.02, (300, 260)) * 10.0 ** rng.integers(-4, 3, (300, 1))
    weight[:128, :128] = 0  # a block of nothing
    weight[130, 130] = 448.0 * 2**4  # a scale that is a power of two by itself
    weight = weight.astype(dtype)
    values, scales = fp8.quantize(weight, ue8m0=ue8m0)
    expected_values, expected_scales = exact.quantized(weight, ue8m0=ue8m0)
    np.testing.assert_array_equal(scales.astype(float), expected_scales)
    np.testing.assert_array_equal(values.astype(float), expected_values)


def test_a_quotient_next_to_a_tie_is_not_the_tie():
    """Weights around (code + 1/2 step) * scale, for scales whose product is no float32."""
    rng = np.random.default_rng(3)
    wrong_if_rounded_twice = 0
    for amax in rng.uniform(0.01, 0.1, 60).astype(np.float32):
        scale = np.float32(amax / np.float32(448))
        ties = (CODES[:126].astype(np.float64) + CODES[1:127].astype(np.float64)) / 2
        near = (ties * float(scale)).astype(np.float32)
        near = np.concatenate([np.nextafter(near, np.float32(0)), near, [amax]])[None, :]
        near = near.astype(np.float32)
        padded = near[:, -128:]
        values, scales = fp8.quantize(padded)
        assert scales[0, 0] == scale
        expected, _ = exact.quantized(padded, ue8m0=False)
        np.testing.assert_array_equal(values.astype(float), expected)
        naive = (padded / scale).astype(E4M3).astype(float)
        wrong_if_rounded_twice += (naive != expected).sum()
    assert wrong_if_rounded_twice > 0


def test_the_oracle_itself_against_fractions():
    """Nearest by trying all numbers of the type, with exact rationals."""
    rng = np.random.default_rng(1)
    numbers = [Fraction(float(x)) for x in CODES.astype(np.float64)[:127]]
    for x in rng.uniform(0, 448, 200):
        distances = [abs(Fraction(x) - number) for number in numbers]
        best = min(range(127), key=lambda n: (distances[n], n % 2))
        assert exact.nearest(np.array(x), exact.E4M3) == float(numbers[best])


def test_float64_reaches_16_bits_in_one_step():
    """1 + 2^-8 + 2^-40 lies above the tie of BF16; by way of float32 it becomes the tie."""
    above = np.array([1 + 2.0**-8 + 2.0**-40])
    assert rounded(above, np.dtype(ml_dtypes.bfloat16)) == ml_dtypes.bfloat16(1 + 2.0**-7)
    assert above.astype(np.float32).astype(ml_dtypes.bfloat16) == ml_dtypes.bfloat16(1)


@pytest.mark.parametrize("wrong", [np.nan, np.inf, 0.0, -1.0])
def test_a_scale_that_is_no_positive_number_is_named(wrong: float):
    values, scales = np.zeros((300, 400), E4M3), np.ones((3, 4), np.float32)
    scales[2, 1] = wrong
    tensors = {"a.weight": values, "a.weight_scale_inv": scales}
    told = rf"a.weight_scale_inv: \[2, 1\] is {wrong}"
    with pytest.raises(ValueError, match=told):
        fp8.check_scales(tensors)
    lazy = fp8.dequantized(tensors)["a.weight"]
    with pytest.raises(ValueError, match=told):
        lazy[slice(290, 300), slice(130, 140)]
    assert lazy[slice(0, 200), slice(0, 400)].shape == (200, 400)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"a.weight_scale_inv": None}, "1 FP8 tensors have no scales: a.weight_scale_inv"),
        ({"b.weight_scale_inv": np.ones((1, 1), np.float32)}, "belong to no FP8 tensor: b.weight"),
        (
            {"a.weight_scale_inv": np.ones((4, 3), np.float32)},
            r"a.weight_scale_inv is float32 \(4, 3\), expected .* \(3, 4\) for a.weight \(300, 400",
        ),
        ({"a.weight_scale_inv": np.ones((3, 4), np.float16)}, "is float16"),
        ({"a.weight": np.zeros(5, E4M3)}, r"a.weight is FP8 of shape \(5,\)"),
    ],
)
def test_values_and_scales_that_do_not_belong_together(change: dict, told: str):
    tensors = {
        "a.weight": np.zeros((300, 400), E4M3),
        "a.weight_scale_inv": np.ones((3, 4), np.float32),
    }
    tensors = {name: t for name, t in (tensors | change).items() if t is not None}
    with pytest.raises(ValueError, match=told):
        fp8.dequantized(tensors)


def test_a_weight_that_is_not_finite_is_refused():
    with pytest.raises(ValueError, match="not finite"):
        fp8.quantize(np.array([[1.0, np.nan]], np.float32))


@pytest.mark.parametrize("name", ["deepseek_r1", "kimi_k2"])
def test_exactly_the_published_fp8_tensors_are_quantized(name: str):
    """91,991 and 139,644 real tensors; the shapes of all their scales."""
    path = CHECKPOINTS / f"{name}.tensors.json.gz"
    if not path.exists():
        pytest.skip(f"the published {path.name} is not beside this project")
    with gzip.open(path) as file:
        tensors = json.load(file)
    found = {tensor for tensor in tensors if fp8.is_quantized(tensor)}
    assert found == {t for t, entry in tensors.items() if entry["dtype"] == "F8_E4M3"}
    for tensor in found:
        grid = fp8.grid(tuple(tensors[tensor]["shape"]))
        assert list(grid) == tensors[tensor + fp8.SCALE]["shape"]
    kv_a = "model.layers.60.self_attn.kv_a_proj_with_mqa.weight_scale_inv"
    assert tensors[kv_a]["shape"] == [5, 56]
