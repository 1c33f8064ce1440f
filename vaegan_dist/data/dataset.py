"""A map-style Dataset over WebDataset shards: whole batches by sample id, decoded into one uint8 buffer.

A sample's id is its place in the manifest: shards in order, pictures in the order of the archive. A bad sample (a
picture that cannot be used, a label that is missing) ends the run, or, within `max_bad_samples`, is replaced by the
next good one of its shard: the same one on every rank, in every epoch, after every restart.
"""

import logging
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import torch

from vaegan_dist.data.batch import Batch, Ids
from vaegan_dist.data.decode import Pixels, decode_into, read_encoded
from vaegan_dist.data.images import PictureError
from vaegan_dist.data.index import BAD_LABEL, LOST, NO_LABEL, PICTURE_KINDS, RAW, Entry, ShardIndex
from vaegan_dist.data.manifest import Manifest, ShardInfo, find_manifest, read_manifest
from vaegan_dist.data.memory import Decoded, load_decoded
from vaegan_dist.data.shards import Shards
from vaegan_dist.data.tar import ShardFile
from vaegan_dist.data.urls import CACHE_BYTES, is_remote, local_path
from vaegan_dist.errors import DataError, InputError

if TYPE_CHECKING:
    from vaegan_dist.data.store import RemoteShards

log = logging.getLogger(__name__)

IN_MEMORY_BYTES = 512 * 2**20
"""Decoded size below which a data set is kept in memory unless `in_memory` says otherwise"""

SHARDS_AHEAD = 8
"""Shards that are fetched ahead where samples are read in their own order"""


class ShardDataset(torch.utils.data.Dataset[Batch]):
    """Random access to the pictures of a manifest's shards. Make it with `open_dataset`."""

    def __init__(
        self,
        source: "Path | RemoteShards",
        manifest: Manifest,
        *,
        in_memory: bool | None,
        max_bad_samples: int,
        counted_elsewhere: bool = False,
    ) -> None:
        self.source, self.manifest = source, manifest
        self.max_bad_samples, self.counted_elsewhere = max_bad_samples, counted_elsewhere
        self.shard_samples = tuple(shard.samples for shard in manifest.shards)
        self._ends = np.cumsum(np.array(self.shard_samples, np.int64))
        self._shards = Shards(source, manifest, tolerant=max_bad_samples > 0)
        self._bad: dict[int, str] = {}
        self._awaited: list[ShardInfo] = []
        self._decoded: Decoded | None = None
        size = manifest.samples * math.prod(self.picture_shape)
        if size < IN_MEMORY_BYTES if in_memory is None else in_memory:
            self._decoded = load_decoded(self, manifest, self._shards.modified)
            self.note_bad_samples(self._decoded.bad)

    def __len__(self) -> int:
        return self.manifest.samples

    def __getitem__(self, index: int) -> Batch:
        return self.read([index])

    def __getitems__(self, ids: Ids) -> Batch:
        """A whole batch at once: what a DataLoader with a batch sampler asks for."""
        return self.read(ids)

    @property
    def picture_shape(self) -> tuple[int, int, int]:
        """Height, width, channels of every picture."""
        return self.manifest.height, self.manifest.width, self.manifest.channels

    @property
    def in_memory(self) -> bool:
        """Whether the decoded pictures are held in memory."""
        return self._decoded is not None

    @property
    def bad_samples(self) -> Mapping[int, str]:
        """Samples that were replaced, by id, each with shard, member, offset and cause."""
        return dict(self._bad)

    @property
    def ignored(self) -> Mapping[str, int]:
        """Members that were passed over by rule in the shards opened so far, counted by what they were."""
        return self._shards.ignored()

    def note_bad_samples(self, found: Mapping[int, str]) -> None:
        """Count bad samples that this object, another process or another rank has found.

        Raises:
            DataError: they are more than `max_bad_samples`, each counted once.
        """
        for sample, cause in found.items():
            if sample in self._bad:
                continue
            allowed = len(self) if self.counted_elsewhere and self.max_bad_samples else self.max_bad_samples
            if len(self._bad) >= allowed:
                raise DataError(self._over_budget(cause))
            self._bad[sample] = cause
            if not self.counted_elsewhere:
                log.warning("bad sample %d of %d allowed, replaced: %s", len(self._bad), allowed, cause)

    def after_fork(self) -> None:
        """Make a forked copy usable, whatever another thread of the parent was doing at that moment."""
        self._shards.after_fork()

    @property
    def remote(self) -> bool:
        """Whether reading fetches shards from elsewhere."""
        return self._decoded is None and self._shards.remote is not None

    @property
    def cache_counts(self) -> tuple[int, int, int]:
        """Shards found in the node's cache, shards fetched, bytes fetched: by this process, so far."""
        if self._shards.remote is None:
            return 0, 0, 0
        counts = self._shards.remote.counts
        return counts.hits, counts.misses, counts.fetched_bytes

    def prefetch(self, shards: Iterable[int]) -> None:
        """Begin to fetch these shards, soonest needed first, as many as fit; nothing to do for a local data set."""
        if self.remote:
            self._shards.prefetch(shards)

    def prefetch_from(self, sample: int, end: int) -> None:
        """Begin to fetch the shards of this sample and of those after it, up to sample `end`."""
        if self.remote:
            first, last = np.searchsorted(self._ends, (sample, end - 1), side="right").tolist()
            self.prefetch(range(first, min(first + SHARDS_AHEAD, last + 1)))

    def stop_prefetch(self) -> None:
        """Forget what was to be fetched and has not begun."""
        if self._shards.remote is not None:
            self._shards.remote.cancel()

    def share_cache(self, ranks: int, shards: Sequence[int]) -> None:
        """Share the cache among so many ranks; say so if `shards`, read first, do not fit one's part together."""
        if self._shards.remote is None:
            return
        self._shards.remote.ranks = ranks
        self._awaited = self._shards.fitting(shards)
        needed, share = sum(self.manifest.shards[number].bytes for number in set(shards)), self._shards.remote.share
        if needed > share:
            log.warning(
                "%d shards of %d bytes are read at the same time, this process's share of the cache holds %d: shards "
                "will be fetched again and again; make data.cache_bytes larger, or data.streams or data.block_shards "
                "smaller",
                len(set(shards)),
                needed,
                share,
            )

    def fetching(self, seconds: float) -> bool:
        """Whether shards that the first batches need are still on their way, after waiting for so long at most.

        Raises:
            InputError, DataError: one of them cannot be had.
        """
        if self._shards.remote is not None:
            self._awaited = self._shards.remote.still_fetching(self._awaited, seconds)
        return bool(self._awaited)

    def fetch_for(self, ids: Ids) -> None:
        """Have the shards of these samples on this node, now."""
        self._shards.fetch(np.unique(np.searchsorted(self._ends, np.asarray(ids), side="right")).tolist())

    def close(self) -> None:
        """Fetch nothing any more."""
        if self._shards.remote is not None:
            self._shards.remote.close()

    def key(self, sample: int) -> str:
        """Key of a sample: its name in the archive up to the first dot.

        Raises:
            InputError: no such id.
            DataError: the shard cannot be read that far.
        """
        shard, place = self._place(sample)
        keys = self._shards.keys(shard)
        if place >= len(keys):
            raise DataError(self._cause(shard, place, "no key: the shard cannot be read that far"))
        return keys[place]

    def read(self, ids: Ids) -> Batch:
        """The samples with these ids, in this order.

        Raises:
            InputError: an id outside the data set.
            DataError: a bad sample over the budget, or a shard that cannot be read.
        """
        wanted = np.array(ids, np.int64)
        pixels = np.empty((len(wanted), *self.picture_shape), np.uint8)
        return Batch.of(pixels, wanted, self.read_into(wanted, pixels))

    def read_into(self, ids: npt.NDArray[np.int64], pixels: Pixels) -> npt.NDArray[np.int64] | None:
        """`read` into a buffer uint8 `[b, H, W, C]`; returns the labels, int64 `[b]`, or None without classes."""
        outside = ids[(ids < 0) | (ids >= len(self))]
        if outside.size:
            raise InputError(f"sample {outside[0]} of a data set of {len(self)}; ids begin at 0")
        if self._decoded is None:
            return self._read_rows(ids, pixels)
        # mode="clip" writes to `out` without a buffer between; the ids were checked
        np.take(self._decoded.pixels, ids, axis=0, out=pixels, mode="clip")
        return None if self._decoded.labels is None else self._decoded.labels[ids]

    def _read_rows(self, wanted: npt.NDArray[np.int64], pixels: Pixels) -> npt.NDArray[np.int64] | None:
        """Decode samples into rows of a buffer; returns their labels."""
        shards = np.searchsorted(self._ends, wanted, side="right")
        places = wanted - self._ends[shards] + np.array(self.shard_samples, np.int64)[shards]
        labels = np.empty(len(wanted), np.int64)
        for shard in np.unique(shards).tolist():
            rows = np.flatnonzero(shards == shard)
            for row, label in self._read_shard(shard, rows.tolist(), places[rows], pixels):
                labels[row] = label
        return labels if self.manifest.classes is not None else None

    def _read_shard(
        self, shard: int, rows: list[int], places: npt.NDArray[np.int64], pixels: Pixels
    ) -> Iterator[tuple[int, int]]:
        """Decode the rows whose samples are of one shard, what they share looked up once; yields rows and labels."""
        index, file = self._shards.index(shard), self._shards.file(shard)
        for row, place, entry in zip(rows, places.tolist(), index.entries(places), strict=True):
            try:
                yield row, self._read_one(index, file, entry, pixels[row])
            except PictureError as bad:
                yield row, self._substitute(shard, place, pixels[row], str(bad))

    def _read_one(self, index: ShardIndex, file: ShardFile, entry: Entry, row: Pixels) -> int:
        """Decode one sample; returns its label (0 without classes). Raises PictureError."""
        kind, offset, size, label = entry
        if kind == LOST:
            raise PictureError(f"lost: {index.fault}")
        label = self._label(label)
        if kind == RAW:
            file.read_into(row.data.cast("B"), offset)
        else:
            decode_into(read_encoded(file, offset, size), kind, row)
        return label

    def _label(self, label: int) -> int:
        classes = self.manifest.classes
        if classes is None:
            return 0
        if 0 <= label < len(classes):
            return label
        known = {NO_LABEL: "no .cls label", BAD_LABEL: "its label is no integer of 0 or more"}
        raise PictureError(known.get(label, f"label {label} in a data set of {len(classes)} classes"))

    def _substitute(self, shard: int, place: int, row: Pixels, cause: str) -> int:
        """Fill a bad sample's row with the next good sample of its shard; returns that one's label."""
        first = int(self._ends[shard]) - self.shard_samples[shard]
        self.note_bad_samples({first + place: self._cause(shard, place, cause)})
        index, file = self._shards.index(shard), self._shards.file(shard)
        for other in self._others(shard, place):
            try:
                return self._read_one(index, file, next(index.entries(np.array([other]))), row)
            except PictureError as bad:
                self.note_bad_samples({first + other: self._cause(shard, other, str(bad))})
        raise DataError(
            f"shard {self.manifest.shards[shard].name}: not one good sample; restore it or prepare it again"
        )

    def _others(self, shard: int, place: int) -> Iterator[int]:
        count = self.shard_samples[shard]
        return ((place + step) % count for step in range(1, count))

    def _place(self, sample: int) -> tuple[int, int]:
        if not 0 <= sample < len(self):
            raise InputError(f"sample {sample} of a data set of {len(self)}; ids begin at 0")
        shard = int(np.searchsorted(self._ends, sample, side="right"))
        return shard, sample - int(self._ends[shard]) + self.shard_samples[shard]

    def _cause(self, shard: int, place: int, cause: str) -> str:
        """Shard, member, offset and cause of a bad sample, in one line."""
        index, name = self._shards.index(shard), self.manifest.shards[shard].name
        kind = int(index.kind[place])
        if kind == LOST:
            return f"shard {name}: sample {place}: {cause}"
        key = self._shards.keys(shard)[place]
        member = f"{key}.{PICTURE_KINDS[kind]}" if kind < RAW else key
        return f"shard {name}: member {member!r} at byte {int(index.offset[place])}: {cause}"

    def _over_budget(self, cause: str) -> str:
        remedy = "restore the shard, or set data.max_bad_samples to how many may be replaced"
        if not self.max_bad_samples:
            return f"{cause}; {remedy}"
        return f"{cause}; more bad samples than data.max_bad_samples={self.max_bad_samples} allows; {remedy}"


def open_dataset(
    path: str,
    split: str = "train",
    *,
    in_memory: bool | None = None,
    max_bad_samples: int = 0,
    counted_elsewhere: bool = False,
    cache_dir: str | None = None,
    cache_bytes: int = CACHE_BYTES,
) -> ShardDataset:
    """Open a prepared data set.

    Args:
        path: its folder, or a dataset.json; or the URL of a folder: s3:// gs:// az:// https:// file://
        split: train, validation, …
        in_memory: hold the decoded pictures in memory, shared by the node's processes; None: if below 512 MiB.
        max_bad_samples: bad samples that may be replaced; with more the run ends.
        counted_elsewhere: replace bad samples without counting (unless none is allowed): `BadSamples` counts those of
            all ranks together.
        cache_dir: folder for fetched shards; default: `shards` in this user's cache folder.
        cache_bytes: most bytes of fetched shards that are kept.

    Raises:
        InputError: no data set, no access, or a shard is missing.
        DataError: a shard is not what the manifest says, or (in memory) has more bad samples than may be replaced.
    """
    made = partial(
        ShardDataset, in_memory=in_memory, max_bad_samples=max_bad_samples, counted_elsewhere=counted_elsewhere
    )
    if is_remote(path):
        from vaegan_dist.data.store import RemoteShards  # the object stores' client: only who needs it loads it

        cache = None if cache_dir is None else Path(cache_dir).expanduser()
        remote = RemoteShards(path, split, cache=cache, cache_bytes=cache_bytes)
        return made(remote, remote.manifest)
    place = find_manifest(local_path(path), split)
    return made(place.parent, read_manifest(place))
