"""What can be said about the benchmark of the kernels where there is no GPU."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AbstractDevice, AbstractMesh, AxisType

from benchmarks import kernels
from dsjax.plan.chips import BY_KEY


def test_it_says_where_it_can_run(capsys):
    assert kernels.main([]) == 2
    said = capsys.readouterr().err
    assert "benchmarks/gpu wants an NVIDIA Hopper GPU, here is 'cpu'; `make aot`" in said


def test_families_are_known_by_name(capsys):
    with pytest.raises(SystemExit):
        kernels.main(["grouped", "dens"])
    assert "family ['dens']; there are dense, quantizers, grouped" in capsys.readouterr().err


# By hand, for 1550 TFLOP/s and 4.3 TB/s: 2*64*7168*16384 FLOPs need 9.7 us; 64*16384 +
# 7168*16384 + 2*64*7168 bytes and scales, 119.5 MB, need 27.8 us. The others alike.
LIMITS = [
    ("dense", "64x7168x16384", 27.8, "memory"),
    ("dense", " 4096x7168x16384", 620.7, "compute"),
    ("quantizers", "quantize_rows V3, 32k tokens 32768x7168", 165.6, "memory"),
    ("quantizers", "quantize_rows_and_columns V3, 32k tokens 32768x7168", 221.9, "memory"),
    ("quantizers", "swiglu_quantize", 81.0, "memory"),
    ("grouped", "64x768, 2816x2048", 365.8, "compute"),
    ("wgrad", "64x768, 2816x2048", 400.7, "memory"),
    ("masked", "12 of 64x128, 2816x2048", 97.0, "memory"),
]


@pytest.mark.parametrize(("family", "name", "microseconds", "bound"), LIMITS)
def test_limits(family, name, microseconds, bound):
    here = dataclasses.replace(BY_KEY["h200"], fp8_flops=1550e12, hbm_bandwidth=4.3e12)
    (case,) = [one for one in kernels.FAMILIES[family]() if name in one.name]
    found, why = kernels.limit(case.flops, case.num_bytes, here)
    assert why == bound
    assert found * 1e6 == pytest.approx(microseconds, rel=2e-3)


def test_every_byte_counts_once():
    operands = 64 * 16384 + 3 * 7168 * 16384
    scales = 64 * 128 + 3 * 56 * 128
    found = kernels.product_bytes(64, 7168, 16384, groups=3)
    assert found == operands + 2 * 64 * 7168 + 4 * scales


@pytest.mark.parametrize("family", kernels.FAMILIES)
def test_cases_fit_their_operations(family):
    device = AbstractDevice(device_kind="NVIDIA H200", num_cores=132, platform="gpu")
    mesh = AbstractMesh((1,), ("d",), axis_types=(AxisType.Auto,), abstract_device=device)
    cases = list(kernels.FAMILIES[family]())
    assert len({one.name for one in cases}) == len(cases)
    case = cases[0]
    with jax.sharding.use_abstract_mesh(mesh):
        inputs = jax.eval_shape(case.draw, jax.random.key(0))
        ours, oracle = (jax.eval_shape(one, *inputs) for one in (case.ours, case.oracle))
    shapes = [jax.tree.map(lambda one: one.shape, result) for result in (ours, oracle)]
    assert shapes[0] == shapes[1]


def case(ours) -> kernels.Case:
    def draw(key):
        return (jax.random.normal(key, (8, 8)),)

        # So many bytes that a turn is one call.

    return kernels.Case("double", 0, 1e12, draw, ours, lambda x: 2 * x, 1e-3, {}, {})


def test_a_wrong_result_is_not_timed(capsys):
    assert kernels.report(case(lambda x: 2 * x), BY_KEY["h200"], rounds=1)
    assert "of the limit" in capsys.readouterr().out
    for factor in (2.01, jnp.nan):
        assert not kernels.report(case(lambda x, f=factor: f * x), BY_KEY["h200"], rounds=1)
        assert "ours: WRONG, error" in capsys.readouterr().out


def test_contenders_take_turns():
    turns = []
    steps = {name: lambda name=name: turns.append(name) for name in ("one", "other")}
    seconds = kernels.timed(steps, sets=2, rounds=3, floor_s=1.0)
    assert turns == ["one", "other"] * 3
    assert all(second > 0 for second in seconds.values())
