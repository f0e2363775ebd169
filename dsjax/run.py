"""What a run *is*: model, data, objective, optimizer, mesh, and where the results go.

A run file under `configs/` builds one `Run`; the command line changes single leaves of it.
"""

import dataclasses
import math

from dsjax.config import Model

PRECISIONS = ("fp32", "bf16", "fp8", "fp8_exact_wgrad", "fp8_ue8m0")
REMATS = ("full", "none", "save_latents", "offload")
MOMENTS = ("fp32", "bf16")
DISPATCHES = ("auto", "ring", "all_to_all", "ragged")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Piecewise:
    """A value that jumps: `((0.0, 0.3), (0.68, 0.1))` is 0.3, and 0.1 from 68% of the run on."""

    steps: tuple[tuple[float, float], ...]

    def __post_init__(self):
        starts = [start for start, _ in self.steps]
        if not starts or starts[0] != 0.0 or starts != sorted(starts) or starts[-1] > 1.0:
            raise ValueError(
                f"Piecewise.steps is {self.steps}; it must be (fraction of the run, value) pairs "
                "with rising fractions that begin at 0.0 and end by 1.0"
            )


def _check_rate(rate, *factors: str) -> None:
    for name in ("peak", "warmup_steps", *factors):
        value = getattr(rate, name)
        if not 0 <= value < math.inf:
            raise ValueError(
                f"optim.learning_rate.{name} is {value}; it must be a number of at least 0"
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class LearningRate:
    """The V3 schedule (report section 4.2), its phases as fractions of the run.

    Linear warm-up for `warmup_steps`, `peak` until `constant_until`, cosine down to
    `final * peak` at `cosine_until`, that value until `tail_until`, then `last * peak`.
    """

    peak: float
    warmup_steps: int
    constant_until: float = 10 / 14.8
    cosine_until: float = 14.3 / 14.8
    tail_until: float = 14.633 / 14.8
    final: float = 0.1
    last: float = 7.3e-6 / 2.2e-4

    def __post_init__(self):
        _check_rate(self, "final", "last")
        constant, cosine, tail = self.constant_until, self.cosine_until, self.tail_until
        if not (0 <= constant <= cosine <= 1 and 0 <= tail <= 1):
            raise ValueError(
                f"optim.learning_rate.constant_until={constant}, cosine_until={cosine} and "
                f"tail_until={tail} must be fractions of the run, from 0 to 1, and the first at "
                "most the second"
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class StepDecay:
    """The V2 schedule (report section 3.1.2): linear warm-up for `warmup_steps`, then `peak`.

    From each fraction of the run in `at` on, the rate is `factor` times what it was before.
    """

    peak: float
    warmup_steps: int
    at: tuple[float, ...] = (0.6, 0.9)
    factor: float = 0.316

    def __post_init__(self):
        _check_rate(self, "factor")
        if list(self.at) != sorted(self.at) or not all(0 <= cut <= 1 for cut in self.at):
            raise ValueError(
                f"optim.learning_rate.at is {self.at}; it must be rising fractions of the run, "
                "from 0 to 1"
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Optim:
    """AdamW (V3 section 4.2). Decay applies to matrices, not to norm scales.

    `moments`: what both moments are stored in, "fp32" or "bf16" (V3 section 3.3.2); the arithmetic
    is FP32.
    """

    learning_rate: LearningRate | StepDecay
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.1
    clip_norm: float = 1.0
    moments: str = "fp32"

    def __post_init__(self):
        if self.moments not in MOMENTS:
            raise ValueError(
                f"optim.moments is {self.moments!r}; choose one of {', '.join(MOMENTS)}"
            )
        if not (0 <= self.beta1 < 1 and 0 <= self.beta2 < 1):
            raise ValueError(
                f"optim.beta1={self.beta1} and optim.beta2={self.beta2} must be at least 0 and "
                "below 1"
            )
        if not (0 < self.eps < math.inf and 0 <= self.weight_decay < math.inf):
            raise ValueError(
                f"optim.eps={self.eps} must be a number above 0, "
                f"optim.weight_decay={self.weight_decay} one of at least 0"
            )
        if not self.clip_norm > 0:
            raise ValueError(
                f"optim.clip_norm={self.clip_norm} must be above 0; 1e9 is as good as no clipping"
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Objective:
    """Weights of the loss terms and the router-bias speed; the defaults are V3's (section 4.2)."""

    mtp_weight: Piecewise = Piecewise(steps=((0.0, 0.3), (10 / 14.8, 0.1)))
    balance_weight: float = 1e-4
    bias_rate: Piecewise = Piecewise(steps=((0.0, 0.001), (14.3 / 14.8, 0.0)))


@dataclasses.dataclass(frozen=True, kw_only=True)
class BatchShape:
    """`size` sequences of `length` tokens per step, computed `micro` sequences at a time.

    `ramp_from` sequences at first, growing linearly to `size` until `ramp_until` (fraction of the
    run), in whole micro-batches. `micro=None` takes the batch in one piece and allows no ramp.
    """

    size: int
    length: int
    micro: int | None = None
    ramp_from: int | None = None
    ramp_until: float = 0.0

    @property
    def micro_size(self) -> int:
        """Sequences computed at a time."""
        return self.micro or self.size

    def __post_init__(self):
        micro = self.micro_size
        if self.size < 1 or self.length < 2 or micro < 1 or self.size % micro:
            raise ValueError(
                f"batch.size={self.size} must be a positive multiple of batch.micro={self.micro}, "
                f"and batch.length={self.length} at least 2"
            )
        start = self.size if self.ramp_from is None else self.ramp_from
        if start % micro or not micro <= start <= self.size:
            raise ValueError(
                f"batch.ramp_from={self.ramp_from} must be a multiple of batch.micro={micro} "
                f"no larger than batch.size={self.size}"
            )
        if not 0 <= self.ramp_until <= 1:
            raise ValueError(
                f"batch.ramp_until={self.ramp_until} must be a fraction of the run, from 0 to 1"
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class StandardLibrary:
    """Python's own source files, bytes as tokens; always there. `held_out`: share to evaluate.

    `streams`: packers that give rows in turn, so row r comes from packer r % streams. A process
    runs only those that it has rows of: with as many as a micro-batch has rows, each row is packed
    once in all.
    """

    held_out: float = 0.05
    streams: int = 16


@dataclasses.dataclass(frozen=True, kw_only=True)
class Files:
    """A folder of `.jsonl`, `.parquet` or `.txt` documents and a Hugging Face `tokenizer.json`.

    `streams` as in `StandardLibrary`; None: as many as a micro-batch has rows when the run begins.
    """

    path: str
    tokenizer: str
    text_field: str = "text"
    held_out: float = 0.01
    streams: int | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class MeshShape:
    """Devices along each mesh axis; 1 is 'unused', and -1 (one axis only) takes what is left."""

    data: int = 1
    fsdp: int = -1
    expert: int = 1
    tensor: int = 1
    context: int = 1


@dataclasses.dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """Save every `every` steps and at the end, keep the newest `keep`.

    `every_minutes` saves as well when this much time has passed since the last save.
    """

    every: int = 100
    keep: int = 3
    every_minutes: float | None = None

    def __post_init__(self):
        if self.every < 1 or self.keep < 1:
            raise ValueError(
                f"checkpoint.every={self.every} and checkpoint.keep={self.keep} must be at least 1"
            )
        if self.every_minutes is not None and not self.every_minutes > 0:
            raise ValueError(
                f"checkpoint.every_minutes={self.every_minutes} must be above 0, or None for never"
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Evaluation:
    """Held-out loss over the same `batches` micro-batches every `every` steps and at the end.

    `batches=0` evaluates nothing.
    """

    every: int = 100
    batches: int = 8

    def __post_init__(self):
        if self.every < 1 or self.batches < 0:
            raise ValueError(
                f"evaluation.every={self.every} must be at least 1, "
                f"evaluation.batches={self.batches} at least 0"
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Guard:
    """Stop on NaN always, and when loss exceeds `spike` times the median of the last `window`."""

    spike: float = 2.0
    window: int = 64

    def __post_init__(self):
        if self.spike <= 1.0 or self.window < 1:
            raise ValueError(
                f"guard.spike={self.spike} must be above 1, guard.window={self.window} at least 1"
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sample:
    """The text continued at the end of a run."""

    prompt: str = "def "
    max_new_tokens: int = 200
    temperature: float = 0.7
    top_p: float = 0.95

    def __post_init__(self):
        if self.max_new_tokens < 1:
            raise ValueError(
                f"sample.max_new_tokens is {self.max_new_tokens}; it must be at least 1"
            )
        if not 0 <= self.temperature < math.inf or not 0 < self.top_p <= 1:
            raise ValueError(
                f"sample.temperature={self.temperature} must be a number of at least 0, "
                f"sample.top_p={self.top_p} above 0 and at most 1"
            )


def profiled_steps(profile: str | None) -> range:
    """The steps that `Run.profile` names: "10:15" is 10 to 14. ValueError for anything else."""
    if profile is None:
        return range(0)
    first, colon, end = profile.partition(":")
    if not colon or not (first.isdecimal() and end.isdecimal()) or not 0 < int(first) < int(end):
        raise ValueError(
            f"profile={profile!r} must be FIRST:END, steps counted from 1 and END left out: "
            "profile=10:15 traces the steps 10 to 14"
        )
    return range(int(first), int(end))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Run:
    """Everything `train.py` needs.

    `precision`: what layers compute in, a name of `PRECISIONS`, whose meanings are the table in
    `dsjax.nn.precision`: "fp32"; "bf16"; BF16 with linear layers in block FP8, their scales any
    number ("fp8") or powers of two ("fp8_ue8m0"), or as "fp8" but for the gradients of weights,
    which stay in BF16 ("fp8_exact_wgrad"). Weights stay FP32.

    `init_from`: a Hugging Face directory, one that `convert_weights.py` made, or another run, whose
    weights this one begins with. `run_dir`: a folder, or a URL (`gs://`, `s3://`).

    `profile` names the steps to trace ("10:15"), `compilation_cache` a folder in which compiled
    programs outlive the process. `hang_minutes`: of several processes, one that finishes no step
    for so long ends itself and so all of them.
    """

    model: Model
    data: StandardLibrary | Files
    batch: BatchShape
    optim: Optim
    steps: int
    run_dir: str
    seed: int = 0
    init_from: str | None = None
    precision: str = "bf16"
    remat: str = "full"
    dispatch: str = "auto"
    log_every: int = 10
    objective: Objective = Objective()
    mesh: MeshShape = MeshShape()
    checkpoint: Checkpoint = Checkpoint()
    evaluation: Evaluation = Evaluation()
    guard: Guard = Guard()
    sample: Sample = Sample()
    profile: str | None = None
    compilation_cache: str | None = None
    hang_minutes: float = 30.0

    def __post_init__(self):
        profiled_steps(self.profile)
        if not self.run_dir:
            raise ValueError("run_dir is ''; give a folder or a URL, like run_dir=runs/tiny")
        if not self.hang_minutes > 0:
            raise ValueError(f"hang_minutes is {self.hang_minutes}; it must be above 0")
        if self.precision not in PRECISIONS:
            raise ValueError(
                f"precision is {self.precision!r}; choose one of {', '.join(PRECISIONS)}"
            )
        if self.dispatch not in DISPATCHES:
            raise ValueError(
                f"dispatch is {self.dispatch!r}; choose one of {', '.join(DISPATCHES)}"
            )
        if self.remat not in REMATS:
            raise ValueError(f"remat is {self.remat!r}; choose one of {', '.join(REMATS)}")
        for name in ("steps", "log_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1")
