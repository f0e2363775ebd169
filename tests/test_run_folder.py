"""The folder of a run: who may continue in it, and URLs."""

import dataclasses

import pytest
from etils import epath
from fsspec.implementations.memory import MemoryFileSystem

from dsjax.checkpoint import Checkpoints
from dsjax.cli import main
from dsjax.run import Checkpoint
from dsjax.run_file import load, to_json
from dsjax.run_folder import RunFolder
from tests.launched import ROOT


@pytest.fixture
def run(tmp_path):
    return load(ROOT / "tests" / "small_run.py", f"run_dir={tmp_path / 'run'}")


@pytest.fixture
def bucket(monkeypatch, tmp_path):
    """gs:// and s3:// in the memory of this process, in place of packages that reach real ones."""
    store = MemoryFileSystem()
    store.store, store.pseudo_dirs = {}, [""]
    monkeypatch.setattr(MemoryFileSystem, "protocol", ("memory", "gs", "s3"))
    monkeypatch.setattr(type(epath.Path("gs://b/x")._backend), "fs", lambda *_: store)
    monkeypatch.chdir(tmp_path)
    return store


def test_a_local_run_is_claimed_and_keeps_its_beginning(run):
    folder = RunFolder(run.run_dir)
    folder.claim(run)
    began = folder.began
    assert (folder.home / "run.json").read_text() == to_json(run)
    RunFolder(run.run_dir).claim(run)
    assert folder.began == began
    folder.check_shared(run)
    # Nothing was saved yet: another run may take the place, and begins now.
    other = dataclasses.replace(run, seed=7)
    RunFolder(run.run_dir).claim(other)
    assert folder.began > began


def test_a_run_with_checkpoints_is_not_another_s(run):
    folder = RunFolder(run.run_dir)
    folder.claim(run)
    (folder.checkpoints / "3").mkdir()
    RunFolder(run.run_dir).claim(dataclasses.replace(run, hang_minutes=1.0, profile="1:2"))
    with pytest.raises(ValueError, match="another seed"):
        RunFolder(run.run_dir).claim(dataclasses.replace(run, seed=7))


def test_a_folder_that_is_not_shared_is_told(run, tmp_path):
    RunFolder(run.run_dir).claim(run)
    with pytest.raises(ValueError, match="shared file system"):
        RunFolder(tmp_path / "elsewhere").check_shared(run)


@pytest.mark.parametrize("url", ["file:///tmp/run", "http://host/run", "hf://a/b"])
def test_urls_of_another_kind_are_refused(url):
    with pytest.raises(ValueError, match="gs:// or s3://"):
        RunFolder(url)


def test_a_url_reaches_orbax_untouched(bucket):
    checkpoints = Checkpoints("s3://bucket/some/run", Checkpoint())
    assert str(checkpoints.directory) == "s3://bucket/some/run/checkpoints"
    assert str(checkpoints._manager.directory) == "s3://bucket/some/run/checkpoints"
    assert checkpoints.latest_step is None
    checkpoints.close()
    # For gs://, orbax asks Google's own package as well.
    with pytest.raises(ValueError, match="pip install gcsfs google-cloud-storage"):
        Checkpoints("gs://bucket/some/run", Checkpoint())


def test_files_that_grow_are_copied_to_the_url_and_fetched_back(bucket, run, tmp_path):
    run = dataclasses.replace(run, run_dir="gs://bucket/some/run")
    folder = RunFolder(run.run_dir)
    folder.claim(run)
    assert (tmp_path / "runs/bucket/some/run/run.json").read_text() == to_json(run)
    (folder.local / "tensorboard").mkdir()
    (folder.local / "tensorboard" / "events").write_bytes(b"\x00\xff")
    (folder.local / "metrics.jsonl").write_text('{"step": 1}\n')
    folder.publish()
    assert (folder.home / "tensorboard" / "events").read_bytes() == b"\x00\xff"
    began = folder.began
    # On another machine nothing is here.
    (folder.checkpoints / "1").mkdir()
    (folder.checkpoints / "1" / "done").write_text("")
    (folder.local / "metrics.jsonl").unlink()
    again = RunFolder(run.run_dir)
    again.claim(run)
    assert (again.local / "metrics.jsonl").read_text() == '{"step": 1}\n'
    assert again.began == began


def test_generate_takes_the_url_of_a_run(bucket, run, capsys):
    folder = epath.Path("gs://bucket/some/run")
    folder.mkdir(parents=True)
    (folder / "run.json").write_text(to_json(run))
    told = {"run": "has no complete checkpoint yet", "nothing": "is no directory"}
    for name, complaint in told.items():
        assert main(["generate", f"gs://bucket/some/{name}", "--prompt", "a"]) == 2
        assert f"dsjax: gs://bucket/some/{name} {complaint}" in capsys.readouterr().err


def test_a_missing_package_is_told(run, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    run = dataclasses.replace(run, run_dir="s3://bucket/run")
    with pytest.raises(ValueError, match="pip install s3fs"):
        RunFolder(run.run_dir).claim(run)
    assert main(["generate", "s3://bucket/run", "--prompt", "a"]) == 2
    assert "pip install s3fs" in capsys.readouterr().err
