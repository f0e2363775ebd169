"""Trains a DeepSeek model: python train.py configs/tiny.py [key=value ...]

`set_up` makes mesh, data and state; `train` is the loop; `report` is what is left behind.
The same command continues a run that was stopped, at the last checkpoint and bit for bit. On
several machines it is started once on each (docs/launch.md); process 0 writes and prints.
"""

import collections
import contextlib
import dataclasses
import json
import math
import shlex
import sys
import time
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

from dsjax import batches, flops, metrics, processes, sharding
from dsjax.batches import Evaluator
from dsjax.checkpoint import Checkpoints
from dsjax.data import Dataset, Row, RowIterator, merged, open_data
from dsjax.data.documents import Unreadable, mending
from dsjax.generate import generate
from dsjax.guard import LossGuard, ways_out
from dsjax.host_memory import keep_freed_pages
from dsjax.model import Transformer, abstract
from dsjax.nn.precision import PRECISIONS, products
from dsjax.overrides import help_text
from dsjax.params import cast, count
from dsjax.progress import StepProgress
from dsjax.run import Run
from dsjax.run_file import load, to_json
from dsjax.run_folder import RunFolder, replace_text
from dsjax.trace import StepTrace
from dsjax.train_step import (
    TrainState,
    init_state,
    make_init,
    make_train_step,
    state_shardings,
)

USAGE = (
    "usage: python train.py configs/NAME.py [key=value ...]\n"
    "       python train.py configs/NAME.py topology=v5p:8x8x8 [key=value ...] --compile-only"
)


class Stopped(Exception):
    """Training cannot go on, as all processes found; the message says why and what to do."""


def step_record(run: Run, step: int, values: dict, seconds: float, peak: float | None) -> dict:
    """The metrics line of a finished step. MFU: flops_per_token * tokens / seconds / peak."""
    loads = values.pop("loads")
    record = {"step": step, **{name: float(value) for name, value in values.items()}}
    devices = math.prod(sharding.axis_size(axis) for axis in sharding.RULES["experts"])
    record |= metrics.load_statistics(loads, devices=devices)
    rate = record["tokens"] / seconds
    per_token = flops.training_flops_per_token(run.model, run.batch.length)
    record |= {"step_seconds": seconds, "tokens_per_second": rate, "flops_per_token": per_token}
    return record if peak is None else record | {"mfu": per_token * rate / peak}


def stop(
    folder: RunFolder,
    step: int,
    complaint: str,
    rows: Sequence[Row | None],
    data: Dataset,
    advice: str,
) -> None:
    """Raises Stopped, after writing down which documents the batch came from."""
    found = processes.gathered(batches.provenance(rows, data.locate))
    # Processes that share a row have both found it.
    known = {json.dumps(source): source for sources in found for source in sources}
    sources = sorted(known.values(), key=lambda source: source["row"])
    file = folder.local / f"stopped_at_step_{step}.json"
    if processes.is_first():
        blame = {"step": step, "reason": complaint, "batch": sources}
        replace_text(file, json.dumps(blame, indent=1))
        folder.publish()
    shown = "\n".join(
        f"  row {s['row']}: {s['document']} tokens {s['tokens'][0]} to {s['tokens'][1]}"
        for s in sources[:8]
    )
    raise Stopped(f"step {step}: {complaint}.\nThe batch (all of it in {file}):\n{shown}\n{advice}")


def check_sizes(run: Run) -> None:
    """ValueError if the batch does not divide over the mesh, or something does not fit."""
    batches.check_fits(run.batch)
    if run.dispatch == "ragged" and jax.default_backend() == "cpu":
        raise ValueError(
            "dispatch=ragged needs a collective that XLA has for TPU and GPU only; on CPU choose "
            "auto, ring or all_to_all"
        )
    batches.check_length(run.batch.length, "batch.length", run.model)


class Setup(NamedTuple):
    """All that a run needs before its first step; making it finds whatever does not fit."""

    folder: RunFolder
    mesh: jax.sharding.Mesh
    data: Dataset
    rows: RowIterator
    evaluate: Evaluator
    checkpoints: Checkpoints
    state: TrainState
    log: metrics.MetricsLog | None  # of the first process
    goodput: metrics.Goodput


class Flight(NamedTuple):
    """A step that devices may still be computing: its metrics to come, and its rows."""

    step: int
    values: dict
    rows: Sequence[Row | None]


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
    if run.compilation_cache is not None:
        jax.config.update("jax_compilation_cache_dir", run.compilation_cache)
    processes.check_equal("the run (run file and key=value)", to_json(run))
    with processes.together():
        mesh = sharding.make_mesh(**dataclasses.asdict(run.mesh))
        jax.set_mesh(mesh)
        check_sizes(run)
        placement = state_shardings(run, mesh)
        data = open_data(run.data, length=run.batch.length, vocab_size=run.model.vocab_size)
        evaluate, folder = Evaluator(run, data, mesh), RunFolder(run.run_dir)
        # What `report` needs must not fail after all the training.
        if processes.is_first():
            data.bigram_bits_per_byte()
        if sharding.axis_size("context") == 1:
            continuation(run, abstract(run.model), data)
    # The same files, or else the processes would make rows of different runs.
    processes.check_equal("the data", data.source)
    if run.precision == "fp32":
        # Else GPUs round the factors to TF32 and TPUs to BF16.
        jax.config.update("jax_default_matmul_precision", "highest")
    with processes.together():
        if processes.is_first():
            folder.claim(run)
    with processes.together():
        folder.check_shared(run)
    checkpoints = Checkpoints(run.run_dir, run.checkpoint)
    step, progress, log = checkpoints.latest_step, {}, None
    if step is not None:
        shapes = jax.eval_shape(lambda: init_state(run))
        state, progress = checkpoints.restore(step, shapes, placement)
    with processes.together():
        if step is None:
            rows = data.train_rows(run.seed, streams=run.batch.micro_size)
            state = first_state(run, placement, mesh)
        else:
            rows = data.train_rows(run.seed, streams=progress["data"]["streams"])
            rows.set_state(progress["data"])
        if processes.is_first():
            log = metrics.MetricsLog(folder.local, step=step or 0, record=progress.get("record"))
    goodput = metrics.Goodput(folder.began, progress.get("productive_seconds", 0.0))
    return Setup(folder, mesh, data, rows, evaluate, checkpoints, state, log, goodput)


def train(run: Run, setup: Setup) -> None:
    folder, mesh, data, rows, evaluate, checkpoints, state, log, goodput = setup
    stop_signal, watchdog = processes.StopSignal(), processes.Watchdog(run.hang_minutes)
    train_step = make_train_step(run)
    before = metrics.read(folder.local)[-run.guard.window :] if log else []
    guard = LossGuard(run.guard, processes.from_first([record["loss"] for record in before]))
    trace = StepTrace(run.profile, folder.local / "profile" if log else None)
    peak = flops.peak_flops(jax.devices())
    step = first = int(state.step)
    saved_at = time.monotonic()
    origin = f"from {run.init_from or 'the beginning'}"

    def is_time_to_save() -> bool:
        """By the step's number, or by the clock of the first process."""
        if step % run.checkpoint.every == 0:
            return True
        minutes = run.checkpoint.every_minutes
        return minutes is not None and processes.from_first(
            time.monotonic() - saved_at >= minutes * 60
        )

    def save(record: dict) -> dict:
        """Saves the step just done. Its metrics: how long that kept the next one waiting."""
        began = time.monotonic()
        progress = {
            "data": merged(processes.gathered(rows.get_state())),
            "record": record,
            "productive_seconds": goodput.productive_seconds,
        }
        checkpoints.save(step, state, progress)
        return {"checkpoint_blocked_seconds": time.monotonic() - began}

    with (
        StepProgress(first=step, steps=run.steps, every=run.log_every, quiet=not log) as bar,
        contextlib.ExitStack() as closing,
    ):
        if log:
            closing.callback(log.close)
        closing.callback(checkpoints.close)
        closing.callback(trace.close)
        closing.callback(watchdog.stop)
        # Before these: a process that alone fails must not wait for a save that needs all.
        closing.enter_context(processes.ending_together(but=Stopped))
        bar.say(
            f"{count(state.model):,} parameters, {mesh.devices.size} "
            f"{jax.devices()[0].platform} device(s), {run.precision}, "
            + (f"continuing after step {step}" if step else origin)
        )
        if evaluate.lacking:
            bar.say(f"there will be no held-out loss: {evaluate.lacking}")
        is_last = step >= run.steps
        flights: collections.deque[Flight] = collections.deque()
        while not is_last:
            if not flights:
                began = time.monotonic()
            used = batches.used_micros(run.batch, step, run.steps)
            with trace.around(step + 1):
                its_rows = batches.take(rows, run.batch, used, mesh)
                batch = batches.training_batch(its_rows, run.batch, mesh)
                state, values = train_step(state, batch, jnp.int32(used))
            step += 1
            flights.append(Flight(step, values, its_rows))
            while flights:
                done, evaluates, saves = flights[0], False, False
                if done.step == step:
                    is_last = stop_signal.reached(step) or step == run.steps
                    evaluates = step % run.evaluation.every == 0 or step == run.steps
                    saves = is_last or is_time_to_save()
                    if not (evaluates or saves or trace.changes_after(step)):
                        # It stays in the air while the next one starts: no device waits for us.
                        break
                flights.popleft()
                values = jax.device_get(done.values)
                trace.end(done.step)
                seconds = time.monotonic() - began
                began += seconds
                record = step_record(run, done.step, values, seconds, peak)
                # The first step of a start is mostly compilation.
                record["goodput"] = goodput.after(seconds if done.step > first + 1 else 0.0)
                complaint = guard.complaint(record["loss"], record["grad_norm"])
                if evaluates and not complaint:
                    record |= evaluate(state.model)
                if saves and not complaint:
                    record |= save(record)
                    saved_at = time.monotonic()
                if log:
                    log.write(record)
                    if "checkpoint_blocked_seconds" in record:
                        folder.publish()
                if complaint:
                    anew = None if checkpoints.latest_step is None else folder.anew
                    advice = ways_out(record["loss"], record["grad_norm"], anew)
                    stop(folder, done.step, complaint, done.rows, data, advice)
                bar.update(done.step, record["loss"], record["tokens_per_second"])
                watchdog.hear()

    if step >= run.steps:
        report(run, setup, state.model)
    elif log:
        print(f"stopped by signal after step {step}; the same command continues from there")


def report(run: Run, setup: Setup, model: Transformer) -> None:
    """Loss curve, the held-out score beside the bigram entropy, a sample, the command for more."""
    if processes.is_first():
        tell_score(run, setup)
    # By all processes, as every one has a part of the model.
    if sharding.axis_size("context") == 1:
        sample = sampled(run, model, setup.data)
    else:
        sample = " ... (not continued here: mesh.context must be 1 to generate)"
    options = {
        "prompt": run.sample.prompt,
        "max-new-tokens": run.sample.max_new_tokens,
        "temperature": run.sample.temperature,
        "top-p": run.sample.top_p,
        "seed": run.seed,
    }
    # In one word, so that a value may begin with a dash.
    flags = [f"--{name}={value}" for name, value in options.items()]
    command = [sys.executable, "-m", "dsjax", "generate", run.run_dir, *flags]
    if processes.is_first():
        print(f"\n{run.sample.prompt}{sample}\n\nmore of it: {shlex.join(command)}")


def tell_score(run: Run, setup: Setup) -> None:
    """Draws loss.png and prints the verdict."""
    from dsjax.plots import loss_curve

    folder, bigram_bits = setup.folder, setup.data.bigram_bits_per_byte()
    records = metrics.read(folder.local)
    loss_curve(records, folder.local / "loss.png", bigram_bits=bigram_bits)
    scores = [r["held_out_bits_per_byte"] for r in records if "held_out_bits_per_byte" in r]
    if scores:
        verdict = "below" if scores[-1] < bigram_bits else "NOT below"
        print(
            f"held-out text: {scores[-1]:.3f} bits per byte, {verdict} the bigram entropy of the "
            f"training bytes, {bigram_bits:.3f}"
        )
    else:
        print(f"held-out text: no score, and so no verdict: {setup.evaluate.lacking}")
    folder.publish()
    print(f"metrics, TensorBoard events, loss.png and checkpoints: {run.run_dir}")


def sampled(run: Run, model: Transformer, data: Dataset) -> str:
    """The model's continuation of `run.sample.prompt`."""
    precision = PRECISIONS[run.precision]
    with products(precision.products):
        return data.tokenizer.decode(list(continuation(run, cast(model, precision.dtype), data)))


def continuation(run: Run, model: Transformer, data: Dataset) -> Iterator[int]:
    """Its tokens, none made yet. ValueError if `run.sample` asks for what cannot be."""
    tokenizer, sample = data.tokenizer, run.sample
    try:
        return generate(
            model,
            tokenizer.encode_prompt(sample.prompt),
            max_new_tokens=sample.max_new_tokens,
            temperature=sample.temperature,
            top_p=sample.top_p,
            seed=run.seed,
            eos_ids={tokenizer.eos_id} - {None},
            num_tokens=tokenizer.num_tokens,
        )
    except ValueError as error:
        raise ValueError(f"sample.prompt={sample.prompt!r} cannot be continued: {error}") from error


def main(arguments: Sequence[str]) -> int:
    paths = [argument for argument in arguments if "=" not in argument and argument[:1] != "-"]
    assignments = [argument for argument in arguments if "=" in argument]
    flags = [argument for argument in arguments if argument[:1] == "-" and "=" not in argument]
    try:
        launch, assignments = processes.launch_keys(assignments)
        if flags in (["--help"], ["-h"]):
            example = load(paths[0] if paths else "configs/tiny.py", *assignments)
            print(f"{USAGE}\n\nkeys, their types, and values here:\n\n{help_text(example)}")
            print(f"\nof this process, not of the run (docs/launch.md):\n\n{processes.HELP}")
            return 0
        if flags == ["--compile-only"] and len(paths) == 1:
            from dsjax.plan.command import plan

            return 0 if plan(paths[0], assignments) else 1
        if flags or len(paths) != 1:
            raise ValueError(f"{USAGE}; got {shlex.join(arguments) or 'nothing'}")
        run = load(paths[0], *assignments)
        processes.start(launch)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    layout = sharding.layout(sharding.Layout(dispatch=run.dispatch))
    try:
        with layout, processes.ending_together(but=processes.Agreed):
            setup = set_up(run)
    except ValueError as error:
        if processes.is_first():
            print(f"error: {error}", file=sys.stderr)
        return 2
    try:
        with layout, processes.ending_together(but=Stopped):
            train(run, setup)
    except Stopped as reason:
        if processes.is_first():
            print(f"stopped: {reason}", file=sys.stderr)
        return 3
    except Unreadable as reason:
        saved = setup.folder.saved_step is not None
        advice = mending(setup.folder.anew if saved else None)
        print(f"stopped: {reason}\n{advice}", file=sys.stderr)
        return 3
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
