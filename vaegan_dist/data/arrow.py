"""Object stores for libraries that read and write through pyarrow: the client is the one of data sets and runs."""

from typing import Any

from obstore.fsspec import FsspecStore
from pyarrow import PythonFile
from pyarrow.fs import FSSpecHandler, PyFileSystem

from vaegan_dist.data.urls import checked_url, client_options

TIMEOUT_SECONDS = 30.0


class _Bytes:
    """A file that is given pyarrow's buffers and takes only bytes."""

    def __init__(self, file: Any) -> None:
        self._file = file

    def write(self, buffer: Any) -> int:
        return int(self._file.write(bytes(buffer)))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)


class _Handler(FSSpecHandler):  # type: ignore[misc]
    def open_output_stream(self, path: str, metadata: Any) -> Any:
        return PythonFile(_Bytes(self.fs.open(path, mode="wb")), mode="w")


def arrow_filesystem(url: str) -> tuple[Any, str]:
    """The store of a URL as a file system of pyarrow's, and the URL's path in it.

    Args:
        url: s3:// gs:// az:// Requests are tried again by the client itself.

    Raises:
        InputError: not a usable URL.
    """
    parts = checked_url(url)
    protocol: Any = parts.scheme
    store = FsspecStore(protocol, client_options=client_options(parts.scheme, TIMEOUT_SECONDS)["client_options"])
    return PyFileSystem(_Handler(store)), f"{parts.netloc}{parts.path}"
