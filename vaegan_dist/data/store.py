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
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import obstore
from obstore.exceptions import BaseError, NotSupportedError
from obstore.store import from_url

from vaegan_dist.data.cache import CACHE_VARIABLE, NotFetchedError, cache_folder, locked
from vaegan_dist.data.manifest import (
    MANIFEST_NAME,
    MAX_MANIFEST_BYTES,
    Manifest,
    ShardInfo,
    file_sha256,
    parse_manifest,
)
from vaegan_dist.data.refusals import failure, refusal
from vaegan_dist.data.urls import CACHE_BYTES, checked_url, client_options
from vaegan_dist.errors import DataError, InputError, VaeganError

FETCHERS = 4
ATTEMPTS = 6
PROGRESS_BYTES = 64 * 2**10
FIRST_PAUSE, LONGEST_PAUSE = 0.2, 10.0

_PART = re.compile(r"^[0-9a-f]{64}\.(\d+)\.part$")


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
        parts = checked_url(url)
        self._url, self._attempts, self._budget = url.rstrip("/"), attempts, cache_bytes
        self.ranks = 1
        folder = cache or cache_folder("shards")
        if folder is None:
            raise InputError(
                f"{self._url}: no folder for the cache can be made; set {CACHE_VARIABLE} to a writable one"
            )
        self._cache = folder
        self._cache.mkdir(parents=True, exist_ok=True)
        try:
            self._store: Any = from_url(self._url, **client_options(parts.scheme, timeout))
        except BaseError as error:
            raise refusal(self._url, error) or InputError(f"{self._url}: not a usable URL; check it") from None
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

    def cancel(self) -> None:
        """Forget what has not begun."""
        with self._lock:
            for name in [name for name, future in self._running.items() if future.cancel()]:
                del self._running[name]

    def size(self, shard: ShardInfo) -> int:
        """Bytes of a shard as the server states them."""
        name = f"{self._prefix}{shard.name}"
        found: int = self._persist(f"shard {shard.name}", lambda _: obstore.head(self._store, name)["size"], lambda: 0)
        return found

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
            self._fill(shard, part)
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

    def _fill(self, shard: ShardInfo, part: Path) -> None:
        """Append to a part until it is as long as the shard."""
        name = f"{self._prefix}{shard.name}"

        def step(can_resume: bool) -> int:
            with part.open("ab" if can_resume else "wb") as file:
                start = file.tell()
                if start > shard.bytes:
                    file.truncate(0)
                    start = 0
                if start == shard.bytes:
                    return -1
                reply = obstore.get(self._store, name, options={"range": {"offset": start}} if start else None)
                if reply.meta["size"] != shard.bytes:
                    raise DataError(
                        f"shard {shard.name}: has {reply.meta['size']} bytes at {self._url}, dataset.json says "
                        f"{shard.bytes}; upload the data set again"
                    )
                for block in reply.stream(min_chunk_size=PROGRESS_BYTES):
                    file.write(block)
                file.flush()
                os.fsync(file.fileno())  # a file under its final name is taken as whole after a power cut
                return -1

        self._persist(f"shard {shard.name}", step, lambda: part.stat().st_size if part.exists() else 0)

    def _persist(self, what: str, step: Callable[[bool], Any], done: Callable[[], int]) -> Any:
        """Try a step until it succeeds; gives up after so many attempts in a row that brought nothing."""
        failures, can_resume, pause, before = 0, True, FIRST_PAUSE, done()
        while True:
            try:
                return step(can_resume)
            except VaeganError:
                raise
            except NotSupportedError:
                can_resume = False  # a server without ranges: from the start, in one go
                cause = "the server cannot continue a download"
            except (BaseError, FileNotFoundError) as error:
                if isinstance(error, OSError) and error.errno is not None:
                    raise  # of this node's disk; the store's own has no number
                refused = refusal(f"{what} at {self._url}", error)
                if refused is not None:
                    raise refused from None
                cause = failure(error)
            if done() >= before + PROGRESS_BYTES:
                failures, pause, before = 0, FIRST_PAUSE, done()
            else:
                failures += 1
            if failures >= self._attempts:
                raise DataError(
                    f"{what}: cannot be fetched from {self._url} after {failures} attempts ({cause}); check the "
                    "network and run the same command again"
                ) from None
            time.sleep(pause)
            pause = min(2 * pause, LONGEST_PAUSE)

    def _find_manifest(self, split: str) -> Manifest:
        """SPLIT/dataset.json or dataset.json; its folder is where the shards lie."""
        for prefix in (f"{split}/", ""):
            text = self._small(f"{prefix}{MANIFEST_NAME}")
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

    def _small(self, name: str) -> bytes | None:
        """A small file's bytes; None where there is none."""

        def step(can_resume: bool) -> bytes | None:
            try:
                reply = obstore.get(self._store, name)
            except FileNotFoundError:
                return None
            if reply.meta["size"] > MAX_MANIFEST_BYTES:
                raise InputError(
                    f"{self._url}/{name}: {reply.meta['size']} bytes, so not a dataset.json; check the URL"
                )
            return bytes(reply.bytes())

        found: bytes | None = self._persist(name, step, lambda: 0)
        return found

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
