"""Who may import whom, modules as values, small files, imports without effects.

Every check is a function over source text or names, and a test beside it shows it finding a fault.
To place a new module, write its name into `LAYERS`.
"""

import ast
import fnmatch
import graphlib
import json
import os
import subprocess
import sys
from collections.abc import Collection, Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

# From the bottom up: a module imports from its own layer and from those below, without cycles.
# A trailing `.*` stands for a package and all that is in it.
LAYERS = (
    ("kernels", ["pallas_kernels.*"]),
    (
        "description",
        [
            "dsjax.config",
            "dsjax.run",
            "dsjax.overrides",
            "dsjax.run_file",
            "dsjax.sharding",
            "dsjax.params",
            "dsjax.block_scaled",
        ],
    ),
    ("layers", ["dsjax.nn.*"]),
    ("model", ["dsjax.model", "dsjax.losses", "dsjax.optim"]),
    (
        "work",
        [
            "dsjax",
            "dsjax.train_step",
            "dsjax.generate",
            "dsjax.checkpoint",
            "dsjax.data.*",
            "dsjax.hf.*",
            "dsjax.convert.*",
            "dsjax.flops",
            "dsjax.metrics",
            "dsjax.batches",
            "dsjax.eplb",
            "dsjax.guard",
            "dsjax.host_memory",
            "dsjax.plan.*",
            "dsjax.plots",
            "dsjax.processes",
            "dsjax.progress",
            "dsjax.run_folder",
            "dsjax.trace",
        ],
    ),
    ("front", ["train", "convert_weights", "configs.*", "dsjax.cli", "benchmarks.*"]),
    ("door", ["dsjax.__main__"]),
)
FRONT = len(LAYERS) - 2  # imported by nothing but the door, not even by its own kind
# The kernels stand alone: they can be copied into another project.
KERNELS_MAY_USE = {"jax", "jaxtyping", "numpy"}
# Cost more than they are worth on the way to `--help`: imported inside the functions that use them.
HEAVY = ("grain", "matplotlib", "pyarrow", "tensorboardX")
# nnx modules are pytrees, so jax's own transforms serve; nnx's thread state behind their arguments.
LIFTED = {
    *("cond", "custom_vjp", "eval_shape", "fori_loop", "grad", "jit", "jvp", "map", "pmap"),
    *("cached_partial", "checkpoint", "jit_partial", "remat", "scan", "shard_map", "split_rngs"),
    *("switch", "value_and_grad", "vjp", "vmap", "while_loop"),
}
MOST_LINES = 400


def module_name(path: Path) -> str:
    name = ".".join(path.relative_to(ROOT).with_suffix("").parts)
    return name.removesuffix(".__init__")


FILES = {
    module_name(path): path
    for pattern in (
        "*.py",
        *(f"{top}/**/*.py" for top in ("dsjax", "pallas_kernels", "configs", "benchmarks")),
    )
    for path in sorted(ROOT.glob(pattern))
}


def layer(module: str) -> int | None:
    """The number of the layer that lists `module` or a package around it."""
    for number, (_, listed) in enumerate(LAYERS):
        if any(fnmatch.fnmatch(module, name) or f"{module}.*" == name for name in listed):
            return number
    return None


def imports(source: str, known: Collection[str]) -> Iterator[tuple[int, str]]:
    """(line, module) for every import; a name imported from a package counts as its submodule."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        if isinstance(node, ast.ImportFrom):
            base = "." * node.level + (node.module or "")
            for alias in node.names:
                inner = f"{base}.{alias.name}"
                yield node.lineno, inner if inner in known else base


def layering_faults(source: str, module: str, known: Collection[str]) -> list[str]:
    here = layer(module)
    if here is None:
        return [f"{module} is in no layer: add it to LAYERS in tests/test_architecture.py"]
    faults = []
    for line, target in imports(source, known):
        there, root = layer(target), target.partition(".")[0]
        where = f"{module}:{line} ({LAYERS[here][0]}) must not import {target}"
        if target.startswith("."):
            faults.append(f"{where}: write its full name")
        elif there is not None and (there > here or there == here == FRONT):
            faults.append(f"{where} ({LAYERS[there][0]})")
        elif here == 0 and there != 0 and root not in KERNELS_MAY_USE | sys.stdlib_module_names:
            faults.append(f"{where}: kernels use {sorted(KERNELS_MAY_USE)} and nothing else")
    return faults


def lifted_transforms(source: str, module: str) -> list[str]:
    faults = []
    for node in ast.walk(ast.parse(source)):
        names = []
        if isinstance(node, ast.Attribute) and ast.unparse(node.value).split(".")[-1] == "nnx":
            names = [node.attr]
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("flax.nnx"):
            names = [alias.name for alias in node.names]
        faults += [
            f"{module}:{node.lineno} use jax's {name}, not nnx.{name}"
            for name in names
            if name in LIFTED
        ]
    return faults


def self_writes(source: str, module: str) -> list[str]:
    """Assignments to `self`, or to anything reached through it, outside `__init__`."""
    faults = []
    for function in ast.walk(ast.parse(source)):
        if not isinstance(function, ast.FunctionDef) or function.name == "__init__":
            continue
        for node in ast.walk(function):
            target, stored = node, isinstance(getattr(node, "ctx", None), ast.Store | ast.Del)
            if isinstance(node, ast.Call) and node.args:
                called = ast.unparse(node.func).split(".")[-1]
                target, stored = node.args[0], called in ("setattr", "__setattr__")
            while isinstance(target, ast.Attribute | ast.Subscript):
                target = target.value
            is_self = isinstance(target, ast.Name) and target.id == "self"
            if stored and is_self:
                faults.append(f"{module}:{node.lineno} {function.name} writes {ast.unparse(node)}")
    return faults


def too_long(source: str, module: str) -> list[str]:
    lines = len(source.splitlines())
    return [f"{module} has {lines} lines, more than {MOST_LINES}"] * (lines > MOST_LINES)


def cycle(graph: dict[str, set[str]]) -> list[str]:
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as error:
        return error.args[1]
    return []


def import_effects(modules: list[str], folder: Path) -> str:
    """Imports `modules` in a fresh Python in which starting any jax backend is an error.

    Returns what went wrong, or the heavy packages that came along; empty when all is well.
    """
    program = (
        f"import importlib, sys\nfor name in {modules!r}:\n    importlib.import_module(name)\n"
        f"print(*(name for name in {HEAVY!r} if name in sys.modules))"
    )
    # No backend has this name: whoever asks jax for devices or makes an array fails here.
    environment = os.environ | {"JAX_PLATFORMS": "no_such_backend", "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=folder, env=environment, capture_output=True, text=True
    )
    return done.stdout.strip() if done.returncode == 0 else done.stderr.strip()


@pytest.mark.parametrize("module", FILES)
def test_imports_point_downwards(module):
    assert layering_faults(FILES[module].read_text(), module, FILES) == []


def test_imports_have_no_cycle():
    graph = {
        module: {name for _, name in imports(path.read_text(), FILES)} & FILES.keys()
        for module, path in FILES.items()
        if module != "dsjax"  # its names load on first use
    }
    assert cycle({module: used - {module, "dsjax"} for module, used in graph.items()}) == []


@pytest.mark.parametrize("module", FILES)
def test_transforms_are_jax_s(module):
    assert lifted_transforms(FILES[module].read_text(), module) == []


@pytest.mark.parametrize(
    "module", [name for name in FILES if name == "dsjax.model" or name.startswith("dsjax.nn.")]
)
def test_modules_are_values(module):
    assert self_writes(FILES[module].read_text(), module) == []


@pytest.mark.parametrize("module", [name for name in FILES if layer(name) < FRONT])
def test_files_are_short(module):
    assert too_long(FILES[module].read_text(), module) == []


def test_imports_have_no_effect():
    packages = [name for name in FILES if name.split(".")[0] in ("dsjax", "pallas_kernels")]
    assert import_effects(packages, ROOT) == ""


@pytest.mark.parametrize("path", sorted(ROOT.glob("notebooks/*.ipynb")), ids=lambda path: path.name)
def test_notebooks_are_stored_without_outputs(path):
    cells = json.loads(path.read_text())["cells"]
    code = [cell for cell in cells if cell["cell_type"] == "code"]
    assert [cell for cell in code if cell["outputs"] or cell["execution_count"]] == []


KNOWN = {"dsjax.config", "dsjax.model", "dsjax.nn", "dsjax.nn.mla", "dsjax.hf", "dsjax.cli"}


@pytest.mark.parametrize(
    ("module", "source", "fault"),
    [
        ("dsjax.config", "from dsjax.model import Transformer", "(description) must not import"),
        ("dsjax.config", "from dsjax import model", "must not import dsjax.model (model)"),
        ("dsjax.config", "import dsjax", "must not import dsjax (work)"),
        ("dsjax.nn.mla", "def f():\n    import dsjax.hf.names", ":2 (layers) must not import"),
        ("dsjax.nn.mla", "from ..model import Transformer", "import ..model: write its full name"),
        ("dsjax.hf", "import dsjax.cli", "must not import dsjax.cli (front)"),
        ("train", "from convert_weights import main", "must not import convert_weights (front)"),
        ("pallas_kernels.swiglu", "from dsjax.config import Mla", "must not import dsjax.config"),
        ("pallas_kernels.swiglu", "import flax", "kernels use ['jax', 'jaxtyping', 'numpy']"),
        ("dsjax.surprise", "", "dsjax.surprise is in no layer: add it to LAYERS"),
    ],
)
def test_the_layering_check_can_fail(module, source, fault):
    (found,) = layering_faults(source, module, KNOWN)
    assert fault in found


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("dsjax.model", "from dsjax.nn.mla import Mla\nfrom dsjax import config\nimport numpy"),
        ("dsjax.nn.mla", "from dsjax.nn import rope\nfrom pallas_kernels import swiglu"),
        (
            "pallas_kernels.swiglu",
            "import jax.numpy\nimport math\nfrom pallas_kernels.swiglu.tpu import f",
        ),
        ("train", "import dsjax.data\nfrom dsjax import from_pretrained"),
    ],
)
def test_the_layering_check_can_pass(module, source):
    assert layering_faults(source, module, KNOWN) == []


@pytest.mark.parametrize(
    "source",
    [
        "@nnx.jit\ndef f(): ...",
        "y = flax.nnx.scan(f)",
        "from flax.nnx import value_and_grad",
        "from functools import partial\nf = partial(nnx.remat, g)",
    ],
)
def test_the_transform_check_can_fail(source):
    assert len(lifted_transforms(source, "m")) == 1
    assert lifted_transforms(source.replace("nnx", "jax"), "m") == []


@pytest.mark.parametrize(
    "line",
    [
        "self.x = 1",
        "self.x += 1",
        "self.w[...] = 1",
        "self.norm.scale.value = 1",
        "a, self.x = 1, 2",
        "del self.x",
        "setattr(self, 'x', 1)",
        "object.__setattr__(self, 'x', 1)",
    ],
)
def test_the_purity_check_can_fail(line):
    body = f"class M(nnx.Module):\n    def {{}}(self):\n        {line}\n"
    assert len(self_writes(body.format("__call__"), "m")) == 1
    assert self_writes(body.format("__init__"), "m") == []
    assert self_writes("def f(self, y):\n    y.x = self.x\n    z[self.i] = 1", "m") == []


def test_the_length_check_can_fail():
    assert too_long("\n" * 401, "m") == ["m has 401 lines, more than 400"]
    assert too_long("\n" * 400, "m") == []


def test_the_cycle_check_can_fail():
    assert set(cycle({"a": {"b"}, "b": {"c"}, "c": {"a"}})) == {"a", "b", "c"}
    assert cycle({"a": {"b", "c"}, "b": {"c"}}) == []


@pytest.mark.parametrize(
    ("source", "fault"),
    [
        ("import jax\nONE = jax.numpy.ones(1)", "no_such_backend"),
        ("import jax\nCOUNT = jax.device_count()", "no_such_backend"),
        ("import tensorboardX", "tensorboardX"),
        ("1 / 0", "ZeroDivisionError"),
    ],
)
def test_the_import_check_can_fail(tmp_path, source, fault):
    (tmp_path / "guilty.py").write_text(source)
    assert fault in import_effects(["guilty"], tmp_path)
