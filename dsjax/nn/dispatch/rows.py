"""What travels between devices, and who they are."""

import math
from dataclasses import dataclass
from typing import NamedTuple

import jax
from jaxtyping import Array, Float, Int

from dsjax import sharding


class Rows(NamedTuple):
    """Tokens and the experts chosen for them. A choice beyond the last expert is nobody's."""

    x_MD: Float[Array, "M D"]
    choice_MK: Int[Array, "M K"]
    weight_MK: Float[Array, "M K"]


@dataclass(frozen=True, kw_only=True)
class Group:
    """The devices along `axes` of the mesh, which own `num_local` experts each, in order.

    `fan_out`: on how many of them the experts of one token can lie at most.
    """

    axes: tuple[str, ...]
    num_local: int
    fan_out: int

    @property
    def size(self) -> int:
        return math.prod(map(sharding.axis_size, self.axes))

    @property
    def rank(self) -> int | Int[Array, ""]:
        return jax.lax.axis_index(self.axes) if self.axes else 0

    @property
    def nobody(self) -> int:
        """A choice that no device of the group owns."""
        return self.size * self.num_local

    def agreed(self, number: Int[Array, ""]) -> Int[Array, ""]:
        """The largest `number` of all devices: a loop with collectives inside must be in step."""
        return jax.lax.pmax(number, sharding.cut(*sharding.AXES))


def fan_out(
    *, num_experts: int, num_chosen: int, num_groups: int, kept_groups: int, size: int
) -> int:
    """On how many of `size` devices the experts of one token can lie at most.

    Node-limited routing (V3 report section 2.1.2) keeps the choice within `kept_groups` of
    `num_groups` groups of neighbouring experts, so within the devices that hold these.
    """
    width, num_local = num_experts // num_groups, num_experts // size
    held = (
        (group * width + width - 1) // num_local - group * width // num_local + 1
        for group in range(num_groups)
    )
    return min(num_chosen, size, kept_groups * max(held))
