"""Overrides: what a text means for each type of field, and what the messages say."""

import dataclasses

import pytest

from dsjax.overrides import fit, help_text, leaves, override, type_name
from dsjax.run import Objective, Run
from tests.example_runs import v3_like


def at(run: Run, key: str) -> object:
    """The value at `key`, looked up step by step and not through the code under test."""
    node = run
    for name in key.split("."):
        node = node[int(name)] if isinstance(node, tuple) else getattr(node, name)
    return node


@pytest.mark.parametrize(
    ("assignment", "expected"),
    [
        ("steps=20", 20),
        ("mesh.fsdp=-1", -1),
        ("optim.learning_rate.peak=1e-3", 1e-3),
        ("optim.clip_norm=2", 2.0),
        ("precision=fp32", "fp32"),
        ("run_dir=7", "7"),
        ("run_dir=a=b c", "a=b c"),
        ("sample.prompt=None", "None"),
        ("batch.micro=2", 2),
        ("batch.micro=none", None),
        ("model.layers.1.repeat=4", 4),
        ("model.layers.1.pattern.0.ffn.router.normalize=false", False),
        ("model.layers.1.pattern.0.ffn.router.scale=1", 1.0),
        ("model.layers.0.pattern.0.attention.rope.yarn=none", None),
        ("model.layers.0.pattern.0.attention.rope.yarn.factor=8", 8.0),
        ("model.mtp=()", ()),
        ("objective.mtp_weight.steps=((0, 0.5), (0.5, 1))", ((0.0, 0.5), (0.5, 1.0))),
    ],
)
def test_a_text_becomes_a_value_of_the_field_s_type(assignment, expected):
    key = assignment.partition("=")[0]
    value = at(override(v3_like(), assignment), key)
    assert value == expected
    assert repr(value) == repr(expected)  # 2 and 2.0, True and 1 are equal but not the same


def test_everything_else_stays():
    run = v3_like()
    changed = override(run, "optim.beta1=0.8")
    assert changed != run
    assert dataclasses.replace(changed, optim=run.optim) == run
    assert override(changed, "optim.beta1=0.9") == run
    assert override(run) == run


def test_values_that_only_fit_together_change_together():
    assert at(override(v3_like(), "batch.size=6", "batch.micro=3"), "batch.size") == 6
    with pytest.raises(ValueError, match=r"^batch\.size=6: batch\.size=6 must be a positive mult"):
        override(v3_like(), "batch.size=6")


def test_the_later_of_two_wins_and_a_whole_excludes_its_part():
    assert override(v3_like(), "steps=1", "steps=2").steps == 2
    with pytest.raises(ValueError, match=r"model\.mtp= and model\.mtp\.0\.ffn= contradict"):
        override(v3_like(), "model.mtp.0.ffn=1", "model.mtp=()")


@pytest.mark.parametrize(
    ("assignment", "parts"),
    [
        ("stps=3", ["unknown key 'stps'", "a run is a Run with model, data", "mean steps?"]),
        ("peak=3", ["did you mean optim.learning_rate.peak?"]),
        ("optim.beta3=1", ["optim is a Optim with learning_rate, beta1, beta2", "optim.beta"]),
        ("mesh.pipe=1", ["mesh is a MeshShape with data, fsdp, expert, tensor, context"]),
        ("model.layers.2.repeat=1", ["model.layers has items 0, 1"]),
        ("model.layers.-1.repeat=1", ["model.layers has items 0, 1"]),
        ("steps.more=1", ["steps is 1000 and has no keys below it"]),
        ("data.held=1", ["data is a Files with path", "did you mean data.held_out?"]),
    ],
)
def test_an_unknown_key_lists_the_right_ones(assignment, parts):
    with pytest.raises(ValueError) as caught:
        override(v3_like(), assignment)
    assert [part for part in parts if part not in str(caught.value)] == []


@pytest.mark.parametrize(
    ("assignment", "message"),
    [
        ("steps=many", "steps wants int, got 'many'"),
        ("steps=1.5", "steps wants int, got 1.5"),
        ("steps=true", "steps wants int, got True"),
        ("steps=", "steps wants int, got ''"),
        ("batch.micro=half", "batch.micro wants int | None, got 'half'"),
        ("optim.eps=small", "optim.eps wants float, got 'small'"),
        ("optim.eps=none", "optim.eps wants float, got 'none'"),
        ("model.mtp.0.ffn.router.normalize=1", "normalize wants bool, got 1"),
        ("objective.bias_rate.steps=(0, 1)", "wants tuple[tuple[float, float], ...], got (0, 1)"),
        ("objective.bias_rate.steps=((0, 1, 2),)", "wants tuple[tuple[float, float], ...], got"),
        ("optim=3", "optim wants Optim, got 3; a whole Optim is written in a run file"),
        ("model.layers.0=3", "model.layers.0 wants LayerGroup, got 3"),
        ("model.mtp=(1,)", "model.mtp wants tuple[Block, ...], got (1,)"),
        ("steps", "'steps' is no override; write key=value"),
        ("=3", "'=3' is no override"),
        ("mesh..data=3", "unknown key 'mesh..data'"),
        ("batch.length=1", "batch.length=1: batch.size=8 must be a positive multiple"),
        ("objective.bias_rate.steps=()", "objective.bias_rate.steps=(): Piecewise.steps is ()"),
    ],
)
def test_a_value_that_does_not_fit_says_what_is_wanted(assignment, message):
    with pytest.raises(ValueError) as caught:
        override(v3_like(), assignment)
    assert message in str(caught.value)


def test_leaves_are_what_override_takes():
    run = v3_like()
    keys = [leaf.key for leaf in leaves(run)]
    assert len(keys) == len(set(keys))
    assert {"steps", "seed", "run_dir", "precision", "checkpoint.every"} <= set(keys)
    assert {f"mesh.{axis}" for axis in ("data", "fsdp", "expert", "tensor", "context")} <= set(keys)
    for leaf in leaves(run):
        assert at(run, leaf.key) == leaf.value
        assert override(run, f"{leaf.key}={leaf.value}") == run, leaf.key
    assert "optim" not in keys  # a component is no leaf
    assert "objective.mtp_weight.steps" in keys
    without_mtp = {leaf.key: leaf.value for leaf in leaves(override(run, "model.mtp=()"))}
    assert without_mtp["model.mtp"] == ()


def test_help_is_a_table_with_every_leaf():
    lines = help_text(v3_like()).splitlines()
    assert [line.split()[0] for line in lines] == [leaf.key for leaf in leaves(v3_like())]
    (line,) = (line for line in lines if line.startswith("batch.micro "))
    assert line.split() == ["batch.micro", "int", "|", "None", "4"]


def test_names_of_types_are_those_of_the_source():
    steps = next(f for f in dataclasses.fields(Objective) if f.name == "mtp_weight")
    assert type_name(steps.type) == "Piecewise"
    assert type_name(int | None) == "int | None"
    assert type_name(tuple[tuple[float, float], ...]) == "tuple[tuple[float, float], ...]"
    assert type_name(Run | None) == "Run | None"


def test_fit_never_takes_one_type_for_another():
    assert repr(fit([1, [2, 3]], tuple[int, tuple[float, ...]], "k")) == "(1, (2.0, 3.0))"
    for value, wanted in [(True, int), (True, float), (1.0, int), (None, int), ("1", int)]:
        with pytest.raises(ValueError, match=r"^k wants"):
            fit(value, wanted, "k")
