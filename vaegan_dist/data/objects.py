"""A folder of an object store that is written as well as read: for runs whose storage is a URL."""

from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import obstore
from obstore.exceptions import AlreadyExistsError, GenericError

from vaegan_dist.data.transfer import Transfer
from vaegan_dist.errors import DataError

READERS = 16
OWN_BYTES = 256 * 2**20


class Objects(Transfer):
    """The objects below a URL. Each is written whole or not at all, and tried again as downloads are.

    Raises, all methods:
        InputError: no access.
        DataError: the store does not answer after all attempts.
    """

    def upload(self, name: str, path: Path) -> None:
        """Put a file's content under a name. Raises OSError when the file cannot be read."""
        path.stat()  # an error of this machine, before the store is asked
        self._persist(name, lambda _: obstore.put(self._store, name, path), lambda: 0, WRITTEN)

    def write(self, name: str, content: bytes) -> None:
        """Put a few bytes under a name."""
        self._persist(name, lambda _: obstore.put(self._store, name, content), lambda: 0, WRITTEN)

    def create(self, name: str, content: bytes) -> bool:
        """Put a few bytes under a name that nothing has yet; False where something else has it.

        Of two processes that create a name one succeeds. A success whose answer was lost is known by its content, so
        the content must be this process's alone where that matters.
        """

        def step(_: bool) -> bool:
            try:
                obstore.put(self._store, name, content, mode="create")
            except AlreadyExistsError:
                found = self.small(name, OWN_BYTES)
                if found is None:  # the other request that this one met has failed since
                    raise GenericError("met another request") from None
                return found == content
            return True

        created: bool = self._persist(name, step, lambda: 0, WRITTEN)
        return created

    def many(self, names: Sequence[str], limit: int) -> list[bytes]:
        """Bytes of many small files, fetched side by side. Raises DataError where one is gone, and as `small` does."""

        def read(name: str) -> bytes:
            content = self.small(name, limit)
            if content is None:
                raise DataError(f"{self.url}/{name}: is gone since the store listed it; run the same command again")
            return content

        with ThreadPoolExecutor(READERS) as pool:
            return list(pool.map(read, names))

    def sizes(self, prefix: str = "") -> dict[str, int]:
        """Bytes of every object below a folder, by name."""

        def step(_: bool) -> dict[str, int]:
            found = obstore.list(self._store, prefix or None)
            return {str(entry["path"]): int(entry["size"]) for chunk in found for entry in chunk}

        sizes: dict[str, int] = self._persist(f"the list of {prefix or 'files'}", step, lambda: 0)
        return sizes

    def delete(self, names: Iterable[str]) -> None:
        """Remove objects; one that is not there is no error."""
        for name in names:
            self._persist(name, lambda _, name=name: self._remove(name), lambda: 0, WRITTEN)  # type: ignore[misc]

    def _remove(self, name: str) -> None:
        try:
            obstore.delete(self._store, name)
        except FileNotFoundError:
            return


WRITTEN = "written to"
