"""A data set decoded once per node: a file of pixels in the user's cache that every process of the node maps.

Mapped rather than copied: the pages are shared by all ranks and readers of a node, are clean (the kernel may drop them
under pressure), and the next run finds them. Where nothing can be written, each process keeps its own copy.
"""

import json
import logging
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from vaegan_dist.data.cache import cache_folder, content_key, locked, prune, replace_file
from vaegan_dist.data.manifest import Manifest

if TYPE_CHECKING:
    from vaegan_dist.data.dataset import ShardDataset

log = logging.getLogger(__name__)

DECODED_VERSION = 1
CACHE_BYTES = 4 * 2**30
"""Decoded data sets kept in the cache, besides the one in use"""
PART = 4096


@dataclass(frozen=True)
class Decoded:
    """A whole data set, decoded."""

    pixels: npt.NDArray[np.uint8]
    """[samples, H, W, C], read only"""
    labels: npt.NDArray[np.int64] | None
    bad: dict[int, str]
    """samples that hold a substitute"""


def load_decoded(dataset: "ShardDataset", manifest: Manifest, modified: Sequence[int]) -> Decoded:
    """The decoded data set, from the cache or made now (by one process of the node, the others wait for it).

    Raises:
        DataError: what reading every sample raises.
    """
    folder = cache_folder("decoded")
    if folder is None:
        return _collect(dataset)
    shards = [(shard.name, shard.sha256, shard.samples) for shard in manifest.shards]
    shape = (manifest.samples, manifest.height, manifest.width, manifest.channels)
    key = content_key(DECODED_VERSION, manifest.layout, shape, manifest.classes, shards, list(modified))
    path = folder / f"{key}.npy"
    found = _open(path, shape)
    if found is not None:
        return found
    try:
        with locked(path):
            found = _open(path, shape)
            if found is None:
                log.info("decoding %d pictures into %s", manifest.samples, path)
                _build(dataset, path, shape)
                prune(folder, CACHE_BYTES, keep=path)
                found = _open(path, shape)
    except OSError as error:
        log.warning("decoded pictures not kept in %s (%s); this process holds its own copy", folder, error.strerror)
    return found or _collect(dataset)


def _parts(dataset: "ShardDataset") -> Iterator[tuple[npt.NDArray[np.uint8], npt.NDArray[np.int64] | None]]:
    """All samples in order, some thousand at a time: pixels [n, H, W, C] and labels."""
    for first in range(0, len(dataset), PART):
        dataset.prefetch_from(first, len(dataset))
        batch = dataset.read(np.arange(first, min(first + PART, len(dataset))))
        yield batch.images.permute(0, 2, 3, 1).numpy(), None if batch.labels is None else batch.labels.numpy()


def _collect(dataset: "ShardDataset") -> Decoded:
    """The decoded data set in this process's own memory."""
    pixels, labels = zip(*_parts(dataset), strict=True)
    known = [part for part in labels if part is not None]
    return Decoded(np.concatenate(pixels), np.concatenate(known) if known else None, dict(dataset.bad_samples))


def _build(dataset: "ShardDataset", path: Path, shape: tuple[int, ...]) -> None:
    """Write labels and bad samples, then the pixels: their presence says that the whole is there.

    Written, not mapped: on a full disk a write is an error, a mapped page kills the process.
    """
    labels: list[npt.NDArray[np.int64]] = []

    def write_pixels(descriptor: int) -> None:
        with os.fdopen(os.dup(descriptor), "wb") as file:
            header = {"descr": "|u1", "fortran_order": False, "shape": shape}
            np.lib.format.write_array_header_1_0(file, header)
            for pixels, some in _parts(dataset):
                file.write(np.ascontiguousarray(pixels).data)
                if some is not None:
                    labels.append(some)
        replace_file(_notes(path), write_notes)

    def write_notes(descriptor: int) -> None:
        with os.fdopen(os.dup(descriptor), "wb") as file:
            bad = np.array(json.dumps({str(sample): cause for sample, cause in dataset.bad_samples.items()}))
            known = np.concatenate(labels) if labels else np.zeros(0, np.int64)
            np.savez(file, allow_pickle=False, labels=known, bad=bad)

    replace_file(path, write_pixels)


def _notes(path: Path) -> Path:
    return path.with_suffix(".npz")


def _open(path: Path, shape: tuple[int, ...]) -> Decoded | None:
    """Map what an earlier process has left; None where it is missing or not what it should be."""
    try:
        pixels = np.load(path, mmap_mode="r", allow_pickle=False)
        with np.load(_notes(path), allow_pickle=False) as stored:
            labels = stored["labels"]
            bad = {int(sample): str(cause) for sample, cause in json.loads(str(stored["bad"])).items()}
        if pixels.shape != shape or pixels.dtype != np.uint8 or labels.shape not in ((0,), shape[:1]):
            return None
        os.utime(path)
        os.utime(_notes(path))
    except FileNotFoundError:
        return None
    except Exception as error:  # a damaged file raises anything; it is made again
        log.warning("decoded pictures %s are damaged (%s); they are made again", path, error)
        return None
    return Decoded(pixels.view(np.ndarray), labels if len(labels) else None, bad)
