"""Times one MoE layer, forward and backward, by every way of dispatch on 8 virtual CPU devices.

    python benchmarks/moe_dispatch.py --rounds 7        (a quick look: --tokens 512 --rounds 2)

The layer has V3's routing (8 chosen experts, in 4 of 8 groups) at small sizes, FP32. All contenders
are compiled first and then take turns, so that a machine whose speed drifts slows them all alike.
`1 device` is the same layer on the same tokens without a mesh: virtual devices share the cores, so
the distance to it is what dispatch costs here, and what a network would cost stands in bytes. These
are what the busiest device sends, forward and backward: `formula` counts rows and sums as the
choices ask, `program` all collectives of the compiled layer (weights and statistics of the router
too), and `least` is what no way of moving whole rows goes below. The ragged all-to-all does not run
on CPU: bytes only. A second table counts what V3's node-limited routing spares a network.
"""

import argparse
import functools
import importlib.metadata
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from dsjax import sharding
from dsjax.config import Moe, SigmoidRouter
from dsjax.nn.dispatch import TRANSPORTS
from dsjax.nn.dispatch.rows import fan_out
from dsjax.nn.dispatch.traffic import Sent, bytes_sent, needed, sent
from dsjax.nn.moe import MoeFfn
from dsjax.plan.counting import count

DEVICES, DIM = 8, 256
ROUTER = SigmoidRouter(num_groups=8, kept_groups=4, scale=2.5)
LAYER = Moe(num_experts=64, num_chosen=8, num_shared=0, intermediate_size=128, router=ROUTER)
# Added to the scores of the experts of one device, and of one expert.
SKEWS = {"even": (0.0, 0.0), "one device": (0.2, 0.0), "one expert": (0.0, 9.0)}


class Case(NamedTuple):
    transport: str
    step: Callable[[], object]
    program: str | None


def layer(skew: str) -> MoeFfn:
    module = MoeFfn(LAYER, DIM, std=0.02, rngs=nnx.Rngs(0))
    device, expert = SKEWS[skew]
    share = LAYER.num_experts // DEVICES
    bias_E = jnp.zeros(LAYER.num_experts).at[share : 2 * share].set(device).at[share].add(expert)
    module.router.bias[...] = bias_E
    return module


def gradients(module: MoeFfn, x_BTD: jax.Array):
    def loss(module, x_BTD):
        y_BTD, stats = sharding.unshard(module)(x_BTD, jnp.ones_like(x_BTD[..., 0], bool))
        return (y_BTD**2).sum(), stats.dropped

    return jax.grad(loss, argnums=(0, 1), has_aux=True)(module, x_BTD)


def case(transport: str, skew: str, x_BTD: jax.Array) -> Case:
    """Compiled, and run once."""
    module = layer(skew)
    if transport == "1 device":
        compiled = jax.jit(gradients).lower(module, x_BTD).compile()
        inputs, program = (module, x_BTD), None
    else:
        mesh = sharding.make_mesh(expert=DEVICES)
        with jax.set_mesh(mesh), sharding.layout(sharding.Layout(transport)):
            there = jax.NamedSharding(mesh, sharding.spec("batch"))
            module = jax.device_put(module, sharding.shardings(module, mesh))
            inputs = module, jax.device_put(x_BTD, there)
            compiled = jax.jit(gradients).lower(*inputs).compile()
        program = compiled.as_text()
    step = functools.partial(compiled, *inputs)
    if float(step()[1]) != 0:
        raise RuntimeError(f"{transport}: pairs were dropped")
    return Case(transport, step, program)


def timed(cases: list[Case], rounds: int) -> list[list[float]]:
    seconds: list[list[float]] = [[] for _ in cases]
    for _ in range(rounds):
        for one, times in zip(cases, seconds, strict=True):
            began = time.perf_counter()
            jax.block_until_ready(one.step())
            times.append(time.perf_counter() - began)
    return seconds


def report(tokens: int, skew: str, rounds: int) -> None:
    """Rows of the table for one number of tokens and one skew."""
    x_BTD = jax.random.normal(jax.random.key(1), (DEVICES, tokens // DEVICES, DIM))
    module = layer(skew)
    choice_MK = np.asarray(module.router(x_BTD.reshape(-1, DIM)).choice_MK)
    choice_AMK = choice_MK.reshape(DEVICES, -1, LAYER.num_chosen)
    experts, chosen = LAYER.num_experts, LAYER.num_chosen
    spread = fan_out(
        num_experts=experts,
        num_chosen=chosen,
        num_groups=ROUTER.num_groups,
        kept_groups=ROUTER.kept_groups,
        size=DEVICES,
    )
    cost = functools.partial(bytes_sent, hidden_size=DIM, num_chosen=chosen, itemsize=4)
    away = 1 - np.eye(DEVICES, dtype=int)
    least = sum(cost(Sent((needed(choice_AMK, experts) * away)[None], False)))
    runs = ["1 device", *(name for name in TRANSPORTS if name != "ragged")]
    cases = [case(name, skew, x_BTD) for name in runs]
    middles = [statistics.median(times) for times in timed(cases, rounds)]
    for name in (*runs, "ragged"):
        rate = ratio = rounds_taken = formula = program = "-"
        if name != "1 device":
            on_wire = sent(name, choice_AMK, num_experts=experts, fan_out=spread)
            trips = len(on_wire.rows)
            rounds_taken, formula = str(trips), f"{sum(cost(on_wire)) / 1e6:.2f}"
        if name in runs:
            one, middle = cases[runs.index(name)], middles[runs.index(name)]
            rate, ratio = f"{tokens / middle:,.0f}", f"{middles[0] / middle:.2f}"
            if one.program is not None:
                program = f"{count(one.program, outer_trips=trips).near / 1e6:.2f}"
        print(
            f"| {tokens:,} | {skew} | {name} | {rate} | {ratio} | {rounds_taken} | "
            f"{formula} | {program} | {least / 1e6:.2f} |",
            flush=True,
        )


def destinations(num_devices: int, kept_groups: int | None) -> tuple[float, int]:
    """Devices that hold experts of one token, on average and at most, with V3's 256 experts.

    `kept_groups` of 8 may be chosen from; None: any expert.
    """
    groups, kept = (1, 1) if kept_groups is None else (8, kept_groups)
    router = SigmoidRouter(num_groups=groups, kept_groups=kept, scale=2.5)
    moe = Moe(num_experts=256, num_chosen=8, num_shared=0, intermediate_size=1, router=router)
    tokens_MD = jax.random.normal(jax.random.key(2), (8192, 64))
    choice_MK = np.asarray(MoeFfn(moe, 64, std=1.0, rngs=nnx.Rngs(0)).router(tokens_MD).choice_MK)
    rows_AA = needed(choice_MK.reshape(num_devices, -1, 8), 256)
    most = fan_out(
        num_experts=256, num_chosen=8, num_groups=groups, kept_groups=kept, size=num_devices
    )
    return rows_AA.sum() / len(choice_MK), most


def report_limits() -> None:
    """What groups spare: rows that a token sends, one to each device with an expert of its."""
    print("\nrows per token, V3: 8 of 256 experts, one row per device that has some of them\n")
    print("| devices (or nodes) | 4 of 8 groups | at most | any experts | at most |")
    print("|---|---|---|---|---|")
    for num_devices in (8, 16, 32, 64, 128):
        limited, free = (destinations(num_devices, kept) for kept in (4, None))
        cells = (f"{mean:.2f} | {most}" for mean, most in (limited, free))
        print(f"| {num_devices} | {' | '.join(cells)} |")


def main() -> None:
    parser = argparse.ArgumentParser(description="ways of dispatch on 8 virtual CPU devices")
    parser.add_argument("--rounds", type=int, default=7, help="turns of each contender")
    parser.add_argument("--tokens", default="512,4096", help="of all devices together")
    options = parser.parse_args()
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", DEVICES)
    versions = (f"{name} {importlib.metadata.version(name)}" for name in ("jax", "flax"))
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    print(f"{platform.machine()}, {cores} cores, Python {platform.python_version()}")
    print(f"{', '.join(versions)}\ncommand: {' '.join(sys.argv)}\n")
    print("tokens/s: median, forward + backward; MB per device and layer\n")
    print(
        "| tokens | load | dispatch | tokens/s | of 1 device | rounds | formula | program | least |"
    )
    print("|---|---|---|---|---|---|---|---|---|")
    for tokens in map(int, options.tokens.split(",")):
        for skew in SKEWS:
            report(tokens, skew, options.rounds)
    report_limits()


if __name__ == "__main__":
    main()
