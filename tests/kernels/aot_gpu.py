"""Compiles every GPU kernel for an H200 that is not there: `make aot`.

Runs in an environment with `jax[cuda13]`, `flatbuffers` and `nvidia-cuda-nvdisasm`, on any x86-64
Linux machine. For each kernel: does it compile for sm_90a, does it fit shared memory, how many
registers, spilled bytes, and FP8 matrix instructions in the machine code. Says nothing about speed.
Exits with an error when a kernel does not compile or spills, 0 with the reason where the packages
are not installed.
"""

import importlib.util
import os
import re
import sys
import tempfile
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).parents[2]
TARGET = "NVIDIA H200 141GB HBM3e"


def missing() -> str | None:
    """Why this Python cannot compile for a GPU, or None."""
    if importlib.util.find_spec("jax_cuda13_plugin") is None:
        return "no jax[cuda13] here"
    if importlib.util.find_spec("flatbuffers") is None:
        return "no flatbuffers here"
    if not (tools() / "nvdisasm").exists():
        return "no nvidia-cuda-nvdisasm here"
    return None


def tools() -> Path:
    (folder,) = importlib.util.find_spec("nvidia").submodule_search_locations
    return Path(folder) / "cu13" / "bin"


def target_config() -> str:
    """XLA's own description of the GPU, in text, from inside the CUDA plugin."""
    (folder,) = importlib.util.find_spec("jax_plugins.xla_cuda13").submodule_search_locations
    library = (Path(folder) / "xla_cuda_plugin.so").read_bytes()
    end = library.index(f'device_description_str: "{TARGET}"'.encode())
    start = library.rindex(b"\0", 0, end) + 1
    return library[start : library.index(b"\0", end)].decode()


def captured(call) -> tuple[object, str]:
    """What `call` gives, and what the compilers below it wrote to the terminal."""
    with tempfile.TemporaryFile() as file:
        sys.stdout.flush()
        saved = [os.dup(1), os.dup(2)]
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
        try:
            out = call()
        finally:
            sys.stdout.flush()
            for number, old in zip((1, 2), saved, strict=True):
                os.dup2(old, number)
                os.close(old)
        file.seek(0)
        return out, file.read().decode(errors="replace")


def main(only: str) -> int:
    if reason := missing():
        print(f"skipped: {reason}; pip install 'jax[cuda13]' flatbuffers nvidia-cuda-nvdisasm")
        return 0
    os.environ |= {
        "JAX_PLATFORMS": "cpu",
        "MOSAIC_GPU_DUMP_PTXAS": "1",
        "MOSAIC_GPU_DUMP_SASS": "1",
        "PATH": f"{tools()}:{os.environ['PATH']}",
    }
    sys.path.insert(0, str(ROOT))

    import jax
    from jax.experimental import topologies
    from jax.sharding import AbstractDevice, AbstractMesh, AxisType, SingleDeviceSharding

    from tests.kernels.aot_cases import GPU

    jax.devices()
    described = topologies.get_topology_desc(
        platform="cuda", topology_name="one", topology="1x1x1", target_config=target_config()
    )
    (device,) = described.devices
    mesh = AbstractMesh(
        (1,),
        ("device",),
        axis_types=(AxisType.Auto,),
        abstract_device=AbstractDevice(
            device_kind=device.device_kind, num_cores=device.core_count, platform="gpu"
        ),
    )
    print(f"jax {jax.__version__}, for {device.device_kind}")
    faults = 0
    for name, (function, *arguments) in GPU.items():
        if only not in name:
            continue
        abstract = [
            jax.ShapeDtypeStruct(shape, dtype, sharding=SingleDeviceSharding(device))
            for shape, dtype in arguments
        ]

        def compiled(function=function, abstract=abstract):
            with jax.sharding.use_abstract_mesh(mesh):
                return jax.jit(function).lower(*abstract).compile()

        try:
            _, log = captured(compiled)
        except Exception as error:
            faults += 1
            print(f"{name:52} FAILED {type(error).__name__}: {error}")
            continue
        registers = re.findall(r"Used (\d+) registers", log)
        spills = [int(n) for n in re.findall(r"(\d+) bytes spill", log)]
        instructions = Counter(re.findall(r"\b(QGMMA|HGMMA|UTMALDG|UTMASTG|LDL|STL)\b", log))
        faults += sum(spills) > 0 or not registers
        print(
            f"{name:52} registers {'/'.join(registers) or '?'}, spilled {sum(spills)} B, "
            + ", ".join(f"{count} {what}" for what, count in sorted(instructions.items()))
        )
        if os.environ.get("AOT_LOG"):
            Path(os.environ["AOT_LOG"]).write_text(log)
    return min(faults, 1)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1] if len(sys.argv) > 1 else ""))
