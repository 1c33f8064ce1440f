"""The plan of a preparation: which picture goes where, as a pure function of names and options.

Everything is decided by hashes of names, not by draws: adding a picture moves no other one between the splits.
"""

import hashlib
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from urllib.parse import quote_from_bytes

import numpy as np
import numpy.typing as npt

from vaegan_dist.data.images import is_picture_name
from vaegan_dist.data.sources import Numbers
from vaegan_dist.data.sources_base import Content, Part
from vaegan_dist.errors import InputError

MAX_KEY = 80


@dataclass(frozen=True)
class SplitPlan:
    """The pictures of a split in the order in which they stand in its shards."""

    split: str
    part: Part
    order: npt.NDArray[np.int64]
    """indices into the part"""
    keys: Sequence[str]
    """key of each picture of the part"""
    labels: Numbers | None
    """class of each picture of the part"""

    def __len__(self) -> int:
        return len(self.order)


def make_plan(
    content: Content,
    labels: dict[str, Numbers],
    *,
    seed: int,
    validation: float | None,
    validation_by: str | None,
    limit: int | None,
    source: str,
) -> list[SplitPlan]:
    """Split, shuffle and cut the pictures of a source.

    Args:
        content: the source's parts.
        labels: classes by part.
        seed: of the order inside each split.
        validation: share of the pictures of `train` to set aside as `validation`.
        validation_by: pattern that is removed from a key before it decides the split, so that pictures whose keys
            differ only there stay together.
        limit: most pictures per split; the first in the shuffled order.
        source: what error lines call it.
    """
    chosen = {split: np.arange(len(part.names)) for split, part in content.parts.items()}
    origin = {split: split for split in chosen}
    if validation is not None:
        if "validation" in chosen:
            raise InputError(
                f"{source}: has a validation split of its own; drop --validation, or name the train part alone"
            )
        held = _held_out(content.parts["train"].names, validation, validation_by)
        origin["validation"] = "train"
        chosen["train"], chosen["validation"] = np.flatnonzero(~held), np.flatnonzero(held)
        empty = next((split for split, indices in chosen.items() if not len(indices)), None)
        if empty is not None:
            raise InputError(f"{source}: validation={validation} leaves no picture in '{empty}'; choose another share")
    keys = {split: member_keys(part.names) for split, part in content.parts.items()}
    plans = []
    for split, indices in chosen.items():
        part, names = content.parts[origin[split]], content.parts[origin[split]].names
        ranks = np.fromiter((_hash(f"order {seed}", names[i]) for i in indices.tolist()), np.uint64, len(indices))
        order = indices[np.argsort(ranks, kind="stable")][:limit]
        plans.append(SplitPlan(split, part, order, keys[origin[split]], labels.get(origin[split])))
    return plans


def _held_out(names: Sequence[str], share: float, group_by: str | None) -> npt.NDArray[np.bool_]:
    """Which names belong to validation: those whose group's hash lies below the share."""
    pattern = None if group_by is None else re.compile(group_by)
    groups = (stem(name) if pattern is None else pattern.sub("", stem(name)) for name in names)
    hashes = np.fromiter((_hash("validation", group) for group in groups), np.uint64, len(names))
    return hashes < np.uint64(min(int(share * 2**64), 2**64 - 1))


def _hash(purpose: str, name: str) -> int:
    text = f"{purpose}\n{name}".encode("utf-8", "surrogateescape")
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "big")


def stem(name: str) -> str:
    """A picture's name without its extension."""
    return name.rsplit(".", 1)[0] if is_picture_name(name) else name


def member_keys(names: Sequence[str]) -> list[str]:
    """Keys for the members of a shard: unique, ASCII, at most 80 characters, no dots (the first dot ends a key)."""
    keys: list[str] = []
    used: set[str] = set()
    for name in names:
        key = quote_from_bytes(os.fsencode(stem(name).replace(".", "_")), safe="/")
        if len(key) > MAX_KEY:
            key = f"{key[:60]}~{hashlib.sha256(os.fsencode(name)).hexdigest()[:16]}"
        unique, number = key, 2
        while unique in used:
            unique, number = f"{key}~{number}", number + 1
        used.add(unique)
        keys.append(unique)
    return keys
