"""Checkpoint directories by transformers: written by `save_pretrained`, read and run from anywhere.

    .venv-oracle/bin/python tests/oracles/directories.py write OUT v3=7 v2_lite=8
    .venv-oracle/bin/python tests/oracles/directories.py logits TOKENS.npz LOGITS.npz DIR ...

`write` makes OUT/v3 and so on with weights drawn from the given seeds, in float32. `logits` takes
the tokens of each directory under its path, and gives its logits of depth k under PATH:k.
"""

import json
import pathlib
import sys

import numpy as np
import torch
import transformers

import cases
import hub_names
import make_golden
import pretrained
import weights


def write(out: pathlib.Path, name: str, seed: int) -> None:
    config = cases.CASES[name]
    drawn = weights.draw_all(seed, config)
    model_class = getattr(transformers, config["architectures"][0])
    model = make_golden.build(config, model_class, torch.float32)
    hub_names.fill(make_golden.main_tensors(model), drawn)
    pretrained.save(out / name, model, drawn, max_shard_size="50KB")


def logits(directory: pathlib.Path, tokens: np.ndarray) -> list[np.ndarray]:
    """Of the main model and of each MTP layer, as shipped and in float32."""
    config = json.loads((directory / "config.json").read_text())
    model_class = getattr(transformers, config["architectures"][0])
    tokens = torch.from_numpy(tokens).long()
    mtp = None
    if config.get("num_nextn_predict_layers", 0):
        model, mtp = pretrained.load_mtp(directory, model_class)
    else:
        model = model_class.from_pretrained(
            directory, attn_implementation="eager", dtype=torch.float32
        )
        model.config._experts_implementation = "eager"
    with torch.no_grad():
        hidden = model.eval().model(input_ids=tokens).last_hidden_state
        found = [model.lm_head(hidden), *(make_golden.run_mtp(mtp, tokens, hidden) if mtp else [])]
    return [one.numpy() for one in found]


def main(command: str, *arguments: str) -> None:
    torch.set_num_threads(1)
    transformers.utils.logging.disable_progress_bar()
    if command == "write":
        out, *wanted = arguments
        for name, _, seed in (text.partition("=") for text in wanted):
            write(pathlib.Path(out), name, int(seed))
        return
    tokens, out, *directories = arguments
    found = {}
    with np.load(tokens) as its_tokens:
        for directory in directories:
            for depth, values in enumerate(logits(pathlib.Path(directory), its_tokens[directory])):
                found[f"{directory}:{depth}"] = values
    np.savez(out, **found)


if __name__ == "__main__":
    main(*sys.argv[1:])
