"""Reads the goldens: what transformers computed for each tiny config, in float64.

`pytest --goldens=DIR` reads another directory than the committed one; a fresh set drawn from a new
seed is checked by the same tests that way.
"""

import dataclasses
import json
import pathlib

import numpy as np

COMMITTED = pathlib.Path(__file__).parent.parent / "golden"
_chosen = [COMMITTED]


def use(folder: pathlib.Path) -> None:
    """Reads `folder` from now on; `tests/conftest.py` calls this once, before any test."""
    _chosen[:] = [folder]


def directory() -> pathlib.Path:
    """Where the goldens lie: the folder given to `use`, else the committed one."""
    return _chosen[0]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Golden:
    """One case. Arrays are float64 except `logits_f32_unpatched` (float32) and tokens (int32).

    `loss` is the mean next-token cross-entropy over all positions but the last, `gradients` its
    derivative. With MTP, `total_gradients` belong to `loss + 0.3 * mean(mtp_losses)`; otherwise
    they are empty. Gradients carry hub tensor names; the selection bias has none, and the MTP
    copies of embedding and head count towards the tensors they copy.
    """

    config: dict
    seed: int
    tokens_BT: np.ndarray
    logits_BTV: np.ndarray
    logits_f32_unpatched: np.ndarray
    loss: float
    gradients: dict[str, np.ndarray]
    mtp_logits: np.ndarray
    mtp_losses: np.ndarray
    total_gradients: dict[str, np.ndarray]


def read(name: str) -> Golden:
    """The golden of one name in `cases.CASES`; `mtp_logits` is [depth, B, T, V], depth may be 0."""
    with np.load(directory() / f"{name}.npz") as file:
        arrays = dict(file)

    def under(prefix: str) -> dict[str, np.ndarray]:
        return {k.removeprefix(prefix): v for k, v in arrays.items() if k.startswith(prefix)}

    return Golden(
        config=json.loads(str(arrays["config"])),
        seed=int(arrays["seed"]),
        tokens_BT=arrays["tokens"],
        logits_BTV=arrays["logits"],
        logits_f32_unpatched=arrays["logits_f32_unpatched"],
        loss=float(arrays["loss"]),
        gradients=under("grad/"),
        mtp_logits=arrays["mtp_logits"],
        mtp_losses=arrays["mtp_losses"],
        total_gradients=under("grad_total/"),
    )
