"""Expert tensors as transformers 5 holds them, one for all experts, seen as the hub's many.

mlp.experts.gate_up_proj [E, 2F, D]    gate's rows first, then up's
mlp.experts.down_proj    [E, D, F]
"""

import re
from collections.abc import Mapping

import numpy as np

from dsjax.hf.tensors import Tensor, placed

FUSED = re.compile(r"(.*\.mlp\.experts)\.(gate_up_proj|down_proj)(_scale_inv)?")
PARTS = {"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)}


class Part:
    """Rows `first` to `first + rows` of one expert of a fused tensor."""

    def __init__(self, whole: Tensor, expert: int, first: int, rows: int):
        self._whole, self._expert, self._first = whole, expert, first
        self.shape = (rows, whole.shape[2])
        self.dtype, self.path = whole.dtype, getattr(whole, "path", None)

    def __getitem__(self, index: tuple[slice, ...]) -> np.ndarray:
        start, stop, step = index[0].indices(self.shape[0])
        rows = slice(self._first + start, self._first + stop, step)
        return self._whole[slice(self._expert, self._expert + 1), rows, index[1]][0]


def unfused(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """`tensors` with each expert under its published name.

    ValueError if a fused tensor cannot be divided, or if an expert is there in both forms.
    """
    parts: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        match = FUSED.fullmatch(name)
        for part, its_name in _parts(name, tensor, match) if match else [(tensor, name)]:
            if its_name in parts:
                raise ValueError(f"the checkpoint has {its_name} both by itself and fused")
            parts[its_name] = part
    return parts


def _parts(name: str, whole: Tensor, match: re.Match) -> list[tuple[Part, str]]:
    prefix, kind, scale = match.groups("")
    projections = PARTS[kind]
    if len(whole.shape) != 3 or 0 in whole.shape or whole.shape[1] % len(projections):
        rule = f"[experts, rows, columns] with a multiple of {len(projections)} rows"
        raise ValueError(f"{placed(name, whole)} is {tuple(whole.shape)}, expected {rule}")
    rows = whole.shape[1] // len(projections)
    return [
        (Part(whole, expert, i * rows, rows), f"{prefix}.{expert}.{projection}.weight{scale}")
        for expert in range(whole.shape[0])
        for i, projection in enumerate(projections)
    ]
