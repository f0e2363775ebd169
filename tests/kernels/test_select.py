"""The one switch between implementations: argument, preference, first that fits, reasons kept."""

import logging

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AbstractDevice, AbstractMesh, AxisType

from pallas_kernels import chip, fp8_grouped_matmul, fp8_grouped_wgrad, fp8_masked_matmul, select
from pallas_kernels import fp8_matmul as dense
from pallas_kernels.fp8_matmul import fp8_matmul
from pallas_kernels.grouped_matmul import grouped_matmul


def unfit(x):
    raise select.Unsupported(f"double/gpu wants 7 rows, got {x}")


TABLE = {"gpu": unfit, "tpu": lambda x: ("tpu", x), "reference": lambda x: ("reference", x)}


def double(x, implementation=None):
    return select.run("double", TABLE, implementation, x)


def test_a_named_implementation_runs_or_raises():
    assert double(1, "reference") == ("reference", 1)
    with pytest.raises(NotImplementedError, match=r"wants 7 rows, got 1; name another implementa"):
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


PRODUCT = [
    jax.ShapeDtypeStruct(shape, dtype)
    for shape, dtype in (
        *(((8, 256), jnp.float8_e4m3fn), ((8, 2), jnp.float32)),
        *(((64, 256), jnp.float8_e4m3fn), ((1, 2), jnp.float32)),
    )
]


@pytest.fixture
def said(caplog):
    """What was logged, as if nothing had been before."""
    select._log_once.cache_clear()
    caplog.set_level(logging.INFO, "pallas_kernels")
    return caplog


@pytest.mark.parametrize(
    ("platform", "kind", "default"),
    [
        ("tpu", "TPU v5", "dequantize_bf16"),
        ("tpu", "TPU v6 lite", "dequantize_bf16"),
        ("tpu", "TPU7x", "tpu"),
        ("gpu", "NVIDIA H200", "gpu"),
        ("gpu", "NVIDIA A100-SXM4-80GB", "dequantize_bf16"),
        ("cpu", "cpu", "dequantize"),
    ],
)
@pytest.mark.parametrize(
    "table",
    [dense, fp8_grouped_matmul, fp8_grouped_wgrad, fp8_masked_matmul],
    ids=lambda module: module.__name__,
)
def test_the_default_is_the_fast_one_of_the_chip(table, platform, kind, default):
    def taken(name):
        def implementation():
            if name in ("gpu", "tpu") and (platform != name or "A100" in kind):
                raise select.Unsupported(name)
            return name

        return implementation

    with jax.sharding.use_abstract_mesh(described(platform, kind)):
        names = {name: taken(name) for name in table.IMPLEMENTATIONS}
        assert select.run("op", names, None) == default


def test_the_exact_kernel_is_there_by_name():
    with jax.sharding.use_abstract_mesh(described("tpu", "TPU v6 lite")):
        program = {
            name: str(jax.make_jaxpr(lambda *a, n=name: fp8_matmul(*a, implementation=n))(*PRODUCT))
            for name in ("tpu", None)
        }
    assert "pallas_call" in program["tpu"]
    assert "pallas_call" not in program[None]


def test_what_the_default_took_is_said_once(said):
    with jax.sharding.use_abstract_mesh(described("gpu", "NVIDIA A100-SXM4-80GB")):
        for _ in range(2):
            jax.eval_shape(fp8_matmul, *PRODUCT)
    told, warned = said.records
    assert (told.levelname, warned.levelname) == ("INFO", "WARNING")
    assert told.message.startswith("fp8_matmul of float8_e4m3fn(8, 256), float32(8, 2), ")
    assert "takes 'dequantize_bf16': fp8_matmul/gpu wants an NVIDIA Hopper GPU" in told.message
    assert "fp8_matmul goes without its kernel and takes 'dequantize_bf16'" in warned.message


@pytest.mark.parametrize(("platform", "kind"), [("cpu", "cpu"), ("tpu", "TPU v5")])
def test_nobody_is_warned_where_nothing_better_is(platform, kind, said):
    with jax.sharding.use_abstract_mesh(described(platform, kind)):
        jax.eval_shape(fp8_matmul, *PRODUCT)
    assert [one.levelname for one in said.records] == ["INFO"]


def test_a_gpu_says_how_many_cores_it_has():
    unknown = AbstractDevice(device_kind="NVIDIA H200", num_cores=None, platform="gpu")
    mesh = AbstractMesh((1,), ("d",), axis_types=(AxisType.Auto,), abstract_device=unknown)
    with (
        jax.sharding.use_abstract_mesh(mesh),
        pytest.raises(ValueError, match=r"no number of cores is known of 'NVIDIA H200'.*num_c"),
    ):
        jax.eval_shape(fp8_matmul, *PRODUCT)


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
