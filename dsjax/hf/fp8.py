"""Block FP8 as DeepSeek publishes it: e4m3 values, one scale for each 128x128 block.

    weight[m, n] = values[m, n] * scales[m // 128, n // 128]

The scales of `X.weight` are `X.weight_scale_inv`: despite its name it multiplies. Blocks at the
right and lower edge are cut short where a dimension is no multiple of 128. A "ue8m0" checkpoint's
scales are powers of two, in float32 (V3.1) or as bare exponents.
"""

import functools
import itertools
import math
import re
from collections.abc import Mapping

import ml_dtypes
import numpy as np
from jaxtyping import Float, Shaped

from dsjax.hf.rounding import rounded
from dsjax.hf.tensors import Tensor, placed, some, whole

SCALE = "_scale_inv"
# The weights that published FP8 checkpoints quantize: the projections of attention and feed-forward
# layers. Embedding, head, norms, gate and `eh_proj` stay as they are.
QUANTIZED = re.compile(
    r"model\.layers\.\d+\.(self_attn\.(q|q_a|q_b|kv_b|o)_proj|self_attn\.kv_a_proj_with_mqa|"
    r"mlp\.((shared_experts|experts\.\d+)\.)?(gate|up|down)_proj)\.weight"
)
BLOCK = 128
VALUES = np.dtype(ml_dtypes.float8_e4m3fn)
SCALES = (np.dtype(np.float32), np.dtype(ml_dtypes.float8_e8m0fnu))
LARGEST = float(ml_dtypes.finfo(VALUES).max)
# Rows dequantized at a time: few enough to stay in a core's cache.
AT_ONCE = 8
# Blocks with nothing larger in them are quantized as if there were (DeepSeek's own rule).
SMALLEST_AMAX = 1e-4


def is_quantized(name: str) -> bool:
    """Whether the hub tensor `name` is FP8 where a checkpoint is."""
    return QUANTIZED.fullmatch(name) is not None


@functools.cache
def grid(shape: tuple[int, ...]) -> tuple[int, ...]:
    """How many blocks a weight of `shape` has along each axis."""
    return tuple(math.ceil(n / BLOCK) for n in shape)


def dequantize(
    values_MN: Shaped[np.ndarray, "M N"],
    scales: Shaped[np.ndarray, "MB NB"],
    dtype: np.dtype,
    *,
    first: tuple[int, int] = (0, 0),
) -> Shaped[np.ndarray, "M N"]:
    """values * scales, the exact product rounded once to `dtype`.

    `first` is the place of `values_MN[0, 0]` inside its block, for a slice of a larger weight.
    """
    # A block has 16,384 values but only 256 different ones: multiplied and rounded once each.
    tables = _products(scales, dtype).view(f"u{dtype.itemsize}")
    codes_MN = values_MN.view(np.uint8)
    out_MN = np.empty(values_MN.shape, tables.dtype)
    # Where the table of a column's block begins; then a row is one look-up.
    begins_N = (first[1] + np.arange(values_MN.shape[1])) // BLOCK * 256
    places = np.empty((AT_ONCE, values_MN.shape[1]), np.intp)
    for i, band in enumerate(_blocks(first[0], values_MN.shape[0])):
        for row in range(band.start, band.stop, AT_ONCE):
            rows = slice(row, min(row + AT_ONCE, band.stop))
            here = places[: rows.stop - row]
            here[...] = codes_MN[rows]
            here += begins_N
            # No place is out of range; of the modes, "wrap" is the fastest.
            np.take(tables[i].reshape(-1), here, out=out_MN[rows], mode="wrap")
    return out_MN.view(dtype)


def _blocks(first: int, size: int) -> list[slice]:
    edges = [0, *range(BLOCK - first, size, BLOCK), size] if size else []
    return [slice(*pair) for pair in itertools.pairwise(edges)]


def _products(scales: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """[MB, NB, 256]: every FP8 code's value times each scale, rounded once.

    A product of 4 and 24 significant bits is exact in float64.
    """
    codes = np.arange(256, dtype=np.uint8).view(VALUES).astype(np.float64)
    exact = codes * scales.astype(np.float32).astype(np.float64)[..., None]
    return rounded(exact, dtype)


def quantize(
    weight_MN: Float[np.ndarray, "M N"], *, ue8m0: bool = False
) -> tuple[Shaped[np.ndarray, "M N"], Float[np.ndarray, "MB NB"]]:
    """FP8 values and their `block_scales` of a weight, which counts as float32.

    value = weight / scale, the exact quotient rounded once, half to even.
    """
    scales = block_scales(weight_MN, ue8m0=ue8m0)
    widths = [block.stop - block.start for block in _blocks(0, weight_MN.shape[1])]
    codes_MN = np.empty(weight_MN.shape, np.uint8)
    for i, band in enumerate(_blocks(0, weight_MN.shape[0])):
        scales_N = np.repeat(scales[i], widths)
        for row in range(band.start, band.stop, AT_ONCE):
            rows = slice(row, min(row + AT_ONCE, band.stop))
            codes_MN[rows] = _quotient(weight_MN[rows].astype(np.float32), scales_N)
    return codes_MN.view(VALUES), scales


def block_scales(
    weight_MN: Float[np.ndarray, "M N"], *, ue8m0: bool = False
) -> Float[np.ndarray, "MB NB"]:
    """max(amax of the block, 1e-4) / 448 in float32, or the power of two at or above it.

    ValueError if the weight is not finite.
    """
    amax = np.empty(grid(weight_MN.shape), np.float32)
    for i, band in enumerate(_blocks(0, weight_MN.shape[0])):
        amax_N = np.abs(weight_MN[band].astype(np.float32)).max(axis=0)
        amax[i] = np.maximum.reduceat(amax_N, np.arange(0, len(amax_N), BLOCK))
    if not np.isfinite(amax).all():
        raise ValueError("it holds values that are not finite, which FP8 cannot keep")
    scales = np.maximum(amax, np.float32(SMALLEST_AMAX)) / np.float32(LARGEST)
    if not ue8m0:
        return scales
    fraction, exponent = np.frexp(scales)
    return np.ldexp(np.float32(1), exponent - (fraction == 0.5))


def _quotient(weight_MN: np.ndarray, scales_N: np.ndarray) -> np.ndarray:
    """weight / scale as FP8 codes. By way of 16 bits, rounded to odd (see `dsjax.hf.rounding`)."""
    near_MN = weight_MN / scales_N
    bits_MN = near_MN.view(np.uint32)
    lost_MN = bits_MN & 0xFFFF
    short_MN = (bits_MN >> 16).astype(np.uint16)
    # What looks like a tie of FP8 may have been rounded to there by the division.
    rows, columns = np.nonzero(_ties_of_bfloat16().take(short_MN, mode="wrap") & (lost_MN == 0))
    short_MN |= lost_MN != 0
    weight, near = weight_MN[rows, columns], near_MN[rows, columns].astype(np.float64)
    error = np.abs(near * scales_N[columns]) - np.abs(weight)
    short = short_MN[rows, columns] - (error > 0).astype(np.uint16)
    short_MN[rows, columns] = np.where(error != 0, short | 1, short)
    return _codes_of_bfloat16().take(short_MN, mode="wrap")


@functools.cache
def _codes_of_bfloat16() -> np.ndarray:
    """The FP8 code nearest to each of the 65,536 numbers of bfloat16."""
    numbers = np.arange(1 << 16, dtype=np.uint16).view(ml_dtypes.bfloat16).astype(np.float32)
    with np.errstate(invalid="ignore"):  # some of them are no numbers
        return numbers.astype(VALUES).view(np.uint8)


@functools.cache
def _ties_of_bfloat16() -> np.ndarray:
    """Which of the 65,536 numbers of bfloat16 lie in the middle between two of FP8."""
    positive = np.arange(127, dtype=np.uint8).view(VALUES).astype(np.float32)
    middles = ((positive[1:] + positive[:-1]) / 2).astype(ml_dtypes.bfloat16).view(np.uint16)
    ties = np.zeros(1 << 16, np.bool_)
    ties[middles] = ties[middles | 0x8000] = True
    return ties


class Dequantized:
    """FP8 values with their scales as one tensor of type `dtype`; a slice reads only its part."""

    def __init__(self, name: str, values: Tensor, scales: Tensor, dtype: np.dtype):
        self.name, self.values, self.scales = name, values, scales
        self.shape, self.dtype = tuple(values.shape), np.dtype(dtype)
        self.path = getattr(values, "path", None)

    @property
    def checked_scales(self) -> "CheckedScales":
        return CheckedScales(placed(self.name + SCALE, self.scales), self.scales)

    def __getitem__(self, index: tuple[slice, ...]) -> np.ndarray:
        (top, bottom, _), (left, right, _) = (
            part.indices(n) for part, n in zip(index, self.shape, strict=True)
        )
        scales = self.checked_scales[
            slice(top // BLOCK, math.ceil(bottom / BLOCK)),
            slice(left // BLOCK, math.ceil(right / BLOCK)),
        ]
        values = self.values[slice(top, bottom), slice(left, right)]
        return dequantize(values, scales, self.dtype, first=(top % BLOCK, left % BLOCK))


class CheckedScales:
    """Scales in FP32; ValueError where one is read that is no positive number."""

    dtype = np.dtype(np.float32)

    def __init__(self, where: str, scales: Tensor):
        self.where, self.scales, self.shape = where, scales, tuple(scales.shape)

    def __getitem__(self, index: tuple[slice, ...]) -> np.ndarray:
        scales = self.scales[index].astype(np.float32)
        first = tuple(part.indices(n)[0] for part, n in zip(index, self.shape, strict=True))
        wrong = ~((scales > 0) & (scales < np.inf))
        if wrong.any():
            i, j = (int(n) for n in np.argwhere(wrong)[0])
            raise ValueError(
                f"{self.where}: [{i + first[0]}, {j + first[1]}] is {scales[i, j]}, expected a "
                "positive number; the checkpoint is damaged"
            )
        return scales


def dequantized(tensors: Mapping[str, Tensor], dtype: np.dtype | None = None) -> dict[str, Tensor]:
    """`tensors` with each FP8 weight and its scales as one tensor, of type `dtype` (BF16).

    ValueError, naming the tensor, if values and scales do not belong together; a scale that is no
    positive number is refused when it is read, or by `check_scales`.
    """
    dtype = np.dtype(ml_dtypes.bfloat16 if dtype is None else dtype)
    check_pairs(tensors)
    return {
        name: Dequantized(name, tensor, tensors[name + SCALE], dtype)
        if tensor.dtype == VALUES
        else tensor
        for name, tensor in tensors.items()
        if not name.endswith(SCALE)
    }


def check_pairs(tensors: Mapping[str, Tensor]) -> None:
    """ValueError unless every FP8 weight has scales of the right shape, and they nothing else."""
    quantized = {name for name, tensor in tensors.items() if tensor.dtype == VALUES}
    scales = {name.removesuffix(SCALE) for name in tensors if name.endswith(SCALE)}
    if lacking := sorted(quantized - scales):
        raise ValueError(
            f"{len(lacking)} FP8 tensors have no scales: {some([n + SCALE for n in lacking])}"
        )
    if idle := sorted(scales - quantized):
        raise ValueError(
            f"{len(idle)} scales belong to no FP8 tensor: {some([n + SCALE for n in idle])}"
        )
    for name in sorted(quantized):
        shape, scale = tuple(tensors[name].shape), tensors[name + SCALE]
        if len(shape) != 2:
            where = placed(name, tensors[name])
            raise ValueError(f"{where} is FP8 of shape {shape}, expected two dimensions")
        if tuple(scale.shape) != grid(shape) or scale.dtype not in SCALES:
            raise ValueError(
                f"{placed(name + SCALE, scale)} is {scale.dtype} {tuple(scale.shape)}, expected "
                f"{' or '.join(map(str, SCALES))} {grid(shape)} for {name} {shape}"
            )


def check_scales(tensors: Mapping[str, Tensor]) -> None:
    """`check_pairs`, and ValueError unless every scale is a positive number. Reads all of them."""
    check_pairs(tensors)
    for name, tensor in tensors.items():
        if name.endswith(SCALE):
            whole(CheckedScales(placed(name, tensor), tensor))
