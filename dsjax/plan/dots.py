"""Floating-point operations of matrix products as they stand in a compiled program."""

import json
import math
import re

import numpy as np

from dsjax.plan.hlo import Computation, Instruction

LABELS = re.compile(r"\bdim_labels=(\w+)_(\w+)->(\w+)")
WINDOW = re.compile(r"\bwindow=\{([^}]*)\}")
GROUPS = re.compile(r"\bbatch_group_count=(\d+)")
CONTRACTING = re.compile(r"\blhs_contracting_dims=\{([\d,]*)\}")
GEMM = re.compile(r'"lhs_contracting_dimensions":(\[[^\]]*\])')
STATED = re.compile(r'"cost_estimate":\{"flops":"?(\d+)')
# jax's splash attention (TPU), which states nothing, and its products per pair of query and key:
# as wide as keys (scores, gradients of queries and keys) and as values (results, their gradients).
SPLASH = re.compile(r"splash_mha_(fwd|dq|dkv)")
WIDTHS = {"fwd": (1, 1), "dq": (2, 1), "dkv": (2, 2)}
# TPU's ragged product, which states nothing either.
RAGGED = re.compile(r"ragged-dot")
BLOCK = re.compile(r'\\"block_kv(?:_dq|_dkv)?\\": (\d+)')
PRODUCTS = ("dot", "ragged-dot", "convolution", "custom-call")
# Kernels, which may be products and should say what they cost.
KERNEL = re.compile(r'custom_call_target="(tpu_custom_call|mosaic_gpu|__gpu\$xla\.gpu\.triton)')


def flops(instruction: Instruction, within: Computation) -> float | None:
    """2 per multiply-add of a product; 0 for anything else.

    A custom call counts as its author's `cost_estimate`, or as the product that a GPU library
    computes; splash attention as what a causal mask leaves. None: a kernel that says nothing.
    """
    if instruction.opcode not in PRODUCTS:
        return 0.0
    if instruction.opcode == "convolution":
        return _convolution(instruction, within)
    if instruction.opcode == "custom-call":
        return _custom(instruction, within)
    lhs = _shape(instruction, within, 0)
    contracted = _dims(CONTRACTING.search(instruction.attributes).group(1))
    out = instruction.arrays[0].shape
    if instruction.opcode == "ragged-dot" and len(out) > len(lhs):
        # Rows of each group are contracted, so a row meets one of the groups, not all of them.
        out = out[1:]
    return 2.0 * math.prod(out) * math.prod(lhs[dim] for dim in contracted)


def is_fp8(instruction: Instruction, within: Computation) -> bool:
    """Whether two of a product's operands are FP8: both factors, beside which scales may stand."""
    arrays = (array for name in instruction.operands for array in within.instructions[name].arrays)
    return sum(array.dtype.startswith("f8") for array in arrays) > 1


def _custom(instruction: Instruction, within: Computation) -> float | None:
    if stated := STATED.search(instruction.attributes):
        return float(stated.group(1))
    if gemm := GEMM.search(instruction.attributes):
        lhs = _shape(instruction, within, 0)
        contracted = (lhs[int(dim)] for dim in json.loads(gemm.group(1)))
        return 2.0 * math.prod(instruction.arrays[0].shape) * math.prod(contracted)
    if RAGGED.match(instruction.name):
        return _ragged(instruction, within)
    if splash := SPLASH.match(instruction.name):
        return _splash(instruction, within, *WIDTHS[splash.group(1)])
    is_integer = all(array.dtype[0] in "sup" for array in instruction.arrays)
    return None if KERNEL.search(instruction.attributes) and not is_integer else 0.0


def _ragged(instruction: Instruction, within: Computation) -> float:
    """Rows [M, K] times a matrix of each group, or rows of each group times other rows.

    Of both kinds every row meets K * N numbers. What only finds the groups computes nothing.
    """
    arrays = (within.instructions[name].arrays[0] for name in instruction.operands)
    rows = [one.shape for one in arrays if "f" in one.dtype][:1]
    return math.fsum(2.0 * math.prod(shape) * instruction.arrays[0].shape[-1] for shape in rows)


def _splash(instruction: Instruction, within: Computation, keys: int, values: int) -> float:
    """Products of all pairs in the blocks that a causal mask does not rule out."""
    arrays = (within.instructions[name].arrays[0] for name in instruction.operands)
    # [B, N, T, X], or without B where a device has one row. Before them come integers: the mask.
    query, key, value = [one.shape for one in arrays if "f" in one.dtype and len(one.shape) > 2][:3]
    found = BLOCK.search(instruction.attributes)
    blocks = key[-2] / int(found.group(1)) if found else 1
    width = keys * key[-1] + values * value[-1]
    return 2.0 * math.prod(query[:-1]) * key[-2] * width * (blocks + 1) / (2 * blocks)


def _shape(instruction: Instruction, within: Computation, number: int) -> tuple[int, ...]:
    return within.instructions[instruction.operands[number]].arrays[0].shape


def _dims(text: str) -> list[int]:
    return [int(number) for number in text.split(",") if number]


def _convolution(instruction: Instruction, within: Computation) -> float:
    """2 * batch * features out * features in * pairs of window and input that meet, per dimension.

    What a TPU calls a convolution is mostly a product: batch dimensions become spatial ones,
    dilated so that each output position meets one element. Therefore only what meets counts.
    """
    lhs, rhs, out = LABELS.search(instruction.attributes).groups()
    shapes = (_shape(instruction, within, 0), _shape(instruction, within, 1))
    lhs_size, rhs_size = (
        dict(zip(labels, shape, strict=True))
        for labels, shape in zip((lhs, rhs), shapes, strict=True)
    )
    out_size = dict(zip(out, instruction.arrays[0].shape, strict=True))
    window = WINDOW.search(instruction.attributes)
    given = dict(item.split("=") for item in window.group(1).split()) if window else {}
    meeting = [
        _meeting(lhs_size[dim], rhs_size[dim], out_size[dim], given, int(dim))
        for dim in out
        if dim.isdigit()
    ]
    groups = GROUPS.search(instruction.attributes)
    pairs = math.prod(meeting) / (int(groups.group(1)) if groups else 1)
    return 2.0 * out_size["b"] * out_size["f"] * rhs_size["i"] * pairs


def _meeting(size: int, window: int, out: int, given: dict[str, str], dim: int) -> int:
    """Pairs (output position, window position) that fall on an element of the input."""

    def of(key: str, default: str) -> str:
        return given[key].split("x")[dim] if key in given else default

    stride, dilate = int(of("stride", "1")), int(of("lhs_dilate", "1"))
    low = int(of("pad", "0_0").split("_")[0])
    at_out = np.arange(out)[:, None] * stride
    at = at_out + np.arange(window)[None] * int(of("rhs_dilate", "1")) - low
    return int(((at >= 0) & (at <= (size - 1) * dilate) & (at % dilate == 0)).sum())
