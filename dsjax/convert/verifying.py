"""Whether two checkpoints, of any kind, are the same model down to the last bit."""

import dataclasses
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from dsjax.convert.exporting import in_published_order
from dsjax.convert.models import differing_field
from dsjax.convert.opened import Checkpoint, open_checkpoint
from dsjax.convert.shards import WORKERS
from dsjax.hf import complete, fp8, names
from dsjax.hf.tensors import Tensor, rows, some
from dsjax.progress import ByteProgress

# Compared at a time by each worker.
PIECE = 4 * 2**20
Pair = tuple[Tensor, Tensor]


@dataclasses.dataclass(frozen=True)
class Difference:
    """How many values of a tensor differ, and the largest difference: its place, both values."""

    count: int
    place: tuple[int, ...]
    one: float
    other: float

    @property
    def size(self) -> float:
        """NaN against a number is the largest there is."""
        size = abs(self.one - self.other)
        return float("inf") if np.isnan(size) else size


def verify(one: Path, other: Path, *, say: Callable[[str], None] = print) -> bool:
    """Whether `one` and `other` hold the same model; tells where they first differ.

    FP8 checkpoints have to be equal in their bytes; an FP8 one equals a wider one if what it stands
    for, rounded to the other's type, does; of other types the values have to be equal. ValueError
    if one of them is no complete checkpoint.
    """
    left, right = _opened(one), _opened(other)
    if told := differing_field(left.model, right.model):
        say(f"different models: {told}")
        return False
    mine, theirs = _compared(left), _compared(right)
    if apart := sorted(_weights(mine) ^ _weights(theirs)):
        where = one if apart[0] in mine else other
        say(f"different: {len(apart)} tensors are in one of them only: {some(apart)} (in {where})")
        return False
    pairs = {name: pair for weight in mine for name, pair in _pairs(weight, mine, theirs).items()}
    for name, (a, b) in pairs.items():
        if tuple(a.shape) != tuple(b.shape):
            say(f"different: {name} is {tuple(a.shape)} and {tuple(b.shape)}")
            return False
    return _equal_values(pairs, say)


def _opened(path: Path) -> Checkpoint:
    checkpoint = open_checkpoint(path)
    try:
        model = complete.checked(checkpoint.tensors, checkpoint.model)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    return dataclasses.replace(checkpoint, model=model)


def _compared(checkpoint: Checkpoint) -> dict[str, Tensor]:
    """The tensors that count, in published order: no copies, which are checked to be such."""
    copies = names.copies(checkpoint.model)
    complete.check_copies(checkpoint.tensors, copies)
    fp8.check_pairs(checkpoint.tensors)
    chosen = {
        name: tensor
        for name, tensor in checkpoint.tensors.items()
        if name not in copies and not names.IGNORED.fullmatch(name)
    }
    return in_published_order(chosen, checkpoint.model)


def _weights(tensors: Mapping[str, Tensor]) -> set[str]:
    return {name for name in tensors if not name.endswith(fp8.SCALE)}


def _pairs(name: str, mine: Mapping[str, Tensor], theirs: Mapping[str, Tensor]) -> dict[str, Pair]:
    """What has to be equal for a weight to be; nothing for scales, which go with their weight."""
    if name.endswith(fp8.SCALE):
        return {}
    one, other, scale = mine[name], theirs[name], name + fp8.SCALE
    are_fp8 = (one.dtype == fp8.VALUES, other.dtype == fp8.VALUES)
    if all(are_fp8):
        return {name: (one, other), scale: (mine[scale], theirs[scale])}
    if are_fp8[0]:
        return {name: (fp8.Dequantized(name, one, mine[scale], other.dtype), other)}
    if are_fp8[1]:
        return {name: (one, fp8.Dequantized(name, other, theirs[scale], one.dtype))}
    return {name: (one, other)}


def _equal_values(pairs: Mapping[str, Pair], say: Callable[[str], None]) -> bool:
    sizes = {
        name: int(np.prod(a.shape, dtype=int)) * a.dtype.itemsize for name, (a, _) in pairs.items()
    }

    def compare(name: str) -> Difference | None:
        found = difference(*pairs[name])
        bar.advance(sizes[name], tensors=1)
        return found

    with (
        ByteProgress("verify", tensors=len(pairs), num_bytes=sum(sizes.values())) as bar,
        ThreadPoolExecutor(WORKERS) as pool,
    ):
        outcomes = zip(pairs, pool.map(compare, pairs), strict=True)
        name, found = next((outcome for outcome in outcomes if outcome[1]), ("", None))
        pool.shutdown(cancel_futures=True)
    if found:
        say(
            f"different: {name} differs in {found.count:,} values, by {found.size:.6g} at "
            f"{list(found.place)}: {found.one!r} and {found.other!r}"
        )
        return False
    say(f"the same: {len(pairs):,} tensors, equal in every value")
    return True


def difference(one: Tensor, other: Tensor) -> Difference | None:
    """Where two tensors of one shape differ most; None if they are equal (NaN is itself)."""
    worst, count = None, 0
    for index in rows(one, 0, one.shape[0], PIECE):
        a, b = (np.ascontiguousarray(tensor[index]) for tensor in (one, other))
        differs = _differs(a, b)
        if not differs.any():
            continue
        count += int(differs.sum())
        a, b = a.astype(np.float64), b.astype(np.float64)
        size = np.where(differs, np.nan_to_num(np.abs(a - b), nan=np.inf, posinf=np.inf), -1)
        place = np.unravel_index(size.argmax(), size.shape)
        where = (int(place[0]) + index[0].start, *(int(n) for n in place[1:]))
        found = Difference(0, where, float(a[place]), float(b[place]))
        if worst is None or found.size > worst.size:
            worst = found
    return worst and dataclasses.replace(worst, count=count)


def _differs(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    if a.dtype == b.dtype:
        bits = f"u{a.dtype.itemsize}"
        return a.view(bits) != b.view(bits)
    wide = np.promote_types(*(_standard(x.dtype) for x in (a, b)))
    a, b = a.astype(wide), b.astype(wide)
    return (a != b) & ~(np.isnan(a) & np.isnan(b))


def _standard(dtype: np.dtype) -> np.dtype:
    """A type of NumPy's own that holds every value of `dtype`."""
    return dtype if dtype.kind == "f" and dtype.itemsize > 2 else np.dtype(np.float32)
