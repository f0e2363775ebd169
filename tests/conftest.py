"""Settings every test runs under: 8 virtual CPU devices, no silent promotion, seeds by name."""

import functools
import os
import zlib
from collections.abc import Iterator
from pathlib import Path

import hypothesis
import jax
import optax.tree
import pytest
from jax.experimental.compilation_cache import compilation_cache

import golden

# The suite compiles hundreds of tiny programs: unoptimised machine code halves its time. Processes
# that tests start inherit it.
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_backend_optimization_level=0"

# Tests, the processes they start, and the next run of the suite compile many programs alike.
CACHE = {
    "jax_compilation_cache_dir": str(Path(__file__).parents[1] / ".pytest_cache" / "xla"),
    "jax_persistent_cache_min_compile_time_secs": 0.3,
    "jax_persistent_cache_min_entry_size_bytes": 0,
}
for setting, value in CACHE.items():
    os.environ[setting.upper()] = str(value)
    jax.config.update(setting, value)

# Before any array exists. The suite is about values on 8 CPU devices also where there is a GPU;
# JAX_PLATFORMS, which jax reads itself, says otherwise.
if not jax.config.jax_platforms:
    jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")

# A first call compiles, so no deadline; and the same examples every time, as everywhere else here.
hypothesis.settings.register_profile("dsjax", deadline=None, derandomize=True)
hypothesis.settings.load_profile("dsjax")


def _relaxed(function):
    @functools.wraps(function)
    def call(*args, **kwargs):
        with jax.numpy_dtype_promotion("standard"):
            return function(*args, **kwargs)

    return call


# optax 0.2.8: Adam's bias correction raises a Python float to the power of its int32 step counter,
# which strict promotion refuses. This one function of theirs runs under standard promotion, so that
# all of ours stays strict. (2026-11)
optax.tree.bias_correction = _relaxed(optax.tree.bias_correction)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--goldens",
        type=Path,
        default=golden.COMMITTED,
        help="folder of goldens (default: tests/golden)",
    )
    parser.addoption("--part", default="0/1", help="I/N: the I-th (from 0) of N parts")


def pytest_configure(config: pytest.Config) -> None:
    folder = config.getoption("goldens").resolve()
    if not folder.is_dir():
        raise pytest.UsageError(
            f"--goldens={folder} is no folder; the stored ones are {golden.COMMITTED}"
        )
    golden.use(folder)


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Deals out what other options have left; cases of one function share work, and stay so.

    What starts processes and compiles whole steps comes first, so that at the end small tests are
    left, which several workers share out evenly.
    """
    items.sort(key=lambda item: item.nodeid.partition("::")[0].count("/"))
    try:
        part, parts = map(int, config.getoption("part").split("/"))
    except ValueError:
        part, parts = 0, 0
    if not 0 <= part < parts:
        raise pytest.UsageError(f"--part={config.getoption('part')} is no I/N with 0 <= I < N")
    functions = sorted({item.nodeid.partition("[")[0] for item in items})
    chosen = set(functions[part::parts])
    others = [item for item in items if item.nodeid.partition("[")[0] not in chosen]
    if others:
        config.hook.pytest_deselected(items=others)
        items[:] = [item for item in items if item.nodeid.partition("[")[0] in chosen]


@pytest.fixture(scope="session")
def golden_dir(pytestconfig: pytest.Config) -> Path:
    """The folder of goldens to test against; `make parity` points it at fresh ones."""
    return pytestconfig.getoption("goldens").resolve()


@pytest.fixture(scope="module")
def uncached() -> Iterator[None]:
    """Compiles anew what runs on several virtual devices.

    jaxlib 0.12: such a program from the persistent cache may wait for itself for ever. (2026-11)
    """
    jax.config.update("jax_enable_compilation_cache", False)
    compilation_cache.reset_cache()
    yield
    jax.config.update("jax_enable_compilation_cache", True)
    compilation_cache.reset_cache()


@pytest.fixture
def seed(request: pytest.FixtureRequest) -> int:
    """A seed of the test's own, the same in every run, changed only by renaming the test."""
    return zlib.crc32(request.node.nodeid.encode())
