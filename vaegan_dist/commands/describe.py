"""The command that says what a configuration costs, before anything is trained."""

import argparse
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from vaegan_dist.commands.common import Subparsers, add_config_option, config_files
from vaegan_dist.config import Config
from vaegan_dist.config_source import load_config, preset_names
from vaegan_dist.errors import ConfigError, InputError

if TYPE_CHECKING:  # torch takes seconds to import; only the commands that use it pay for that
    from vaegan_dist.models import ImageShape
    from vaegan_dist.training.describe import ModelPlan

# What the presets are made for, where neither --image nor a data set says it.
PRESET_IMAGES = {
    "digits-conv": "28x28x1",
    "seed-mlp": "28x28x1",
    "smoke": "28x28x1",
    "soft-intro-32": "32x32x1",
    "larsen-64": "64x64x3",
    "kl-f4-64": "64x64x3",
    "kl-f8-256": "256x256x3",
}
GIGA, MEBI, GIBI = 1e9, 2**20, 2**30


def add_describe(subparsers: Subparsers) -> None:
    parser = subparsers.add_parser(
        "describe",
        help="parameters, operations and memory of a configuration",
        description="Say what a configuration costs: parameters, operations per image of a training step, and memory, "
        "of each network. Needs no data: pictures are of --image, of the data set that you name, or what the preset is "
        "made for. Takes configuration keys as `train` does.",
    )
    parser.add_argument("--preset", help=f"start from a preset: {', '.join(preset_names())}")
    add_config_option(parser)
    parser.add_argument("--image", metavar="WxHxC", help="size of the pictures, for example 64x64x3")
    parser.add_argument("--data", help="short for data.path")
    parser.set_defaults(run=describe_command, takes_overrides=True)


def describe_command(options: argparse.Namespace, overrides: Sequence[str]) -> int:
    """Print the tables."""
    from vaegan_dist.training.describe import describe_model

    data = [f"data.path={options.data}"] if options.data else []
    config = load_config(options.preset, config_files(options.config), [*data, *overrides])
    image = _image(config, options.image, asked_for_data=bool(options.data))
    print(model_text(describe_model(config, image)))
    return 0


def _image(config: Config, given: str | None, *, asked_for_data: bool) -> "ImageShape":
    from vaegan_dist.data.configured import open_configured
    from vaegan_dist.models import ImageShape
    from vaegan_dist.training.pictures import image_of

    standard = PRESET_IMAGES.get(config.preset or "")
    # The data set that happens to lie at the default path was made for another preset as likely as for this one.
    named = config.data.path != Config().data.path
    stands = "://" in config.data.path or Path(config.data.path).exists()
    if given is None and (asked_for_data or (named and stands) or standard is None):
        try:
            manifest = open_configured(config.data, read=False).manifest
        except InputError as error:
            if asked_for_data:
                raise
            raise ConfigError(f"--image is missing, and no data set stands ({error}); give --image 64x64x3") from None
        return image_of(manifest)
    size = re.fullmatch(r"([1-9]\d*)x([1-9]\d*)x([13])", given or standard or "")
    if size is None:
        raise ConfigError(f"--image={given}: give width, height and channels (1 or 3), for example 64x64x3")
    width, height, channels = map(int, size.groups())
    return ImageShape(channels=channels, height=height, width=width)


def model_text(plan: "ModelPlan") -> str:
    """What the networks cost, for people."""
    image = plan.image
    lines = [f"pictures     {image.width}x{image.height}x{image.channels}, {plan.images_at_once} at once on a worker"]
    lines.append(f"{'':21}{'parameters':>13}{'weights':>10}{'gradients':>11}{'optimiser':>11}{'average':>9}   MiB")
    for name, count in plan.parameters.items():
        memory = plan.memory[name]
        sizes = (memory.weights, memory.gradients, memory.optimizer, memory.average)
        lines.append(
            f"  {name:19}{count:>13,}"
            + "".join(f"{size / MEBI:>{w}.1f}" for size, w in zip(sizes, (10, 11, 11, 9), strict=True))
        )
    for phase in plan.phases:
        lines.append(
            f"phase {phase.name}: {phase.images:,} images in {phase.steps:,} steps, trains {', '.join(phase.trains)}; "
            f"{phase.flops_per_image / GIGA:.4g} GFLOP per image, about {plan.bytes_per_worker[phase.name] / GIBI:.2f} "
            f"GiB on a worker"
        )
        lines += [
            f"  {name:19}{flops / GIGA:>13.4g} GFLOP, {phase.activations[name] / MEBI:.2f} MiB of activations per image"
            for name, flops in phase.flops.items()
            if flops or phase.activations[name]
        ]
    return "\n".join(lines)
