"""Writing shards: deterministic WebDataset tars, and the journal that lets an interrupted preparation continue."""

import hashlib
import io
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Generic, Protocol, Self, TypeVar

import numpy as np

from vaegan_dist.data.images import Pixels
from vaegan_dist.data.manifest import Layout, ShardInfo
from vaegan_dist.errors import InputError
from vaegan_dist.files import file_sha256, sync_folder

CHUNK = 256
JOURNAL_NAME = ".prepare.jsonl"


@dataclass(frozen=True)
class Ready:
    """A picture on its way into a shard: encoded (layout `files`) or as pixels `[H, W, C]` (layout `chunks`)."""

    key: str
    label: int | None
    extension: str
    content: bytes | Pixels


@dataclass(frozen=True)
class Broken:
    """A picture that could not be used."""

    name: str
    cause: str


class Labelled(Protocol):
    """What every item of a shard has."""

    @property
    def key(self) -> str: ...
    @property
    def label(self) -> int | None: ...


Item = TypeVar("Item", bound=Labelled)


class TarShard(Generic[Item]):
    """One shard in work, under a temporary name until `finish`. The same items give the same bytes.

    In the layout `files` an item is a sample of the tar, in the layout `chunks` up to CHUNK of them are.
    """

    def __init__(self, path: Path, layout: Layout) -> None:
        from webdataset import TarWriter  # its import brings torch along

        self.path, self.layout, self.samples = path, layout, 0
        self._temporary = temporary_name(path)
        self._file = self._temporary.open("wb")
        self._digest = hashlib.sha256()
        self._pending: list[Item] = []
        self.bytes = 0
        self._tar = TarWriter(self, user="vaegan", group="vaegan", mode=0o644, encoder=False, mtime=0)

    def one(self, item: Item) -> dict[str, Any]:
        """An item's members by extension, but for its key and label."""
        raise NotImplementedError

    def many(self, items: Sequence[Item]) -> dict[str, Any]:
        """The members of several items, but for their keys and labels."""
        raise NotImplementedError

    def write(self, data: bytes) -> int:
        """What the tar writer calls: hash and count on the way to the file."""
        self._digest.update(data)
        self.bytes += len(data)
        return self._file.write(data)

    def add(self, item: Item) -> None:
        """Append an item."""
        self.samples += 1
        if self.layout == "files":
            label = {} if item.label is None else {"cls": str(item.label).encode()}
            self._tar.write({"__key__": item.key, **self.one(item), **label})
            return
        self._pending.append(item)
        if len(self._pending) == CHUNK:
            self._flush()

    def _flush(self) -> None:
        """Write the items that wait as one sample, with n keys and int64 `[n]` labels."""
        if not self._pending:
            return
        items, self._pending = self._pending, []
        number = (self.samples - 1) // CHUNK
        sample = {"__key__": f"{self.path.stem}-{number:06d}", **self.many(items)}
        sample["keys.json"] = json.dumps([item.key for item in items]).encode()
        if items[0].label is not None:
            sample["labels.npy"] = npy_bytes(np.asarray([item.label for item in items], np.int64))
        self._tar.write(sample)

    def finish(self, name: str) -> ShardInfo:
        """Complete the shard, make it durable and give it its name; `name` is what the manifest calls it."""
        self._flush()
        self._tar.close()
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        self._temporary.replace(self.path)
        sync_folder(self.path.parent)
        return ShardInfo(name=name, samples=self.samples, bytes=self.bytes, sha256=self._digest.hexdigest())

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()
        self._temporary.unlink(missing_ok=True)


class ShardWriter(TarShard[Ready]):
    """A shard of pictures."""

    def one(self, item: Ready) -> dict[str, Any]:
        return {item.extension: item.content}

    def many(self, items: Sequence[Ready]) -> dict[str, Any]:
        """uint8 `[n, H, W, C]`."""
        return {"images.npy": npy_bytes(np.stack([np.asarray(picture.content) for picture in items]))}


def temporary_name(path: Path) -> Path:
    """Where a shard is written before it has its name."""
    return path.with_name(f".{path.name}.tmp")


def npy_bytes(array: np.ndarray[Any, Any]) -> bytes:
    """An array as the bytes of a .npy file, format 1.0."""
    buffer = io.BytesIO()
    np.lib.format.write_array(buffer, array, version=(1, 0), allow_pickle=False)
    return buffer.getvalue()


@dataclass(frozen=True)
class Finished:
    """A shard that is done: `end` is the position in the split's plan up to which it reaches."""

    shard: ShardInfo
    end: int
    broken: tuple[Broken, ...]


class Journal:
    """What an unfinished preparation has done so far: a line of JSON for its identity, then one per finished shard."""

    def __init__(self, output: Path, identity: Mapping[str, Any]) -> None:
        self.path = output / JOURNAL_NAME
        self._output = output
        self._finished: dict[str, list[Finished]] = {}
        lines = self._whole_lines()
        if lines:
            same_identity(output, lines[0].get("identity"), identity, "an unfinished data set")
            self._recover(lines[1:])
        self._file = self.path.open("w", encoding="utf-8")
        self._append({"identity": identity})
        for split, shards in self._finished.items():
            for finished in shards:
                self._append(_row(split, finished))

    def finished(self, split: str) -> Sequence[Finished]:
        """Shards of a split that need not be made again, in order."""
        return tuple(self._finished.get(split, ()))

    def add(self, split: str, finished: Finished) -> None:
        """Note a finished shard, durably."""
        self._finished.setdefault(split, []).append(finished)
        self._append(_row(split, finished))

    def close(self) -> None:
        """Leave the journal where it is, for the next run to continue."""
        self._file.close()

    def remove(self) -> None:
        """The data set is complete."""
        self._file.close()
        self.path.unlink(missing_ok=True)

    def _append(self, row: Mapping[str, Any]) -> None:
        self._file.write(json.dumps(row) + "\n")
        self._file.flush()
        os.fsync(self._file.fileno())

    def _whole_lines(self) -> list[dict[str, Any]]:
        """The journal's lines; one that the interruption cut off ends it."""
        rows: list[dict[str, Any]] = []
        if self.path.is_file():
            for line in self.path.read_text(encoding="utf-8", errors="replace").split("\n"):
                try:
                    rows.append(json.loads(line))
                except ValueError:
                    break
        return rows

    def _recover(self, rows: list[dict[str, Any]]) -> None:
        """Keep the shards whose bytes are those that were written; from the first that is not, all are made again."""
        damaged: set[str] = set()
        for row in rows:
            split, shard = row["split"], ShardInfo(**row["shard"])
            if split in damaged or not same_bytes(self._output / split / shard.name, shard):
                damaged.add(split)
                continue
            broken = tuple(Broken(**item) for item in row["broken"])
            self._finished.setdefault(split, []).append(Finished(shard, row["end"], broken))


def _row(split: str, finished: Finished) -> dict[str, Any]:
    return {
        "split": split,
        "shard": finished.shard.model_dump(),
        "end": finished.end,
        "broken": [asdict(item) for item in finished.broken],
    }


def same_bytes(path: Path, shard: ShardInfo) -> bool:
    """Whether a file is the shard: size and hash."""
    if not path.is_file() or path.stat().st_size != shard.bytes:
        return False
    return file_sha256(path) == shard.sha256


def same_identity(output: Path, theirs: Any, ours: Mapping[str, Any], what: str) -> None:
    """Refuse to mix two data sets in one folder; names the first option that differs."""
    if theirs == ours:
        return
    theirs = theirs if isinstance(theirs, dict) else {}
    old, new = theirs.get("options", {}), ours["options"]
    changed = next((key for key in new if old.get(key) != new[key]), None)
    if changed is not None:
        reason = f"{changed}={old.get(changed)!r}, now {new[changed]!r}"
    elif theirs.get("labels") != ours["labels"]:
        reason = "other labels"
    elif theirs.get("source") != ours["source"]:
        reason = "another source, or the source has changed since"
    else:
        reason = "another version of vaegan-dist"
    raise InputError(f"{output}: holds {what} made with {reason}; use --overwrite, or another output folder")
