"""Where the lines of a ledger are kept: a file that is appended to, or an object of a store for each line.

Either way a line that `append` returned from stands, and one that a crash interrupted is whole or absent.
"""

import io
import json
import os
import secrets
import time
from contextlib import suppress
from pathlib import Path
from typing import Protocol

from vaegan_dist.data.objects import Objects
from vaegan_dist.errors import InputError
from vaegan_dist.training.remote import RemoteRun, SupersededError

FILE = "trials.jsonl"
LINES = "ledger"
LINE_BYTES = 16 * 2**20
PATIENCE = 16
"""attempts, for about two minutes: what a checkpoint bears (checkpoint.write_attempts) must not end trial or sweep"""
OPENED = "opened"
"""event of the line with which a process takes the lines of a store over"""


class Journal(Protocol):
    """Lines in their order. One process writes them."""

    def name(self, number: int) -> str:
        """What error lines call a line; the first one has number 0."""

    def read(self) -> list[bytes]:
        """Every line that is not read yet."""

    def begin(self) -> list[bytes]:
        """Write from now on; the lines that came meanwhile."""

    def append(self, line: bytes) -> None:
        """Add a line, and return when it stands."""

    def check_owner(self) -> None:
        """Raises SupersededError when another process writes the lines by now."""

    def close(self) -> None:
        """Let go of files."""


class FileJournal:
    """Lines of a file. Raises OSError where it cannot be read or written."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file: io.FileIO | None = None

    def name(self, number: int) -> str:
        """The file and the line, counted from 1."""
        return f"{self.path} line {number + 1}"

    def read(self) -> list[bytes]:
        """Every line, but for a last one that a crash cut short, and was never acted upon, or that is being written."""
        return self.path.read_bytes().split(b"\n")[:-1] if self.path.exists() else []

    def begin(self) -> list[bytes]:
        """The lock on the sweep's folder keeps others away."""
        return []

    def append(self, line: bytes) -> None:
        """Write and sync. After a failure the file is let go of; what stands of the line is cut off by the next one."""
        if self._file is None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._cut_off_rest()
            # Without a buffer: closing must not write a line that has been said not to stand.
            self._file = io.FileIO(self.path, "a")
        try:
            rest = line + b"\n"
            while rest:
                rest = rest[self._file.write(rest) :]
            os.fsync(self._file.fileno())
        except OSError:
            with suppress(OSError):  # some file systems say it again here
                self.close()
            self._file = None
            raise

    def _cut_off_rest(self) -> None:
        """End the file with its last whole line. To those who only look, a line under way would seem to be torn."""
        if self.path.is_file():
            os.truncate(self.path, self.path.read_bytes().rfind(b"\n") + 1)

    def check_owner(self) -> None:
        """The lock on the sweep's folder keeps others away."""

    def close(self) -> None:
        """Let go of the file."""
        if self._file is not None:
            self._file.close()
            self._file = None


class StoreJournal:
    """Objects `ledger/00000000.json`, … of a sweep in a store.

    A line's object is created and never overwritten, and its name follows from the number of lines before it. So of two
    processes only one can add the next line; the other one learns that the sweep has been taken over.

    Raises, all methods:
        InputError: no access, or what is there is no ledger.
        DataError: the store does not answer after all attempts.
    """

    def __init__(self, remote: RemoteRun) -> None:
        self.url, self.objects = remote.url, Objects(remote.url, attempts=PATIENCE)
        self._count = 0

    def name(self, number: int) -> str:
        """The URL of the line's object."""
        return f"{self.url}/{_object(number)}"

    def read(self) -> list[bytes]:
        """Every line that is not read yet."""
        found = sorted(self.objects.sizes(LINES))
        for number, name in enumerate(found):
            if name != _object(number):
                raise InputError(f"{self.name(number)} is missing; restore it, or choose another --name")
        new = self.objects.many(found[self._count :], LINE_BYTES)
        self._count = len(found)
        return [content.rstrip(b"\n") for content in new]

    def begin(self) -> list[bytes]:
        """Take the sweep over: whoever wrote it before learns of it at the next line, and ends."""
        self._refuse_overwriting()
        news: list[bytes] = []
        line = json.dumps({"event": OPENED, "by": secrets.token_hex(8), "time": round(time.time(), 3)}).encode()
        while not self._create(line):
            news += self.read()
        return news

    def append(self, line: bytes) -> None:
        """Create the next object. Raises SupersededError where another process has."""
        if not self._create(line):
            raise self._superseded()

    def check_owner(self) -> None:
        """Whoever takes the sweep over adds a line."""
        if self.objects.small(_object(self._count), LINE_BYTES) is not None:
            raise self._superseded()

    def _superseded(self) -> SupersededError:
        return SupersededError(f"{self.url}: another command has taken this sweep over; this one ends")

    def close(self) -> None:
        """Nothing is open."""

    def _create(self, line: bytes) -> bool:
        created = self.objects.create(_object(self._count), line + b"\n")
        self._count += created
        return created

    def _refuse_overwriting(self) -> None:
        """A store that ignores the condition would let two commands write over each other's lines."""
        probe = f"{LINES}.probe-{secrets.token_hex(8)}"
        self.objects.write(probe, b"first")
        ignored = self.objects.create(probe, b"second")
        self.objects.delete([probe])
        if ignored:
            raise InputError(
                f"run.storage: {self.url} overwrites an object that was only to be created (If-None-Match), so "
                f"two commands could spoil a sweep's ledger; use a store that knows it, or a folder"
            )


def _object(number: int) -> str:
    return f"{LINES}/{number:08d}.json"


def journal_of(folder: Path, remote: RemoteRun | None) -> Journal:
    """The lines of a sweep: in the store behind `remote`, or in its folder."""
    return FileJournal(folder / FILE) if remote is None else StoreJournal(remote)
