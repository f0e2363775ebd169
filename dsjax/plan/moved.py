"""Bytes that instructions of a compiled program read from a device's main memory and write to it.

`compiled.cost_analysis()` says so too, but counts the body of a loop once.
"""

import math
from collections.abc import Callable

from dsjax.plan.dots import GEMM
from dsjax.plan.hlo import Array, Computation, Instruction, Module

# Names and shapes change, or another computation does the work, or it has been counted.
FREE = {
    *("parameter", "constant", "get-tuple-element", "tuple", "bitcast", "after-all", "iota"),
    *("while", "conditional", "call", "call-start", "async-start", "fusion-start"),
    *("partition-id", "replica-id", "optimization-barrier", "add-dependency", "recv", "domain"),
}
HOST = 5
SLICES = ("dynamic-slice", "slice", "gather")


def moved(instruction: Instruction, within: Computation, module: Module) -> float:
    """Operands and results in main memory, each once; of slices and updates only what they touch.

    A fusion reads of an operand that it only slices the slices, and writes of a result that it only
    updates the update. Scalars and the workspace of a library's product count nothing.
    """
    if instruction.opcode in FREE or instruction.opcode.endswith(("-done", "-update")):
        return 0.0
    if 'custom_call_target="AllocateBuffer"' in instruction.attributes:
        return 0.0

    def in_memory(array: Array) -> float:
        on_chip = module.is_tpu and array.space
        return array.bytes if array.shape and not on_chip and array.space != HOST else 0.0

    def size(name: str) -> float:
        return math.fsum(map(in_memory, within.instructions[name].arrays))

    if instruction.opcode == "fusion":
        return _fusion(instruction, within, module, in_memory)
    if instruction.opcode.endswith("-start") or instruction.opcode == "send":
        # The result of a start repeats its operands.
        return 2 * math.fsum(map(size, set(instruction.operands)))
    is_product = instruction.opcode == "custom-call" and GEMM.search(instruction.attributes)
    written = math.fsum(map(in_memory, instruction.arrays[: 1 if is_product else None]))
    if instruction.opcode in SLICES:
        return 2 * written
    if instruction.opcode == "dynamic-update-slice":
        return 2 * size(instruction.operands[1])
    return written + math.fsum(map(size, set(instruction.operands)))


def _fusion(
    fusion: Instruction, within: Computation, module: Module, in_memory: Callable[[Array], float]
) -> float:
    inner = module.computations[fusion.called["calls"]]
    total = 0.0
    for instruction in inner.instructions.values():
        if instruction.opcode == "parameter":
            outer = within.instructions[fusion.operands[int(instruction.inside)]]
            whole = math.fsum(map(in_memory, outer.arrays))
            total += min(whole, _read(instruction.name, inner, module)) if whole else 0.0
    roots = [inner.instructions[inner.root]]
    if roots[0].opcode == "tuple":
        roots = [inner.instructions[name] for name in roots[0].operands]
    for array, root in zip(fusion.arrays, roots, strict=False):
        total += min(in_memory(array), _written(root, inner))
    return total


def _read(name: str, inner: Computation, module: Module) -> float:
    """What the users of a fusion's operand read of it, infinite if one reads all."""
    total = 0.0
    for user in inner.instructions.values():
        if name not in user.operands:
            continue
        if user.opcode == "bitcast":
            total += _read(user.name, inner, module)
        elif user.opcode == "fusion":
            nested = module.computations[user.called["calls"]]
            for own in nested.instructions.values():
                if own.opcode == "parameter" and user.operands[int(own.inside)] == name:
                    total += _read(own.name, nested, module)
        elif user.opcode in SLICES and user.operands[0] == name:
            total += user.arrays[0].bytes
        elif user.opcode != "dynamic-update-slice" or user.operands[0] != name:
            return float("inf")
    return total


def _written(root: Instruction, inner: Computation) -> float:
    """What a fusion writes into one result, infinite for all of it."""
    while root.opcode == "bitcast":
        root = inner.instructions[root.operands[0]]
    if root.opcode != "dynamic-update-slice":
        return float("inf")
    return inner.instructions[root.operands[1]].arrays[0].bytes
