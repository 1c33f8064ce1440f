"""A dataset.json for shards that lie on an object store or web server: each is fetched, looked at and deleted again."""

import re
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from fnmatch import fnmatchcase
from pathlib import Path
from posixpath import commonpath, dirname
from typing import Literal
from urllib.parse import urlsplit

from braceexpand import braceexpand

from vaegan_dist.data.cache import cache_folder
from vaegan_dist.data.existing import Seen, layout_of, look, manifest_of
from vaegan_dist.data.manifest import (
    MANIFEST_NAME,
    MAX_SHARD_BYTES,
    MAX_SHARDS,
    Layout,
    Manifest,
    manifest_bytes,
)
from vaegan_dist.data.transfer import Transfer
from vaegan_dist.data.urls import checked_url, is_remote
from vaegan_dist.errors import DataError, InputError
from vaegan_dist.files import write_whole

FETCHERS = 4

_MAGIC = re.compile(r"[*?\[]")


def index_remote(
    urls: Sequence[str],
    *,
    folder: str | None = None,
    split: str = "train",
    layout: Layout | Literal["auto"] = "auto",
    classes: Sequence[str] | None = None,
    overwrite: bool = False,
) -> tuple[str, Manifest]:
    """Write a dataset.json for the shards behind URLs; at most four of them are on this machine at a time.

    Args:
        urls: with braces (`s3://bucket/shard-{000000..000146}.tar`), wildcards, or folders of .tar files; a web server
            gives no lists, so that its shards must be named.
        folder: where the dataset.json goes: a URL above all shards, or a folder on this machine, from where it is to
            be uploaded; default: the folder of the shards, which must be writable.
        split, layout, classes, overwrite: as in `index_existing`.

    Returns:
        Where the dataset.json is, and its content.

    Raises:
        InputError: no shards, no access, pictures of different sizes, labels on a part of them only.
        DataError: a shard is damaged or cannot be had; names it.
    """
    shards = list(_expand(urls))
    if len(shards) > MAX_SHARDS:
        raise InputError(f"{urls[0]}: more than {MAX_SHARDS} shards; index them in parts")
    root = _root(shards, folder)
    transfer = Transfer(root)
    place = _destination(root, folder)
    there = place.exists() if isinstance(place, Path) else transfer.exists(MANIFEST_NAME)
    if there and not overwrite:
        raise InputError(f"{place}: is there already; use --overwrite, or another folder")
    names = [shard.removeprefix(root + "/") for shard in shards]
    manifest = manifest_of(_look_at_all(transfer, names, layout), split, classes)
    if isinstance(place, Path):
        write_whole(place, manifest_bytes(manifest))
    else:
        transfer.put(MANIFEST_NAME, manifest_bytes(manifest))
    return str(place), manifest


def _look_at_all(transfer: Transfer, names: list[str], layout: Layout | Literal["auto"]) -> list[Seen]:
    with tempfile.TemporaryDirectory(prefix="index-", dir=cache_folder("index-fetch")) as scratch:
        folder = Path(scratch)

        def fetched(number: int) -> Path:
            name, path = names[number], folder / f"{number}.tar"
            what = f"shard {name}"
            size = transfer.size(name, what)
            if size > MAX_SHARD_BYTES:
                raise DataError(f"{what}: {size} bytes at {transfer.url} (limit {MAX_SHARD_BYTES}); split it")
            transfer.fill(name, what, path, size)
            return path

        def look_at(number: int) -> Seen:
            path = fetched(number)
            try:
                return look(path, names[number], chosen)
            finally:
                path.unlink()

        chosen = layout if layout != "auto" else layout_of(fetched(0), names[0])
        with ThreadPoolExecutor(FETCHERS, "index") as pool:
            return list(pool.map(look_at, range(len(names))))


def _destination(root: str, folder: str | None) -> "Path | str":
    """Where the dataset.json goes."""
    if folder is not None and not is_remote(folder):
        return Path(folder) / MANIFEST_NAME
    if root.startswith(("http://", "https://")):
        raise InputError(
            f"{root}: nothing can be written to a web server; use --folder to write dataset.json on this machine, and "
            "upload it beside the shards"
        )
    return f"{root}/{MANIFEST_NAME}"


def _expand(urls: Sequence[str]) -> Iterator[str]:
    """URLs of all shards, each once, in the order given; wildcards and folders in the order of their names."""
    seen: set[str] = set()
    for url in urls:
        if not is_remote(url):
            raise InputError(f"{url}: a path beside URLs; index what lies on this machine apart")
        checked_url(url.replace("?", "*"))
        for pattern in braceexpand(url):
            for shard in _matches(pattern.rstrip("/")):
                if shard not in seen:
                    seen.add(shard)
                    yield shard


def _matches(pattern: str) -> list[str]:
    """URLs that one pattern stands for."""
    magic = _MAGIC.search(pattern)
    if magic is None and pattern.endswith(".tar"):
        return [pattern]
    root = pattern if magic is None else pattern[: pattern.rindex("/", 0, magic.start())]
    wanted = f"{pattern}/*.tar" if magic is None else pattern
    transfer = Transfer(root)
    found = sorted(f"{root}/{name}" for name in transfer.names())
    found = [url for url in found if url.count("/") == wanted.count("/") and fnmatchcase(url, wanted)]
    if not found:
        raise InputError(f"{pattern}: no shard there; check the URL")
    return found


def _root(shards: list[str], folder: str | None) -> str:
    """URL of the folder that shard names are relative to."""
    if folder is not None and is_remote(folder):
        root = folder.rstrip("/")
        outside = next((shard for shard in shards if not shard.startswith(root + "/")), None)
        if outside is not None:
            raise InputError(f"{outside}: is not below {root}, where dataset.json would lie; choose a folder above it")
        return root
    buckets = {shard[: len(shard) - len(urlsplit(shard).path)]: shard for shard in shards}
    if len(buckets) > 1:
        raise InputError(f"{' and '.join(list(buckets.values())[:2])}: not in one bucket; index them apart")
    return (next(iter(buckets)) + commonpath([dirname(urlsplit(shard).path) for shard in shards])).rstrip("/")
