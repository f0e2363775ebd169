"""Weights of a checkpoint as the first state of a run; a real run of it is in `test_train.py`."""

import dataclasses
from pathlib import Path

import jax
import numpy as np
import pytest

import convert_weights
from dsjax import hf, sharding
from dsjax.convert.starting import state_from
from dsjax.hf import names
from dsjax.train_step import init_state, state_shardings
from tests import drawn
from tests.convert import published


@pytest.fixture(scope="module")
def fp8(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("fp8")
    config = published.FEW_EXPERTS | {"quantization_config": published.FP8}
    published.write(folder / "SRC", published.fp8(published.bf16(published.FEW_EXPERTS)), config)
    assert convert_weights.main(["import", str(folder / "SRC"), str(folder / "DST")]) == 0
    return folder


def run_of(**changes: object):
    model = hf.model_config(published.FEW_EXPERTS)
    return drawn.run(dataclasses.replace(model, **({"initializer_std": 0.3} | changes)))


def test_masters_are_the_fp32_products_and_moments_are_zero(fp8: Path):
    its_run = run_of()
    mesh = sharding.make_mesh(data=2, fsdp=2, expert=2)
    placement = state_shardings(its_run, mesh)
    state = state_from(str(fp8 / "DST"), its_run, placement, mesh)
    expected = hf.from_pretrained(fp8 / "SRC", dtype=np.float32)
    for one, other in zip(names.variables(state.model), names.variables(expected), strict=True):
        assert one[1].get_value().dtype == np.float32
        np.testing.assert_array_equal(one[1].get_value(), other[1].get_value(), one[0])
    wanted = jax.tree.structure(jax.eval_shape(lambda: init_state(its_run)))
    assert jax.tree.structure(state) == wanted
    for array, where in zip(jax.tree.leaves(state), jax.tree.leaves(placement), strict=True):
        assert array.sharding.is_equivalent_to(where, array.ndim)
    assert not any(np.any(x) for x in jax.tree.leaves((state.step, state.opt_state)))


@pytest.mark.parametrize(
    ("changes", "path", "told"),
    [
        ({"vocab_size": 48}, "SRC", "vocab_size is 48 and 40 there; set what differs"),
        ({"mtp": ()}, "DST", "mtp are 0 and 1 there"),
        ({}, "nowhere", "nowhere' is no directory"),
    ],
)
def test_weights_of_another_model_are_refused(fp8: Path, changes: dict, path: str, told: str):
    its_run = run_of(**changes)
    mesh = sharding.make_mesh(devices=jax.devices()[:1])
    with pytest.raises(ValueError, match=told):
        state_from(str(fp8 / path), its_run, state_shardings(its_run, mesh), mesh)
