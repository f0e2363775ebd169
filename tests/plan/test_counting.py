"""Programs compiled for 8 virtual devices, their FLOPs and traffic counted by hand."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from dsjax.plan import counting
from dsjax.plan.hlo import parse
from dsjax.plan.traffic import Traffic, wire

ROWS, COLUMNS, SIZE = 8, 16, 8 * 16 * 4  # one device's piece, FP32


@pytest.fixture
def mesh():
    with jax.set_mesh(jax.make_mesh((4, 2), ("a", "b"))) as mesh:
        yield mesh


def on_each(function, *arguments) -> str:
    """The program that runs `function` on [ROWS, COLUMNS] of each device."""
    spec = P(("a", "b"), None)
    place = NamedSharding(jax.sharding.get_mesh(), spec)
    x = jax.ShapeDtypeStruct((8 * ROWS, COLUMNS), jnp.float32, sharding=place)
    mapped = jax.shard_map(
        function,
        in_specs=(spec, *[P()] * len(arguments)),
        out_specs=spec,
        check_vma=False,
    )
    return jax.jit(mapped).lower(x, *arguments).compile().as_text()


def repeated(body, times: int):
    """x through body `times` times; each pass needs the one before."""
    return lambda x: jax.lax.scan(lambda x, _: (jnp.tanh(body(x)), None), x, None, length=times)[0]


def test_nested_scans_multiply(mesh):
    inner = repeated(lambda x: jax.lax.psum(x, "a"), 3)
    text = on_each(repeated(lambda x: jax.lax.psum(inner(x), "b"), 5))
    everything = Traffic(2, 20, 20 * SIZE, 15 * 2 * 3 / 4 * SIZE + 5 * 2 * 1 / 2 * SIZE, 0)
    assert counting.count(text).traffic == {"all-reduce": everything}
    # XLA notes how often its loops run; without the note the conditions tell the same.
    unsaid = re.sub(r'"known_trip_count":\{[^}]*\},?', "", text)
    assert unsaid != text
    assert counting.count(unsaid).traffic == {"all-reduce": everything}


COLLECTIVES = {
    "all-gather": (
        lambda x: jax.lax.all_gather(x, "b", tiled=True)[:ROWS],
        Traffic(1, 5, 5 * 2 * SIZE, 5 * SIZE, 0),
    ),
    "reduce-scatter": (
        lambda x: jnp.tile(jax.lax.psum_scatter(x, "a", tiled=True), (4, 1)),
        Traffic(1, 5, 5 * SIZE, 5 * 3 / 4 * SIZE, 0),
    ),
    "all-reduce": (
        lambda x: jax.lax.psum(x, ("a", "b")),
        Traffic(1, 5, 5 * SIZE, 5 * 2 * 7 / 8 * SIZE, 0),
    ),
    "all-to-all": (
        lambda x: jax.lax.all_to_all(x, "a", 0, 0, tiled=True),
        Traffic(1, 5, 5 * SIZE, 5 * 3 / 4 * SIZE, 0),
    ),
    "collective-permute": (
        lambda x: jax.lax.ppermute(x, "a", [(i, (i + 1) % 4) for i in range(4)]),
        Traffic(1, 5, 5 * SIZE, 5 * SIZE, 0),
    ),
}


@pytest.mark.parametrize("kind", COLLECTIVES)
def test_each_collective_in_a_scan(kind, mesh):
    body, expected = COLLECTIVES[kind]
    assert counting.count(on_each(repeated(body, 5))).traffic == {kind: expected}


# Along a lie devices 0, 2, 4, 6, along b neighbours. Four slices of two: a crosses them all, alone
# in each; b stays inside. Two slices of four: a has two devices in each.
@pytest.mark.parametrize(
    ("kind", "slices", "near", "far"),
    [
        ("all-gather", 4, 1, 0),
        ("reduce-scatter", 4, 0, 3 / 4),
        ("reduce-scatter", 2, 1 / 2, 1 / 4),
        ("all-reduce", 4, 2 * 1 / 2, 2 * 3 / 4 / 2),
        ("all-reduce", 2, 2 * 3 / 4, 2 * 1 / 2 / 4),
        ("all-to-all", 4, 0, 3 / 4),
        ("all-to-all", 2, 1 / 4, 1 / 2),
        ("collective-permute", 4, 0, 1),
        ("collective-permute", 2, 1, 1),  # of the four that send, two send far and two near
    ],
)
def test_what_crosses_slices(kind, slices, near, far, mesh):
    body, _ = COLLECTIVES[kind]
    slice_of = [device * slices // 8 for device in range(8)]
    counts = counting.count(on_each(body), slice_of)
    assert (counts.near / SIZE, counts.far / SIZE) == (near, far)


@pytest.mark.parametrize(("m", "s"), [(1, 1), (4, 1), (1, 4), (2, 3), (8, 2)])
@pytest.mark.parametrize(
    ("kind", "of_operand"),
    [
        ("all-gather", lambda n: n - 1),
        ("reduce-scatter", lambda n: (n - 1) / n),
        ("all-reduce", lambda n: 2 * (n - 1) / n),
        ("all-to-all", lambda n: (n - 1) / n),
    ],
)
def test_near_and_far_together_are_what_one_slice_would_send(kind, of_operand, m, s):
    sent = wire(kind, 1000.0, m, s)
    assert sent.near + sent.far == pytest.approx(1000 * of_operand(m * s))
    assert (sent.near > 0, sent.far > 0) == (m > 1, s > 1)


def test_loops_that_the_data_decides(mesh):
    def outer(x, n):
        def micro(_, x):
            inner = jax.lax.while_loop(
                lambda x: x.sum() > 3, lambda x: jnp.tanh(jax.lax.psum(x, "a")), x
            )
            return jnp.tanh(jax.lax.psum(inner, "b"))

        return jax.lax.fori_loop(0, n, micro, x)

    text = on_each(outer, jax.ShapeDtypeStruct((), jnp.int32))
    a, b = 2 * 3 / 4 * SIZE, 2 * 1 / 2 * SIZE
    once = counting.count(text)
    assert once.near == a + b
    assert len(once.notes) == 2
    assert all("runs as often as the data says: counted x 1" in note for note in once.notes)
    assert counting.count(text, outer_trips=6).near == 6 * (a + b)
    assert counting.count(text, outer_trips=6, inner_trips=0).near == 6 * b


def test_the_larger_branch_counts(mesh):
    def either(x):
        return jax.lax.cond(
            x[0, 0] > 0,
            lambda x: jax.lax.psum(jnp.tanh(jax.lax.psum(x, "a")), "a"),
            lambda x: jax.lax.psum(x, "b"),
            x,
        )

    counts = counting.count(on_each(either))
    assert counts.traffic["all-reduce"].calls == 2
    assert counts.near == 2 * 2 * 3 / 4 * SIZE
    assert "its larger branch counted" in counts.notes[0]


def text_of(function, *shapes: tuple[int, ...]) -> str:
    arguments = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    return jax.jit(function).lower(*arguments).compile().as_text()


@pytest.mark.parametrize(
    ("function", "shapes", "flops"),
    [
        (lambda x, w: x @ w, [(8, 16), (16, 32)], 2 * 8 * 16 * 32),
        (
            lambda q, k: jnp.einsum("bnth,bnsh->bnts", q, k),
            [(2, 3, 8, 16), (2, 3, 5, 16)],
            2 * 2 * 3 * 8 * 5 * 16,
        ),
        (lambda x, w: jnp.einsum("abc,bcd->ad", x, w), [(4, 5, 6), (5, 6, 7)], 2 * 4 * 7 * 30),
        (
            lambda w, x: jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, w)[0],
            [(5, 16, 16), (8, 16)],
            5 * 2 * 8 * 16 * 16,
        ),
        # Forward, and the gradient of x and of w, each as much; of the first layer's x as well,
        # which the loop does not know to be unused.
        (
            lambda w, x: jax.grad(
                lambda w: jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, w)[0].sum()
            )(w),
            [(5, 16, 16), (8, 16)],
            3 * 5 * 2 * 8 * 16 * 16,
        ),
        (jnp.tanh, [(8, 8)], 0),
    ],
)
def test_flops(function, shapes, flops):
    counts = counting.count(text_of(function, *shapes))
    assert counts.flops == flops
    assert counts.traffic == {}


def meeting(size, window, stride, dilate, low, high):
    """Pairs that meet in one dimension, drawn out as an array: 1 where the input has an element."""
    line = np.zeros((size - 1) * dilate + 1)
    line[::dilate] = 1
    line = np.pad(line, (low, high))
    starts = range(0, len(line) - window + 1, stride)
    return sum(int(line[start : start + window].sum()) for start in starts)


@pytest.mark.parametrize(
    ("stride", "low", "high", "dilate"), [(1, 0, 0, 1), (2, 1, 0, 1), (1, 2, 0, 2), (3, 1, 2, 2)]
)
def test_flops_of_convolutions(stride, low, high, dilate):
    def convolve(x, w):
        return jax.lax.conv_general_dilated(
            x,
            w,
            window_strides=(stride,),
            padding=((low, high),),
            lhs_dilation=(dilate,),
            dimension_numbers=("NWC", "WIO", "NWC"),
        )

    pairs = meeting(9, 3, stride, dilate, low, high)
    counts = counting.count(text_of(convolve, (2, 9, 4), (3, 4, 5)))
    assert counts.flops == 2 * 2 * 4 * 5 * pairs


def test_bytes_moved_by_products_in_a_scan():
    """Of a stack of weights a pass touches one, not all; and writes its own row of the results."""
    layers, rows, size = 7, 8, 16

    def run(w, x):
        def body(x, w):
            y = x @ w
            return y, y

        return jax.lax.scan(body, x, w)[1]

    text = text_of(run, (layers, size, size), (rows, size))
    moved = counting.count(text).moved
    x, w = rows * size * 4, size * size * 4
    # At least: read x and w, write y, and write y into the results.
    least = layers * (x + w + x + x)
    # At most: w cut out and copied first, x copied, and the whole results touched once.
    assert least <= moved <= layers * (3 * w + 6 * x) + 3 * layers * (w + x)
    assert moved < layers * layers * w


def test_the_plainest_product_moves_its_operands_and_result():
    text = text_of(lambda x, w: x @ w, (8, 16), (16, 32))
    assert counting.count(text).moved == 4 * (8 * 16 + 16 * 32 + 8 * 32)
    assert not parse(text).is_tpu


def test_products_of_fp8_are_told_apart():
    """Both factors FP8, in a kernel or an instruction; scales and results are not."""
    counts = counting.count(FP8_PRODUCTS)
    assert counts.flops == 3 * 2 * 16 * 32 * 8 + 500
    assert counts.fp8_flops == 2 * 2 * 16 * 32 * 8 + 500


FP8_PRODUCTS = """HloModule products

ENTRY %main (x: f8e4m3fn[16,32], w: f8e4m3fn[32,8], y: bf16[16,32], s: f32[16,1]) -> f32[16,8] {
  %x = f8e4m3fn[16,32] parameter(0)
  %w = f8e4m3fn[32,8] parameter(1)
  %y = bf16[16,32] parameter(2)
  %s = f32[16,1] parameter(3)
  %both = f32[16,8] dot(%x, %w), lhs_contracting_dims={1}, rhs_contracting_dims={0}
  %again = f32[16,8] dot(%x, %w), lhs_contracting_dims={1}, rhs_contracting_dims={0}
  %one = f32[16,8] dot(%y, %w), lhs_contracting_dims={1}, rhs_contracting_dims={0}
  ROOT %kernel = f32[16,8] custom-call(%x, %s, %w), custom_call_target="tpu_custom_call", KNOWN
}
""".replace("KNOWN", 'backend_config={"cost_estimate":{"flops":"500"}}')
