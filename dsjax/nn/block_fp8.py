"""Linear layers whose three products are block FP8 (DeepSeek-V3 report section 3.3).

FP8: forward, gradient of the input and gradient of the weight of every linear layer of attention,
dense and expert feed-forward; rows on their way to experts, and their gradients on the way from
there. Not FP8: embedding, head, router, norms, attention's scores, MTP's joining projection, the
sums that come back from experts. Weights, gradients between micro-batches and moments are what they
are without it. Scales are those of the numbers at hand; nothing is remembered from step to step.
"""

import functools
import math
from dataclasses import dataclass

import jax
import jax.numpy as jnp

from dsjax import sharding
from dsjax.block_scaled import BlockScaled
from pallas_kernels.fp8_grouped_linear import fp8_grouped_linear
from pallas_kernels.fp8_grouped_matmul import fp8_sorted_matmul
from pallas_kernels.fp8_linear import fp8_linear
from pallas_kernels.fp8_matmul import fp8_matmul
from pallas_kernels.quantize import dequantize_rows, quantize_rows
from pallas_kernels.quantize.shapes import BLOCK


@dataclass(frozen=True)
class BlockFp8:
    """See `dsjax.nn.precision.Products`. `power_of_two`: of all scales, as V3.1 has them.

    `weight_grad` "exact" multiplies a weight's gradient from the layer's input and its result's
    gradient as they came, and keeps that input as it came: to see what FP8 does there.

    Scales of what travels to experts and of what SwiGLU keeps are powers of two in any case: then
    quantizing what was quantized changes nothing. Weights are cut into blocks where they lie, so a
    device's slice begins a block. Weights that are stored in FP8 are multiplied as they are; they
    have no gradient.
    """

    power_of_two: bool = False
    weight_grad: str = "fp8"

    def einsum(self, subscripts, x, w, *, axes=None):
        rows, inner = parts(subscripts)
        if isinstance(w, BlockScaled):
            return self._stored(x, w, rows, inner, axes)

        def product(x, w):
            y_MN = fp8_linear(
                x.reshape(math.prod(x.shape[:rows]), -1),
                _matrix(w, inner, "P" in subscripts),
                weight_grad=self.weight_grad,
                power_of_two=self.power_of_two,
            )
            y = y_MN.reshape(*x.shape[:rows], *_padded(w.shape[inner:], "P" in subscripts))
            return y[..., : w.shape[-1]]

        if not sharding.active():
            return product(x, w)
        x_spec, w_spec = sharding.held(x), sharding.held(w)
        inside, features = w_spec.partitions[:inner], w_spec.partitions[inner:]
        out = jax.P(*x_spec[:rows], *features) if axes is None else sharding.spec(*axes)
        tokens_by = {name for entry in x_spec[:rows] for name in sharding.axes_of(entry)}

        def on_device(x, w):
            y = product(x, sharding.varying(w, *tokens_by))
            return sharding.completed(y, jax.P(*inside), out)

        return sharding.local(on_device, in_specs=(x_spec, w_spec), out_specs=out)(x, w)

    def _stored(self, x, w: BlockScaled, rows: int, inner: int, axes):
        """`einsum` by a weight that every device has whole."""
        features = w.shape[inner:]

        def product(x, matrices):
            x_MK = quantize_rows(
                x.reshape(math.prod(x.shape[:rows]), -1), power_of_two=self.power_of_two
            )
            y = [fp8_matmul(*x_MK, *matrix, out_dtype=x.dtype) for matrix in matrices]
            return jnp.stack(y, axis=1).reshape(*x.shape[:rows], *features)

        if not sharding.active():
            return product(x, w.matrices())
        x_spec = sharding.held(x)
        over = jax.P(*x_spec[:rows], *(None,) * inner)
        y = sharding.local(
            product,
            in_specs=(over, jax.P()),
            out_specs=jax.P(*x_spec[:rows], *(None,) * len(features)),
        )(jax.reshard(x, over), w.matrices())
        return y if axes is None else sharding.reshard(y, *axes)

    def swiglu(self, gate, up):
        spec = sharding.held(gate)
        return sharding.local(_swiglu, in_specs=(spec, spec), out_specs=spec)(gate, up)

    def grouped(self, x_UD, w_EDX, size_E):
        if isinstance(w_EDX, BlockScaled):
            x = quantize_rows(x_UD, power_of_two=True)
            products = (
                fp8_sorted_matmul(*x, *matrix, size_E, out_dtype=x_UD.dtype)
                for matrix in w_EDX.matrices(stack=1)
            )
            return jnp.concatenate(list(products), axis=1)
        paired = w_EDX.ndim == 4
        w_EXD = jax.vmap(lambda w: _matrix(w, 1, paired))(w_EDX)
        y_UX = fp8_grouped_linear(
            *(x_UD, w_EXD, size_E),
            weight_grad=self.weight_grad,
            power_of_two=self.power_of_two,
            x_power_of_two=True,
        )
        if not paired:
            return y_UX
        y_UPF = y_UX.reshape(len(y_UX), *_padded(w_EDX.shape[2:], paired))[..., : w_EDX.shape[-1]]
        return y_UPF.reshape(len(y_UX), -1)

    def sent(self, move, back, x, *how):
        return _narrow_there(move, back, x, how)

    def returned(self, move, back, y, *how):
        return _narrow_back(move, back, y, how)


def parts(subscripts: str) -> tuple[int, int]:
    """How many dimensions of x are rows, and how many are contracted.

    ValueError where they do not stand in this order.
    """
    inputs, _, out = subscripts.partition("->")
    of_x, _, of_w = inputs.partition(",")
    inner = sum(label in of_w for label in of_x)
    rows = len(of_x) - inner
    if of_x[rows:] != of_w[:inner] or out != of_x[:rows] + of_w[inner:]:
        raise ValueError(
            f"{subscripts!r} is no linear layer; write rows, inner and features in this order: "
            "'BTD,DF->BTF'"
        )
    return rows, inner


def _padded(features: tuple[int, ...], paired: bool) -> tuple[int, ...]:
    """The widths of features with room to whole blocks where two matrices stand side by side."""
    return (*features[:-1], features[-1] + (-features[-1] % BLOCK if paired else 0))


def _matrix(w: jax.Array, inner: int, paired: bool) -> jax.Array:
    """A weight [inner..., features...] as [N, K], the way the checkpoints have it.

    Gate and up are matrices of their own: no block reaches from one into the other.
    """
    missing = _padded(w.shape, paired)[-1] - w.shape[-1]
    w = jnp.pad(w, [(0, 0)] * (w.ndim - 1) + [(0, missing)])
    return w.reshape(math.prod(w.shape[:inner]), -1).T


@jax.custom_vjp
def _swiglu(gate, up):
    return jax.nn.silu(gate) * up


def _swiglu_forward(gate, up):
    """Keeps what came in at one byte a number, not what it was (section 3.3.3)."""
    kept = [quantize_rows(_rows(x), power_of_two=True) for x in (gate, up)]
    return _swiglu(gate, up), (kept, jnp.zeros((0, *gate.shape), gate.dtype))


def _swiglu_backward(saved, grad):
    kept, like = saved
    pair = (dequantize_rows(*x, like.dtype).reshape(like.shape[1:]) for x in kept)
    return jax.vjp(lambda gate, up: jax.nn.silu(gate) * up, *pair)[1](grad)


_swiglu.defvjp(_swiglu_forward, _swiglu_backward)


def _rows(x: jax.Array) -> jax.Array:
    return x.reshape(-1, x.shape[-1])


def _carried(move, x, how):
    """move(x) with values of one byte on the wire, and a scale to each 128 of them."""
    values, scales = quantize_rows(x, power_of_two=True)
    # Bytes: not every backend's collectives know this type.
    moved = move(jax.lax.bitcast_convert_type(values, jnp.uint8), *how)
    values = jax.lax.bitcast_convert_type(moved, values.dtype)
    return dequantize_rows(values, move(scales, *how), x.dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _narrow_there(move, back, x, how):
    return _carried(move, x, how)


_narrow_there.defvjp(
    lambda move, back, x, how: (_carried(move, x, how), how),
    lambda move, back, how, grad: (back(grad, *how), None),
)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _narrow_back(move, back, y, how):
    return move(y, *how)


_narrow_back.defvjp(
    lambda move, back, y, how: (move(y, *how), how),
    lambda move, back, how, grad: (_carried(back, grad, how), None),
)
