"""What a person is told of a training run where there is no terminal."""

import pytest

from dsjax.progress import StepProgress


def test_time_left_does_not_count_the_compilation(
    capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
):
    clock = [100.0]
    monkeypatch.setattr("time.monotonic", lambda: clock[0])
    # It goes on after step 20; the first step compiles for ten minutes, each other takes 2 s.
    with StepProgress(first=20, steps=30, every=1) as bar:
        clock[0] += 600
        bar.update(21, 5.0, 10.0)
        assert capsys.readouterr().out == "step 21/30  loss 5.0000  10 tokens/s\n"
        for step in (22, 23):
            clock[0] += 2
            bar.update(step, 4.0, 2000.0)
    told = capsys.readouterr().out.splitlines()
    assert told[-1] == "step 23/30  loss 4.0000  2,000 tokens/s  14 s left"
