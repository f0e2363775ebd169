"""The command `dsjax`: `dsjax generate PATH --prompt TEXT`, `dsjax plan CONFIG topology=...`.

`generate` continues a text. PATH is a training run (it has a run.json), a Hugging Face directory
(config.json, safetensors, tokenizer.json), or what `convert_weights.py import` made of one. `plan`
says whether a training step fits chips that need not be there, and how fast it can be at best. What
the user can mend is told in one line, with exit code 2.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import jax

from dsjax import hf, sharding
from dsjax.convert.arrays import HUB
from dsjax.convert.opened import is_converted
from dsjax.data import Bytes, HuggingFace, load_tokenizer
from dsjax.hf.files import read_json
from dsjax.model import Transformer
from dsjax.nn.block_fp8 import BlockFp8
from dsjax.nn.precision import PRECISIONS, Exact, Products, products
from dsjax.run_folder import RUN_FILE, RunFolder


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line; the exit code is 0, 2 for something the user can mend, or 1 for a plan
    that does not fit.
    """
    options = _parser().parse_args(arguments)
    try:
        return options.run(options) or 0
    except ValueError as error:
        print(f"dsjax: {' '.join(str(error).split())}", file=sys.stderr)
        return 2


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="dsjax", description="DeepSeek models in JAX.")
    commands = parser.add_subparsers(dest="command", required=True)
    generate = commands.add_parser(
        "generate", help="continue a text", formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    generate.add_argument(
        "path", help="training run (a folder or its URL), Hugging Face directory or import of one"
    )
    generate.add_argument("--prompt", required=True, help="the text to continue")
    generate.add_argument("--max-new-tokens", type=int, default=200, help="stop after this many")
    generate.add_argument("--temperature", type=float, default=0.7, help="0: always the likeliest")
    generate.add_argument("--top-p", type=float, default=0.95, help="share of candidates to keep")
    generate.add_argument("--seed", type=int, default=0, help="same seed, same text")
    generate.add_argument(
        "--precision",
        choices=PRECISIONS,
        help="compute in this; fp8 keeps a checkpoint's FP8 weights as they are (default: a run's "
        "own; of a checkpoint the type of its embedding)",
    )
    generate.set_defaults(run=_generate)
    plan = commands.add_parser("plan", help="will a training step fit, and how fast can it be")
    plan.add_argument("config", help="run file, such as configs/v3.py")
    plan.add_argument(
        "assignments", nargs="*", metavar="key=value",
        help="topology=v5p:8x8x8 (or h100:16x8, nodes x GPUs), slices=2, phase=decode (or prefill) "
        "rows=256 length=8192, until=memory (stops before machine code), and keys of the run",
    )  # fmt: skip
    plan.add_argument(
        "--search", action="store_true", help="try meshes, micro-batches and remat policies"
    )
    plan.set_defaults(run=_plan)
    return parser


def _generate(options: argparse.Namespace) -> None:
    from dsjax.generate import generate

    mesh = sharding.make_mesh(devices=jax.devices()[:1])
    with jax.set_mesh(mesh):
        load = _from_run if _is_run(options.path) else _from_hub
        model, tokenizer, eos_ids, by = load(options.path, mesh, options.precision)
        num_tokens = min(tokenizer.num_tokens, model.config.vocab_size)
        prompt = tokenizer.encode_prompt(options.prompt)
        tokens = generate(
            model,
            prompt,
            max_new_tokens=options.max_new_tokens,
            temperature=options.temperature,
            top_p=options.top_p,
            seed=options.seed,
            eos_ids=eos_ids,
            num_tokens=num_tokens,
        )
        stream = tokenizer.stream()
        print(options.prompt, end="", flush=True)
        with products(by):
            for token in tokens:
                print(stream.add(token), end="", flush=True)
        print(stream.end(), flush=True)


def _plan(options: argparse.Namespace) -> int:
    from dsjax.plan.command import plan

    return 0 if plan(options.config, options.assignments, searching=options.search) else 1


def _is_run(path: str) -> bool:
    folder = RunFolder(path)
    with folder.reachable():
        return (folder.home / RUN_FILE).is_file()


Loaded = tuple[Transformer, Bytes | HuggingFace, set[int], Products]


def _from_run(path: str, mesh: jax.sharding.Mesh, precision: str | None) -> Loaded:
    """A training run, by default in the precision it computes in."""
    from dsjax.checkpoint import restore_model
    from dsjax.params import cast
    from dsjax.run import StandardLibrary

    model, run = restore_model(path, mesh)
    is_bytes = isinstance(run.data, StandardLibrary)
    tokenizer = Bytes() if is_bytes else load_tokenizer(run.data.tokenizer)
    eos_ids = {tokenizer.eos_id} - {None}
    computed = PRECISIONS[precision or run.precision]
    return cast(model, computed.dtype), tokenizer, eos_ids, computed.products


def _from_hub(path: str, mesh: jax.sharding.Mesh, precision: str | None) -> Loaded:
    """A published checkpoint; generation_config.json knows best where a text ends."""
    directory = Path(path)
    if not directory.is_dir():
        raise ValueError(f"{path} is no directory; give a training run or a Hugging Face directory")
    folder = directory / HUB if is_converted(directory) else directory
    tokenizer = load_tokenizer(folder)
    dtype, by = None, Exact()
    if precision is not None:
        dtype, by = PRECISIONS[precision].dtype, PRECISIONS[precision].products
    multiplies_fp8 = isinstance(by, BlockFp8)
    keep_fp8 = multiplies_fp8 and "quantization_config" in read_json(folder / "config.json")
    model = hf.from_pretrained(directory, dtype=dtype, mesh=mesh, keep_fp8=keep_fp8)
    stated = None
    for name in ("generation_config.json", "config.json"):
        if stated is None and (folder / name).is_file():
            stated = read_json(folder / name).get("eos_token_id")
    stated = tokenizer.eos_id if stated is None else stated
    eos_ids = set(stated) if isinstance(stated, list) else {stated}
    return model, tokenizer, eos_ids - {None}, by


if __name__ == "__main__":
    sys.exit(main())
