"""Short programs as the compilers for TPU and GPU print them, counted by hand."""

from pathlib import Path

import pytest

from dsjax.plan import counting, hlo
from dsjax.plan.loops import Frame, trip_count
from dsjax.plan.traffic import Traffic

TEXTS = Path(__file__).parent / "texts"
TPU, GPU = ((TEXTS / f"{name}.hlo").read_text() for name in ("tpu", "gpu"))


def loops(text: str) -> dict[str, int | None]:
    """Passes of every loop by name, seen from its own caller."""
    module, found = hlo.parse(text), {}

    def walk(frame: Frame) -> None:
        for instruction in frame.computation.instructions.values():
            for branch in instruction.branches:
                walk(Frame(module.computations[branch], frame, instruction))
            if instruction.opcode == "while":
                found[instruction.name] = trip_count(module, frame, instruction)
                body = module.computations[instruction.called["body"]]
                walk(Frame(body, frame, instruction))

    walk(Frame(module.computations[module.entry]))
    return found


def test_tpu_loops_are_read_from_their_conditions():
    """One begins behind its peeled first pass, the other carries its limit along."""
    assert loops(TPU) == {"while.outer": 4, "while.inner": 3}


@pytest.mark.parametrize(
    ("fault", "changed"),
    [
        (("%peeled = s32[]{:T(128)} constant(1)", "%peeled = s32[]{:T(128)} constant(0)"), 5),
        (("compare(%i.4, %five), direction=LT", "compare(%i.4, %five), direction=LE"), 5),
        (("compare(%i.4, %five), direction=LT", "compare(%five, %i.4), direction=GT"), 4),
        (("compare(%i.4, %five), direction=LT", "compare(%i.4, %five), direction=NE"), 4),
        (("compare(%i.4, %five), direction=LT", "compare(%i.4, %five), direction=GT"), 0),
        (("%one.3 = s32[]{:T(128)} constant(1)", "%one.3 = s32[]{:T(128)} constant(3)"), 2),
        (("%one.3 = s32[]{:T(128)} constant(1)", "%one.3 = s32[]{:T(128)} constant(-1)"), None),
        (("add(%i.3, %one.3)", "multiply(%i.3, %one.3)"), None),
        (("%peeled = s32[]{:T(128)} constant(1)", "%peeled = s32[]{:T(128)} parameter(2)"), None),
    ],
)
def test_loops_of_other_kinds(fault, changed):
    assert TPU.count(fault[0]) == 1
    assert loops(TPU.replace(*fault))["while.outer"] == changed


def test_gpu_loops_say_how_often_and_need_not():
    assert loops(GPU) == {"while": 7}
    unsaid = GPU.replace('"known_trip_count":{"n":"7"},', "")
    assert unsaid != GPU
    assert loops(unsaid) == {"while": 7}


IN_A_BRANCH = """HloModule branches

%body (p: (s32[], s32[])) -> (s32[], s32[]) {
  %p = (s32[], s32[]) parameter(0)
  %i = s32[] get-tuple-element(%p), index=0
  %n = s32[] get-tuple-element(%p), index=1
  %one = s32[] constant(1)
  %next = s32[] add(%one, %i)
  ROOT %out = (s32[], s32[]) tuple(%next, %n)
}

%condition (q: (s32[], s32[])) -> pred[] {
  %q = (s32[], s32[]) parameter(0)
  %j = s32[] get-tuple-element(%q), index=0
  %m = s32[] get-tuple-element(%q), index=1
  ROOT %less = pred[] compare(%j, %m), direction=LT
}

%some (a: (s32[], s32[])) -> (s32[], s32[]) {
  %a = (s32[], s32[]) parameter(0)
  ROOT %while.first = (s32[], s32[]) while(%a), condition=%condition, body=%body
}

%other (b: (s32[], s32[])) -> (s32[], s32[]) {
  %b = (s32[], s32[]) parameter(0)
  ROOT %while.second = (s32[], s32[]) while(%b), condition=%condition, body=%body
}

ENTRY %main (k: s32[]) -> (s32[], s32[]) {
  %k = s32[] parameter(0)
  %zero = s32[] constant(0)
  %six = s32[] constant(6)
  %two = s32[] constant(2)
  %left = (s32[], s32[]) tuple(%zero, %six)
  %right = (s32[], s32[]) tuple(%two, %six)
  ROOT %e = (s32[], s32[]) conditional(%k, %left, %right), branch_computations={%some, %other}
}
"""


def test_a_branch_gets_its_own_operand():
    assert loops(IN_A_BRANCH) == {"while.first": 6, "while.second": 4}


SHORT = """HloModule short

%body (p: (s32[], (s32[2,3], f32[4]))) -> (s32[], (s32[2,3], f32[4])) {
  %p = (s32[]{:T(128)}, (s32[2,3]{1,0:T(8,128)}, f32[4]{0})) parameter(0)
  %one = s32[] constant(1)
  %next = s32[] add(%p#0, %one)
  ROOT %out = (s32[]{:T(128)}, (s32[2,3]{1,0:T(8,128)}, f32[4]{0})) tuple(%next, %p#1)
}

%condition (q: (s32[], (s32[2,3], f32[4]))) -> pred[] {
  %five = s32[] constant(5)
  %q = (s32[]{:T(128)}, (s32[2,3]{1,0:T(8,128)}, f32[4]{0})) parameter(0)
  ROOT %less = pred[] compare(%q#0, %five), direction=LT
}

ENTRY %main (x: bf16[8,16], w: bf16[2,16,4], n: s32[2], t: (s32[2,3], f32[4])) -> s32[] {
  %x = bf16[8,16]{1,0} parameter(0)
  %w = bf16[2,16,4]{2,1,0} parameter(1)
  %n = s32[2] parameter(2)
  %t = (s32[2,3], f32[4]) parameter(3)
  %zero = s32[] constant(0)
  %ragged-dot-metadata = (s32[3], s32[2]) custom-call(%n), custom_call_target="tpu_custom_call"
  %ragged-dot-none.1 = f32[8,4]{1,0} custom-call(%ragged-dot-metadata#1, %x, %w), custom_call_target="tpu_custom_call"
  %ragged-dot-none.2 = f32[2,16,4] custom-call(%ragged-dot-metadata#0, %x, %ragged-dot-none.1), custom_call_target="tpu_custom_call"
  %first = (s32[]{:T(128)}, (s32[2,3]{1,0:T(8,128)}, f32[4]{0})) tuple(%zero, %t)
  %while.1 = (s32[]{:T(128)}, (s32[2,3]{1,0:T(8,128)}, f32[4]{0})) while(%first), condition=%condition, body=%body
  ROOT %end = s32[] copy(%while.1#0)
}
"""  # noqa: E501


def test_elements_of_tuples_without_an_instruction_of_their_own():
    assert loops(SHORT) == {"while.1": 5}
    element = hlo.parse(SHORT).computations["body"].instructions["p#1"]
    assert list(map(str, element.arrays)) == ["s32[2,3]", "f32[4]"]
    # Each of 8 rows meets 16 x 4 numbers, in the product and in the gradient of its matrices.
    counts = counting.count(SHORT)
    assert counts.flops == 2 * (2 * 8 * 16 * 4)
    assert not counts.notes


def test_tpu_program():
    counts = counting.count(TPU)
    # 4 outer passes of 3 products [32, 128] x [128, 128]; 32 x 16 products of [128, 64] and its
    # transpose, which the convolution's dilation makes of them; what the kernel states.
    products = 4 * 3 * 2 * 32 * 128 * 128
    attention = 32 * 16 * 2 * 128 * 128 * 64
    # Splash backward to queries: scores, gradients of results and of queries, in the 10 of 4 x 4
    # blocks of 128 that a causal mask leaves.
    splash = 2 * 2 * 4 * (10 * 128 * 128) * (48 + 32 + 48)
    assert counts.flops == products + attention + splash + 5000
    x, w = 32 * 128 * 2, 128 * 128 * 2
    assert counts.traffic == {
        # One of two is on the sparse core: both gather [64, 128] to [128, 128] in pairs.
        "all-gather": Traffic(2, 8, 8 * w, 8 * w / 2, 0),
        # Sent to 3 other slices: 2 * 3 / 4 of the operand, nothing of it within the slice.
        "all-reduce": Traffic(1, 1, x, 0, 2 * 3 / 4 * x),
        "collective-permute": Traffic(1, 1, x, x, 0),
    }
    assert counts.notes == ("no FLOPs known of kernel jit(step)/silent",)
    # Space 1 is on the chip: the inner loop reads its weight and nothing else. Of the stack of
    # weights a pass reads and writes one slice; each gather reads half a weight and writes one.
    outer = w / 2 * 2 + 2 * (w / 2 + w) + 3 * w
    queries, scores = 32 * 128 * 16 * 64 * 2, 32 * 16 * 128 * 128 * 2
    entry = x + queries + (queries + scores) + x + 3 * 2 * x
    assert counts.moved == 4 * outer + entry


def test_gpu_program_in_nodes():
    counts = counting.count(GPU, [device // 8 for device in range(16)])
    assert counts.flops == 7 * 2 * 64 * 32 * 64
    y, x, g = 64 * 64 * 2, 64 * 32 * 2, 1024 * 4
    assert counts.traffic == {
        # Every second device: 4 in each of 2 nodes.
        "all-to-all": Traffic(1, 7, 7 * y, 7 * y * 3 / 8, 7 * y * 4 / 8),
        # In the larger branch; pairs of neighbours.
        "all-gather": Traffic(1, 1, 2 * x, x, 0),
        # 16 devices: within a node twice 7/8, between 2 nodes twice 1/2 of an eighth.
        "all-reduce": Traffic(1, 1, g, 2 * 7 / 8 * g, 2 * 1 / 2 * g / 8),
        "reduce-scatter": Traffic(1, 1, g, 7 / 8 * g, 0),
    }
    assert counts.near == 7 * y * 3 / 8 + x + (2 * 7 / 8 + 7 / 8) * g
    assert counts.far == 7 * y / 2 + g / 8
    assert counts.notes == ("conditional jit(step)/cond: its larger branch counted",)
    gemm = x + x + y  # its workspace is nobody's traffic
    body = gemm + 2 * y + 2 * x
    branch = 2 * x
    start = 2 * g + (g + g / 8)
    assert counts.moved == 7 * body + branch + start + 2 * g


@pytest.mark.parametrize(
    ("target", "slices", "devices"),
    [
        ('"{1,2}x{0:3}"', 2, 2),
        ('"{1:4}x{0:3}"', 4, 4),
        ("{{100000,200000},{100001,200001}}", 2, 2),
        ("{{100000,100001,200000,200001}}", 2, 4),
    ],
)
def test_all_to_all_between_slices(target, slices, devices):
    text = TPU.replace('"{1,2,3,4}x{0:15}"', target).replace("ALL_REDUCE", "ALL_TO_ALL")
    x = 32 * 128 * 2
    near = (devices // slices - 1) / devices * x
    far = (devices - devices // slices) / devices * x
    assert counting.count(text).traffic["all-to-all"] == Traffic(1, 1, x, near, far)


def test_text_without_a_program_is_refused():
    with pytest.raises(ValueError, match=r"no ENTRY computation.*compiled\.as_text"):
        counting.count("HloModule empty")


def test_padding_and_memory_space():
    array = hlo.arrays_of("bf16[3,4,100]{2,1,0:T(8,128)(2,1)S(1)}")[0]
    assert (array.bytes, array.padded_bytes, array.space) == (2400, 3 * 8 * 128 * 2, 1)
    swapped = hlo.arrays_of("f32[100,4]{0,1:T(8,128)}")[0]
    assert swapped.padded_bytes == 128 * 8 * 4
    scalar, packed = hlo.arrays_of("(s32[]{:T(128)}, s4[7]{0})")
    assert (scalar.padded_bytes, packed.bytes) == (4, 3.5)
