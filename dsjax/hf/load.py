"""Published weights into a `Transformer`: each tensor used once, each weight filled once.

Every device gets its own slice, and only that slice is read, so memory stays at the size of the
shards whatever the size of the checkpoint.
"""

import dataclasses
import functools
import warnings
from collections.abc import Mapping
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from flax import nnx
from jax.typing import DTypeLike

from dsjax import config, sharding
from dsjax.hf import files, names
from dsjax.hf.config import model_config
from dsjax.hf.files import Tensor, some
from dsjax.hf.names import Source
from dsjax.model import Transformer, abstract
from dsjax.params import FullPrecision, RouterBias

# Rows compared at a time between a tensor and its copy.
COMPARED = 4096


def from_pretrained(
    path: str | Path, dtype: DTypeLike | None = None, mesh: jax.sharding.Mesh | None = None
) -> Transformer:
    """The model of a local Hugging Face directory (V2, V2-Lite, V3, R1, Kimi K2; safetensors).

    Weights come in `dtype`, by default as they are on disk (the embedding's type), and lie sharded
    over `mesh`, or on the default device. ValueError names the file, field or tensor at fault.
    """
    directory = Path(path).expanduser()
    if not directory.is_dir():
        raise ValueError(
            f"{str(path)!r} is no directory; download the model and give its local directory"
        )
    model = model_config(files.read_json(directory / "config.json"))
    tensors = files.open_tensors(directory)
    if dtype is None:
        embedding = names.OUTSIDE["embed"][0]
        if embedding not in tensors:
            raise ValueError(f"{directory} lacks {embedding}; the checkpoint is not complete")
        dtype = tensors[embedding].dtype
    return load_weights(tensors, model, dtype=dtype, mesh=mesh)


def load_weights(
    tensors: Mapping[str, Tensor],
    model: config.Model,
    *,
    dtype: DTypeLike,
    mesh: jax.sharding.Mesh | None = None,
) -> Transformer:
    """The Transformer of `model` with weights from `tensors`, which carry their hub names.

    The router's gate and bias stay at least FP32. A checkpoint without any MTP layer is loaded
    without MTP, with a warning; copies of embedding and head in an MTP layer may be absent but must
    not differ. ValueError lists tensors that are missing, unexpected or of the wrong shape.
    """
    dtype = jnp.dtype(dtype)
    if dtype == jnp.float64 and not jax.config.jax_enable_x64:
        raise ValueError("dtype float64 needs `jax.enable_x64(True)` around it")
    model = _without_absent_mtp(tensors, model)
    module = abstract(model)
    sources = names.sources(module, model)
    _check(tensors, module, sources, names.copies(model))
    placed = None if mesh is None else dict(names.variables(sharding.shardings(module, mesh)))

    def fill(path: tuple, variable: nnx.Variable) -> nnx.Variable:
        name = names.dotted(path)
        kept = isinstance(variable, FullPrecision | RouterBias)
        kind = np.promote_types(dtype, jnp.float32) if kept else dtype
        read = functools.partial(_read, tensors, sources[name], variable.shape, kind)
        if placed is None:
            return variable.replace(jnp.asarray(read((slice(None),) * variable.ndim)))
        # Devices that hold the same slice share one reading of it.
        array = jax.make_array_from_callback(
            variable.shape, placed[name].get_value(), functools.cache(read), dtype=kind
        )
        return variable.replace(array)

    return jax.tree_util.tree_map_with_path(fill, module, is_leaf=sharding.is_variable)


def _read(
    tensors: Mapping[str, Tensor],
    source: Source,
    shape: tuple[int, ...],
    dtype: np.dtype,
    index: tuple[slice, ...],
) -> np.ndarray:
    """`weight[index]` of the weight with `shape`, from the hub tensors that hold a part of it."""
    sizes = source.sizes(shape)
    ranges = {
        letter: range(*part.indices(sizes[letter]))
        for letter, part in zip(source.ours, index, strict=True)
    }
    cut, inner = [], {}
    for first, *others in source.hub:
        # A group is cut along its outer axis here, and along inner ones once it is unfolded.
        width = int(np.prod([sizes[letter] for letter in others], dtype=int))
        cut.append(slice(ranges[first].start * width, ranges[first].stop * width))
        inner |= {letter: sizes[letter] for letter in others}
    single = [letter for letter in source.ours if letter not in source.stacked]
    hub = " ".join(f"({' '.join(axis)})" for axis in source.hub)
    within = tuple(
        slice(ranges[x].start, ranges[x].stop) if x in inner else slice(None) for x in single
    )

    out = np.empty([len(ranges[letter]) for letter in source.ours], dtype)
    # A view of `out` with the stacked axes in front: each tensor is written where it belongs.
    slots = rearrange(out, f"{' '.join(source.ours)} -> {' '.join((*source.stacked, *single))}")
    chosen = source.names[np.ix_(*(ranges[letter] for letter in source.stacked))]
    chosen = np.asarray(chosen, object)
    for place in np.ndindex(chosen.shape):
        piece = tensors[chosen[place]][tuple(cut)]
        slots[place] = rearrange(piece, f"{hub} -> {' '.join(single)}", **inner)[within]
    return out


def _without_absent_mtp(tensors: Mapping[str, Tensor], model: config.Model) -> config.Model:
    beyond = tuple(f"model.layers.{model.num_layers + k}." for k in range(len(model.mtp)))
    if not beyond or any(name.startswith(beyond) for name in tensors):
        return model
    warnings.warn(
        f"the config announces {len(beyond)} MTP layers but the checkpoint holds none "
        f"({beyond[0]}* is absent): loaded without multi-token prediction",
        stacklevel=4,
    )
    return dataclasses.replace(model, mtp=())


def _check(
    tensors: Mapping[str, Tensor],
    module: Transformer,
    sources: Mapping[str, Source],
    copies: Mapping[str, str],
) -> None:
    """ValueError if names, shapes or copies are not as the model needs them."""
    expected = {
        name: sources[path].hub_shape(variable.shape)
        for path, variable in names.variables(module)
        for name in sources[path].names.flat
    }
    missing = sorted(expected.keys() - tensors.keys())
    if missing:
        raise ValueError(f"the checkpoint lacks {len(missing)} tensors: {some(missing)}")
    unexpected = [
        name
        for name in sorted(tensors.keys() - expected.keys() - copies.keys())
        if not names.IGNORED.fullmatch(name)
    ]
    if unexpected:
        raise ValueError(
            f"the checkpoint has {len(unexpected)} tensors that its config.json has no place for: "
            f"{some(unexpected)}"
        )
    expected |= {copy: expected[original] for copy, original in copies.items()}
    wrong = [
        f"{name} is {tuple(tensors[name].shape)}, not {shape}"
        for name, shape in expected.items()
        if name in tensors and tuple(tensors[name].shape) != shape
    ]
    if wrong:
        raise ValueError(
            f"{len(wrong)} tensors have another shape than config.json says: {some(wrong)}"
        )
    for copy, original in copies.items():
        if copy in tensors and not _equal(tensors[copy], tensors[original]):
            raise ValueError(
                f"{copy} differs from {original}; MTP shares embedding and head with the main "
                "model, so they must be equal"
            )


def _equal(one: Tensor, other: Tensor) -> bool:
    """Compared a few rows at a time: these are the largest tensors there are."""
    rows = one.shape[0]
    parts = (slice(row, min(row + COMPARED, rows)) for row in range(0, rows, COMPARED))
    return all(np.array_equal(one[part, slice(None)], other[part, slice(None)]) for part in parts)
