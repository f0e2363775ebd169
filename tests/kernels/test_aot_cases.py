"""What `make aot` compiles can at least be traced for the chip, here without its compiler."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AbstractDevice, AbstractMesh, AxisType

from pallas_kernels.fp8_grouped_linear import fp8_grouped_linear
from pallas_kernels.fp8_linear import fp8_linear
from tests.kernels.aot_cases import FEW, GPU, TPU, TPU7
from tests.kernels.aot_gpu import missing

CHIPS = {
    "gpu": ("NVIDIA H200", 132, GPU),
    "tpu": ("TPU v5", 1, TPU),
    "tpu7x": ("TPU7x", 1, TPU7),
}


# One case of each operation, on each platform.
FIRST = {
    (platform, case.split()[0]): (platform, case)
    for platform, (_, _, cases) in CHIPS.items()
    for case in reversed(cases)
}


@pytest.mark.parametrize(("platform", "case"), FIRST.values())
def test_cases_can_be_traced(platform, case):
    kind, num_cores, cases = CHIPS[platform]
    device = AbstractDevice(device_kind=kind, num_cores=num_cores, platform=platform[:3])
    mesh = AbstractMesh((1,), ("d",), axis_types=(AxisType.Auto,), abstract_device=device)
    function, *arguments = cases[case]
    with jax.sharding.use_abstract_mesh(mesh):
        jax.eval_shape(function, *(jax.ShapeDtypeStruct(*one) for one in arguments))


def test_the_few_are_one_of_each_operation():
    assert {name.split()[0] for name in FEW} == {name.split()[0] for name in TPU | TPU7}
    assert set(FEW) <= (TPU | TPU7).keys()


@pytest.mark.parametrize("platform", ["gpu", "tpu"])
def test_gradients_can_be_traced_per_device(platform):
    kind, num_cores, _ = CHIPS[platform]
    device = AbstractDevice(device_kind=kind, num_cores=num_cores, platform=platform)
    mesh = AbstractMesh((2,), ("d",), axis_types=(AxisType.Auto,), abstract_device=device)

    def gradients(x, w, w_GNK, sizes_G):
        def layers(x, w, w_GNK):
            h = fp8_linear(x, w, implementation=platform)
            return fp8_grouped_linear(h, w_GNK, sizes_G, implementation=platform).sum()

        return jax.grad(layers, argnums=(0, 1, 2))(x, w, w_GNK)

    rows, experts = jax.P("d"), jax.P("d")
    specs = rows, jax.P(), experts
    shapes = (256, 128), (64, 128), (4, 64, 64)
    arguments = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    arguments.append(jax.ShapeDtypeStruct((4,), jnp.int32))
    with jax.sharding.use_abstract_mesh(mesh):
        each = jax.shard_map(gradients, mesh=mesh, in_specs=(*specs, experts), out_specs=specs)
        found = jax.eval_shape(each, *arguments)
    assert tuple(one.shape for one in found) == shapes


def test_what_is_missing_is_named():
    assert missing() is None or missing().startswith("no ")
