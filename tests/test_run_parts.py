"""The parts `train.py` is made of: metrics, loss guard, batches from rows."""

import json
import math
from dataclasses import fields
from typing import get_args

import numpy as np
import pytest

from dsjax import batches, metrics, optim, plots, sharding
from dsjax.config import Mla
from dsjax.data import Row
from dsjax.guard import LossGuard
from dsjax.model import REMAT
from dsjax.nn import precision
from dsjax.nn.dispatch import TRANSPORTS
from dsjax.run import DISPATCHES, PRECISIONS, REMATS, BatchShape, Guard, Optim, profiled_steps

ATTENTION = Mla(
    num_heads=1,
    q_lora_rank=None,
    kv_lora_rank=2,
    qk_nope_head_dim=2,
    qk_rope_head_dim=2,
    v_head_dim=2,
)


def test_metrics_read_back_bit_identical(tmp_path):
    values = [0.1 + 0.2, 1 / 3, float(np.float32(2.7182817)), 5e-324]
    log = metrics.MetricsLog(tmp_path)
    for step, value in enumerate(values, start=1):
        log.write({"step": step, "loss": value, "load_entropy": [value, 1.0]})
    log.close()
    assert [record["loss"] for record in metrics.read(tmp_path)] == values


def test_what_is_not_finite_is_null_and_reads_back_as_nan(tmp_path):
    """As strict JSON has it; whoever reads the records meets numbers only."""
    log = metrics.MetricsLog(tmp_path)
    log.write({"step": 1, "loss": math.nan, "load_max_over_mean": [1.0, -math.inf]})
    log.write({"step": 2, "loss": 1.5, "load_max_over_mean": [1.0, 2.0]})
    log.close()
    first, second = (tmp_path / metrics.METRICS_FILE).read_text().splitlines()
    assert first == '{"step": 1, "loss": null, "load_max_over_mean": [1.0, null]}'
    assert json.loads(second)["loss"] == 1.5
    record, _ = records = metrics.read(tmp_path)
    assert record["step"] == 1 and math.isnan(record["loss"])
    assert record["load_max_over_mean"][0] == 1.0 and math.isnan(record["load_max_over_mean"][1])
    plots.loss_curve(records, tmp_path / "loss.png", bigram_bits=None)
    metrics.MetricsLog(tmp_path, step=1).close()
    assert [record["step"] for record in metrics.read(tmp_path)] == [1]


def test_reopened_log_forgets_the_steps_that_run_again(tmp_path):
    log = metrics.MetricsLog(tmp_path)
    log.write({"step": 1, "loss": 1.0})
    log.write({"step": 2, "loss": 2.0})
    log.close()
    with (tmp_path / metrics.METRICS_FILE).open("a") as file:
        file.write('{"step": 3, "lo')
    log = metrics.MetricsLog(tmp_path, step=1, record={"step": 1, "loss": 9.0})
    log.write({"step": 2, "loss": 3.0})
    log.close()
    assert [record["loss"] for record in metrics.read(tmp_path)] == [1.0, 3.0]
    metrics.MetricsLog(tmp_path).close()
    assert metrics.read(tmp_path) == []


def test_reopened_log_has_the_line_of_the_checkpoint_that_was_not_written(tmp_path):
    log = metrics.MetricsLog(tmp_path)
    log.write({"step": 1, "loss": 1.0})
    log.close()
    log = metrics.MetricsLog(tmp_path, step=2, record={"step": 2, "loss": 2.0})
    log.write({"step": 3, "loss": 3.0})
    log.close()
    assert [record["loss"] for record in metrics.read(tmp_path)] == [1.0, 2.0, 3.0]


def test_goodput_by_hand(monkeypatch):
    monkeypatch.setattr(metrics.time, "time", lambda: 1100.0)
    goodput = metrics.Goodput(1000.0, 20.0)
    assert goodput.after(0.0) == pytest.approx(0.2)
    assert goodput.after(5.0) == pytest.approx(0.25)
    assert goodput.productive_seconds == 25.0


@pytest.mark.parametrize("profile", ["10", "10:10", "0:5", "a:b", "5:3", ":4", "-1:4"])
def test_profiles_that_name_no_steps(profile):
    with pytest.raises(ValueError, match="FIRST:END"):
        profiled_steps(profile)


def test_a_profile_counts_steps_from_one_and_leaves_the_end_out():
    assert list(profiled_steps("10:15")) == [10, 11, 12, 13, 14]
    assert not profiled_steps(None)


def test_load_statistics_by_hand():
    stack = np.array([[5.0, 5.0, 5.0, 5.0], [10.0, 10.0, 0.0, 0.0]])
    got = metrics.load_statistics([stack, np.array([17.0, 1.0, 1.0, 0.0])])
    assert got["load_max_over_mean"] == pytest.approx([1.0, 2.0, 4 * 17 / 19])
    assert got["load_entropy"][:2] == pytest.approx([1.0, math.log(2) / math.log(4)])
    assert got["load_device_max_over_mean"] == [1.0, 1.0, 1.0]
    on_two = metrics.load_statistics([stack, np.array([17.0, 1.0, 1.0, 0.0])], devices=2)
    assert on_two["load_device_max_over_mean"] == pytest.approx([1.0, 2.0, 2 * 18 / 19])
    assert metrics.load_statistics([]) == {}
    assert metrics.load_statistics([np.array([7.0])])["load_entropy"] == [1.0]


def test_every_precision_remat_dispatch_and_schedule_of_a_run_has_its_meaning():
    assert set(PRECISIONS) == set(precision.PRECISIONS)
    assert set(REMATS) == set(REMAT)
    assert set(DISPATCHES) == {"auto"} | set(TRANSPORTS)
    (schedules,) = (f.type for f in fields(Optim) if f.name == "learning_rate")
    assert set(get_args(schedules)) == set(optim.SCHEDULES)


def test_guard_stops_on_what_is_not_finite_and_on_spikes():
    guard = LossGuard(Guard(spike=2.0, window=4), recent=[9.0, 1.0, 1.2, 0.8])
    assert guard.complaint(2.1, 1.0) is None, "the median of the last four is 1.1"
    assert "guard.spike=2.0" in guard.complaint(2.3, 1.0)
    assert "not finite" in guard.complaint(math.nan, 1.0)
    assert "not finite" in guard.complaint(1.0, math.inf)
    assert LossGuard(Guard(window=4), recent=[1.0]).complaint(100.0, 1.0) is None, "too few yet"


def row(tokens, segments, documents, offsets) -> Row:
    segments = np.array(segments, np.int32)
    positions = np.array([list(segments[:i]).count(s) for i, s in enumerate(segments)], np.int32)
    return Row(
        tokens_T=np.array(tokens, np.int32),
        segments_T=segments,
        positions_T=positions,
        documents_T=np.array(documents, np.int32),
        offsets_T=np.array(offsets, np.int32),
    )


@pytest.mark.parametrize("mesh", [{"data": 8}, {"fsdp": 2, "context": 2, "tensor": 2}])
def test_rows_lie_in_their_order_and_empty_places_are_padding(mesh):
    mesh = sharding.make_mesh(**mesh)
    rows = [
        Row(**{field.name: np.arange(4, dtype=np.int32) + 10 * number for field in fields(Row)})
        for number in range(1, 9)
    ]
    shape = BatchShape(size=16, length=4, micro=8, ramp_from=8, ramp_until=1.0)
    by_hand = np.zeros((2, 8, 4), np.int32)
    by_hand[0] = np.arange(4) + 10 * np.arange(1, 9)[:, None]
    batch = batches.training_batch(rows, shape, mesh)
    for name in ("tokens_BT", "segments_BT", "positions_BT"):
        np.testing.assert_array_equal(getattr(batch, name), by_hand)
    part = batches.evaluation_batch(rows[:3], shape, mesh)
    by_hand[0, 3:] = 0
    np.testing.assert_array_equal(part.tokens_BT, by_hand[0])
    assert part.tokens_BT.sharding.mesh == mesh


def test_ramp_grows_in_whole_micro_batches():
    shape = BatchShape(size=8, length=4, micro=2, ramp_from=2, ramp_until=0.5)
    used = [batches.used_micros(shape, step, steps=20) for step in range(20)]
    # 2 + 6 * step / 10 rows, in pairs: 4 rows from step 4, 6 from step 7, 8 from step 10.
    assert used == [1] * 4 + [2] * 3 + [3] * 3 + [4] * 10
    assert batches.used_micros(BatchShape(size=8, length=4), 0, 20) == 1


def test_target_bytes_and_provenance_stop_at_documents():
    one = row([5, 6, 7, 8], [1, 1, 2, 2], [3, 3, 9, 9], [4, 5, 0, 1])
    sizes = np.arange(10)
    assert batches.target_bytes([one], sizes) == 6 + 8
    assert batches.provenance([one], "doc{}".format) == [
        {"row": 0, "document": "doc3", "tokens": [4, 5]},
        {"row": 0, "document": "doc9", "tokens": [0, 1]},
    ]


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        ({"size": 6, "micro": 4}, "multiple"),
        ({"size": 8, "micro": 4, "ramp_from": 2}, "ramp_from"),
        ({"size": 0}, "size"),
    ],
)
def test_batch_shapes_that_do_not_fit(wrong, told):
    with pytest.raises(ValueError, match=told):
        BatchShape(length=4, **wrong)


def test_records_are_json_lines(tmp_path):
    log = metrics.MetricsLog(tmp_path)
    log.write({"step": 1, "loss": 1.5})
    log.close()
    assert json.loads((tmp_path / metrics.METRICS_FILE).read_text()) == {"step": 1, "loss": 1.5}
