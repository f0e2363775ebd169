"""Rows and bytes on the wire: counted from choices, against brute force and the lowered program."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsjax import sharding
from dsjax.nn.dispatch import TRANSPORTS, dispatch
from dsjax.nn.dispatch.rows import Group, Rows, fan_out
from dsjax.nn.dispatch.traffic import bytes_sent, needed, sent

A, M, D, E, K = 8, 64, 16, 32, 4
GROUPS = {"num_groups": 8, "kept_groups": 2}


def choices(seed: int, *, num_groups: int, kept_groups: int, num_experts=E, num_chosen=K):
    """As node-limited routing makes them: K experts within `kept_groups` groups."""
    rng = np.random.default_rng(seed)
    width = num_experts // num_groups

    def one():
        groups = rng.choice(num_groups, kept_groups, replace=False)
        allowed = (groups[:, None] * width + np.arange(width)).ravel()
        return rng.choice(allowed, num_chosen, replace=False)

    return np.array([[one() for _ in range(M)] for _ in range(A)], np.int32)


@pytest.mark.parametrize(
    ("num_experts", "num_groups", "kept_groups", "size", "expected"),
    [
        (256, 8, 4, 8, 4),  # V3 on 8 devices: one group each
        (256, 8, 4, 64, 8),  # 32 devices hold 4 groups, but only 8 experts are chosen
        (256, 8, 1, 32, 4),  # one group on 4 devices
        (256, 8, 1, 4, 1),  # two groups on each device
        (256, 1, 1, 4, 4),  # no limit: all devices
        (160, 4, 1, 16, 4),
        (24, 4, 1, 3, 2),  # a group of 6 that lies across two devices of 8
    ],
)
def test_how_far_the_experts_of_a_token_spread(
    num_experts, num_groups, kept_groups, size, expected
):
    found = fan_out(
        num_experts=num_experts,
        num_chosen=8,
        num_groups=num_groups,
        kept_groups=kept_groups,
        size=size,
    )
    assert found == expected


def test_a_row_goes_once_to_each_device_and_no_further_than_its_groups(seed):
    choice_AMK = choices(seed, **GROUPS)
    spread = fan_out(num_experts=E, num_chosen=K, size=A, **GROUPS)
    assert spread == 2
    count_AA = np.zeros((A, A), int)
    for source, of_rows in enumerate(choice_AMK):
        for chosen in of_rows:
            owners = {int(expert) // (E // A) for expert in chosen}
            assert len(owners) <= spread
            for owner in owners:
                count_AA[source, owner] += 1
    np.testing.assert_array_equal(needed(choice_AMK, E), count_AA)
    away = 1 - np.eye(A, dtype=int)
    rows = {name: sent(name, choice_AMK, num_experts=E, fan_out=spread).rows for name in TRANSPORTS}
    np.testing.assert_array_equal(rows["ragged"].sum(0), count_AA * away)
    assert (rows["all_to_all"].sum(0) >= count_AA * away).all()
    assert (rows["ring"] == M * away).all()
    # Two of eight devices: half of a ring's rows, with room for chance, a quarter without.
    totals = {name: int(counts.sum()) for name, counts in rows.items()}
    assert totals["ragged"] < 0.3 * totals["ring"] < totals["all_to_all"] < 0.8 * totals["ring"]


def test_rows_beyond_the_room_go_in_further_rounds():
    choice_AMK = np.broadcast_to(np.arange(K, dtype=np.int32), (A, M, K))  # all to device 0
    spread = fan_out(num_experts=E, num_chosen=K, size=A, **GROUPS)
    padded, _ = sent("all_to_all", choice_AMK, num_experts=E, fan_out=spread)
    assert padded.shape[0] == 2 and padded[:, 1, 0].tolist() == [40, 40]
    exact, _ = sent("ragged", choice_AMK, num_experts=E, fan_out=spread)
    # 8 x 64 rows for one device, which has room for 208: senders 1 to 7, numbered 64 onwards.
    assert exact[:, 1:, 0].sum(1).tolist() == [208 - M, 208, 96]
    assert exact[:, :, 1:].sum() == 0


COLLECTIVE = re.compile(
    r"stablehlo\.(all_to_all|all_gather|reduce_scatter)\b.*?:\s*"
    r"\(tensor<([^>]*)>\) -> tensor<([^>]*)>",
    re.DOTALL,
)
BYTES = {"f32": 4, "bf16": 2, "i32": 4}


def _bytes(shape: str) -> int:
    *sizes, dtype = shape.split("x")
    return int(np.prod([int(size) for size in sizes])) * BYTES[dtype]


def on_the_wire(text: str) -> int:
    """Of a device's larger side of each collective, all but the part that stays."""
    return sum(
        max(_bytes(before), _bytes(after)) * (A - 1) // A
        for _, before, after in COLLECTIVE.findall(text)
    )


@pytest.mark.parametrize("name", ["ring", "all_to_all"])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("kept_groups", [2, 4])
def test_bytes_as_in_the_lowered_program(name, dtype, kept_groups, seed):
    """Where a row may go to four of eight devices there is room for all, so one round is all.

    Where it may go to two, there is a loop: once in forward and once in backward.
    """
    limits = {"num_groups": 8, "kept_groups": kept_groups}
    spread = fan_out(num_experts=E, num_chosen=K, size=A, **limits)
    on_wire = sent(name, choices(seed, **limits), num_experts=E, fan_out=spread)
    expected = bytes_sent(on_wire, hidden_size=D, num_chosen=K, itemsize=jnp.dtype(dtype).itemsize)
    assert len(on_wire.rows) == 1
    assert on_wire.twice == (name == "all_to_all" and kept_groups == 2)
    group = Group(axes=("expert",), num_local=E // A, fan_out=spread)
    experts = jax.tree_util.Partial(lambda x_UD, size_E: x_UD)

    @functools.partial(jax.shard_map, in_specs=jax.P("expert"), out_specs=jax.P("expert"))
    def forward(x_MD, weight_MK, choice_MK):
        return dispatch(Rows(x_MD, choice_MK, weight_MK), experts, group)[0]

    def backward(x_MD, weight_MK, choice_MK):
        y_MD, pull = jax.vjp(lambda *x: forward(*x, choice_MK), x_MD, weight_MK)
        return pull(y_MD)

    mesh = sharding.make_mesh(expert=A)
    with jax.set_mesh(mesh), sharding.layout(sharding.Layout(name)):
        inputs = [
            jax.ShapeDtypeStruct((A * M, width), dtype, sharding=jax.P("expert"))
            for width, dtype in ((D, dtype), (K, jnp.float32), (K, jnp.int32))
        ]
        one, both = (
            on_the_wire(jax.jit(function).lower(*inputs).as_text())
            for function in (forward, backward)
        )
    assert (one, both - one) == expected
