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

# What may differ between the command that began a run and the one that continues it.
FREE_TO_CHANGE = (
    "steps", "run_dir", "mesh", "remat", "log_every", "checkpoint", "evaluation", "guard", "sample",
    "profile", "compilation_cache", "hang_minutes",
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

    @property
    def checkpoints(self) -> epath.Path:
        return self.home / CHECKPOINTS

    def claim(self, run: Run) -> None:
        """Makes the folder with its `run.json`, or checks that the run in it is this one.

        ValueError if it is another. Files of a stopped run are fetched back from a URL.
        """
        with self.reachable():
            text = self._text(RUN_FILE)
            continues = any(self.checkpoints.glob("[0-9]*")) if text else False
        fixed = self._changed(from_json(text), run) if text else []
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
        """Copies the files of `local` to `home`, where that is another place."""
        if not self.remote:
            return
        for file in sorted(self.local.rglob("*")):
            if file.is_file():
                target = self.home / file.relative_to(self.local).as_posix()
                target.parent.mkdir(parents=True, exist_ok=True)
                target.write_bytes(file.read_bytes())

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

    @staticmethod
    def _changed(before: Run, run: Run) -> list[str]:
        names = [field.name for field in dataclasses.fields(Run)]
        changed = [name for name in names if getattr(before, name) != getattr(run, name)]
        if "steps" in changed:
            print(f"steps was {before.steps}, is {run.steps}: every schedule stretches with it")
        return [name for name in changed if name not in FREE_TO_CHANGE]
