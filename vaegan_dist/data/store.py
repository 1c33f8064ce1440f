"""Shards on object stores and web servers: fetched whole, ahead of need, into a bounded cache on this node.

The cache is keyed by content: a shard's file is called by its sha256, so that equal names of two data sets never meet,
the node's ranks share one copy, and what survived a restart is used again. A file there is whole and was checked.
Credentials come from the environment alone (AWS_*, GOOGLE_*, AZURE_*); what a server answers is never repeated in a
message, because it may quote them.
"""

import contextlib
import fcntl
import hashlib
import os
import re
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import obstore
from obstore.exceptions import (
    BaseError,
    NotSupportedError,
    PermissionDeniedError,
    UnauthenticatedError,
)
from obstore.store import from_url

from vaegan_dist.data.cache import CACHE_VARIABLE, cache_folder, locked
from vaegan_dist.data.manifest import MANIFEST_NAME, MAX_MANIFEST_BYTES, Manifest, ShardInfo, parse_manifest
from vaegan_dist.errors import DataError, InputError, VaeganError

SCHEMES = ("s3", "gs", "az", "abfs", "abfss", "https", "http", "file")
CACHE_BYTES = 64 * 2**30
FETCHERS = 4
ATTEMPTS = 6
PROGRESS_BYTES = 64 * 2**10
FIRST_PAUSE, LONGEST_PAUSE = 0.2, 10.0

_PART = re.compile(r"^[0-9a-f]{64}\.(\d+)\.part$")
# Without credentials the SDKs ask the machine's metadata service, whose refusal names none.
_CREDENTIALS = re.compile(r"latest/(api/token|meta-data)|computeMetadata|oauth2/token|Missing(Account|Credential)")
_STATUS = re.compile(r"status code: (\d{3})")


def is_remote(path: str) -> bool:
    """Whether a data set's path is a URL that `RemoteShards` reads."""
    return path.partition("://")[0].lower() in SCHEMES and "://" in path


class RemoteShards:
    """The shards of a data set behind a URL, as local files.

    Args:
        url: folder that holds dataset.json or SPLIT/dataset.json: s3:// gs:// az:// https:// file://
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
        timeout: float = 60.0,
        attempts: int = ATTEMPTS,
    ) -> None:
        parts = _checked_url(url)
        self._url, self._attempts, self._budget = url.rstrip("/"), attempts, cache_bytes
        self._local = Path(unquote(parts.path)) if parts.scheme == "file" else None
        folder = cache or cache_folder("shards")
        if folder is None:
            raise InputError(
                f"{self._url}: no folder for the cache can be made; set {CACHE_VARIABLE} to a writable one"
            )
        self._cache = folder
        self._cache.mkdir(parents=True, exist_ok=True)
        try:
            self._store: Any = None if self._local else from_url(self._url, **_options(parts.scheme, timeout))
        except BaseError as error:
            raise _refused(self._url, error) or InputError(f"{self._url}: not a usable URL; check it") from None
        self._lock = threading.Lock()
        self._running: dict[str, Future[Path]] = {}
        self._pool = ThreadPoolExecutor(FETCHERS, "fetch")
        self._prefix = ""
        self.manifest = self._find_manifest(split)

    def fetch(self, shard: ShardInfo) -> Path:
        """A shard as a local file, whole and checked. Ask again after a pause in use: it may have been evicted."""
        if self._local is not None:
            return self._local / self._prefix / shard.name
        path = self._path(shard)
        return path if _touch(path, shard.bytes) else self._submit(shard).result()

    def prefetch(self, shards: Iterable[ShardInfo]) -> None:
        """Begin to fetch shards that are needed next, in this order. An error shows when the shard is asked for."""
        for shard in shards:
            if self._local is None and not _touch(self._path(shard), shard.bytes):
                self._submit(shard)

    def close(self) -> None:
        """Stop fetching what has not begun."""
        self._pool.shutdown(wait=True, cancel_futures=True)

    def _path(self, shard: ShardInfo) -> Path:
        return self._cache / f"{shard.sha256}.tar"

    def _submit(self, shard: ShardInfo) -> "Future[Path]":
        with self._lock:
            future = self._running.get(shard.sha256)
            if future is None:
                future = self._running[shard.sha256] = self._pool.submit(self._bring, shard)
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
            with part.open("rb") as file:
                if hashlib.file_digest(file, "sha256").hexdigest() == shard.sha256:
                    os.fsync(file.fileno())
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
                refused = _refused(f"{what} at {self._url}", error)
                if refused is not None:
                    raise refused from None
                cause = _cause(error)
            if done() >= before + PROGRESS_BYTES:
                failures, pause, before = 0, FIRST_PAUSE, done()
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
        if self._local is not None:
            path = self._local / name
            return path.read_bytes() if path.is_file() else None

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
        if largest.bytes > self._budget and self._local is None:
            raise InputError(
                f"shard {largest.name}: {largest.bytes} bytes do not fit the cache of {self._budget}; make it "
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


def _checked_url(url: str) -> Any:
    """The parts of a URL that holds no secret."""
    parts = urlsplit(url)
    if parts.scheme not in SCHEMES:
        raise InputError(f"{parts.scheme}://…: not a known kind of URL; use one of {', '.join(SCHEMES)}")
    if "@" in parts.netloc.removesuffix(".dfs.core.windows.net") and not parts.scheme.startswith("abfs"):
        raise InputError(f"{parts.scheme}://…: the URL holds a user or password; leave credentials to the environment")
    if parts.query or parts.fragment:
        raise InputError(
            f"{parts.scheme}://{parts.netloc}{parts.path}: the URL has a query; leave keys to the environment"
        )
    return parts


def _options(scheme: str, timeout: float) -> dict[str, Any]:
    """Client options. obstore itself does not retry: it would start a cut body over, here it is continued."""
    endpoints = (value for name, value in os.environ.items() if name.startswith("AWS_ENDPOINT"))
    plain = scheme == "http" or any(value.startswith("http://") for value in endpoints)
    limit = timedelta(seconds=timeout)
    client = {"timeout": limit, "connect_timeout": min(limit, timedelta(seconds=10)), "allow_http": plain}
    return {"client_options": client, "retry_config": {"max_retries": 0, "retry_timeout": limit}}


def _refused(what: str, error: Exception) -> InputError | None:
    """The error line for what no further attempt can change."""
    if isinstance(error, FileNotFoundError):
        return InputError(f"{what}: is not there (404); check the URL, and that the whole data set was uploaded")
    if isinstance(error, PermissionDeniedError):
        return InputError(f"{what}: access denied (403); check that the credentials may read it")
    if isinstance(error, UnauthenticatedError):
        return InputError(f"{what}: credentials missing or wrong (401); set the cloud SDK's variables")
    if _CREDENTIALS.search(str(error)):
        return InputError(
            f"{what}: no credentials found; set the cloud SDK's variables (AWS_ACCESS_KEY_ID …, "
            "GOOGLE_SERVICE_ACCOUNT, AZURE_STORAGE_ACCOUNT_KEY), or AWS_SKIP_SIGNATURE=true for a public bucket"
        )
    status = _STATUS.search(str(error))
    if status is not None and status[1].startswith("4") and status[1] not in ("408", "429"):
        return InputError(f"{what}: the server refuses it ({status[1]}); check the URL, the region and the credentials")
    return None


def _cause(error: Exception) -> str:
    """Why an attempt failed, in our own words."""
    text = str(error)
    if status := _STATUS.search(text):
        return f"the server answers {status[1]}"
    if "Timeout" in text or "timed out" in text:
        return "no answer in time"
    if "dns" in text.lower():
        return "its host name cannot be resolved"
    if "Connect" in text:
        return "no connection"
    if "Interrupted" in text or "Body" in text:
        return "the connection broke off"
    return type(error).__name__
