"""Devices that are not there, for compilers that are: of TPUs and GPUs, on any Linux machine."""

import importlib.util
import os
from collections.abc import Sequence
from pathlib import Path

import jax
from jax.experimental import topologies

from dsjax import sharding
from dsjax.plan.chips import Topology

# libtpu asks the cloud who it is, and for a lock on chips, unless told.
ALONE = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}
GPU_PLUGIN = "jax_plugins.xla_cuda13"


class NoCompiler(Exception):
    """The compiler for these chips is not installed; the message says how to get it."""


def devices(topology: Topology) -> Sequence[jax.Device]:
    """Devices of `topology` to compile for. NoCompiler, or ValueError where there is none such."""
    return _tpus(topology) if topology.chip.is_tpu else _gpus(topology)


def mesh(topology: Topology, **sizes: int) -> jax.sharding.AbstractMesh:
    """A mesh of such devices for which a program can be lowered, but not compiled.

    ValueError if `sizes`, as for `sharding.mesh_sizes`, do not fit `topology`.
    """
    device = jax.sharding.AbstractDevice(
        topology.chip.kinds[0], num_cores=1, platform="tpu" if topology.chip.is_tpu else "gpu"
    )
    return jax.sharding.AbstractMesh(
        tuple(sharding.mesh_sizes(topology.num_devices, **sizes).values()),
        sharding.AXES,
        axis_types=(jax.sharding.AxisType.Explicit,) * len(sharding.AXES),
        abstract_device=device,
    )


def _tpus(topology: Topology) -> Sequence[jax.Device]:
    if importlib.util.find_spec("libtpu") is None:
        raise NoCompiler(f"{topology.name} needs libtpu: pip install -e '.[aot]'")
    for name, value in ALONE.items():
        os.environ.setdefault(name, value)
    more = {"num_slices": topology.slices} if topology.slices > 1 else {}
    try:
        found = topologies.get_topology_desc(platform="tpu", topology_name=topology.name, **more)
    except (jax.errors.JaxRuntimeError, ValueError) as error:
        raise ValueError(f"topology={topology.name}: libtpu knows none such ({error})") from error
    return found.devices


def _gpus(topology: Topology) -> Sequence[jax.Device]:
    try:
        plugin = importlib.util.find_spec(GPU_PLUGIN)
    except ModuleNotFoundError:
        plugin = None
    if plugin is None:
        raise NoCompiler(f"{topology.name} needs CUDA's compiler: pip install -e '.[aot]'")
    # The platform is registered with the others.
    jax.devices()
    nodes, each = topology.shape
    (folder,) = plugin.submodule_search_locations
    found = topologies.get_topology_desc(
        platform="cuda",
        topology_name=topology.name,
        topology=f"1x{nodes}x{each}",
        target_config=_description(Path(folder) / "xla_cuda_plugin.so", topology),
    )
    return found.devices


def _description(library: Path, topology: Topology) -> str:
    """XLA's own description of the GPU, which the plugin holds as text."""
    content = library.read_bytes()
    for kind in topology.chip.kinds:
        end = content.find(f'device_description_str: "{kind}"'.encode())
        if end >= 0:
            start = content.rindex(b"\0", 0, end) + 1
            return content[start : content.index(b"\0", end)].decode()
    raise NoCompiler(f"the installed CUDA plugin describes no {topology.chip.name}")
