"""The parts `train.py` is made of: metrics, loss guard, batches from rows."""

import json
import math

import numpy as np
import pytest

from dsjax import batches, metrics
from dsjax.config import Mla
from dsjax.data import Row
from dsjax.guard import LossGuard
from dsjax.model import REMAT
from dsjax.run import PRECISIONS, REMATS, BatchShape, Guard
from dsjax.train_step import COMPUTE_DTYPES

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


def test_reopened_log_forgets_the_steps_that_run_again(tmp_path):
    log = metrics.MetricsLog(tmp_path)
    log.write({"step": 1, "loss": 1.0})
    position = log.position
    log.write({"step": 2, "loss": 2.0})
    log.close()
    log = metrics.MetricsLog(tmp_path, position=position, step=1)
    assert log.position == position
    log.write({"step": 2, "loss": 3.0})
    log.close()
    assert [record["loss"] for record in metrics.read(tmp_path)] == [1.0, 3.0]


def test_load_statistics_by_hand():
    stack = np.array([[5.0, 5.0, 5.0, 5.0], [10.0, 10.0, 0.0, 0.0]])
    got = metrics.load_statistics([stack, np.array([17.0, 1.0, 1.0, 0.0])])
    assert got["load_max_over_mean"] == pytest.approx([1.0, 2.0, 4 * 17 / 19])
    assert got["load_entropy"][:2] == pytest.approx([1.0, math.log(2) / math.log(4)])
    assert metrics.load_statistics([]) == {}


def test_every_precision_and_remat_of_a_run_has_its_meaning():
    assert set(PRECISIONS) == set(COMPUTE_DTYPES)
    assert set(REMATS) == set(REMAT)


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
