"""A profile of some steps of a run, for xprof: `xprof RUN_DIR/profile`, or TensorBoard with it."""

from pathlib import Path

import jax

from dsjax.run import profiled_steps


class StepTrace:
    """Traces the steps that `profile` names ("10:15": 10 to 14) into `folder`; None: nowhere."""

    def __init__(self, profile: str | None, folder: Path | None):
        self._steps, self._folder, self._running = profiled_steps(profile), folder, False

    def around(self, step: int) -> jax.profiler.StepTraceAnnotation:
        """A context around the start of step `step`, which the profile shows as one."""
        if step in self._steps and self._folder is not None and not self._running:
            jax.profiler.start_trace(str(self._folder))
            self._running = True
        return jax.profiler.StepTraceAnnotation("train", step_num=step)

    def changes_after(self, step: int) -> bool:
        """Whether tracing begins or ends there: no step may then be half in the profile."""
        return (step in self._steps) != (step + 1 in self._steps)

    def end(self, step: int) -> None:
        """After step `step` and all its work."""
        if self._running and step + 1 not in self._steps:
            self.close()

    def close(self) -> None:
        """Writes what was traced so far."""
        if self._running:
            jax.profiler.stop_trace()
            self._running = False
