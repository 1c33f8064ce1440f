"""Bytes out of an object store or web server, whatever happens on the way.

A body that was cut is continued where it stopped; what brings nothing is tried again with growing pauses, for a bounded
time; what no further attempt can change fails at once, in one line that names the file, the cause and the remedy.
"""

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import obstore
from obstore.exceptions import BaseError, NotSupportedError
from obstore.store import from_url

from vaegan_dist.data.refusals import failure, refusal
from vaegan_dist.data.urls import checked_url, client_options
from vaegan_dist.errors import DataError, InputError, VaeganError

ATTEMPTS = 6
PROGRESS_BYTES = 64 * 2**10
FIRST_PAUSE, LONGEST_PAUSE = 0.2, 10.0


class Transfer:
    """The files below a URL.

    Args:
        url: a folder: s3:// gs:// az:// https://
        timeout: seconds in which one request must be answered whole; what came until then is kept.
        attempts: requests in a row that may bring nothing before a file is given up.

    Raises:
        InputError: not a usable URL.
    """

    def __init__(self, url: str, *, timeout: float = 30.0, attempts: int = ATTEMPTS) -> None:
        parts = checked_url(url)
        self.url, self._attempts = url.rstrip("/"), attempts
        try:
            self._store: Any = from_url(self.url, **client_options(parts.scheme, timeout))
        except BaseError as error:
            raise refusal(self.url, error) or InputError(f"{self.url}: not a usable URL; check it") from None

    def small(self, name: str, limit: int) -> bytes | None:
        """A small file's bytes; None where there is none. Raises InputError where it has more than `limit`."""

        def step(can_resume: bool) -> bytes | None:
            try:
                reply = obstore.get(self._store, name)
            except FileNotFoundError:
                return None
            if reply.meta["size"] > limit:
                raise InputError(f"{self.url}/{name}: {reply.meta['size']} bytes, so not what it is called; check it")
            return bytes(reply.bytes())

        found: bytes | None = self._persist(name, step, lambda: 0)
        return found

    def size(self, name: str, what: str) -> int:
        """Bytes of a file as the server states them; `what` is what error lines call it."""
        found: int = self._persist(what, lambda _: obstore.head(self._store, name)["size"], lambda: 0)
        return found

    def exists(self, name: str) -> bool:
        """Whether there is such a file."""

        def step(can_resume: bool) -> bool:
            try:
                obstore.head(self._store, name)
            except FileNotFoundError:
                return False
            return True

        found: bool = self._persist(name, step, lambda: 0)
        return found

    def names(self) -> list[str]:
        """Names of all files.

        Raises:
            InputError: no access, or a server that gives no list.
        """

        def step(can_resume: bool) -> list[str]:
            return [str(entry["path"]) for chunk in obstore.list(self._store) for entry in chunk]

        if self.url.startswith(("http://", "https://")):
            raise InputError(f"{self.url}: a web server gives no list; name the shards: shard-{{000000..000146}}.tar")
        found: list[str] = self._persist("the list of files", step, lambda: 0)
        return found

    def put(self, name: str, content: bytes) -> None:
        """Write a small file. Raises InputError where that is not allowed."""
        try:
            obstore.put(self._store, name, content)
        except (BaseError, FileNotFoundError, NotImplementedError) as error:
            raise InputError(
                f"{self.url}/{name}: cannot be written ({failure(error)}); use --folder to write it on this machine, "
                "and upload it"
            ) from None

    def fill(self, name: str, what: str, part: Path, size: int) -> None:
        """Append to a file on this machine until it is as long as the one behind the URL, and synced.

        Args:
            name: of the file below the URL.
            what: it is called in error lines.
            part: what an earlier attempt left there is continued.
            size: bytes that it must have.

        Raises:
            InputError: it is not there, or no access.
            DataError: it has another size, or cannot be had.
            OSError: this machine's disk.
        """

        def step(can_resume: bool) -> None:
            with part.open("ab" if can_resume else "wb") as file:
                start = file.tell()
                if start > size:
                    file.truncate(0)
                    start = 0
                if start == size:
                    return
                reply = obstore.get(self._store, name, options={"range": {"offset": start}} if start else None)
                if reply.meta["size"] != size:
                    raise DataError(
                        f"{what}: has {reply.meta['size']} bytes at {self.url}, dataset.json says {size}; upload the "
                        "data set again"
                    )
                for block in reply.stream(min_chunk_size=PROGRESS_BYTES):
                    file.write(block)
                file.flush()
                os.fsync(file.fileno())  # a file under its final name is taken as whole after a power cut

        self._persist(what, step, lambda: part.stat().st_size if part.exists() else 0)

    def _persist(
        self, what: str, step: Callable[[bool], Any], done: Callable[[], int], verb: str = "fetched from"
    ) -> Any:
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
                refused = refusal(f"{what} at {self.url}", error)
                if refused is not None:
                    raise refused from None
                cause = failure(error)
            if done() >= before + PROGRESS_BYTES:
                failures, pause, before = 0, FIRST_PAUSE, done()
            else:
                failures += 1
            if failures >= self._attempts:
                raise DataError(
                    f"{what}: cannot be {verb} {self.url} after {failures} attempts ({cause}); check the "
                    "network and run the same command again"
                ) from None
            time.sleep(pause)
            pause = min(2 * pause, LONGEST_PAUSE)
