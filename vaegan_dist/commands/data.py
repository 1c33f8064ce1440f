"""Commands for data sets: prepare, index, verify."""

import argparse
import sys
from collections.abc import Sequence
from contextlib import closing

from pydantic import ValidationError

from vaegan_dist.commands.common import Counter, Subparsers, local
from vaegan_dist.config_source import type_name
from vaegan_dist.data.manifest import read_manifest
from vaegan_dist.data.prepare import PrepareOptions, prepare
from vaegan_dist.data.urls import is_remote
from vaegan_dist.errors import ConfigError


def add_prepare(subparsers: Subparsers) -> None:
    parser = subparsers.add_parser(
        "prepare",
        help="make shards and dataset.json from pictures",
        description="Make WebDataset shards and dataset.json from pictures.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    _add_prepare_options(parser)
    parser.set_defaults(run=prepare_command, takes_overrides=False)


def _add_prepare_options(parser: argparse.ArgumentParser) -> None:
    """One option per field of `PrepareOptions`, with its type, default and description."""
    for name, field in PrepareOptions.model_fields.items():
        default = "required" if field.is_required() else f"default: {field.get_default(call_default_factory=True)}"
        text = f"{' '.join((field.description or '').split())} ({type_name(field)}; {default})".replace("%", "%%")
        flag = f"--{name.replace('_', '-')}"
        if field.annotation is bool:
            parser.add_argument(flag, action="store_true", default=argparse.SUPPRESS, help=text)
        elif name == "source":
            parser.add_argument(name, help=text)
        elif name == "output":
            parser.add_argument(name, type=local, help=text)
        else:
            parser.add_argument(flag, default=argparse.SUPPRESS, metavar=type_name(field), help=text)


def prepare_command(options: argparse.Namespace, overrides: Sequence[str]) -> int:
    """Make a data set and say what it is."""
    given = {name: getattr(options, name) for name in PrepareOptions.model_fields if hasattr(options, name)}
    try:
        settings = PrepareOptions.model_validate(given)
    except ValidationError as error:
        first = error.errors()[0]
        key = str(first["loc"][0]).replace("_", "-") if first["loc"] else "options"
        raise ConfigError(f"--{key}={first.get('input')}: {first['msg']}") from None
    with closing(Counter("prepare")) as counter:
        made = prepare(settings, counter)
    for picture in made.broken:
        print(f"left out: {picture.name}: {picture.cause}", file=sys.stderr)
    for split, path in made.manifests.items():
        manifest = read_manifest(path)
        print(
            f"{split}: {manifest.samples} pictures of {manifest.width}x{manifest.height}x{manifest.channels} in "
            f"{len(manifest.shards)} shards, {'there already' if made.reused else 'made'}: {path.parent}"
        )
    return 0


def add_index(subparsers: Subparsers) -> None:
    parser = subparsers.add_parser(
        "index",
        help="write a dataset.json for shards that exist already",
        description="Write a dataset.json for WebDataset shards that somebody else made, without copying them.",
    )
    parser.add_argument(
        "shards",
        nargs="+",
        help="paths or URLs (s3:// gs:// az:// https://) with braces (shard-{000000..000146}.tar) or wildcards, or "
        "folders of .tar files; each shard behind a URL is fetched, looked at and deleted again",
    )
    parser.add_argument("--folder", help="where dataset.json goes (default: the shards' folder)")
    parser.add_argument("--split", default="train", help="what the split is called (default: train)")
    parser.add_argument("--layout", choices=["auto", "files", "chunks"], default="auto", help="default: auto")
    parser.add_argument("--overwrite", action="store_true", help="replace a dataset.json that is there")
    parser.set_defaults(run=index_command, takes_overrides=False)


def index_command(options: argparse.Namespace, overrides: Sequence[str]) -> int:
    """Write a dataset.json for existing shards."""
    from vaegan_dist.data.existing import index_existing
    from vaegan_dist.data.existing_remote import index_remote

    settings = {name: getattr(options, name) for name in ("folder", "split", "layout", "overwrite")}
    if is_remote(options.shards[0]):
        place, manifest = index_remote(options.shards, **settings)
    else:
        place = str(index_existing(options.shards, **settings))
        manifest = read_manifest(place)
    print(f"{place}: {manifest.samples} pictures in {len(manifest.shards)} shards")
    return 0


def add_verify(subparsers: Subparsers) -> None:
    parser = subparsers.add_parser(
        "verify", help="check a data set against its dataset.json", description="Check a data set."
    )
    parser.add_argument("dataset", help="a prepared folder, or its dataset.json")
    parser.add_argument("--full", action="store_true", help="also hash every shard and decode every picture")
    parser.set_defaults(run=verify_command, takes_overrides=False)


def verify_command(options: argparse.Namespace, overrides: Sequence[str]) -> int:
    """Check a data set; one line for each problem."""
    from vaegan_dist.data.verify import verify

    with closing(Counter("verify")) as counter:
        problems = verify(options.dataset, full=options.full, progress=counter)
    for problem in problems:
        print(problem)
    found = {0: "no problem found", 1: "1 problem"}.get(len(problems), f"{len(problems)} problems")
    print(f"{options.dataset}: {found}")
    return 1 if problems else 0
