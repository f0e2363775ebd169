"""A step compiled for the virtual devices that are here, as it would be for chips that are not."""

import dataclasses
import importlib.util
import math

import jax
import pytest

from dsjax import flops, sharding
from dsjax.model import abstract
from dsjax.params import count
from dsjax.plan import absent, chips, compiling
from dsjax.plan.command import plan
from dsjax.run import MeshShape
from dsjax.train_step import init_state, state_shardings
from tests import drawn

EIGHT = chips.topology("v5p:2x2x2")


def run(**changes):
    # Wide enough that products, not layouts, are what is counted.
    return dataclasses.replace(
        drawn.run(drawn.model(repeat=2, vocab_size=64)), mesh=MeshShape(fsdp=4, expert=2), **changes
    )


def mesh():
    return sharding.make_mesh(fsdp=4, expert=2)


@pytest.mark.thorough
@pytest.mark.parametrize("remat", ["none", "full"])
def test_a_compiled_step_is_told_whole(remat):
    made = compiling.compile_step(run(remat=remat), EIGHT, jax.devices())
    # Weights and both moments, each on one of the devices or on all, and three rows of integers;
    # the number of micro-batches in use has no use where there is one.
    placed = jax.tree.map(
        lambda leaf, where: math.prod(where.shard_shape(leaf.shape)) * leaf.dtype.itemsize,
        jax.eval_shape(lambda: init_state(run())),
        state_shardings(run(), mesh()),
    )
    assert made.memory.arguments == sum(jax.tree.leaves(placed)) + 3 * 16 * 4
    assert made.mesh == "mesh.fsdp=4 mesh.expert=2"
    per_token = flops.training_flops_per_token(run().model, 16)
    assert made.useful == per_token * 8 * 16 / 8
    # Masked halves of attention, room in buffers of experts, layers recomputed.
    assert made.counts.flops / made.useful > (1 if remat == "none" else 4 / 3)
    assert {"all-gather", "all-reduce"} <= made.counts.traffic.keys()
    assert made.parameters["main model"] == count(abstract(run().model)) - count(
        abstract(run().model).mtp
    )
    assert made.fits


@pytest.mark.thorough
def test_the_program_does_not_grow_with_the_depth():
    """Layers are scanned: a hundred are one body."""
    texts = [
        compiling.lowered(
            dataclasses.replace(run(), model=drawn.model(repeat=repeat)), mesh()
        ).as_text()
        for repeat in (2, 100)
    ]
    assert abs(len(texts[1]) - len(texts[0])) < 0.02 * len(texts[0])


def test_batches_and_weights_that_do_not_divide_are_named():
    with pytest.raises(ValueError, match="micro-batch of 8 sequences does not divide over"):
        compiling.lowered(run(), sharding.make_mesh(fsdp=16, devices=jax.devices() * 2))


@pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is not None, reason="about machines without libtpu"
)
def test_without_a_compiler_arithmetic_says_so(capsys):
    with pytest.raises(absent.NoCompiler, match=r"pip install 'dsjax\[tpu\]'"):
        absent.devices(EIGHT)
    sizes = ["batch.size=2048", "batch.micro=2048", "batch.ramp_from=2048", "mesh.expert=128"]
    assert plan("configs/v3.py", ["topology=v5p:8x8x8", "optim.moments=bf16", *sizes])
    shown = capsys.readouterr().out
    assert "by arithmetic only" in shown and "state" in shown and "of 102.8 GB" in shown


@pytest.mark.parametrize(
    ("assignments", "message"),
    [
        ([], "say for which chips: topology=v5p:8x8x8"),
        (["topology=v9:2x2"], "'v9' is no chip known here"),
        (["topology=v5p:2x2x2", "slices=two"], "slices=two must be a whole number"),
        (["topology=v5p:2x2x2", "mesh.fsdp=3"], "does not make use of all 8 devices"),
    ],
    ids=str,
)
def test_what_cannot_be_planned_is_said(assignments, message):
    with pytest.raises(ValueError, match=message):
        plan("configs/tiny_v3.py", assignments)
