"""Linear layers in block FP8 against their equations in NumPy float64, and on meshes."""

import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from dsjax import sharding
from dsjax.config import Moe, SigmoidRouter
from dsjax.nn.block_fp8 import BlockFp8
from dsjax.nn.moe import MoeFfn
from dsjax.nn.precision import products
from tests.drawn import FAST_COMPILE
from tests.kernels.fp8_oracle import dequantize, quantize
from tests.tolerance import TOLERANCE, rel_err

ROW, BLOCK = (1, 128), (128, 128)


def rounded(x: np.ndarray, block: tuple[int, int], power_of_two: bool = False) -> np.ndarray:
    """Through e4m3 and back."""
    return dequantize(*quantize(x, block, power_of_two), block)


def linear(x_MK: np.ndarray, w_NK: np.ndarray, dy_MN: np.ndarray, power_of_two: bool):
    """y, dx and dw of DeepSeek-V3's linear layer (report section 3.3)."""

    def of(x, block):
        return rounded(x, block, power_of_two)

    w, dy = of(w_NK, BLOCK), of(dy_MN, ROW)
    return of(x_MK, ROW) @ w.T, dy @ w, of(dy_MN.T, ROW) @ of(x_MK.T, ROW).T


def drawn(seed: int, *shapes: tuple[int, ...]) -> list[np.ndarray]:
    """FP32 of widely different sizes, so that scales matter."""
    rng = np.random.default_rng(seed)
    return [
        np.float32(rng.standard_normal(shape) * np.exp(rng.normal(0, 2, (*shape[:-1], 1))))
        for shape in shapes
    ]


def pulled(function, dy, *operands):
    """The result and the gradients of the operands."""

    @jax.jit
    def both(dy, *operands):
        y, pull = jax.vjp(function, *operands)
        return y, *pull(dy)

    return both(*map(jnp.asarray, (dy, *operands)))


@pytest.mark.parametrize("power_of_two", [False, True])
@pytest.mark.parametrize(
    ("subscripts", "rows", "inner", "features"),
    [
        ("BTD,DX->BTX", (2, 70), (200,), (40,)),
        ("BTQ,QNX->BTNX", (2, 3), (130,), (3, 50)),
        ("BTNW,NWD->BTD", (1, 5), (3, 50), (140,)),
    ],
)
def test_a_linear_layer_is_the_papers(subscripts, rows, inner, features, power_of_two, seed):
    x, w, dy = drawn(seed, (*rows, *inner), (*inner, *features), (*rows, *features))
    M, K, N = map(math.prod, (rows, inner, features))
    expected = linear(x.reshape(M, K), w.reshape(K, N).T, dy.reshape(M, N), power_of_two)
    of = BlockFp8(power_of_two=power_of_two)
    y, dx, dw = pulled(lambda x, w: of.einsum(subscripts, x, w), dy, x, w)
    assert (y.shape, dx.shape, dw.shape) == (dy.shape, x.shape, w.shape)
    found = y.reshape(M, N), dx.reshape(M, K), dw.reshape(K, N).T
    for mine, oracle in zip(found, expected, strict=True):
        assert rel_err(mine, oracle) < TOLERANCE["f32"]


def test_the_gradient_of_a_weight_can_be_exact(seed):
    x, w, dy = drawn(seed, (2, 70, 200), (200, 40), (2, 70, 40))
    flat = x.reshape(140, 200), w.T, dy.reshape(140, 40)
    of = BlockFp8(weight_grad="exact")
    y, dx, dw = pulled(lambda x, w: of.einsum("BTD,DX->BTX", x, w), dy, x, w)
    expected = *linear(*flat, False)[:2], flat[2].T.astype(np.float64) @ flat[0]
    found = y.reshape(140, 40), dx.reshape(140, 200), dw.T
    for mine, oracle in zip(found, expected, strict=True):
        assert rel_err(mine, oracle) < TOLERANCE["f32"]
    of_experts = jnp.int32([60, 80])
    experts = np.stack([w, -w])
    _, _, dw = pulled(lambda x, w: of.grouped(x, w, of_experts), flat[2], flat[0], experts)
    for mine, rows in zip(dw, (slice(0, 60), slice(60, 140)), strict=True):
        assert rel_err(mine, flat[0][rows].T.astype(np.float64) @ flat[2][rows]) < TOLERANCE["f32"]


@pytest.mark.parametrize("width", [70, 128])
def test_gate_and_up_are_matrices_of_their_own(width, seed):
    """As in the checkpoints: no block of scales reaches from one into the other."""
    x, w, dy = drawn(seed, (1, 9, 130), (130, 2, width), (1, 9, 2, width))
    y, dx, dw = pulled(lambda x, w: BlockFp8().einsum("BTD,DPF->BTPF", x, w), dy, x, w)
    both_dx = np.zeros_like(x[0])
    for part in range(2):
        one = linear(x[0], w[:, part].T, dy[0, :, part], False)
        both_dx = both_dx + one[1]
        assert rel_err(y[0, :, part], one[0]) < TOLERANCE["f32"]
        assert rel_err(dw[:, part].T, one[2]) < TOLERANCE["f32"]
    assert rel_err(dx[0], both_dx) < TOLERANCE["f32"]


@pytest.mark.parametrize("subscripts", ["BTD,FD->BTF", "BTD,DF->BFT", "DBT,DF->BTF"])
def test_what_is_no_linear_layer_is_refused(subscripts):
    with pytest.raises(ValueError, match="no linear layer; write rows, inner and features"):
        BlockFp8().einsum(subscripts, jnp.ones((4, 4, 4)), jnp.ones((4, 4)))


def test_swiglu_keeps_one_byte_of_each_number(seed):
    gate, up, dy = drawn(seed, (6, 150), (6, 150), (6, 150))
    h, dgate, dup = pulled(BlockFp8().swiglu, dy, gate, up)
    wide_gate, wide_up = (np.float64(x) for x in (gate, up))
    assert rel_err(h, wide_gate / (1 + np.exp(-wide_gate)) * wide_up) < TOLERANCE["f32"]
    kept_gate, kept_up = (rounded(x, ROW, True) for x in (gate, up))
    gated = 1 / (1 + np.exp(-kept_gate))
    assert rel_err(dup, dy * kept_gate * gated) < TOLERANCE["f32"]
    slope = gated * (1 + kept_gate * (1 - gated))
    assert rel_err(dgate, dy * kept_up * slope) < TOLERANCE["f32"]
    saved = jax.eval_shape(lambda *pair: jax.vjp(BlockFp8().swiglu, *pair)[1], gate, up)
    large = [leaf.dtype for leaf in jax.tree.leaves(saved) if leaf.size >= gate.size]
    assert large == [jnp.float8_e4m3fn] * 2


@pytest.mark.usefixtures("uncached")
@pytest.mark.parametrize(
    ("subscripts", "x_axes", "w_axes", "features", "inner"),
    [
        ("BTD,DX->BTX", ("batch", "residual", None), (None, None), (128,), (256,)),
        pytest.param(
            "BTD,DNX->BTNX",
            *(("batch", "length", None), (None, "heads", None), (4, 64), (128,)),
            marks=pytest.mark.thorough,
        ),
        (
            "BTNW,NWD->BTD",
            ("batch", "length", "heads", None),
            ("heads", None, None),
            (130,),
            (4, 64),
        ),
    ],
)
def test_on_a_mesh_as_on_one_device(subscripts, x_axes, w_axes, features, inner, seed):
    """Where slices are whole blocks, and a device's rows whole tiles of the weight's gradient."""
    rows = 2, 512
    x, w, dy = drawn(seed, (*rows, *inner), (*inner, *features), (*rows, *features))
    axes = ("batch", "residual", None) if len(features) == 1 and len(inner) == 2 else None

    def both(x, w, dy):
        y, pull = jax.vjp(lambda x, w: BlockFp8().einsum(subscripts, x, w, axes=axes), x, w)
        return y, *pull(jax.reshard(dy, jax.typeof(y).sharding.spec) if sharding.active() else dy)

    expected = jax.jit(both)(x, w, dy)
    with jax.set_mesh(sharding.make_mesh(data=2, context=2, tensor=2)):
        specs = sharding.spec(*x_axes), sharding.spec(*w_axes), jax.P()
        mesh = jax.sharding.get_mesh()
        placed = [
            jax.device_put(one, jax.NamedSharding(mesh, spec))
            for one, spec in zip((x, w, dy), specs, strict=True)
        ]
        found = jax.jit(lambda *args: both(*args))(*placed)
    for mine, oracle in zip(found, expected, strict=True):
        assert rel_err(mine, oracle) < TOLERANCE["f32"]


def test_rows_travel_in_one_byte_to_the_experts_and_their_gradients_from_them(seed):
    x, g = drawn(seed, (4, 130), (4, 130))

    def turned(x):
        return jnp.roll(x, 1, axis=0)

    def back(x):
        return jnp.roll(x, -1, axis=0)

    of = BlockFp8()
    y, dx = pulled(lambda x: of.sent(turned, back, x), g, x)
    np.testing.assert_array_equal(y, np.roll(rounded(x, ROW, True), 1, axis=0))
    np.testing.assert_array_equal(dx, np.roll(g, -1, axis=0))
    y, dx = pulled(lambda x: of.returned(turned, back, x), g, x)
    np.testing.assert_array_equal(y, np.roll(x, 1, axis=0))
    np.testing.assert_array_equal(dx, np.roll(rounded(g, ROW, True), -1, axis=0))


def moe_layer(seed: int) -> MoeFfn:
    """FP32; sizes at which sums run over two blocks."""
    rng = np.random.default_rng(seed)
    router = SigmoidRouter(num_groups=4, kept_groups=2, scale=2.5)
    config = Moe(num_experts=8, num_chosen=2, num_shared=1, intermediate_size=40, router=router)
    module = MoeFfn(config, 136, std=1.0, rngs=nnx.Rngs(0))
    return jax.tree.map(
        lambda v: v.replace(jnp.float32(rng.normal(0, 0.1, v.get_value().shape))),
        module,
        is_leaf=sharding.is_variable,
    )


@pytest.mark.thorough
@pytest.mark.usefixtures("uncached")
@pytest.mark.parametrize("dispatch", ["ring", "all_to_all"])
def test_experts_elsewhere_give_what_experts_here_give(dispatch, seed):
    """What travels is quantized, and quantizing it again for the experts changes nothing."""
    module = moe_layer(seed)
    x_BTD = np.float32(np.random.default_rng(seed).standard_normal((4, 16, 136)))

    def outcome(module, x_BTD):
        def value(module, x_BTD):
            y_BTD, _ = sharding.unshard(module)(x_BTD, jnp.ones_like(x_BTD[..., 0], bool))
            return (y_BTD**2).sum(), y_BTD

        with products(BlockFp8()):
            return jax.grad(value, argnums=(0, 1), has_aux=True)(module, x_BTD)

    here = module, jnp.asarray(x_BTD)
    (dw, dx), y = jax.jit(outcome).lower(*here).compile(FAST_COMPILE)(*here)
    mesh = sharding.make_mesh(devices=jax.devices()[:4], expert=4)
    with jax.set_mesh(mesh), sharding.layout(sharding.Layout(dispatch)):
        there = (
            jax.device_put(module, sharding.shardings(module, mesh)),
            jax.device_put(x_BTD, jax.NamedSharding(mesh, sharding.spec("batch"))),
        )
        lowered = jax.jit(lambda *args: outcome(*args)).lower(*there)
        (found_dw, found_dx), found_y = lowered.compile(FAST_COMPILE)(*there)
    assert rel_err(found_y, y) < TOLERANCE["f32"]
    # The gradient is rounded on its way too, before the token's weight is known, and the tiles of
    # the weights' gradients hold other rows: roundings of e4m3, half a step of 2**-3 at most.
    pairs = zip(jax.tree.leaves((found_dw, found_dx)), jax.tree.leaves((dw, dx)), strict=True)
    for mine, known in pairs:
        assert rel_err(mine, known) < 2.0**-4
    collective = {"ring": "all_gather", "all_to_all": "all_to_all"}[dispatch]
    sent = re.findall(
        rf'"stablehlo.{collective}".*?\) -> tensor<([0-9x]+)x(\w+)>', lowered.as_text(), re.S
    )
    assert [dtype for shape, dtype in sent if shape.endswith("x136")].count("ui8") == 2, sent


def test_outliers_spoil_their_own_tile_and_no_other(seed):
    """Channels a thousand times the others, in tokens of very different size."""
    rng = np.random.default_rng(seed)
    outliers = [5, 300]
    x_MK = rng.standard_normal((32, 512)) * np.logspace(-3, 0, 32)[:, None]
    x_MK[:, outliers] *= 1000
    w_KN = (
        rng.standard_normal((512, 64))
        / np.where(np.isin(np.arange(512), outliers), 1000, 1)[:, None]
    )
    exact_MN = x_MK @ w_KN

    def worst(y_MN) -> float:
        return max(rel_err(y_N, exact_N) for y_N, exact_N in zip(y_MN, exact_MN, strict=True))

    one_scale = rounded(x_MK, x_MK.shape) @ rounded(w_KN.T, w_KN.T.shape).T
    product = jax.jit(lambda x_BTD, w_DX: BlockFp8().einsum("BTD,DX->BTX", x_BTD, w_DX))
    found = product(jnp.float32(x_MK[None]), jnp.float32(w_KN))[0]
    # Both factors are rounded to three bits: by 2**-4 of themselves at most, and not all alike.
    bound = 2 * 2.0**-4
    assert worst(found) < bound / 2 < bound < worst(one_scale)
