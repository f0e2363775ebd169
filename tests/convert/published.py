"""Small checkpoints in the published format, written by safetensors' own library."""

import json
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from safetensors.numpy import save_file

import cases
import exact
import weights

FP8 = {
    "activation_scheme": "dynamic",
    "fmt": "e4m3",
    "quant_method": "fp8",
    "weight_block_size": [128, 128],
}
# Two dense layers, two of experts, MTP; blocks that are whole, ragged, and more than one.
CONFIG: dict[str, Any] = cases.CASES["v3"] | {
    "hidden_size": 136,
    "intermediate_size": 264,
    "torch_dtype": "bfloat16",
    "rope_scaling": None,
}
# The same with a third of the tensors.
FEW_EXPERTS = CONFIG | {
    "n_group": 2,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "topk_group": 1,
}
PLAIN = ("embed_tokens.weight", "head", "norm.weight", "gate.weight", "eh_proj.weight", "bias")


def is_plain(name: str) -> bool:
    """Whether published FP8 files leave the tensor alone; said in other words than the code's."""
    return "norm" in name or name.endswith(PLAIN) or "head" in name


def bf16(config: dict[str, Any] = CONFIG, seed: int = 5) -> dict[str, np.ndarray]:
    """The tensors of a BF16 checkpoint; the router's bias is FP32."""
    return {
        name: tensor.astype(np.float32 if name.endswith("bias") else ml_dtypes.bfloat16)
        for name, tensor in weights.draw_all(seed, config).items()
    }


def fp8(tensors: dict[str, np.ndarray], *, ue8m0: bool = False) -> dict[str, np.ndarray]:
    """An FP8 checkpoint of BF16 tensors."""
    result = {}
    for name, tensor in tensors.items():
        if is_plain(name):
            result[name] = tensor
        else:
            values, scales = exact.quantized(tensor, ue8m0=ue8m0)
            result[name] = values.astype(ml_dtypes.float8_e4m3fn)
            result[name + "_scale_inv"] = scales.astype(np.float32)
    return result


def write(
    directory: Path, tensors: dict[str, np.ndarray], config: dict[str, Any], files: int = 3
) -> Path:
    """A directory as published: shards by turns, index, config.json, a tokenizer of sorts."""
    directory.mkdir()
    places = {}
    for i in range(files):
        file = f"model-{i + 1:05}-of-{files:06}.safetensors"
        part = {name: tensors[name] for name in list(tensors)[i::files]}
        save_file(part, directory / file, metadata={"format": "pt"})
        places |= dict.fromkeys(part, file)
    index = {"metadata": {}, "weight_map": places}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    (directory / "config.json").write_text(json.dumps(config))
    (directory / "tokenizer.json").write_text('{"version": "1.0"}')
    return directory


def read_file(path: Path) -> dict[str, np.ndarray]:
    """All tensors of a file; safetensors' own library does not give FP8 to NumPy."""
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    tensors = {}
    for name, entry in json.loads(content[8 : 8 + length]).items():
        if name != "__metadata__":
            start, stop = entry["data_offsets"]
            values = np.frombuffer(content[8 + length + start : 8 + length + stop], np.uint8)
            tensors[name] = values.view(TYPES[entry["dtype"]]).reshape(entry["shape"])
    return tensors


TYPES = {"BF16": ml_dtypes.bfloat16, "F8_E4M3": ml_dtypes.float8_e4m3fn, "F32": np.float32}


def read(directory: Path) -> dict[str, np.ndarray]:
    """All tensors of a directory."""
    files = sorted(directory.glob("*.safetensors"))
    return {name: tensor for file in files for name, tensor in read_file(file).items()}


def same(one: dict[str, np.ndarray], other: dict[str, np.ndarray]) -> None:
    """Fails unless names, types, shapes and bytes are the same."""
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        assert tensor.dtype == other[name].dtype and tensor.shape == other[name].shape, name
        assert tensor.tobytes() == other[name].tobytes(), name
