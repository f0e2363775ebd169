"""Prefill and decode compiled for the virtual devices that are here."""

import dataclasses
import importlib.util
import math

import jax
import pytest

from dsjax import sharding
from dsjax.model import abstract
from dsjax.params import FullPrecision, RouterBias
from dsjax.plan import chips, serving
from dsjax.plan.command import plan
from dsjax.plan.serving import Phase
from dsjax.run import MeshShape
from tests import drawn

EIGHT = chips.topology("v5p:2x2x2")
RUN = dataclasses.replace(
    drawn.run(drawn.model(repeat=1)), mesh=MeshShape(fsdp=4, expert=2), precision="bf16"
)


@pytest.mark.usefixtures("uncached")
@pytest.mark.parametrize(
    ("name", "tokens"), [pytest.param("prefill", 32, marks=pytest.mark.thorough), ("decode", 1)]
)
def test_arguments_are_weights_tokens_and_the_latent_cache(name, tokens):
    made = serving.compile_phase(RUN, Phase(name, rows=8, length=32), EIGHT, jax.devices())
    model = abstract(dataclasses.replace(RUN.model, mtp=()))
    where = sharding.serving_shardings(model, sharding.make_mesh(fsdp=4, expert=2))
    pairs = zip(
        jax.tree.leaves(model, is_leaf=sharding.is_variable),
        jax.tree.leaves(where, is_leaf=sharding.is_variable),
        strict=True,
    )
    weights = sum(
        math.prod(placed.get_value().shard_shape(v.shape))
        * (4 if isinstance(v, FullPrecision | RouterBias) else 2)
        for v, placed in pairs
    )
    # One row to a device: its latent and rotated key in BF16, its tokens and one number more.
    cache = 32 * (8 + 4) * 2 * RUN.model.num_layers
    assert made.memory.arguments == weights + cache + 4 * tokens + 4
    assert made.memory.aliased == cache
    # No weight travels, only rows to experts, by the ring, and back.
    sent = sum(its.payload for its in made.counts.traffic.values())
    assert sent < weights / 10 or name == "prefill"
    assert made.title.startswith(name) and made.fits


@pytest.mark.parametrize(
    ("assignments", "told"),
    [
        (["phase=decode", "rows=8"], "phase=decode needs length too"),
        (["phase=verify", "rows=8", "length=8"], "there are train, prefill and decode"),
        (["rows=8"], "rows: only with phase=prefill or decode"),
        (["phase=decode", "rows=few", "length=8"], "rows=few must be a whole number"),
        (["phase=decode", "rows=0", "length=8"], "must be at least 1"),
    ],
    ids=str,
)
def test_what_cannot_be_planned_is_said(assignments, told):
    with pytest.raises(ValueError, match=told):
        plan("configs/tiny_v3.py", ["topology=v5p:2x2x2", *assignments])


@pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is not None, reason="about machines without libtpu"
)
def test_without_a_compiler_the_way_to_one_is_told():
    with pytest.raises(ValueError, match=r"pip install -e '\.\[aot\]'.*training steps only"):
        plan("configs/tiny_v3.py", ["topology=v5p:2x2x2", "phase=decode", "rows=8", "length=8"])


@pytest.mark.parametrize(
    ("phase", "mesh", "told"),
    [
        (Phase("decode", 6, 8), {"fsdp": 8}, "rows=6 do not divide over"),
        (Phase("decode", 8, 8), {"context": 8}, "mesh.context must be 1"),
        (Phase("decode", 8, 10**6), {"fsdp": 8}, "length=1000000 is more than .*embeddings=4096"),
    ],
)
def test_rows_and_length_that_cannot_be_cut_are_named(phase, mesh, told):
    with pytest.raises(ValueError, match=told):
        serving.lowered(RUN, phase, sharding.make_mesh(**mesh))


@pytest.mark.thorough
def test_the_program_computes_in_the_precision_of_the_run():
    mesh = sharding.make_mesh(fsdp=4, expert=2)
    phase = Phase("decode", rows=8, length=32)
    texts = {
        precision: serving.lowered(
            dataclasses.replace(RUN, precision=precision), phase, mesh
        ).as_text()
        for precision in ("bf16", "fp8")
    }
    assert "f8E4M3FN" in texts["fp8"] and "f8E4M3FN" not in texts["bf16"]
