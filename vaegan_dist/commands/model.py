"""Commands that draw pictures with a trained model: sample, reconstruct, interpolate, traverse."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from vaegan_dist.commands.common import Subparsers, add_data_options, add_model_options, local, require_at_least


def _add_options(parser: argparse.ArgumentParser, output: str) -> None:
    add_model_options(parser)
    parser.add_argument("--output", type=local, default=output, help=f"picture to write (default: {output})")
    parser.set_defaults(takes_overrides=False)


def add_sample(subparsers: Subparsers) -> None:
    parser = subparsers.add_parser("sample", help="generate pictures", description="Generate pictures from noise.")
    _add_options(parser, "samples.png")
    parser.add_argument("--count", type=int, default=64, help="pictures (default: 64)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the noise (default: 0)")
    parser.set_defaults(run=sample_command)


def sample_command(options: argparse.Namespace, overrides: Sequence[str]) -> int:
    """Write a sheet of generated pictures."""
    from vaegan_dist.evaluation.pictures import grid, save_png
    from vaegan_dist.use.model import generate

    require_at_least(options, 1, "count")
    save_png(grid(generate(options.model, options.weights, options.count, options.seed)), Path(options.output))
    print(options.output)
    return 0


def add_reconstruct(subparsers: Subparsers) -> None:
    parser = subparsers.add_parser(
        "reconstruct", help="show pictures beside their reconstructions", description="Encode and decode pictures."
    )
    _add_options(parser, "reconstructions.png")
    add_data_options(parser)
    parser.add_argument("--count", type=int, default=16, help="pictures, the first of the data set (default: 16)")
    parser.set_defaults(run=reconstruct_command)


def reconstruct_command(options: argparse.Namespace, overrides: Sequence[str]) -> int:
    """Write a sheet of pictures above their reconstructions."""
    from vaegan_dist.evaluation.pictures import comparison, save_png
    from vaegan_dist.use.model import reconstruct

    require_at_least(options, 1, "count")
    pairs = reconstruct(options.model, options.weights, options.data, options.split, options.count)
    save_png(comparison(*pairs), Path(options.output))
    print(options.output)
    return 0


def add_interpolate(subparsers: Subparsers) -> None:
    parser = subparsers.add_parser(
        "interpolate",
        help="show the ways between latents",
        description="Decode the ways between latents of the prior, or between those of pictures.",
    )
    _add_options(parser, "interpolations.png")
    parser.add_argument("--pictures", action="store_true", help="between pictures of a data set instead of noise")
    add_data_options(parser)
    parser.add_argument("--rows", type=int, default=8, help="ways (default: 8)")
    parser.add_argument("--steps", type=int, default=9, help="pictures of a way, with both ends (default: 9)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the noise (default: 0)")
    parser.set_defaults(run=interpolate_command)


def interpolate_command(options: argparse.Namespace, overrides: Sequence[str]) -> int:
    """Write a sheet of interpolations."""
    from vaegan_dist.evaluation.pictures import save_png
    from vaegan_dist.use.assess import between_pictures, between_samples
    from vaegan_dist.use.model import load, open_for

    require_at_least(options, 1, "rows")
    require_at_least(options, 2, "steps")
    model = load(options.model, weights=options.weights)
    if options.pictures:
        dataset = open_for(model, options.data, options.split)
        originals = dataset.read(range(min(2 * options.rows, len(dataset)))).images
        sheet = between_pictures(model, originals, options.steps)
    else:
        sheet = between_samples(model, options.rows, options.steps, options.seed)
    save_png(sheet, Path(options.output))
    print(options.output)
    return 0


def add_traverse(subparsers: Subparsers) -> None:
    parser = subparsers.add_parser(
        "traverse",
        help="turn single units of a latent",
        description="Encode a picture and decode it with single units of its latent going from -3 to 3.",
    )
    _add_options(parser, "traversals.png")
    add_data_options(parser)
    parser.add_argument("--picture", type=int, default=0, help="number of the picture in the data set (default: 0)")
    parser.add_argument("--units", type=int, default=10, help="units, those with the largest KL (default: 10)")
    parser.add_argument("--steps", type=int, default=9, help="pictures per unit (default: 9)")
    parser.set_defaults(run=traverse_command)


def traverse_command(options: argparse.Namespace, overrides: Sequence[str]) -> int:
    """Write a sheet of traversals."""
    from vaegan_dist.evaluation.pictures import save_png
    from vaegan_dist.use.assess import turn_units
    from vaegan_dist.use.model import load, open_for

    require_at_least(options, 1, "units")
    require_at_least(options, 2, "steps")
    model = load(options.model, weights=options.weights)
    original = open_for(model, options.data, options.split).read([options.picture]).images[0]
    save_png(turn_units(model, original, None, options.units, options.steps), Path(options.output))
    print(options.output)
    return 0
