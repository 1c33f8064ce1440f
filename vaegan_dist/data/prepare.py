"""Pictures of any source → shards + dataset.json: the same input and options give the same bytes.

open source → plan (split, shuffle) → decode, fit, encode in threads → shards, in order → manifests, last.
"""

import fcntl
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from vaegan_dist.data import manifest as manifests
from vaegan_dist.data.manifest import MANIFEST_NAME, Manifest
from vaegan_dist.data.plan import make_plan
from vaegan_dist.data.prepare_options import PrepareOptions
from vaegan_dist.data.prepare_work import Progress, Work, make_recipe
from vaegan_dist.data.shard_writer import JOURNAL_NAME, Broken, Journal, same_identity
from vaegan_dist.data.sources import labels_state, number_classes, open_source, with_labels
from vaegan_dist.data.sources_base import Source
from vaegan_dist.errors import InputError

__all__ = ["Broken", "PrepareOptions", "Prepared", "prepare"]

PLAN_VERSION = 1
NAMED_BROKEN = 1_000
SPLITS = ("train", "validation", "test")


@dataclass(frozen=True)
class Prepared:
    """What a preparation made, or found made."""

    manifests: Mapping[str, Path]
    """the dataset.json of each split"""
    samples: Mapping[str, int]
    """pictures per split"""
    bytes: int
    """size of all shards together"""
    broken: tuple[Broken, ...]
    """pictures left out because they cannot be used"""
    ignored: Mapping[str, int]
    """what the source holds besides pictures, counted by extension"""
    reused: bool
    """the whole data set stood there already"""
    continued: int = 0
    """shards that an interrupted run had finished"""


def _silent(done: int, total: int | None) -> None:
    pass


def prepare(options: PrepareOptions, progress: Progress = _silent) -> Prepared:
    """Make a data set; continue an interrupted one; say so when it is already there.

    Args:
        options: what to make of what.
        progress: called with the pictures done and their total.

    Raises:
        InputError: the source cannot be used, holds more broken pictures than `max_bad`, or the output folder holds
            something else.
    """
    output = Path(options.output)
    source = open_source(options.source, options.format, output)
    identity = _identity(options, source)
    try:
        with _locked(output):
            if options.overwrite:
                _clear(output)
            elif found := _finished(output, identity):
                return found
            return _make(options, source, identity, output, progress)
    except OSError as error:
        where = f"{error.filename or output}: {error.strerror or error}"
        raise InputError(f"{where}; check the space and the permissions, then run the same command again") from None


def _make(
    options: PrepareOptions, source: Source, identity: Mapping[str, Any], output: Path, progress: Progress
) -> Prepared:
    journal = Journal(output, identity)
    try:
        content = with_labels(source.load(), options.labels)
        classes, labels = number_classes(content, options.source)
        plans = make_plan(
            content,
            labels,
            seed=options.seed,
            validation=options.validation,
            validation_by=options.validation_by,
            limit=options.limit,
            source=options.source,
        )
        recipe = make_recipe(options, plans[0])
        work = Work(options, recipe, output, journal, progress, sum(map(len, plans)))
        continued = sum(len(journal.finished(plan.split)) for plan in plans)
        shards = {plan.split: work.write(plan) for plan in plans}
    finally:
        journal.close()
    created = {
        **identity,
        "splits": list(shards),
        "broken_count": len(work.broken),
        "broken": [asdict(item) for item in work.broken[:NAMED_BROKEN]],
        "ignored": dict(sorted(content.ignored.items())),
    }
    written: dict[str, Path] = {}
    for split in sorted(shards, key=lambda name: name == "train"):  # train last: its presence means all are complete
        manifest = Manifest(
            split=split,
            layout=recipe.layout,
            height=recipe.height,
            width=recipe.width,
            channels=recipe.target.channels,
            classes=classes,
            shards=tuple(shards[split]),
            created=created,
        )
        written[split] = manifests.write_manifest(output / split, manifest)
    journal.remove()
    return Prepared(
        manifests={split: written[split] for split in shards},
        samples={split: sum(shard.samples for shard in infos) for split, infos in shards.items()},
        bytes=sum(shard.bytes for infos in shards.values() for shard in infos),
        broken=tuple(work.broken),
        ignored=content.ignored,
        reused=False,
        continued=continued,
    )


def _identity(options: PrepareOptions, source: Source) -> dict[str, Any]:
    """What decides the bytes of the result."""
    return {
        "version": PLAN_VERSION,
        "options": options.content(),
        "source": {"kind": source.kind, "fingerprint": source.fingerprint},
        "labels": labels_state(options.labels),
    }


def _finished(output: Path, identity: Mapping[str, Any]) -> Prepared | None:
    """A complete data set of this identity, or None; anything else in the way is an error."""
    if not (output / "train" / MANIFEST_NAME).is_file():
        strange = None if (output / JOURNAL_NAME).is_file() else next(_own_files(output), None)
        if strange is not None:
            raise InputError(
                f"{output}: holds {strange.name} of no known data set; use --overwrite, or another output folder"
            )
        return None
    train = manifests.read_manifest(output / "train" / MANIFEST_NAME)
    same_identity(output, {key: train.created.get(key) for key in identity}, identity, "a data set")
    found = {split: output / split / MANIFEST_NAME for split in train.created["splits"]}
    read = {split: manifests.read_manifest(path) for split, path in found.items()}
    for split, path in found.items():
        for shard in read[split].shards:
            file = path.parent / shard.name
            if not file.is_file() or file.stat().st_size != shard.bytes:
                raise InputError(
                    f"{file}: missing or of another size than {path} says; use --overwrite to make it again"
                )
    (output / JOURNAL_NAME).unlink(missing_ok=True)  # the last run was stopped between its last two steps
    return Prepared(
        manifests=found,
        samples={split: manifest.samples for split, manifest in read.items()},
        bytes=sum(shard.bytes for manifest in read.values() for shard in manifest.shards),
        broken=tuple(Broken(**item) for item in train.created["broken"]),
        ignored=train.created["ignored"],
        reused=True,
    )


def _own_files(output: Path) -> Iterator[Path]:
    """Everything below the output folder that a preparation writes; manifests first, so that none outlives a shard."""
    yield from (path for split in SPLITS if (path := output / split / MANIFEST_NAME).is_file())
    if (output / JOURNAL_NAME).is_file():
        yield output / JOURNAL_NAME
    for split in SPLITS:
        yield from sorted((output / split).glob("shard-[0-9][0-9][0-9][0-9][0-9][0-9].tar"))
        yield from sorted((output / split).glob(".shard-[0-9][0-9][0-9][0-9][0-9][0-9].tar.tmp"))


def _clear(output: Path) -> None:
    for path in _own_files(output):
        path.unlink()


@contextmanager
def _locked(output: Path) -> Iterator[None]:
    """Only one preparation at a time writes to a folder."""
    output.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(output, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InputError(f"{output}: another preparation is writing there; wait for it or stop it") from None
        yield
    finally:
        os.close(descriptor)
