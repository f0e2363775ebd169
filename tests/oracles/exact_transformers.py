"""transformers' DeepSeek models with every float32 island widened, so float64 means float64.

transformers casts to float32 in RMSNorm, softmax, rotary angles and the router, whatever the
model's dtype. Instead of rewriting those functions here, the module's own source is executed once
more with the casts widened: the arithmetic stays theirs, line by line. `Float64Only` then proves
that not one float32 tensor is made.
"""

import importlib.util
import pathlib
import re
import sys
import types
from collections.abc import Callable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

_WIDER = (
    (re.compile(r"\btorch\.float32\b"), "torch.float64"),
    (re.compile(r"\btorch\.float\b"), "torch.float64"),
    (re.compile(r"\.float\(\)"), ".double()"),
)


def widened(module_name: str) -> types.ModuleType:
    """A second copy of a module in which float32 reads float64; the original stays untouched."""
    spec = importlib.util.find_spec(module_name)
    source = pathlib.Path(spec.origin).read_text(encoding="utf-8")
    for narrow, wide in _WIDER:
        source = narrow.sub(wide, source)
    module = types.ModuleType(f"{module_name}_widened")
    module.__file__, module.__package__ = spec.origin, spec.parent
    sys.modules[module.__name__] = module
    exec(compile(source, spec.origin, "exec"), module.__dict__)
    return module


def exact_class(architecture: str) -> type:
    """`DeepseekV2ForCausalLM` or `DeepseekV3ForCausalLM`, computing in float64 throughout."""
    version = {"DeepseekV2ForCausalLM": "v2", "DeepseekV3ForCausalLM": "v3"}[architecture]
    module = widened(f"transformers.models.deepseek_{version}.modeling_deepseek_{version}")
    module.ROPE_INIT_FUNCTIONS = widened("transformers.modeling_rope_utils").ROPE_INIT_FUNCTIONS
    return getattr(module, architecture)


def restore_frequencies(model: torch.nn.Module) -> None:
    """Recomputes the rotary frequencies, which weight initialisation fills with float32 values.

    In place, because an MTP model holds the same rotary module.
    """
    rotary = model.model.rotary_emb
    with Float64Only():
        rotary.__init__(rotary.config)


class Float64Only(TorchDispatchMode):
    """Raises as soon as an operation returns a floating tensor narrower than float64."""

    def __torch_dispatch__(
        self, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else (out,):
            if isinstance(tensor, torch.Tensor) and tensor.dtype in (
                torch.bfloat16,
                torch.float16,
                torch.float32,
                torch.complex64,
            ):
                raise TypeError(f"{func} made a {tensor.dtype} tensor inside the float64 oracle")
        return out
