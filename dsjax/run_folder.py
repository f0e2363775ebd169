"""The folder of a run, on a disk or behind a URL, and who may continue the run in it.

Checkpoints go straight to `home`. Files that grow line by line are written in `local`, because an
object store cannot append; with a URL as `home`, `publish` copies them there at every checkpoint.
"""

import contextlib
import dataclasses
import os
import time
from collections.abc import Iterator
from pathlib import Path

from etils import epath

from dsjax.metrics import METRICS_FILE
from dsjax.run import Run
from dsjax.run_file import from_json, to_json

RUN_FILE = "run.json"
CHECKPOINTS = "checkpoints"
# When the run first began, in seconds since 1970; restarts do not change it.
BEGAN_FILE = "began"
# What pip has to bring before a URL can be reached.
SCHEMES = {"gs": "gcsfs google-cloud-storage", "s3": "s3fs"}

# What may differ between the command that began a run and the one that continues it. Where data and
# tokenizer lie is free: what they hold is checked against the position in the data.
FREE_TO_CHANGE = (
    "steps", "run_dir", "mesh", "batch.micro", "dispatch", "data.path", "data.tokenizer", "remat",
    "log_every", "checkpoint", "evaluation", "guard", "sample", "profile", "compilation_cache",
    "hang_minutes",
)  # fmt: skip


def replace_text(path: Path, text: str) -> None:
    """Writes a file whole or not at all."""
    unfinished = path.with_name(path.name + ".partial")
    unfinished.write_text(text)
    os.replace(unfinished, path)


class RunFolder:
    """`home` is what `run_dir` names, `local` the same or, for a URL, `runs/BUCKET/PATH` here."""

    def __init__(self, run_dir: str | os.PathLike):
        """ValueError for a URL of another kind than gs:// and s3://."""
        scheme, separator, rest = os.fspath(run_dir).partition("://")
        if separator and scheme not in SCHEMES:
            raise ValueError(
                f"run_dir={run_dir} is no place for a run: give a folder, without any scheme, or a "
                f"URL that begins with {' or '.join(f'{known}://' for known in SCHEMES)}"
            )
        self.remote = bool(separator)
        if self.remote:
            self.home, self.local = epath.Path(os.fspath(run_dir)), Path("runs", rest)
        else:
            self.home = epath.Path(run_dir).resolve()
            self.local = Path(self.home)
        self._scheme = scheme
        self._published: dict[Path, tuple[int, int]] = {}

    @property
    def checkpoints(self) -> epath.Path:
        return self.home / CHECKPOINTS

    @property
    def saved_step(self) -> int | None:
        """The newest step with a checkpoint."""
        found = [place.name for place in self.checkpoints.glob("[0-9]*")]
        return max((int(name) for name in found if name.isdecimal()), default=None)

    @property
    def anew(self) -> str:
        """The keys of another run that begins with the newest weights of this one."""
        if self.remote:
            return f"init_from=COPY run_dir=NEW, COPY being a local copy of {self.home}"
        return f"init_from={self.home} run_dir=NEW"

    def claim(self, run: Run) -> None:
        """Makes the folder with its `run.json`, or checks that the run in it is this one.

        ValueError if it is another. Files of a stopped run are fetched back from a URL.
        """
        with self.reachable():
            text = self._text(RUN_FILE)
            saved = self.saved_step if text else None
        continues = saved is not None
        fixed = _fixed(from_json(text), run, saved) if text else []
        if continues and fixed:
            raise ValueError(
                f"{self.home} holds a run with another {', '.join(fixed)}; continue it with the "
                "values it began with, or choose another run_dir=..."
            )
        self.local.mkdir(parents=True, exist_ok=True)
        began = None if fixed else self._text(BEGAN_FILE)
        replace_text(self.local / RUN_FILE, to_json(run))
        replace_text(self.local / BEGAN_FILE, began or repr(time.time()))
        with self.reachable():
            self.checkpoints.mkdir(parents=True, exist_ok=True)
            if self.remote and continues:
                (self.local / METRICS_FILE).write_text(self._text(METRICS_FILE))
            self.publish()

    def check_shared(self, run: Run) -> None:
        """ValueError if this process does not see what the first one has claimed."""
        with self.reachable():
            if self._text(RUN_FILE) != to_json(run):
                raise ValueError(
                    f"run_dir={self.home} is not the folder that process 0 writes to; all "
                    "processes need one shared file system, or a gs:// or s3:// URL"
                )

    @property
    def began(self) -> float:
        """When the run first began, in seconds since 1970."""
        return float(self._text(BEGAN_FILE))

    def publish(self) -> None:
        """Copies the files of `local` that changed to `home`, where that is another place."""
        if not self.remote:
            return
        for file in sorted(self.local.rglob("*")):
            status = file.stat()
            version = status.st_mtime_ns, status.st_size
            if file.is_file() and self._published.get(file) != version:
                target = self.home / file.relative_to(self.local).as_posix()
                target.parent.mkdir(parents=True, exist_ok=True)
                target.write_bytes(file.read_bytes())
                self._published[file] = version

    def _text(self, name: str) -> str:
        file = self.home / name
        return file.read_text() if file.exists() else ""

    @contextlib.contextmanager
    def reachable(self) -> Iterator[None]:
        """Around work at a URL: what is missing for it is a ValueError."""
        try:
            yield
        except (ImportError, OSError) as error:
            if not self.remote:
                raise
            raise ValueError(
                f"run_dir={self.home} cannot be reached: {error}. It needs `pip install "
                f"{SCHEMES[self._scheme]}` and this machine's credentials for it"
            ) from error


def _fixed(before: Run, run: Run, saved: int | None) -> list[str]:
    """What differs between two runs, though it may not; says what follows from some that may.

    `saved`: the step that the second would continue after.
    """
    changed, free = list(_differing(before, run)), set(FREE_TO_CHANGE)
    if "steps" in changed:
        print(f"steps was {before.steps}, is {run.steps}: every schedule stretches with it")
    if "batch.micro" in changed and saved is not None:
        told = f"batch.micro was {before.batch.micro}, is {run.batch.micro}"
        print(f"{told}: evaluation.batches are so many other held-out rows from here on")
        if run.batch.ramp_from is not None and saved < run.batch.ramp_until * run.steps:
            # Later all batches are batch.size, in whatever parts they are computed.
            free.remove("batch.micro")
    return [name for name in changed if not {name, name.partition(".")[0]} & free]


def _differing(before: Run, run: Run) -> Iterator[str]:
    """Names of fields that differ: "seed", and those of a component, "batch.micro"."""
    for name in (field.name for field in dataclasses.fields(Run)):
        old, new = getattr(before, name), getattr(run, name)
        if dataclasses.is_dataclass(old) and type(old) is type(new):
            parts = (field.name for field in dataclasses.fields(old))
            yield from (f"{name}.{p}" for p in parts if getattr(old, p) != getattr(new, p))
        elif old != new:
            yield name
