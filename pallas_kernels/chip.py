"""The chip that is being compiled for, and what a backend may ask of it."""

import contextlib
from collections.abc import Iterator
from typing import NamedTuple

import jax
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.experimental.pallas import tpu as pltpu

# Device kinds of compute capability 9.0; a kind names one of these models among other words.
HOPPER = frozenset({"H20", "H100", "H200", "H800", "GH200"})

# What the interpreter runs here, by `interpreted`: the kernels' platform, and how many programs
# share the tiles of a persistent one.
_interpreted = jax.make_user_context((None, 1))


class Unsupported(NotImplementedError):
    """This implementation does not do that shape, type or chip; another one may.

    A type of its own, so that what Pallas itself has not implemented is never taken for a reason to
    go on quietly with something slower.
    """


class Chip(NamedTuple):
    """`platform` as jax names it ("cpu", "gpu", "tpu"); `kind` such as "NVIDIA H200", "TPU v5"."""

    platform: str
    kind: str
    num_cores: int | None


def chip() -> Chip:
    """The chip of the mesh in context, which may be abstract; else of the default device.

    Not that of the operands, which under `jax.jit` have no place yet. Where they lie elsewhere (on
    the CPU of a machine with a GPU), say so by `jax.default_device` or `jax.set_mesh`, or name an
    implementation by `select.prefer`.
    """
    described = jax.sharding.get_abstract_mesh().abstract_device
    if described is not None:
        return Chip(described.platform, described.device_kind, described.num_cores)
    device = jax.config.jax_default_device or jax.devices()[0]
    if isinstance(device, str):
        device = jax.devices(device)[0]
    return Chip(device.platform, device.device_kind, getattr(device, "core_count", None))


def has_fp8(chip: Chip) -> bool:
    """Whether the matrix unit of this TPU takes e4m3 as it is."""
    return chip.platform == "tpu" and chip.kind.startswith("TPU7")


def num_programs() -> int:
    """How many programs of a persistent GPU kernel there are: one to each core."""
    platform, programs = _interpreted.value
    if platform == "gpu":
        return programs
    here = chip()
    if not here.num_cores:
        raise ValueError(
            f"no number of cores is known of {here.kind!r}, and a kernel on one of them would be "
            "slow without a word; describe it by AbstractDevice(num_cores=...), or name another "
            "implementation"
        )
    return here.num_cores


@contextlib.contextmanager
def interpreted(platform: str, *, detect_races: bool = True, programs: int = 1) -> Iterator[None]:
    """Kernels of `platform` ("gpu" or "tpu") run in Pallas' interpreter, on any machine.

    Slow, and for looking for faults: memory begins as NaN, reads out of bounds raise, and so does a
    race between threads or copies unless `detect_races` is off. `programs` share the tiles of a
    persistent GPU kernel.
    """
    if platform == "gpu":
        forced = plgpu.force_gpu_interpret_mode(plgpu.InterpretGPUParams(detect_races=detect_races))
    elif platform == "tpu":
        forced = pltpu.force_tpu_interpret_mode(pltpu.InterpretParams(detect_races=detect_races))
    else:
        raise ValueError(f"platform {platform!r}; there are interpreters for 'gpu' and 'tpu'")
    with _interpreted((platform, programs)), forced:
        yield


def needs_hopper(op: str) -> None:
    """Unsupported unless kernels are compiled for an NVIDIA Hopper GPU, or interpreted as such."""
    here = chip()
    if _is_interpreted("gpu"):
        return
    if here.platform != "gpu" or not HOPPER & set(here.kind.split()):
        raise Unsupported(f"{op}/gpu wants an NVIDIA Hopper GPU, here is {here.kind!r}")


def needs_tpu(op: str) -> None:
    """Unsupported unless kernels are compiled for a TPU, or interpreted as such."""
    here = chip()
    if not _is_interpreted("tpu") and here.platform != "tpu":
        raise Unsupported(f"{op}/tpu wants a TPU, here is {here.kind!r}")


def needs_fp8_tpu(op: str) -> None:
    """Unsupported unless for a TPU whose matrix unit takes e4m3 as it is, or interpreted."""
    here = chip()
    if not _is_interpreted("tpu") and not has_fp8(here):
        raise Unsupported(
            f"{op}/tpu_wide wants a TPU v7x, whose matrix unit takes FP8; here is {here.kind!r}"
        )


def _is_interpreted(platform: str) -> bool:
    return _interpreted.value[0] == platform
