"""Where records and pictures go: the history file, TensorBoard, and the wrappers that keep trackers harmless."""

import json
import logging
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, Self

import numpy as np
import numpy.typing as npt
from PIL import Image

from vaegan_dist.errors import InputError
from vaegan_dist.files import write_whole
from vaegan_dist.reporting.records import Record, decode, encode, family, integer, measurements

logger = logging.getLogger(__name__)


class Sink(Protocol):
    """Takes what a run says. Called from one thread."""

    def log(self, record: Record) -> None:
        """Take a record."""

    def pictures(self, name: str, image: Image.Image, images_seen: int) -> None:
        """Take a sheet of pictures, for example `samples`."""

    def histogram(self, name: str, values: npt.NDArray[np.float32], images_seen: int) -> None:
        """Take values whose distribution is of interest, for example `latent/mu`."""

    def close(self) -> None:
        """Hand over what is still held back; nothing is logged afterwards. May be called twice."""


class History:
    """`history.jsonl`: every record, one line each, on its way to the disk when `log` returns.

    Nothing is doubled or lost over a restart. With `resume_at=n` every row beyond n images is dropped, and so is a
    last line that a crash tore; what a resumed loop then repeats of the rows at exactly n images is recognised and not
    written again. Without `resume_at` the run is new: a history that stands in the place is set aside as `<name>.old`.
    Raises InputError if a row before the last one is not JSON.
    """

    # What a loop may say again at the very image it resumes at; the other kinds are news each time.
    REPEATABLE = frozenset({"train", "phase", "pictures", "evaluation", "checkpoint", "rollback"})

    def __init__(self, path: Path, resume_at: int | None = None) -> None:
        self.path = path
        self._seam: set[tuple[object, ...]] = set()
        path.parent.mkdir(parents=True, exist_ok=True)
        if resume_at is not None:
            self._cut(resume_at)
        elif path.exists() and path.stat().st_size:
            path.replace(path.with_name(path.name + ".old"))
        self._file = path.open("ab", buffering=0)
        self._size = self._file.seek(0, os.SEEK_END)
        self._torn = False

    @property
    def position(self) -> int:
        """Bytes of whole rows, for a checkpoint: they have reached the disk when this returns."""
        os.fsync(self._file.fileno())
        return self._size

    def log(self, record: Record) -> None:
        """Append a row. Raises OSError (disk full); the file then still ends in a whole row after the next one."""
        if self._seam and _repeat_key(record) in self._seam:
            return
        line = encode(record)
        if self._torn:
            self._file.truncate(self._size)
        self._torn = True
        view = memoryview(line)
        while view:
            view = view[self._file.write(view) :]
        self._torn, self._size = False, self._size + len(line)

    def pictures(self, name: str, image: Image.Image, images_seen: int) -> None:
        """Pictures are files of their own; the history only knows the record that names them."""

    def histogram(self, name: str, values: npt.NDArray[np.float32], images_seen: int) -> None:
        """Distributions are not kept."""

    def close(self) -> None:
        """Close the file."""
        if not self._file.closed:
            self._file.close()

    def _cut(self, images_seen: int) -> None:
        if not self.path.exists():
            return
        kept: list[bytes] = []
        place = 0
        rows, content = _rows(self.path)
        for line, record in rows:
            # A row that names no place happened where the row before it did.
            own = integer(record, "images_seen")
            place = place if own is None else own
            if place <= images_seen:
                kept.append(line)
            if place == images_seen and record.get("event") in self.REPEATABLE:
                self._seam.add(_repeat_key(record))
        whole = b"".join(kept)
        if whole != content:
            write_whole(self.path, whole)


def _repeat_key(record: Record) -> tuple[object, ...]:
    # Not the path: a run may have moved.
    return tuple(record.get(key) for key in ("event", "images_seen", "phase", "name"))


def _rows(path: Path) -> tuple[list[tuple[bytes, Record]], bytes]:
    """Lines with their records, without a torn tail; and the file's whole content."""
    content = path.read_bytes()
    rows: list[tuple[bytes, Record]] = []
    broken: tuple[int, ValueError] | None = None
    for index, line in enumerate(content.splitlines(keepends=True), start=1):
        try:
            record = decode(line)
        except ValueError as error:  # covers json.JSONDecodeError and UnicodeDecodeError
            broken = broken or (index, error)
            continue
        if broken:
            cause = broken[1].msg if isinstance(broken[1], json.JSONDecodeError) else str(broken[1])
            raise InputError(
                f"{path}: line {broken[0]} is not a row of a history ({cause}) though whole rows follow it; "
                f"remove that line, or move the file away"
            )
        rows.append((line, record))
    return rows, content


def read_history(path: Path) -> list[Record]:
    """All whole rows of a history; a torn last line (the run may be writing it) is left out.

    Raises InputError if the file is missing, or if a row before the last one is not JSON.
    """
    if not path.is_file():
        raise InputError(f"{path}: no history there; name the run's folder that holds a history.jsonl")
    return [record for _, record in _rows(path)[0]]


def scalars(record: Record) -> list[tuple[str, float]]:
    """What a tracker plots of a record, named `<family>/<key>`; empty for kinds that are no curves."""
    match record.get("event"):
        case "train":
            return [(f"{family(key)}/{key}", value) for key, value in measurements(record).items()]
        case "evaluation":
            return [(f"evaluation/{key}", value) for key, value in measurements(record).items()]
    return []


class TensorBoard:
    """Event files for TensorBoard; the step axis is images_seen, tags are `<family>/<name>`.

    After a restart at `resume_at` images TensorBoard hides what was written beyond them; without `resume_at` the run
    is new and everything in the folder that came before is hidden.
    """

    def __init__(self, folder: Path, resume_at: int | None = None) -> None:
        # Late, because it takes a second to import and few processes write event files.
        from torch.utils.tensorboard import SummaryWriter

        # TensorBoard forgets steps >= purge_step, and the rows at resume_at itself stand.
        purge = 0 if resume_at is None else resume_at + 1
        self._writer: Any = SummaryWriter(str(folder), purge_step=purge)

    def log(self, record: Record) -> None:
        """Write the numbers of a row as scalars, and a warning as text."""
        step = integer(record, "images_seen") or 0
        for name, value in scalars(record):
            self._writer.add_scalar(name, value, step)
        if record.get("event") == "warning":
            self._writer.add_text("warning", str(record.get("message")), step)
        # Flushed each time: what a checkpoint covers must not be lost with the process.
        self._writer.flush()

    def pictures(self, name: str, image: Image.Image, images_seen: int) -> None:
        """Write a sheet as an image."""
        self._writer.add_image(name, np.asarray(image.convert("RGB")), images_seen, dataformats="HWC")
        self._writer.flush()

    def histogram(self, name: str, values: npt.NDArray[np.float32], images_seen: int) -> None:
        """Write a histogram."""
        self._writer.add_histogram(name, values, images_seen)
        self._writer.flush()

    def close(self) -> None:
        """Close the event file."""
        self._writer.close()


class Guarded:
    """Keeps a tracker's trouble away from training.

    The first failure is one warning that names the sink and the cause; after `failures` in a row the sink is switched
    off, which is said once as well. `warn` takes the lines (default: this module's logger).
    """

    def __init__(
        self, sink: Sink, *, name: str = "", failures: int = 5, warn: Callable[[str], None] | None = None
    ) -> None:
        self._sink: Sink | None = sink
        self._name = name or type(sink).__name__
        self._failures, self._in_a_row, self._warned = failures, 0, False
        self._warn = warn or logger.warning

    @property
    def active(self) -> bool:
        """Whether the sink is still written to."""
        return self._sink is not None

    def log(self, record: Record) -> None:
        """Pass a record on."""
        self._attempt(lambda sink: sink.log(record))

    def pictures(self, name: str, image: Image.Image, images_seen: int) -> None:
        """Pass pictures on."""
        self._attempt(lambda sink: sink.pictures(name, image, images_seen))

    def histogram(self, name: str, values: npt.NDArray[np.float32], images_seen: int) -> None:
        """Pass values on."""
        self._attempt(lambda sink: sink.histogram(name, values, images_seen))

    def close(self) -> None:
        """Close the sink."""
        self._attempt(lambda sink: sink.close())

    def _attempt(self, action: Callable[[Sink], None]) -> None:
        if self._sink is None:
            return
        try:
            action(self._sink)
        except Exception as error:
            self._in_a_row += 1
            if not self._warned:
                self._warned = True
                self._warn(f"{self._name} failed ({_cause(error)}); training goes on without what it missed")
            if self._in_a_row >= self._failures:
                self._sink = None
                self._warn(f"{self._name} is switched off after {self._in_a_row} failures in a row ({_cause(error)})")
        else:
            self._in_a_row = 0


def _cause(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


class Fanout:
    """Several sinks as one. Each gets everything, even if one before it raises; then the first error is raised."""

    def __init__(self, sinks: Iterable[Sink]) -> None:
        self._sinks = tuple(sinks)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def log(self, record: Record) -> None:
        """Hand a record to every sink."""
        self._each(lambda sink: sink.log(record))

    def pictures(self, name: str, image: Image.Image, images_seen: int) -> None:
        """Hand pictures to every sink."""
        self._each(lambda sink: sink.pictures(name, image, images_seen))

    def histogram(self, name: str, values: npt.NDArray[np.float32], images_seen: int) -> None:
        """Hand values to every sink."""
        self._each(lambda sink: sink.histogram(name, values, images_seen))

    def close(self) -> None:
        """Close every sink."""
        self._each(lambda sink: sink.close())

    def _each(self, action: Callable[[Sink], None]) -> None:
        first: Exception | None = None
        for sink in self._sinks:
            try:
                action(sink)
            except Exception as error:
                first = first or error
        if first:
            raise first
