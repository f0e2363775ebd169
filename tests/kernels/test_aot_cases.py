"""What `make aot` compiles can at least be traced for the chip, here without its compiler."""

import jax
import pytest
from jax.sharding import AbstractDevice, AbstractMesh, AxisType

from tests.kernels.aot_cases import GPU, TPU
from tests.kernels.aot_gpu import missing

CHIPS = {"gpu": ("NVIDIA H200", 132, GPU), "tpu": ("TPU v5", 1, TPU)}


# One case of each operation, on each platform.
FIRST = {
    (platform, case.split()[0]): (platform, case)
    for platform, (_, _, cases) in CHIPS.items()
    for case in reversed(cases)
}


@pytest.mark.parametrize(("platform", "case"), FIRST.values())
def test_cases_can_be_traced(platform, case):
    kind, num_cores, cases = CHIPS[platform]
    device = AbstractDevice(device_kind=kind, num_cores=num_cores, platform=platform)
    mesh = AbstractMesh((1,), ("d",), axis_types=(AxisType.Auto,), abstract_device=device)
    function, *arguments = cases[case]
    with jax.sharding.use_abstract_mesh(mesh):
        jax.eval_shape(function, *(jax.ShapeDtypeStruct(*one) for one in arguments))


def test_what_is_missing_is_named():
    assert missing() is None or missing().startswith("no ")
