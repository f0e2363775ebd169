"""The DeepSeek family in JAX.

Dimension key, one letter one meaning, everywhere in the package:

B batch        T query tokens   S key tokens   D hidden size    L stacked layers
N heads        H nope head dim  R rotary dim   W value head dim V vocabulary rows
C kv latent    Q query latent   E experts      K chosen experts G expert groups
M routed rows  F ffn width      P gate/up pair (2)               Z expert slots
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from dsjax.hf import from_pretrained as from_pretrained

__version__ = "0.1.0"


def __getattr__(name: str):
    """Loads `from_pretrained` on first use, so that `import dsjax` stays instant."""
    if name == "from_pretrained":
        from dsjax.hf import from_pretrained

        return from_pretrained
    raise AttributeError(f"module 'dsjax' has no attribute {name!r}")
