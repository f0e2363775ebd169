"""What a layer of V3 keeps from forward to backward where nothing is recomputed: BF16 against FP8.

    python benchmarks/fp8_memory.py [TOKENS]        (4096; at least 1024)

Sums up the arrays that backward is given, activations and the weights as they are multiplied by, of
their shapes alone: nothing is computed. The layer with experts has the eight that a device owns
when 32 devices share them, and as many rows as such a device gets when routing is even.
"""

import dataclasses
import sys
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import nnx

from dsjax.config import SigmoidRouter
from dsjax.model import Block, default_places
from dsjax.nn.precision import PRECISIONS
from dsjax.params import cast
from dsjax.run_file import load

DEVICES = 32


def kept(spec, model, tokens: int, name: str) -> list[jax.ShapeDtypeStruct]:
    """What backward is given of a layer over `tokens` tokens."""
    precision = PRECISIONS[name]
    block = jax.eval_shape(lambda: Block(spec, model, rngs=nnx.Rngs(0)))
    x_BTD = jax.ShapeDtypeStruct((1, tokens, model.hidden_size), jnp.bfloat16)
    tokens_BT = jax.ShapeDtypeStruct((1, tokens), jnp.int32)

    @precision.applied
    def backward(block, x_BTD, tokens_BT):
        def layer(block, x_BTD):
            return cast(block, precision.dtype)(x_BTD, default_places(tokens_BT))[0]

        return jax.vjp(layer, block, x_BTD)[1]

    return jax.tree.leaves(jax.eval_shape(backward, block, x_BTD, tokens_BT))


def kept_bytes(spec, model, tokens: int, name: str) -> tuple[int, int]:
    """Bytes of activations, and of weights: these are as many for any number of tokens."""
    size = {True: 0, False: 0}
    both = kept(spec, model, tokens, name), kept(spec, model, 2 * tokens, name)
    for one, of_more in zip(*both, strict=True):
        size[one.shape == of_more.shape] += one.size * one.dtype.itemsize
    return size[False], size[True]


def main(arguments: Sequence[str]) -> int:
    jax.config.update("jax_platforms", "cpu")
    tokens = int(arguments[0]) if arguments else 4096
    if tokens < 1024:
        print(f"{tokens} tokens: below 1024 attention takes another way; give more")
        return 2
    model = load("configs/v3.py").model
    sparse = model.layers[1].pattern[0]
    share = dataclasses.replace(
        sparse.ffn,
        num_experts=sparse.ffn.num_experts // DEVICES,
        num_chosen=sparse.ffn.num_experts // DEVICES,
        router=SigmoidRouter(num_groups=1, kept_groups=1),
    )
    layers = {
        "dense": model.layers[0].pattern[0],
        f"experts / {DEVICES}": dataclasses.replace(sparse, ffn=share),
    }
    print("| layer | precision | activations, GB | weights, GB |")
    print("|---|---|---|---|")
    for layer, spec in layers.items():
        for name in ("bf16", "fp8"):
            activations, weights = kept_bytes(spec, model, tokens, name)
            print(f"| {layer} | {name} | {activations / 1e9:.2f} | {weights / 1e9:.2f} |")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
