"""What `train.py` says and refuses, without a training: report, sample, ways out, changes."""

import dataclasses
import functools
import json
import re
import shlex
from pathlib import Path
from types import SimpleNamespace

import jax
import pytest
from etils import epath

import train as trainer
from dsjax import cli, sharding
from dsjax.convert import fitting
from dsjax.data import Bytes, open_data
from dsjax.data.documents import mending
from dsjax.guard import ways_out
from dsjax.model import abstract
from dsjax.plan import chips, predict
from dsjax.run import MeshShape
from dsjax.run_file import load
from dsjax.run_folder import RunFolder

SMALL = Path(__file__).with_name("small_run.py")


@pytest.fixture
def small(tmp_path):
    return load(SMALL, f"run_dir={tmp_path / 'run'}", "sample.prompt=-x")


def report(run, scores: list[float], *, context: int = 1) -> None:
    """The report of a run of two steps, in this process; what makes the sample is the caller's."""
    folder = RunFolder(run.run_dir)
    folder.local.mkdir(exist_ok=True)
    records = [{"step": 1, "loss": 5.0}, {"step": 2, "loss": 4.0}]
    if scores:
        records[-1] |= {"held_out_loss": 4.0, "held_out_bits_per_byte": scores[-1]}
    (folder.local / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    setup = SimpleNamespace(
        folder=folder,
        data=SimpleNamespace(bigram_bits_per_byte=lambda: 3.5, tokenizer=Bytes()),
        evaluate=SimpleNamespace(lacking="data.held_out=0.01 leaves no row"),
    )
    mesh = sharding.make_mesh(devices=jax.devices()[:context], context=context)
    with jax.set_mesh(mesh):
        trainer.report(run, setup, None)


def test_a_sample_that_fails_costs_neither_picture_nor_verdict(small, monkeypatch, capsys):
    def fail(*_: object) -> str:
        raise RuntimeError("no memory left")

    monkeypatch.setattr(trainer, "sampled", fail)
    with pytest.raises(RuntimeError, match="no memory left"):
        report(small, [3.25])
    assert "3.250 bits per byte, below the bigram entropy" in capsys.readouterr().out
    assert (Path(small.run_dir) / "loss.png").is_file()


def test_the_report_says_what_is_missing_and_why(small, monkeypatch, capsys):
    monkeypatch.setattr(trainer, "sampled", lambda *_: " = 1")
    report(small, [])
    told = capsys.readouterr().out
    assert "no verdict: data.held_out=0.01 leaves no row" in told and "-x = 1\n" in told
    _, *arguments = shlex.split(told.rpartition("more of it: ")[2])
    assert arguments[:2] == ["-m", "dsjax"]
    # A prompt that begins with a dash is no flag.
    assert cli._parser().parse_args(arguments[2:]).prompt == "-x"
    report(small, [3.75], context=2)
    told = capsys.readouterr().out
    assert "NOT below" in told and "mesh.context must be 1 to generate" in told


def test_the_prompt_is_measured_in_tokens(small):
    """Twenty characters of two bytes, and the beginning of a document: 41 of 64 positions."""
    sizes = ["sample.prompt=" + "\u00e9" * 20, "model.max_position_embeddings=64"]
    data = open_data(small.data, length=32, vocab_size=264)
    for wanted, fits in ((23, True), (24, False)):
        run = load(SMALL, *sizes, f"sample.max_new_tokens={wanted}")
        if fits:
            trainer.continuation(run, abstract(run.model), data)
            continue
        with pytest.raises(ValueError, match=r"sample\.prompt=.* 41 prompt tokens"):
            trainer.continuation(run, abstract(run.model), data)


def test_ways_out_of_a_stop_are_ways_out():
    nan, anew = float("nan"), "init_from=runs/a run_dir=NEW"
    assert "guard.spike" in ways_out(9.0, 1.0, anew)
    for loss, norm in ((nan, 1.0), (1.0, float("inf"))):
        assert "guard.spike" not in ways_out(loss, norm, anew)
    # Without init_from another run_dir begins with drawn weights.
    assert anew in ways_out(9.0, 1.0, anew) and anew in ways_out(nan, nan, anew)
    assert anew in mending(anew) and "init_from" not in mending(None)
    assert "nothing is saved yet" in ways_out(9.0, 1.0, None)
    assert "init_from" not in ways_out(nan, nan, None)


@pytest.mark.parametrize(
    ("change", "ramp", "refused"),
    [
        ("batch.micro=2", 0.0, None),
        ("dispatch=ring", 0.0, None),
        ("batch.size=16", 0.0, "batch.size"),
        # After step 3 of 8 a ramp until a quarter of them is over, one until the half is not.
        ("batch.micro=2", 0.25, None),
        ("batch.micro=2", 0.5, "batch.micro"),
    ],
)
def test_what_may_change_when_a_run_continues(change, ramp, refused, tmp_path):
    begun = [f"run_dir={tmp_path}", "batch.ramp_from=4", f"batch.ramp_until={ramp}"]
    run = load(SMALL, *begun)
    RunFolder(tmp_path).claim(run)
    (tmp_path / "checkpoints" / "3").mkdir()
    other = load(SMALL, *begun, change)
    if refused is None:
        RunFolder(tmp_path).claim(other)
        return
    with pytest.raises(ValueError, match=f"another {refused};"):
        RunFolder(tmp_path).claim(other)


def recipes() -> list[tuple[str, str]]:
    """The topology that each launch recipe is for, and its command in one line."""
    text = (SMALL.parents[1] / "docs" / "launch.md").read_text().replace("\\\n", " ")
    found = re.findall(r"`(topology=[^`]+)`.*?```\n(.*?)```", text, flags=re.DOTALL)
    return [(asked, re.search(r"train\.py (configs/[^>|\n]*)", block)[1]) for asked, block in found]


def fits(asked: str, config: str, *keys: str) -> bool:
    """By the planner's arithmetic."""
    place, _, slices = asked.removeprefix("topology=").partition(" slices=")
    topology = chips.topology(place, int(slices or 1))
    run = load(SMALL.parents[1] / config, *keys)
    sizes = sharding.mesh_sizes(topology.num_devices, **dataclasses.asdict(run.mesh))
    run = dataclasses.replace(run, mesh=MeshShape(**sizes))
    assert run.batch.micro_size % topology.num_devices == 0
    return predict.predict(run, weights(config), topology).fits


@functools.cache
def weights(config: str) -> list[fitting.Weight]:
    return fitting.weights(load(SMALL.parents[1] / config).model, is_fp8=False)


def test_the_recipes_of_the_launch_guide_fit_their_machines():
    assert len(recipes()) == 4
    for asked, line in recipes():
        config, *keys = line.split()
        given = {key.partition("=")[0] for key in keys}
        assert {"data.path", "data.tokenizer"} <= given, f"{config} would look for data/text"
        assert fits(asked, config, *keys), f"{line} on {asked}"
    # The micro-batch of 512 that stands in the config.
    assert not fits("topology=h100:1x8", "configs/v2_lite.py", "mesh.expert=8")


def test_only_changed_files_are_copied_to_a_url(tmp_path):
    folder = RunFolder(tmp_path / "run")
    folder.remote, folder.home = True, epath.Path(tmp_path / "home")
    folder.local.mkdir()
    for name in ("kept", "grows"):
        (folder.local / name).write_text("one")
    folder.publish()
    (tmp_path / "home" / "kept").write_text("not written again")
    (folder.local / "grows").write_text("one two")
    folder.publish()
    assert (tmp_path / "home" / "kept").read_text() == "not written again"
    assert (tmp_path / "home" / "grows").read_text() == "one two"
