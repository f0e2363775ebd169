"""Writes the goldens: logits, losses and every gradient of transformers' models in float64.

    .venv-oracle/bin/python tests/oracles/make_golden.py tests/golden --seed 1 --pretrained

One `.npz` per case of `cases.py`, read back by `golden.py`. `--pretrained` adds directories as
`save_pretrained` writes them, in float32. Runs in the oracle environment (torch, transformers),
never in the project's own.
"""

import argparse
import contextlib
import copy
import functools
import json
import os
import pathlib
import zlib

import numpy as np
import torch
import torch.nn.functional as F
import transformers
from transformers.modeling_layers import MtpModel

import cases
import exact_transformers
import hub_names
import pretrained
import weights

BATCH, LENGTH = 2, 12
MTP_WEIGHT = 0.3
# Wide enough that float32 rounding of the scores (about 1e-6) never changes a selection.
LEAST_MARGIN = 1e-4
# Of transformers' own float32 gradients; other sums than its own may round a few times worse.
MOST_ROUNDING = 2e-6
# Cases also written as a checkpoint directory: one in a single file, one in several shards.
SHARDS = {"v2_lite": "1GB", "v3": "40KB"}


def build(config: dict, model_class: type, dtype: torch.dtype) -> torch.nn.Module:
    """The model of a published config, on the plain eager paths, with uninitialised weights."""
    # A copy, because the config class writes into the dictionaries it is given.
    fields = copy.deepcopy({k: v for k, v in config.items() if k != "model_type"})
    torch.set_default_dtype(dtype)
    loaded = model_class.config_class(**fields, attn_implementation="eager")
    loaded._experts_implementation = "eager"
    return model_class(loaded).to(dtype).eval()


def main_tensors(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Parameters and selection biases of the main model; their names are the hub's."""
    biases = {k: v for k, v in model.named_buffers() if k.endswith("e_score_correction_bias")}
    return dict(model.named_parameters()) | biases


def mtp_tensors(mtp: MtpModel, num_hidden_layers: int) -> dict[str, torch.Tensor]:
    """The same for the MTP layers, without the embedding and head they share."""
    biases = {k: v for k, v in mtp.named_buffers() if k.endswith("e_score_correction_bias")}
    own = {k: v for k, v in mtp.named_parameters() if k.startswith("layers.")} | biases
    return {hub_names.mtp_name(k, num_hidden_layers): v for k, v in own.items()}


def run_mtp(mtp: MtpModel, tokens: torch.Tensor, hidden: torch.Tensor) -> list[torch.Tensor]:
    """Teacher-forced logits of each depth, [B, T, V].

    Depth k reads the embedding of t_{i+k} (token 0 past the end), the hidden state after the norm
    before it, and the position i of the main token.
    """
    B, T = tokens.shape
    positions = torch.arange(T).expand(B, T)
    logits = []
    for k in range(mtp.num_mtp_layers):
        ahead = F.pad(tokens[:, k + 1 :], (0, k + 1))
        hidden = mtp.forward_layer(k, hidden, positions, None, input_ids=ahead)
        logits.append(mtp.shared_head(hidden))
    return logits


def cross_entropy(logits: torch.Tensor, tokens: torch.Tensor, shift: int) -> torch.Tensor:
    """Mean over every position i whose target t_{i+shift} exists."""
    return F.cross_entropy(logits[:, :-shift].flatten(0, 1), tokens[:, shift:].flatten())


def selection_margin(config: dict, scores: np.ndarray, bias: np.ndarray) -> float:
    """The smallest distance between something chosen and something not, experts and groups.

    `scores` is [M, E]; masked experts are no rivals, because no rounding can bring them back.
    """
    choice = scores + bias
    margins = []
    if config["topk_method"] != "greedy" and config["n_group"] > 1:
        grouped = np.sort(choice.reshape(len(choice), config["n_group"], -1), axis=-1)
        best = 2 if config["topk_method"] == "noaux_tc" else 1
        group = grouped[..., -best:].sum(-1)
        order = np.sort(group, axis=-1)[:, ::-1]
        kept = config["topk_group"]
        margins.append((order[:, kept - 1] - order[:, kept]).min())
        masked = np.repeat(group < order[:, kept - 1, None], grouped.shape[-1], axis=-1)
        choice = np.where(masked, -np.inf, choice)
    order = np.sort(choice, axis=-1)[:, ::-1]
    k = config["num_experts_per_tok"]
    margins.append((order[:, k - 1] - order[:, k]).min())
    return float(min(margins))


def watch_routers(config: dict, *modules: torch.nn.Module) -> list[float]:
    """A list that receives the selection margin of every router call from now on."""
    margins = []

    def note(router: torch.nn.Module, _: tuple, out: tuple) -> None:
        logits = out[0].detach()
        sigmoid = config["scoring_func"] == "sigmoid"
        scores = logits.sigmoid() if sigmoid else logits.softmax(-1)
        bias = router.e_score_correction_bias.numpy() if sigmoid else np.float64(0.0)
        margins.append(selection_margin(config, scores.numpy(), bias))

    for module in modules:
        for inner in module.modules():
            if type(inner).__name__.endswith("TopkRouter"):
                inner.register_forward_hook(note)
    return margins


def gradients(loss: torch.Tensor, tensors: dict[str, torch.Tensor]) -> dict[str, np.ndarray]:
    """d loss / d tensor for every parameter, experts split, under hub names."""
    names = [name for name, tensor in tensors.items() if tensor.requires_grad]
    found = torch.autograd.grad(
        loss, [tensors[n] for n in names], retain_graph=True, materialize_grads=True
    )
    split = {}
    for name, gradient in zip(names, found, strict=True):
        split |= hub_names.split_experts(name, gradient)
    return {name: part.numpy() for name, part in split.items()}


class Reference:
    """A transformers model with its MTP layers, if it has any, and the drawn weights."""

    def __init__(self, config: dict, drawn: dict[str, np.ndarray], dtype: torch.dtype):
        exact = dtype == torch.float64
        architecture = config["architectures"][0]
        chosen = (
            exact_transformers.exact_class if exact else functools.partial(getattr, transformers)
        )
        depth = config.get("num_nextn_predict_layers", 0)
        self.model = build(config, chosen(architecture), dtype)
        self.main = main_tensors(self.model)
        self.mtp = MtpModel(self.model, depth).to(dtype).eval() if depth else None
        tensors = mtp_tensors(self.mtp, config["num_hidden_layers"]) if depth else {}
        self.tensors = self.main | tensors
        hub_names.fill(self.tensors, drawn)
        if exact:
            exact_transformers.restore_frequencies(self.model)
        self.watched = exact_transformers.Float64Only if exact else contextlib.nullcontext
        self.margins = watch_routers(config, self.model, *([self.mtp] if depth else []))

    def run(self, tokens: torch.Tensor) -> dict[str, np.ndarray]:
        """Logits, losses and every gradient as a golden holds them, and the selection margin."""
        self.margins.clear()
        with self.watched():
            hidden = self.model.model(input_ids=tokens).last_hidden_state
            logits = self.model.lm_head(hidden)
            mtp_logits = run_mtp(self.mtp, tokens, hidden) if self.mtp else []
            loss = cross_entropy(logits, tokens, 1)
            mtp_losses = [cross_entropy(x, tokens, k) for k, x in enumerate(mtp_logits, start=2)]
            recorded = {f"grad/{k}": v for k, v in gradients(loss, self.main).items()}
            if mtp_losses:
                total = loss + MTP_WEIGHT * torch.stack(mtp_losses).mean()
                both = gradients(total, self.tensors)
                recorded |= {f"grad_total/{k}": v for k, v in both.items()}
        return recorded | {
            "logits": logits.detach().numpy(),
            "loss": np.array(loss.item()),
            "mtp_logits": np.array([x.detach().numpy() for x in mtp_logits]),
            "mtp_losses": np.array([x.item() for x in mtp_losses]),
            "selection_margin": np.array(min(self.margins)),
        }


def rounding(found: dict[str, np.ndarray], exact: dict[str, np.ndarray]) -> float:
    """The largest relative error of a gradient, in the Frobenius norm."""
    pairs = [(found[k], g) for k, g in exact.items() if k.startswith("grad") and g.any()]
    return max(float(np.linalg.norm(a - b) / np.linalg.norm(b)) for a, b in pairs)


def make_case(name: str, config: dict, seed: int) -> dict[str, np.ndarray]:
    """Everything one golden holds; see `golden.Golden`.

    Tokens, and then weights, are redrawn until every selection is clear-cut and float32 can tell a
    right gradient from a wrong one: transformers' own float32 must be able to.
    """
    for weight_seed in range(seed, seed + 1000, 50):
        drawn = weights.draw_all(weight_seed, config)
        exact, single = (Reference(config, drawn, d) for d in (torch.float64, torch.float32))
        for attempt in range(8):
            rng = np.random.default_rng([weight_seed, zlib.crc32(name.encode()), attempt])
            tokens = torch.from_numpy(rng.integers(0, config["vocab_size"], (BATCH, LENGTH)))
            recorded = exact.run(tokens)
            if recorded["selection_margin"] < LEAST_MARGIN:
                continue
            shipped = single.run(tokens)
            if rounding(shipped, recorded) < MOST_ROUNDING:
                return recorded | {
                    "config": np.array(json.dumps(config)),
                    "seed": np.array(weight_seed),
                    "tokens": tokens.numpy().astype(np.int32),
                    # As shipped, in float32: the widened copy is the same model.
                    "logits_f32_unpatched": shipped["logits"],
                }
    raise ValueError(f"{name}: every draw was ill-conditioned; choose another --seed")


def save_pretrained(directory: pathlib.Path, config: dict, golden: dict[str, np.ndarray]) -> None:
    """The same model as a float32 checkpoint, read back by transformers' loaders and compared."""
    drawn = weights.draw_all(int(golden["seed"]), config)
    model_class = getattr(transformers, config["architectures"][0])
    model = build(config, model_class, torch.float32)
    hub_names.fill(main_tensors(model), drawn)
    pretrained.save(directory, model, drawn, max_shard_size=SHARDS[directory.name])
    if not config.get("num_nextn_predict_layers", 0):
        return
    model, mtp = pretrained.load_mtp(directory, model_class)
    tokens = torch.from_numpy(golden["tokens"]).long()
    with torch.no_grad():
        hidden = model.model(input_ids=tokens).last_hidden_state
        found = [model.lm_head(hidden), *run_mtp(mtp, tokens, hidden)]
    for logits, expected in zip(found, [golden["logits"], *golden["mtp_logits"]], strict=True):
        np.testing.assert_allclose(logits.numpy(), expected, atol=1e-4)


def write(path: pathlib.Path, arrays: dict[str, np.ndarray]) -> None:
    """Compressed `.npz` under a temporary name first: a broken run leaves no broken golden."""
    temporary = path.with_suffix(".tmp")
    with temporary.open("wb") as file:
        np.savez_compressed(file, **arrays)
    os.replace(temporary, path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=pathlib.Path)
    parser.add_argument("--seed", type=int, required=True)
    parser.add_argument("--pretrained", action="store_true")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    transformers.utils.logging.disable_progress_bar()
    for name, config in cases.CASES.items():
        arrays = make_case(name, config, options.seed)
        write(options.out / f"{name}.npz", arrays)
        if options.pretrained and name in SHARDS:
            save_pretrained(options.out / name, config, arrays)
        apart = np.abs(arrays["logits"] - arrays["logits_f32_unpatched"]).max()
        print(
            f"{name}: loss {arrays['loss']:.6f}  mtp {arrays['mtp_losses']}  margin "
            f"{arrays['selection_margin']:.1e}  shipped float32 differs by {apart:.1e}"
        )


if __name__ == "__main__":
    main()
