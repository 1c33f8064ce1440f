"""A dataset.json for WebDataset shards that somebody else wrote, where they lie: nothing is copied or changed."""

import glob
import io
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import simplejpeg
from braceexpand import braceexpand
from PIL import Image

from vaegan_dist.data.decode import read_encoded
from vaegan_dist.data.images import is_grey
from vaegan_dist.data.index import BAD_LABEL, NO_LABEL, PICTURE_KINDS, ShardIndex, index_shard, shard_keys
from vaegan_dist.data.manifest import MANIFEST_NAME, MAX_SHARDS, Layout, Manifest, ShardInfo, write_manifest
from vaegan_dist.data.npy import npy_header
from vaegan_dist.data.tar import ShardFile
from vaegan_dist.errors import DataError, InputError
from vaegan_dist.files import file_sha256


@dataclass(frozen=True)
class Seen:
    """What one shard was found to hold."""

    info: ShardInfo
    index: ShardIndex
    shapes: dict[tuple[int, int, int], str]
    """height, width, channels → the first member that has them"""


def index_existing(
    urls: Sequence[str],
    *,
    folder: str | Path | None = None,
    split: str = "train",
    layout: Layout | Literal["auto"] = "auto",
    classes: Sequence[str] | None = None,
    overwrite: bool = False,
) -> Path:
    """Write a dataset.json for existing shards and return its path.

    Args:
        urls: paths with braces (`shard-{000000..000146}.tar`) or wildcards, folders of .tar files, file:// URLs.
        folder: where the dataset.json goes, the shards below it; default: the folder that holds them all.
        split: what it is called.
        layout: of the samples; `auto` looks at the first shard.
        classes: names of the classes by label; default: the numbers up to the highest label.
        overwrite: replace a dataset.json that is there.

    Raises:
        InputError: no shards, pictures of different sizes, labels on a part of them only.
        DataError: a shard is damaged; names shard, member and offset.
    """
    paths = _expand(urls)
    root = _root(paths, folder)
    if (root / MANIFEST_NAME).exists() and not overwrite:
        raise InputError(f"{root / MANIFEST_NAME}: is there already; use --overwrite, or another folder")
    names = [path.relative_to(root).as_posix() for path in paths]
    chosen = layout_of(paths[0], names[0]) if layout == "auto" else layout
    with ThreadPoolExecutor(len(os.sched_getaffinity(0)), "index") as pool:
        seen = list(pool.map(lambda item: look(item[0], item[1], chosen), zip(paths, names, strict=True)))
    return write_manifest(root, manifest_of(seen, split, classes))


def manifest_of(seen: list[Seen], split: str, classes: Sequence[str] | None) -> Manifest:
    """The manifest of shards that were looked at."""
    height, width, channels = _shape(seen)
    notes: Counter[str] = Counter()
    for shard in seen:
        notes.update(shard.index.notes)
    return Manifest(
        split=split,
        layout="files" if seen[0].index.shape is None else "chunks",
        height=height,
        width=width,
        channels=channels,
        classes=_classes(seen, classes),
        shards=tuple(shard.info for shard in seen),
        created={"by": "index", "passed_over": dict(sorted(notes.items()))},
    )


def _expand(urls: Sequence[str]) -> list[Path]:
    """Paths of all shards, in the order given; wildcards and folders in the order of their names."""
    paths: dict[Path, None] = {}
    for url in urls:
        local = url.removeprefix("file://")
        if "://" in local or local.startswith("pipe:"):
            raise InputError(f"{url}: not a path; URLs are indexed apart, and `pipe:` runs what it says")
        for pattern in braceexpand(local):
            for path in _matches(pattern, url):
                paths[path] = None
            if len(paths) > MAX_SHARDS:
                raise InputError(f"{url}: more than {MAX_SHARDS} shards; index them in parts")
    if not paths:
        raise InputError("no shards; name paths, patterns or folders of .tar files")
    return list(paths)


def _matches(pattern: str, url: str) -> Iterator[Path]:
    path = Path(pattern)
    if path.is_dir():
        found = sorted(path.glob("*.tar"))
    elif glob.has_magic(pattern):
        found = sorted(map(Path, glob.glob(pattern, recursive=True)))  # noqa: PTH207 (absolute patterns too)
    else:
        found = [path] if path.is_file() else []
    if not found:
        raise InputError(f"{url}: no shard at {pattern}; check the path")
    for item in found:
        yield Path(os.path.abspath(item))  # noqa: PTH100 (links stay: their own names are what counts)


def _root(paths: list[Path], folder: str | Path | None) -> Path:
    root = Path(os.path.commonpath([path.parent for path in paths])) if folder is None else Path(folder)
    root = Path(os.path.abspath(root))  # noqa: PTH100
    for path in paths:
        if not path.is_relative_to(root):
            raise InputError(f"{path}: is not below {root}, where dataset.json would lie; choose a folder above it")
    return root


def layout_of(path: Path, name: str) -> Layout:
    """Chunks, if the first shard has samples with an images.npy."""
    try:
        return "chunks" if index_shard(path, name, "chunks").samples else "files"
    except DataError:
        return "files"  # if it is damaged rather than of another layout, the walk that follows says so


def look(path: Path, name: str, layout: Layout) -> Seen:
    """Walk and hash one shard.

    Raises:
        InputError: it holds no pictures.
        DataError: it is damaged.
    """
    index = index_shard(path, name, layout)
    if not index.samples:
        passed = ", ".join(f"{count} {what}" for what, count in index.notes.items()) or "nothing"
        raise InputError(f"{path}: holds no pictures (passed over: {passed}); leave it out")
    info = ShardInfo(name=name, samples=index.samples, bytes=path.stat().st_size, sha256=file_sha256(path))
    if index.shape is not None:
        return Seen(info, index, {index.shape: name})
    keys = shard_keys(path, name, layout)
    shapes: dict[tuple[int, int, int], str] = {}
    with ShardFile(path, name) as shard:
        for number in range(index.samples):
            kind = PICTURE_KINDS[index.kind[number]]
            shape = _header(shard, int(index.offset[number]), int(index.size[number]), kind, keys[number])
            shapes.setdefault(shape, f"{name}: member {f'{keys[number]}.{kind}'!r}")
    return Seen(info, index, shapes)


def _header(shard: ShardFile, offset: int, size: int, kind: str, key: str) -> tuple[int, int, int]:
    """Height, width and channels that a picture's header states."""
    try:
        data = read_encoded(shard, offset, size)
        if kind in ("jpg", "jpeg"):
            height, width, colour, _ = simplejpeg.decode_jpeg_header(data)
            return height, width, 1 if colour == "Gray" else 3
        if kind == "npy":
            shape, _ = npy_header(data[:16_384], size, np.dtype(np.uint8), None)
            return (*shape, 1) if len(shape) == 2 else shape  # type: ignore[return-value]
        image = Image.open(io.BytesIO(data), formats=("PNG", "WEBP", "BMP", "TIFF"))
        return image.height, image.width, 1 if is_grey(image) else 3
    except DataError:
        raise
    except Exception as error:  # header parsers raise anything on damaged data
        cause = " ".join(str(error).split())[:120]
        raise shard.error(offset, f"not a picture ({cause})", "repair or remove it", f"{key}.{kind}") from None


def _shape(seen: list[Seen]) -> tuple[int, int, Literal[1, 3]]:
    """The one size of all pictures; grey beside colour is colour."""
    shapes: dict[tuple[int, int, int], str] = {}
    for shard in seen:
        for shape, member in shard.shapes.items():
            shapes.setdefault(shape, member)
    sizes = {shape[:2]: member for shape, member in reversed(shapes.items())}
    if len(sizes) > 1:
        (first, one), (second, other), *_ = reversed(sizes.items())
        raise InputError(
            f"{other}: {second[1]}x{second[0]} pixels, {one} has {first[1]}x{first[0]}; all must be equal: run "
            "`vaegan-dist prepare` with --resolution on the shards"
        )
    channels = {shape[2] for shape in shapes}
    if not channels <= {1, 3}:
        raise InputError(f"{shapes.popitem()[1]}: {max(channels)} channels; 1 and 3 are read")
    (height, width) = next(iter(sizes))
    return height, width, 1 if channels == {1} else 3


def _classes(seen: list[Seen], names: Sequence[str] | None) -> tuple[str, ...] | None:
    labels = np.concatenate([shard.index.label for shard in seen])
    if (labels == NO_LABEL).all():
        if names is not None:
            raise InputError("the shards hold no labels (.cls, labels.npy), but names of classes are given; drop them")
        return None
    for shard in seen:
        bad = np.flatnonzero((shard.index.label == NO_LABEL) | (shard.index.label == BAD_LABEL))
        if len(bad):
            what = "no label" if shard.index.label[bad[0]] == NO_LABEL else "a label that is no integer of 0 or more"
            raise InputError(f"shard {shard.info.name}: sample {bad[0]} has {what}, others have one; repair the shard")
    count = int(labels.max()) + 1
    if names is None:
        return tuple(map(str, range(count)))
    if len(names) < count:
        raise InputError(f"{len(names)} names of classes for labels up to {count - 1}; name all {count}")
    return tuple(names)
