"""Prefill and decode, compiled ahead of time for devices that need not be there."""

import dataclasses
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp

from dsjax import batches, config, flops, sharding
from dsjax.generate import check_mesh, decode, prefill
from dsjax.model import Transformer, abstract
from dsjax.nn.precision import PRECISIONS
from dsjax.params import cast, count
from dsjax.plan import absent
from dsjax.plan.buffers import Memory, OutOfMemory
from dsjax.plan.chips import Topology
from dsjax.plan.compiling import UNEVEN, finished, laid_out, told
from dsjax.plan.table import Plan
from dsjax.run import Run

# Why more is computed than the formula counts.
BEYOND = {"prefill": ("attention's scores above the diagonal", UNEVEN), "decode": (UNEVEN,)}


@dataclasses.dataclass(frozen=True)
class Phase:
    """`name`: "prefill" of `rows` prompts of `length` tokens, or "decode" of one more token to each
    of `rows` rows whose caches have room for `length`.
    """

    name: str
    rows: int
    length: int

    def __post_init__(self):
        if self.name not in ("prefill", "decode"):
            raise ValueError(f"phase={self.name}: there are train, prefill and decode")
        if self.rows < 1 or self.length < 1:
            raise ValueError(f"rows={self.rows} and length={self.length} must be at least 1")


def lowered(run: Run, phase: Phase, mesh: jax.sharding.Mesh) -> jax.stages.Lowered:
    """The program of `phase` in the run's precision, as StableHLO; no array is made.

    ValueError for rows or weights that do not divide over the mesh, and for more tokens than the
    model has positions.
    """
    precision = PRECISIONS[run.precision]
    model = _cast(_served(run.model), precision.dtype)
    layout = sharding.layout(sharding.Layout(dispatch=run.dispatch))
    with jax.set_mesh(mesh), layout:
        batches.check_rows(phase.rows, f"rows={phase.rows} do", "rows")
        check_mesh()
        batches.check_length(phase.length, "length", run.model)
        weights = laid_out(model, sharding.serving_shardings(model, mesh))
        cache = jax.jit(lambda model: model.init_caches(phase.rows, phase.length)).eval_shape(
            weights
        )

        def integers(*shape: int) -> jax.ShapeDtypeStruct:
            spec = sharding.spec("batch", *(None,) * (len(shape) - 1))
            where = jax.NamedSharding(mesh, spec)
            return jax.ShapeDtypeStruct(shape, jnp.int32, sharding=where)

        one_each = integers(phase.rows)
        if phase.name == "prefill":
            function, tokens = prefill, integers(phase.rows, phase.length)
        else:
            function, tokens = decode, one_each
        traced = jax.jit(precision.applied(function.__wrapped__), donate_argnums=3)
        return traced.lower(weights, tokens, one_each, cache)


def compile_phase(
    run: Run,
    phase: Phase,
    topology: Topology,
    devices: Sequence[jax.Device] | None = None,
    *,
    by: Callable[[jax.stages.Lowered], tuple[str, Memory]] = finished,
) -> Plan | OutOfMemory:
    """As `compiling.compile_step`, for one call of prefill or decode of the run's model."""
    devices = absent.devices(topology) if devices is None else devices
    mesh = sharding.make_mesh(**dataclasses.asdict(run.mesh), devices=devices)
    model = _served(run.model)
    per_row = flops.serving_flops_per_row(model, phase.length, is_prefill=phase.name == "prefill")
    what = {
        "prefill": f"{phase.rows} prompts of {phase.length} tokens",
        "decode": f"a token more to {phase.rows} rows, caches of {phase.length}",
    }
    return told(
        lowered(run, phase, mesh),
        topology,
        mesh,
        by=by,
        title=f"{phase.name}: {what[phase.name]}",
        parameters={"model without MTP": count(abstract(model))},
        useful=per_row * phase.rows / len(devices),
        beyond=BEYOND[phase.name],
    )


def _served(model: config.Model) -> config.Model:
    """Without MTP modules, which generation does not use."""
    return dataclasses.replace(model, mtp=())


def _cast(model: config.Model, dtype: jnp.dtype) -> Transformer:
    """The abstract model with its weights in `dtype`."""
    return jax.eval_shape(lambda module: cast(module, dtype), abstract(model))
