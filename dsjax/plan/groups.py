"""Which devices a collective joins, in each of XLA's ways to write it."""

import re

import numpy as np

from dsjax.plan.hlo import Instruction

LISTED = re.compile(r"\breplica_groups=\{((?:\{[\d,]*\},?)*)\}")
IOTA = re.compile(r"\breplica_groups=(\[[\d,]+\]<=\[[\d,]+\](?:T\([\d,]+\))?)")
MESH = re.compile(
    r"\breplica_groups=mesh\[([^\]]*)\](?:, device_ids=\(((?:[^()]|\([\d,]*\))*)\))? \{([^}]*)\}"
)
AXIS = re.compile(r"'([^']*)'(?::\((\d+)\)(\d+))?")
PAIRS = re.compile(r"\bsource_target_pairs=\{((?:\{\d+,\d+\},?)*)\}")
NUMBERS = re.compile(r"\d+")


def _numbers(text: str) -> list[int]:
    return [int(number) for number in NUMBERS.findall(text)]


def pairs(instruction: Instruction) -> list[list[int]]:
    """(source, target) of a collective-permute, without those that stay where they are."""
    found = PAIRS.search(instruction.attributes)
    listed = NUMBERS.findall(found.group(1)) if found else []
    both = zip(map(int, listed[::2]), map(int, listed[1::2]), strict=True)
    return [[source, target] for source, target in both if source != target]


def groups(instruction: Instruction, num_devices: int) -> list[list[int]]:
    """The device groups of a collective; ValueError for a notation that is not known here.

    {{0,1},{2,3}}                  listed; {} is all devices together
    [2,4]<=[8]                     0..7 as 2 rows of 4; [2,4]<=[4,2]T(1,0) transposed before
    mesh['a'=2,'b'=4] {'b'}        along axis b of a mesh of 0..7
    """
    if found := LISTED.search(instruction.attributes):
        return [_numbers(one) for one in found.group(1).split("}") if _numbers(one)] or [
            list(range(num_devices))
        ]
    if found := IOTA.search(instruction.attributes):
        return _iota(found.group(1)).tolist()
    if found := MESH.search(instruction.attributes):
        return _along(*found.groups()).tolist()
    raise ValueError(
        f"{instruction.opcode} {instruction.name} has no replica_groups that can be read here: "
        f"{instruction.attributes[:160]!r}; dsjax/plan/groups.py lists the notations"
    )


def _iota(text: str) -> np.ndarray:
    """`[2,4]<=[4,2]T(1,0)`: 0..7 as [4, 2], transposed, as [2, 4]."""
    shape, _, rest = text.partition("<=")
    return _transposed(rest).reshape(_numbers(shape))


def _transposed(text: str) -> np.ndarray:
    """`[4,2]T(1,0)`."""
    dims, _, order = text.partition("T")
    shape = _numbers(dims)
    return np.arange(np.prod(shape)).reshape(shape).transpose(_numbers(order) or None)


def _along(axes: str, device_ids: str | None, used: str) -> np.ndarray:
    """Rows of devices along axes or parts: of `'a'=16`, `'a':(2)4` is 4 after a first 2."""
    sizes = {name: int(size) for name, size in re.findall(r"'([^']*)'=(\d+)", axes)}
    shape = list(sizes.values())
    if device_ids is None:
        devices = np.arange(np.prod(shape))
    elif "[" in device_ids:
        devices = _transposed(device_ids).reshape(-1)
    else:
        devices = np.array(_numbers(device_ids))
    parts: dict[str, list[int]] = {name: [size] for name, size in sizes.items()}
    wanted = []
    for name, before, size in AXIS.findall(used):
        place = 0
        if size:
            first, middle = int(before), int(size)
            parts[name] = [first, middle, sizes[name] // first // middle]
            place = 1
        wanted.append((name, place))
    places = [(name, k) for name, split in parts.items() for k in range(len(split))]
    split = [size for sizes in parts.values() for size in sizes]
    order = [places.index(axis) for axis in wanted]
    kept = [k for k in range(len(places)) if k not in order]
    joined = int(np.prod([split[k] for k in order]))
    return devices.reshape(split).transpose(kept + order).reshape(-1, joined)
