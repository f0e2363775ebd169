"""What `make aot` compiles can at least be traced for the chip, here without its compiler."""

import json

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AbstractDevice, AbstractMesh, AxisType

from pallas_kernels.fp8_grouped_linear import fp8_grouped_linear
from pallas_kernels.fp8_linear import fp8_linear
from tests.kernels.aot_cases import FEW, GPU, TPU, TPU7
from tests.kernels.aot_gpu import faults, missing
from tests.kernels.aot_tpu import BUNDLES, TOPOLOGIES, complaint

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
    everything = GPU | TPU | TPU7
    assert {name.split()[0] for name in FEW} == {name.split()[0] for name in everything}
    assert set(FEW) <= everything.keys()


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


COMPILED = """ptxas info    : Used 168 registers, used 17 barriers
ptxas info    : 0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
        /*1a30*/                   QGMMA.64x128x32.F32.E4M3.E4M3 R24, gdesc[UR4], !UPT ;
"""
SERIALIZED = """ptxas info    : (C7509) Potential Performance Loss: wgmma.mma_async instructions \
are serialized due to the presence of Extern calls in the function 'a_kernel' in line 336
"""


@pytest.mark.parametrize(
    ("name", "log", "wrong"),
    [
        ("fp8_matmul 1x2x3", COMPILED, []),
        ("fp8_matmul 1x2x3", COMPILED.replace("QGMMA", "HMMA"), ["NO QGMMA"]),
        ("fp8_grouped_wgrad 1x2, 3x4", COMPILED.replace("QGMMA", "HMMA"), ["NO QGMMA"]),
        ("grouped_matmul 1, 2x3x4", COMPILED, ["NO HGMMA"]),
        ("grouped_wgrad 1, 2x3x4", COMPILED, ["NO HGMMA"]),
        ("masked_matmul 1x2, 3x4", COMPILED.replace("QGMMA", "HGMMA"), []),
        ("fp8_matmul 1x2x3", COMPILED + SERIALIZED, ["SERIALIZED"]),
        ("quantize_rows 1x2", COMPILED.replace("QGMMA", "HMMA"), []),
        (
            "quantize_rows 1x2",
            COMPILED.replace("0 bytes spill loads", "8 bytes spill loads"),
            ["SPILLED"],
        ),
        ("quantize_rows 1x2", "", ["NO KERNEL"]),
    ],
)
def test_what_is_wrong_with_a_gpu_kernel(name, log, wrong):
    assert faults(name, log) == wrong


@pytest.mark.parametrize(
    ("count", "known", "wrong"),
    [
        (100, {"v5p a": 100}, None),
        (103, {"v5p a": 100}, "GROWN from 100"),
        (0, {"v5p a": 100}, "NO BUNDLES"),
        (0, {}, "NO BUNDLES"),
        (100, {"v6e a": 100}, "NOT RECORDED"),
        (100, {}, None),
    ],
)
def test_what_is_wrong_with_a_tpu_kernel(count, known, wrong):
    found = complaint("v5p a", count, known)
    assert found is None if wrong is None else found.startswith(wrong)


def test_every_tpu_kernel_has_its_bundles():
    names = {f"{chip} {name}" for chip in TOPOLOGIES for name in TPU}
    names |= {f"tpu7x {name}" for name in TPU7}
    assert names == json.loads(BUNDLES.read_text())["bundles"].keys()
