"""The member headers of a tar archive: ustar, GNU and pax, checked byte for byte and never extracted.

The standard library stops in silence at a damaged header, and takes a file that ends between two members for a whole
one. Here an archive ends at its end mark (a block of zeros, and nothing but zeros behind it) or with an error that says
where it broke. Files are read by `pread`: a mapped file that shrinks kills the process, and a shared file position
cannot be used by threads and forked readers.
"""

import os
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import NamedTuple

from vaegan_dist.errors import DataError

BLOCK = 512
MAX_EXTENDED = 2**20
"""Bytes of an extended header (long name, pax)"""
MAX_NAME = 4096
"""Bytes of a member's name: what Linux takes for a path"""
REMEDY = "restore the shard or prepare it again"
_ZEROS = bytes(BLOCK)
_REGULAR = frozenset((b"0", b"\0", b"7"))
_TYPES = {b"1": "hard link", b"2": "symbolic link", b"3": "device", b"4": "device", b"5": "folder", b"6": "pipe"}


class Member(NamedTuple):
    """One member: its payload is `size` bytes at `offset`; its header (long name included) begins at `header`."""

    name: str
    header: int
    offset: int
    size: int
    type: str | None
    """None for a regular file, else what it is"""


class ShardFile:
    """An open shard that knows its name in error lines."""

    def __init__(self, path: Path, name: str) -> None:
        self.path, self.name = path, name
        try:
            self.fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            raise DataError(
                f"shard {name}: cannot be opened at {path} ({error.strerror}); restore it or prepare the data again"
            ) from None
        self.size = os.fstat(self.fd).st_size

    def read(self, size: int, offset: int) -> bytes:
        """Exactly `size` bytes at `offset`, or a DataError."""
        try:
            data = os.pread(self.fd, size, offset)
            while 0 < len(data) < size and (more := os.pread(self.fd, size - len(data), offset + len(data))):
                data += more
        except OSError as error:
            raise self.error(offset, f"cannot be read ({error.strerror})", "check the disk") from None
        if len(data) < size:
            raise self.error(offset, f"ends {size - len(data)} bytes too early; it shrank while in use")
        return data

    def read_into(self, buffer: memoryview, offset: int) -> None:
        """Fill a byte buffer from `offset` on, or raise a DataError."""
        try:
            done = os.preadv(self.fd, [buffer], offset)
        except OSError as error:
            raise self.error(offset, f"cannot be read ({error.strerror})", "check the disk") from None
        if done < len(buffer):
            buffer[done:] = self.read(len(buffer) - done, offset + done)

    def error(self, offset: int, cause: str, remedy: str = REMEDY, member: str | None = None) -> DataError:
        """The one line for a fault in this shard."""
        where = f"shard {self.name}: " + (f"member {member!r} " if member is not None else "") + f"at byte {offset}: "
        return DataError(f"{where}{cause}; {remedy}")

    @property
    def deleted(self) -> bool:
        """Whether the file has no name any more: its bytes take room until it is closed."""
        return os.fstat(self.fd).st_nlink == 0

    def close(self) -> None:
        """Close the file; closing twice is harmless."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1

    def __enter__(self) -> "ShardFile":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def walk(file: ShardFile) -> Iterator[Member]:
    """Members in the order of the archive.

    Raises:
        DataError: at the first byte that does not fit; the members before it have been yielded.
    """
    position, begin = 0, 0
    pending: dict[str, str] = {}  # path and size that a long-name or pax header gives the next member
    while True:
        header = _header(file, position)
        if header == _ZEROS:
            if pending:
                raise file.error(position, "a long name stands before the end mark instead of a member")
            _check_tail(file, position)
            return
        size, kind = _checked(file, header, position), header[156:157]
        offset = position + BLOCK
        if kind in b"xgLK":
            if size > MAX_EXTENDED:
                raise file.error(position, f"an extended header of {size} bytes (limit {MAX_EXTENDED})")
            _check_payload(file, _name(header), position, offset, size)
            _extend(file, pending, kind, position, file.read(size, offset))
            position = offset + _padded(size)
            continue
        name = pending.get("path") or _name(header)
        if len(name) > MAX_NAME:
            raise file.error(position, f"a name of {len(name)} characters (limit {MAX_NAME})")
        regular = kind in _REGULAR and not (kind == b"\0" and name.endswith("/"))
        if "size" in pending:
            size = _decimal(file, pending["size"], position)
        if kind == b"S" or any(map(_sparse, pending)):
            raise file.error(position, "is stored as a sparse file", "pack it without --sparse", name)
        payload = 0 if kind in _TYPES else size
        _check_payload(file, name, position, offset, payload)
        yield Member(name, begin, offset, payload, None if regular else _TYPES.get(kind, "special file"))
        position = begin = offset + _padded(payload)
        pending = {}


def _header(file: ShardFile, position: int) -> bytes:
    """The block at `position`, where a header or the end mark must stand."""
    if file.size == 0:
        raise file.error(0, "the file is empty")
    if position + BLOCK > file.size:
        left = file.size - position
        cause = f"cut inside a member's header ({left} of {BLOCK} bytes)" if left > 0 else "cut between two members"
        raise file.error(position, f"{cause}: the archive's end mark is missing")
    return file.read(BLOCK, position)


def _checked(file: ShardFile, header: bytes, position: int) -> int:
    """Payload size that a header promises, once its checksum is right."""
    try:
        stated = _number(header[148:156])
        total = sum(header) - sum(header[148:156]) + 8 * 32
        if stated != total and stated != total - 256 * sum(byte > 127 for byte in header[:148] + header[156:]):
            raise ValueError
        return _number(header[124:136])
    except ValueError:
        if position == 0:
            raise file.error(0, f"not a tar archive: it begins with {header[:24]!r}") from None
        raise file.error(position, f"a damaged member header: it begins with {header[:24]!r}") from None


def _check_payload(file: ShardFile, name: str, position: int, offset: int, size: int) -> None:
    if offset + size > file.size:
        cause = f"cut inside its payload ({file.size - offset} of {size} bytes)"
        raise file.error(position, cause, member=name)


def _check_tail(file: ShardFile, position: int) -> None:
    """Behind the end mark nothing may follow: a zeroed header would otherwise hide the rest of the shard."""
    at = position
    while at < file.size:
        part = file.read(min(2**20, file.size - at), at)
        if stripped := part.lstrip(b"\0"):
            data = at + len(part) - len(stripped)
            raise file.error(
                position,
                f"zeros stand in place of a member's header, but data follows at byte {data} "
                f"(a damaged header, or archives that were joined without --ignore-zeros)",
            )
        at += len(part)


def _extend(file: ShardFile, pending: dict[str, str], kind: bytes, position: int, payload: bytes) -> None:
    """What a GNU long name or a pax header says about the next member."""
    if kind == b"L":
        pending["path"] = _text(payload)
    elif kind in b"xg":
        records = _pax(file, position, payload)
        if kind == b"g" and not records.keys().isdisjoint(("path", "size")):
            raise file.error(position, "a global pax header sets path or size of all members", "pack it without")
        if kind == b"x":  # what nobody asks for is not kept: headers may follow each other without end
            pending.update({key: text for key, text in records.items() if key in ("path", "size") or _sparse(key)})


def _sparse(key: str) -> bool:
    return key.startswith("GNU.sparse")


def _pax(file: ShardFile, position: int, payload: bytes) -> dict[str, str]:
    """Records `LENGTH KEY=VALUE\\n`."""
    records, at = {}, 0
    while at < len(payload) and payload[at]:
        digits, space, _ = payload[at : at + 20].partition(b" ")
        length = int(digits) if digits.isdigit() and space else 0
        record = payload[at + len(digits) + 1 : at + length]
        key, equals, value = record.partition(b"=")
        if not length or at + length > len(payload) or not equals or not record.endswith(b"\n"):
            raise file.error(position, "a damaged pax header")
        records[_text(key)] = value[:-1].decode("utf-8", "surrogateescape")
        at += length
    return records


def _decimal(file: ShardFile, text: str, position: int) -> int:
    if not (text.isascii() and text.isdigit() and len(text) < 20):
        raise file.error(position, f"a pax header with size {text[:40]!r}")
    return int(text)


def _number(field: bytes) -> int:
    """A header's number: octal text, or base 256 where the first bit is set."""
    if field[0] & 0x80:
        if field[0] != 0x80:
            raise ValueError("negative")
        return int.from_bytes(field[1:], "big")
    text = field.split(b"\0", 1)[0].strip()
    if text.strip(b"01234567"):
        raise ValueError("no octal number")
    return int(text or b"0", 8)


def _name(header: bytes) -> str:
    """Name of a member from its own header: with the prefix of ustar (GNU uses that field for other things)."""
    name = _text(header[:100])
    prefix = _text(header[345:500]) if header[257:263] == b"ustar\0" else ""
    return f"{prefix}/{name}" if prefix else name


def _text(field: bytes) -> str:
    return field.split(b"\0", 1)[0].decode("utf-8", "surrogateescape")


def _padded(size: int) -> int:
    return -(-size // BLOCK) * BLOCK
