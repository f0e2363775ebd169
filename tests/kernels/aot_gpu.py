"""Compiles every GPU kernel for an H200 that is not there: `make aot`.

    python tests/kernels/aot_gpu.py [few] [h100] [PART OF A NAME]

Runs in an environment with `pip install -e '.[aot]'`, on any x86-64 Linux machine. For each kernel:
does it compile for sm_90a, does it fit shared memory (more than the chip has does not compile), how
many registers, spilled bytes, and matrix instructions in the machine code. Says nothing about
speed. Exits with an error when a kernel does not compile or spills or multiplies without the tensor
cores' instruction or lets each of those wait for the one before, 0 with the reason where the
packages are not installed.
"""

import importlib.util
import os
import re
import sys
import tempfile
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).parents[2]


def missing() -> str | None:
    """Why this Python cannot compile for a GPU, or None."""
    if importlib.util.find_spec("jax_cuda13_plugin") is None:
        return "no jax-cuda13-plugin here"
    if importlib.util.find_spec("flatbuffers") is None:
        return "no flatbuffers here"
    if not (tools() / "nvdisasm").exists():
        return "no nvidia-cuda-nvdisasm here"
    return None


def tools() -> Path:
    (folder,) = importlib.util.find_spec("nvidia").submodule_search_locations
    return Path(folder) / "cu13" / "bin"


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


def faults(name: str, log: str) -> list[str]:
    """What is wrong with a kernel whose compilers wrote `log`."""
    found = []
    if not re.search(r"Used \d+ registers", log):
        found.append("NO KERNEL")
    if any(int(n) for n in re.findall(r"(\d+) bytes spill", log)):
        found.append("SPILLED")
    if product := re.match(r"(fp8_)?\w*(matmul|wgrad)", name):
        instruction = "QGMMA" if product[1] else "HGMMA"
        if not re.search(rf"\b{instruction}\b", log):
            found.append(f"NO {instruction}")
    if re.search(r"wgmma\S* instructions are serialized", log):
        found.append("SERIALIZED")
    return found


def main(words: Sequence[str]) -> int:
    if reason := missing():
        print(f"skipped: {reason}; pip install -e '.[aot]'")
        return 0
    os.environ |= {
        "JAX_PLATFORMS": "cpu",
        "MOSAIC_GPU_DUMP_PTXAS": "1",
        "MOSAIC_GPU_DUMP_SASS": "1",
        "PATH": f"{tools()}:{os.environ['PATH']}",
    }
    sys.path.insert(0, str(ROOT))

    import jax
    from jax.sharding import AbstractDevice, AbstractMesh, AxisType

    from dsjax.plan import absent, chips
    from tests.kernels.aot_cases import FEW, GPU

    # One kind to a process, which compiles a kernel once and then knows it.
    kind = "h100" if "h100" in words else "h200"
    only = "".join(word for word in words if word not in ("few", "h100"))
    (device,) = absent.devices(chips.topology(f"{kind}:1x1"))
    mesh = AbstractMesh(
        (1,),
        ("device",),
        axis_types=(AxisType.Auto,),
        abstract_device=AbstractDevice(
            device_kind=device.device_kind, num_cores=device.core_count, platform="gpu"
        ),
    )
    print(f"jax {jax.__version__}, for {device.device_kind}")
    cases = {name: case for name, case in GPU.items() if "few" not in words or name in FEW}
    right = [
        report(name, function, arguments, device, mesh)
        for name, (function, *arguments) in cases.items()
        if only in name
    ]
    return 0 if right and all(right) else 1


def report(name: str, function, arguments, device, mesh) -> bool:
    """Prints what becomes of one kernel; whether nothing is wrong with it."""
    import jax
    from jax.sharding import SingleDeviceSharding

    abstract = [
        jax.ShapeDtypeStruct(shape, dtype, sharding=SingleDeviceSharding(device))
        for shape, dtype in arguments
    ]

    def compiled():
        with jax.sharding.use_abstract_mesh(mesh):
            return jax.jit(function).lower(*abstract).compile()

    try:
        _, log = captured(compiled)
    except Exception as error:
        print(f"{name:52} FAILED {type(error).__name__}: {error}")
        return False
    registers = re.findall(r"Used (\d+) registers", log)
    spilled = sum(int(n) for n in re.findall(r"(\d+) bytes spill", log))
    instructions = Counter(re.findall(r"\b(QGMMA|HGMMA|UTMALDG|UTMASTG|LDL|STL)\b", log))
    found = faults(name, log)
    print(
        f"{name:52} registers {'/'.join(registers) or '?'}, spilled {spilled} B, "
        + ", ".join(f"{count} {what}" for what, count in sorted(instructions.items()))
        + "".join(f", {fault}" for fault in found),
        flush=True,
    )
    if os.environ.get("AOT_LOG"):
        Path(os.environ["AOT_LOG"]).write_text(log)
    return not found


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
