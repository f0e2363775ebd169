"""What a checkpoint is, from its config.json, its index and its headers: no weight is read."""

import collections
import dataclasses
import functools
import gzip
import itertools
import math
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from dsjax import config
from dsjax.convert import casting, fitting, tables
from dsjax.hf import complete, files, fp8, names, strict_json
from dsjax.hf.config import model_config, quantization
from dsjax.hf.fused import FUSED, PARTS, unfused
from dsjax.hf.safetensors_file import DTYPES, KINDS, is_shape
from dsjax.hf.tensors import num_bytes, some
from dsjax.progress import in_bytes

BF16 = np.dtype(ml_dtypes.bfloat16)
NUMBER = re.compile(r"\d+")
# Kinds of tensors outside of MTP layers: the first pattern that matches.
KINDS_OF_TENSORS = [
    ("embedding", r"model\.embed_tokens\..*"),
    ("head", r"lm_head\..*"),
    ("ignored", names.IGNORED.pattern),
    ("routed experts", r".*\.mlp\.experts\..*"),
    ("shared experts", r".*\.mlp\.shared_experts\..*"),
    ("router", r".*\.mlp\.gate\..*"),
    ("dense feed-forward", r".*\.mlp\..*"),
    ("norms", r".*norm\.weight"),
    ("attention", r".*\.self_attn\..*"),
]


class Described(NamedTuple):
    """A tensor without its values."""

    shape: tuple[int, ...]
    dtype: np.dtype


@dataclasses.dataclass(frozen=True)
class Found:
    """What a source holds; of `assumed` tensors only the names are known, the rest is config's."""

    published: Mapping[str, Any]
    model: config.Model
    tensors: Mapping[str, Described]
    assumed: int


def read(source: Path, config_file: Path | None = None) -> Found:
    """Describes a directory (index and config.json suffice), or a map of names to shape and dtype.

    ValueError if there is neither, or if what is there contradicts itself.
    """
    is_map = source.is_file()
    if config_file is None:
        beside = source.with_name(source.name.partition(".")[0] + ".config.json")
        config_file = beside if is_map else source / "config.json"
    published = files.read_json(config_file)
    model = model_config(published)
    if is_map:
        return Found(published, model, _of_map(source), 0)
    listed = files.listed(source)
    here = {file: names for file, names in listed.items() if (source / file).is_file()}
    named = set().union(*(names or set() for file, names in listed.items() if file not in here))
    stored = {**files.opened(source, here), **_assumed(named, model, published)}
    tensors = {
        name: Described(tuple(tensor.shape), tensor.dtype)
        for name, tensor in unfused(stored).items()
    }
    return Found(published, model, tensors, len(named))


def _of_map(file: Path) -> dict[str, Described]:
    try:
        with gzip.open(file) if file.suffix == ".gz" else file.open("rb") as content:
            entries = strict_json.parse(content.read(files.LONGEST_JSON))
        wrong = [name for name, entry in entries.items() if not is_shape(entry["shape"])]
        if wrong:
            raise ValueError(f"shape of {wrong[0][:200]}: {entries[wrong[0]]['shape']!r:.100}")
        return {
            name: Described(tuple(entry["shape"]), DTYPES[entry["dtype"]])
            for name, entry in entries.items()
        }
    except (OSError, EOFError, ValueError, AttributeError, KeyError, TypeError) as error:
        raise ValueError(
            f"{file} is no map of tensor names to shape and dtype: {error!r}"
        ) from error


def _assumed(
    named: set[str], model: config.Model, published: Mapping[str, Any]
) -> dict[str, Described]:
    """Shapes and types as the config has them, for tensors whose files are not here."""
    if not named:
        return {}
    is_fp8 = quantization(published) is not None
    shapes = complete.needed(model)
    shapes |= {copy: shapes[original] for copy, original in names.copies(model).items()}

    def alone(name: str) -> Described:
        weight = name.removesuffix(fp8.SCALE)
        shape = shapes.get(weight, ())
        if weight != name:
            return Described(fp8.grid(shape), np.dtype(np.float32))
        if name.endswith(casting.ALWAYS_FP32):
            return Described(shape, np.dtype(np.float32))
        return Described(shape, fp8.VALUES if is_fp8 and fp8.is_quantized(name) else BF16)

    return {
        name: _fused(match, alone, shapes) if (match := FUSED.fullmatch(name)) else alone(name)
        for name in named
    }


def _fused(
    match: re.Match, alone: Callable[[str], Described], shapes: Mapping[str, complete.Shape]
) -> Described:
    """All experts of a layer in one tensor, as large as the config has them one by one."""
    prefix, kind, scale = match.groups("")
    parts = PARTS[kind]
    expert = f"{prefix}.{{}}.{parts[0]}.weight".format
    num_experts = next(e for e in itertools.count() if expert(e) not in shapes)
    if not num_experts:
        # It has no place: one expert is enough to be told of.
        return Described((1, len(parts), 1), BF16)
    one = alone(expert(0) + scale)
    return Described((num_experts, len(parts) * one.shape[0], one.shape[1]), one.dtype)


@functools.cache
def _kind(name: str) -> str:
    """Which row of the table a tensor counts in, by its name with each number as a 0."""
    return next((k for k, pattern in KINDS_OF_TENSORS if re.fullmatch(pattern, name)), "others")


def _beyond(model: config.Model) -> tuple[str, ...]:
    """What the names of all tensors of MTP layers begin with."""
    return tuple(f"model.layers.{model.num_layers + k}." for k in range(len(model.mtp)))


def parameters(model: config.Model, shapes: Mapping[str, complete.Shape]) -> dict[str, int]:
    """Weights in all, those that one token meets, and those of MTP; `shapes` are `needed(model)`.

    A token meets every weight but those of the experts that are not chosen. What MTP shares with
    the main model counts once, there.
    """
    beyond = _beyond(model)
    everything = sum(math.prod(shape) for shape in shapes.values())
    mtp = sum(math.prod(shape) for name, shape in shapes.items() if name.startswith(beyond))
    main = everything - mtp
    idle = sum(
        3 * model.hidden_size * ffn.intermediate_size * (ffn.num_experts - ffn.num_chosen)
        for ffn in (block.ffn for block in model.blocks)
        if isinstance(ffn, config.Moe)
    )
    return {"total": main, "active": main - idle, "MTP": mtp}


def inspect(source: Path, config_file: Path | None = None) -> bool:
    """Prints what `source` is; whether it is complete: nothing missing, unexpected or misshapen."""
    found = read(source, config_file)
    model = found.model
    values = {n: t for n, t in found.tensors.items() if not n.endswith(fp8.SCALE)}
    present = complete.without_absent_mtp(values, model)
    shapes = complete.needed(present)
    differences = complete.differences(values, shapes, names.copies(present))
    fp8.check_pairs(found.tensors)

    counts = parameters(model, complete.needed(model) if present != model else shapes)
    tables.show(
        f"{source}: {found.published['model_type']}, {model.num_layers} layers",
        ("parameters", "number"),
        [(name, f"{number:,}") for name, number in counts.items()],
    )
    tables.show("tensors", ("kind", "type", "tensors", "numbers", "bytes"), _by_kind(found))
    sizes = {name: num_bytes(tensor) for name, tensor in found.tensors.items()}
    tables.show(
        "import",
        ("what", "amount"),
        [
            ("to read", in_bytes(sum(sizes.values()))),
            ("memory, at most", in_bytes(2**31 + 2 * max(sizes.values(), default=0))),
        ],
    )
    tables.show("fewest devices that hold the weights", MESH_HEADER, _meshes(present))
    rows = [
        ("missing", differences.missing),
        ("unexpected", differences.unexpected),
        ("wrong shape", differences.wrong),
        ("MTP announced, absent", [f"{len(model.mtp)} layers"] if present != model else []),
        ("known by name alone", [f"{found.assumed:,} tensors"] if found.assumed else []),
    ]
    tables.show(
        "against config.json",
        ("what", "number", "which"),
        [(what, f"{len(which):,}", some(which) or "-") for what, which in rows],
    )
    return not (differences.missing or differences.unexpected or differences.wrong)


MESH_HEADER = ("device", "BF16", "mesh", "each", "FP8", "mesh", "each")


def _by_kind(found: Found) -> list[tuple[str, ...]]:
    totals: dict[tuple[str, str], np.ndarray] = collections.defaultdict(lambda: np.zeros(3, object))
    beyond = _beyond(found.model)
    for name, tensor in found.tensors.items():
        kind = "MTP layers" if name.startswith(beyond) else _kind(NUMBER.sub("0", name))
        row = totals[kind, KINDS[tensor.dtype]]
        row += (1, math.prod(tensor.shape), num_bytes(tensor))
    ordered = sorted(totals.items(), key=lambda item: (-item[1][2], item[0]))
    rows = [*ordered, (("all", ""), sum(totals.values(), np.zeros(3, object)))]
    return [(*names, f"{n:,}", f"{size:,}", in_bytes(int(num))) for names, (n, size, num) in rows]


def _meshes(model: config.Model) -> list[tuple[str, ...]]:
    both = [fitting.weights(model, is_fp8=is_fp8) for is_fp8 in (False, True)]
    rows = []
    for device, memory in fitting.DEVICES.items():
        cells = []
        for held in both:
            mesh = fitting.smallest_mesh(held, memory)
            cells += ["none", "", ""]
            if mesh is not None:
                fsdp, expert, least = mesh
                cells[-3:] = [f"{fsdp * expert}", f"fsdp={fsdp} expert={expert}", in_bytes(least)]
        rows.append((device, *cells))
    return rows
