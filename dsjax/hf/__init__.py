"""Published checkpoints: their `config.json`, their tensor names, their safetensors files."""

from dsjax.hf.config import model_config
from dsjax.hf.load import from_pretrained, load_weights

__all__ = ["from_pretrained", "load_weights", "model_config"]
