"""Compiles every TPU kernel for chips that are not there: `make aot`.

Runs in an environment with `jax[tpu]`, on any x86-64 Linux machine. For each kernel and chip: does
it compile, does it fit the chip's memory. Says nothing about speed. Exits with an error when a
kernel does not compile, 0 with the reason where the package is not installed.
"""

import importlib.util
import os
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
TOPOLOGIES = {"v5p": "v5p:2x2x1", "v6e": "v6e:1x1", "tpu7x": "tpu7x:2x2x1"}


def main(only: str) -> int:
    if importlib.util.find_spec("libtpu") is None:
        print("skipped: no libtpu here; pip install 'jax[tpu]'")
        return 0
    os.environ |= {
        "JAX_PLATFORMS": "cpu",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
        "TPU_SKIP_MDS_QUERY": "1",
        "TPU_WORKER_HOSTNAMES": "localhost",
        "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    }
    sys.path.insert(0, str(ROOT))

    import jax
    from jax.experimental import topologies
    from jax.sharding import AbstractDevice, AbstractMesh, AxisType, SingleDeviceSharding

    from tests.kernels.aot_cases import TPU, TPU7

    print(f"jax {jax.__version__}")
    faults = 0
    for chip, topology in TOPOLOGIES.items():
        device = topologies.get_topology_desc(platform="tpu", topology_name=topology).devices[0]
        described = AbstractDevice(
            device_kind=device.device_kind, num_cores=device.num_cores, platform="tpu"
        )
        mesh = AbstractMesh(
            (1,), ("device",), axis_types=(AxisType.Auto,), abstract_device=described
        )
        for name, (function, *arguments) in (TPU | (TPU7 if chip == "tpu7x" else {})).items():
            if only not in name:
                continue
            abstract = [
                jax.ShapeDtypeStruct(shape, dtype, sharding=SingleDeviceSharding(device))
                for shape, dtype in arguments
            ]
            try:
                with jax.sharding.use_abstract_mesh(mesh):
                    done = jax.jit(function).lower(*abstract).compile()
            except Exception as error:
                faults += 1
                print(f"{chip:6} {name:52} FAILED {type(error).__name__}: {error}")
                continue
            calls = done.as_text().count('custom_call_target="tpu_custom_call"')
            faults += calls == 0
            temporary = done.memory_analysis().temp_size_in_bytes
            print(f"{chip:6} {name:52} {calls} kernel, {temporary / 2**20:.1f} MiB temporary")
    return min(faults, 1)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1] if len(sys.argv) > 1 else ""))
