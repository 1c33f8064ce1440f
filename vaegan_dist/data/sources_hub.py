"""A data set of the Hugging Face hub, by name. Pictures are taken encoded, as they were uploaded."""

import threading
from pathlib import Path
from typing import Any

from vaegan_dist.data.images import PictureError
from vaegan_dist.data.sources_base import (
    Content,
    Labels,
    Numbered,
    Part,
    Source,
    fingerprint,
    parts_names,
    split_parts,
)
from vaegan_dist.errors import InputError

PREFIX = "hf:"


def open_hub(source: str, scratch: Path) -> Source:
    """`hf:NAME` (its splits become ours) or `hf:NAME:SPLIT` (that split alone, as `train`)."""
    try:
        import datasets
    except ImportError as error:
        raise InputError(
            f"{source}: needs the package datasets ({error}); install it with `pip install 'vaegan-dist[hf]'`"
        ) from None
    name, _, split = source.removeprefix(PREFIX).partition(":")
    if not name:
        raise InputError(f"{source}: name a data set, as in hf:mnist or hf:mnist:test")
    try:
        loaded = datasets.load_dataset(name, split=split or None)
    except Exception as error:  # the hub's client raises errors of several libraries; offline it is a ConnectionError
        cause = " ".join(str(error).split())[:200] or type(error).__name__
        raise InputError(
            f"{source}: cannot be loaded ({cause}); check the name, the network, and HF_TOKEN for a private data set"
        ) from None
    tables: dict[str, Any] = {split: loaded} if split else dict(loaded)
    state = fingerprint(
        (key, len(table), str(table.info.version), str(table.features)) for key, table in tables.items()
    )

    def load() -> Content:
        first = next(iter(tables.values()))
        picture, label = _columns(first.features, datasets, source)
        groups = {key: _part(key, table, picture, label, datasets) for key, table in tables.items()}
        classes = tuple(first.features[label].names) if label and hasattr(first.features[label], "names") else None
        return Content(split_parts(parts_names(groups, source), source), classes)

    return Source("hf", state, load)


def _columns(features: Any, datasets: Any, source: str) -> tuple[str, str | None]:
    """Names of the picture column and of the label column, if there is one."""
    pictures = [name for name, feature in features.items() if isinstance(feature, datasets.Image)]
    if len(pictures) != 1:
        raise InputError(
            f"{source}: {len(pictures)} columns hold pictures, one is needed; columns: {', '.join(features)}"
        )
    classes = [name for name, feature in features.items() if isinstance(feature, datasets.ClassLabel)]
    named = [name for name in ("label", "labels") if name in features]
    return pictures[0], next(iter([*(name for name in named if name in classes), *classes, *named]), None)


def _part(split: str, table: Any, picture: str, label: str | None, datasets: Any) -> Part:
    rows = table.select_columns([picture]).cast_column(picture, datasets.Image(decode=False))
    lock = threading.Lock()  # the library promises nothing about reading one table from several threads

    def read(index: int) -> bytes:
        with lock:
            cell = rows[index][picture]
        if cell is None:
            raise PictureError("the row has no picture")
        if cell["bytes"] is not None:
            return bytes(cell["bytes"])
        try:
            return Path(cell["path"]).read_bytes()
        except OSError as error:
            raise PictureError(f"cannot be read ({error.strerror})") from None

    labels: Labels | None = None if label is None else _labels(list(table[label]), label)
    return Part(Numbered(split, len(table)), read, labels)


def _labels(values: list[Any], column: str) -> Labels:
    if any(value is None for value in values):
        raise InputError(f"column {column!r} has rows without a label; use --labels none, or a CSV file")
    if all(isinstance(value, int) for value in values):
        import numpy as np

        return np.asarray(values, np.int64)
    return [str(value) for value in values]
