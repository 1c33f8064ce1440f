"""Sources of pictures by name: which one a path is, its labels, and the numbers of its classes."""

import csv
import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt

from vaegan_dist.data.sources_arrays import array_labels, is_idx, load_npy, open_digits, open_idx, open_npy, open_npz
from vaegan_dist.data.sources_base import Content, Labels, Numbered, Part, Source
from vaegan_dist.data.sources_files import TAR_SUFFIXES, open_folder, open_tar, open_zip
from vaegan_dist.data.sources_hub import PREFIX, open_hub
from vaegan_dist.errors import InputError

SourceKind = Literal["digits", "hf", "idx", "npy", "npz", "zip", "tar", "folder"]
Numbers = npt.NDArray[np.int64]

MAX_CLASSES = 65_536
MAX_KEPT_LABEL = 9_999
_PATH_COLUMNS = ("path", "file", "filename", "file_name", "image", "name")
_LABEL_COLUMNS = ("label", "class", "target", "category")


@dataclass(frozen=True)
class Kind:
    """How a kind of source is recognised and opened."""

    accepts: Callable[[str], bool]
    open: Callable[[str, Path], Source]


def _suffix(*suffixes: str) -> Callable[[str], bool]:
    return lambda source: source.lower().endswith(suffixes) and Path(source).is_file()


KINDS: Mapping[SourceKind, Kind] = {
    "digits": Kind(lambda source: source == "digits", open_digits),
    "hf": Kind(lambda source: source.startswith(PREFIX), open_hub),
    "npy": Kind(_suffix(".npy"), open_npy),
    "npz": Kind(_suffix(".npz"), open_npz),
    "zip": Kind(_suffix(".zip"), open_zip),
    "tar": Kind(_suffix(*TAR_SUFFIXES), open_tar),
    "idx": Kind(lambda source: Path(source).exists() and is_idx(Path(source)), open_idx),
    "folder": Kind(lambda source: Path(source).is_dir(), open_folder),
}


def open_source(source: str, kind: SourceKind | Literal["auto"], scratch: Path) -> Source:
    """Open a source of pictures.

    Args:
        source: `digits`, `hf:NAME[:SPLIT]`, or a path.
        kind: what it is; `auto` finds out.
        scratch: folder for what must be unpacked to be read at random; may not exist yet.
    """
    if kind != "auto":
        return KINDS[kind].open(source, scratch)
    for entry in KINDS.values():
        if entry.accepts(source):
            return entry.open(source, scratch)
    if Path(source).exists():
        raise InputError(f"{source}: its kind is not clear from its name; set --format to one of {', '.join(KINDS)}")
    raise InputError(f"{source}: no such file or folder; other sources are `digits` and `hf:NAME`")


def labels_state(labels: str | None) -> str | None:
    """What identifies the `labels` option: its word, or the hash of its file."""
    if labels is None or labels == "none":
        return labels
    try:
        return hashlib.sha256(Path(labels).read_bytes()).hexdigest()
    except OSError as error:
        raise InputError(f"{labels}: cannot be read ({error.strerror}); --labels is a CSV or .npy file") from None


def with_labels(content: Content, labels: str | None) -> Content:
    """Content with the labels of a file (`path,label` rows, or .npy for arrays), without any (`none`), or its own.

    A CSV also selects: a picture that it does not list is left out and counted as `unlisted`.
    """
    if labels is None:
        return content
    if labels == "none":
        return replace(
            content, classes=None, parts={name: replace(p, labels=None) for name, p in content.parts.items()}
        )
    if labels.endswith(".npy"):
        if len(content.parts) != 1:
            raise InputError(f"{labels}: one array of labels for the splits {', '.join(content.parts)}; use a CSV file")
        (name, part), array = next(iter(content.parts.items())), load_npy(labels)
        if not isinstance(part.names, Numbered):
            raise InputError(f"{labels}: an array of labels fits arrays of pictures; use a CSV file of path,label")
        return replace(
            content, classes=None, parts={name: replace(part, labels=array_labels(array, len(part.names), labels))}
        )
    return _with_table(content, _read_table(Path(labels)), labels)


def _with_table(content: Content, table: dict[str, str], file: str) -> Content:
    parts: dict[str, Part] = {}
    found = total = 0
    for split, part in content.parts.items():
        places = [index for index, name in enumerate(part.names) if name in table]
        found, total = found + len(places), total + len(part.names)
        if places:
            names = [part.names[index] for index in places]
            parts[split] = Part(names, _selected(part, places), [table[name] for name in names])
    if found < len(table):
        known = {name for part in parts.values() for name in part.names}
        missing = next(name for name in table if name not in known)
        raise InputError(
            f"{file}: {len(table) - found} of {len(table)} rows name no picture of the source, first {missing!r}; "
            "paths are relative to the source"
        )
    if "train" not in parts:
        raise InputError(f"{file}: lists no picture of the split 'train'; add them")
    ignored = {**content.ignored, "unlisted": total - found} if total > found else content.ignored
    return Content(parts, None, ignored)


def _selected(part: Part, places: Sequence[int]) -> Callable[[int], bytes | npt.NDArray[np.generic]]:
    return lambda index: part.read(places[index])


def _read_table(path: Path) -> dict[str, str]:
    """Labels by path from a CSV with the columns path and label, or with two columns and no header."""
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            rows = [(number, row) for number, row in enumerate(csv.reader(file), 1) if row]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"{path}: not a readable CSV file ({error}); save it as UTF-8, rows of path,label") from None
    if not rows:
        raise InputError(f"{path}: empty; write rows of path,label")
    header = [cell.strip().lower() for cell in rows[0][1]]
    name_at = next((header.index(name) for name in _PATH_COLUMNS if name in header), None)
    label_at = next((header.index(name) for name in _LABEL_COLUMNS if name in header), None)
    if name_at is not None and label_at is not None:
        rows = rows[1:]
    elif len(header) == 2:
        name_at, label_at = 0, 1
    else:
        raise InputError(f"{path}: columns {', '.join(header)}; needs a header with path and label, or two columns")
    table: dict[str, str] = {}
    for number, row in rows:
        if len(row) <= max(name_at, label_at) or not row[name_at].strip() or not row[label_at].strip():
            raise InputError(f"{path}: line {number} has no path or no label; fill it in")
        name, label = row[name_at].strip().removeprefix("./"), row[label_at].strip()
        if table.setdefault(name, label) != label:
            raise InputError(f"{path}: line {number} gives {name!r} a second label; keep one")
    return table


def number_classes(content: Content, source: str) -> tuple[tuple[str, ...] | None, dict[str, Numbers]]:
    """Names of the classes over all parts, and each part's labels as their numbers, int64 `[N]`.

    Integer labels up to 9,999 keep their value; anything else is numbered in the order of the names.
    """
    labelled = {name: part.labels for name, part in content.parts.items() if part.labels is not None}
    if not labelled:
        return None, {}
    if len(labelled) < len(content.parts):
        bare = next(name for name in content.parts if name not in labelled)
        raise InputError(
            f"{source}: the split '{bare}' has no labels, others have; complete them, or use --labels none"
        )
    integers = {name: _as_integers(labels) for name, labels in labelled.items()}
    whole = {name: values for name, values in integers.items() if values is not None}
    if content.classes is not None:
        return content.classes, _within(whole, len(content.classes), source)
    if len(whole) == len(labelled):
        low, high = min(int(v.min()) for v in whole.values()), max(int(v.max()) for v in whole.values())
        if low >= 0 and high <= MAX_KEPT_LABEL:
            return tuple(str(label) for label in range(high + 1)), whole
    names = sorted({str(label) for labels in labelled.values() for label in labels})
    if len(names) > MAX_CLASSES:
        raise InputError(f"{source}: {len(names)} different labels, the limit is {MAX_CLASSES}; use --labels none")
    numbers = {name: number for number, name in enumerate(names)}
    return tuple(names), {
        name: np.asarray([numbers[str(label)] for label in labels], np.int64) for name, labels in labelled.items()
    }


def _as_integers(labels: Labels) -> Numbers | None:
    if isinstance(labels, np.ndarray):
        return labels
    if all(label.isascii() and label.isdecimal() and len(label) < 10 and str(int(label)) == label for label in labels):
        return np.asarray([int(label) for label in labels], np.int64)
    return None


def _within(labels: dict[str, Numbers], count: int, source: str) -> dict[str, Numbers]:
    for values in labels.values():
        if len(values) and not (values.min() >= 0 and values.max() < count):
            raise InputError(
                f"{source}: labels from {values.min()} to {values.max()} for {count} classes; use --labels"
            )
    return labels
