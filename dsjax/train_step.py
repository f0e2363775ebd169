"""The training step: a pure function of state and batch, compiled once, state donated."""

import dataclasses
import platform
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jaxtyping import Array, Float, Int

from dsjax import losses, optim, sharding
from dsjax.losses import Batch
from dsjax.model import Transformer
from dsjax.nn.precision import PRECISIONS, Products
from dsjax.params import RouterBias
from dsjax.run import Run

# XLA's own products on a CPU are slow where a factor has to be turned around, as backward's have:
# by oneDNN, which XLA has and leaves off, a step takes four fifths of the time.
ONEDNN = {"xla_cpu_use_onednn": True, "xla_cpu_experimental_onednn_custom_call": True}


class TrainState(NamedTuple):
    """Everything the next step depends on besides the data."""

    step: Int[Array, ""]
    model: Transformer
    opt_state: optax.OptState


class Totals(NamedTuple):
    """Denominators over the whole batch, so that micro-batches add up to exactly its loss.

    `targets[k]` counts the targets of MTP depth k (0: the main model), `tokens` what is not
    padding, `rows` the sequences.
    """

    targets: tuple[Float[Array, ""], ...]
    tokens: Float[Array, ""]
    rows: Float[Array, ""]


class Sums(NamedTuple):
    """What micro-batches add up to. `loads[i]`: tokens per expert of the i-th MoE stack.

    `dropped`: pairs of token and expert that were routed but reached no expert, over all layers.
    """

    nats: tuple[Float[Array, ""], ...]
    correct: tuple[Float[Array, ""], ...]
    balance: Float[Array, ""]
    loads: tuple[Float[Array, "*L E"], ...]
    dropped: Float[Array, ""]


def init_state(run: Run) -> TrainState:
    """Step 0: drawn weights and zero moments, FP32."""
    model = Transformer(run.model, rngs=nnx.Rngs(run.seed))
    opt_state = optim.adamw(run.optim, run.steps).init(nnx.state(model, nnx.Param))
    return TrainState(jnp.zeros((), jnp.int32), model, opt_state)


def state_shardings(run: Run, mesh: sharding.AnyMesh) -> TrainState:
    """Where every array of the state lives; moments lie as their weights do.

    Raises ValueError naming the weight whose dimension does not divide over its mesh axis.
    """
    return sharding.shardings(jax.eval_shape(lambda: init_state(run)), mesh)


def make_init(run: Run, placement: TrainState) -> Callable[[], TrainState]:
    """`init_state` jitted, every array made where it belongs."""
    # Runs once: on CPU, optimising the machine code of so many random draws takes far longer.
    fast = {"xla_backend_optimization_level": 0} if jax.default_backend() == "cpu" else None
    return jax.jit(lambda: init_state(run), out_shardings=placement, compiler_options=fast)


def forward(
    model: Transformer,
    batch: Batch,
    weights: Sequence[Float[Array, ""] | float],
    *,
    remat: str = "none",
    dtype: jnp.dtype | None = None,
) -> tuple[Float[Array, ""], Sums]:
    """sum_k weights_k * nats_k over the depths, and all sums, for one micro-batch.

    Computed in `dtype`; None is that of the weights. Of the nats the sum alone has gradients.
    """
    wanted = [losses.targets(batch, depth) for depth in range(len(model.mtp) + 1)]
    batch, places, wanted = losses.balanced(batch, wanted)
    main = model.hidden(batch.tokens_BT, places, remat=remat, dtype=dtype)
    # Depth k reads token i + k, which is what depth k - 1 had to predict.
    next_tokens = [tokens_BT for tokens_BT, _ in wanted[:-1]]
    states, mtp_stats = model.mtp_hidden(
        main.hidden_BTD, next_tokens, places, remat=remat, dtype=dtype
    )
    head_DV = model.lm_head[...].astype(dtype or model.lm_head.dtype)
    predictions = [
        losses.Prediction(hidden_BTD, *wanted[depth], weights[depth])
        for depth, hidden_BTD in enumerate([main.hidden_BTD, *states])
    ]
    entropy, scores = losses.cross_entropy(predictions, head_DV)
    nats, correct = zip(*scores, strict=True)
    moe = [stats for group in (*main.stats, mtp_stats) for stats in group if stats is not None]
    zero = jnp.zeros((), np.promote_types(main.hidden_BTD.dtype, jnp.float32))
    balance = sum((stats.balance_B.sum() for stats in moe), start=zero)
    dropped = sum((stats.dropped.sum() for stats in moe), start=jnp.float32(0))
    return entropy, Sums(nats, correct, balance, tuple(stats.load_E for stats in moe), dropped)


def _accumulated(function: Callable[[Batch], tuple], batch: Batch, used: Int[Array, ""]) -> tuple:
    """function(micro) added up over the first `used` micro-batches, one after the other."""
    if batch.tokens_BT.shape[0] == 1:
        return function(jax.tree.map(lambda x: x[0], batch))

    def micro(index):
        return jax.tree.map(lambda x: jax.lax.dynamic_index_in_dim(x, index, keepdims=False), batch)

    def add(index, total):
        return jax.tree.map(jnp.add, total, function(micro(index)))

    # Inlined, it is the same program; but a function that jit knows is traced once for both uses.
    function = jax.jit(function, inline=True)
    shapes = jax.eval_shape(lambda: function(micro(jnp.int32(0))))
    return jax.lax.fori_loop(0, used, add, jax.tree.map(jnp.zeros_like, shapes))


def make_train_step(
    run: Run, products: Products | None = None
) -> Callable[[TrainState, Batch, Int[Array, ""]], tuple]:
    """`step(state, batch, used) -> (state, metrics)`, jitted, `state` donated.

    The first `used` micro-batches count, so a batch-size ramp needs one compilation. The loss is
    CE + lambda / D sum_k CE_k + alpha sum_layers balance (V3 report eqs. 17, 24, 25), each term a
    mean over the whole batch. `products` takes the place of what `run.precision` multiplies by.
    """
    precision, depths = PRECISIONS[run.precision], len(run.model.mtp)
    if products is not None:
        precision = dataclasses.replace(precision, products=products)
    optimizer = optim.adamw(run.optim, run.steps)
    rate = optim.learning_rate(run.optim.learning_rate, run.steps)
    mtp_weight = optim.piecewise(run.objective.mtp_weight, run.steps)
    bias_rate = optim.piecewise(run.objective.bias_rate, run.steps)

    def count(micro: Batch) -> Totals:
        targets = tuple(losses.target_count(micro, depth) for depth in range(depths + 1))
        tokens = (micro.segments_BT != 0).sum(dtype=jnp.float32)
        return Totals(targets, tokens, jnp.float32(micro.tokens_BT.shape[0]))

    def step(state: TrainState, batch: Batch, used: Int[Array, ""]):
        graph, params, biases = nnx.split(state.model, nnx.Param, RouterBias)
        totals = _accumulated(count, batch, used)
        weights = (jnp.float32(1.0),) + (mtp_weight(state.step) / max(depths, 1),) * depths
        # A batch may hold no target of a deep MTP module at all.
        weights = [w / jnp.maximum(n, 1) for w, n in zip(weights, totals.targets, strict=True)]
        alpha = run.objective.balance_weight / totals.rows

        def loss(params, micro: Batch):
            model = nnx.merge(graph, params, biases)
            entropy, sums = forward(model, micro, weights, remat=run.remat, dtype=precision.dtype)
            return entropy + alpha * sums.balance, sums

        def gradient(micro: Batch):
            (value, sums), grads = jax.value_and_grad(loss, has_aux=True)(params, micro)
            return value, sums, grads

        value, sums, grads = _accumulated(gradient, batch, used)
        updates, opt_state = optimizer.update(grads, state.opt_state, params)
        params = optax.apply_updates(params, updates)
        if biases:
            biases = optim.move_router_biases(biases, sums.loads, bias_rate(state.step))
        model = nnx.merge(graph, params, biases)

        per_target = [
            n / jnp.maximum(total, 1) for n, total in zip(sums.nats, totals.targets, strict=True)
        ]
        metrics = {
            "loss": per_target[0],
            "objective": value,
            "balance_loss": sums.balance / totals.rows,
            "grad_norm": optax.tree.norm(grads),
            "learning_rate": rate(state.step),
            "tokens": totals.tokens,
            "loads": sums.loads,
            "dropped_tokens": sums.dropped,
        }
        for depth in range(1, depths + 1):
            total = jnp.maximum(totals.targets[depth], 1)
            metrics[f"mtp{depth}_loss"] = per_target[depth]
            metrics[f"mtp{depth}_accuracy"] = sums.correct[depth] / total
        return TrainState(state.step + 1, model, opt_state), metrics

    on_x86 = sharding.platform() == "cpu" and platform.machine() in ("x86_64", "AMD64")
    options = ONEDNN if on_x86 else None
    return jax.jit(precision.applied(step), donate_argnums=0, compiler_options=options)


def make_eval_step(run: Run) -> Callable[[Transformer, Batch], tuple]:
    """`step(model, batch) -> (nats, targets)` of the main model over one batch [B, T], jitted."""
    precision = PRECISIONS[run.precision]
    dtype = precision.dtype

    def step(model: Transformer, batch: Batch):
        hidden_BTD = model.hidden(batch.tokens_BT, batch.places, dtype=dtype).hidden_BTD
        head_DV = model.lm_head[...].astype(dtype)
        prediction = losses.Prediction(hidden_BTD, *losses.targets(batch, 0), 1.0)
        nats, _ = losses.cross_entropy([prediction], head_DV)
        return nats, losses.target_count(batch, 0)

    return jax.jit(precision.applied(step))
