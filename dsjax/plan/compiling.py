"""The training step, compiled ahead of time for a mesh of devices that need not be there."""

import dataclasses
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from dsjax import batches, config, flops, sharding
from dsjax.losses import Batch
from dsjax.model import abstract
from dsjax.params import count
from dsjax.plan import absent, buffers, counting, search
from dsjax.plan.buffers import Memory, OutOfMemory
from dsjax.plan.chips import Topology
from dsjax.plan.table import Plan
from dsjax.run import MeshShape, Run
from dsjax.train_step import init_state, make_train_step, state_shardings

# Why a compiled step computes more than the formula counts.
RECOMPUTED = {
    "none": (),
    "full": ("layers computed again in backward (4/3)",),
    "save_latents": ("layers computed again in backward (up to 4/3)",),
    "offload": ("layers computed again in backward (4/3)",),
}
SCORES = "attention's scores twice in backward and above the diagonal"
UNEVEN = "room for uneven experts"
# Of an abstract mesh's devices, as jax calls them when it lowers for them.
PLATFORMS = {"tpu": ("tpu",), "gpu": ("cuda",)}


def lowered(run: Run, mesh: sharding.AnyMesh) -> jax.stages.Lowered:
    """The training step of `run` on `mesh`, as StableHLO; no array is made.

    Raises ValueError for a weight or a batch that does not divide over the mesh, and for rows
    longer than the model has positions. What comes of an abstract mesh cannot be compiled.
    """
    is_abstract = isinstance(mesh, jax.sharding.AbstractMesh)
    # As train.py has it: else TPUs round the factors to BF16 and GPUs to TF32.
    rounding = "highest" if run.precision == "fp32" else jax.config.jax_default_matmul_precision
    with (
        jax.sharding.use_abstract_mesh(mesh) if is_abstract else jax.set_mesh(mesh),
        sharding.layout(sharding.Layout(dispatch=run.dispatch)),
        jax.default_matmul_precision(rounding),
    ):
        batches.check_fits(run.batch)
        batches.check_length(run.batch.length, "batch.length", run.model)
        state = laid_out(jax.eval_shape(lambda: init_state(run)), state_shardings(run, mesh))
        shape = run.batch
        rows = jax.ShapeDtypeStruct(
            (shape.size // shape.micro_size, shape.micro_size, shape.length),
            jnp.int32,
            sharding=jax.NamedSharding(mesh, sharding.spec(None, "batch", "length")),
        )
        used = jax.ShapeDtypeStruct((), jnp.int32, sharding=jax.NamedSharding(mesh, jax.P()))
        traced = make_train_step(run).trace(state, Batch(rows, rows, rows), used)
        platforms = PLATFORMS[sharding.platform()] if is_abstract else None
        return traced.lower(lowering_platforms=platforms)


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
    return told(
        lowered(run, mesh),
        topology,
        mesh,
        by=by,
        title=title(run),
        parameters=parameters(run.model),
        useful=useful(run, len(devices)),
        beyond=(*RECOMPUTED[run.remat], SCORES, UNEVEN),
        outer_trips=run.batch.size // run.batch.micro_size,
    )


def title(run: Run) -> str:
    shape = run.batch
    return f"{shape.size} sequences of {shape.length} tokens, {shape.micro_size} at a time"


def parameters(model: config.Model) -> dict[str, int]:
    """How many, by kind."""
    weights = abstract(model)
    return {
        "main model": count(weights) - count(weights.mtp),
        "MTP modules": count(weights.mtp),
        "of them trained": count(weights, nnx.Param),
    }


def useful(run: Run, num_devices: int) -> float:
    """FLOPs of one step and device by the formula."""
    per_token = flops.training_flops_per_token(run.model, run.batch.length)
    return per_token * run.batch.size * run.batch.length / num_devices


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
