"""Shards on object stores and web servers: fetched whole, ahead of need, into a bounded cache on this node.

The cache is keyed by content: a shard's file is called by its sha256, so that equal names of two data sets never meet,
the node's ranks share one copy, and what survived a restart is used again. A file there is whole and was checked.
One instance belongs to the process that made it.
"""

import contextlib
import fcntl
import os
import re
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path

from vaegan_dist.data.cache import CACHE_VARIABLE, NotFetchedError, cache_folder, locked
from vaegan_dist.data.manifest import MANIFEST_NAME, MAX_MANIFEST_BYTES, Manifest, ShardInfo, parse_manifest
from vaegan_dist.data.transfer import ATTEMPTS, Transfer
from vaegan_dist.data.urls import CACHE_BYTES
from vaegan_dist.errors import DataError, InputError
from vaegan_dist.files import file_sha256

FETCHERS = 4

_PART = re.compile(r"^[0-9a-f]{64}\.(\d+)\.part$")


@dataclass
class CacheCounts:
    """What the cache has been asked for by this process."""

    hits: int = 0
    """shards that were here"""
    misses: int = 0
    """shards that this process fetched"""
    fetched_bytes: int = 0
    """bytes of those"""


class RemoteShards:
    """The shards of a data set behind a URL, as local files.

    Args:
        url: folder that holds dataset.json or SPLIT/dataset.json: s3:// gs:// az:// https://
        split: which split.
        cache: folder of the cache; default: `shards` in this user's cache folder.
        cache_bytes: most bytes that the cache keeps; downloads under way (at most four per process) come on top.
        timeout: seconds in which one request must be answered whole; what came until then is kept.
        attempts: requests in a row that may bring nothing before a fetch fails.

    Raises:
        InputError: wrong URL, no such data set, no access.
        DataError: the server cannot be reached, or its bytes are not those of the manifest.
    """

    def __init__(
        self,
        url: str,
        split: str = "train",
        *,
        cache: Path | None = None,
        cache_bytes: int = CACHE_BYTES,
        timeout: float = 30.0,
        attempts: int = ATTEMPTS,
    ) -> None:
        self._transfer = Transfer(url, timeout=timeout, attempts=attempts)
        self._url, self._budget = self._transfer.url, cache_bytes
        self.ranks = 1
        self.counts = CacheCounts()
        folder = cache or cache_folder("shards")
        if folder is None:
            raise InputError(
                f"{self._url}: no folder for the cache can be made; set {CACHE_VARIABLE} to a writable one"
            )
        self._cache = folder
        self._cache.mkdir(parents=True, exist_ok=True)
        self._lock = threading.Lock()
        self._running: dict[str, Future[Path]] = {}
        self._pool: ThreadPoolExecutor | None = ThreadPoolExecutor(FETCHERS, "fetch")
        self._prefix = ""
        self.manifest = self._find_manifest(split)

    @property
    def share(self) -> int:
        """Bytes of the cache that this process may fill: its part among the node's ranks."""
        return self._budget // self.ranks

    def fetch(self, shard: ShardInfo) -> Path:
        """A shard as a local file, whole and checked. Ask again after a pause in use: it may have been evicted."""
        path = self._path(shard)
        if _touch(path, shard.bytes):
            self.counts.hits += 1
            return path
        if self._pool is None:
            raise NotFetchedError(shard.name)
        return self._submit(self._pool, shard).result()

    def prefetch(self, shards: Iterable[ShardInfo]) -> None:
        """Begin to fetch shards that are needed next, in this order. An error shows when the shard is asked for."""
        # The last touched is the last to be evicted, so the soonest needed comes last.
        missing = [shard for shard in reversed(list(shards)) if not _touch(self._path(shard), shard.bytes)]
        for shard in reversed(missing):
            if self._pool is not None:
                self._submit(self._pool, shard)

    def still_fetching(self, shards: Sequence[ShardInfo], seconds: float) -> list[ShardInfo]:
        """Fetch shards for so long at most; which of them have not come. Raises what fetching one of them raises."""
        missing = [shard for shard in shards if not _touch(self._path(shard), shard.bytes)]
        if self._pool is None:
            return missing
        futures = {self._submit(self._pool, shard): shard for shard in missing}
        done, running = wait(futures, timeout=seconds)
        for future in done:
            future.result()
        return [futures[future] for future in running]

    def cancel(self) -> None:
        """Forget what has not begun."""
        with self._lock:
            for name in [name for name, future in self._running.items() if future.cancel()]:
                del self._running[name]

    def size(self, shard: ShardInfo) -> int:
        """Bytes of a shard as the server states them."""
        return self._transfer.size(self._prefix + shard.name, f"shard {shard.name}")

    def after_fork(self) -> None:
        """In a forked copy neither threads nor the client work: it reads what is in the cache."""
        self._lock, self._pool, self._running = threading.Lock(), None, {}

    def close(self) -> None:
        """Stop fetching what has not begun."""
        if self._pool is not None:
            self._pool.shutdown(wait=True, cancel_futures=True)

    def _path(self, shard: ShardInfo) -> Path:
        return self._cache / f"{shard.sha256}.tar"

    def _submit(self, pool: ThreadPoolExecutor, shard: ShardInfo) -> "Future[Path]":
        with self._lock:
            future = self._running.get(shard.sha256)
            if future is None:
                future = self._running[shard.sha256] = pool.submit(self._bring, shard)
            return future

    def _bring(self, shard: ShardInfo) -> Path:
        path = self._path(shard)
        try:
            with locked(path):
                if not _touch(path, shard.bytes):
                    self._download(shard, path)
                    with self._lock:
                        self.counts.misses += 1
                        self.counts.fetched_bytes += shard.bytes
                return path
        except OSError as error:
            raise DataError(
                f"shard {shard.name}: cannot be kept in {self._cache} ({error.strerror}); free space there, or set "
                f"{CACHE_VARIABLE} to another folder"
            ) from None
        finally:
            with self._lock:
                self._running.pop(shard.sha256, None)

    def _download(self, shard: ShardInfo, path: Path) -> None:
        """Fetch a shard into the cache; what an earlier attempt left is continued. The caller holds its lock."""
        part = path.with_name(f"{shard.sha256}.{shard.bytes}.part")
        self._make_room(shard, part)
        for again in (True, False):
            self._transfer.fill(self._prefix + shard.name, f"shard {shard.name}", part, shard.bytes)
            if file_sha256(part) == shard.sha256:
                with locked(self._cache / "room"):  # who counts the cache sees it under one of its names
                    part.replace(path)
                return
            part.unlink()  # the rest of another upload may have been continued: once more from the start
            if not again:
                raise DataError(
                    f"shard {shard.name}: the bytes at {self._url} are not those that dataset.json has the sha256 of; "
                    "upload the data set again"
                )

    def _find_manifest(self, split: str) -> Manifest:
        """SPLIT/dataset.json or dataset.json; its folder is where the shards lie."""
        for prefix in (f"{split}/", ""):
            text = self._transfer.small(f"{prefix}{MANIFEST_NAME}", MAX_MANIFEST_BYTES)
            if text is not None:
                self._prefix = prefix
                manifest = parse_manifest(text, f"{self._url}/{prefix}{MANIFEST_NAME}")
                if not prefix and split not in ("train", manifest.split):
                    raise InputError(f"{self._url}: holds the split '{manifest.split}', not '{split}'")
                self._check_budget(manifest)
                return manifest
        raise InputError(
            f"{self._url}: no prepared data set (looked for {split}/{MANIFEST_NAME} and {MANIFEST_NAME}); upload what "
            "`vaegan-dist prepare` made"
        )

    def _check_budget(self, manifest: Manifest) -> None:
        largest = max(manifest.shards, key=lambda shard: shard.bytes)
        if largest.bytes > self._budget:
            raise InputError(
                f"shard {largest.name}: {largest.bytes} bytes do not fit data.cache_bytes={self._budget}; make it "
                "larger, or prepare with smaller --shard-bytes"
            )

    def _make_room(self, shard: ShardInfo, part: Path) -> None:
        """Evict the files used longest ago until a shard fits the budget; reserves its place by creating `part`."""
        with locked(self._cache / "room"):
            files = [entry for entry in _entries(self._cache) if entry[2] != part]
            total = sum(size for _, size, _ in files) + shard.bytes
            for _, size, path in sorted(files):
                if total <= self._budget:
                    break
                if path.suffix == ".tar" or _abandoned(path):
                    path.unlink(missing_ok=True)  # a reader that has it open keeps its bytes
                    total -= size
            part.touch()


def _entries(cache: Path) -> Iterator[tuple[int, int, Path]]:
    """Time of last use, bytes (of a part: when whole) and path of every file in the cache."""
    for path in cache.iterdir():
        with contextlib.suppress(FileNotFoundError):
            status = path.stat()
            if path.suffix == ".tar":
                yield status.st_atime_ns, status.st_size, path
            elif match := _PART.match(path.name):
                yield status.st_mtime_ns, int(match[1]), path


def _abandoned(part: Path) -> bool:
    """Whether nobody is working on a part: its shard's lock is free."""
    lock = part.with_name(f"{part.name.partition('.')[0]}.tar.lock")
    try:
        descriptor = os.open(lock, os.O_RDWR | os.O_CLOEXEC)
    except FileNotFoundError:
        return True
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        fcntl.flock(descriptor, fcntl.LOCK_UN)  # not left to close: a forked process may hold the descriptor too
        return True
    except BlockingIOError:
        return False
    finally:
        os.close(descriptor)


def _touch(path: Path, size: int) -> bool:
    """Whether a cached shard is there; marks it as used now. Its time of change stays: readers watch that."""
    try:
        status = path.stat()
        if status.st_size != size:
            return False
        os.utime(path, ns=(time.time_ns(), status.st_mtime_ns))
    except FileNotFoundError:
        return False
    return True
