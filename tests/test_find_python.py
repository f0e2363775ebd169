"""The search for an interpreter, among fakes that answer, fail or are too old."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / ".ci" / "find_python"
# This interpreter under another version number, as far as `find_python` can see.
ANSWERS = """#!/bin/sh
[ "$1" = -c ] || exit 2
shift; program=$1; shift
exec {python} -c "import sys; sys.version_info = {version}; sys.executable = '$0'
$program" "$@"
"""
FAILS = "#!/bin/sh\necho 'pyenv: command not found'; exit 127\n"


@pytest.fixture
def pythons(tmp_path):
    """Puts fakes in place, `python...` on PATH and `3.x.y` among pyenv's; returns where to look."""

    def make(fakes: dict[str, str]) -> dict[str, str]:
        for name, text in fakes.items():
            on_path = name.startswith("python")
            file = tmp_path / (f"bin/{name}" if on_path else f"versions/{name}/bin/python")
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(text)
            file.chmod(0o755)
        return {"PATH": f"{tmp_path}/bin:/usr/bin:/bin", "PYENV_ROOT": str(tmp_path)}

    return make


def answers(*version: int) -> str:
    return ANSWERS.format(python=sys.executable, version=version)


def find(environment: dict[str, str], *names: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        ["sh", SCRIPT, "3.12", "4", *names],
        env=os.environ | environment,
        capture_output=True,
        text=True,
    )


def test_the_first_name_that_starts_wins(pythons, tmp_path):
    paths = pythons({"python3.13": FAILS, "python3.12": answers(3, 12, 1)})
    found = find(paths, "python3.13", "python3.12")
    assert found.stdout == f"{tmp_path}/bin/python3.12\n"


def test_one_that_is_too_old_is_passed_over(pythons, tmp_path):
    paths = pythons({"python3": answers(3, 11, 9), "3.12.4": answers(3, 12, 4)})
    assert find(paths, "python3").stdout == f"{tmp_path}/versions/3.12.4/bin/python\n"


def test_pyenv_newest_first_by_number_and_only_releases(pythons, tmp_path):
    paths = pythons(
        {
            "3.9.18": answers(3, 9, 18),
            "3.13.9": answers(3, 13, 9),
            "3.13.10": answers(3, 13, 10),
            "3.13.11": answers(3, 13, 11),
            "3.14.0": FAILS,
            "3.15.0t": answers(3, 15, 0),
        }
    )
    assert find(paths).stdout == f"{tmp_path}/versions/3.13.11/bin/python\n"


def test_none_says_what_to_install(pythons, tmp_path):
    found = find(pythons({"python3": answers(3, 11, 9)}), "python3", "no-such-python")
    assert (found.returncode, found.stdout) == (1, "")
    assert "No Python between 3.12 and 4 was found" in found.stderr
    assert f"Tried: python3 no-such-python {tmp_path}/versions" in found.stderr
    assert "brew install python@3.13" in found.stderr
