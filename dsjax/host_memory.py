"""Scratch memory on CPU: kept between steps instead of given back to the kernel."""

import ctypes
import sys

# glibc's mallopt parameters (malloc.h).
_TRIM_THRESHOLD, _MMAP_MAX, _ARENA_MAX = -1, -4, -8


def keep_freed_pages() -> bool:
    """Lets the C library keep large blocks that are freed; whether it could (glibc only).

    XLA's CPU backend allocates a step's scratch memory anew at every step. glibc maps each large
    block freshly and unmaps it when freed, so the kernel zeroes hundreds of MB per step: a fifth of
    the time of a tiny model's step. The process then stays as large as it has ever been. Only
    blocks allocated after the call are concerned; call it before the first computation.
    """
    if sys.platform != "linux":
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    settings = {_MMAP_MAX: 0, _TRIM_THRESHOLD: -1, _ARENA_MAX: 1}
    return all([mallopt(parameter, value) == 1 for parameter, value in settings.items()])
