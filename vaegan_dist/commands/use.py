"""Commands that put a trained model to work on a data set: evaluate, encode, export."""

import argparse
from collections.abc import Sequence
from contextlib import closing
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from vaegan_dist.commands.common import (
    Counter,
    Subparsers,
    add_data_options,
    add_model_options,
    local,
    require_at_least,
)


def _add_shared(parser: argparse.ArgumentParser, split: str) -> None:
    add_model_options(parser, exported=True)
    add_data_options(parser, split)
    parser.add_argument("--seed", type=int, default=0, help="seed of the noise (default: 0)")
    parser.add_argument("--batch-size", type=int, default=256, help="pictures at a time over all workers (256)")
    parser.add_argument("--runtime", choices=["local", "ray"], default="local", help="default: local")
    parser.add_argument("--workers", type=int, default=1, help="ranks that share the work (default: 1)")
    parser.add_argument("--gpus", action="store_true", help="each rank takes a GPU")
    parser.add_argument("--address", default="auto", help="Ray cluster: auto (default), local, or an address")
    parser.set_defaults(takes_overrides=False)


def _fan_out(work: Any, arguments: dict[str, Any], options: argparse.Namespace, output: Path, counter: Any) -> Any:
    if options.runtime == "local":
        from vaegan_dist.cluster.fan_out import fan_out_local

        return fan_out_local(work, arguments, workers=options.workers, gpus=options.gpus, tell=counter)
    # Ray takes seconds to import; only who uses it pays for that.
    from vaegan_dist.cluster.ray_map import Placing, fan_out_on_ray

    placing = Placing(options.workers, gpus_per_worker=float(options.gpus), address=options.address)
    return fan_out_on_ray(work, arguments, placing, scratch=output / ".ray", tell=counter)


def _absolute(options: argparse.Namespace) -> None:
    """Paths as the workers of a cluster must see them."""
    if options.runtime == "ray":
        from vaegan_dist.cluster.ray_train import absolute_path

        for name in ("model", "data", "output"):
            if getattr(options, name):
                setattr(options, name, absolute_path(getattr(options, name)))


class _Total:
    """Adds up what ranks tell, for a progress line."""

    def __init__(self, counter: Counter, total: int) -> None:
        self.counter, self.total, self.done = counter, total, 0

    def __call__(self, count: int) -> None:
        self.done += count
        self.counter(self.done, self.total)


def add_evaluate(subparsers: Subparsers) -> None:
    parser = subparsers.add_parser(
        "evaluate",
        help="measure a trained model",
        description="Measure a trained model: reconstruction, generation, likelihood, latent space; with pictures.",
    )
    _add_shared(parser, "auto")
    parser.add_argument("--samples", type=int, default=10_000, help="pictures to generate and compare with (10000)")
    parser.add_argument(
        "--features",
        default="auto",
        help="network for FID and its kin: auto, none, classifier, inception, inception=FILE, efficientnet-lite0, a "
        "TorchScript file, or module:function (default: auto)",
    )
    parser.add_argument("--lpips", metavar="FILE", help="AlexNet's weights, for LPIPS")
    parser.add_argument(
        "--output", type=local, help="folder for report and pictures (default: evaluations/… in the run)"
    )
    parser.set_defaults(run=evaluate_command)


def evaluate_command(options: argparse.Namespace, overrides: Sequence[str]) -> int:
    """Evaluate, and show the table."""
    from rich.console import Console

    from vaegan_dist.evaluation.table import notes, table
    from vaegan_dist.use.assess import TABLE, Task, assess_task, complete, pictures_of

    require_at_least(options, 1, "samples", "batch_size", "workers")
    _absolute(options)
    known = {field.name for field in fields(Task)}
    task = complete(Task(**{key: value for key, value in vars(options).items() if key in known and value is not None}))
    output = Path(task.output)
    with closing(Counter("evaluate")) as counter:
        total = _Total(counter, pictures_of(task))
        report = _fan_out(assess_task, task.to_json(), options, output, total)
    Console().print(table({task.weights: report}))
    print("", *notes(report), "", f"{output / TABLE} and the pictures beside it", sep="\n")
    return 0


def add_encode(subparsers: Subparsers) -> None:
    parser = subparsers.add_parser(
        "encode",
        help="turn a data set into latent shards",
        description="Encode a data set into latent shards (WebDataset). The same command again continues.",
    )
    _add_shared(parser, "train")
    parser.add_argument(
        "output", type=local, help="folder for the latent shards; each split gets a folder of its name in it"
    )
    parser.add_argument(
        "--content",
        choices=["moments", "sample"],
        default="moments",
        help="moments: mu.npy and logvar.npy (default); sample: latent.npy, drawn once with the seed",
    )
    parser.add_argument("--dtype", choices=["float32", "float16"], default="float32", help="default: float32")
    parser.set_defaults(run=encode_command)


def encode_command(options: argparse.Namespace, overrides: Sequence[str]) -> int:
    """Encode, and say what was made."""
    from vaegan_dist.data.latents import read_latent_manifest
    from vaegan_dist.use.encode import Task, begun, encode_task, finish, open_work

    require_at_least(options, 1, "batch_size", "workers")
    _absolute(options)
    known = {field.name for field in fields(Task)}
    task = Task(**{key: value for key, value in vars(options).items() if key in known and value is not None})
    task = replace(task, output=str(Path(task.output) / task.split))
    work = open_work(task)
    with begun(work) as open_end:
        if open_end:
            with closing(Counter("encode")) as counter:
                _fan_out(encode_task, task.to_json(), options, work.folder, _Total(counter, len(work.dataset)))
            finish(work)
    made = read_latent_manifest(work.folder)
    print(
        f"{made.split}: {made.samples} latents of {'x'.join(map(str, made.shape))} ({made.content}) in "
        f"{len(made.shards)} shards, {'made' if open_end else 'there already'}: {work.folder}; scaling factor "
        f"{made.scaling_factor:.6g}"
    )
    return 0


def add_export(subparsers: Subparsers) -> None:
    parser = subparsers.add_parser(
        "export",
        help="write a model for use elsewhere",
        description="Write encoder and decoder with a model card, for vaegan_dist.load, diffusers or ONNX.",
    )
    add_model_options(parser)
    parser.add_argument("output", type=local, help="folder to write")
    parser.add_argument("--format", choices=["safetensors", "diffusers", "onnx"], default="safetensors")
    parser.add_argument(
        "--latents", type=local, help="folder of `encode`: its scaling factor goes into the diffusers folder"
    )
    parser.set_defaults(run=export_command, takes_overrides=False)


def export_command(options: argparse.Namespace, overrides: Sequence[str]) -> int:
    """Export, and say what was made."""
    from vaegan_dist.use.export import export
    from vaegan_dist.use.model import load

    model = load(options.model, weights=options.weights)
    remarks = export(model, Path(options.output), options.format, latents=options.latents)
    print(options.output, *remarks, sep="\n")
    return 0
