"""Times conversions of a many-shard checkpoint with V3's tensor shapes against `cp` of its bytes.

    python benchmarks/convert.py /scratch/folder        (a quick look: --experts 16)

The checkpoint has V3's embedding, head, one dense layer and one layer of experts, though fewer of
them: 13 GiB in BF16, half of it in FP8. Every step is a process of its own, whose time and peak
memory are taken; before it starts, all files are on the disk and out of the kernel's memory. `cp`
is timed before and after the conversions. These end with everything on the disk, so `cp` is timed
with a `sync` behind it as well. The folder, which must not exist yet, grows to three times the
checkpoint's size and is removed at the end.
"""

import argparse
import importlib.metadata
import json
import math
import multiprocessing
import os
import platform
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, NamedTuple

import ml_dtypes
import numpy as np

ROOT = Path(__file__).parents[1]
SHARD_BYTES = 10**9
GIB = 2**30
CONVERT = (sys.executable, "convert_weights.py")
V3 = {
    "architectures": ["DeepseekV3ForCausalLM"],
    "model_type": "deepseek_v3",
    "attention_bias": False,
    "first_k_dense_replace": 1,
    "hidden_act": "silu",
    "hidden_size": 7168,
    "intermediate_size": 18432,
    "kv_lora_rank": 512,
    "max_position_embeddings": 163840,
    "moe_intermediate_size": 2048,
    "n_group": 8,
    "n_shared_experts": 1,
    "norm_topk_prob": True,
    "num_attention_heads": 128,
    "num_experts_per_tok": 8,
    "num_hidden_layers": 2,
    "num_key_value_heads": 128,
    "num_nextn_predict_layers": 0,
    "q_lora_rank": 1536,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000,
    "routed_scaling_factor": 2.5,
    "scoring_func": "sigmoid",
    "tie_word_embeddings": False,
    "topk_group": 4,
    "topk_method": "noaux_tc",
    "v_head_dim": 128,
    "vocab_size": 129280,
}
FP8 = {
    "activation_scheme": "dynamic",
    "fmt": "e4m3",
    "quant_method": "fp8",
    "weight_block_size": [128, 128],
}


class Tensor(NamedTuple):
    """A tensor to write: how the file calls its type, and its shape."""

    name: str
    kind: str
    shape: tuple[int, ...]

    @property
    def bytes(self) -> int:
        return math.prod(self.shape) * {"BF16": 2, "F32": 4, "F8_E4M3": 1}[self.kind]


def tensors(config: dict, *, fp8: bool) -> Iterator[Tensor]:
    """Every tensor of the checkpoint, in the order of the published files."""
    from dsjax.hf.complete import needed
    from dsjax.hf.config import model_config
    from dsjax.hf.fp8 import is_quantized

    for name, shape in needed(model_config(config)).items():
        if name.endswith("e_score_correction_bias"):
            yield Tensor(name, "F32", shape)
        elif fp8 and is_quantized(name):
            yield Tensor(name, "F8_E4M3", shape)
            yield Tensor(f"{name}_scale_inv", "F32", tuple(math.ceil(n / 128) for n in shape))
        else:
            yield Tensor(name, "BF16", shape)


def build(folder: Path, config: dict, fp8: bool) -> tuple[int, int]:
    """Writes a checkpoint of random values in shards; its size, and that of its largest tensor."""
    folder.mkdir(parents=True)
    shards: list[list[Tensor]] = [[]]
    for tensor in tensors(config, fp8=fp8):
        if shards[-1] and sum(t.bytes for t in (*shards[-1], tensor)) > SHARD_BYTES:
            shards.append([])
        shards[-1].append(tensor)
    noise = random_values()
    places = {}
    for number, shard in enumerate(shards, 1):
        file = f"model-{number:05}-of-{len(shards):05}.safetensors"
        places |= {tensor.name: file for tensor in shard}
        with (folder / file).open("wb") as out:
            out.write(header(shard))
            for tensor in shard:
                write_values(out, tensor, noise)
    sizes = [tensor.bytes for shard in shards for tensor in shard]
    total = sum(sizes)
    index = {"metadata": {"total_size": total}, "weight_map": places}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    quantization = {"quantization_config": FP8} if fp8 else {}
    (folder / "config.json").write_text(json.dumps(config | quantization))
    return total, max(sizes)


def header(shard: list[Tensor]) -> bytes:
    fields, offset = {}, 0
    for tensor in shard:
        ends = [offset, offset + tensor.bytes]
        fields[tensor.name] = {"dtype": tensor.kind, "shape": tensor.shape, "data_offsets": ends}
        offset = ends[1]
    text = json.dumps(fields).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def random_values() -> dict[str, np.ndarray]:
    """32 MiB of each type, over and over again: what a conversion costs does not depend on it."""
    rng = np.random.default_rng(0)
    normal = rng.normal(size=2**23).astype(np.float32)
    return {
        "BF16": np.concatenate([normal.astype(ml_dtypes.bfloat16)] * 2).view(np.uint8),
        "F32": (np.abs(normal) + 0.1).view(np.uint8),
        "F8_E4M3": np.concatenate([normal.astype(ml_dtypes.float8_e4m3fn)] * 4).view(np.uint8),
    }


def write_values(out: BinaryIO, tensor: Tensor, noise: dict[str, np.ndarray]) -> None:
    left = tensor.bytes
    while left:
        piece = noise[tensor.kind][:left]
        out.write(piece)
        left -= len(piece)


class Step(NamedTuple):
    """A finished process; `synced` is its time with everything on the disk, `cpu` user + system."""

    name: str
    bytes: int
    seconds: float
    synced: float
    cpu: float
    peak: int


def settle(folder: Path) -> None:
    """Everything below `folder` on the disk and, where the kernel obeys, out of memory."""
    os.sync()
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def timed(name: str, num_bytes: int, scratch: Path, *command: object) -> Step:
    """Runs a process; SystemExit if it fails."""
    settle(scratch)
    print(f"{name} ...", flush=True)
    began = time.perf_counter()
    process = subprocess.Popen([str(part) for part in command], cwd=ROOT, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - began
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"{name} ended with exit code {process.returncode}")
    os.sync()
    # Linux counts kilobytes, macOS bytes.
    unit = 1 if sys.platform == "darwin" else 1024
    synced, cpu = time.perf_counter() - began, usage.ru_utime + usage.ru_stime
    return Step(name, num_bytes, seconds, synced, cpu, usage.ru_maxrss * unit)


def bf16_steps(scratch: Path, total: int) -> list[Step]:
    source, imported, exported = (scratch / name for name in ("hub", "imported", "exported"))
    steps = [copy("cp, BF16", total, scratch)]
    steps.append(timed("import, BF16", total, scratch, *CONVERT, "import", source, imported))
    steps.append(copy("cp, BF16", total, scratch))
    steps.append(timed("export, BF16", total, scratch, *CONVERT, "export", imported, exported))
    steps.append(timed("verify, BF16", total, scratch, *CONVERT, "verify", source, exported))
    return steps


def fp8_steps(scratch: Path, total: int) -> list[Step]:
    source, cast, imported = (scratch / name for name in ("hub", "cast", "imported"))
    to_bf16 = ("cast", source, cast, "--dtype", "bf16")
    steps = [copy("cp, FP8", total, scratch)]
    steps.append(timed("cast, FP8 to BF16", total, scratch, *CONVERT, *to_bf16))
    steps.append(copy("cp, FP8", total, scratch))
    steps.append(timed("import, FP8", total, scratch, *CONVERT, "import", source, imported))
    steps.append(
        timed("verify, FP8 against BF16", total, scratch, *CONVERT, "verify", imported, cast)
    )
    return steps


def copy(name: str, num_bytes: int, scratch: Path) -> Step:
    step = timed(name, num_bytes, scratch, "cp", "-r", scratch / "hub", scratch / "copy")
    shutil.rmtree(scratch / "copy")
    return step


def table(steps: list[Step], bound: int) -> None:
    copies = [step for step in steps if step.name.startswith("cp")]
    plain = statistics.mean(step.seconds for step in copies)
    synced = statistics.mean(step.synced for step in copies)
    for step in steps:
        print(
            f"| {step.name} | {step.bytes / GIB:.2f} | {step.seconds:.1f} | {step.cpu:.1f} | "
            f"{step.bytes / 1e9 / step.seconds:.2f} | {step.seconds / plain:.2f} | "
            f"{step.synced / synced:.2f} | {step.peak / GIB:.2f} | "
            f"{'yes' if step.peak <= bound else 'NO'} |"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("scratch", type=Path, help="a folder that does not exist yet")
    parser.add_argument(
        "--experts", type=int, default=88, help="of 256, a multiple of 8, at least 16"
    )
    options = parser.parse_args()
    config = V3 | {"n_routed_experts": options.experts}
    versions = {name: importlib.metadata.version(name) for name in ("jax", "numpy", "ml_dtypes")}
    print(f"command: {' '.join(sys.argv)}")
    print(f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}")
    print(", ".join(f"{name} {version}" for name, version in versions.items()))
    print(f"load average before: {', '.join(f'{load:.1f}' for load in os.getloadavg())}")
    # In a process of its own: a child's peak memory counts from its parent's.
    builder = multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=1)
    done = []
    for steps, fp8 in ((bf16_steps, False), (fp8_steps, True)):
        options.scratch.mkdir(parents=True)
        try:
            total, largest = builder.apply(build, (options.scratch / "hub", config, fp8))
            done.append((steps(options.scratch, total), 2 * GIB + 2 * largest))
        finally:
            shutil.rmtree(options.scratch)
    print(
        "\n| step | GiB read | s | CPU s | GB/s | time / cp | both synced | peak GiB | in bound |"
    )
    print("|---|---|---|---|---|---|---|---|---|")
    for finished, bound in done:
        table(finished, bound)
    print(f"\nbound: 2 GiB + twice the largest tensor, here {done[0][1] / GIB:.2f} GiB")


if __name__ == "__main__":
    main()
