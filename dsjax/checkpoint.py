"""Checkpoints of a training run: orbax, asynchronous, atomic, restorable onto any mesh.

A step directory holds `model` and `optimizer` as flat dicts of arrays under readable names
("layers.1.blocks.0.attention.o_proj"), and `progress`, the data cursor and the like, as JSON.
"""

import contextlib
import os
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import orbax.checkpoint as ocp
from etils import epath

from dsjax import model as models
from dsjax import sharding
from dsjax.hf import names
from dsjax.run import Checkpoint, Run
from dsjax.run_file import from_json
from dsjax.run_folder import CHECKPOINTS, RUN_FILE, RunFolder
from dsjax.train_step import TrainState

# Weights above this size are stored in pieces of at most this size, so that whoever wants a part,
# such as an export of one expert, does not have to read it all.
PIECE_BYTES = 64 * 2**20


class Restored(NamedTuple):
    """A saved step: the state after it, and the JSON that was saved with it."""

    state: TrainState
    progress: dict


def _named(tree: Any) -> dict[str, Any]:
    """The leaves of a tree under dotted names."""
    leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
    names = [jax.tree_util.keystr(path, simple=True, separator=".") for path, _ in leaves]
    return {
        name.removesuffix(".value"): leaf for name, (_, leaf) in zip(names, leaves, strict=True)
    }


def _abstract(tree: Any, shardings: Any) -> dict[str, jax.ShapeDtypeStruct]:
    placed = jax.tree.map(
        lambda leaf, where: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where),
        tree,
        shardings,
    )
    return _named(placed)


def _unnamed(tree: Any, named: dict[str, Any]) -> Any:
    """A tree of the given structure with its leaves taken by name."""
    return jax.tree.unflatten(jax.tree.structure(tree), [named[name] for name in _named(tree)])


def _pieces(weights: dict[str, Any], model: models.Transformer) -> dict[str, ocp.SaveArgs]:
    """How each weight is cut: one layer, or one expert of one, is a piece or several."""
    sources = names.sources(model, model.config)
    return {
        name: ocp.SaveArgs(
            chunk_byte_size=PIECE_BYTES,
            shard_axes=names.leading_axes(sources[name]) if weight.nbytes > PIECE_BYTES else (),
        )
        for name, weight in weights.items()
    }


@contextlib.contextmanager
def _restoring(step: epath.Path) -> Iterator[None]:
    """Whatever orbax raises over the files in `step` as a ValueError with a way out."""
    try:
        yield
    except jax.errors.JaxRuntimeError:
        raise
    except Exception as error:
        cause: BaseException = error
        while cause.__cause__ is not None:
            cause = cause.__cause__
        reason = (str(cause) or type(cause).__name__).splitlines()[0]
        raise ValueError(
            f"{step} cannot be restored: {reason}. If its files are damaged, move this folder "
            "elsewhere; the run then continues after the step saved before, if there is one"
        ) from error


class Checkpoints:
    """The checkpoints of `run_dir`, a folder or a URL.

    `save` returns once the arrays are copied to host memory. Of several processes each saves and
    restores what lies on its own devices; every method is for all of them to call.
    """

    def __init__(self, run_dir: str | os.PathLike, config: Checkpoint):
        options = ocp.CheckpointManagerOptions(max_to_keep=config.keep, create=False)
        folder = RunFolder(run_dir)
        self.directory = folder.checkpoints
        with folder.reachable():
            self.directory.mkdir(parents=True, exist_ok=True)
            self._manager = ocp.CheckpointManager(self.directory, options=options)

    @property
    def latest_step(self) -> int | None:
        """The newest complete step; an interrupted save is not one."""
        return self._manager.latest_step()

    def save(self, step: int, state: TrainState, progress: dict) -> None:
        """Saves the state after `step` steps; an older unfinished save is waited for first."""
        optimizer = _named({"step": state.step, "opt_state": state.opt_state})
        weights = _named(state.model)
        self._manager.save(
            step,
            args=ocp.args.Composite(
                model=ocp.args.StandardSave(weights, save_args=_pieces(weights, state.model)),
                optimizer=ocp.args.StandardSave(optimizer),
                progress=ocp.args.JsonSave(progress),
            ),
        )

    def restore(self, step: int, state: TrainState, shardings: TrainState) -> Restored:
        """Step `step` in the structure of the abstract `state`, laid out by `shardings`.

        ValueError, with a way out, if its files cannot be read.
        """
        rest = {"step": state.step, "opt_state": state.opt_state}
        rest_shardings = {"step": shardings.step, "opt_state": shardings.opt_state}
        parts = ocp.args.Composite(
            model=ocp.args.StandardRestore(_abstract(state.model, shardings.model)),
            optimizer=ocp.args.StandardRestore(_abstract(rest, rest_shardings)),
            progress=ocp.args.JsonRestore(),
        )
        with _restoring(self.directory / str(step)):
            saved = self._manager.restore(step, args=parts)
        rest = _unnamed(rest, saved.optimizer)
        model = _unnamed(state.model, saved.model)
        return Restored(TrainState(rest["step"], model, rest["opt_state"]), saved.progress)

    def close(self) -> None:
        """Waits for the save in flight."""
        self._manager.wait_until_finished()
        self._manager.close()


def latest_model(run_dir: str | os.PathLike) -> tuple[Run, epath.Path]:
    """The run in `run_dir` and the folder of its newest weights. ValueError if there are none."""
    home = RunFolder(run_dir).home
    if not (home / RUN_FILE).is_file():
        raise ValueError(f"{run_dir} is no training run: it has no {RUN_FILE}")
    run = from_json((home / RUN_FILE).read_text())
    step = None
    # Who only reads makes no folder.
    if (home / CHECKPOINTS).is_dir():
        checkpoints = Checkpoints(run_dir, run.checkpoint)
        step = checkpoints.latest_step
        checkpoints.close()
    if step is None:
        raise ValueError(f"{run_dir} has no complete checkpoint yet; train until one is saved")
    return run, checkpoints.directory / str(step) / "model"


def restore_model(
    run_dir: str | os.PathLike, mesh: jax.sharding.Mesh | None = None
) -> tuple[models.Transformer, Run]:
    """The newest weights of a training run (FP32) and the run that made them.

    `mesh=None` restores onto a mesh of the first device; call the model with a mesh set
    (`jax.set_mesh`). ValueError if there is no run, no checkpoint yet, or none that can be read.
    """
    run, directory = latest_model(run_dir)
    mesh = sharding.make_mesh(devices=jax.devices()[:1]) if mesh is None else mesh
    model = models.abstract(run.model)
    target = _abstract(model, sharding.shardings(model, mesh))
    with ocp.StandardCheckpointer() as checkpointer, _restoring(directory.parent):
        return _unnamed(model, checkpointer.restore(directory, target)), run
