"""What chips can do and hold, and the names of many of them together: `v5p:8x8x16`, `h100:16x8`."""

import dataclasses
import math
import re

GIB = 2**30


@dataclasses.dataclass(frozen=True, kw_only=True)
class Chip:
    """One kind of chip. All figures are per jax device, of which a chip has `devices`.

    `name` is how people call it, `key` how a topology names it, `kinds` are the `device_kind`s that
    jax may report. Peaks are dense FLOP/s (`fp8_flops` is the BF16 rate where there is nothing
    faster), bandwidths bytes/s: `hbm_bandwidth` to memory, `ici_bandwidth` out of the device over
    all its links to chips of its slice or node (one direction), `dcn_bandwidth` to other ones.
    """

    name: str
    key: str
    kinds: tuple[str, ...]
    devices: int = 1
    hbm: float
    bf16_flops: float
    fp8_flops: float
    hbm_bandwidth: float
    ici_bandwidth: float
    dcn_bandwidth: float

    @property
    def is_tpu(self) -> bool:
        return self.name.startswith("TPU")

    @property
    def links(self) -> tuple[str, str]:
        """What people call the way to near devices, and to far ones."""
        return ("ICI", "DCN") if self.is_tpu else ("NVLink", "network")


# TPU: cloud.google.com/tpu/docs/{v5e,v5p,v6e,tpu7x}, read 2026-11; ICI is half of the
# "bidirectional" figure there, DCN the Gb/s per chip (v5e: per pod / 256). Memory is what libtpu
# 0.0.50 lets a program have. GPU: data sheets of the SXM boards; memory as XLA describes the
# device, NVLink one way (half of the data sheet's figure), one 400 Gb/s adapter per GPU as in DGX.
CHIPS = (
    Chip(
        name="TPU v5e",
        key="v5e",
        kinds=("TPU v5 lite", "TPU v5e"),
        hbm=15.75 * GIB,
        bf16_flops=197e12,
        fp8_flops=197e12,
        hbm_bandwidth=819e9,
        ici_bandwidth=200e9,
        dcn_bandwidth=25e9 / 8,
    ),
    Chip(
        name="TPU v5p",
        key="v5p",
        kinds=("TPU v5", "TPU v5p"),
        hbm=95.73 * GIB,
        bf16_flops=459e12,
        fp8_flops=459e12,
        hbm_bandwidth=2765e9,
        ici_bandwidth=600e9,
        dcn_bandwidth=50e9 / 8,
    ),
    Chip(
        name="TPU v6e",
        key="v6e",
        kinds=("TPU v6 lite", "TPU v6e"),
        hbm=31.24 * GIB,
        bf16_flops=918e12,
        fp8_flops=918e12,
        hbm_bandwidth=1638e9,
        ici_bandwidth=400e9,
        dcn_bandwidth=100e9 / 8,
    ),
    Chip(
        name="TPU7x",
        key="tpu7x",
        kinds=("TPU7x",),
        devices=2,
        hbm=94.74 * GIB,
        bf16_flops=1153.5e12,
        fp8_flops=2307e12,
        hbm_bandwidth=3690e9,
        ici_bandwidth=300e9,
        dcn_bandwidth=50e9 / 8,
    ),
    Chip(
        name="H100",
        key="h100",
        kinds=("NVIDIA H100 80GB HBM3",),
        hbm=84.942979072e9,
        bf16_flops=989e12,
        fp8_flops=1979e12,
        hbm_bandwidth=3350e9,
        ici_bandwidth=450e9,
        dcn_bandwidth=400e9 / 8,
    ),
    Chip(
        name="H200",
        key="h200",
        kinds=("NVIDIA H200", "NVIDIA H200 141GB HBM3e"),
        hbm=151.397597184e9,
        bf16_flops=989e12,
        fp8_flops=1979e12,
        hbm_bandwidth=4800e9,
        ici_bandwidth=450e9,
        dcn_bandwidth=400e9 / 8,
    ),
    Chip(
        name="B200",
        key="b200",
        kinds=("NVIDIA B200",),
        hbm=191.514411008e9,
        bf16_flops=2250e12,
        fp8_flops=4500e12,
        hbm_bandwidth=7672e9,
        ici_bandwidth=900e9,
        dcn_bandwidth=400e9 / 8,
    ),
)
BY_KEY = {chip.key: chip for chip in CHIPS}
BY_KIND = {kind: chip for chip in CHIPS for kind in chip.kinds}

# Dimensions of the torus that a slice is cut from.
DIMENSIONS = {"v5e": 2, "v6e": 2, "v5p": 3, "tpu7x": 3}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Topology:
    """`slices` TPU slices of `shape`, or GPUs with `shape` (nodes, GPUs per node) and one slice."""

    chip: Chip
    shape: tuple[int, ...]
    slices: int = 1

    @property
    def name(self) -> str:
        """As it is written on the command line, without the slices."""
        return f"{self.chip.key}:{'x'.join(map(str, self.shape))}"

    @property
    def num_chips(self) -> int:
        return math.prod(self.shape) * self.slices

    @property
    def num_devices(self) -> int:
        return self.num_chips * self.chip.devices

    @property
    def joined(self) -> int:
        """Devices that reach each other without the data-center network."""
        return (math.prod(self.shape) if self.chip.is_tpu else self.shape[1]) * self.chip.devices

    def slice_of(self) -> list[int]:
        """The slice (or node) of each device, in the order in which devices are listed."""
        return [device // self.joined for device in range(self.num_devices)]


def topology(text: str, slices: int = 1) -> Topology:
    """Reads `v5p:8x8x16` or `h100:16x8` (nodes x GPUs per node); ValueError says what is known."""
    key, colon, sizes = text.partition(":")
    known = ", ".join(BY_KEY)
    if key not in BY_KEY:
        raise ValueError(
            f"topology={text}: {key!r} is no chip known here; write CHIP:SIZES with one of {known}"
        )
    chip = BY_KEY[key]
    wanted = DIMENSIONS.get(key, 2)
    example = "16x8" if not chip.is_tpu else "x".join(["4"] * wanted)
    meaning = "nodes x GPUs per node" if not chip.is_tpu else "chips along each side of a slice"
    if not colon or not re.fullmatch(r"[1-9]\d*(x[1-9]\d*)*", sizes):
        raise ValueError(f"topology={text}: write {key}:{example}, {meaning}")
    shape = tuple(map(int, sizes.split("x")))
    if len(shape) != wanted:
        raise ValueError(
            f"topology={text} has {len(shape)} sizes, {chip.name} takes {wanted} ({meaning}): "
            f"write {key}:{example}"
        )
    if slices < 1 or (slices > 1 and not chip.is_tpu):
        rule = "it must be at least 1" if slices < 1 else "GPUs have no slices, only nodes"
        raise ValueError(f"slices={slices}: {rule}; choose 1, or more of a TPU")
    return Topology(chip=chip, shape=shape, slices=slices)
