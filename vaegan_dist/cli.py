"""The command line: `vaegan-dist COMMAND`, one file of `commands/` for each area."""

import argparse
import sys
from collections.abc import Sequence

import vaegan_dist
from vaegan_dist.commands import cluster, data, describe, model, report, sweep, train, use
from vaegan_dist.commands.common import Parser
from vaegan_dist.errors import ConfigError, VaeganError

INTERRUPTED = 130
COMMANDS = (
    data.add_prepare,
    data.add_index,
    data.add_verify,
    train.add_train,
    describe.add_describe,
    sweep.add_sweep,
    cluster.add_submit,
    cluster.add_check_cluster,
    report.add_status,
    report.add_report,
    model.add_sample,
    model.add_reconstruct,
    model.add_interpolate,
    model.add_traverse,
    use.add_evaluate,
    use.add_encode,
    use.add_export,
)


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
    parser = Parser(prog="vaegan-dist", description="Train VAE-GANs on many GPUs from WebDataset shards.")
    parser.add_argument("--version", action="version", version=f"vaegan-dist {vaegan_dist.__version__}")
    subparsers = parser.add_subparsers(dest="command", metavar="COMMAND", required=True, parser_class=Parser)
    for add in COMMANDS:
        add(subparsers)
    options, rest = parser.parse_known_args(arguments)
    overrides = _overrides(rest)
    if overrides and not options.takes_overrides:
        raise ConfigError(f"{overrides[0].split('=')[0]}: unknown option of '{options.command}'; see --help")
    return options, overrides


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


if __name__ == "__main__":
    sys.exit(main())
