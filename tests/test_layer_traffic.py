"""What `context` and `tensor` send in a training step, against what their docstrings promise.

Payloads are an all-gather's result and any other collective's operand (`dsjax.plan.traffic`). On a
CPU a sum that each device keeps a slice of is an all-reduce, unless the program itself says
reduce-scatter. `fsdp` and `expert` are in tests/test_sharding.py, what travels to experts in
tests/nn/test_traffic.py.
"""

import jax
import jax.numpy as jnp
import pytest

from dsjax import sharding
from dsjax.config import Block, Dense, LayerGroup, Mla, Model
from dsjax.model import abstract
from dsjax.plan.counting import count
from dsjax.train_step import make_train_step, state_shardings
from tests import drawn

LAYERS, D, Q, C, R = 2, 16, 8, 8, 4
ATTENTION = Mla(
    num_heads=4,
    q_lora_rank=Q,
    kv_lora_rank=C,
    qk_nope_head_dim=8,
    qk_rope_head_dim=R,
    v_head_dim=8,
)
BLOCK = Block(attention=ATTENTION, ffn=Dense(intermediate_size=16))
MODEL = Model(
    vocab_size=32,
    hidden_size=D,
    layers=(LayerGroup(repeat=LAYERS, pattern=(BLOCK,)),),
    initializer_std=0.1,
)
# One FP32 number for each of 8 x 16 tokens.
EACH = 4 * 8 * 16

pytestmark = [pytest.mark.thorough, pytest.mark.usefixtures("uncached")]


def sent(**axes: int):
    """Payload by kind of collective, of one step whose backward computes every layer again."""
    run = drawn.run(MODEL, remat="full")
    num_devices = next(iter(axes.values()))
    mesh = sharding.make_mesh(jax.devices()[:num_devices], **axes)
    with jax.set_mesh(mesh):
        rows = jax.NamedSharding(mesh, sharding.spec(None, "batch", "length"))
        state = jax.device_put(drawn.state(run, 0), state_shardings(run, mesh))
        batch = jax.tree.map(lambda x: jax.device_put(x, rows), drawn.batch(0))
        lowered = make_train_step(run).lower(state, batch, jnp.int32(1))
    traffic = count(lowered.compile(drawn.FAST_COMPILE).as_text()).traffic
    return {kind: its.payload for kind, its in traffic.items()}


def bytes_of(*wanted: str) -> int:
    """All weights whose path contains one of `wanted`, FP32."""
    flat, _ = jax.tree_util.tree_flatten_with_path(abstract(MODEL))
    named = ((jax.tree_util.keystr(path), leaf) for path, leaf in flat)
    return sum(4 * leaf.size for name, leaf in named if any(part in name for part in wanted))


def test_context_gathers_latents_and_scatters_their_gradients():
    """C + R numbers of a token and layer, never N (H + R + W) of its keys and values."""
    found = sent(context=8)
    latents = LAYERS * (C + R) * EACH
    assert found["reduce-scatter"] == latents
    # Forward, and again in backward. The rest: the batch, gathered before it is laid out.
    batch = found["all-gather"] - 2 * latents
    assert 0 < batch <= 10 * EACH
    # Every weight's gradient is the sum over tokens, and with it go a few numbers.
    assert 0 <= found["all-reduce"] - bytes_of("") < 100


def test_tensor_gathers_tokens_before_and_sums_them_after_the_heads():
    found = sent(tensor=4)
    # Between layers a device has a quarter of the tokens. All heads need all: query latent, joint
    # latent; feed-forward needs all inputs. Twice, and backward the gradients of both results.
    gathered = LAYERS * (2 * (Q + (C + R) + D) + 2 * D) + D
    assert found["all-gather"] == gathered * EACH
    # Attention's result twice, feed-forward's once; backward the gradient of all that was gathered.
    summed = LAYERS * (3 * D + Q + (C + R) + D) + D
    # Weights that are whole see a quarter of the tokens.
    whole = bytes_of("a_proj", "input_norm", "post_attention_norm", "q_a_norm", "embed", ".norm")
    # Of a token's logits: target, largest, sum of exponentials; the last two again in backward.
    entropy = 3 + 2
    assert 0 <= found["all-reduce"] - (summed + entropy) * EACH - whole < 100
    assert set(found) == {"all-gather", "all-reduce"}
