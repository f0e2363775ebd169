"""Rows to experts and back, in `shard_map`; no token is ever dropped, memory is that of even load.

Beyond the dimension key: A devices that share the experts, J destinations of a row, U places in a
buffer.
"""

from jaxtyping import Array, Float, Int

from dsjax import sharding
from dsjax.nn.dispatch.all_to_all import all_to_all
from dsjax.nn.dispatch.local import Experts, through_experts
from dsjax.nn.dispatch.ragged import ragged
from dsjax.nn.dispatch.ring import ring
from dsjax.nn.dispatch.rounds import ROOM
from dsjax.nn.dispatch.rows import Group, Rows

# Each brings rows to the devices that own their experts, and the sums over these back.
TRANSPORTS = {"ring": ring, "all_to_all": all_to_all, "ragged": ragged}


def transport_for(group: Group) -> str:
    """What `dispatch="auto"` takes: a ring where it sends no more than buffers with room would."""
    return "ring" if group.size <= ROOM * group.fan_out else "all_to_all"


def dispatch(
    rows: Rows, experts: Experts, group: Group
) -> tuple[Float[Array, "M D"], Int[Array, ""]]:
    """sum_k weight_k * expert_k(x) for this device's rows, and the pairs its experts were given.

    `experts(rows, sizes)` gets rows sorted by expert and each expert's row count; it is a pytree of
    this device's weights. The transport is `sharding.layout`'s. Raises ValueError for an unknown
    one.
    """
    if group.size == 1:
        return through_experts(
            rows,
            experts,
            first=0,
            num_local=group.num_local,
            even_share=rows.choice_MK.size,
        )
    name = sharding.layout.value.dispatch
    if name == "auto":
        name = transport_for(group)
    if name not in TRANSPORTS:
        raise ValueError(f"dispatch={name!r}; there are auto, {', '.join(sorted(TRANSPORTS))}")
    return TRANSPORTS[name](rows, experts, group)
