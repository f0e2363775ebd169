"""What a run's precision means, and that every linear layer asks it how to multiply."""

from collections import Counter
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import pytest

from dsjax import losses
from dsjax.model import abstract
from dsjax.nn.precision import PRECISIONS, Exact, products
from dsjax.train_step import forward
from tests import drawn

ATTENTION = ["BTD,DQ->BTQ", "BTQ,QNX->BTNX", "BTD,DX->BTX", "BSC,CNX->BSNX", "BTNW,NWD->BTD"]
DENSE = ["BTD,DPF->BTPF", "swiglu", "BTF,FD->BTD"]
EXPERTS = ["grouped (8, 16, 2, 8)", "swiglu", "grouped (8, 8, 16)"]


@dataclass(frozen=True)
class Told(Exact):
    """Writes down what it is asked."""

    asked: tuple[list, ...]

    def einsum(self, subscripts, x, w, *, axes=None):
        self.asked[0].append(subscripts)
        return super().einsum(subscripts, x, w, axes=axes)

    def swiglu(self, gate, up):
        self.asked[0].append("swiglu")
        return super().swiglu(gate, up)

    def grouped(self, x_UD, w_EDX, size_E):
        self.asked[0].append(f"grouped {w_EDX.shape}")
        return super().grouped(x_UD, w_EDX, size_E)

    def __hash__(self):
        return id(self)


def test_every_linear_layer_of_attention_and_feed_forward_asks():
    """And nothing else: embedding, router, MTP's joining projection and head are never FP8."""
    model = drawn.model(repeat=1, q_lora_rank=8, mtp=1)
    told, batch = Told(([],)), drawn.batch(1)
    batch = jax.tree.map(lambda x: x[0], batch)
    assert isinstance(batch, losses.Batch)
    with products(told):
        jax.eval_shape(lambda model: forward(model, batch, [1.0, 1.0]), abstract(model))
    main, mtp = ATTENTION + EXPERTS + DENSE, ATTENTION + DENSE
    assert Counter(told.asked[0]) == Counter(main + mtp)


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        *(("fp32", "float32"), ("bf16", "bfloat16"), ("fp8", "bfloat16")),
        *(("fp8_exact_wgrad", "bfloat16"), ("fp8_ue8m0", "bfloat16")),
    ],
)
def test_a_precision_is_set_while_its_function_is_traced(name, dtype):
    found = []

    def asked(x):
        found.append(products.value)
        return x

    precision = PRECISIONS[name]
    jax.jit(precision.applied(asked))(jnp.ones(1))
    assert found == [precision.products] and precision.dtype == dtype
    assert products.value == Exact()
    assert (precision.products == Exact()) == (not name.startswith("fp8"))
