"""Published checkpoints in and out, whole, in bounded memory; a command that was stopped continues.

    python convert_weights.py import SRC DST              Hugging Face to dsjax, as it is stored
    python convert_weights.py export SRC DST              back; SRC may be a training run as well
    python convert_weights.py cast SRC DST --dtype bf16   FP8 to BF16, or back with --dtype fp8
    python convert_weights.py inspect SRC                 what is in it, without reading weights
    python convert_weights.py verify A B                  whether both are the same model

SRC is a Hugging Face directory (config.json, safetensors). DST is new, or was begun by the same
command: then finished tensors are kept. The exit code is 0, 2 for something that you can mend (told
in one line on stderr), or 3 when interrupted; `verify` says 1 for different models, `inspect` for
tensors that are not what config.json asks for.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from dsjax.convert import options


def main(arguments: Sequence[str] | None = None) -> int:
    chosen = _parser().parse_args(arguments)
    try:
        if "target" in chosen and chosen.source.resolve() == chosen.target.resolve():
            raise ValueError(f"{chosen.target} is the source itself; give another directory")
        return chosen.run(chosen)
    except (ValueError, OSError) as error:
        print(f"error: {_told(error)}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        how = "; the same command continues" if "target" in chosen else ""
        print(f"interrupted{how}", file=sys.stderr)
        return 3


def _told(error: Exception) -> str:
    if isinstance(error, OSError) and error.filename:
        return f"{error.filename}: {' '.join((error.strerror or str(error)).split())}"
    return " ".join(str(error).split())


def _parser() -> argparse.ArgumentParser:
    summary, _, rest = __doc__.partition("\n\n")
    parser = argparse.ArgumentParser(
        description=summary, epilog=rest, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    _add_import(commands)
    _add_export(commands)
    _add_cast(commands)
    _add_inspect(commands)
    _add_verify(commands)
    return parser


def _add_import(commands: argparse._SubParsersAction) -> None:
    importing = commands.add_parser("import", help="a Hugging Face checkpoint to a dsjax one")
    importing.add_argument("source", metavar="SRC", type=Path, help="Hugging Face directory")
    importing.add_argument("target", metavar="DST", type=Path, help="new directory")
    importing.add_argument(
        "--dtype", choices=("bf16", "fp32", "fp8"), help="of the weights (default: as stored)"
    )
    importing.add_argument(
        "--layers", metavar="FIRST:END", help="only these layers, as in 0:4 (default: all)"
    )
    importing.add_argument(
        "--mtp",
        action=argparse.BooleanOptionalAction,
        help="with the MTP layers (default: if there are any and --layers is not given)",
    )
    _add_process(importing)
    _add_dry_run(importing)
    importing.set_defaults(run=_import)


def _import(chosen: argparse.Namespace) -> int:
    from dsjax.convert import importing, selecting

    importing.import_checkpoint(
        chosen.source,
        chosen.target,
        dtype=chosen.dtype,
        layers=None if chosen.layers is None else selecting.layer_range(chosen.layers),
        mtp=chosen.mtp,
        process=options.process(chosen.process),
        dry_run=chosen.dry_run,
    )
    return 0


def _add_export(commands: argparse._SubParsersAction) -> None:
    export = commands.add_parser("export", help="a dsjax checkpoint to a Hugging Face one")
    export.add_argument(
        "source", metavar="SRC", type=Path, help="what import made, or a training run"
    )
    export.add_argument("target", metavar="DST", type=Path, help="new directory")
    export.add_argument(
        "--dtype", choices=("bf16", "fp32", "fp8"), help="of the weights (default: as stored)"
    )
    _add_scales(export)
    _add_shard_size(export)
    _add_process(export)
    _add_dry_run(export)
    export.set_defaults(run=_export)


def _export(chosen: argparse.Namespace) -> int:
    from dsjax.convert import exporting

    exporting.export_checkpoint(
        chosen.source,
        chosen.target,
        to=chosen.dtype,
        ue8m0=_ue8m0(chosen),
        shard_size=options.num_bytes(chosen.shard_size),
        process=options.process(chosen.process),
        dry_run=chosen.dry_run,
    )
    return 0


def _add_verify(commands: argparse._SubParsersAction) -> None:
    verify = commands.add_parser("verify", help="whether two checkpoints are the same model")
    for name in ("one", "other"):
        verify.add_argument(
            name, type=Path, help="Hugging Face directory, what import made, or a training run"
        )
    verify.set_defaults(run=_verify)


def _verify(chosen: argparse.Namespace) -> int:
    from dsjax.convert import verifying

    return 0 if verifying.verify(chosen.one, chosen.other) else 1


def _add_cast(commands: argparse._SubParsersAction) -> None:
    cast = commands.add_parser("cast", help="a Hugging Face checkpoint in another precision")
    cast.add_argument("source", metavar="SRC", type=Path, help="Hugging Face directory")
    cast.add_argument("target", metavar="DST", type=Path, help="new directory")
    cast.add_argument("--dtype", choices=("bf16", "fp8"), required=True)
    _add_scales(cast)
    _add_shard_size(cast)
    _add_process(cast)
    _add_dry_run(cast)
    cast.set_defaults(run=_cast)


def _cast(chosen: argparse.Namespace) -> int:
    from dsjax.convert import casting

    casting.cast(
        chosen.source,
        chosen.target,
        to=chosen.dtype,
        ue8m0=_ue8m0(chosen),
        shard_size=options.num_bytes(chosen.shard_size),
        process=options.process(chosen.process),
        dry_run=chosen.dry_run,
    )
    return 0


def _add_inspect(commands: argparse._SubParsersAction) -> None:
    inspect = commands.add_parser("inspect", help="what is in a checkpoint, without its weights")
    inspect.add_argument(
        "source", metavar="SRC", type=Path, help="directory, or NAME.tensors.json[.gz]"
    )
    inspect.add_argument(
        "--config", type=Path, help="the config.json, where it is not beside the tensors"
    )
    inspect.set_defaults(run=_inspect)


def _inspect(chosen: argparse.Namespace) -> int:
    from dsjax.convert import inspecting

    return 0 if inspecting.inspect(chosen.source, chosen.config) else 1


def _add_scales(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--scales",
        choices=("float", "ue8m0"),
        default="float",
        help="FP8 scales: any float32, or powers of two as in V3.1 (default: float)",
    )


def _ue8m0(chosen: argparse.Namespace) -> bool:
    if chosen.scales != "float" and chosen.dtype != "fp8":
        raise ValueError(f"--scales {chosen.scales} needs --dtype fp8: nothing else has scales")
    return chosen.scales == "ue8m0"


def _add_shard_size(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--shard-size", default="5GB", metavar="SIZE", help="most bytes in a file (default: 5GB)"
    )


def _add_process(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--process",
        default="0/1",
        metavar="i/n",
        help="this is process i of n that share the work, i from 0; or jax, for jax.distributed",
    )


def _add_dry_run(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--dry-run", action="store_true", help="check, tell the plan, write nothing"
    )


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
