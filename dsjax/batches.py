"""Rows of the data stream into device batches: micro-batches, batch-size ramp, provenance."""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence

import jax
import numpy as np

from dsjax import sharding
from dsjax.data import Row
from dsjax.losses import Batch
from dsjax.run import BatchShape


def used_micros(config: BatchShape, step: int, steps: int) -> int:
    """Micro-batches of `step` (from 0): a linear ramp in whole ones, then all."""
    start = config.size if config.ramp_from is None else config.ramp_from
    until = config.ramp_until * steps
    fraction = min(step / until, 1.0) if until else 1.0
    return math.floor((start + (config.size - start) * fraction) / config.micro_size)


def take(rows: Iterator[Row], config: BatchShape, used: int) -> list[Row]:
    """The rows of one step."""
    return [next(rows) for _ in range(used * config.micro_size)]


def _arrays(rows: Sequence[Row]) -> list[np.ndarray]:
    names = ("tokens_T", "segments_T", "positions_T")
    return [np.stack([getattr(row, name) for row in rows]) for name in names]


def training_batch(rows: Sequence[Row], config: BatchShape, mesh: jax.sharding.Mesh) -> Batch:
    """Rows as micro-batches [n, b, T] on the mesh; those a ramp leaves empty are padding."""
    micro = config.micro_size

    def in_micros(x_RT: np.ndarray) -> np.ndarray:
        empty = config.size - len(x_RT)
        return np.pad(x_RT, ((0, empty), (0, 0))).reshape(-1, micro, config.length)

    where = jax.sharding.NamedSharding(mesh, sharding.spec(None, "batch", "length", mesh=mesh))
    return Batch(*(jax.device_put(in_micros(x), where) for x in _arrays(rows)))


def evaluation_batch(rows: Sequence[Row], config: BatchShape, mesh: jax.sharding.Mesh) -> Batch:
    """At most a micro-batch of rows as [b, T] on the mesh; rows that are missing are padding."""
    missing = config.micro_size - len(rows)
    where = jax.sharding.NamedSharding(mesh, sharding.spec("batch", "length", mesh=mesh))
    padded = (np.pad(x, ((0, missing), (0, 0))) for x in _arrays(rows))
    return Batch(*(jax.device_put(x, where) for x in padded))


def in_evaluation_batches(rows: Sequence[Row], config: BatchShape) -> Iterator[Sequence[Row]]:
    """Rows in groups of one micro-batch."""
    micro = config.micro_size
    return (rows[start : start + micro] for start in range(0, len(rows), micro))


def target_bytes(rows: Iterable[Row], bytes_per_token: np.ndarray) -> int:
    """Bytes of text that the rows' next-token targets stand for."""
    total = 0
    for row in rows:
        inside = row.segments_T[1:] == row.segments_T[:-1]
        total += int(bytes_per_token[row.tokens_T[1:][inside]].sum())
    return total


def provenance(rows: Sequence[Row], locate: Callable[[int], str]) -> list[dict]:
    """Where a batch comes from: per row and document its place and the token offsets used."""
    found = []
    for index, row in enumerate(rows):
        for segment in range(1, int(row.segments_T.max()) + 1):
            mine = np.flatnonzero(row.segments_T == segment)
            first, last = (int(row.offsets_T[mine[edge]]) for edge in (0, -1))
            place = locate(int(row.documents_T[mine[0]]))
            found.append({"row": index, "document": place, "tokens": [first, last]})
    return found
