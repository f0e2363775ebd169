"""Trains a DeepSeek model: python train.py configs/tiny.py [key=value ...]

`set_up` makes mesh, data and state; `train` is the loop; `report` is what is left behind.
The same command continues a run that was stopped, at the last checkpoint and bit for bit.
"""

import dataclasses
import json
import math
import os
import shlex
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp

from dsjax import batches, flops, metrics, sharding
from dsjax.checkpoint import RUN_FILE, Checkpoints
from dsjax.data import Dataset, Row, RowIterator, open_data
from dsjax.guard import LossGuard
from dsjax.host_memory import keep_freed_pages
from dsjax.model import Transformer
from dsjax.overrides import help_text
from dsjax.params import cast, count
from dsjax.progress import StepProgress
from dsjax.run import Run
from dsjax.run_file import from_json, load, to_json
from dsjax.train_step import (
    COMPUTE_DTYPES,
    TrainState,
    init_state,
    make_eval_step,
    make_init,
    make_train_step,
    state_shardings,
)

USAGE = "usage: python train.py configs/NAME.py [key=value ...]"

# What may differ between the command that began a run and the one that continues it.
FREE_TO_CHANGE = (
    "steps", "run_dir", "mesh", "remat", "log_every", "checkpoint", "evaluation", "guard", "sample",
)  # fmt: skip


class Stopped(Exception):
    """Training cannot go on; the message says why and what to do."""


def replace_text(path: Path, text: str) -> None:
    """Writes a file whole or not at all."""
    unfinished = path.with_name(path.name + ".partial")
    unfinished.write_text(text)
    os.replace(unfinished, path)


def claim_run_dir(run: Run) -> Path:
    """Makes the run folder with its `run.json`, or checks that the run in it is this one."""
    run_dir = Path(run.run_dir)
    run_file = run_dir / RUN_FILE
    if run_file.is_file() and any(run_dir.glob("checkpoints/[0-9]*")):
        before = from_json(run_file.read_text())
        names = [field.name for field in dataclasses.fields(Run)]
        changed = [name for name in names if getattr(before, name) != getattr(run, name)]
        fixed = [name for name in changed if name not in FREE_TO_CHANGE]
        if "steps" in changed:
            print(f"steps was {before.steps}, is {run.steps}: every schedule stretches with it")
        if fixed:
            raise ValueError(
                f"{run_dir} holds a run with another {', '.join(fixed)}; continue it with the "
                "values it began with, or choose another run_dir=..."
            )
    run_dir.mkdir(parents=True, exist_ok=True)
    replace_text(run_file, to_json(run))
    return run_dir


class Evaluator:
    """Held-out loss in nats per token and in bits per byte, always over the same rows."""

    def __init__(self, run: Run, data: Dataset, mesh: jax.sharding.Mesh):
        micro = run.batch.micro_size
        self._rows = data.held_out_rows(run.evaluation.batches * micro)
        self._run, self._mesh, self._step = run, mesh, make_eval_step(run)
        self._bytes = batches.target_bytes(self._rows, data.tokenizer.bytes_per_token)

    def __call__(self, model: Transformer) -> dict:
        """The metrics, {} where nothing is held out."""
        nats = targets = 0.0
        for rows in batches.in_evaluation_batches(self._rows, self._run.batch):
            batch = batches.evaluation_batch(rows, self._run.batch, self._mesh)
            some_nats, some_targets = jax.device_get(self._step(model, batch))
            nats, targets = nats + float(some_nats), targets + float(some_targets)
        if not targets:
            return {}
        return {
            "held_out_loss": nats / targets,
            "held_out_bits_per_byte": nats / math.log(2) / self._bytes,
        }


def step_record(run: Run, step: int, values: dict, seconds: float, peak: float | None) -> dict:
    """The metrics line of a finished step. MFU: flops_per_token * tokens / seconds / peak."""
    loads = values.pop("loads")
    record = {"step": step, **{name: float(value) for name, value in values.items()}}
    record |= metrics.load_statistics(loads)
    rate = record["tokens"] / seconds
    per_token = flops.training_flops_per_token(run.model, run.batch.length)
    record |= {"step_seconds": seconds, "tokens_per_second": rate, "flops_per_token": per_token}
    return record if peak is None else record | {"mfu": per_token * rate / peak}


def read(rows: RowIterator, run: Run, used: int) -> list[Row]:
    """The rows of a step. Raises Stopped for a document that cannot be read."""
    try:
        return batches.take(rows, run.batch, used)
    except (ValueError, OSError) as error:
        raise Stopped(f"{error}\nMend the data; the same command continues then") from error


def stop(run_dir: Path, step: int, complaint: str, rows: Sequence[Row], data: Dataset) -> None:
    """Raises Stopped, after writing down which documents the batch came from."""
    sources = batches.provenance(rows, data.locate)
    file = run_dir / f"stopped_at_step_{step}.json"
    replace_text(file, json.dumps({"step": step, "reason": complaint, "batch": sources}, indent=1))
    shown = "\n".join(
        f"  row {s['row']}: {s['document']} tokens {s['tokens'][0]} to {s['tokens'][1]}"
        for s in sources[:8]
    )
    raise Stopped(
        f"step {step}: {complaint}.\nThe batch (all of it in {file}):\n{shown}\n"
        "No checkpoint holds this step. Look at these documents; then continue with "
        "a lower optim.learning_rate.peak or optim.clip_norm in a new run_dir, or, if a "
        "spike is expected here, repeat the command with a higher guard.spike."
    )


def check_sizes(run: Run) -> None:
    """ValueError if the batch does not divide over the mesh, or the sample does not fit."""
    micro = run.batch.micro_size
    shares = math.prod(sharding.axis_size(axis) for axis in sharding.BATCH_AXES)
    if micro % shares:
        raise ValueError(
            f"a micro-batch of {micro} sequences does not divide over mesh.data * mesh.fsdp * "
            f"mesh.expert = {shares}; make batch.micro (or batch.size) a multiple of it"
        )
    if run.batch.length % sharding.axis_size("context"):
        raise ValueError(
            f"batch.length={run.batch.length} does not divide over mesh.context="
            f"{sharding.axis_size('context')}"
        )
    positions = run.model.max_position_embeddings
    if max(run.batch.length, run.sample.max_new_tokens + len(run.sample.prompt) + 1) > positions:
        raise ValueError(
            f"batch.length={run.batch.length} and sample.max_new_tokens="
            f"{run.sample.max_new_tokens} with its prompt must fit into "
            f"model.max_position_embeddings={positions}"
        )


class Setup(NamedTuple):
    """All that a run needs before its first step; making it finds whatever does not fit."""

    run_dir: Path
    mesh: jax.sharding.Mesh
    data: Dataset
    rows: RowIterator
    checkpoints: Checkpoints
    state: TrainState
    log: metrics.MetricsLog


def first_state(run: Run, placement: TrainState, mesh: jax.sharding.Mesh) -> TrainState:
    """Step 0, with drawn weights or those of `run.init_from`."""
    if run.init_from is None:
        return make_init(run, placement)()
    from dsjax.convert.starting import state_from

    return state_from(run.init_from, run, placement, mesh)


def set_up(run: Run) -> Setup:
    """The mesh (set from here on), the data, and the state, new or as it was last saved.

    ValueError for a run that its mesh, its data or its folder do not fit.
    """
    if jax.default_backend() == "cpu":
        keep_freed_pages()
    mesh = sharding.make_mesh(**dataclasses.asdict(run.mesh))
    jax.set_mesh(mesh)
    check_sizes(run)
    if run.precision == "fp32":
        # Else GPUs round the factors to TF32 and TPUs to BF16.
        jax.config.update("jax_default_matmul_precision", "highest")
    placement = state_shardings(run, mesh)
    data = open_data(run.data, length=run.batch.length, vocab_size=run.model.vocab_size)
    rows = data.train_rows(run.seed)
    run_dir = claim_run_dir(run)
    checkpoints = Checkpoints(run_dir, run.checkpoint)
    step = checkpoints.latest_step
    if step is None:
        state = first_state(run, placement, mesh)
        log = metrics.MetricsLog(run_dir)
    else:
        abstract = jax.eval_shape(lambda: init_state(run))
        state, progress = checkpoints.restore(step, abstract, placement)
        rows.set_state(progress["data"])
        log = metrics.MetricsLog(run_dir, position=progress["metrics_position"], step=step)
    return Setup(run_dir, mesh, data, rows, checkpoints, state, log)


def train(run: Run, setup: Setup) -> None:
    run_dir, mesh, data, rows, checkpoints, state, log = setup
    asked_to_stop: list[int] = []

    def ask_to_stop(number: int, _: object) -> None:
        """The first signal ends the run after this step, the second ends it at once."""
        asked_to_stop.append(number)
        signal.signal(number, signal.SIG_DFL)

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, ask_to_stop)

    train_step, evaluate = make_train_step(run), Evaluator(run, data, mesh)
    guard = LossGuard(run.guard, [record["loss"] for record in metrics.read(run_dir)])
    peak = flops.peak_flops(jax.devices())
    step = int(state.step)
    origin = f"from {run.init_from or 'the beginning'}"

    def finish(values: dict, its_rows: Sequence[Row], seconds: float) -> None:
        """Writes the metrics of the step just done and checks its loss."""
        record = step_record(run, step, values, seconds, peak)
        complaint = guard.complaint(record["loss"], record["grad_norm"])
        if not complaint and (step % run.evaluation.every == 0 or step == run.steps):
            record |= evaluate(state.model)
        log.write(record)
        if complaint:
            stop(run_dir, step, complaint, its_rows, data)
        bar.update(step, record["loss"], record["tokens_per_second"])

    def save() -> None:
        if step and step != checkpoints.latest_step:
            progress = {"data": rows.get_state(), "metrics_position": log.position}
            checkpoints.save(step, state, progress)

    with StepProgress(first=step, steps=run.steps, every=run.log_every) as bar:
        bar.say(
            f"{count(state.model):,} parameters, {mesh.devices.size} "
            f"{jax.devices()[0].platform} device(s), {run.precision}, "
            + (f"continuing after step {step}" if step else origin)
        )
        try:
            while step < run.steps and not asked_to_stop:
                began = time.monotonic()
                used = batches.used_micros(run.batch, step, run.steps)
                its_rows = read(rows, run, used)
                batch = batches.training_batch(its_rows, run.batch, mesh)
                state, values = train_step(state, batch, jnp.int32(used))
                step += 1
                finish(jax.device_get(values), its_rows, time.monotonic() - began)
                if step % run.checkpoint.every == 0:
                    save()
            save()
        finally:
            checkpoints.close()
            log.close()

    if step < run.steps:
        print(f"stopped by signal after step {step}; the same command continues from there")
    else:
        report(run, run_dir, state.model, data)


def report(run: Run, run_dir: Path, model: Transformer, data: Dataset) -> None:
    """Loss curve, the held-out score beside the bigram entropy, a sample, the command for more."""
    from dsjax.plots import loss_curve

    records, bigram_bits = metrics.read(run_dir), data.bigram_bits_per_byte()
    loss_curve(records, run_dir / "loss.png", bigram_bits=bigram_bits)
    scores = [r["held_out_bits_per_byte"] for r in records if "held_out_bits_per_byte" in r]
    if scores:
        verdict = "below" if scores[-1] < bigram_bits else "NOT below"
        print(
            f"held-out text: {scores[-1]:.3f} bits per byte, {verdict} the bigram entropy of the "
            f"training bytes, {bigram_bits:.3f}"
        )
    print(f"metrics, TensorBoard events, loss.png and checkpoints: {run_dir}")
    options = {
        "prompt": run.sample.prompt,
        "max-new-tokens": run.sample.max_new_tokens,
        "temperature": run.sample.temperature,
        "top-p": run.sample.top_p,
        "seed": run.seed,
    }
    flags = [part for name, value in options.items() for part in (f"--{name}", str(value))]
    command = [sys.executable, "-m", "dsjax", "generate", str(run_dir), *flags]
    if sharding.axis_size("context") == 1:
        print(f"\n{run.sample.prompt}{sampled(run, model, data)}\n")
    print(f"more of it: {shlex.join(command)}")


def sampled(run: Run, model: Transformer, data: Dataset) -> str:
    """The model's continuation of `run.sample.prompt`."""
    from dsjax.generate import generate

    tokenizer = data.tokenizer
    tokens = generate(
        cast(model, COMPUTE_DTYPES[run.precision]),
        tokenizer.encode_prompt(run.sample.prompt),
        max_new_tokens=run.sample.max_new_tokens,
        temperature=run.sample.temperature,
        top_p=run.sample.top_p,
        seed=run.seed,
        eos_ids={tokenizer.eos_id} - {None},
        num_tokens=tokenizer.num_tokens,
    )
    return tokenizer.decode(list(tokens))


def main(arguments: Sequence[str]) -> int:
    paths = [argument for argument in arguments if "=" not in argument and argument[:1] != "-"]
    assignments = [argument for argument in arguments if "=" in argument]
    flags = [argument for argument in arguments if argument[:1] == "-" and "=" not in argument]
    try:
        if flags in (["--help"], ["-h"]):
            example = load(paths[0] if paths else "configs/tiny.py", *assignments)
            print(f"{USAGE}\n\nkeys, their types, and values here:\n\n{help_text(example)}")
            return 0
        if flags or len(paths) != 1:
            raise ValueError(f"{USAGE}; got {shlex.join(arguments) or 'nothing'}")
        run = load(paths[0], *assignments)
        setup = set_up(run)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    try:
        train(run, setup)
    except Stopped as reason:
        print(f"stopped: {reason}", file=sys.stderr)
        return 3
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
