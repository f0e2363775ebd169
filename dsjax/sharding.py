"""The mesh: one, always whole, and the table from logical axis to mesh axes.

Only here is said what they cut. What runs per device in `nn/moe.py`, `nn/dispatch`, `nn/context.py`
and `nn/splash.py` names the axes of its collectives; losses, masks, batches and generation ask how
many devices share a length (`context`); `dsjax.plan` counts along all of them.

Weights are stored sharded over `fsdp` as well, those outside the experts over `expert` too
(ZeRO-3), and gathered by `unshard`, one layer at a time, where they are used. Experts and attention
lie differently on the same devices: what attention cuts by heads over `tensor`, the experts cut by
expert. Everything here also works without a mesh: then it does nothing, so a module can be called
in a notebook like a function.
"""

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.experimental import mesh_utils
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

AXES = ("data", "fsdp", "expert", "tensor", "context")
BATCH_AXES = ("data", "fsdp", "expert")
TOKEN_AXES = (*BATCH_AXES, "context")
AnyMesh = jax.sharding.Mesh | jax.sharding.AbstractMesh

RULES: dict[str | None, tuple[str, ...]] = {
    None: (),
    # Activations.
    "batch": BATCH_AXES,
    "length": ("context",),
    # The length between the layers, where every token stands for itself: norms, adding, routing.
    "residual": ("context", "tensor"),
    # Weights that ZeRO-3 cuts, of the experts and of all others; the rest stay cut while computing.
    "expert_embed": ("fsdp",),
    "embed": ("fsdp", "expert"),
    "heads": ("tensor",),
    "ffn": ("tensor",),
    "vocab": ("tensor",),
    "experts": ("expert", "tensor"),
}
GATHERED = frozenset({"embed", "expert_embed"})

# libtpu 0.0.50 makes an all-gather over all three dimensions of a torus an all-reduce of one piece
# among zeros: twice the bytes, nothing beside it, seconds to compile. Gathered along one dimension
# first and then over the other two, it stays an all-gather. (2026-11)
TORUS = frozenset({"TPU v4", "TPU v5", "TPU v5p", "TPU7x"})


@dataclass(frozen=True)
class Layout:
    """What the mesh leaves open. `dispatch`: how rows travel to experts (`dsjax.nn.dispatch`)."""

    dispatch: str = "auto"


# `with layout(Layout(...))` around a call; part of the key under which jit caches what it traced.
layout = jax.make_user_context(Layout())


def mesh_sizes(
    num_devices: int,
    *,
    data: int = 1,
    fsdp: int = 1,
    expert: int = 1,
    tensor: int = 1,
    context: int = 1,
) -> dict[str, int]:
    """Devices along every axis of a mesh of `num_devices`; one size may be -1, 'the rest'.

    Raises ValueError if the sizes do not multiply to the number of devices.
    """
    sizes = {"data": data, "fsdp": fsdp, "expert": expert, "tensor": tensor, "context": context}
    asked = " ".join(f"mesh.{name}={size}" for name, size in sizes.items())
    rest = [name for name, size in sizes.items() if size == -1]
    known = math.prod(size for size in sizes.values() if size != -1)
    if len(rest) > 1 or known < 1 or min(sizes.values()) < -1:
        raise ValueError(f"{asked}: sizes must be positive, and at most one may be -1 (the rest)")
    if rest and num_devices % known == 0:
        sizes[rest[0]] = num_devices // known
    if math.prod(sizes.values()) != num_devices:
        raise ValueError(
            f"{asked} does not make use of all {num_devices} devices; choose sizes whose product "
            f"is {num_devices}, or set one axis to -1"
        )
    return sizes


def make_mesh(devices: Sequence[jax.Device] | None = None, **sizes: int) -> jax.sharding.Mesh:
    """The mesh over `devices` (default: all), with `sizes` as for `mesh_sizes`.

    Every axis always exists. Raises ValueError if the sizes do not fit the devices.
    """
    devices = jax.devices() if devices is None else list(devices)
    shape = tuple(mesh_sizes(len(devices), **sizes).values())
    explicit = (AxisType.Explicit,) * len(AXES)
    return jax.sharding.Mesh(_arranged(shape, devices), AXES, axis_types=explicit)


def _arranged(shape: tuple[int, ...], devices: Sequence[jax.Device]) -> np.ndarray:
    """Devices in the mesh's shape, neighbours near each other.

    Several TPU slices, or GPU islands, are joined along the first axes that their number divides
    into: `data` or else `fsdp` or else `expert` crosses the slow network. `tensor` and `context`,
    which every layer's activations travel along, never do: ValueError.
    """
    rest = slices = len({getattr(device, "slice_index", 0) for device in devices})
    if slices == 1:
        return mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
    across = []
    for name, size in zip(AXES, shape, strict=True):
        across.append(math.gcd(size, rest) if name in BATCH_AXES else 1)
        rest //= across[-1]
    if rest > 1:
        sizes = " ".join(f"mesh.{name}={size}" for name, size in zip(AXES, shape, strict=True))
        raise ValueError(
            f"{sizes} cannot be laid over {slices} slices (or nodes): tensor and context must stay "
            f"within one; make mesh.data, fsdp or expert {rest} times as large, and the others "
            "smaller"
        )
    inside = [size // outer for size, outer in zip(shape, across, strict=True)]
    return mesh_utils.create_hybrid_device_mesh(
        inside, across, devices, allow_split_physical_axes=True
    )


def active() -> bool:
    """Whether arrays lie over a mesh: one is set, and this is not inside of `local`."""
    mesh = jax.sharding.get_abstract_mesh()
    return not (mesh.empty or mesh.are_all_axes_manual)


def platform() -> str:
    """ "cpu", "gpu" or "tpu": what is compiled for, which may be a mesh of absent devices."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    return jax.default_backend() if device is None else device.platform


def axis_size(name: str) -> int:
    """Devices along mesh axis `name`; 1 without a mesh."""
    return jax.sharding.get_abstract_mesh().shape.get(name, 1)


def cut(*mesh_axes: str, mesh: AnyMesh | None = None) -> tuple[str, ...]:
    """Those of `mesh_axes` that have more than one device: along the others nothing is cut.

    So a mesh of one device compiles to a program without a single collective.
    """
    shape = (jax.sharding.get_abstract_mesh() if mesh is None else mesh).shape
    return tuple(name for name in mesh_axes if shape.get(name, 1) > 1)


def spec(*axes: str | None, mesh: AnyMesh | None = None) -> P:
    """The PartitionSpec on `mesh` (default: the one set) of an array with the logical `axes`."""
    return P(*(cut(*RULES.get(axis, ()), mesh=mesh) or None for axis in axes))


def residual(length: int) -> str:
    """The logical axis of `length` tokens between layers: "residual" where they divide over it."""
    parts = math.prod(axis_size(name) for name in RULES["residual"])
    return "length" if length % parts else "residual"


def reshard(x: jax.Array, *axes: str | None) -> jax.Array:
    """Lays `x` out by logical `axes`: the visible line of a gather or a slice."""
    return jax.reshard(x, spec(*axes)) if active() else x


def einsum(subscripts: str, *operands: jax.Array, axes: Sequence[str | None]) -> jax.Array:
    """`jnp.einsum` with the result laid out by `axes`; contracting a cut axis is an all-reduce."""
    return jnp.einsum(subscripts, *operands, out_sharding=spec(*axes) if active() else None)


def held(x: jax.Array) -> P:
    """How `x` lies on the mesh; of no meaning without one."""
    return jax.typeof(x).sharding.spec


def weights_held(module):
    """How every weight of a module lies that is put into `local`, in the module's structure."""

    def one(variable: nnx.Variable) -> nnx.Variable:
        value = variable.get_value()
        # Several arrays in one, as FP8 checkpoints have them, lie alike.
        return variable.replace(
            held(value) if isinstance(value, jax.Array) else compute_spec(variable)
        )

    return jax.tree.map(one, module, is_leaf=is_variable)


def local(function: Callable, in_specs, out_specs, *, checked: bool = True) -> Callable:
    """`function` on each device's own piece (`jax.shard_map`); itself without a mesh, or inside.

    `checked=False`: jax need not follow along which mesh axes values vary.
    """
    if not active():
        return function
    return jax.shard_map(function, in_specs=in_specs, out_specs=out_specs, check_vma=checked)


def varying(tree, *mesh_axes: str):
    """Inside `local`: marks values that are equal along `mesh_axes` as each device's own.

    Backward this is the sum over those axes: of a weight's gradient over the tokens' devices.
    """
    if not (mesh_axes := cut(*mesh_axes)):
        return tree
    return jax.tree.map(lambda x: jax.lax.pcast(x, mesh_axes, to="varying"), tree)


def summed(x: jax.Array, *mesh_axes: str) -> jax.Array:
    """Inside `local`: the sum over the devices along `mesh_axes`, which all of them get."""
    mesh_axes = cut(*mesh_axes)
    return jax.lax.psum(x, mesh_axes) if mesh_axes else x


def gathered(x: jax.Array, *mesh_axes: str, axis: int) -> jax.Array:
    """Inside `local`: the pieces of all devices along `mesh_axes`, joined along `axis`.

    Backward a device gets the sum of what all have for its piece (a reduce-scatter).
    """
    if mesh_axes := cut(*mesh_axes):
        for stage in _stages(mesh_axes):
            x = jax.lax.all_gather(x, mesh_axes, axis=axis, tiled=True, axis_index_groups=stage)
    return x


def scattered(x: jax.Array, *mesh_axes: str, axis: int) -> jax.Array:
    """Inside `local`: this device's piece along `axis` of the sum over `mesh_axes`."""
    if mesh_axes := cut(*mesh_axes):
        for stage in reversed(_stages(mesh_axes)):
            x = jax.lax.psum_scatter(
                x, mesh_axes, scatter_dimension=axis, tiled=True, axis_index_groups=stage
            )
    return x


def _stages(mesh_axes: tuple[str, ...]) -> list[list[list[int]] | None]:
    """Who gathers with whom, and then with whom else; [None]: all at once."""
    near = _first_stage(mesh_axes)
    if near == 1:
        return [None]
    places = np.arange(math.prod(map(axis_size, mesh_axes))).reshape(-1, near)
    return [places.tolist(), places.T.tolist()]


def _first_stage(mesh_axes: tuple[str, ...]) -> int:
    """How many neighbours gather before all devices along `mesh_axes` do; 1: all at once."""
    size = math.prod(axis_size(name) for name in mesh_axes)
    device = jax.sharding.get_abstract_mesh().abstract_device
    on_torus = device is not None and device.device_kind in TORUS
    return 8 if on_torus and size >= 64 and size % 8 == 0 else 1


def own_slice(x: jax.Array, logical: str, *, axis: int) -> jax.Array:
    """Inside `local`: of an `x` that is whole, this device's piece of `axis`, cut as `logical`.

    Outside it is `x` itself.
    """
    mesh_axes = () if active() else cut(*RULES[logical])
    if not mesh_axes:
        return x
    size = x.shape[axis] // math.prod(axis_size(name) for name in mesh_axes)
    return jax.lax.dynamic_slice_in_dim(x, jax.lax.axis_index(mesh_axes) * size, size, axis)


def largest(x: jax.Array, *mesh_axes: str) -> jax.Array:
    """Inside `local`: the largest of the devices along `mesh_axes`; has no gradient."""
    mesh_axes = cut(*mesh_axes)
    return jax.lax.pmax(x, mesh_axes) if mesh_axes else x


def completed(y: jax.Array, parts: P, laid_out: P) -> jax.Array:
    """Inside `local`: the sum of what each device along the mesh axes in `parts` has of `y`.

    Along a dimension that `laid_out` cuts over those axes, a device gets its own part of the sum.
    """
    missing = {name for entry in parts for name in axes_of(entry)}
    for dim, entry in enumerate(laid_out):
        if here := tuple(name for name in axes_of(entry) if name in missing):
            y = jax.lax.psum_scatter(y, here, scatter_dimension=dim, tiled=True)
            missing -= set(here)
    return jax.lax.psum(y, tuple(missing)) if missing else y


def axes_of(entry: str | tuple[str, ...] | None) -> tuple[str, ...]:
    """The mesh axes in one entry of a PartitionSpec."""
    return (entry,) if isinstance(entry, str) else entry or ()


def is_variable(node) -> bool:
    return isinstance(node, nnx.Variable)


def _axes(variable: nnx.Variable) -> tuple[str | None, ...]:
    """Logical axes of a weight; a stack of layers has leading axes that no one cuts."""
    missing = variable.get_value().ndim - len(variable.axes)
    return (None,) * missing + tuple(variable.axes)


def stored_spec(variable: nnx.Variable, mesh: AnyMesh | None = None) -> P:
    """Where a weight lives between its uses."""
    return spec(*_axes(variable), mesh=mesh)


def compute_spec(variable: nnx.Variable, mesh: AnyMesh | None = None) -> P:
    """Where a weight lies while it is used: no longer cut as ZeRO-3 cuts it."""
    axes = (None if axis in GATHERED else axis for axis in _axes(variable))
    return spec(*axes, mesh=mesh)


def unshard(module):
    """Gathers a layer's weights; backward each device keeps its piece of their gradients' sum.

    What is gathered is `reduced` in jax's terms: its gradient is what each device has, `unreduced`,
    until the one reduce-scatter here.
    """
    if not active():
        return module
    return jax.tree.map(_unsharded, module, is_leaf=is_variable)


def _unsharded(variable: nnx.Variable) -> nnx.Variable:
    where, value = compute_spec(variable), variable.get_value()
    cuts = [axis for axis, name in enumerate(_axes(variable)) if name in GATHERED]
    by = axes_of(held(value)[cuts[0]]) if cuts else ()
    # With `tensor` inputs and gradients of outputs lie differently, and jax then asks for the sum.
    if not by or cut("tensor"):
        return variable.replace(jax.reshard(value, where))
    used_by = {name for entry in where for name in axes_of(entry)}
    summed_over = tuple(name for name in cut(*TOKEN_AXES) if name not in used_by)
    return variable.replace(_joined(value, cuts[0], by, where, summed_over))


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2, 3, 4))
def _joined(x, axis: int, by: tuple[str, ...], where: P, summed_over: tuple[str, ...]):
    whole = jax.shard_map(
        lambda x: gathered(x, *by, axis=axis), in_specs=held(x), out_specs=where, check_vma=False
    )(x)
    return jax.reshard(whole, P(*where, reduced=frozenset(summed_over)))


def _pieces(axis, by, where, summed_over, _, grad):
    def on_device(grad):
        return summed(
            scattered(grad, *by, axis=axis), *(name for name in summed_over if name not in by)
        )

    before = list(where)
    before[axis] = by
    piece = jax.shard_map(
        on_device,
        in_specs=P(*where, unreduced=frozenset(summed_over)),
        out_specs=P(*before),
        check_vma=False,
    )(grad)
    return (piece,)


_joined.defvjp(lambda x, *how: (_joined(x, *how), None), _pieces)


def shardings(module, mesh: AnyMesh):
    """The stored sharding of every leaf of a (possibly abstract) module or training state.

    Counters and other arrays that are no variables lie whole on every device.
    Raises ValueError naming the weight whose dimension does not divide over its mesh axis.
    """
    return _placed(module, mesh, stored_spec)


def serving_shardings(module, mesh: AnyMesh):
    """As `shardings`, for generation: weights lie as they are used, so that none is gathered."""
    return _placed(module, mesh, compute_spec)


def _placed(module, mesh: AnyMesh, spec_of: Callable):
    def one(path, variable):
        if not is_variable(variable):
            return NamedSharding(mesh, P())
        partition = spec_of(variable, mesh)
        for size, names in zip(variable.get_value().shape, partition, strict=True):
            names = axes_of(names)
            parts = math.prod(mesh.shape[name] for name in names)
            if size % parts:
                raise ValueError(
                    f"{jax.tree_util.keystr(path)} has a dimension of {size}, which does not "
                    f"divide over mesh axis {'*'.join(names)}={parts}; choose a divisor of {size}"
                )
        return variable.replace(NamedSharding(mesh, partition))

    return jax.tree_util.tree_map_with_path(one, module, is_leaf=is_variable)
