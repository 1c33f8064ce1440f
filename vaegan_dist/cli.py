"""The command line: `vaegan-dist prepare | index | verify | train | sample | reconstruct`."""

import argparse
import sys
from collections.abc import Sequence

import vaegan_dist
from vaegan_dist import commands
from vaegan_dist.config import Config
from vaegan_dist.config_source import preset_names, reference
from vaegan_dist.errors import ConfigError, VaeganError

INTERRUPTED = 130


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; the exit code is 0, 1 failed, 2 wrong input, 75 stopped with a checkpoint, 130 interrupted."""
    try:
        options, overrides = _parse(sys.argv[1:] if arguments is None else list(arguments))
        return int(options.run(options, overrides))
    except VaeganError as error:
        print(f"error: {' '.join(str(error).split())}", *getattr(error, "__notes__", ()), sep="\n", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:
        # The reader of our output (`| head`) is gone; nothing is left to say to it.
        sys.stderr.close()
        return 1


def _parse(arguments: list[str]) -> tuple[argparse.Namespace, list[str]]:
    parser = _Parser(prog="vaegan-dist", description="Train VAE-GANs on many GPUs from WebDataset shards.")
    parser.add_argument("--version", action="version", version=f"vaegan-dist {vaegan_dist.__version__}")
    subparsers = parser.add_subparsers(dest="command", metavar="COMMAND", required=True, parser_class=_Parser)
    for add in (_add_prepare, _add_index, _add_verify, _add_train, _add_sample, _add_reconstruct):
        add(subparsers)
    options, rest = parser.parse_known_args(arguments)
    overrides = _overrides(rest)
    if overrides and not options.takes_overrides:
        raise ConfigError(f"{overrides[0].split('=')[0]}: unknown option of '{options.command}'; see --help")
    return options, overrides


class _Parser(argparse.ArgumentParser):
    """Says what is wrong in one line, like every other error of this program."""

    def error(self, message: str) -> None:  # type: ignore[override]
        raise ConfigError(f"{message} (see {self.prog} --help)")


def _overrides(rest: list[str]) -> list[str]:
    """`--a.b value`, `--a.b=value` and `a.b=value` all become `a.b=value`."""
    items, waiting = [], ""
    for word in rest:
        if waiting:
            items.append(f"{waiting}={word}")
            waiting = ""
        elif word.startswith("--") and "=" not in word:
            waiting = word.removeprefix("--")
        else:
            items.append(word.removeprefix("--"))
    if waiting:
        raise ConfigError(f"--{waiting}: a value is missing, or the option is unknown; see --help")
    return items


def _add_prepare(subparsers: "argparse._SubParsersAction[_Parser]") -> None:
    parser = subparsers.add_parser(
        "prepare",
        help="make shards and dataset.json from pictures",
        description="Make WebDataset shards and dataset.json from pictures.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands.add_prepare_options(parser)
    parser.set_defaults(run=commands.prepare_command, takes_overrides=False)


def _add_index(subparsers: "argparse._SubParsersAction[_Parser]") -> None:
    parser = subparsers.add_parser(
        "index",
        help="write a dataset.json for shards that exist already",
        description="Write a dataset.json for WebDataset shards that somebody else made, without copying them.",
    )
    parser.add_argument(
        "shards",
        nargs="+",
        help="paths with braces (shard-{000000..000146}.tar) or wildcards, or folders of .tar files",
    )
    parser.add_argument("--folder", help="where dataset.json goes, the shards below it (default: the shards' folder)")
    parser.add_argument("--split", default="train", help="what the split is called (default: train)")
    parser.add_argument("--layout", choices=["auto", "files", "chunks"], default="auto", help="default: auto")
    parser.add_argument("--overwrite", action="store_true", help="replace a dataset.json that is there")
    parser.set_defaults(run=commands.index_command, takes_overrides=False)


def _add_verify(subparsers: "argparse._SubParsersAction[_Parser]") -> None:
    parser = subparsers.add_parser(
        "verify", help="check a data set against its dataset.json", description="Check a data set."
    )
    parser.add_argument("dataset", help="a prepared folder, or its dataset.json")
    parser.add_argument("--full", action="store_true", help="also hash every shard and decode every picture")
    parser.set_defaults(run=commands.verify_command, takes_overrides=False)


def _add_train(subparsers: "argparse._SubParsersAction[_Parser]") -> None:
    parser = subparsers.add_parser(
        "train",
        help="train a model, or continue a run",
        description="Train a model. The same command again continues the run of that name.",
        epilog=_configuration_help(),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--preset", help=f"start from a preset: {', '.join(preset_names())}")
    parser.add_argument("--config", action="append", default=[], metavar="FILE", help="YAML laid over the preset")
    parser.add_argument("--runtime", choices=["ray", "local"], default="ray", help="default: ray")
    parser.add_argument(
        "--address", default="auto", help="Ray cluster: auto (default), local (start one here), or an address"
    )
    parser.add_argument("--worker-logs", action="store_true", help="also show what Ray's workers print")
    parser.add_argument("--name", help="short for run.name")
    parser.add_argument("--storage", help="short for run.storage")
    parser.add_argument("--data", help="short for data.path")
    parser.add_argument("--workers", help="short for cluster.workers")
    parser.add_argument("--seed", help="short for run.seed")
    parser.add_argument("--fresh", action="store_true", help="a new run; an error where one of that name stands")
    parser.add_argument("--dry-run", action="store_true", help="print the resolved configuration and plan, and exit")
    parser.set_defaults(run=commands.train_command, takes_overrides=True)


def _configuration_help() -> str:
    """Every configuration key with type, default and meaning."""
    lines = ["configuration keys, as KEY=VALUE or --KEY VALUE (defaults of no preset):", ""]
    for key, kind, default, description in reference(Config()):
        lines += [f"  {key} ({kind}, default {default})", f"      {description}"]
    return "\n".join(lines)


def _add_model_options(parser: argparse.ArgumentParser, output: str) -> None:
    parser.add_argument("model", metavar="RUN", help="a run's folder, or one of its checkpoints")
    parser.add_argument("--output", default=output, help=f"picture to write (default: {output})")
    parser.add_argument("--weights", choices=["ema", "raw"], default="ema", help="averaged or last weights (ema)")
    parser.set_defaults(takes_overrides=False)


def _add_sample(subparsers: "argparse._SubParsersAction[_Parser]") -> None:
    parser = subparsers.add_parser("sample", help="generate pictures", description="Generate pictures from noise.")
    _add_model_options(parser, "samples.png")
    parser.add_argument("--count", type=int, default=64, help="pictures (default: 64)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the noise (default: 0)")
    parser.set_defaults(run=commands.sample_command)


def _add_reconstruct(subparsers: "argparse._SubParsersAction[_Parser]") -> None:
    parser = subparsers.add_parser(
        "reconstruct", help="show pictures beside their reconstructions", description="Encode and decode pictures."
    )
    _add_model_options(parser, "reconstructions.png")
    parser.add_argument("--data", help="prepared data set (default: the run's own)")
    parser.add_argument("--split", default="train", help="its split (default: train)")
    parser.add_argument("--count", type=int, default=16, help="pictures, the first of the data set (default: 16)")
    parser.set_defaults(run=commands.reconstruct_command)


if __name__ == "__main__":
    sys.exit(main())
