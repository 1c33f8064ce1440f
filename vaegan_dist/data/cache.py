"""What reading leaves behind to be faster the next time: small files in a folder of this user, keyed by content.

Everything here can be deleted at any time. A file is written beside its place and renamed, so that it is whole or
absent; readers check what they find and make it anew when it does not fit.
"""

import contextlib
import fcntl
import hashlib
import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

CACHE_VARIABLE = "VAEGAN_CACHE"


class NotFetchedError(Exception):
    """A forked reader, which cannot download, found a shard missing in the cache."""


def content_key(*parts: object) -> str:
    """A file name from what the content depends on."""
    return hashlib.blake2b(repr(parts).encode(), digest_size=16).hexdigest()


def cache_folder(kind: str) -> Path | None:
    """This user's folder for one kind of cached file; None where none can be made (then nothing is kept).

    $VAEGAN_CACHE, else $XDG_CACHE_HOME/vaegan-dist, else ~/.cache/vaegan-dist, else one in the temporary folder.
    """
    candidates = [Path(tempfile.gettempdir()) / f"vaegan-dist-{os.getuid()}"]
    if own := os.environ.get(CACHE_VARIABLE):
        candidates = [Path(own)]
    elif home := os.environ.get("XDG_CACHE_HOME"):
        candidates.insert(0, Path(home) / "vaegan-dist")
    elif os.environ.get("HOME"):
        candidates.insert(0, Path.home() / ".cache" / "vaegan-dist")
    for root in candidates:
        folder = root / kind
        with contextlib.suppress(OSError):
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            # In a shared temporary folder somebody else may have come first: what he left there is not believed.
            if all(place.stat().st_uid == os.getuid() for place in (root, folder)) and os.access(folder, os.W_OK):
                return folder
    return None


def replace_file(path: Path, write: Callable[[int], None]) -> None:
    """Make a file whole or not at all; `write` gets the descriptor of a temporary file beside it."""
    descriptor, temporary = tempfile.mkstemp(prefix=".tmp-", dir=path.parent)
    try:
        try:
            write(descriptor)
        finally:
            os.close(descriptor)
        Path(temporary).replace(path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold the lock of a cached file against every process of the node; released when the process dies."""
    descriptor = os.open(path.with_name(path.name + ".lock"), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        # A process forked meanwhile holds the descriptor as well: closing this one alone would not let go.
        fcntl.flock(descriptor, fcntl.LOCK_UN)
        os.close(descriptor)


def prune(folder: Path, budget: int, keep: Path) -> None:
    """Delete the files that were used longest ago until `budget` bytes are left; never `keep`.

    Whoever has one of them mapped keeps it: only the name goes away.
    """
    files = []
    for path in folder.iterdir():
        with contextlib.suppress(OSError):
            files.append((path.stat().st_mtime, path.stat().st_size, path))
    total = sum(size for _, size, _ in files)
    for _, size, path in sorted(files):
        if total <= budget:
            return
        if path != keep and path.suffix != ".lock":
            path.unlink(missing_ok=True)
            total -= size
