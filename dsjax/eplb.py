"""Expert re-placement for hot experts: busy ones get copies, and copies are spread over devices.

Serving counts the tokens of every expert; every few minutes `rebalance` turns the counts into a new
placement with equally many slots on each device (DeepSeek-V3 report section 3.4; the algorithm of
deepseek-ai/EPLB). Routing stays as it is: a token goes to any one copy of the expert that it chose,
so outputs do not change. NumPy in, NumPy out: this runs on the host.
"""

import heapq
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int, Num


class Placement(NamedTuple):
    """Which expert lies in which of Z physical slots; device d holds the d-th equal run of slots.

    `logical_to_physical_LEX` lists the slots of each expert in rising order, then -1. Its width is
    that of Z - E + 1 copies whatever the loads are, so a new placement compiles nothing anew.
    """

    physical_to_logical_LZ: Int[np.ndarray, "L Z"]
    logical_to_physical_LEX: Int[np.ndarray, "L E _"]
    replicas_LE: Int[np.ndarray, "L E"]


def rebalance(
    load_LE: Num[np.ndarray, "L E"],
    num_replicas: int,
    num_groups: int,
    num_nodes: int,
    num_devices: int,
) -> Placement:
    """Places `num_replicas` copies of the experts so that all devices get about the same load.

    Where `num_nodes` divides `num_groups`, whole expert groups are packed into nodes, experts are
    copied inside their node, and copies are packed onto the node's devices: group-limited routing
    then still sends a token to few nodes. Otherwise the same happens as if all were one group in
    one node. Equal inputs give equal placements. Raises ValueError where the counts do not divide.
    """
    _check(load_LE, num_replicas, num_groups, num_nodes, num_devices)
    if num_groups % num_nodes:
        num_groups = num_nodes = 1
    # Counts may come unsigned, which cannot be negated; float32 would not tell large ones apart.
    layers = [
        _layer(load_E, num_replicas, num_groups, num_nodes, num_devices)
        for load_E in load_LE.astype(np.float64)
    ]
    return _placement(np.stack(layers), load_LE.shape[1])


def in_order(num_layers: int, num_experts: int) -> Placement:
    """Every expert once, by its number: how a model lies before any re-placement."""
    expert_LZ = np.tile(np.arange(num_experts, dtype=np.int32), (num_layers, 1))
    return _placement(expert_LZ, num_experts)


def device_load(
    load_LE: Num[np.ndarray, "L E"], placement: Placement, num_devices: int
) -> Float[np.ndarray, "L devices"]:
    """Tokens that each device gets if the copies of an expert share its load evenly."""
    expert_LZ = placement.physical_to_logical_LZ
    num_slots = expert_LZ.shape[1]
    if num_devices < 1 or num_slots % num_devices:
        raise ValueError(
            f"{num_slots} slots do not divide over {num_devices} devices; choose a number of "
            f"devices that divides {num_slots}"
        )
    slot_load_LZ = np.take_along_axis(load_LE / placement.replicas_LE, expert_LZ, axis=1)
    return slot_load_LZ.reshape(len(load_LE), num_devices, -1).sum(-1)


def imbalance(load_LX: Float[np.ndarray, "L devices"]) -> Float[np.ndarray, " L"]:
    """Busiest device over the mean of all, per layer: how much longer a layer takes than it could.

    1 is perfect balance, and what a layer without any load has.
    """
    mean_L = load_LX.mean(1)
    return np.divide(load_LX.max(1), mean_L, out=np.ones_like(mean_L), where=mean_L > 0)


def _layer(
    load_E: Float[np.ndarray, " E"],
    num_replicas: int,
    num_groups: int,
    num_nodes: int,
    num_devices: int,
) -> Int[np.ndarray, " Z"]:
    """The expert in each slot of one layer."""
    members_GX = np.arange(len(load_E)).reshape(num_groups, -1)
    slots = []
    for groups in _packed(load_E[members_GX].sum(1), num_nodes):
        experts = members_GX[groups].ravel()
        copies = experts[_replicated(load_E[experts], num_replicas // num_nodes)]
        share = load_E[copies] / np.bincount(copies)[copies]
        slots.append(copies[_packed(share, num_devices // num_nodes)].ravel())
    return np.concatenate(slots)


def _packed(load_X: Float[np.ndarray, " X"], num_packs: int) -> Int[np.ndarray, "packs room"]:
    """Items per pack, equally many: the heaviest first, each into the lightest pack with room."""
    room = len(load_X) // num_packs
    if room == 1:
        return np.arange(num_packs)[:, None]  # Nothing to balance: what lies in order stays.
    packs = [[] for _ in range(num_packs)]
    with_room = [(0.0, pack) for pack in range(num_packs)]
    for item in np.argsort(-load_X, kind="stable"):
        load, lightest = heapq.heappop(with_room)
        packs[lightest].append(item)
        if len(packs[lightest]) < room:
            heapq.heappush(with_room, (load + load_X[item], lightest))
    return np.array(packs)


def _replicated(load_X: Float[np.ndarray, " X"], num_slots: int) -> Int[np.ndarray, " Z"]:
    """The item of each slot: each once, then again and again the one with the most load per copy.

    No other numbers of copies have a lower maximum of load per copy.
    """
    slots, copies_X = list(range(len(load_X))), np.ones(len(load_X))
    while len(slots) < num_slots:
        hottest = int(np.argmax(load_X / copies_X))
        slots.append(hottest)
        copies_X[hottest] += 1
    return np.array(slots)


def _placement(expert_LZ: Int[np.ndarray, "L Z"], num_experts: int) -> Placement:
    num_layers, num_slots = expert_LZ.shape
    replicas_LE = np.zeros((num_layers, num_experts), np.int32)
    slots_LEX = np.full((num_layers, num_experts, num_slots - num_experts + 1), -1, np.int32)
    for (layer, slot), expert in np.ndenumerate(expert_LZ):
        slots_LEX[layer, expert, replicas_LE[layer, expert]] = slot
        replicas_LE[layer, expert] += 1
    return Placement(expert_LZ.astype(np.int32), slots_LEX, replicas_LE)


def _check(load_LE, num_replicas: int, num_groups: int, num_nodes: int, num_devices: int) -> None:
    num_layers, num_experts = load_LE.shape
    if not (num_layers and num_experts):
        raise ValueError(f"load has shape {load_LE.shape}; give it a layer and an expert at least")
    if not (np.isfinite(load_LE).all() and (load_LE >= 0).all()):
        raise ValueError(
            "load holds a negative or non-finite number; give token counts per layer and expert"
        )
    counts = {"num_groups": num_groups, "num_nodes": num_nodes, "num_devices": num_devices}
    for name, count in counts.items():
        if count < 1:
            raise ValueError(f"{name}={count} must be at least 1")
    if num_replicas < num_experts:
        raise ValueError(
            f"num_replicas={num_replicas} leaves some of the {num_experts} experts without a slot; "
            f"choose {num_experts} or more"
        )
    for name, total, part in [
        ("num_replicas", num_replicas, "num_devices"),
        ("experts", num_experts, "num_groups"),
        ("num_devices", num_devices, "num_nodes"),
    ]:
        if total % counts[part]:
            raise ValueError(
                f"{name}={total} does not divide over {part}={counts[part]}; choose a {part} that "
                f"divides {total}, or {name} as a multiple of {counts[part]}"
            )
