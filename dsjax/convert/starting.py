"""Step 0 of a training run with the weights of a checkpoint."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from dsjax import optim
from dsjax.convert.models import differing_field
from dsjax.convert.opened import open_checkpoint
from dsjax.hf import complete, fp8
from dsjax.hf.load import load_weights
from dsjax.run import Run
from dsjax.train_step import TrainState


def state_from(path: str, run: Run, placement: TrainState, mesh: jax.sharding.Mesh) -> TrainState:
    """FP32 weights from `path` (Hugging Face, converted, or a run), and a fresh optimizer.

    ValueError if there is no checkpoint, or if its model is not that of the run.
    """
    checkpoint = open_checkpoint(path)
    theirs = complete.without_absent_mtp(checkpoint.tensors, checkpoint.model)
    if told := differing_field(run.model, theirs):
        raise ValueError(
            f"the model of the run is not that of init_from={path}: {told} there; set what differs "
            "on the command line or in the run file"
        )
    tensors = fp8.dequantized(checkpoint.tensors, np.dtype(np.float32))
    model = load_weights(tensors, run.model, dtype=np.float32, mesh=mesh)
    make_moments = jax.jit(
        lambda model: optim.adamw(run.optim, run.steps).init(nnx.state(model, nnx.Param)),
        out_shardings=placement.opt_state,
    )
    step = jax.device_put(jnp.zeros((), jnp.int32), placement.step)
    return TrainState(step, model, make_moments(model))
