"""Rows of the data stream into device batches: micro-batches, ramp, provenance, held-out loss.

Each process makes the rows of its own devices; elsewhere a list of rows holds None.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence

import jax
import numpy as np

from dsjax import sharding
from dsjax.config import Model
from dsjax.data import Dataset, Row, RowIterator
from dsjax.losses import Batch
from dsjax.model import Transformer
from dsjax.run import BatchShape, Run
from dsjax.train_step import make_eval_step


def check_fits(config: BatchShape) -> None:
    """ValueError if the batch does not divide over the mesh that is set."""
    micro = config.micro_size
    check_rows(micro, f"a micro-batch of {micro} sequences does", "batch.micro (or batch.size)")
    if config.length % sharding.axis_size("context"):
        raise ValueError(
            f"batch.length={config.length} does not divide over mesh.context="
            f"{sharding.axis_size('context')}"
        )


def check_length(length: int, key: str, model: Model) -> None:
    """ValueError for rows of more tokens than `model` has positions; `key` is what to change."""
    positions = model.max_position_embeddings
    if length > positions:
        raise ValueError(
            f"{key}={length} is more than model.max_position_embeddings={positions}; make the one "
            "smaller or, if the model was made for it, the other larger"
        )


def check_rows(number: int, told: str, key: str) -> None:
    """ValueError, which begins with `told`, unless `number` rows divide over the mesh that is set.

    `key` is what to change.
    """
    shares = math.prod(sharding.axis_size(axis) for axis in sharding.BATCH_AXES)
    if number % shares:
        raise ValueError(
            f"{told} not divide over mesh.data * mesh.fsdp * mesh.expert = {shares}; make {key} a "
            "multiple of it"
        )


def used_micros(config: BatchShape, step: int, steps: int) -> int:
    """Micro-batches of `step` (from 0): a linear ramp in whole ones, then all."""
    start = config.size if config.ramp_from is None else config.ramp_from
    until = config.ramp_until * steps
    fraction = min(step / until, 1.0) if until else 1.0
    return math.floor((start + (config.size - start) * fraction) / config.micro_size)


def own_places(config: BatchShape, mesh: jax.sharding.Mesh) -> list[int]:
    """The places in a micro-batch whose rows, or parts of them, lie on this process's devices."""
    where = jax.sharding.NamedSharding(mesh, sharding.spec("batch", mesh=mesh))
    pieces = where.addressable_devices_indices_map((config.micro_size,)).values()
    return sorted({place for (cut,) in pieces for place in range(config.micro_size)[cut]})


def take(
    rows: RowIterator, config: BatchShape, used: int, mesh: jax.sharding.Mesh
) -> list[Row | None]:
    """The rows of one step, in an order that no number of processes changes; None for others'."""
    micro, places = config.micro_size, own_places(config, mesh)
    return rows.take(used * micro, {n * micro + place for n in range(used) for place in places})


def _on_devices(
    rows: Sequence[Row | None], shape: tuple[int, ...], where: jax.sharding.NamedSharding
) -> Batch:
    """Rows in order as [..., T]; places behind the last row are padding."""
    numbers = np.arange(math.prod(shape[:-1])).reshape(shape[:-1])
    empty_T = np.zeros(shape[-1], np.int32)

    def array(name: str) -> jax.Array:
        def piece(index: tuple[slice, ...]) -> np.ndarray:
            own = numbers[index[:-1]]
            x_RT = [getattr(rows[r], name) if r < len(rows) else empty_T for r in own.flat]
            return np.stack(x_RT).reshape(*own.shape, -1)[..., index[-1]]

        return jax.make_array_from_callback(shape, where, piece)

    return Batch(*(array(name) for name in ("tokens_T", "segments_T", "positions_T")))


def training_batch(
    rows: Sequence[Row | None], config: BatchShape, mesh: jax.sharding.Mesh
) -> Batch:
    """Rows as micro-batches [n, b, T] on the mesh; those a ramp leaves empty are padding."""
    where = jax.sharding.NamedSharding(mesh, sharding.spec(None, "batch", "length", mesh=mesh))
    micro = config.micro_size
    return _on_devices(rows, (config.size // micro, micro, config.length), where)


def evaluation_batch(rows: Sequence[Row], config: BatchShape, mesh: jax.sharding.Mesh) -> Batch:
    """At most a micro-batch of rows as [b, T] on the mesh; rows that are missing are padding."""
    where = jax.sharding.NamedSharding(mesh, sharding.spec("batch", "length", mesh=mesh))
    return _on_devices(rows, (config.micro_size, config.length), where)


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


class Evaluator:
    """Held-out loss in nats per token and in bits per byte, always over the same rows.

    `lacking`: why there is no such loss, or None.
    """

    def __init__(self, run: Run, data: Dataset, mesh: jax.sharding.Mesh):
        micro = run.batch.micro_size
        self._rows = data.held_out_rows(run.evaluation.batches * micro)
        self._run, self._mesh, self._step = run, mesh, make_eval_step(run)
        self._bytes = target_bytes(self._rows, data.tokenizer.bytes_per_token)
        self.lacking = None
        if not run.evaluation.batches:
            self.lacking = "evaluation.batches=0 asks for none"
        elif not self._bytes:
            self.lacking = (
                f"data.held_out={run.data.held_out} leaves no row of batch.length="
                f"{run.batch.length} tokens; hold out a larger share"
            )

    def __call__(self, model: Transformer) -> dict:
        """The metrics, {} where nothing is held out."""
        if self.lacking:
            return {}
        nats = targets = 0.0
        for rows in in_evaluation_batches(self._rows, self._run.batch):
            batch = evaluation_batch(rows, self._run.batch, self._mesh)
            some_nats, some_targets = jax.device_get(self._step(model, batch))
            nats, targets = nats + float(some_nats), targets + float(some_targets)
        return {
            "held_out_loss": nats / targets,
            "held_out_bits_per_byte": nats / math.log(2) / self._bytes,
        }


def provenance(rows: Sequence[Row | None], locate: Callable[[int], str]) -> list[dict]:
    """Where a batch comes from: per row and document its place and the token offsets used."""
    found = []
    own = [(index, row) for index, row in enumerate(rows) if row is not None]
    for index, row in own:
        for segment in range(1, int(row.segments_T.max()) + 1):
            mine = np.flatnonzero(row.segments_T == segment)
            first, last = (int(row.offsets_T[mine[edge]]) for edge in (0, -1))
            place = locate(int(row.documents_T[mine[0]]))
            found.append({"row": index, "document": place, "tokens": [first, last]})
    return found
