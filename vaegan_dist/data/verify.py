"""Checking a data set against its dataset.json: what is wrong, and where."""

import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from vaegan_dist.data.decode import decode_into, read_encoded
from vaegan_dist.data.images import PictureError
from vaegan_dist.data.index import BAD_LABEL, NO_LABEL, PICTURE_KINDS, RAW, ShardIndex, index_shard, shard_keys
from vaegan_dist.data.manifest import MANIFEST_NAME, Manifest, ShardInfo, find_manifest, read_manifest
from vaegan_dist.data.tar import ShardFile
from vaegan_dist.data.urls import CACHE_BYTES, is_remote, local_path
from vaegan_dist.errors import DataError, InputError, VaeganError
from vaegan_dist.files import file_sha256

if TYPE_CHECKING:
    from vaegan_dist.data.store import RemoteShards

Progress = Callable[[int, int | None], None]


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong."""

    shard: str
    """name of the shard, or of the dataset.json"""
    message: str
    """shard, member, offset and cause, in one line"""

    def __str__(self) -> str:
        return self.message


def _silent(done: int, total: int | None) -> None:
    pass


def verify(
    path: str | Path,
    full: bool = False,
    *,
    split: str | None = None,
    progress: Progress = _silent,
    cache_dir: str | None = None,
    cache_bytes: int = CACHE_BYTES,
) -> list[Problem]:
    """Check a data set: sizes of the shards and their sample counts; `full`: hashes, labels and every picture as well.

    Behind a URL the sizes are what the server states, and only `full` fetches the shards and counts their samples.

    Args:
        path: its folder or a dataset.json, or the URL of its folder.
        full: also read every byte and decode every picture.
        split: check this split only; default: all that are there.
        progress: called with the pictures checked and their total.
        cache_dir, cache_bytes: for shards behind a URL, as in `open_dataset`.

    Raises:
        InputError: there is no data set.
    """
    if is_remote(str(path)):
        return _verify_remote(str(path), full, split, progress, cache_dir, cache_bytes)
    path = local_path(str(path))
    problems: list[Problem] = []
    checks: list[tuple[Path, Manifest, ShardInfo]] = []
    for place in _manifests(Path(path), split):
        try:
            manifest = read_manifest(place)
        except InputError as error:
            problems.append(Problem(str(place), str(error)))
            continue
        checks += [(place.parent, manifest, shard) for shard in manifest.shards]
        problems += _unlisted(place.parent, manifest)
    count = _Count(sum(shard.samples for _, _, shard in checks), progress)

    def check(item: tuple[Path, Manifest, ShardInfo]) -> list[Problem]:
        folder, manifest, shard = item
        found = [Problem(shard.name, message) for message in _check_shard(folder, manifest, shard, full)]
        count.add(shard.samples)
        return found

    with ThreadPoolExecutor(len(os.sched_getaffinity(0)), "verify") as pool:
        for found in pool.map(check, checks):
            problems += found
    return problems


def _verify_remote(
    url: str, full: bool, split: str | None, progress: Progress, cache_dir: str | None, cache_bytes: int
) -> list[Problem]:
    """The splits `train` and `validation` behind a URL, or the one that is named."""
    from vaegan_dist.data.store import RemoteShards  # the object stores' client: only who needs it loads it

    sources = []
    for name in ("train", "validation") if split is None else (split,):
        try:
            sources.append(
                RemoteShards(url, name, cache=None if cache_dir is None else Path(cache_dir), cache_bytes=cache_bytes)
            )
        except InputError:
            if not sources:
                raise
    count = _Count(sum(remote.manifest.samples for remote in sources), progress)
    problems = []
    for remote in sources:
        with closing(remote):
            for shard in remote.manifest.shards:
                problems += [Problem(shard.name, line) for line in _check_remote(remote, shard, full)]
                count.add(shard.samples)
    return problems


def _check_remote(remote: "RemoteShards", shard: ShardInfo, full: bool) -> Iterator[str]:
    try:
        if full:
            # Its size and hash were checked when it came.
            yield from _check_content(remote.fetch(shard), remote.manifest, shard, full)
        elif (size := remote.size(shard)) != shard.bytes:
            yield f"shard {shard.name}: has {size} bytes, dataset.json says {shard.bytes}"
    except VaeganError as error:
        yield str(error)


class _Count:
    """Progress from several threads."""

    def __init__(self, total: int, progress: Progress) -> None:
        self._done, self._total, self._progress, self._lock = 0, total, progress, threading.Lock()

    def add(self, samples: int) -> None:
        with self._lock:
            self._done += samples
            self._progress(self._done, self._total)


def _manifests(path: Path, split: str | None) -> list[Path]:
    if split is not None:
        return [find_manifest(path, split)]
    inside = sorted(path.glob(f"*/{MANIFEST_NAME}")) if path.is_dir() else []
    return inside or [find_manifest(path)]


def _unlisted(folder: Path, manifest: Manifest) -> list[Problem]:
    """Shards in the folder that the data set does not know of: a sign of two data sets in one place."""
    known = {shard.name for shard in manifest.shards}
    strange = sorted(entry.name for entry in folder.glob("*.tar") if entry.name not in known)
    return [Problem(name, f"shard {name}: not listed in {folder / MANIFEST_NAME}") for name in strange]


def _check_shard(folder: Path, manifest: Manifest, shard: ShardInfo, full: bool) -> Iterator[str]:
    path = folder / shard.name
    if not path.is_file():
        yield f"shard {shard.name}: missing at {path}"
        return
    size = path.stat().st_size
    if size != shard.bytes:
        yield f"shard {shard.name}: has {size} bytes, dataset.json says {shard.bytes}"
    elif full and file_sha256(path) != shard.sha256:
        yield f"shard {shard.name}: its sha256 is not the one in dataset.json; its bytes were changed"
    yield from _check_content(path, manifest, shard, full)


def _check_content(path: Path, manifest: Manifest, shard: ShardInfo, full: bool) -> Iterator[str]:
    try:
        index = index_shard(path, shard.name, manifest.layout, tolerant=True)
    except DataError as error:
        yield str(error)
        return
    if index.fault is not None:
        yield index.fault
    if index.samples != shard.samples:
        yield f"shard {shard.name}: {index.samples} samples can be read, dataset.json says {shard.samples}"
    if index.shape is not None and index.shape != (manifest.height, manifest.width, manifest.channels):
        expected = (manifest.height, manifest.width, manifest.channels)
        yield f"shard {shard.name}: pictures of {index.shape} (height, width, channels), dataset.json says {expected}"
        return
    if full:
        try:
            yield from _check_samples(path, manifest, shard, index)
        except DataError as error:
            yield str(error)


def _check_samples(path: Path, manifest: Manifest, shard: ShardInfo, index: ShardIndex) -> Iterator[str]:
    """Every label and every picture that can be reached."""
    keys = shard_keys(path, shard.name, manifest.layout)
    row = np.empty((manifest.height, manifest.width, manifest.channels), np.uint8)
    with closing(ShardFile(path, shard.name)) as file:
        for number, (offset, size, kind) in enumerate(zip(index.offset, index.size, index.kind, strict=True)):
            member = keys[number] + (f".{PICTURE_KINDS[kind]}" if kind < RAW else "")
            where = f"shard {shard.name}: member {member!r} at byte {offset}"
            if (cause := _label_fault(int(index.label[number]), manifest)) is not None:
                yield f"{where}: {cause}"
            if kind < RAW:
                try:
                    decode_into(read_encoded(file, int(offset), int(size)), int(kind), row)
                except PictureError as error:
                    yield f"{where}: {error}"


def _label_fault(label: int, manifest: Manifest) -> str | None:
    if manifest.classes is None or 0 <= label < len(manifest.classes):
        return None
    known = {NO_LABEL: "has no label", BAD_LABEL: "its label is no integer of 0 or more"}
    return known.get(label, f"label {label} in a data set of {len(manifest.classes)} classes")
