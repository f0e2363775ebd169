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
from dsjax.block_scaled import BlockScaled
from dsjax.convert.opened import open_checkpoint
from dsjax.hf import complete, fp8, names
from dsjax.hf.names import Source
from dsjax.hf.tensors import Tensor
from dsjax.model import Transformer, abstract
from dsjax.params import FullPrecision, RouterBias


def from_pretrained(
    path: str | Path,
    dtype: DTypeLike | None = None,
    mesh: jax.sharding.Mesh | None = None,
    *,
    keep_fp8: bool = False,
) -> Transformer:
    """The model of a local Hugging Face directory (V2, V2-Lite, V3, R1, Kimi K2; safetensors), of
    one that `convert_weights.py` made from it, or of a training run.

    Weights come in `dtype`, by default as they are on disk (the embedding's type), and lie sharded
    over `mesh`, or on the default device. FP8 weights are multiplied by their scales and rounded
    once, or with `keep_fp8` stay values and scales as they are on disk, for inference
    (`dsjax.block_scaled`). ValueError names the file, field or tensor at fault.
    """
    checkpoint = open_checkpoint(path)
    tensors = checkpoint.tensors
    if dtype is None:
        embedding = names.OUTSIDE["embed"][0]
        if embedding not in tensors:
            raise ValueError(f"{path} lacks {embedding}; the checkpoint is not complete")
        dtype = tensors[embedding].dtype
    if keep_fp8 and not any(tensor.dtype == fp8.VALUES for tensor in tensors.values()):
        raise ValueError(
            f"{path} has no FP8 weights to keep; make some: "
            "python convert_weights.py cast SRC DST --dtype fp8"
        )
    tensors = fp8.dequantized(tensors, jnp.dtype(dtype))
    return load_weights(tensors, checkpoint.model, dtype=dtype, mesh=mesh, keep_fp8=keep_fp8)


def load_weights(
    tensors: Mapping[str, Tensor],
    model: config.Model,
    *,
    dtype: DTypeLike,
    mesh: jax.sharding.Mesh | None = None,
    keep_fp8: bool = False,
) -> Transformer:
    """The Transformer of `model` with weights from `tensors`, which carry their hub names.

    `keep_fp8`: what `fp8.dequantized` would multiply stays `BlockScaled`. The gate and the bias of
    the router stay at least FP32. A checkpoint without any MTP layer is loaded without MTP, with a
    warning; copies of embedding and head in an MTP layer may be absent but must not differ.
    ValueError lists tensors that are missing, unexpected or of the wrong shape.
    """
    dtype = jnp.dtype(dtype)
    if dtype == jnp.float64 and not jax.config.jax_enable_x64:
        raise ValueError("dtype float64 needs `jax.enable_x64(True)` around it")
    announced, model = len(model.mtp), complete.without_absent_mtp(tensors, model)
    if len(model.mtp) < announced:
        warnings.warn(
            f"the config announces {announced} MTP layers but the checkpoint holds none "
            f"(model.layers.{model.num_layers}.* is absent): loaded without multi-token prediction",
            stacklevel=3,
        )
    module = abstract(model)
    sources, copies = names.sources(module, model), names.copies(model)
    complete.differences(tensors, complete.needed(model), copies).check()
    complete.check_copies(tensors, copies)
    placed = None if mesh is None else dict(names.variables(sharding.shardings(module, mesh)))

    def fill(path: tuple, variable: nnx.Variable) -> nnx.Variable:
        name = names.dotted(path)
        if keep_fp8 and _is_fp8(tensors, sources[name]):
            return _kept(tensors, sources[name], variable, mesh)
        kept = isinstance(variable, FullPrecision | RouterBias)
        kind = np.promote_types(dtype, jnp.float32) if kept else dtype
        where = None if placed is None else placed[name].get_value()
        return variable.replace(_array(tensors, sources[name], variable.shape, kind, where))

    return jax.tree_util.tree_map_with_path(fill, module, is_leaf=sharding.is_variable)


def _is_fp8(tensors: Mapping[str, Tensor], source: Source) -> bool:
    """Whether all of a weight is FP8 on disk."""
    return all(isinstance(tensors[name], fp8.Dequantized) for name in source.names.flat)


def _kept(
    tensors: Mapping[str, Tensor],
    source: Source,
    variable: nnx.Variable,
    mesh: jax.sharding.Mesh | None,
) -> nnx.Variable:
    """The weight as it is on disk; cut where experts are told apart, and nowhere else."""
    sizes = source.sizes(variable.shape)
    single = [letter for letter in source.stacked if letter != "l"]
    ours = " ".join(letter for letter in source.ours if letter != "l")
    unfolded = [letter for axis in source.hub if len(axis) > 1 for letter in axis]
    variable = variable.replace(
        axes=(*("experts" if letter == "e" else None for letter in single), None, None)
    )
    plain = dataclasses.replace(source, ours=(*source.stacked, "N", "K"), hub=(("N",), ("K",)))
    stack, matrix = source.names.shape, source.hub_shape(variable.shape)

    where = None
    if mesh is not None:
        layers = (None,) * (len(stack) - len(single))
        where = jax.NamedSharding(mesh, sharding.spec(*layers, *variable.axes, mesh=mesh))
    values = {name: tensors[name].values for name in source.names.flat}
    scales = {name: tensors[name].checked_scales for name in source.names.flat}
    return variable.replace(
        BlockScaled(
            _array(values, plain, (*stack, *matrix), fp8.VALUES, where),
            _array(scales, plain, (*stack, *fp8.grid(matrix)), np.dtype(np.float32), where),
            layout=f"... {' '.join((*single, source.hub_axes))} -> ... {ours}",
            widths=tuple((letter, sizes[letter]) for letter in unfolded),
        )
    )


def _array(
    tensors: Mapping[str, Tensor],
    source: Source,
    shape: tuple[int, ...],
    dtype: np.dtype,
    where: jax.NamedSharding | None,
) -> jax.Array:
    """The weight with `shape`, laid out as `where` says, or on the default device."""
    read = functools.partial(_read, tensors, source, shape, dtype)
    if where is None:
        return jnp.asarray(read((slice(None),) * len(shape)))
    # Devices that hold the same slice share one reading of it.
    return jax.make_array_from_callback(shape, where, functools.cache(read), dtype=dtype)


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
        slots[place] = rearrange(piece, f"{source.hub_axes} -> {' '.join(single)}", **inner)[within]
    return out
