"""Our side of `train_step.py`: the real train step of a run file's kind of run.

python benchmarks/train_step_workers/with_dsjax.py ROWS [AXIS=SIZE ...]     (on virtual devices)
"""

import math
import sys

import jax
import jax.numpy as jnp
import numpy as np
from turns import take_turns

from dsjax import sharding
from dsjax.config import Block, Dense, LayerGroup, Mla, Model, Moe, SigmoidRouter
from dsjax.host_memory import keep_freed_pages
from dsjax.losses import Batch
from dsjax.run import BatchShape, LearningRate, Optim, Run, StandardLibrary
from dsjax.train_step import init_state, make_train_step, state_shardings

attention = Mla(
    num_heads=8,
    q_lora_rank=64,
    kv_lora_rank=64,
    qk_nope_head_dim=32,
    qk_rope_head_dim=16,
    v_head_dim=32,
)
experts = Moe(
    num_experts=16,
    num_chosen=4,
    num_shared=1,
    intermediate_size=128,
    router=SigmoidRouter(num_groups=4, kept_groups=2, scale=2.5),
)
dense = Block(attention=attention, ffn=Dense(intermediate_size=512))
sparse = Block(attention=attention, ffn=experts)
run = Run(
    model=Model(
        vocab_size=512,
        hidden_size=256,
        # As configs/tiny.py lays out a model of few layers on CPU.
        layers=(LayerGroup(repeat=1, pattern=(dense, sparse, sparse, sparse)),),
        initializer_std=0.02,
    ),
    data=StandardLibrary(),
    batch=BatchShape(size=4, length=128),
    optim=Optim(learning_rate=LearningRate(peak=1e-3, warmup_steps=10)),
    steps=1000,
    run_dir="unused",
    precision="fp32",
    remat="none",
)


def main(rows: str, *sizes: str) -> None:
    keep_freed_pages()
    axes = {name: int(size) for name, size in (word.split("=") for word in sizes)}
    jax.config.update("jax_num_cpu_devices", math.prod(axes.values()))
    mesh = sharding.make_mesh(**axes)
    jax.set_mesh(mesh)
    tokens = np.random.default_rng(0).integers(0, 512, (1, int(rows), 128), np.int32)
    positions = np.broadcast_to(np.arange(128, dtype=np.int32), tokens.shape)
    where = jax.NamedSharding(mesh, sharding.spec(None, "batch", "length"))
    arrays = (tokens, np.ones_like(tokens), positions)
    batch = Batch(*(jax.device_put(x, where) for x in arrays))
    states = [jax.jit(lambda: init_state(run), out_shardings=state_shardings(run, mesh))()]
    in_the_air: list[jax.Array] = []
    train_step, used = make_train_step(run), jnp.int32(1)

    def land() -> None:
        if not np.isfinite(float(in_the_air.pop(0))):
            raise RuntimeError("the loss is not finite")

    def step() -> None:
        """As in train.py: a step starts before the loss of the one before it is read."""
        state, metrics = train_step(states.pop(), batch, used)
        states.append(state)
        in_the_air.append(metrics["loss"])
        if len(in_the_air) > 1:
            land()

    def finish() -> None:
        land()
        jax.block_until_ready(states)

    take_turns(step, finish, versions={})


if __name__ == "__main__":
    main(*sys.argv[1:])
