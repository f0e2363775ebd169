"""`train.py` as a person runs it: real processes, killed, stopped, resumed, fed wrong things."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

import convert_weights
import train as trainer
from tests.data.corpus import write_tokenizer

ROOT = Path(__file__).parents[1]
MICRO = "tests/micro_run.py"
# Quicker to compile, for what does not depend on the model.
SMALL = ("tests/small_run.py", "mesh.data=1", "mesh.fsdp=1")


@pytest.fixture(scope="module")
def compiled(tmp_path_factory) -> Path:
    """A compilation cache that the processes of this file share."""
    return tmp_path_factory.mktemp("compiled")


def command(run_dir: Path, *overrides: str, of: tuple[str, ...] = (MICRO,)) -> list[str]:
    return [sys.executable, "train.py", *of, f"run_dir={run_dir}", *overrides]


def environment(compiled: Path, devices: int = 1) -> dict[str, str]:
    flags = f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count={devices}"
    return os.environ | {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": flags,
        "JAX_COMPILATION_CACHE_DIR": str(compiled),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }


def train(
    run_dir: Path,
    compiled: Path,
    *overrides: str,
    devices: int = 1,
    of: tuple[str, ...] = (MICRO,),
):
    return subprocess.run(
        command(run_dir, *overrides, of=of),
        cwd=ROOT,
        env=environment(compiled, devices),
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


def lines(run_dir: Path) -> list[dict]:
    file = run_dir / "metrics.jsonl"
    text = file.read_text() if file.is_file() else ""
    # The last line of a process that is still writing may be half there.
    return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]


def losses(run_dir: Path) -> dict[int, float]:
    return {record["step"]: record["loss"] for record in lines(run_dir)}


@pytest.fixture(scope="module")
def finished(tmp_path_factory, compiled) -> tuple[Path, str]:
    """The folder of a run that nothing interrupts, and what it printed."""
    run_dir = tmp_path_factory.mktemp("undisturbed")
    done = train(run_dir, compiled, "profile=5:6")
    assert done.returncode == 0, done.stderr
    return run_dir, done.stdout


@pytest.fixture(scope="module")
def undisturbed(finished) -> Path:
    return finished[0]


def interrupted_at(
    run_dir: Path,
    compiled: Path,
    step: int,
    number: signal.Signals,
    *overrides: str,
    delay: float = 0.0,
):
    """Starts the run, sends the signal `delay` after `step` is in the metrics, awaits the end."""
    process = subprocess.Popen(
        command(run_dir, *overrides), cwd=ROOT, env=environment(compiled), stdout=subprocess.PIPE
    )
    deadline = time.monotonic() + 240
    while max(losses(run_dir), default=0) < step:
        assert process.poll() is None, "the run ended before it could be interrupted"
        assert time.monotonic() < deadline, f"step {step} never came"
        time.sleep(0.01)
    time.sleep(delay)
    process.send_signal(number)
    output, _ = process.communicate(timeout=120)
    return process.returncode, output.decode()


def test_run_folder_holds_everything(undisturbed):
    made = {path.name for path in undisturbed.iterdir()}
    assert {"run.json", "metrics.jsonl", "tensorboard", "loss.png", "checkpoints"} <= made
    assert (undisturbed / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert list((undisturbed / "tensorboard").glob("events*"))
    assert list((undisturbed / "profile").glob("**/*.xplane.pb"))
    records = lines(undisturbed)
    assert [record["step"] for record in records] == list(range(1, 25))
    assert all("loss" in record for record in records)
    assert records[-1]["loss"] < records[0]["loss"]
    assert {record["dropped_tokens"] for record in records} == {0.0}
    assert len(records[0]["load_entropy"]) == 3, "two MoE layers and the MTP module"
    assert [r["step"] for r in lines(undisturbed) if "held_out_loss" in r] == [12, 24]
    saved = [r["step"] for r in lines(undisturbed) if r.get("checkpoint_blocked_seconds", 0) > 0]
    assert saved == [5, 10, 15, 20, 24]
    assert 0 < records[-1]["goodput"] < 1


def test_batch_size_ramp_shows_in_the_tokens(undisturbed):
    tokens = [record["tokens"] for record in lines(undisturbed)]
    # Four rows of 32 tokens until step 12 reaches the second micro-batch of four.
    assert tokens == [128.0] * 12 + [256.0] * 12


def test_killed_and_stopped_run_continues_bit_for_bit(undisturbed, compiled, tmp_path):
    # A save after every step, so that the kill may hit one at any point of its work.
    often = "checkpoint.every=1"
    code, _ = interrupted_at(tmp_path, compiled, 7, signal.SIGKILL, often, delay=0.07)
    assert code == -signal.SIGKILL
    # Saves this very step and exits cleanly.
    code, output = interrupted_at(tmp_path, compiled, 13, signal.SIGTERM)
    assert code == 0
    last = max(losses(tmp_path))
    assert f"stopped by signal after step {last}" in output
    assert (tmp_path / "checkpoints" / str(last)).is_dir()
    done = train(tmp_path, compiled)
    assert done.returncode == 0, done.stderr
    assert "continuing after step" in done.stdout
    assert losses(tmp_path) == losses(undisturbed)
    for name in ("held_out_loss", "mtp1_loss", "grad_norm"):
        mine, other = ([r.get(name) for r in lines(d)] for d in (tmp_path, undisturbed))
        assert mine == other, name


@pytest.mark.thorough
def test_checkpoint_continues_on_another_mesh(undisturbed, compiled, tmp_path):
    interrupted_at(tmp_path, compiled, 7, signal.SIGTERM)
    done = train(tmp_path, compiled, "mesh.fsdp=2", "mesh.expert=2", devices=4)
    assert done.returncode == 0, done.stderr
    mine, other = losses(tmp_path), losses(undisturbed)
    assert mine.keys() == other.keys()
    # FP32 sums in another order, over 17 steps of training.
    np.testing.assert_allclose(list(mine.values()), list(other.values()), rtol=1e-4)


def test_keeps_only_the_newest_checkpoints(undisturbed):
    kept = sorted(int(path.name) for path in (undisturbed / "checkpoints").iterdir())
    assert kept == [15, 20, 24]


def test_a_damaged_checkpoint_is_told_with_a_way_out(undisturbed, compiled, tmp_path):
    folder = shutil.copytree(undisturbed, tmp_path / "run")
    newest = folder / "checkpoints" / "24"
    for file in [*newest.glob("model/**/d/*"), *newest.glob("optimizer/**/d/*")]:
        os.truncate(file, 10)
    done = train(folder, compiled)
    generating = [sys.executable, "-m", "dsjax", "generate", str(folder), "--prompt=def"]
    asked = {"cwd": ROOT, "env": environment(compiled), "capture_output": True, "text": True}
    for begins, ended in (("error", done), ("dsjax", subprocess.run(generating, **asked))):
        assert ended.returncode == 2
        told = f"{begins}: {newest} cannot be restored: "
        # orbax's threads may write of reads that were still under way, before it or after.
        (line,) = [line for line in ended.stderr.splitlines() if line.startswith(told)]
        assert "move this folder" in line


@pytest.mark.thorough
def test_printed_command_prints_the_same_sample(finished, compiled):
    sample, _, shown = finished[1].rpartition("more of it: ")
    more = subprocess.run(
        ["sh", "-c", shown],
        cwd=ROOT,
        env=environment(compiled),
        capture_output=True,
        text=True,
        check=True,
    )
    assert more.stdout.startswith("def ")
    assert more.stdout.strip("\n") in sample


WATCHED = """
import itertools
import sys
import train

make_train_step, step_record = train.make_train_step, train.step_record

def watched(run):
    step, numbers = make_train_step(run), itertools.count(1)
    def started(*arguments):
        print("event start", next(numbers))
        return step(*arguments)
    return started

def landed(run, step, *values):
    print("event land", step)
    return step_record(run, step, *values)

train.make_train_step, train.step_record = watched, landed
sys.exit(train.main(sys.argv[1:]))
"""


def test_a_step_starts_before_the_last_one_is_read(compiled, tmp_path):
    """Except where that one is saved, evaluated or at the border of a profile."""
    done = subprocess.run(
        [
            *(sys.executable, "-c", WATCHED, *SMALL),
            *(f"run_dir={tmp_path / 'run'}", "steps=12", "checkpoint.every=10"),
            *("evaluation.every=6", "profile=3:5"),
        ],
        cwd=ROOT,
        env=environment(compiled),
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    events = [line.split()[1:] for line in done.stdout.splitlines() if line.startswith("event ")]
    wanted = (
        "start 1 start 2 land 1 land 2 "  # here the profile begins,
        "start 3 start 4 land 3 land 4 "  # and here it ends
        "start 5 start 6 land 5 land 6 "  # evaluated
        "start 7 start 8 land 7 start 9 land 8 start 10 land 9 land 10 "  # saved
        "start 11 start 12 land 11 land 12"
    )
    assert [word for event in events for word in event] == wanted.split()


def test_loss_that_explodes_stops_with_the_documents(compiled, tmp_path):
    done = train(tmp_path, compiled, "optim.learning_rate.peak=1e30", "optim.eps=1e-30", of=SMALL)
    assert done.returncode == 3
    # A higher guard.spike lets no such step pass.
    assert "are not finite" in done.stderr and "guard.spike" not in done.stderr
    assert f"init_from={tmp_path} run_dir=NEW" in done.stderr
    (report,) = tmp_path.glob("stopped_at_step_*.json")
    blamed = json.loads(report.read_text())
    assert blamed["batch"][0]["document"] in done.stderr
    path = blamed["batch"][0]["document"].rpartition(":")[0]
    assert path.endswith(".py")


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["tests/micro_run.py", "optim.lerning_rate=1"], "learning_rate"),
        (["tests/micro_run.py", "steps=many"], "int"),
        (["tests/micro_run.py", "precision=fp16"], "bf16"),
        (["tests/micro_run.py", "process_id=1"], "give all three"),
        (["configs/nothing.py"], "configs/tiny.py"),
        ([], "usage"),
    ],
)
def test_wrong_input_is_one_clear_error(arguments, told, tmp_path, capsys):
    run_dir = [f"run_dir={tmp_path}"] if arguments else []
    assert trainer.main([*arguments, *run_dir]) == 2
    assert told in capsys.readouterr().err


@pytest.mark.parametrize(
    ("argument", "told"),
    [
        ("mesh.tensor=3", "mesh.tensor=3"),
        pytest.param("sample.max_new_tokens=9999", "9999", marks=pytest.mark.thorough),
    ],
)
def test_what_devices_and_data_do_not_allow_too(argument, told, compiled, tmp_path):
    done = train(tmp_path, compiled, argument)
    assert done.returncode == 2
    assert done.stderr.startswith("error: ") and told in done.stderr
    assert "Traceback" not in done.stderr


FILES_RUN = """
import dataclasses
import runpy

from dsjax.run import Files

data = Files(path={folder!r}, tokenizer={tokenizer!r}, text_field="body", held_out=0.2)
small = runpy.run_path("tests/small_run.py")["run"]
run = dataclasses.replace(small, data=data, steps=4, mesh=type(small.mesh)())
"""


def test_a_document_of_the_bigram_is_read_before_the_training(compiled, tmp_path):
    tokenizer = write_tokenizer(tmp_path / "tokenizer")
    folder = tmp_path / "documents"
    folder.mkdir()
    (folder / "a.jsonl").write_text('{"body": "fine"}\n' * 30 + "no JSON\n")
    run_file = tmp_path / "files_run.py"
    run_file.write_text(FILES_RUN.format(folder=str(folder), tokenizer=str(tokenizer)))
    enough = "model.vocab_size=300"
    done = train(tmp_path / "run", compiled, "data.held_out=0.0", enough, of=(str(run_file),))
    assert done.returncode == 2, done.stderr
    assert "a.jsonl:31 is not valid JSON" in done.stderr and "Traceback" not in done.stderr
    assert not (tmp_path / "run").exists()


@pytest.mark.thorough
def test_a_document_that_only_the_training_finds_stops_with_a_way_out(compiled, tmp_path):
    """Bytes that the bigram counts, and that are no text."""
    tokenizer = write_tokenizer(tmp_path / "tokenizer")
    folder = tmp_path / "documents"
    folder.mkdir()
    (folder / "latin.txt").write_bytes(b"caf\xe9")
    run_file = tmp_path / "files_run.py"
    run_file.write_text(FILES_RUN.format(folder=str(folder), tokenizer=str(tokenizer)))
    keys = ["data.held_out=0.0", "model.vocab_size=300"]
    done = train(tmp_path / "run", compiled, *keys, of=(str(run_file),))
    assert done.returncode == 3, done.stderr
    assert "latin.txt:0 is not UTF-8" in done.stderr and "Traceback" not in done.stderr
    assert "Mend or remove it, and repeat the command" in done.stderr
    assert "there will be no held-out loss: data.held_out=0.0 leaves no row" in done.stdout


@pytest.mark.thorough
def test_trains_on_a_folder_of_documents_with_a_real_tokenizer(compiled, tmp_path):
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    texts = [f"document {n} says that {n} and {n + 1} make {2 * n + 1}. " * 9 for n in range(60)]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        texts,
        trainers.BpeTrainer(vocab_size=264, initial_alphabet=alphabet, special_tokens=["<eos>"]),
    )
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<eos>"}))
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    folder = tmp_path / "documents"
    folder.mkdir()
    (folder / "a.jsonl").write_text("".join(json.dumps({"body": t}) + "\n" for t in texts[:30]))
    (folder / "b.txt").write_text(texts[40])
    run_file = tmp_path / "files_run.py"
    run_file.write_text(
        FILES_RUN.format(folder=str(folder), tokenizer=str(tmp_path / "tokenizer.json"))
    )
    done = subprocess.run(
        [
            *(sys.executable, "train.py", str(run_file), f"run_dir={tmp_path / 'run'}"),
            *("checkpoint.every_minutes=1e-6", f"compilation_cache={tmp_path / 'programs'}"),
        ],
        cwd=ROOT,
        env=environment(compiled),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert sorted(losses(tmp_path / "run")) == [1, 2, 3, 4]
    # Every step was worth a save: with the clock, checkpoint.every=5 is not what counts.
    assert all("checkpoint_blocked_seconds" in record for record in lines(tmp_path / "run"))
    assert list((tmp_path / "programs").iterdir())
    assert "bits per byte" in done.stdout


def test_other_values_in_the_same_folder_are_refused(undisturbed, compiled):
    done = train(undisturbed, compiled, "seed=5")
    assert done.returncode == 2
    assert "seed" in done.stderr


@pytest.mark.thorough
def test_a_run_continues_with_other_micro_batches(compiled, tmp_path):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    for run_dir, changes in ((whole, []), (parts, ["steps=4"]), (parts, ["batch.micro=2"])):
        done = train(run_dir, compiled, *changes, of=SMALL)
        assert done.returncode == 0, done.stderr
    assert "continuing after step 4" in done.stdout
    mine, other = losses(parts), losses(whole)
    assert mine.keys() == other.keys() == set(range(1, 9))
    # FP32 sums over four parts of the batch in place of two.
    np.testing.assert_allclose(list(mine.values()), list(other.values()), rtol=1e-6)


def test_help_lists_every_key():
    done = subprocess.run(
        [sys.executable, "train.py", "--help"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    for key in ("steps", "run_dir", "precision", "checkpoint.every", "mesh.context", "coordinator"):
        assert key in done.stdout


STARTED = """
import json, sys
import train
from dsjax.run_file import load

run = load(*sys.argv[1:])
setup = train.set_up(run)
print(json.dumps(train.Evaluator(run, setup.data, setup.mesh)(setup.state.model)))
train.train(run, setup)
"""


@pytest.mark.thorough
def test_an_exported_run_continues_from_its_import(undisturbed, compiled, tmp_path):
    """`init_from` begins with the very held-out loss that the run ended with, and goes on."""
    imported = tmp_path / "imported"
    for command_line in (
        ["export", undisturbed, tmp_path / "hub"],
        ["import", tmp_path / "hub", imported],
    ):
        assert convert_weights.main([str(part) for part in command_line]) == 0
    arguments = [f"run_dir={tmp_path / 'run'}", f"init_from={imported}"]
    done = subprocess.run(
        [sys.executable, "-c", STARTED, MICRO, *arguments],
        cwd=ROOT,
        env=environment(compiled) | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    before, after = lines(undisturbed), lines(tmp_path / "run")
    first = json.loads(done.stdout.splitlines()[0])
    assert first["held_out_loss"] == before[-1]["held_out_loss"]
    assert f"from {imported}" in done.stdout
    assert after[0]["loss"] < before[0]["loss"] - 0.5
    assert after[-1]["held_out_loss"] < before[-1]["held_out_loss"]
