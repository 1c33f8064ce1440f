"""Shards for the reader's tests, packed by other libraries than the one under test (webdataset, tarfile, Pillow)."""

import hashlib
import io
import tarfile
from pathlib import Path

import numpy as np
import webdataset
from PIL import Image

from vaegan_dist.data.manifest import Manifest, ShardInfo, write_manifest

FORMATS = {"jpg": "JPEG", "jpeg": "JPEG", "png": "PNG", "webp": "WEBP", "bmp": "BMP", "tif": "TIFF"}


def picture(number: int, size: tuple[int, int] = (16, 12), channels: int = 3) -> np.ndarray:
    """Smooth uint8 [H, W, C], another one for every number."""
    rng = np.random.default_rng(number)
    small = rng.integers(0, 256, (3, 3, channels), np.uint8)
    image = Image.fromarray(small[:, :, 0] if channels == 1 else small).resize(size[::-1], Image.Resampling.BICUBIC)
    return np.asarray(image).reshape(*size, channels)


def encoded(pixels: np.ndarray, kind: str = "jpg") -> bytes:
    """A picture in one of the formats, by Pillow; .npy by NumPy."""
    stream = io.BytesIO()
    if kind == "npy":
        np.save(stream, pixels)
    else:
        image = Image.fromarray(pixels[:, :, 0] if pixels.shape[2] == 1 else pixels)
        image.save(stream, FORMATS[kind], **({"lossless": True} if kind == "webp" else {}))
    return stream.getvalue()


def npy(array: np.ndarray) -> bytes:
    """An array as .npy bytes (pickled where it holds objects: what a hostile file would)."""
    stream = io.BytesIO()
    np.save(stream, array, allow_pickle=True)
    return stream.getvalue()


def pack(path: Path, members: list[tuple[str, bytes]], form: int = tarfile.GNU_FORMAT) -> Path:
    """A tar of these members, by the standard library."""
    with tarfile.open(path, "w", format=form) as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def info(path: Path, samples: int) -> ShardInfo:
    """What a manifest says about a shard as it lies there."""
    data = path.read_bytes()
    return ShardInfo(name=path.name, samples=samples, bytes=len(data), sha256=hashlib.sha256(data).hexdigest())


def describe(
    folder: Path,
    shards: list[tuple[Path, int]],
    *,
    layout: str = "files",
    size: tuple[int, int] = (16, 12),
    channels: int = 3,
    classes: int | None = 10,
    split: str = "train",
) -> Path:
    """Write the dataset.json; returns the folder."""
    manifest = Manifest(
        split=split,
        layout=layout,
        height=size[0],
        width=size[1],
        channels=channels,
        classes=None if classes is None else tuple(map(str, range(classes))),
        shards=tuple(info(path, samples) for path, samples in shards),
    )
    write_manifest(folder, manifest)
    return folder


def files_set(folder: Path, counts: tuple[int, ...], kind: str = "jpg", channels: int = 3) -> Path:
    """A data set of layout `files`, packed by webdataset; picture n is `picture(n)`, its label n % 10."""
    folder.mkdir(parents=True, exist_ok=True)
    shards, number = [], 0
    for place, count in enumerate(counts):
        path = folder / f"shard-{place:06d}.tar"
        with webdataset.TarWriter(str(path), encoder=False) as tar:
            for _ in range(count):
                data = encoded(picture(number, channels=channels), kind)
                tar.write({"__key__": f"{number:06d}", kind: data, "cls": str(number % 10).encode()})
                number += 1
        shards.append((path, count))
    return describe(folder, shards, channels=channels)


def chunk_set(
    folder: Path, counts: tuple[int, ...], per_chunk: int = 7, channels: int = 1, labels: bool = True
) -> Path:
    """A data set of layout `chunks`; picture n is `picture(n)`, its label n % 10."""
    folder.mkdir(parents=True, exist_ok=True)
    shards, number = [], 0
    for place, count in enumerate(counts):
        path = folder / f"shard-{place:06d}.tar"
        with webdataset.TarWriter(str(path), encoder=False) as tar:
            for chunk, first in enumerate(range(0, count, per_chunk)):
                numbers = range(number + first, number + min(first + per_chunk, count))
                sample = {
                    "__key__": f"{path.stem}-{chunk:06d}",
                    "images.npy": npy(np.stack([picture(n, channels=channels) for n in numbers])),
                    "keys.json": ("[" + ",".join(f'"k{n}"' for n in numbers) + "]").encode(),
                }
                if labels:
                    sample["labels.npy"] = npy(np.array([n % 10 for n in numbers], np.int64))
                tar.write(sample)
        number += count
        shards.append((path, count))
    return describe(folder, shards, layout="chunks", channels=channels, classes=10 if labels else None)
