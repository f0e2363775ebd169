"""Runs in files: loading by path with overrides, and JSON that loses nothing."""

import dataclasses
import json

import pytest

from dsjax import run_file
from dsjax.config import SoftmaxRouter
from dsjax.overrides import leaves, override
from dsjax.run import Run, StandardLibrary
from dsjax.run_file import from_json, load, to_json
from tests.example_runs import v3_like

RUN_FILE = """
from tests.example_runs import v3_like

run = v3_like()
"""


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "good.py").write_text(RUN_FILE)
    (tmp_path / "empty.py").write_text("")
    (tmp_path / "other.py").write_text("run = 3")
    return tmp_path


def test_load_applies_overrides(folder):
    assert load(folder / "good.py") == v3_like()
    changed = load(str(folder / "good.py"), "steps=20", "mesh.expert=8")
    assert changed == override(v3_like(), "steps=20", "mesh.expert=8")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("god.py", r"no run file '.*god\.py'; there are: .*empty\.py, .*good\.py, .*other\.py"),
        ("empty.py", r"empty\.py defines no run: it has no `run`"),
        ("other.py", r"other\.py defines no run: its `run` is a int"),
    ],
)
def test_load_says_what_is_wrong_with_a_file(folder, name, message):
    with pytest.raises(ValueError, match=message):
        load(folder / name)


def test_json_gives_back_the_same_run():
    run = v3_like()
    again = from_json(to_json(run))
    assert again == run
    assert repr(again) == repr(run)  # also 10000.0 against 10000, which are equal
    assert to_json(again) == to_json(run)


def test_json_keeps_every_leaf_apart():
    """Changing any single leaf changes the text, and the change comes back."""
    run = v3_like()
    texts = {to_json(run)}
    floats = [leaf for leaf in leaves(run) if type(leaf.value) is float]
    assert len(floats) > 20
    for leaf in floats:
        changed = override(run, f"{leaf.key}={leaf.value * (1 + 2**-52) + 5e-324!r}")
        assert from_json(to_json(changed)) == changed
        texts.add(to_json(changed))
    assert len(texts) == len(floats) + 1


def test_json_keeps_the_variant():
    run = dataclasses.replace(v3_like(), data=StandardLibrary())
    assert from_json(to_json(run)).data == StandardLibrary()
    stored = json.loads(to_json(run))
    stored["model"]["mtp"][0]["ffn"]["router"]["type"] = "SoftmaxRouter"
    assert from_json(json.dumps(stored)).model.mtp[0].ffn.router == SoftmaxRouter(
        num_groups=8, kept_groups=4, normalize=True, scale=2.5
    )


def test_a_field_newer_than_the_text_takes_its_default():
    stored = json.loads(to_json(v3_like()))
    del stored["guard"]
    assert from_json(json.dumps(stored)) == v3_like()


def broken(*path: str | int, value: object) -> str:
    """The JSON of a good run with one entry replaced, or removed where `value` is None."""
    stored = node = json.loads(to_json(v3_like()))
    for step in path[:-1]:
        node = node[step]
    node[path[-1]] = value
    if value is None:
        del node[path[-1]]
    return json.dumps(stored)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (broken("optim", "type", value="Popen"), r"run\.optim has unknown type 'Popen'; known"),
        (broken("optim", "type", value=None), r"run\.optim has unknown type None"),
        (broken("optim", "type", value="Guard"), r"run\.optim does not describe a Guard"),
        (broken("optim", "beta9", value=1.0), r"unknown fields \['beta9'\]"),
        (broken("steps", value=None), r"missing fields \['steps'\]"),
        (broken("steps", value=1.5), r"run\.steps wants int, got 1\.5"),
        (broken("optim", value=3), r"run\.optim wants Optim, got 3"),
        (broken("model", "layers", 0, "repeat", value=0), r"LayerGroup\.repeat is 0"),
        ('{"type": "Guard"}', r"describes Guard, not a Run"),
        ("{", r"Expecting property name"),
    ],
)
def test_json_that_is_no_run_is_refused(text, message):
    with pytest.raises(ValueError, match=message):
        from_json(text)


def test_only_our_components_are_written():
    @dataclasses.dataclass(frozen=True)
    class Guard:
        spike: float = 1.0

    run = v3_like()
    object.__setattr__(run, "guard", Guard())
    with pytest.raises(ValueError, match=r"Guard is no component of dsjax\.config or dsjax\.run"):
        to_json(run)


def test_the_tag_is_no_field_and_names_are_unique():
    assert run_file.COMPONENTS["Run"] is Run
    for name, component in run_file.COMPONENTS.items():
        assert component.__name__ == name
        assert run_file.TAG not in {f.name for f in dataclasses.fields(component)}
