"""What every source of pictures offers: named parts (train, validation, …) whose pictures are read by number."""

import hashlib
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, Protocol

import numpy as np
import numpy.typing as npt

from vaegan_dist.errors import InputError

Raw = bytes | npt.NDArray[np.generic]
Labels = Sequence[str] | npt.NDArray[np.int64]

MAX_UNPACKED_BYTES = 256 * 2**30
_VALIDATION_NAMES = ("validation", "val", "valid")
SPLIT_NAMES = frozenset(("train", "test", *_VALIDATION_NAMES))


class Readable(Protocol):
    """What `spool` needs of a stream; gzip's, lzma's and zipfile's have it."""

    def read(self, size: int = -1, /) -> bytes: ...


@dataclass(frozen=True)
class Part:
    """Pictures that belong to one split."""

    names: Sequence[str]
    """name of each picture, unique within the source"""
    read: Callable[[int], Raw]
    """the encoded bytes or the pixels of a picture; safe to call from several threads"""
    labels: Labels | None = None
    """class of each picture: names, or integers"""


@dataclass(frozen=True)
class Content:
    """What a source holds."""

    parts: Mapping[str, Part]
    classes: tuple[str, ...] | None = None
    """names of the classes where the source states them; labels are then their numbers"""
    ignored: Mapping[str, int] = field(default_factory=dict)
    """what was passed over by rule, counted by kind"""


@dataclass(frozen=True)
class Source:
    """An opened source: cheap to ask for its fingerprint; `load` does the rest of the work."""

    kind: str
    fingerprint: str
    """changes when the source does (sizes, times, names; not the bytes of every picture)"""
    load: Callable[[], Content]


class Numbered(Sequence[str]):
    """Names `PREFIX-00000000`, made when asked for: a million of them take no memory."""

    def __init__(self, prefix: str, size: int) -> None:
        self._prefix, self._size = prefix, size

    def __len__(self) -> int:
        return self._size

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(self._size))]
        if not 0 <= index < self._size:
            raise IndexError(index)
        return f"{self._prefix}-{index:08d}"


def fingerprint(rows: Iterable[object]) -> str:
    """A short hash over rows that identify a source's state."""
    digest = hashlib.sha256()
    for row in rows:
        digest.update(repr(row).encode("utf-8", "surrogatepass") + b"\n")
    return digest.hexdigest()[:32]


def file_state(path: Path) -> tuple[str, int, int]:
    """Name, bytes and time of a file: what a change of it would change."""
    try:
        state = path.stat()
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}); check the path") from None
    return path.name, state.st_size, state.st_mtime_ns


def split_parts(groups: Mapping[str, Part], source: str) -> dict[str, Part]:
    """Name a source's own splits as ours: val, valid → validation; test → validation where there is no other."""
    parts: dict[str, Part] = {}
    named = {name: part for name, part in groups.items() if len(part.names)}
    validation = [name for name in _VALIDATION_NAMES if name in named]
    if len(validation) > 1:
        raise InputError(f"{source}: holds the splits {' and '.join(validation)}, which mean the same; keep one")
    for name, part in named.items():
        if name == "test" and not validation:
            parts["validation"] = part
        else:
            parts["validation" if name in _VALIDATION_NAMES else name] = part
    if not parts:
        raise InputError(f"{source}: holds no pictures; check the path and --format")
    if "train" not in parts:
        only = next(iter(parts))
        if len(parts) > 1:
            raise InputError(f"{source}: has no split 'train' (splits: {', '.join(groups)}); name one of them alone")
        parts = {"train": parts[only]}
    return dict(sorted(parts.items(), key=lambda item: item[0] != "train"))


def parts_names(groups: Mapping[str, Part], source: str) -> Mapping[str, Part]:
    """Check that a source's own splits have names with a known meaning."""
    unknown = [name for name in groups if name not in SPLIT_NAMES]
    if unknown and len(groups) > 1:
        raise InputError(f"{source}: splits {', '.join(groups)}; name the one to use, as in {source}:{unknown[0]}")
    return groups


def parts_by_folder(names: Sequence[str], read: Callable[[str], Raw], source: str) -> dict[str, Part]:
    """Parts and labels from the pictures' paths.

    Folders that all pictures share say nothing and are passed over. If what follows is `train` with `val`, `test` …,
    these are splits; what follows then is the class, when every picture lies in such a folder.
    """
    names = sorted(names)
    depth = _shared_depth(names)
    tops = {name.split("/")[depth] for name in names if name.count("/") > depth}
    flat = any(name.count("/") == depth for name in names)
    if "train" in tops and len(tops) > 1 and tops <= SPLIT_NAMES and not flat:
        groups = {top: [name for name in names if name.split("/")[depth] == top] for top in sorted(tops)}
        return split_parts({top: _part(group, read, depth + 1) for top, group in groups.items()}, source)
    return split_parts({"train": _part(names, read, depth)}, source)


def _shared_depth(names: Sequence[str]) -> int:
    """How many leading folders all names share (sorted names: the first and the last decide)."""
    if not names:
        return 0
    first, last = names[0].split("/")[:-1], names[-1].split("/")[:-1]
    depth = 0
    while depth < min(len(first), len(last)) and first[depth] == last[depth]:
        depth += 1
    return depth


def _part(names: list[str], read: Callable[[str], Raw], depth: int) -> Part:
    classes = [name.split("/")[depth] for name in names if name.count("/") > depth]
    labels = classes if len(classes) == len(names) and len(set(classes)) > 1 else None
    return Part(names, lambda index: read(names[index]), labels)


def spool(stream: Readable, scratch: Path, source: str, expected: int | None = None) -> IO[bytes]:
    """Unpack a compressed stream into a nameless temporary file, which vanishes with its last reader.

    Raises:
        InputError: damaged, or it unpacks to more (or less) than expected.
    """
    limit = MAX_UNPACKED_BYTES if expected is None else expected
    scratch.mkdir(parents=True, exist_ok=True)
    target = tempfile.TemporaryFile(dir=scratch)  # noqa: SIM115 (the caller's arrays keep it open)
    total = 0
    try:
        while block := stream.read(2**20):
            total += len(block)
            if total > limit:
                raise InputError(f"{source}: unpacks to more than {limit} bytes; damaged, or a decompression bomb")
            target.write(block)
    except OSError as error:
        raise InputError(f"{source}: {error.strerror or error}; check the file and the space under {scratch}") from None
    except Exception as error:  # zlib.error, EOFError, lzma.LZMAError, BadZipFile: what the format's library raises
        if isinstance(error, InputError):
            raise
        raise InputError(f"{source}: damaged ({error}); fetch or pack it again") from None
    if expected is not None and total != expected:
        raise InputError(f"{source}: unpacks to {total} bytes, its header promises {expected}; fetch it again")
    target.flush()
    return target


def count_extensions(names: Iterable[str]) -> Counter[str]:
    """How many names were passed over, by extension."""
    tails = (name.rsplit("/", 1)[-1] for name in names)
    return Counter("." + tail.rsplit(".", 1)[1].lower()[:12] if "." in tail[1:] else "other" for tail in tails)
