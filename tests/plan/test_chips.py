"""Names of chips and topologies, and the figures that must follow from others."""

import pytest

from dsjax.convert import fitting
from dsjax.plan import chips


@pytest.mark.parametrize(
    ("text", "slices", "devices", "joined", "is_tpu"),
    [
        ("v5p:8x8x16", 1, 1024, 1024, True),
        ("v5p:2x2x1", 3, 12, 4, True),
        ("v6e:4x4", 1, 16, 16, True),
        ("tpu7x:2x2x1", 2, 16, 8, True),  # two devices per chip
        ("h100:16x8", 1, 128, 8, False),
        ("b200:1x8", 1, 8, 8, False),
    ],
)
def test_topologies(text, slices, devices, joined, is_tpu):
    topology = chips.topology(text, slices)
    assert (topology.num_devices, topology.joined) == (devices, joined)
    assert topology.chip.is_tpu is is_tpu
    assert topology.name == text
    slice_of = topology.slice_of()
    assert [slice_of.count(number) for number in sorted(set(slice_of))] == (
        [joined] * (devices // joined)
    )
    assert slice_of == sorted(slice_of)


@pytest.mark.parametrize(
    ("text", "slices", "message"),
    [
        ("v5p-8", 1, r"topology=v5p-8.*no chip known here.*v5e, v5p, v6e, tpu7x, h100, h200, b200"),
        ("v9:2x2", 1, r"'v9' is no chip"),
        ("v5p", 1, r"write v5p:4x4x4, chips along each side"),
        ("h100:0x8", 1, r"write h100:16x8, nodes x GPUs per node"),
        ("v6e:2x2x2", 1, r"has 3 sizes, TPU v6e takes 2 .*write v6e:4x4"),
        ("h100:64", 1, r"has 1 sizes, H100 takes 2 \(nodes x GPUs per node\)"),
        ("h100:4x8", 2, r"slices=2: GPUs have no slices"),
        ("v6e:4x4", 0, r"slices=0: it must be at least 1"),
    ],
)
def test_other_names_are_refused_with_what_is_known(text, slices, message):
    with pytest.raises(ValueError, match=message):
        chips.topology(text, slices)


def test_one_table_serves_all():
    assert fitting.DEVICES["TPU7x"] == 94.74 * 2**30
    assert chips.BY_KIND["NVIDIA H200"] is chips.BY_KEY["h200"]
    assert len(chips.BY_KEY) == len(chips.CHIPS) == 7
    assert len(chips.BY_KIND) == sum(len(chip.kinds) for chip in chips.CHIPS)


@pytest.mark.parametrize("chip", chips.CHIPS, ids=lambda chip: chip.key)
def test_figures_lie_where_such_chips_do(chip):
    """A slip of a power of ten, or of bits for bytes, leaves these ranges."""
    assert 15e9 < chip.hbm < 200e9
    assert 1 <= chip.fp8_flops / chip.bf16_flops <= 2.01
    assert 150 < chip.bf16_flops / chip.hbm_bandwidth < 600  # FLOPs per byte
    assert 3 < chip.hbm_bandwidth / chip.ici_bandwidth < 20
    assert 5 < chip.ici_bandwidth / chip.dcn_bandwidth < 100
