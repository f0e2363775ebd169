"""The one switch between implementations: argument, preference, first that fits, reasons kept."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AbstractDevice, AbstractMesh, AxisType

from pallas_kernels import chip, select
from pallas_kernels.grouped_matmul import grouped_matmul


def unfit(x):
    raise select.Unsupported(f"double/gpu wants 7 rows, got {x}")


TABLE = {"gpu": unfit, "tpu": lambda x: ("tpu", x), "reference": lambda x: ("reference", x)}


def double(x, implementation=None):
    return select.run("double", TABLE, implementation, x)


def test_a_named_implementation_runs_or_raises():
    assert double(1, "reference") == ("reference", 1)
    with pytest.raises(NotImplementedError, match=r"double/gpu wants 7 rows, got 1"):
        double(1, "gpu")


def test_the_default_is_the_first_that_fits():
    assert double(1) == ("tpu", 1)


def test_every_reason_is_kept():
    with pytest.raises(ExceptionGroup, match="no implementation of double takes") as caught:
        select.run("double", {"gpu": unfit, "tpu": unfit}, None, 3)
    assert [str(one) for one in caught.value.exceptions] == ["double/gpu wants 7 rows, got 3"] * 2


def test_what_pallas_lacks_is_no_reason_to_go_on():
    def broken(x):
        raise NotImplementedError("lowering of a primitive")

    with pytest.raises(NotImplementedError, match="lowering of a primitive"):
        select.run("double", {"gpu": broken, "reference": TABLE["reference"]}, None, 1)


def test_a_preference_is_followed_where_it_can_be_and_ends():
    with select.prefer("reference"):
        assert double(1) == ("reference", 1)
        assert double(1, "tpu") == ("tpu", 1)
        with select.prefer(None):
            assert double(1) == ("tpu", 1)
    with select.prefer("gpu"), pytest.raises(select.Unsupported):
        double(1)
    with select.prefer("ragged_dot"):
        assert double(1) == ("tpu", 1)
    assert double(1) == ("tpu", 1)


def test_a_compiled_function_follows_the_preference():
    table = {"gpu": lambda x: x + 1, "reference": lambda x: x + 2}
    compiled = jax.jit(lambda x: select.run("add", table, None, x))
    assert compiled(0) == 1
    with select.prefer("reference"):
        assert compiled(0) == 2
    assert compiled(0) == 1


def test_unknown_names_are_errors():
    with pytest.raises(ValueError, match=r"double: implementation 'cuda'; there are \['gpu'"):
        double(1, "cuda")
    with pytest.raises(ValueError, match="implementation 'refrence'; there are gpu, tpu"):
        select.prefer("refrence")


def test_grouped_matmul_follows_the_preference():
    x, w, sizes = jnp.ones((4, 3)), jnp.ones((2, 3, 5)), jnp.array([1, 3], jnp.int32)
    with select.prefer("ragged_dot"):
        assert "ragged_dot" in str(jax.make_jaxpr(grouped_matmul)(x, w, sizes))
    with select.prefer("reference"):
        assert "ragged_dot" not in str(jax.make_jaxpr(grouped_matmul)(x, w, sizes))


def described(platform: str, kind: str) -> AbstractMesh:
    return AbstractMesh(
        (1,),
        ("d",),
        axis_types=(AxisType.Auto,),
        abstract_device=AbstractDevice(device_kind=kind, num_cores=132, platform=platform),
    )


def test_the_chip_is_that_of_the_mesh_in_context():
    assert chip.chip().platform == "cpu"
    with jax.sharding.use_abstract_mesh(described("gpu", "NVIDIA H200")):
        assert chip.chip() == ("gpu", "NVIDIA H200", 132)
        chip.needs_hopper("double")
        with pytest.raises(select.Unsupported, match=r"double/tpu wants a TPU, .*'NVIDIA H200'"):
            chip.needs_tpu("double")
    with jax.sharding.use_abstract_mesh(described("tpu", "TPU v5")):
        chip.needs_tpu("double")


@pytest.mark.parametrize("kind", ["NVIDIA A100-SXM4-80GB", "NVIDIA B200", "NVIDIA H2000"])
def test_other_gpus_are_refused(kind):
    with (
        jax.sharding.use_abstract_mesh(described("gpu", kind)),
        pytest.raises(select.Unsupported, match=f"wants an NVIDIA Hopper GPU, here is '{kind}'"),
    ):
        chip.needs_hopper("double")


def test_the_interpreter_stands_for_a_chip():
    with pytest.raises(select.Unsupported, match="double/gpu wants an NVIDIA Hopper GPU, here is"):
        chip.needs_hopper("double")
    with chip.interpreted("gpu"):
        chip.needs_hopper("double")
        with pytest.raises(select.Unsupported):
            chip.needs_tpu("double")
    with chip.interpreted("tpu"):
        chip.needs_tpu("double")
    with pytest.raises(ValueError, match="platform 'cpu'; there are interpreters for"):
        chip.interpreted("cpu").__enter__()
