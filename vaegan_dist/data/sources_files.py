"""Sources that hold encoded pictures: folders, zip and tar archives. Members are read in place, never extracted."""

import bz2
import gzip
import lzma
import os
import stat
import tarfile
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from vaegan_dist.data.images import MAX_ENCODED_BYTES, PictureError, is_picture_name
from vaegan_dist.data.sources_base import (
    Content,
    Source,
    count_extensions,
    file_state,
    fingerprint,
    parts_by_folder,
    spool,
)
from vaegan_dist.errors import InputError

TAR_SUFFIXES = (".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tbz2", ".tar.xz", ".txz")


def open_folder(source: str, scratch: Path) -> Source:
    """A folder of pictures, with or without subfolders."""
    root = Path(source)
    if not root.is_dir():
        raise InputError(f"{source}: is not a folder; name a folder of pictures")
    found = sorted(_walk(root))
    names = [name for name, _, _ in found if is_picture_name(name)]

    def read(name: str) -> bytes:
        try:
            with (root / name).open("rb") as file:
                data = file.read(MAX_ENCODED_BYTES + 1)
        except OSError as error:
            raise PictureError(f"cannot be read ({error.strerror})") from None
        return data

    def load() -> Content:
        ignored = count_extensions(name for name, _, _ in found if not is_picture_name(name))
        return Content(parts_by_folder(names, read, source), None, ignored)

    return Source("folder", fingerprint(row for row in found if is_picture_name(row[0])), load)


def _walk(root: Path) -> Iterator[tuple[str, int, int]]:
    """Relative name, bytes and time of every regular file; links are followed, each folder is entered once."""
    pending, entered = [""], {_identity(root)}
    while pending:
        folder = pending.pop()
        try:
            with os.scandir(root / folder) as entries:
                for entry in entries:
                    name = f"{folder}{entry.name}"
                    try:
                        state = entry.stat()
                    except FileNotFoundError:
                        raise InputError(f"{root / name}: a link to nothing; remove it or restore its target") from None
                    if stat.S_ISDIR(state.st_mode):
                        if not entry.name.startswith(".") and (state.st_dev, state.st_ino) not in entered:
                            entered.add((state.st_dev, state.st_ino))
                            pending.append(f"{name}/")
                    elif stat.S_ISREG(state.st_mode):
                        yield name, state.st_size, state.st_mtime_ns
        except OSError as error:
            raise InputError(f"{root / folder}: cannot be read ({error.strerror}); check its permissions") from None


def _identity(path: Path) -> tuple[int, int]:
    state = path.stat()
    return state.st_dev, state.st_ino


def open_zip(source: str, scratch: Path) -> Source:
    """A zip archive of pictures."""
    path = Path(source)

    def load() -> Content:
        try:
            archive = zipfile.ZipFile(path)
        except (zipfile.BadZipFile, OSError, ValueError) as error:
            raise InputError(f"{source}: not a readable zip archive ({error}); fetch or pack it again") from None
        members = {info.filename: info for info in archive.infolist() if not info.is_dir()}
        names = [name for name in members if is_picture_name(name)]
        locked = next((name for name in names if members[name].flag_bits & 1), None)
        if locked is not None:
            raise InputError(f"{source}: member {locked!r} is encrypted; unpack the archive and name the folder")

        def read(name: str) -> bytes:
            try:
                with archive.open(members[name]) as member:
                    return member.read(MAX_ENCODED_BYTES + 1)
            except Exception as error:  # zipfile raises BadZipFile, zlib.error, EOFError, NotImplementedError …
                raise PictureError(f"damaged in the archive ({error})") from None

        ignored = count_extensions(name for name in members if not is_picture_name(name))
        return Content(parts_by_folder(names, read, source), None, ignored)

    return Source("zip", fingerprint([file_state(path)]), load)


def open_tar(source: str, scratch: Path) -> Source:
    """A tar archive of pictures; a compressed one is unpacked once into a nameless file under `scratch`."""
    path = Path(source)

    def load() -> Content:
        file = _uncompressed(path, scratch)
        places, ignored = _tar_places(file, source)

        def read(name: str) -> bytes:
            offset, size = places[name]
            if size > MAX_ENCODED_BYTES:
                raise PictureError(f"{size} bytes encoded, the limit is {MAX_ENCODED_BYTES}")
            return os.pread(file.fileno(), size, offset)  # one call, no shared position: safe between threads

        return Content(parts_by_folder(list(places), read, source), None, count_extensions(ignored))

    return Source("tar", fingerprint([file_state(path)]), load)


def _uncompressed(path: Path, scratch: Path) -> IO[bytes]:
    try:
        file = path.open("rb")
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}); check the path") from None
    magic = file.read(6)
    file.seek(0)
    for start, opener in ((b"\x1f\x8b", gzip.open), (b"BZh", bz2.open), (b"\xfd7zXZ\x00", lzma.open)):
        if magic.startswith(start):
            with file, opener(file, "rb") as stream:
                return spool(stream, scratch, str(path))
    return file


def _tar_places(file: IO[bytes], source: str) -> tuple[dict[str, tuple[int, int]], list[str]]:
    """Offset and size of every picture in an uncompressed tar, and the names that were passed over."""
    places: dict[str, tuple[int, int]] = {}
    ignored: list[str] = []
    size = file.seek(0, os.SEEK_END)
    file.seek(0)
    try:
        with tarfile.open(fileobj=file, mode="r:") as archive:
            for member in archive:
                name = member.name.removeprefix("./")
                if member.isreg() and not member.issparse() and is_picture_name(name):
                    places[name] = (member.offset_data, member.size)
                elif not member.isdir():
                    ignored.append(name)
                if member.isreg() and member.offset_data + member.size > size:
                    raise InputError(f"{source}: ends inside member {name!r}; fetch or pack it again")
                archive.members = []  # type: ignore[attr-defined]  # tarfile would keep every header
    except tarfile.TarError as error:
        raise InputError(f"{source}: not a readable tar archive ({error}); fetch or pack it again") from None
    _check_tar_end(file, archive.offset, source)
    return places, ignored


def _check_tar_end(file: IO[bytes], offset: int, source: str) -> None:
    """Only zeros may follow the last member: tarfile takes a damaged header for the end of the archive."""
    file.seek(offset)
    while block := file.read(2**20):
        if any(block):
            where = offset + next(index for index, byte in enumerate(block) if byte)
            raise InputError(
                f"{source}: damaged header, or a second archive appended, at byte {where}; fetch or pack it again"
            )
        offset += len(block)
