"""Models, states and packed batches drawn by NumPy: nothing to compile, the same on every mesh."""

import jax
import jax.numpy as jnp
import numpy as np

from dsjax import sharding
from dsjax.config import Block, Dense, LayerGroup, Mla, Model, Moe, SigmoidRouter
from dsjax.losses import Batch
from dsjax.params import RouterBias
from dsjax.run import BatchShape, LearningRate, Optim, Run, StandardLibrary
from dsjax.train_step import TrainState, init_state

# No optimisation: half the time to compile, the same numbers up to rounding.
FAST_COMPILE = {"xla_backend_optimization_level": 0}


def model(
    *,
    vocab_size: int = 32,
    mtp: int = 1,
    repeat: int = 2,
    router: object = None,
    experts: int = 8,
    q_lora_rank: int | None = None,
    mtp_experts: bool = False,
) -> Model:
    """A small V3 whose every size divides by the meshes of the tests; few kinds of layers, because
    every kind is compiled: experts in the main model, and in the MTP modules only on request.
    """
    attention = Mla(
        num_heads=4,
        q_lora_rank=q_lora_rank,
        kv_lora_rank=8,
        qk_nope_head_dim=8,
        qk_rope_head_dim=4,
        v_head_dim=8,
    )
    router = router or SigmoidRouter(num_groups=4, kept_groups=2, scale=2.5)
    moe = Moe(num_experts=experts, num_chosen=2, num_shared=1, intermediate_size=8, router=router)
    sparse = Block(attention=attention, ffn=moe)
    dense = Block(attention=attention, ffn=Dense(intermediate_size=16))
    return Model(
        vocab_size=vocab_size,
        hidden_size=16,
        layers=(LayerGroup(repeat=repeat, pattern=(sparse,)),),
        mtp=(sparse if mtp_experts else dense,) * mtp,
        initializer_std=0.1,
    )


def run(spec: Model, **changes: object) -> Run:
    """A run of `spec` whose step is as simple as possible."""
    fields = {
        "data": StandardLibrary(),
        "batch": BatchShape(size=8, length=16),
        "optim": Optim(learning_rate=LearningRate(peak=1e-2, warmup_steps=1)),
        "steps": 10,
        "run_dir": "unused",
        "precision": "fp32",
        "remat": "none",
    }
    return Run(model=spec, **(fields | changes))


def state(of: Run, seed: int, *, spread: float = 0.3) -> TrainState:
    """The state of step 0: weights N(0, spread^2), norm scales and router biases near 1 and 0."""
    rng = np.random.default_rng(seed)

    def weight(variable):
        shape = variable.get_value().shape
        value = rng.normal(0.0, 0.1 if len(variable.axes) == 1 else spread, shape)
        is_scale = len(variable.axes) == 1 and not isinstance(variable, RouterBias)
        return variable.replace(jnp.asarray(value + is_scale, jnp.float32))

    abstract = jax.eval_shape(lambda: init_state(of))
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        model=jax.tree.map(weight, abstract.model, is_leaf=sharding.is_variable),
        opt_state=jax.tree.map(
            lambda x: jnp.asarray(np.zeros(x.shape, x.dtype)), abstract.opt_state
        ),
    )


def batch(seed: int, *, micros: int = 1, rows: int = 8, length: int = 16, vocab: int = 32) -> Batch:
    """Packed rows: two or three documents each, some with padding behind."""
    rng = np.random.default_rng(seed)
    segments = np.zeros((micros, rows, length), np.int32)
    positions = np.zeros_like(segments)
    for row in np.ndindex(micros, rows):
        first, second = sorted(rng.choice(np.arange(2, length - 2), 2, replace=False))
        end = length - int(rng.integers(0, 3))
        for number, (start, stop) in enumerate([(0, first), (first, second), (second, end)], 1):
            segments[row][start:stop] = number
            positions[row][start:stop] = np.arange(stop - start)
    tokens = rng.integers(0, vocab, segments.shape).astype(np.int32) * (segments != 0)
    return Batch(*(jnp.asarray(x, jnp.int32) for x in (tokens, segments, positions)))


def leaves(tree) -> dict[str, np.ndarray]:
    """Path -> value of every array in the tree."""
    flat, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {jax.tree_util.keystr(path): np.asarray(value) for path, value in flat}
