"""Predictions against the real state and formulas by hand; the search with a fake compiler."""

import dataclasses
import functools
import importlib.util
import io
import math
from pathlib import Path

import jax
import pytest
from rich.console import Console

from dsjax import flops, sharding, train_step
from dsjax.convert import fitting
from dsjax.plan import absent, chips, compiling, search, table
from dsjax.plan.buffers import Memory, OutOfMemory
from dsjax.plan.command import plan
from dsjax.plan.counting import Counts
from dsjax.plan.predict import predict
from dsjax.run import BatchShape, MeshShape, Optim

spec = importlib.util.spec_from_file_location(
    "micro_run", Path(__file__).parents[1] / "micro_run.py"
)
micro_run = importlib.util.module_from_spec(spec)
spec.loader.exec_module(micro_run)
RUN = dataclasses.replace(micro_run.run, batch=BatchShape(size=64, length=512, micro=8))
EIGHT, NODES = chips.topology("h100:1x8"), chips.topology("h100:2x4")


@functools.cache
def weights():
    return fitting.weights(RUN.model, is_fp8=False)


def predicted(topology=EIGHT, run=RUN, **changes):
    mesh = MeshShape(**({"fsdp": 8} | changes.pop("mesh", {})))
    batch = dataclasses.replace(run.batch, **changes.pop("batch", {}))
    run = dataclasses.replace(run, mesh=mesh, batch=batch, **changes)
    return predict(run, weights(), topology)


def state_bytes(run) -> int:
    """Of device 0, from the shardings of the real state: weights and moments."""
    mesh = sharding.make_mesh(**dataclasses.asdict(run.mesh))
    state = jax.eval_shape(lambda: train_step.init_state(run))
    placement = train_step.state_shardings(run, mesh)

    def one(array, place):
        return math.prod(place.shard_shape(array.shape)) * array.dtype.itemsize

    return sum(jax.tree.leaves(jax.tree.map(one, state, placement)))


@pytest.mark.parametrize(
    ("mesh", "moments"),
    [
        ({"fsdp": 8}, "fp32"),
        ({"fsdp": 4, "expert": 2}, "bf16"),
        ({"fsdp": 2, "expert": 2, "tensor": 2}, "fp32"),
    ],
)
def test_the_state_is_as_large_as_the_real_one(mesh, moments):
    run = dataclasses.replace(
        RUN,
        mesh=MeshShape(**mesh),
        optim=Optim(learning_rate=RUN.optim.learning_rate, moments=moments),
    )
    found = predict(run, weights(), EIGHT)
    per_number = 8 if moments == "bf16" else 12
    without_gradients = found.bytes["state"] * per_number / (per_number + 4)
    # The prediction gives the router's biases moments too, and knows no step counters.
    assert without_gradients == pytest.approx(state_bytes(run), rel=0.01)


def test_what_is_kept_for_backward_by_hand():
    tokens, layers, hidden, latents = 512, 2 + 1, 16, 8 + 8 + 4
    kept = {remat: predicted(remat=remat).bytes["saved"] for remat in search.TRIED}
    assert kept["full"] == layers * tokens * hidden * 2
    assert kept["save_latents"] == layers * tokens * (hidden + latents) * 2
    assert kept["offload"] == 2 * tokens * hidden * 2
    assert kept["none"] > 3 * kept["save_latents"]
    # Over tensor the residual stream is cut, the latents are not.
    cut = predicted(remat="save_latents", mesh={"fsdp": 4, "tensor": 2}, batch={"micro": 4})
    assert cut.bytes["saved"] == layers * tokens * (hidden / 2 + latents) * 2


def test_seconds_by_hand():
    chip = EIGHT.chip
    none, full = predicted(remat="none"), predicted(remat="full")
    tokens = 64 * 512 / 8
    computed = flops.training_flops_per_token(RUN.model, 512) * tokens / chip.bf16_flops
    assert none.seconds["compute"] == pytest.approx(computed)
    assert full.seconds["compute"] == pytest.approx(computed * 4 / 3)
    # Without experts spread out only weights travel: gathered for forward and backward (and again),
    # their gradients scattered once; 7/8 of all, in BF16, for each of 8 micro-batches.
    numbers = sum(
        math.prod(weight.shape)
        for weight in weights()
        if any("fsdp" in cut for cut in weight.stored)
    )
    copies = sum(math.prod(weight.shape) for weight in weights()) - numbers
    sent = 8 * 2 * 7 / 8 * (numbers * 3 + copies * 2)
    assert none.seconds["near"] == pytest.approx(sent / chip.ici_bandwidth)
    assert none.seconds["far"] == 0
    assert full.seconds["near"] == pytest.approx(
        8 * 2 * 7 / 8 * (numbers * 4 + copies * 2) / chip.ici_bandwidth
    )


def test_rows_to_experts_in_other_nodes_travel_far():
    near = predicted(NODES, mesh={"fsdp": 2, "expert": 4})
    shorter = predicted(NODES, mesh={"fsdp": 2, "expert": 4}, batch={"length": 64})
    # fsdp joins devices of both nodes, so weights travel far, but rows do not.
    assert shorter.seconds["far"] == near.seconds["far"] > 0
    assert shorter.seconds["near"] < near.seconds["near"]
    # Context lies within expert, which so reaches into both nodes: now rows travel far.
    apart, sooner = (
        predicted(NODES, mesh={"fsdp": 1, "expert": 4, "context": 2}, batch={"length": length})
        for length in (512, 64)
    )
    assert apart.seconds["far"] > sooner.seconds["far"]


def test_a_mesh_that_cuts_a_weight_unevenly_is_none():
    assert predicted(chips.topology("h100:4x8"), mesh={"fsdp": 32}) is None


def test_meshes_use_all_devices_and_cut_what_divides():
    topology = chips.topology("v5p:2x2x2", slices=2)
    found = list(search.meshes(RUN, topology))
    assert len(set(found)) == len(found) > 10
    for mesh in found:
        sizes = dataclasses.asdict(mesh)
        assert math.prod(sizes.values()) == 16
        assert mesh.data == 2
        assert 4 % (mesh.expert * mesh.tensor) == 0
        assert 2 % mesh.tensor == 0
        assert 512 // (mesh.context * mesh.tensor) >= search.LEAST_TOKENS or (
            mesh.context == mesh.tensor == 1
        )


def test_micro_batches_divide_the_batch_and_its_ramp():
    batch = BatchShape(size=48, length=512, ramp_from=8, ramp_until=0.5, micro=8)
    run = dataclasses.replace(RUN, batch=batch)
    micros = {(one.mesh, one.batch.micro) for one in search.candidates(run, EIGHT)}
    # Of 2 to 8 sequences at a time, and 1, 2 or 4 per device, 16 divides 48 but not 8.
    assert {micro for _, micro in micros} == {2, 4, 8}
    for mesh, micro in micros:
        assert micro % (mesh.data * mesh.fsdp * mesh.expert) == 0


def plan_of(run, *, arguments: float, seconds: float) -> table.Plan:
    counts = Counts(flops=seconds * EIGHT.chip.bf16_flops)
    return table.Plan(
        title="micro",
        topology=EIGHT,
        mesh=search.written(run.mesh),
        parameters={"total": 1},
        memory=Memory(arguments, 0.0, 0.0, 0.0),
        largest=(),
        useful=1.0,
        counts=counts,
        beyond=("room",),
        seconds=1.0,
    )


def test_the_best_predicted_are_compiled_and_ranked_by_what_came_out():
    asked = []

    def compile_step(run):
        asked.append(run)
        if len(asked) == 1:
            return OutOfMemory(90e9, 80e9, ())
        if len(asked) == 2:
            return plan_of(run, arguments=200e9, seconds=0.1)
        return plan_of(run, arguments=1e9, seconds=1.0 / len(asked))

    found = search.search(RUN, EIGHT, compile_step, top=4)
    times = [one.prediction.total_seconds for one in found[4:-2]]
    assert times == sorted(times)
    assert max(predicted_time(run) for run in asked) <= times[0]
    # Four that fit, the fastest first; what did not compile or compiled too large last.
    assert [one.prediction.run for one in found[:4]] == asked[:1:-1]
    assert len(asked) == 6 and [one.prediction.run for one in found[-2:]] == asked[:2]
    assert all(one.outcome is None for one in found[4:-2])
    assert len(found) == len({repr(one.prediction.run) for one in found})

    output = io.StringIO()
    search.show(found, 6, Console(file=output, width=200))
    lines = output.getvalue().splitlines()
    assert len(lines) == 2 + 6 + 2
    assert lines[2].split()[-2:] == ["0.167", "0.167"]
    assert lines[8].count("too many") == lines[9].count("too many") == 1
    assert "batch.micro=" in lines[7] and "remat=" in lines[7]


def predicted_time(run) -> float:
    return predict(run, weights(), EIGHT).total_seconds


def test_what_hardly_fits_is_not_compiled():
    small = dataclasses.replace(EIGHT, chip=dataclasses.replace(EIGHT.chip, hbm=2e6))
    asked = []

    def compile_step(run):
        asked.append(run)
        return OutOfMemory(1.0, 0.0, ())

    found = search.search(RUN, small, compile_step, most=1000)
    fitting_ones = [one for one in found if one.prediction.total_bytes <= 0.9 * 2e6]
    assert 0 < len(asked) == len(fitting_ones) < len(found)
    rest = [one.prediction.total_bytes for one in found[: -len(asked)]]
    assert rest == sorted(rest)


def test_a_search_ends_though_nothing_fits():
    asked = []

    def compile_step(run):
        asked.append(run)
        return OutOfMemory(90e9, 80e9, ())

    found = search.search(RUN, EIGHT, compile_step, most=5)
    assert [one.prediction.run for one in found[-5:]] == asked
    assert found[0].outcome is None and found[0].fits and not found[-1].fits
    assert all(one.outcome is None for one in search.search(RUN, EIGHT, None))


@pytest.mark.parametrize(("largest", "fits"), [(1e9, True), (200e9, False)])
def test_the_command_s_verdict_is_the_compiler_s(largest, fits, monkeypatch, capsys):
    def compile_step(run, topology, *, by):
        return plan_of(run, arguments=largest, seconds=0.1)

    monkeypatch.setattr(absent, "devices", lambda topology: ())
    monkeypatch.setattr(compiling, "compile_step", compile_step)
    file = str(Path(__file__).parents[1] / "micro_run.py")
    assignments = ["topology=h100:1x8", "batch.size=64", "batch.micro=8", "batch.ramp_from=8"]
    assert plan(file, assignments, searching=True) is fits
    assert "best first" in capsys.readouterr().out


def test_devices_that_the_batch_cannot_be_shared_by():
    run = dataclasses.replace(RUN, batch=BatchShape(size=3, length=7))
    with pytest.raises(ValueError, match=r"batch.size=3 .*cannot be shared by 8 devices of h100"):
        search.search(run, EIGHT, lambda run: OutOfMemory(1.0, 0.0, ()))


def test_meshes_are_written_as_the_command_line_takes_them():
    assert search.written(MeshShape(fsdp=4, expert=2)) == "mesh.fsdp=4 mesh.expert=2"
    assert search.written(MeshShape(fsdp=1)) == "mesh.fsdp=1"
