"""Published checkpoints: their `config.json`, their tensor names, their safetensors files."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from dsjax.hf.load import from_pretrained as from_pretrained
    from dsjax.hf.load import load_weights as load_weights

from dsjax.hf.config import model_config
from dsjax.hf.publish import hf_config

__all__ = ["from_pretrained", "hf_config", "load_weights", "model_config"]


def __getattr__(name: str):
    """Loads what needs jax on first use: whoever only reads files does not wait for it."""
    if name in ("from_pretrained", "load_weights"):
        from dsjax.hf import load

        return getattr(load, name)
    raise AttributeError(f"module 'dsjax.hf' has no attribute {name!r}")
