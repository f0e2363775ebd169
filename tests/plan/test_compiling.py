"""A step compiled for the virtual devices that are here, as it would be for chips that are not."""

import dataclasses
import importlib.util
import math
import re
import subprocess
import sys
from pathlib import Path

import jax
import pytest

from dsjax import flops, sharding
from dsjax.model import abstract
from dsjax.params import count
from dsjax.plan import absent, chips, compiling, early
from dsjax.plan.buffers import OutOfMemory
from dsjax.plan.command import plan
from dsjax.run import BatchShape, MeshShape
from dsjax.run_file import load
from dsjax.train_step import init_state, state_shardings
from tests import drawn

MICRO = str(Path(__file__).parents[1] / "micro_run.py")
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


@pytest.mark.thorough
@pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is not None, reason="about machines without libtpu"
)
def test_without_a_compiler_arithmetic_says_so():
    with pytest.raises(absent.NoCompiler, match=r"pip install -e '\.\[aot\]'"):
        absent.devices(EIGHT)
    sizes = ["topology=v5p:2x2x2", "batch.size=8", "batch.micro=8", "batch.ramp_from=8"]
    done = planned(MICRO, "mesh.expert=2", *sizes)
    assert done.returncode == 0, done.stderr
    shown = " ".join(done.stdout.split())
    assert "by arithmetic only" in shown and "state" in shown and "of 102.8 GB" in shown
    whole = load(MICRO)
    weights = abstract(whole.model)
    assert f"main model {count(weights) - count(weights.mtp):,}" in shown
    useful = flops.training_flops_per_token(whole.model, whole.batch.length) * whole.batch.length
    assert f"{useful / 1e12:,.3f} TFLOP per device by formula" in shown
    done = planned(MICRO, "mesh.expert=8", *sizes)
    assert done.returncode == 2
    assert re.search(r"experts.* has a dimension of 4, .* expert=8; choose a divisor", done.stderr)


@pytest.mark.thorough
@pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is not None, reason="about machines without libtpu"
)
def test_the_readme_s_example():
    sizes = ["batch.size=2048", "batch.micro=2048", "batch.ramp_from=2048", "mesh.expert=128"]
    done = planned("configs/v3.py", "topology=v5p:8x8x8", "optim.moments=bf16", *sizes)
    assert done.returncode == 0, done.stderr
    shown = " ".join(done.stdout.split())
    assert "main model 671,026,419,200" in shown and "all 63.7 GB of 102.8 GB" in shown


def planned(*arguments: str) -> subprocess.CompletedProcess:
    """The command itself, in a process of its own."""
    command = [sys.executable, "-m", "dsjax", "plan", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=300)


LOWERED = """
import sys
from dsjax.plan import absent, chips, compiling, early
from dsjax.plan.buffers import OutOfMemory
from dsjax.run_file import load
run = load(sys.argv[1], "batch.size=8", "batch.micro=8", "batch.ramp_from=8", "dispatch=ragged")
for name, product in {"v5p:2x2x2": True, "h100:1x8": False}.items():
    text = compiling.lowered(run, absent.mesh(chips.topology(name), fsdp=4, expert=2)).as_text()
    assert "ragged_all_to_all" in text
    assert ("chlo.ragged_dot" in text) == product
"""


@pytest.mark.thorough
def test_what_is_lowered_for_absent_devices_is_for_their_platform():
    """A ragged product is an instruction of TPU's, and many blocks elsewhere."""
    command = [sys.executable, "-c", LOWERED, MICRO]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr


@pytest.mark.thorough
def test_fp32_is_not_rounded_as_in_training():
    text = compiling.lowered(run(), mesh()).as_text()
    products = [line for line in text.splitlines() if "dot_general" in line]
    assert products and all("HIGHEST" in line for line in products)


def test_rows_longer_than_the_model_has_positions_are_refused():
    longer = dataclasses.replace(run(), batch=BatchShape(size=8, length=5000))
    with pytest.raises(ValueError, match=r"batch.length=5000 is more than .*embeddings=4096"):
        compiling.lowered(longer, mesh())


def test_a_compiler_that_stops_at_memory_works_apart(monkeypatch, capsys):
    asked = []

    def apart(function, *arguments):
        asked.append(arguments)
        return OutOfMemory(110e9, 102.8e9, ())

    monkeypatch.setattr(early, "apart", apart)
    assert not plan(MICRO, ["topology=v5p:2x2x2", "until=memory"])
    assert "7.2 GB too much" in capsys.readouterr().out
    assert [one.is_early for _, one in asked] == [True]


@pytest.mark.parametrize(
    ("assignments", "message"),
    [
        ([], "say for which chips: topology=v5p:8x8x8"),
        (["topology=v9:2x2"], "'v9' is no chip known here"),
        (["topology=v5p:2x2x2", "slices=two"], "slices=two must be a whole number"),
        (["topology=v5p:2x2x2", "until=dawn"], "until=dawn: .* until memory, or until code"),
        (["topology=v5p:2x2x2", "mesh.fsdp=3"], "does not make use of all 8 devices"),
    ],
    ids=str,
)
def test_what_cannot_be_planned_is_said(assignments, message):
    with pytest.raises(ValueError, match=message):
        plan("configs/tiny_v3.py", assignments)
