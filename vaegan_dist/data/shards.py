"""The shards of a data set on this node: checked against the manifest, indexed when first needed, open while used."""

import hashlib
import logging
import os
import stat
import threading
from collections import Counter, OrderedDict
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from vaegan_dist.data.cache import cache_folder, content_key, replace_file
from vaegan_dist.data.index import LOST, NO_LABEL, ShardIndex, file_keys, index_file
from vaegan_dist.data.manifest import Manifest, ShardInfo
from vaegan_dist.data.tar import ShardFile
from vaegan_dist.errors import DataError, InputError

if TYPE_CHECKING:
    from vaegan_dist.data.store import RemoteShards

log = logging.getLogger(__name__)

INDEX_VERSION = 1
OPEN_FILES = 256
KEPT_KEYS = 4
OPEN_ATTEMPTS = 5
HASH_BYTES = 2**20


class Shards:
    """Files and indices of a manifest's shards.

    Args:
        source: the folder where dataset.json lies, or what fetches shards from elsewhere.
        manifest: its content.
        tolerant: take a damaged shard as far as it can be read; its other samples are then bad samples.

    Raises:
        InputError: a shard is missing.
        DataError: a shard has another size than the manifest says (and `tolerant` is False).
    """

    def __init__(self, source: "Path | RemoteShards", manifest: Manifest, *, tolerant: bool) -> None:
        self.manifest, self.tolerant = manifest, tolerant
        self.folder = source if isinstance(source, Path) else None
        self.remote = None if isinstance(source, Path) else source
        self._indices: dict[int, ShardIndex] = {}
        self._files: OrderedDict[int, ShardFile] = OrderedDict()
        self._keys: OrderedDict[int, list[str]] = OrderedDict()
        self._lock = threading.RLock()
        # A fetched shard is called by its content, so that the time of its change says nothing.
        folder = self.folder
        self.modified = [0 if folder is None else self._check_file(folder, info) for info in manifest.shards]

    def __getstate__(self) -> dict[str, Any]:
        state = self.__dict__.copy()
        del state["_lock"]
        return state | {"_files": OrderedDict(), "_keys": OrderedDict()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._lock = threading.RLock()

    def after_fork(self) -> None:
        """A new lock: the parent's may have been held by a thread that does not exist here."""
        self._lock = threading.RLock()
        self._files, self._keys = OrderedDict(), OrderedDict()
        if self.remote is not None:
            self.remote.after_fork()

    def prefetch(self, shards: Iterable[int]) -> None:
        """Begin to fetch remote shards, soonest needed first, as many as this process's share of the cache holds."""
        if self.remote is not None:
            self.remote.prefetch(self.fitting(shards))

    def fitting(self, shards: Iterable[int]) -> list[ShardInfo]:
        """The first of these remote shards, as many as this process's share of the cache holds."""
        left = 0 if self.remote is None else self.remote.share
        chosen: dict[int, ShardInfo] = {}
        for number in shards:
            if number in chosen:
                continue
            left -= self.manifest.shards[number].bytes
            if left < 0:
                break
            chosen[number] = self.manifest.shards[number]
            if len(chosen) == len(self.manifest.shards):
                break
        return list(chosen.values())

    def fetch(self, numbers: Iterable[int]) -> None:
        """Have shards on this node, now."""
        for number in numbers:
            if self.remote is not None:
                self.remote.fetch(self.manifest.shards[number])

    def index(self, number: int) -> ShardIndex:
        """A shard's index, as many rows as the manifest promises."""
        index = self._indices.get(number)
        if index is None:
            with self._lock:
                index = self._indices.get(number) or self._load_index(number)
                self._indices[number] = index
        return index

    def file(self, number: int) -> ShardFile:
        """A shard, open. It is closed when nobody refers to it any more: a reader in another thread keeps it."""
        with self._lock:
            file = self._files.get(number)
            if file is None:
                file = self._open(number)
                # What left the cache takes room on the disk for as long as it is open.
                for other in [key for key, kept in self._files.items() if kept.deleted]:
                    del self._files[other]
                self._files[number] = file
                if len(self._files) > OPEN_FILES:
                    self._files.popitem(last=False)
            else:
                self._files.move_to_end(number)
            return file

    def ignored(self) -> dict[str, int]:
        """Members passed over by rule in the shards indexed so far."""
        with self._lock:
            return dict(sum((Counter(index.notes) for index in self._indices.values()), Counter()))

    def keys(self, number: int) -> list[str]:
        """Keys of a shard's samples."""
        with self._lock:
            if number not in self._keys:
                self._keys[number] = file_keys(self.file(number), self.manifest.layout)
                if len(self._keys) > KEPT_KEYS:
                    self._keys.popitem(last=False)
            return self._keys[number]

    def _open(self, number: int) -> ShardFile:
        info = self.manifest.shards[number]
        if self.folder is not None:
            file = ShardFile(self.folder / info.name, info.name)
            if os.fstat(file.fd).st_mtime_ns != self.modified[number]:
                raise DataError(f"shard {file.name}: it was changed while in use; start again, or restore the shard")
            return file
        assert self.remote is not None
        for _ in range(OPEN_ATTEMPTS):
            path = self.remote.fetch(info)
            try:
                return ShardFile(path, info.name)
            except DataError:
                if path.exists():
                    raise  # otherwise another process of the node evicted it just now
        raise DataError(f"shard {info.name}: it leaves the cache as soon as it comes; make data.cache_bytes larger")

    def _check_file(self, folder: Path, info: ShardInfo) -> int:
        """Time of the last change of a shard that is there and has its size, in ns."""
        path = folder / info.name
        try:
            status = path.stat()
        except OSError as error:
            raise InputError(
                f"shard {info.name}: cannot be found at {path} ({error.strerror}); restore it or prepare the data again"
            ) from None
        if not stat.S_ISREG(status.st_mode):
            raise InputError(f"shard {info.name}: {path} is not a regular file; restore it or prepare the data again")
        if status.st_size != info.bytes:
            self._suspect(info, f"has {status.st_size} bytes, dataset.json says {info.bytes}: it was cut or changed")
        return status.st_mtime_ns

    def _suspect(self, info: ShardInfo, cause: str) -> None:
        message = f"shard {info.name}: {cause}; restore it, or run `vaegan-dist prepare` or `index` again"
        if not self.tolerant:
            raise DataError(message)
        log.warning("%s", message)

    def _load_index(self, number: int) -> ShardIndex:
        """From the cache, or by a walk. The first walk also checks the file's hash; later changes show in its mtime."""
        info = self.manifest.shards[number]
        key = content_key(INDEX_VERSION, self.manifest.layout, info.sha256, info.bytes, self.modified[number])
        folder = cache_folder("index")
        cached = folder / f"{key}.npz" if folder else None
        index = _read_cached(cached, info.samples) if cached else None
        if index is None:
            file = self.file(number)
            intact = _sha256(file) == info.sha256
            if not intact:
                self._suspect(info, "its bytes are not those that dataset.json has the sha256 of: it was changed")
            index = index_file(file, self.manifest.layout, tolerant=self.tolerant)
            if index.fault is not None:
                log.warning("%s; what comes before it is read", index.fault)
            if cached and intact and index.fault is None and index.samples == info.samples:
                _write_cached(cached, index)
        return self._fit(info, index)

    def _fit(self, info: ShardInfo, index: ShardIndex) -> ShardIndex:
        """The index with the manifest's number of rows, or the reason why not."""
        picture = self.manifest.height, self.manifest.width, self.manifest.channels
        if index.shape is not None and index.shape != picture:
            raise DataError(
                f"shard {info.name}: pictures of {index.shape} (height, width, channels), dataset.json says {picture}; "
                "restore the shard or prepare the data again"
            )
        if index.samples == info.samples:
            return index
        missing = info.samples - index.samples
        if missing < 0 or index.fault is None or index.samples == 0:
            passed = ", ".join(f"{count} {what}" for what, count in index.notes.items())
            why = index.fault or (f"members passed over: {passed}" if passed else "no member was passed over")
            raise DataError(
                f"shard {info.name}: {index.samples} samples, dataset.json says {info.samples} ({why}); "
                "restore the shard, or run `vaegan-dist index` again"
            )
        return ShardIndex(
            offset=np.append(index.offset, np.zeros(missing, np.int64)),
            size=np.append(index.size, np.zeros(missing, np.int64)),
            kind=np.append(index.kind, np.full(missing, LOST, np.uint8)),
            label=np.append(index.label, np.full(missing, NO_LABEL, np.int32)),
            shape=index.shape,
            notes=index.notes,
            fault=index.fault,
        )


def _sha256(file: ShardFile) -> str:
    digest = hashlib.sha256()
    for offset in range(0, file.size, HASH_BYTES):
        digest.update(file.read(min(HASH_BYTES, file.size - offset), offset))
    return digest.hexdigest()


def _write_cached(path: Path, index: ShardIndex) -> None:
    def write(descriptor: int) -> None:
        with os.fdopen(os.dup(descriptor), "wb") as file:
            names = np.array(list(index.notes), dtype=np.str_)
            counts = np.array(list(index.notes.values()), np.int64)
            shape = np.array(index.shape or (), np.int64)
            np.savez(
                file,
                allow_pickle=False,
                names=names,
                counts=counts,
                shape=shape,
                offset=index.offset,
                size=index.size,
                kind=index.kind,
                label=index.label,
            )

    try:
        replace_file(path, write)
    except OSError as error:
        log.warning("index of a shard not kept in %s (%s)", path.parent, error.strerror)


def _read_cached(path: Path, samples: int) -> ShardIndex | None:
    """A cached index; None where there is none or it does not fit, for whatever reason: it is made again then."""
    try:
        with np.load(path, allow_pickle=False) as stored:
            columns = {name: stored[name] for name in ("offset", "size", "kind", "label")}
            notes = dict(zip(stored["names"].tolist(), stored["counts"].tolist(), strict=True))
            shape = tuple(stored["shape"].tolist())
    except FileNotFoundError:
        return None
    except Exception as error:  # a damaged zip or array raises anything
        log.warning("index cache %s is damaged (%s); the shard is walked again", path, error)
        return None
    types = {"offset": np.int64, "size": np.int64, "kind": np.uint8, "label": np.int32}
    if any(columns[name].shape != (samples,) or columns[name].dtype != kind for name, kind in types.items()):
        return None
    return ShardIndex(**columns, shape=shape or None, notes=notes)
