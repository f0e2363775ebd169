"""How often the loops of a compiled program run, where the text tells."""

import re
from typing import NamedTuple

from dsjax.plan.hlo import Computation, Instruction, Module

KNOWN = re.compile(r'"known_trip_count":\{"n":"?(\d+)')
DIRECTION = re.compile(r"\bdirection=(\w+)")
INDEX = re.compile(r"\bindex=(\d+)")
MIRRORED = {"LT": "GT", "GT": "LT", "LE": "GE", "GE": "LE", "NE": "NE"}
# These hand on the scalar that they are given.
SAME = ("copy", "bitcast", "convert", "copy-done", "copy-start", "reshape", "optimization-barrier")


class Frame(NamedTuple):
    """A computation as one instruction of another frame calls it; the entry is called by none."""

    computation: Computation
    caller: "Frame | None" = None
    call: Instruction | None = None


class _Value(NamedTuple):
    """`offset`, or the loop's variable number `index` plus `offset`."""

    index: int | None
    offset: int


def trip_count(module: Module, frame: Frame, loop: Instruction) -> int | None:
    """How often the body of `loop` (an instruction of `frame`) runs; None if only the run tells.

    XLA notes it for some backends. Otherwise the condition must compare a variable, which begins
    at a constant and moves by a constant, with a constant: `lax.scan` and `fori_loop` become that.
    """
    if found := KNOWN.search(loop.attributes):
        return int(found.group(1))
    called = loop.called
    condition = Frame(module.computations[called["condition"]], frame, loop)
    body = Frame(module.computations[called["body"]], frame, loop)
    place, root = _followed(module, condition, condition.computation.root)
    direction = DIRECTION.search(root.attributes)
    if root.opcode != "compare" or direction is None:
        return None
    sides = [_moving(module, place, name, condition, body) for name in root.operands]
    (left, right), how = sides, direction.group(1)
    if left is None or right is None or how not in MIRRORED:
        return None
    if left.step == 0:
        left, right, how = right, left, MIRRORED[how]
    return _count(left.start, left.step, right.start, how) if right.step == 0 else None


class _Moving(NamedTuple):
    """A value that begins at `start` and moves by `step` with each pass."""

    start: int
    step: int


def _moving(module: Module, frame: Frame, name: str, loop: Frame, body: Frame) -> _Moving | None:
    value = _value(module, frame, name, loop)
    if value is None or value.index is None:
        return None if value is None else _Moving(value.offset, 0)
    after = _element(module, body, body.computation.root, value.index, body)
    start = _element(module, loop.caller, loop.call.operands[0], value.index, None)
    if after is None or after.index != value.index or start is None or start.index is not None:
        return None
    return _Moving(start.offset + value.offset, after.offset)


def _count(start: int, step: int, limit: int, how: str) -> int | None:
    """Passes of `while (x HOW limit) x += step` from x = start; None if it would not end."""
    distance = limit - start
    if how in ("GT", "GE"):
        distance, step = -distance, -step
    if how == "NE":
        return distance // step if step and distance % step == 0 and distance // step >= 0 else None
    if how in ("LE", "GE"):
        distance += 1
    if distance <= 0:
        return 0
    return -(-distance // step) if step > 0 else None


def _followed(module: Module, frame: Frame, name: str) -> tuple[Frame, Instruction]:
    """The instruction that computes `name`, through copies and into and out of calls."""
    instruction = frame.computation.instructions[name]
    if instruction.opcode in SAME and instruction.operands:
        return _followed(module, frame, instruction.operands[0])
    if instruction.opcode in ("call", "fusion"):
        called = instruction.called.get("calls") or instruction.called["to_apply"]
        inner = Frame(module.computations[called], frame, instruction)
        return _followed(module, inner, inner.computation.root)
    if instruction.opcode == "parameter" and frame.call is not None:
        number = _operand(frame, int(instruction.inside))
        if number is not None:
            return _followed(module, frame.caller, frame.call.operands[number])
    return frame, instruction


def _operand(frame: Frame, parameter: int) -> int | None:
    """Which operand of its caller a parameter stands for; None: it changes, being a loop's."""
    if frame.call.opcode == "conditional":
        return 1 + frame.call.branches.index(frame.computation.name)
    return parameter if frame.call.opcode in ("call", "fusion") else None


def _value(module: Module, frame: Frame, name: str, loop: Frame | None) -> _Value | None:
    """An integer scalar, where the variables of `loop` may stay open; None: not so simple."""
    frame, instruction = _followed(module, frame, name)
    if instruction.opcode == "constant":
        literal = instruction.inside.strip("{}")
        return _Value(None, int(literal)) if re.fullmatch(r"-?\d+", literal) else None
    if instruction.opcode == "get-tuple-element":
        index = int(INDEX.search(instruction.attributes).group(1))
        return _element(module, frame, instruction.operands[0], index, loop)
    if instruction.opcode in ("add", "subtract"):
        left, right = (_value(module, frame, operand, loop) for operand in instruction.operands)
        sign = 1 if instruction.opcode == "add" else -1
        if left is None or right is None or (right.index is not None and sign < 0):
            return None
        indices = {left.index, right.index} - {None}
        total = left.offset + sign * right.offset
        return _Value(next(iter(indices), None), total) if len(indices) < 2 else None
    return None


def _element(
    module: Module, frame: Frame, name: str, index: int, loop: Frame | None
) -> _Value | None:
    """Element `index` of the tuple `name`."""
    frame, instruction = _followed(module, frame, name)
    if instruction.opcode == "tuple":
        return _value(module, frame, instruction.operands[index], loop)
    if instruction.opcode == "parameter" and frame.call is not None:
        if loop is not None and frame.computation is loop.computation and frame.call is loop.call:
            return _Value(index, 0)
        if frame.call.opcode == "while":
            return _unchanged(module, frame.caller, frame.call, index, loop)
    if instruction.opcode == "while":
        return _unchanged(module, frame, instruction, index, loop)
    return None


def _unchanged(
    module: Module, frame: Frame, call: Instruction, index: int, loop: Frame | None
) -> _Value | None:
    """What element `index` of a loop was before it, if no pass changes it."""
    body = Frame(module.computations[call.called["body"]], frame, call)
    if _element(module, body, body.computation.root, index, body) != (index, 0):
        return None
    return _element(module, frame, call.operands[0], index, loop)
