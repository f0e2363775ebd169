"""Memory, least time and the printed plan, against figures worked out by hand."""

import dataclasses
import io
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from rich.console import Console

from dsjax.plan import buffers, chips, counting, table
from dsjax.plan.buffers import Buffer, Memory
from dsjax.plan.roofline import roofline
from dsjax.plan.traffic import Traffic

TPU = (Path(__file__).parent / "texts" / "tpu.hlo").read_text()
GIB = 2**30

COUNTS = counting.Counts(
    flops=459e12 * 0.4,
    moved=2765e9 * 0.1,
    traffic={
        "all-gather": Traffic(2, 20, 400e9, 300e9, 0.0),
        "all-reduce": Traffic(1, 5, 2e9, 0.0, 6.25e9 * 0.3),
    },
    notes=("loop jit(step)/while runs as often as the data says: counted x 8",),
)
PLAN = table.Plan(
    title="configs/v3.py",
    topology=chips.topology("v5p:8x8x16", slices=2),
    mesh="mesh.fsdp=128 mesh.expert=16",
    parameters={"total": 671_026_419_200, "active": 37_552_297_472},
    memory=Memory(arguments=8e9, outputs=9e9, aliased=8e9, temporaries=41e9, peak=45e9),
    largest=(Buffer(8e9, "bf16[61,4096,7168]", "jit(step)/" + "while/body/" * 9 + "tanh"),),
    useful=459e12 * 0.3,
    counts=COUNTS,
    beyond=("layers computed again", "room for uneven experts"),
    seconds=151.2,
)


def test_roofline_by_hand():
    line = roofline(COUNTS, 459e12 * 0.3, chips.BY_KEY["v5p"])
    assert line.parts == pytest.approx({"compute": 0.4, "HBM": 0.1, "ICI": 0.5, "DCN": 0.3})
    assert (line.bound, line.overlapped) == ("ICI", pytest.approx(0.5))
    assert line.in_turn == pytest.approx(1.3)
    assert line.best_mfu == pytest.approx(0.3 / 0.5)
    assert line.mfu_in_turn == pytest.approx(0.3 / 1.3)


def test_gpus_have_other_names_for_their_links():
    line = roofline(COUNTS, 1.0, chips.BY_KEY["h100"])
    assert list(line.parts) == ["compute", "HBM", "NVLink", "network"]
    assert line.parts["NVLink"] == 300e9 / 450e9


def test_memory_of_a_compiled_program():
    """The state is donated, so its place is counted once."""
    state, x = (jax.ShapeDtypeStruct((64, 64), jnp.float32), jax.ShapeDtypeStruct((64,), "float32"))
    step = jax.jit(lambda state, x: (state + x[None], (x * 2).sum()), donate_argnums=0)
    memory = buffers.memory(step.lower(state, x).compile().memory_analysis())
    size = 64 * 64 * 4
    assert memory.arguments == size + 64 * 4
    assert memory.aliased == size
    # The sum, and the table of the tuple.
    assert size + 4 <= memory.outputs <= size + 4 + 64
    assert memory.total == memory.arguments + memory.outputs - size + memory.temporaries


def test_largest_buffers_are_those_in_main_memory():
    """Not what lies on the chip, not what is only allocated, one of each shape."""
    assert buffers.largest(TPU, 4) == [
        # Its last dimension of 64 fills half a tile.
        Buffer(32 * 128 * 16 * 128 * 2.0, "bf16[32,128,16,64]", "jit(step)/silent"),
        Buffer(32 * 16 * 128 * 128 * 2.0, "bf16[32,16,128,128]", ATTENTION),
        Buffer(5 * 64 * 128 * 2.0, "bf16[5,64,128]", "w"),
        Buffer(128 * 128 * 2.0, "bf16[128,128]", "jit(step)/gather"),
    ]


ATTENTION = "jit(step)/blhd,bmhd->bhlm/dot_general"


def test_what_is_only_allocated_counts_where_nothing_else_has_its_shape():
    text = TPU.replace("%attention = bf16[32,16,128,128]", "%attention = bf16[32,16,128,127]")
    assert "jit(step)/broadcast_in_dim" in {one.op_name for one in buffers.largest(text, 4)}


SHORT = (
    "RESOURCE_EXHAUSTED: E1000: CompileTimeHbmOom: Ran out of memory on HBM, the total memory "
    "required for HLO temporaries (37.62G) exceeds available HBM (31.24G). HLO module: jit_f."
)
LONG = """RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 20.50G of 15.75G hbm.

  Largest program allocations in hbm:

  1. Size: 6.25G
     Operator: op_name="jit(step)/dot_general" source_file="model.py" source_line=3
     Shape: bf16[8,4096,102400]{2,1,0:T(8,128)(2,1)}
     Unpadded size: 6.25G
     XLA label: fusion.1 = fusion(copy.1), kind=kOutput
     Allocation type: HLO temp
     ==========================

  2. Size: 512.00M
     Shape: f32[131072,1024]{1,0:T(8,128)}
     Unpadded size: 512.00M
     ==========================
"""


def test_the_compiler_s_refusals_are_read():
    short = buffers.out_of_memory(SHORT)
    assert (short.needed, short.available) == (37.62 * GIB, 31.24 * GIB)
    assert short.largest == ()
    long = buffers.out_of_memory(LONG)
    assert (long.needed, long.available) == (20.5 * GIB, 15.75 * GIB)
    assert long.largest == (
        Buffer(6.25 * GIB, "bf16[8,4096,102400]{2,1,0:T(8,128)(2,1)}", "jit(step)/dot_general"),
        Buffer(512 * 2**20, "f32[131072,1024]{1,0:T(8,128)}", ""),
    )
    assert buffers.out_of_memory("INVALID_ARGUMENT: something else") is None
    told = table.refusal(long, chips.topology("v5e:4x4"))
    assert "wants 22.0 GB of the 16.9 GB that a TPU v5e device has, 5.1 GB too much" in told
    assert "6.7 GB  bf16[8,4096,102400]" in told


def printed(plan: table.Plan, **options) -> str:
    output = io.StringIO()
    table.show(plan, Console(file=output, width=200, **options))
    return output.getvalue()


def test_the_plan_in_plain_text():
    lines = [" ".join(line.split()) for line in printed(PLAN).splitlines()]
    for line in (
        "configs/v3.py on v5p:8x8x16, 2,048 devices in 2 slices, mesh.fsdp=128 mesh.expert=16; "
        "compiled in 151 s",
        "total 671,026,419,200",
        "arguments 8.0 GB 7.8%",
        "outputs beside them 1.0 GB 1.0%",
        "temporaries 41.0 GB 39.9%",
        "all 50.0 GB 48.6%",
        "alive at most, as planned 45.0 GB 43.8%",
        "left of 102.8 GB 57.8 GB 56.2%",
        "FLOPs of one step and device; compiled may be more for layers computed again; room for "
        "uneven experts",
        "bf16[61,4096,7168] 8.0 GB ..." + ("jit(step)/" + "while/body/" * 9 + "tanh")[-67:],
        "by formula 137.700 1",
        "as compiled 183.600 1.333",
        "all-gather 2 20 400.0 GB 300.0 GB 0 bytes",
        "all 3 25 300.0 GB 1.9 GB",
        "ICI 0.5000 600.0 GB/s",
        "all at once: ICI decides 0.5000 MFU 60.0% at most",
        "one after the other 1.3000 MFU 23.1% at most",
        "loop jit(step)/while runs as often as the data says: counted x 8",
    ):
        assert line in lines
    assert PLAN.fits


def test_a_plan_that_does_not_fit_says_by_how_much():
    memory = Memory(arguments=90e9, outputs=0.0, aliased=0.0, temporaries=20e9)
    plan = dataclasses.replace(PLAN, memory=memory)
    assert not plan.fits
    assert "MISSING: more than the 102.8 GB    7.2 GB" in printed(plan)
    assert "alive at most" not in printed(plan)
    assert "| 107%, does not fit |" in table.row(plan)


@pytest.mark.parametrize(
    ("chips_of", "fits"), [("v5p:8x8x16", True), ("h200:16x8", False), ("v5e:4x4", False)]
)
def test_what_tpu_s_compiler_says_of_its_peak_is_its_verdict(chips_of, fits):
    """It reuses places, so the sum may be more than there is; a GPU allocates the sum."""
    hbm = chips.topology(chips_of).chip.hbm
    memory = Memory(0.6 * hbm, 0.0, 0.0, 0.5 * hbm, 0.0 if "v5e" in chips_of else 0.9 * hbm)
    plan = dataclasses.replace(PLAN, topology=chips.topology(chips_of), memory=memory)
    assert plan.fits is fits
    assert ("90%" in table.row(plan)) is fits
    assert ("MISSING" in printed(plan)) is not fits


def test_fp8_counts_at_its_own_rate():
    counts = dataclasses.replace(COUNTS, flops=989e12, fp8_flops=0.8 * 989e12)
    h100 = chips.topology("h100:1x8")
    line = roofline(counts, 989e12, h100.chip)
    assert line.compute == pytest.approx(0.2 + 0.8 * 989 / 1979)
    text = printed(dataclasses.replace(PLAN, counts=counts, topology=h100))
    assert "989 TFLOP/s, FP8 1,979 TFLOP/s" in text
    assert "FP8" not in printed(PLAN)


def test_the_plan_on_a_terminal():
    text = printed(PLAN, force_terminal=True)
    assert "│ compute " in text
    assert "671,026,419,200" in text


def test_the_row_of_markdown():
    assert table.row(PLAN) == (
        "| configs/v3.py | v5p:8x8x16 x 2 slices | mesh.fsdp=128 mesh.expert=16 | 671,026,419,200 "
        "| 45.0 GB | 44% | 137.7, 183.6 | 300.0 GB | 1.9 GB | 0.500 s (ICI) | 60% | 151 s |"
    )
    header, rule = table.ROW_HEADER.splitlines()
    assert header.count("|") == rule.count("|") == table.row(PLAN).count("|")
