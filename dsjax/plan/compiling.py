"""The training step, compiled ahead of time for a mesh of devices that need not be there."""

import dataclasses
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from dsjax import batches, flops, sharding
from dsjax.losses import Batch
from dsjax.model import abstract
from dsjax.params import count
from dsjax.plan import absent, buffers, counting, search
from dsjax.plan.buffers import Memory, OutOfMemory
from dsjax.plan.chips import Topology
from dsjax.plan.table import Plan
from dsjax.run import MeshShape, Run
from dsjax.train_step import init_state, make_train_step, state_shardings


def lowered(run: Run, mesh: jax.sharding.Mesh) -> jax.stages.Lowered:
    """The training step of `run` on `mesh`, as StableHLO; no array is made.

    Raises ValueError for a weight or a batch that does not divide over the mesh.
    """
    with jax.set_mesh(mesh), sharding.layout(sharding.Layout(dispatch=run.dispatch)):
        batches.check_fits(run.batch)
        state = laid_out(jax.eval_shape(lambda: init_state(run)), state_shardings(run, mesh))
        shape = run.batch
        rows = jax.ShapeDtypeStruct(
            (shape.size // shape.micro_size, shape.micro_size, shape.length),
            jnp.int32,
            sharding=jax.NamedSharding(mesh, sharding.spec(None, "batch", "length")),
        )
        used = jax.ShapeDtypeStruct((), jnp.int32, sharding=jax.NamedSharding(mesh, jax.P()))
        return make_train_step(run).lower(state, Batch(rows, rows, rows), used)


def laid_out(abstract_arrays, shardings):
    """Shapes and dtypes of `abstract_arrays`, each where `shardings`, a like tree, has it."""
    return jax.tree.map(
        lambda leaf, where: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where),
        abstract_arrays,
        shardings,
    )


def finished(program: jax.stages.Lowered) -> tuple[str, Memory]:
    """The compiled program and its memory, machine code and all."""
    compiled = program.compile()
    return compiled.as_text(), buffers.memory(compiled.memory_analysis())


def compile_step(
    run: Run,
    topology: Topology,
    devices: Sequence[jax.Device] | None = None,
    *,
    by: Callable[[jax.stages.Lowered], tuple[str, Memory]] = finished,
) -> Plan | OutOfMemory:
    """What the compiler says of a step of `run` on `topology`: a plan, or that it does not fit.

    `devices` (default: those of `topology`, absent ones) are what `run.mesh` is made of. `by` may
    also be `early.planned`. Raises `absent.NoCompiler`, and ValueError as `lowered` does.
    """
    devices = absent.devices(topology) if devices is None else devices
    mesh = sharding.make_mesh(**dataclasses.asdict(run.mesh), devices=devices)
    shape, model = run.batch, run.model
    weights = abstract(model)
    per_token = flops.training_flops_per_token(model, shape.length)
    return told(
        lowered(run, mesh),
        topology,
        mesh,
        by=by,
        title=f"{shape.size} sequences of {shape.length} tokens, {shape.micro_size} at a time",
        parameters={
            "main model": count(weights) - count(weights.mtp),
            "MTP modules": count(weights.mtp),
            "of them trained": count(weights, nnx.Param),
        },
        useful=per_token * shape.size * shape.length / len(devices),
        remat=run.remat,
        outer_trips=shape.size // shape.micro_size,
    )


def told(
    program: jax.stages.Lowered,
    topology: Topology,
    mesh: jax.sharding.Mesh,
    *,
    by: Callable[[jax.stages.Lowered], tuple[str, Memory]],
    outer_trips: int = 1,
    **known: Any,
) -> Plan | OutOfMemory:
    """`program` compiled, counted, and told with what is `known` of it, or that it does not fit.

    `outer_trips` counts the passes of its outermost loop of unknown length. Others are rounds of a
    dispatch: one, where load is even.
    """
    began = time.monotonic()
    try:
        text, memory = by(program)
    except jax.errors.JaxRuntimeError as error:
        refused = buffers.out_of_memory(str(error))
        if refused is None:
            raise
        return refused
    return Plan(
        topology=topology,
        mesh=search.written(MeshShape(**mesh.shape)),
        memory=memory,
        largest=tuple(buffers.largest(text)),
        counts=counting.count(text, topology.slice_of(), outer_trips=outer_trips),
        seconds=time.monotonic() - began,
        **known,
    )
