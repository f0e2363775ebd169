"""Compiles every TPU kernel for chips that are not there: `make aot`.

    python tests/kernels/aot_tpu.py [few] [record] [PART OF A NAME]

Runs in an environment with `pip install -e '.[aot]'`, on any x86-64 Linux machine. For each kernel
and chip: does it compile, does it fit the chip's memory, and how many instruction bundles are
scheduled for it, beside the number in tpu_bundles.json; `record` writes that down anew, `few` takes
one shape of each. Bundles ignore memory and loops, so they compare a kernel with its former self
and say nothing about speed. Exits with an error when a kernel does not compile, has grown, or has
no number to be compared with; 0 with the reason where the package is not installed. Another libtpu
than the one recorded has other numbers: with it kernels are only compiled, and with the one that
`constraints.txt` pins that is an error, too.
"""

import importlib.util
import json
import os
import re
import sys
import tempfile
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path

ROOT = Path(__file__).parents[2]
BUNDLES = Path(__file__).with_name("tpu_bundles.json")
# A compiler of the same version schedules the same program alike.
GROWTH = 1.02
TOPOLOGIES = {"v5p": "v5p:2x2x1", "v6e": "v6e:1x1", "tpu7x": "tpu7x:2x2x1"}


def scheduled(dumps: Path) -> int:
    """Bundles of all that was compiled since the last call, by the compiler's own analysis."""
    total = 0
    for path in dumps.iterdir():
        if path.name.endswith("schedule-analysis_final_bundles.txt"):
            found = re.search(r"total scheduled bundles:\s+(\d+)", path.read_text())
            total += int(found[1]) if found else 0
        path.unlink()
    return total


def complaint(name: str, count: int, known: Mapping[str, int]) -> str | None:
    """What is wrong with `count` bundles; nothing `known` is nothing to compare with."""
    if not count:
        return "NO BUNDLES: the compiler writes its analysis elsewhere"
    if known and name not in known:
        return "NOT RECORDED: run this with `record`"
    if known and count > GROWTH * known[name]:
        return f"GROWN from {known[name]}"
    return None


def main(words: Sequence[str]) -> int:
    if importlib.util.find_spec("libtpu") is None:
        print("skipped: no libtpu here; pip install -e '.[aot]'")
        return 0
    dumps = Path(tempfile.mkdtemp())
    os.environ |= {
        "LIBTPU_INIT_ARGS": f"--xla_jf_dump_to={dumps} --xla_jf_dump_llo_text=true",
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

    from dsjax.run_folder import replace_text
    from tests.kernels.aot_cases import FEW, TPU, TPU7

    compiler = version("libtpu")
    recorded = json.loads(BUNDLES.read_text())
    known = recorded["bundles"] if recorded["libtpu"] == compiler else {}
    only = "".join(word for word in words if word not in ("few", "record"))
    print(f"jax {jax.__version__}, libtpu {compiler}; bundles of libtpu {recorded['libtpu']}")
    faults, bundles = 0, {}
    if not known and "record" not in words:
        print("NOTHING TO COMPARE WITH: another libtpu; run this with `record`")
        faults += f"libtpu=={compiler}" in (ROOT / "constraints.txt").read_text().split()
    for chip, topology in TOPOLOGIES.items():
        device = topologies.get_topology_desc(platform="tpu", topology_name=topology).devices[0]
        described = AbstractDevice(
            device_kind=device.device_kind, num_cores=device.num_cores, platform="tpu"
        )
        mesh = AbstractMesh(
            (1,), ("device",), axis_types=(AxisType.Auto,), abstract_device=described
        )
        for name, (function, *arguments) in (TPU | (TPU7 if chip == "tpu7x" else {})).items():
            if only not in name or ("few" in words and name not in FEW):
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
            count = bundles[f"{chip} {name}"] = scheduled(dumps)
            wrong = complaint(f"{chip} {name}", count, {} if "record" in words else known)
            faults += wrong is not None
            print(
                f"{chip:6} {name:52} {calls} kernel, {temporary / 2**20:.1f} MiB temporary, "
                f"{count} bundles{f', {wrong}' if wrong else ''}",
                flush=True,
            )
    dumps.rmdir()
    if "record" in words and not faults:
        recorded = {"libtpu": compiler, "bundles": known | bundles}
        replace_text(BUNDLES, json.dumps(recorded, indent=1) + "\n")
    return min(faults, 1)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
