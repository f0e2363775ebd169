"""The least time that a step can take on given chips."""

import dataclasses
import math

from dsjax.plan.chips import Chip
from dsjax.plan.counting import Counts


@dataclasses.dataclass(frozen=True)
class Roofline:
    """Seconds of one step on one device if each part ran at its full rate.

        compute   FLOPs of the program / peak, of products of FP8 with FP8 / its peak
        memory    bytes that its instructions read and write in HBM / HBM bandwidth
        near      bytes sent within the slice or node / ICI (NVLink) bandwidth of the device
        far       bytes sent to other slices or nodes / DCN bandwidth

    `useful` are the FLOPs of the step and device by the model's formula, `peak` the BF16
    rate, which MFU refers to, `links` the names of the last two.
    """

    compute: float
    memory: float
    near: float
    far: float
    useful: float
    peak: float
    links: tuple[str, str] = ("ICI", "DCN")

    @property
    def parts(self) -> dict[str, float]:
        near, far = self.links
        return {"compute": self.compute, "HBM": self.memory, near: self.near, far: self.far}

    @property
    def overlapped(self) -> float:
        """The longest part, if all others hide behind it: no step can be shorter."""
        return max(self.parts.values())

    @property
    def in_turn(self) -> float:
        """All parts, one after the other: nothing hides."""
        return math.fsum(self.parts.values())

    @property
    def bound(self) -> str:
        """The part that is longest."""
        return max(self.parts, key=self.parts.__getitem__)

    @property
    def best_mfu(self) -> float:
        """useful / peak / overlapped: more is impossible with this program."""
        return self.useful / self.peak / self.overlapped

    @property
    def mfu_in_turn(self) -> float:
        return self.useful / self.peak / self.in_turn


def roofline(counts: Counts, useful: float, chip: Chip) -> Roofline:
    """`counts` of one device and step, `useful` FLOPs of the same.

    What the compiler turned from FP8 into BF16 before it is multiplied counts at the rate of BF16.

    A collective that crosses the links of one dimension of a torus only, or of some links at a
    time, is slower than all links together: `near` is a bound, as everything here.
    """
    return Roofline(
        (counts.flops - counts.fp8_flops) / chip.bf16_flops + counts.fp8_flops / chip.fp8_flops,
        counts.moved / chip.hbm_bandwidth,
        counts.near / chip.ici_bandwidth,
        counts.far / chip.dcn_bandwidth,
        useful,
        chip.bf16_flops,
        chip.links,
    )
