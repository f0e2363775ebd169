"""What can be said about the benchmark of the kernels where there is no GPU."""

import dataclasses
import os
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AbstractDevice, AbstractMesh, AxisType

from dsjax.plan.chips import BY_KEY

# Its modules find each other as they do when it is started as a program.
sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))
import kernels
import kernels_clocks
import kernels_peers
from kernels_cases import FAMILIES, UNSCALED, Case, Goal, product_bytes

H200 = BY_KEY["h200"]


def every_case() -> list[Case]:
    return [one for family in FAMILIES.values() for one in family()]


def test_it_says_where_it_can_run(capsys):
    assert kernels.main([]) == 2
    said = capsys.readouterr().err
    assert "benchmarks/gpu wants an NVIDIA Hopper GPU, here is 'cpu'; `make aot`" in said


def test_families_are_known_by_name(capsys):
    with pytest.raises(SystemExit):
        kernels.main(["grouped", "dens"])
    assert "family ['dens']; there are dense, quantizers, grouped" in capsys.readouterr().err


# By hand, for 1550 and, in BF16, 790 TFLOP/s and 4.3 TB/s: 2*64*7168*16384 FLOPs need 9.7 us;
# 64*16384 + 7168*16384 + 2*64*7168 bytes and scales, 119.5 MB, need 27.8 us. The others alike.
LIMITS = [
    ("dense", "64x7168x16384", 27.8, "memory"),
    ("dense", " 4096x7168x16384", 620.7, "compute"),
    ("quantizers", "quantize_rows V3, 32k tokens 32768x7168", 165.6, "memory"),
    ("quantizers", "quantize_rows_and_columns V3, 32k tokens 32768x7168", 221.9, "memory"),
    ("quantizers", "swiglu_quantize", 81.0, "memory"),
    ("grouped", "64x768, 2816x2048", 365.8, "compute"),
    ("grouped_bf16", "64x768, 2816x2048", 717.7, "compute"),
    ("wgrad", "64x768, 2816x2048", 400.7, "memory"),
    ("wgrad_bf16", "64x768, 2048x1408", 358.8, "compute"),
    ("masked", "12 of 64x128, 2816x2048", 97.0, "memory"),
]


@pytest.mark.parametrize(("family", "name", "microseconds", "bound"), LIMITS)
def test_limits(family, name, microseconds, bound):
    here = dataclasses.replace(H200, fp8_flops=1550e12, bf16_flops=790e12, hbm_bandwidth=4.3e12)
    (case,) = [one for one in FAMILIES[family]() if name in one.name]
    found, why = kernels.limit(case, here)
    assert why == bound
    assert found * 1e6 == pytest.approx(microseconds, rel=2e-3)


def test_every_byte_counts_once():
    operands = 64 * 16384 + 3 * 7168 * 16384
    scales = 64 * 128 + 3 * 56 * 128
    found = product_bytes(64, 7168, 16384, groups=3)
    assert found == operands + 2 * 64 * 7168 + 4 * scales


def test_bytes_of_bf16_are_those_of_its_operands_and_results():
    for family in ("grouped_bf16", "wgrad_bf16"):
        for case in FAMILIES[family]():
            arguments = jax.eval_shape(case.draw, jax.random.key(0))
            result = jax.eval_shape(case.oracle, *arguments)
            operands = sum(2 * one.size for one in arguments if one.dtype == jnp.bfloat16)
            assert case.num_bytes == operands + 2 * result.size


@pytest.mark.parametrize("family", FAMILIES)
def test_cases_fit_their_operations(family):
    device = AbstractDevice(device_kind="NVIDIA H200", num_cores=132, platform="gpu")
    mesh = AbstractMesh((1,), ("d",), axis_types=(AxisType.Auto,), abstract_device=device)
    cases = list(FAMILIES[family]())
    assert len({one.name for one in cases}) == len(cases)
    case = cases[0]
    with jax.sharding.use_abstract_mesh(mesh):
        inputs = jax.eval_shape(case.draw, jax.random.key(0))
        ours, oracle = (jax.eval_shape(one, *inputs) for one in (case.ours, case.oracle))
    shapes = [jax.tree.map(lambda one: one.shape, result) for result in (ours, oracle)]
    assert shapes[0] == shapes[1]


# The goals of an H200 by operation and shape.
GOALS = [
    ("dense", "V3 o, 64 tokens", (3.4, "TB/s")),
    ("dense", "V3 o, 128 tokens", (3.3, "TB/s")),
    ("dense", "V3 gate and up", (1250, "TFLOP/s")),
    ("quantizers", "V3, 32k tokens", (3.7, "TB/s")),
    ("grouped", "V3 down", (1100, "TFLOP/s")),
    ("grouped", "V2-Lite down", (1000, "TFLOP/s")),
    ("masked", "V3 gate and up, 2 experts", (950, "TFLOP/s")),
    ("masked", "V3 down, 4 experts", (800, "TFLOP/s")),
    ("masked", "128 tokens", (3.2, "TB/s")),
    ("wgrad", "V2-Lite gate", (800, "TFLOP/s")),
    ("wgrad_bf16", "V3 down", (650, "TFLOP/s")),
]


@pytest.mark.parametrize(("family", "name", "goal"), GOALS)
def test_goals(family, name, goal):
    found = [one for one in FAMILIES[family]() if name in one.name]
    assert found and all(one.goals[0][:2] == goal for one in found)
    compared = [one for one in found if any(goal.of == UNSCALED for goal in one.goals)]
    assert compared == (found if family == "dense" else [])


def test_peers_that_goals_name_are_there():
    for case in every_case():
        assert all(name in case.peers for goal in case.goals for name in goal.of)
        assert case.peers


def test_a_goal_is_reached_or_missed():
    case = double(lambda x: 2 * x)._replace(flops=1.2e12, num_bytes=3e12)
    reached = [Goal(1.2), Goal(3, "TB/s"), Goal(0.95, of=("a", "b"))]
    missed = [Goal(1.21), Goal(3.1, "TB/s"), Goal(0.97, of=("a", "b"))]
    seconds = {"ours": 1.0, "a": 0.96, "b": 2.0}
    for goals, word in ((reached, ": reached"), (missed, ": MISSED")):
        assert all(kernels.verdict(case, goal, seconds).endswith(word) for goal in goals)
    # The fastest of them counts, and those that did not run do not.
    assert "(0.96)" in kernels.verdict(case, reached[-1], seconds)
    assert kernels.verdict(case, reached[-1], {"ours": 1.0}).endswith("neither ran")


def draw(key):
    return (jax.random.normal(key, (8, 8)),)


def double(ours, **peers) -> Case:
    # So many bytes that a turn is one call.
    return Case("double", 0, 1e12, draw, ours, lambda x: 2 * x, 1e-3, peers, (Goal(3.7, "TB/s"),))


def of_jax(function):
    return lambda sets: kernels_peers.jax_turns(draw, function, sets)


def test_a_row_has_time_rate_and_comparison():
    case = double(lambda x: 2 * x)._replace(flops=6e14, num_bytes=2e12)
    seconds = {"ours": 0.5, "other": 0.6}
    ours, other = (" ".join(kernels.row(case, one, seconds, 0.3).split()) for one in seconds)
    assert ours == "ours 500000.0 us 1200 TFLOP/s 60% of the limit; 4 TB/s"
    # The bytes are ours: no rate of bytes of another, unless it is all there is to say.
    assert other == "other 600000.0 us 1000 TFLOP/s 50% of the limit; ours is 1.20 times as fast"
    copies = " ".join(kernels.row(case._replace(flops=0), "other", seconds, 0.3).split())
    assert copies == "other 600000.0 us 3.333 TB/s 50% of the limit; ours is 1.20 times as fast"


def test_a_wrong_result_is_not_timed(capsys):
    assert kernels.report(double(lambda x: 2 * x), H200, rounds=1, notes=[])
    assert "of the limit" in capsys.readouterr().out
    for factor in (2.01, jnp.nan):
        assert not kernels.report(double(lambda x, f=factor: f * x), H200, rounds=1, notes=[])
        said = capsys.readouterr().out
        assert "ours: WRONG, error" in said and "of the limit" not in said


def test_a_table_says_who_did_not_run_and_why(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)  # as where it is not installed

    def fails(x):
        raise RuntimeError("no kernel for 8x8\nand a long backtrace")

    def absent(sets):
        return kernels_peers.torch_scaled(8, 8, 8, ((), ()), sets)

    broken = of_jax(fails)
    case = double(
        lambda x: 2 * x, sum=of_jax(lambda x: x + x), broken=broken, absent=absent, too=broken
    )
    notes = ["ValueError: of an earlier shape"]
    assert kernels.report(case, H200, rounds=1, notes=notes)
    lines = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    limit, ours, other, *failed, footnote, goal, clocks = lines
    assert limit == "double: limit 208333.3 us (memory)"
    assert ours.startswith("ours ") and ours.endswith("of the limit") and "TB/s" in ours
    assert other.startswith("sum ") and other.endswith("times as fast")
    assert failed == [
        "broken failed [2]",
        "absent not installed: no module torch",
        "too failed [2]",
    ]
    assert footnote == "[2] RuntimeError: no kernel for 8x8"
    assert len(notes) == 2
    assert goal.startswith("goal 3.7 TB/s: ") and clocks.startswith("under load: ")


def test_others_without_torch_and_tokamax_say_so(monkeypatch):
    for name in ("torch", "tokamax"):
        monkeypatch.setitem(sys.modules, name, None)
    for case in every_case():
        others = {name: build for name, build in case.peers.items() if not name.startswith("XLA")}
        for name, build in others.items():
            with pytest.raises(ModuleNotFoundError) as caught:
                build(1)
            assert kernels.reason(caught.value, []) == f"not installed: no module {name.split()[0]}"


def contender(turn) -> kernels_peers.Contender:
    return kernels_peers.Contender(turn, lambda result: None)


def test_contenders_take_turns():
    turns = []
    built = {name: contender(lambda name=name: turns.append(name)) for name in ("one", "other")}
    seconds, failed = kernels.timed(built, sets=2, rounds=3, floor_s=1.0)
    assert turns == ["one", "other"] * 3
    assert all(second > 0 for second in seconds.values()) and not failed


def test_another_that_fails_while_it_is_timed_is_dropped_and_ours_is_not():
    turns = []

    def breaks():
        turns.append("other")
        if len(turns) > 3:
            raise RuntimeError("out of memory")

    built = {"ours": contender(lambda: turns.append("ours")), "other": contender(breaks)}
    seconds, failed = kernels.timed(built, sets=2, rounds=4, floor_s=1.0)
    assert turns == ["ours", "other"] * 2 + ["ours"] * 2
    assert list(seconds) == ["ours"] and str(failed["other"]) == "out of memory"
    with pytest.raises(RuntimeError, match="out of memory"):
        kernels.timed({"ours": contender(breaks)}, sets=2, rounds=1, floor_s=1.0)


def test_a_shape_that_raises_does_not_end_the_run(capsys, monkeypatch):
    def raises(x):
        raise RuntimeError("does not compile")

    shapes = [double(raises)._replace(name="first"), double(lambda x: 2 * x)]
    monkeypatch.setattr(kernels.chip, "needs_hopper", lambda op: None)
    monkeypatch.setattr(kernels, "BY_KIND", {"cpu": H200})
    monkeypatch.setattr(kernels, "FAMILIES", {"two": lambda: shapes})
    assert kernels.main(["--rounds=1"]) == 1
    said = capsys.readouterr()
    assert "does not compile" in said.err and "double: limit" in said.out
    assert "of the limit" in said.out


# What nvidia-smi says while it loops: idle, at work, held back, and a line cut off in the middle.
SAID = """\
345, 3201, 75.10, 30, 0x0000000000000001
1980, 3201, 400.00, 45, 0x0000000000000000
1700, 3201, 699.60, 61, 0x0000000000000004
1410, 2619, 690.20, 62, 0x0000000000000024
1755, 3201, 698
"""


def test_clocks_under_load():
    assert len(kernels_clocks.readings(SAID)) == 4
    assert kernels_clocks.summary(SAID) == (
        "SM 1700 MHz (least 1410), memory 3201 MHz (least 2619), 690 W (most 700), at most 62 C; "
        "held back by power cap in 67%, heat (software) in 33%; 3 readings"
    )
    free = kernels_clocks.summary(SAID.splitlines()[1])
    assert free.endswith("held back by nothing; 1 readings")


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("", "nvidia-smi said nothing"),
        (SAID.splitlines()[0], SAID.splitlines()[0]),
        (
            'Field "clocks.sn" is not a valid field to query.\n\n',
            'Field "clocks.sn" is not a valid',
        ),
        ("1980, 3201, [N/A], 45, 0x0000000000000000\n", "1980, 3201, [N/A], 45"),
    ],
)
def test_no_clocks_are_no_figures(text, why):
    assert kernels_clocks.summary(text).startswith(f"no clocks: {why}")


def test_the_gpu_is_watched_while_it_works(tmp_path, monkeypatch):
    said, asked = tmp_path / "said", tmp_path / "asked"
    said.write_text(SAID)
    smi = tmp_path / "nvidia-smi"
    smi.write_text(
        f'#!/bin/sh\ncat {said}\necho $$ "$@" >{asked}.new\nmv {asked}.new {asked}\nexec sleep 60\n'
    )
    smi.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,5")

    def work():
        for _ in range(3000):
            if asked.exists():
                return "done"
            time.sleep(0.02)
        return "never watched"

    assert kernels_clocks.watched(work) == ("done", kernels_clocks.summary(SAID))
    assert "--id=3 " in asked.read_text() and "--loop-ms=" in asked.read_text()
    asked.unlink()
    with pytest.raises(ZeroDivisionError):
        kernels_clocks.watched(lambda: work() and 1 / 0)
    # It does not outlive the work.
    with pytest.raises(ProcessLookupError):
        os.kill(int(asked.read_text().split()[0]), 0)


def test_without_nvidia_smi_the_work_is_done(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    result, clocks = kernels_clocks.watched(lambda: 7)
    assert result == 7 and clocks.startswith("no clocks: ")
    assert kernels_clocks.card().startswith("nothing known of the card: ")
