"""Where each sample lies in its shard: one walk over the member headers, kept in a cache keyed by content.

A key is a member's path up to the first dot of its last part, as webdataset has it. Which members count is a rule:
regular files with an extension of MEMBER_KINDS; everything else is passed over and counted in `notes`. Members of one
key may lie apart. A second member of the same name, a second picture of one key, or a label without a picture is an
error: whoever packed the shard meant something that cannot be known here.
"""

import json
import math
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt

from vaegan_dist.data.manifest import MAX_SHARD_SAMPLES, Layout
from vaegan_dist.data.npy import npy_header
from vaegan_dist.data.tar import Member, ShardFile, walk
from vaegan_dist.errors import DataError

PICTURE_KINDS = ("jpg", "jpeg", "png", "webp", "bmp", "tif", "npy")
CHUNK_KINDS = ("images.npy", "labels.npy", "keys.json")
MEMBER_KINDS = frozenset((*PICTURE_KINDS, *CHUNK_KINDS, "cls", "txt", "json"))
RAW = len(PICTURE_KINDS)  # pixels as they are, inside a chunk
LOST = RAW + 1  # promised by the manifest, but behind the point where the shard cannot be read any more
NO_LABEL = -(2**31)
BAD_LABEL = NO_LABEL + 1
MAX_LABEL_BYTES = 32
MAX_KEYS_BYTES = 64 * 2**20
MAX_NOTES = 64


@dataclass(frozen=True)
class ShardIndex:
    """Places of a shard's samples, one row each, in the order of their pictures in the archive."""

    offset: npt.NDArray[np.int64]
    size: npt.NDArray[np.int64]
    kind: npt.NDArray[np.uint8]
    """place of the picture's extension in PICTURE_KINDS, RAW or LOST"""
    label: npt.NDArray[np.int32]
    """class, NO_LABEL or BAD_LABEL"""
    shape: tuple[int, int, int] | None = None
    """height, width, channels of a chunk's pictures; None where each picture says so itself"""
    notes: dict[str, int] = field(default_factory=dict)
    """members passed over by rule, counted by what they were"""
    fault: str | None = None
    """why the shard cannot be read to its end (only where that was allowed)"""

    @property
    def samples(self) -> int:
        """Samples found."""
        return len(self.offset)

    def entries(self, places: npt.NDArray[np.int64]) -> Iterator["Entry"]:
        """Kind, offset, size and label of these samples."""
        columns = (self.kind, self.offset, self.size, self.label)
        return zip(*(column[places].tolist() for column in columns), strict=True)


Entry: TypeAlias = tuple[int, int, int, int]
"""kind, offset, size and label of one sample"""


class _Picture(NamedTuple):
    key: str
    header: int
    offset: int
    size: int
    kind: int


class _Chunk(NamedTuple):
    key: str
    header: int
    offset: int
    shape: tuple[int, int, int, int]
    labels: npt.NDArray[np.int32] | None
    keys: Member | None


class Notes(Counter[str]):
    """Counts by kind, with a bound on the kinds: names come from the data."""

    def add(self, what: str) -> None:
        """Count one."""
        self[what if what in self or len(self) < MAX_NOTES else "other"] += 1


def split_name(name: str) -> tuple[str, str]:
    """Key and lower-case extension of a member's name; the extension is empty where webdataset sees none."""
    folder, slash, base = name.rpartition("/")
    stem, dot, extension = base.partition(".")
    return (folder + slash + stem, extension.lower()) if stem and dot else (name, "")


def index_shard(path: Path, name: str, layout: Layout, *, tolerant: bool = False) -> ShardIndex:
    """Walk a shard and read its labels.

    Args:
        path: the tar file.
        name: what error lines call it.
        layout: of the data set.
        tolerant: end at the first structural fault and keep it in `fault`, instead of raising.

    Raises:
        DataError: unreadable, damaged, or members that contradict each other; names shard, member and offset.
    """
    with ShardFile(path, name) as file:
        return index_file(file, layout, tolerant=tolerant)


def index_file(file: ShardFile, layout: Layout, *, tolerant: bool = False) -> ShardIndex:
    """`index_shard` of a shard that is open."""
    notes = Notes()
    faults: list[str] = []
    members = _members(file, notes, faults if tolerant else None)
    if layout == "files":
        return _index_pictures(_pictures(file, members, faults), notes, faults)
    return _index_chunks(file, _chunks(file, members), notes, faults)


def shard_keys(path: Path, name: str, layout: Layout) -> list[str]:
    """Keys of a shard's samples in order: a second walk, for exports and error lines.

    Walks as far as the shard can be read. Raises DataError where a chunk's keys are not what they must be.
    """
    with ShardFile(path, name) as file:
        return file_keys(file, layout)


def file_keys(file: ShardFile, layout: Layout) -> list[str]:
    """`shard_keys` of a shard that is open."""
    faults: list[str] = []
    members = _members(file, Notes(), faults)
    if layout == "files":
        return [picture.key for picture, _ in _pictures(file, members, faults)]
    return [key for chunk in _chunks(file, members) for key in _chunk_keys(file, chunk)]


def _walk(file: ShardFile, faults: list[str] | None) -> Iterator[Member]:
    """The walk; where faults are collected, it ends at the first one."""
    try:
        yield from walk(file)
    except DataError as error:
        if faults is None:
            raise
        faults.append(str(error))


def _members(file: ShardFile, notes: Notes, faults: list[str] | None) -> Iterator[tuple[str, str, Member]]:
    """Key, extension and place of the members that count; each name once."""
    seen: dict[str, int] = {}
    for member in _walk(file, faults):
        key, extension = split_name(member.name)
        if member.type is not None:
            notes.add(member.type)
        elif not extension or (key.rpartition("/")[2].startswith("__") and key.endswith("__")):
            notes.add("no extension" if not extension else "webdataset's own")
        elif extension not in MEMBER_KINDS:
            notes.add("." + extension[:16].encode("unicode_escape").decode())
        elif (name := f"{key}.{extension}") in seen:
            cause = f"the same name as the member at byte {seen[name]}"
            raise file.error(member.header, cause, "keep one of them", member.name)
        else:
            seen[name] = member.header
            yield key, extension, member


def _pictures(
    file: ShardFile, members: Iterable[tuple[str, str, Member]], faults: list[str]
) -> list[tuple[_Picture, int]]:
    """Pictures in order, each with its label, wherever that lies."""
    pictures: dict[str, _Picture] = {}
    labels: dict[str, int] = {}
    places: dict[str, Member] = {}
    for key, extension, member in members:
        if extension == "cls":
            labels[key], places[key] = _label(file, member), member
        elif extension in PICTURE_KINDS:
            if (other := pictures.get(key)) is not None:
                raise file.error(
                    member.header,
                    f"sample {key!r} has a picture already, at byte {other.header}",
                    "keep one of them, or give them different keys (up to the first dot)",
                    member.name,
                )
            kind = PICTURE_KINDS.index(extension)
            pictures[key] = _Picture(key, member.header, member.offset, member.size, kind)
            _bound(file, member, len(pictures))
    for key, member in places.items():
        if key not in pictures and not faults:  # where the walk broke off, the picture may just not have been reached
            raise file.error(member.header, "a label without a picture", "remove it or add the picture", member.name)
    return [(picture, labels.get(key, NO_LABEL)) for key, picture in pictures.items()]


def _bound(file: ShardFile, member: Member, samples: int) -> None:
    if samples > MAX_SHARD_SAMPLES:
        raise file.error(member.header, f"more than {MAX_SHARD_SAMPLES} samples in one shard", "split it", member.name)


def _label(file: ShardFile, member: Member) -> int:
    """The integer in a `.cls` member."""
    text = file.read(member.size, member.offset) if member.size <= MAX_LABEL_BYTES else b""
    text = text.strip()
    return int(text) if text.isdigit() and int(text) < 2**31 else BAD_LABEL


def _index_pictures(pictures: Iterable[tuple[_Picture, int]], notes: Notes, faults: list[str]) -> ShardIndex:
    rows = [(picture.offset, picture.size, picture.kind, label) for picture, label in pictures]
    table = np.array(rows, np.int64).reshape(len(rows), 4)
    return ShardIndex(
        offset=table[:, 0].copy(),
        size=table[:, 1].copy(),
        kind=table[:, 2].astype(np.uint8),
        label=table[:, 3].astype(np.int32),
        notes=dict(notes),
        fault=faults[0] if faults else None,
    )


def _chunks(file: ShardFile, members: Iterable[tuple[str, str, Member]]) -> list[_Chunk]:
    """Chunks in order, their `.npy` headers read and checked against the members' sizes."""
    groups: dict[str, dict[str, Member]] = {}
    for key, extension, member in members:
        if extension in CHUNK_KINDS:
            groups.setdefault(key, {})[extension] = member
    chunks, total = [], 0
    for key, group in groups.items():
        if "images.npy" not in group:
            first = next(iter(group.values()))
            raise file.error(first.header, "a chunk without images.npy", "remove it or add it", first.name)
        member = group["images.npy"]
        shape, offset = _npy(file, member, np.dtype(np.uint8), 4)
        total += shape[0]
        _bound(file, member, total)
        labels = None
        if "labels.npy" in group:
            (count,), at = _npy(file, group["labels.npy"], np.dtype(np.int64), 1)
            if count != shape[0]:
                cause = f"{count} labels for {shape[0]} pictures"
                raise file.error(group["labels.npy"].header, cause, member=group["labels.npy"].name)
            values = np.frombuffer(file.read(8 * count, at), np.int64)
            labels = np.where((values >= 0) & (values < 2**31), values, BAD_LABEL).astype(np.int32)
        n, height, width, channels = shape
        chunks.append(_Chunk(key, member.header, offset, (n, height, width, channels), labels, group.get("keys.json")))
    return chunks


def _npy(file: ShardFile, member: Member, dtype: np.dtype[np.generic], ndim: int) -> tuple[tuple[int, ...], int]:
    """Shape of a `.npy` member and where its data begins; only plain C-ordered arrays of the one type pass."""
    try:
        shape, begin = npy_header(file.read(min(member.size, 16_384), member.offset), member.size, dtype, ndim)
    except ValueError as error:
        raise file.error(member.header, str(error), member=member.name) from None
    return shape, member.offset + begin


def _index_chunks(file: ShardFile, chunks: list[_Chunk], notes: Notes, faults: list[str]) -> ShardIndex:
    """One row per picture: where its pixels lie inside its chunk."""
    shape = chunks[0].shape[1:] if chunks else None
    offsets, labels = [np.zeros(0, np.int64)], [np.zeros(0, np.int32)]
    for chunk in chunks:
        if chunk.shape[1:] != shape:
            raise file.error(
                chunk.header, f"pictures of {chunk.shape[1:]} beside pictures of {shape}", member=chunk.key
            )
        n = chunk.shape[0]
        offsets.append(chunk.offset + math.prod(chunk.shape[1:]) * np.arange(n, dtype=np.int64))
        labels.append(np.full(n, NO_LABEL, np.int32) if chunk.labels is None else chunk.labels)
    offset = np.concatenate(offsets)
    return ShardIndex(
        offset=offset,
        size=np.full(len(offset), math.prod(shape or ()), np.int64),
        kind=np.full(len(offset), RAW, np.uint8),
        label=np.concatenate(labels),
        shape=shape,
        notes=dict(notes),
        fault=faults[0] if faults else None,
    )


def _chunk_keys(file: ShardFile, chunk: _Chunk) -> list[str]:
    """Keys of a chunk's pictures: as stored, or the chunk's own with the place in it."""
    if chunk.keys is None:
        return [f"{chunk.key}-{number}" for number in range(chunk.shape[0])]
    member = chunk.keys
    if member.size > MAX_KEYS_BYTES:
        raise file.error(member.header, f"{member.size} bytes of keys (limit {MAX_KEYS_BYTES})", member=member.name)
    try:
        keys = json.loads(file.read(member.size, member.offset))
    except (ValueError, RecursionError):
        keys = None
    if not isinstance(keys, list) or len(keys) != chunk.shape[0] or not all(isinstance(key, str) for key in keys):
        raise file.error(member.header, f"not a JSON list of {chunk.shape[0]} strings", member=member.name)
    return keys
