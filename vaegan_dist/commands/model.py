"""Commands for a trained model: sample, reconstruct."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from vaegan_dist.commands.common import Subparsers
from vaegan_dist.errors import ConfigError


def _add_model_options(parser: argparse.ArgumentParser, output: str) -> None:
    parser.add_argument("model", metavar="RUN", help="a run's folder, or one of its checkpoints")
    parser.add_argument("--output", default=output, help=f"picture to write (default: {output})")
    parser.add_argument("--weights", choices=["ema", "raw"], default="ema", help="averaged or last weights (ema)")
    parser.set_defaults(takes_overrides=False)


def add_sample(subparsers: Subparsers) -> None:
    parser = subparsers.add_parser("sample", help="generate pictures", description="Generate pictures from noise.")
    _add_model_options(parser, "samples.png")
    parser.add_argument("--count", type=int, default=64, help="pictures (default: 64)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the noise (default: 0)")
    parser.set_defaults(run=sample_command)


def sample_command(options: argparse.Namespace, overrides: Sequence[str]) -> int:
    """Write a sheet of generated pictures."""
    from vaegan_dist.evaluation.pictures import grid, save_png
    from vaegan_dist.use import generate

    if options.count < 1:
        raise ConfigError(f"--count={options.count}: give a number above 0")
    save_png(grid(generate(Path(options.model), options.weights, options.count, options.seed)), Path(options.output))
    print(options.output)
    return 0


def add_reconstruct(subparsers: Subparsers) -> None:
    parser = subparsers.add_parser(
        "reconstruct", help="show pictures beside their reconstructions", description="Encode and decode pictures."
    )
    _add_model_options(parser, "reconstructions.png")
    parser.add_argument("--data", help="prepared data set (default: the run's own)")
    parser.add_argument("--split", default="train", help="its split (default: train)")
    parser.add_argument("--count", type=int, default=16, help="pictures, the first of the data set (default: 16)")
    parser.set_defaults(run=reconstruct_command)


def reconstruct_command(options: argparse.Namespace, overrides: Sequence[str]) -> int:
    """Write a sheet of pictures above their reconstructions."""
    from vaegan_dist.evaluation.pictures import comparison, save_png
    from vaegan_dist.use import reconstruct

    if options.count < 1:
        raise ConfigError(f"--count={options.count}: give a number above 0")
    pairs = reconstruct(Path(options.model), options.weights, options.data, options.split, options.count)
    save_png(comparison(*pairs), Path(options.output))
    print(options.output)
    return 0
