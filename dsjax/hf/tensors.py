"""What every source of weights looks like: hub names to tensors that are read when sliced."""

import math
from collections.abc import Iterator
from typing import Protocol, runtime_checkable

import numpy as np


@runtime_checkable
class Tensor(Protocol):
    """An array, or one on a disk: `tensor[one slice for each axis]` reads that part and no more."""

    shape: tuple[int, ...]
    dtype: np.dtype

    def __getitem__(self, index: tuple[slice, ...]) -> np.ndarray: ...


def whole(tensor: Tensor) -> np.ndarray:
    return tensor[(slice(None),) * len(tensor.shape)]


def num_bytes(tensor: Tensor) -> int:
    return math.prod(tensor.shape) * tensor.dtype.itemsize


def rows(tensor: Tensor, start: int, end: int, num_bytes: int) -> Iterator[tuple[slice, ...]]:
    """Indices of rows `start` to `end`, about `num_bytes` at a time, in multiples of 128 rows.

    Such a part of an FP8 weight touches no block that another part touches.
    """
    each = math.prod(tensor.shape[1:]) * tensor.dtype.itemsize
    step = max(num_bytes // max(each, 1) // 128, 1) * 128
    others = (slice(None),) * (len(tensor.shape) - 1)
    for row in range(start, end, step):
        yield (slice(row, min(row + step, end)), *others)


def some(names: list[str]) -> str:
    """The first few of a list that may be long."""
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")


def placed(name: str, tensor: Tensor) -> str:
    """`name`, and the file that the tensor lies in, if it lies in one."""
    path = getattr(tensor, "path", None)
    return name if path is None else f"{name} in {path}"
