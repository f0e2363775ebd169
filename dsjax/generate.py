"""Text generation: prefill a latent cache once, then one token at a time. Two jits, one model.

Prompts are padded on the right to a power of two, so that few lengths are ever compiled. Padding
does no harm: slot s of the cache belongs to position s, no token looks at later positions, and each
slot is overwritten before its position is reached.
"""

import functools
from collections.abc import Collection, Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from dsjax import sharding
from dsjax.model import Transformer
from dsjax.nn.masks import Places


@functools.partial(jax.jit, donate_argnames="cache")
def prefill(
    model: Transformer,
    tokens_BT: Int[Array, "B T"],
    lengths_B: Int[Array, " B"],
    cache: tuple,
) -> tuple[Float[Array, "B V"], tuple]:
    """Logits after the last token of each row, and the filled cache; `cache` is donated.

    Row b holds `lengths_B[b]` tokens from position 0 on, and any padding behind them.
    """
    positions_BT = jax.lax.broadcasted_iota(jnp.int32, tokens_BT.shape, 1)
    positions_BT = sharding.reshard(positions_BT, "batch", "length")
    out = model.hidden(tokens_BT, Places(positions_BT), cache)
    is_last_BT = (positions_BT == lengths_B[:, None] - 1).astype(out.hidden_BTD.dtype)
    last_BD = sharding.einsum("BT,BTD->BD", is_last_BT, out.hidden_BTD, axes=("batch", None))
    return model.logits(last_BD[:, None])[:, 0], out.caches


@functools.partial(jax.jit, donate_argnames="cache")
def decode(
    model: Transformer,
    tokens_B: Int[Array, " B"],
    positions_B: Int[Array, " B"],
    cache: tuple,
) -> tuple[Float[Array, "B V"], tuple]:
    """Logits after one more token per row, at its own position; `cache` is donated and extended."""
    tokens_BT, positions_BT = (_column(x_B) for x_B in (tokens_B, positions_B))
    out = model.hidden(tokens_BT, Places(positions_BT), cache)
    return model.logits(out.hidden_BTD)[:, 0], out.caches


@functools.partial(jax.jit, static_argnames=("temperature", "top_p", "num_tokens"))
def sample(
    logits_BV: Float[Array, "B V"],
    key: Array,
    *,
    temperature: float,
    top_p: float,
    num_tokens: int,
) -> Int[Array, " B"]:
    """A token per row from softmax(logits / temperature); temperature 0 takes the likeliest.

    Of the most likely tokens, as many are candidates as it takes to reach probability `top_p`, at
    least one. Rows of the vocabulary from `num_tokens` on are padding and never drawn.
    """
    wide_BV = sharding.reshard(logits_BV, None, None)
    wide_BV = wide_BV.astype(np.promote_types(logits_BV.dtype, np.float32))[:, :num_tokens]
    if temperature == 0.0:
        return wide_BV.argmax(-1).astype(jnp.int32)
    order_BV = jnp.argsort(-wide_BV, axis=-1)
    sorted_BV = jnp.take_along_axis(wide_BV, order_BV, axis=-1) / temperature
    share_BV = jax.nn.softmax(sorted_BV, axis=-1)
    before_BV = jnp.cumsum(share_BV, axis=-1) - share_BV
    first_1V = jnp.arange(num_tokens)[None] == 0
    kept_BV = jnp.where((before_BV < top_p) | first_1V, sorted_BV, -jnp.inf)
    rank_B = jax.random.categorical(key, kept_BV, axis=-1)
    return jnp.take_along_axis(order_BV, rank_B[:, None], axis=-1)[:, 0].astype(jnp.int32)


def generate(
    model: Transformer,
    prompt: Sequence[int] | np.ndarray,
    *,
    max_new_tokens: int,
    temperature: float = 1.0,
    top_p: float = 1.0,
    seed: int = 0,
    eos_ids: Collection[int] = (),
    num_tokens: int | None = None,
) -> Iterator[int]:
    """The tokens that continue `prompt`, one by one; ends before the first of `eos_ids`.

    `num_tokens` counts the ids the tokenizer has (default: every vocabulary row). Use it inside
    `jax.set_mesh` where the weights are sharded, best as `sharding.serving_shardings` has it.
    ValueError for a prompt or setting out of range.
    """
    spec = model.config
    prompt = np.asarray(prompt, np.int32)
    num_tokens = spec.vocab_size if num_tokens is None else num_tokens
    if prompt.ndim != 1 or not prompt.size:
        raise ValueError("the prompt is empty; give at least one token, such as begin-of-document")
    if prompt.min() < 0 or prompt.max() >= spec.vocab_size:
        raise ValueError(
            f"the prompt has token ids from {prompt.min()} to {prompt.max()}; the model has rows "
            f"0 to {spec.vocab_size - 1}: is this the model's own tokenizer?"
        )
    if max_new_tokens < 1 or prompt.size + max_new_tokens > spec.max_position_embeddings:
        raise ValueError(
            f"{prompt.size} prompt tokens and max_new_tokens={max_new_tokens}: the latter must be "
            f"at least 1, and both together at most {spec.max_position_embeddings} positions"
        )
    if not 0.0 <= temperature < float("inf") or not 0.0 < top_p <= 1.0:
        raise ValueError(
            f"temperature={temperature} must be a number of at least 0, top_p={top_p} above 0 and "
            "at most 1"
        )
    # jax would fold a larger one into 32 bits, so that two seeds draw the same.
    if not 0 <= seed < 2**32:
        raise ValueError(f"seed={seed} must lie between 0 and 2**32 - 1")
    if not 1 <= num_tokens <= spec.vocab_size:
        raise ValueError(f"num_tokens={num_tokens} must lie in 1 to {spec.vocab_size} vocab rows")
    check_mesh()
    pick = functools.partial(
        sample, temperature=float(temperature), top_p=float(top_p), num_tokens=num_tokens
    )
    return _stream(model, prompt, max_new_tokens, pick, jax.random.key(seed), frozenset(eos_ids))


def check_mesh() -> None:
    """ValueError if nothing can be generated on the mesh that is set."""
    if sharding.axis_size("context") > 1:
        raise ValueError("mesh.context must be 1 to generate: one token at a time cannot be cut")


def _stream(model, prompt, max_new_tokens, pick, key, eos_ids) -> Iterator[int]:
    # A mesh cuts the batch, so there are as many rows as it needs, all alike.
    batch = int(np.prod([sharding.axis_size(axis) for axis in sharding.BATCH_AXES]))
    padded = np.zeros((batch, _power_of_two(prompt.size)), np.int32)
    padded[:, : prompt.size] = prompt
    cache = model.init_caches(batch, _power_of_two(prompt.size + max_new_tokens))
    lengths_B = _rows(np.full(batch, prompt.size, np.int32))
    logits_BV, cache = prefill(model, _rows(padded), lengths_B, cache)
    for position in range(prompt.size, prompt.size + max_new_tokens):
        token = int(pick(logits_BV, jax.random.fold_in(key, position))[0])
        if token in eos_ids:
            return
        yield token
        if position + 1 < prompt.size + max_new_tokens:
            tokens_B = _rows(np.full(batch, token, np.int32))
            positions_B = _rows(np.full(batch, position, np.int32))
            logits_BV, cache = decode(model, tokens_B, positions_B, cache)


def _column(x_B: Int[Array, " B"]) -> Int[Array, "B 1"]:
    """Rows of one token."""
    return sharding.reshard(x_B[:, None], "batch", "length")


def _rows(x: np.ndarray) -> jax.Array:
    """Host rows on the devices that share the batch."""
    return sharding.reshard(jnp.asarray(x), "batch", *(None,) * (x.ndim - 1))


def _power_of_two(count: int) -> int:
    return 1 << max(count - 1, 15).bit_length()
