"""Runs of several processes: the same numbers as one makes, and one end for all of them."""

import signal
import time
from pathlib import Path

import jax
import numpy as np
import pytest

from dsjax import batches, processes, sharding
from dsjax.checkpoint import Checkpoints
from dsjax.data import open_data
from dsjax.run import Checkpoint
from dsjax.run_file import load
from dsjax.run_folder import BEGAN_FILE, RunFolder
from dsjax.train_step import init_state, make_init, state_shardings
from tests.launched import ROOT, Ended, Launched, drawn_moments, records

SMALL = "tests/small_run.py"
EXPERTS = "tests/micro_run.py"
ENDLESS = "steps=100000"
HOUR = 3600
# Sums over devices of one process and over those of several are taken in another order.
RELATIVE = 1e-6


def train(
    run_dir: Path, *overrides: str, count: int, devices: int, config: str = SMALL
) -> Launched:
    command = ["train.py", config, f"run_dir={run_dir}", *overrides]
    return Launched(run_dir.with_name("told"), command, count=count, devices=devices)


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory) -> Path:
    """The folder of one run, which the fixtures below take further, one after the other."""
    return tmp_path_factory.mktemp("processes") / "run"


@pytest.fixture(scope="module")
def killed(run_dir) -> tuple[Ended, float]:
    """Two processes, one of them killed. How the other ended, and after how many seconds."""
    launched = train(run_dir, ENDLESS, count=2, devices=2)
    # How many steps pass until a save is whole depends on the machine.
    launched.until(lambda: RunFolder(run_dir).saved_step)
    launched.processes[1].kill()
    began = time.monotonic()
    ended = launched.ended()
    return ended[0], time.monotonic() - began


@pytest.fixture(scope="module")
def finished(run_dir, killed) -> list[Ended]:
    """Two processes bring it to an end, of a run that says it began an hour earlier than it did."""
    del killed
    began = run_dir / BEGAN_FILE
    began.write_text(repr(float(began.read_text()) - HOUR))
    last = RunFolder(run_dir).saved_step + 3
    return train(run_dir, f"steps={last}", count=2, devices=2).ended()


def test_a_killed_process_ends_the_others_within_a_minute(killed):
    ended, seconds = killed
    # By a failed computation, or in a wait by jax itself, after the heartbeats.
    by_us = "process 0 of 2 ends" in ended.errors and "another process ended" in ended.errors
    by_jax = "another task died" in ended.errors
    assert ended.code == processes.LOST_OTHERS if by_us else by_jax, ended.errors[-2000:]
    assert seconds < 60


@pytest.mark.thorough
def test_sigterm_at_one_process_makes_all_save_the_same_step(tmp_path):
    run_dir = tmp_path / "run"
    launched = train(run_dir, ENDLESS, count=4, devices=1)
    launched.until(lambda: records(run_dir))
    launched.processes[2].send_signal(signal.SIGTERM)
    terminated = launched.ended()
    assert [ended.code for ended in terminated] == [0] * 4, [e.errors[-2000:] for e in terminated]
    (told,) = [line for line in terminated[0].output.splitlines() if "stopped by signal" in line]
    step = int(told.partition("after step ")[2].partition(";")[0])
    assert (run_dir / "checkpoints" / str(step)).is_dir()


@pytest.mark.thorough
def test_the_losses_are_those_of_one_process(run_dir, finished, tmp_path):
    assert [ended.code for ended in finished] == [0, 0], [e.errors[-2000:] for e in finished]
    assert "continuing after step" in finished[0].output
    ours = records(run_dir)
    (alone,) = train(tmp_path / "run", f"steps={len(ours)}", count=1, devices=4).ended()
    assert alone.code == 0, alone.errors
    theirs = records(tmp_path / "run")
    assert [record["step"] for record in ours] == list(range(1, len(ours) + 1))
    for name in ("loss", "grad_norm", "tokens"):
        mine, other = ([record[name] for record in log] for log in (ours, theirs))
        np.testing.assert_allclose(mine, other, rtol=RELATIVE, err_msg=name)
    np.testing.assert_allclose(
        ours[-1]["held_out_loss"], theirs[-1]["held_out_loss"], rtol=RELATIVE
    )


@pytest.mark.thorough
def test_four_processes_and_two_that_continue_are_as_one(tmp_path):
    """Two steps by four processes, two more by two, on another mesh; one process makes all four."""
    shared, alone = tmp_path / "shared" / "run", tmp_path / "alone" / "run"
    wide = ["mesh.data=2", "mesh.fsdp=4", "batch.micro=8", "evaluation.batches=0"]
    for run_dir, asked, count, devices in (
        (shared, ["steps=2"], 4, 2),
        (shared, ["steps=4", "mesh.data=4", "mesh.fsdp=2"], 2, 4),
        (alone, ["steps=4"], 1, 8),
    ):
        ended = train(run_dir, *wide, *asked, count=count, devices=devices).ended(480)
        assert [one.code for one in ended] == [0] * count, [e.errors[-2000:] for e in ended]
    ours, theirs = records(shared), records(alone)
    assert [record["step"] for record in ours] == [1, 2, 3, 4]
    for name in ("loss", "grad_norm", "tokens"):
        mine, other = ([record[name] for record in log] for log in (ours, theirs))
        np.testing.assert_allclose(mine, other, rtol=RELATIVE, err_msg=name)


@pytest.mark.thorough
def test_experts_on_two_processes_are_those_of_one(tmp_path):
    """Rows travel to experts of the other process; latents along `context` within each."""
    logs = []
    for count in (2, 1):
        run_dir = tmp_path / str(count) / "run"
        # The second step is the first that a gradient has had a part in. Little to compile.
        asked = ["steps=2", "mesh.expert=2", "mesh.context=2"]
        asked += ["model.layers.0.repeat=1", "evaluation.batches=0", "evaluation.every=9"]
        launched = train(run_dir, *asked, count=count, devices=4 // count, config=EXPERTS)
        ended = launched.ended(480)
        assert [one.code for one in ended] == [0] * count, [e.errors[-2000:] for e in ended]
        logs.append(records(run_dir))
    for ours, theirs in zip(*logs, strict=True):
        for name in ("loss", "mtp1_loss", "grad_norm", "load_max_over_mean"):
            np.testing.assert_allclose(ours[name], theirs[name], rtol=10 * RELATIVE, err_msg=name)


def test_only_the_first_process_writes_and_prints(run_dir, finished):
    first, second = finished
    assert "parameters" in first.output and "more of it" in first.output
    # Gloo's threads write over one another, so parts of its lines may stand alone.
    heard = [line for line in second.output.splitlines() if line and "peer ranks" not in line]
    assert heard == []
    assert len(list(run_dir.glob("tensorboard/events*"))) == 2, "one for every start"
    assert (run_dir / "loss.png").is_file()


def test_saving_and_goodput_are_in_the_metrics(run_dir, finished):
    log = records(run_dir)
    assert "checkpoint_blocked_seconds" in log[-1]
    assert log[-1]["checkpoint_blocked_seconds"] > 0
    assert all(0 <= record["goodput"] < 1 for record in log)
    kept = int(finished[0].output.partition("continuing after step ")[2].split()[0])
    compiled = {1, kept + 1}
    productive = sum(r["step_seconds"] for r in log if r["step"] not in compiled)
    assert 0 < log[-1]["goodput"] * HOUR < productive, "time counts from the first start on"


# A run at step 0 whose processes have read three steps of rows and save both.
SAVING = """
import sys
import jax
import train
from dsjax import batches, processes
from dsjax.data import merged
from dsjax.run_file import load
from dsjax.run_folder import BEGAN_FILE
from tests.launched import drawn_moments

launch, arguments = processes.launch_keys(sys.argv[1:])
processes.start(launch)
run = load(*arguments)
setup = train.set_up(run)
for _ in range(3):
    rows = batches.take(setup.rows, run.batch, 2, setup.mesh)
    assert None in rows, "this process has made rows of others"
progress = {"data": merged(processes.gathered(setup.rows.get_state()))}
setup.checkpoints.save(3, drawn_moments(setup.state), progress)
setup.checkpoints.close()
"""


@pytest.mark.thorough
def test_what_four_processes_save_one_restores_on_another_mesh(tmp_path):
    folder = tmp_path / "run"
    saving = ["-c", SAVING, SMALL, f"run_dir={folder}", "mesh.data=2", "mesh.fsdp=4"]
    sizes = ["batch.micro=8", "batch.size=16"]
    saved = Launched(tmp_path / "saving", [*saving, *sizes], count=4, devices=2).ended()
    assert [ended.code for ended in saved] == [0] * 4, [e.errors[-2000:] for e in saved]

    run = load(ROOT / SMALL, *sizes)
    expected = [np.asarray(x) for x in jax.tree.leaves(make_expected(run))]
    data = open_data(run.data, length=run.batch.length, vocab_size=run.model.vocab_size)
    rows = data.train_rows(run.seed)
    next_tokens = [[next(rows).tokens_T for _ in range(16)] for _ in range(4)][-1]

    # By this one process, on another mesh.
    mesh = sharding.make_mesh(fsdp=2, devices=jax.devices()[:2])
    with jax.set_mesh(mesh):
        checkpoints = Checkpoints(folder, Checkpoint())
        abstract = jax.eval_shape(lambda: init_state(run))
        state, progress = checkpoints.restore(3, abstract, state_shardings(run, mesh))
        checkpoints.close()
        rows = data.train_rows(run.seed)
        rows.set_state(progress["data"])
        taken = batches.take(rows, run.batch, 2, mesh)
    for got, wanted in zip(jax.tree.leaves(state), expected, strict=True):
        np.testing.assert_array_equal(got, wanted)
    np.testing.assert_array_equal([row.tokens_T for row in taken], next_tokens)


def make_expected(run):
    """Step 0 and its moments as one device draws them."""
    mesh = sharding.make_mesh(devices=jax.devices()[:1])
    with jax.set_mesh(mesh):
        return drawn_moments(make_init(run, state_shardings(run, mesh))())


ALONE = """
import os
import signal
import sys
import time
import numpy as np
from dsjax import processes
from jax.experimental import multihost_utils

launch, arguments = processes.launch_keys(sys.argv[1:])
processes.start(launch)
multihost_utils.process_allgather(np.zeros(1))
if {what!r} == "hangs":
    processes.Watchdog(minutes=0.05)
    time.sleep(60)
with processes.ending_together(but=processes.Agreed), processes.together():
    if launch.process_id == 1:
        raise ValueError("no such folder here")
"""


def test_what_one_process_refuses_all_refuse(tmp_path):
    command = ["-c", ALONE.format(what="refuses")]
    for ended in Launched(tmp_path, command, count=2, devices=1).ended():
        assert ended.code == 1
        assert "Agreed: process 1: no such folder here" in ended.errors


def test_a_refusal_in_all_processes_is_one_line_and_no_crash(tmp_path):
    """Exit code 4 would make a launcher start the same run again and again."""
    first, second = train(
        tmp_path / "run", "init_from=/no/such/weights", "mesh.data=1", count=2, devices=1
    ).ended()
    assert (first.code, second.code) == (2, 2), first.errors[-2000:] + second.errors[-2000:]
    told = "error: process 0: '/no/such/weights' is no directory"
    assert told in first.errors and "Traceback" not in first.errors + second.errors


def test_a_stopped_watchdog_ends_nothing(monkeypatch):
    ended = []
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(processes, "leave", lambda code, _: ended.append(code))
    monkeypatch.setattr(processes.faulthandler, "dump_traceback", lambda **_: None)
    processes.Watchdog(minutes=1 / 60).stop()
    time.sleep(1.5)
    assert ended == []
    processes.Watchdog(minutes=0.2 / 60)
    deadline = time.monotonic() + 60
    while not ended and time.monotonic() < deadline:
        time.sleep(0.02)
    assert ended == [processes.LOST_OTHERS], "without stop() the clock strikes"


def test_processes_that_hang_end_by_the_clock(tmp_path):
    command = ["-c", ALONE.format(what="hangs")]
    for ended in Launched(tmp_path, command, count=2, devices=1).ended():
        # Whoever is second may hear of the first before its own clock strikes.
        assert ended.code == processes.LOST_OTHERS or "another task died" in ended.errors
        assert "hang_minutes=0.05" in ended.errors or "another task died" in ended.errors


@pytest.mark.parametrize(
    ("keys", "told"),
    [
        (["coordinator=a:1", "process_id=0"], "give all three"),
        (["process_id=0", "num_processes=2"], "give all three"),
        (["num_processes=2"], "needs coordinator=host:port"),
        (["num_processes=0"], "num_processes=0"),
        (["coordinator=a:1", "process_id=2", "num_processes=2"], "numbered from 0"),
        (["coordinator=a", "process_id=0", "num_processes=2"], "must be host:port"),
        (["process_id=first"], "process_id wants a whole number, got 'first'"),
        (["heartbeat_seconds=0"], "heartbeat_seconds=0"),
    ],
)
def test_a_launch_that_cannot_be_is_one_clear_error(keys, told):
    with pytest.raises(ValueError, match=told):
        processes.launch_keys(keys)


def test_launch_keys_are_not_of_the_run():
    keys = ["coordinator=a:1", "steps=3", "process_id=1", "num_processes=2", "seed=1"]
    launch, others = processes.launch_keys(keys)
    assert launch == processes.Launch(coordinator="a:1", process_id=1, num_processes=2)
    assert others == ["steps=3", "seed=1"]
    assert processes.launch_keys(["steps=3"]) == (processes.Launch(), ["steps=3"])


@pytest.mark.parametrize(
    ("mesh", "owned"),
    [
        ({"data": 8}, 1),
        ({"data": 2, "fsdp": 2, "tensor": 2}, 2),
        ({"expert": 4, "context": 2}, 2),
    ],
)
def test_rows_are_those_of_the_process_s_devices(mesh, owned):
    """This process has all devices and so all rows; each device's share by hand."""
    run = load(ROOT / SMALL, "batch.micro=8")
    mesh = sharding.make_mesh(**mesh)
    assert batches.own_places(run.batch, mesh) == list(range(8))
    where = jax.sharding.NamedSharding(mesh, sharding.spec("batch", mesh=mesh))
    shares = [range(8)[cut] for (cut,) in where.devices_indices_map((8,)).values()]
    assert {len(share) for share in shares} == {owned}
