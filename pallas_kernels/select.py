"""Which implementation of an operation runs: its `implementation=` argument, `prefer`, or the first
that fits."""

import functools
import logging
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager

import jax

from pallas_kernels.chip import Unsupported, chip, has_fp8

Implementations = Mapping[str, Callable]

# All names that tables of implementations use, so that a misspelt preference is an error.
NAMES = (
    *("gpu", "tpu", "tpu_wide", "dequantize_bf16", "dequantize", "reference"),
    *("blocks", "ragged_dot", "batched"),
)

# Part of the key of jax's caches: a function traced under one preference is traced again under
# another.
_preferred = jax.make_user_context(None)


def prefer(name: str | None) -> AbstractContextManager:
    """A context in which `implementation=None` means `name`, for operations that have it.

    As with the argument, that implementation runs or raises. Safe around and inside `jax.jit`.
    """
    if name is not None and name not in NAMES:
        raise ValueError(f"implementation {name!r}; there are {', '.join(NAMES)}")
    return _preferred(name)


def named(op: str, table: Implementations, implementation: str | None) -> Callable | None:
    """The implementation of `op` that the argument names or else the context prefers, or None."""
    if implementation is None:
        return table.get(_preferred.value)
    if implementation not in table:
        raise ValueError(f"{op}: implementation {implementation!r}; there are {sorted(table)}")
    return table[implementation]


def run(op: str, table: Implementations, implementation: str | None, *args, **options):
    """Calls the one implementation that is named; or the first of `table` that takes the arguments.

    An implementation that does not raises `Unsupported`. When none does, all their reasons come in
    one ExceptionGroup. What the default took, and why nothing before it, is logged to
    "pallas_kernels".
    """
    chosen = named(op, table, implementation)
    if chosen is not None:
        try:
            return chosen(*args, **options)
        except Unsupported as reason:
            raise Unsupported(
                f"{reason}; name another implementation, or leave it to the default"
            ) from None
    reasons = {}
    for name in in_order(table):
        try:
            result = table[name](*args, **options)
        except Unsupported as reason:
            reasons[name] = reason
        else:
            _tell(op, name, reasons, args)
            return result
    raise ExceptionGroup(
        f"no implementation of {op} takes these arguments here", list(reasons.values())
    )


def in_order(table: Implementations) -> list[str]:
    """The names of `table` as the default tries them here.

    BF16 factors go first on TPUs that have no faster ones, before a kernel for results and not for
    speed; and last on CPUs, which multiply FP32 as fast.
    """
    here, bf16 = chip(), "dequantize_bf16"
    first = here.platform == "tpu" and not has_fp8(here)
    last = here.platform == "cpu"
    return sorted(table, key=lambda name: (name == bf16) * (last - first))


def _tell(op: str, name: str, reasons: Mapping[str, Unsupported], args: tuple) -> None:
    shapes = ", ".join(f"{one.dtype}{one.shape}" for one in args if hasattr(one, "shape"))
    refused = "; ".join(map(str, reasons.values())) or "the first that is tried"
    _log_once(logging.INFO, f"{op} of {shapes} takes {name!r}: {refused}")
    if kernel := reasons.get(chip().platform):
        _log_once(logging.WARNING, f"{op} goes without its kernel and takes {name!r}: {kernel}")


@functools.cache
def _log_once(level: int, message: str) -> None:
    logging.getLogger("pallas_kernels").log(level, message)
