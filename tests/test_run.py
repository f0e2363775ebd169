"""Values of a run that would only fail, or silently mislead, once it is under way."""

import dataclasses
import math
import re

import pytest

from dsjax.overrides import override
from dsjax.run import PRECISIONS, BatchShape, LearningRate, Optim, Run, Sample, StepDecay
from tests import drawn

RATE = LearningRate(peak=1e-2, warmup_steps=1)
DECAY = StepDecay(peak=1e-2, warmup_steps=1)


@pytest.mark.parametrize(
    ("component", "changes", "told"),
    [
        (Sample(), {"top_p": 0.0}, "sample.top_p=0.0 above 0 and at most 1"),
        (Sample(), {"top_p": 1.5}, "sample.top_p=1.5"),
        (Sample(), {"temperature": -1.0}, "sample.temperature=-1.0 must be a number of at least 0"),
        (Sample(), {"temperature": math.nan}, "sample.temperature=nan"),
        (Sample(), {"max_new_tokens": 0}, "sample.max_new_tokens is 0; it must be at least 1"),
        (RATE, {"peak": -1.0}, "optim.learning_rate.peak is -1.0; it must be a number of at least"),
        (RATE, {"peak": math.inf}, "optim.learning_rate.peak is inf"),
        (RATE, {"warmup_steps": -5}, "optim.learning_rate.warmup_steps is -5"),
        (RATE, {"constant_until": 0.99}, "optim.learning_rate.constant_until=0.99, cosine_until="),
        (RATE, {"cosine_until": 1.1}, "cosine_until=1.1 and"),
        (RATE, {"tail_until": -0.1}, "tail_until=-0.1 must be fractions of the run"),
        (RATE, {"final": -0.1}, "optim.learning_rate.final is -0.1"),
        (DECAY, {"peak": math.nan}, "optim.learning_rate.peak is nan"),
        (DECAY, {"factor": -0.5}, "optim.learning_rate.factor is -0.5"),
        (DECAY, {"at": (0.9, 0.6)}, "optim.learning_rate.at is (0.9, 0.6); it must be rising"),
        (DECAY, {"at": (0.6, 1.2)}, "optim.learning_rate.at is (0.6, 1.2)"),
        (Optim(learning_rate=RATE), {"clip_norm": 0.0}, "optim.clip_norm=0.0 must be above 0"),
        (Optim(learning_rate=RATE), {"beta1": 1.5}, "optim.beta1=1.5 and optim.beta2=0.95 must be"),
        (Optim(learning_rate=RATE), {"beta2": 1.0}, "optim.beta2=1.0 must be at least 0 and below"),
        (Optim(learning_rate=RATE), {"eps": 0.0}, "optim.eps=0.0 must be a number above 0"),
        (Optim(learning_rate=RATE), {"weight_decay": -0.1}, "optim.weight_decay=-0.1 one of at l"),
        (
            BatchShape(size=8, length=4),
            {"ramp_until": -3.0},
            "batch.ramp_until=-3.0 must be a f",
        ),
        (BatchShape(size=8, length=4), {"ramp_until": math.nan}, "batch.ramp_until=nan"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else type(value).__name__,
)
def test_a_value_that_no_run_can_mean_is_refused(component: object, changes: dict, told: str):
    with pytest.raises(ValueError, match=re.escape(told)):
        dataclasses.replace(component, **changes)


def test_a_run_needs_a_folder():
    run = drawn.run(drawn.model())
    with pytest.raises(ValueError, match=r"run_dir is ''; give a folder or a URL"):
        override(run, "run_dir=")


def test_zero_is_taken_where_it_means_something():
    """No warm-up, a rate that moves nothing, no memory of gradients, always the likeliest token."""
    LearningRate(peak=0.0, warmup_steps=0, constant_until=0.0, cosine_until=0.0, last=0.0)
    StepDecay(peak=0.0, warmup_steps=0, at=(), factor=0.0)
    Optim(learning_rate=RATE, beta1=0.0, beta2=0.0, eps=1.0, weight_decay=0.0, clip_norm=math.inf)
    # A text from nothing but the begin of a document.
    Sample(prompt="", temperature=0.0, top_p=1.0, max_new_tokens=1)


def test_the_docstring_names_every_precision():
    assert [name for name in PRECISIONS if f'"{name}"' not in Run.__doc__] == []
