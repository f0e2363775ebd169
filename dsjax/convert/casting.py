"""A Hugging Face checkpoint in another precision: FP8 to BF16, BF16 (or wider) to FP8."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

import ml_dtypes
import numpy as np

from dsjax.convert import journal, opened, shards
from dsjax.convert.publishing import publish
from dsjax.hf import complete, files, fp8, names
from dsjax.hf.config import Quantization, model_config, quantization
from dsjax.hf.rounding import rounded
from dsjax.hf.tensors import Tensor

Precision = Literal["bf16", "fp32", "fp8"]
# FP8 checkpoints keep in BF16 what they do not quantize.
WIDE: dict[Precision, np.dtype] = {
    "bf16": np.dtype(ml_dtypes.bfloat16),
    "fp32": np.dtype(np.float32),
    "fp8": np.dtype(ml_dtypes.bfloat16),
}
PUBLISHED = {np.dtype(ml_dtypes.bfloat16): "bfloat16", np.dtype(np.float32): "float32"}
# Published in FP32 whatever the rest is in: it decides which experts are chosen.
ALWAYS_FP32 = "e_score_correction_bias"


class Rounded:
    """A tensor in another type."""

    def __init__(self, tensor: Tensor, dtype: np.dtype):
        self._tensor, self.shape, self.dtype = tensor, tuple(tensor.shape), dtype

    def __getitem__(self, index: tuple[slice, ...]) -> np.ndarray:
        return rounded(self._tensor[index], self.dtype)


class QuantizedValues:
    """The FP8 values of a weight. A slice reads the blocks that it touches."""

    def __init__(self, name: str, weight: Tensor, *, ue8m0: bool):
        self._name, self._weight, self._ue8m0 = name, weight, ue8m0
        self.shape, self.dtype = tuple(weight.shape), fp8.VALUES

    def __getitem__(self, index: tuple[slice, ...]) -> np.ndarray:
        ranges = [part.indices(n) for part, n in zip(index, self.shape, strict=True)]
        blocks = tuple(
            slice(start // fp8.BLOCK, -(-stop // fp8.BLOCK)) for start, stop, _ in ranges
        )
        values, _ = _quantized(self._name, self._weight, blocks, ue8m0=self._ue8m0)
        inside = (
            slice(start - block.start * fp8.BLOCK, stop - block.start * fp8.BLOCK)
            for (start, stop, _), block in zip(ranges, blocks, strict=True)
        )
        return values[tuple(inside)]


class BlockScales:
    """The scales that belong to `QuantizedValues`."""

    def __init__(self, name: str, weight: Tensor, *, ue8m0: bool):
        self._name, self._weight, self._ue8m0 = name, weight, ue8m0
        self.shape, self.dtype = fp8.grid(weight.shape), np.dtype(np.float32)

    def __getitem__(self, index: tuple[slice, ...]) -> np.ndarray:
        rows, columns = (range(*part.indices(n)) for part, n in zip(index, self.shape, strict=True))
        scales = np.empty((len(rows), len(columns)), self.dtype)
        for i, row in enumerate(rows):
            # One row of blocks at a time, whatever the size of the weight.
            blocks = (slice(row, row + 1), slice(columns.start, columns.stop))
            weight = _blocks_of(self._weight, blocks)
            scales[i] = _named(self._name, fp8.block_scales, weight, ue8m0=self._ue8m0)
        return scales


def _quantized(
    name: str, weight: Tensor, blocks: tuple[slice, ...], *, ue8m0: bool
) -> tuple[np.ndarray, np.ndarray]:
    return _named(name, fp8.quantize, _blocks_of(weight, blocks), ue8m0=ue8m0)


def _blocks_of(weight: Tensor, blocks: tuple[slice, ...]) -> np.ndarray:
    index = tuple(
        slice(block.start * fp8.BLOCK, min(block.stop * fp8.BLOCK, n))
        for block, n in zip(blocks, weight.shape, strict=True)
    )
    return rounded(weight[index], np.dtype(np.float32))


def _named(name: str, function: Callable, weight: np.ndarray, *, ue8m0: bool) -> Any:
    try:
        return function(weight, ue8m0=ue8m0)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error


def recast(
    tensors: Mapping[str, Tensor], to: Precision, *, ue8m0: bool = False
) -> dict[str, Tensor]:
    """`tensors` under published names, FP8 scales among them, as a checkpoint in precision `to`.

    Nothing is read before the result is. What is in FP8 already stays so, bit for bit, with
    `to="fp8"`; the router's bias is FP32 always, ignored tensors stay as they are. ValueError if
    values and scales do not belong together.
    """
    fp8.check_pairs(tensors)
    wide = WIDE[to]
    result: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        scale = name + fp8.SCALE
        if name.endswith(fp8.SCALE):
            continue
        if tensor.dtype == fp8.VALUES and to == "fp8":
            result |= {name: tensor, scale: tensors[scale]}
        elif tensor.dtype == fp8.VALUES:
            result[name] = fp8.Dequantized(name, tensor, tensors[scale], wide)
        elif to == "fp8" and fp8.is_quantized(name):
            result[name] = QuantizedValues(name, tensor, ue8m0=ue8m0)
            result[scale] = BlockScales(name, tensor, ue8m0=ue8m0)
        else:
            dtype = np.dtype(np.float32) if name.endswith(ALWAYS_FP32) else wide
            stays = tensor.dtype == dtype or names.IGNORED.fullmatch(name)
            result[name] = tensor if stays else Rounded(tensor, dtype)
    return result


def recast_config(
    published: Mapping[str, Any], to: Precision, *, ue8m0: bool = False
) -> dict[str, Any]:
    """The config.json that goes with `recast`.

    ValueError if FP8 weights, which keep their scales, are asked for other scales.
    """
    stored = quantization(published)
    fields = {key: value for key, value in published.items() if key != "quantization_config"}
    names_of_dtype = fields.keys() & {"dtype", "torch_dtype"} or {"torch_dtype"}
    fields |= dict.fromkeys(names_of_dtype, PUBLISHED[WIDE[to]])
    if to != "fp8":
        return fields
    if stored and ue8m0 and not stored.ue8m0:
        raise ValueError(
            "the weights are FP8 already and keep their scales, which are no powers of two; cast "
            "to bf16 first"
        )
    scales = published["quantization_config"] if stored else Quantization(ue8m0=ue8m0).published()
    return {**fields, "quantization_config": scales}


def has_ue8m0(config: Mapping[str, Any]) -> bool:
    """Whether the scales that go with a config.json are powers of two."""
    scales = quantization(config)
    return scales is not None and scales.ue8m0


def check_source(tensors: Mapping[str, Tensor], published: Mapping[str, Any]) -> None:
    """ValueError unless tensors and config.json describe the same complete checkpoint."""
    weights = {name: t for name, t in tensors.items() if not name.endswith(fp8.SCALE)}
    model = complete.without_absent_mtp(weights, model_config(published))
    complete.differences(weights, complete.needed(model), names.copies(model)).check()
    is_fp8 = any(tensor.dtype == fp8.VALUES for tensor in weights.values())
    if is_fp8 != (quantization(published) is not None):
        has, says = ("FP8 weights", "no") if is_fp8 else ("no FP8 weights", "a")
        raise ValueError(
            f"the checkpoint has {has}, but its config.json has {says} quantization_config"
        )


def cast(
    source: Path,
    target: Path,
    *,
    to: Precision,
    ue8m0: bool = False,
    shard_size: int = 5 * 10**9,
    process: tuple[int, int] = (0, 1),
    dry_run: bool = False,
    say: Callable[[str], None] = print,
) -> None:
    """Writes the checkpoint in `source` to `target` in precision `to`; continues what was begun.

    `dry_run` checks all that can be checked without the weights, tells the plan, and writes
    nothing. ValueError and OSError say what is wrong with source, target or disk.
    """
    opened.check_finished(source)
    published = files.read_json(source / "config.json")
    model_config(published)
    tensors = files.open_tensors(source)
    check_source(tensors, published)
    config = recast_config(published, to, ue8m0=ue8m0)
    result = recast(tensors, to, ue8m0=has_ue8m0(config))
    if all(result.get(name) is tensor for name, tensor in tensors.items()):
        raise ValueError(f"{source} is {to} already; there is nothing to cast")
    fp8.check_scales(tensors)
    plan = {
        "command": "cast",
        "dtype": to,
        "scales": "ue8m0" if ue8m0 else "float",
        "source": journal.fingerprint(source),
    }
    publish(
        result,
        target,
        plan=plan,
        config=config,
        passed=shards.small_files(source),
        shard_size=shard_size,
        process=process,
        dry_run=dry_run,
        say=say,
    )
