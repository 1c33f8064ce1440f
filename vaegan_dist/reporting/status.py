"""How a run does, seen from any machine that sees its folder: from its history, its checkpoints and, if it answers,
its metrics."""

import itertools
import json
import socket
import statistics
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from vaegan_dist.errors import InputError
from vaegan_dist.reporting.endpoint import STATE_FILE
from vaegan_dist.reporting.progress import duration, short
from vaegan_dist.reporting.prometheus import scrape
from vaegan_dist.reporting.records import Record, integer, measurements, number, text
from vaegan_dist.reporting.sinks import read_history

State = Literal["starting", "running", "stale", "done", "stopped", "failed"]

# Without news for so long, or for so many usual pauses between two records, a run counts as stale.
PATIENCE_SECONDS, PATIENCE_PAUSES = 60.0, 5.0
WARNINGS_SHOWN = 5
SCRAPE_SECONDS = 2.0
SEAL, HISTORY = "checkpoint.json", "history.jsonl"


@dataclass(frozen=True)
class RunStatus:
    """One look at a run. Times are in seconds."""

    run: str
    state: State
    message: str
    """why it failed; empty otherwise"""
    phase: str
    images_seen: int
    total_images: int
    images_per_second: float | None
    seconds_left: float | None
    seconds_trained: float
    silent_seconds: float | None
    """since the last sign of life; None before the first"""
    checkpoint: str
    """folder of the newest checkpoint; empty without one"""
    checkpoint_age_seconds: float | None
    restarts: int
    rollbacks: int
    warnings: int
    last_warnings: tuple[str, ...]
    terms: dict[str, float]
    """measured quantities of the last log record"""
    metrics: str
    """address that answers with this run's metrics; empty when none does"""

    def to_json(self) -> str:
        """As one JSON object."""
        return json.dumps(asdict(self), indent=1)


def read_status(folder: Path, now: float | None = None) -> RunStatus:
    """Look at a run.

    Raises:
        InputError: no run there, or a broken history.
    """
    now = time.time() if now is None else now
    if not (folder / "config.yaml").is_file() and not (folder / HISTORY).is_file():
        raise InputError(f"{folder}: no run there; name the folder that holds its history.jsonl")
    records = read_history(folder / HISTORY) if (folder / HISTORY).is_file() else []
    trains = [record for record in records if record.get("event") == "train"]
    last, latest = (trains or [{}])[-1], _latest_place(records)
    address, alive = _ask(folder)
    silent = _silence(folder, now) if alive is None else alive
    state, message = _state(records, trains, silent)
    checkpoint, age = _newest_checkpoint(folder, now)
    warnings = [text(record, "message") for record in records if record.get("event") == "warning"]
    rate = number(last, "images_per_second")
    seen, total = integer(latest, "images_seen") or 0, integer(latest, "total_images") or 0
    left = (total - seen) / rate if rate and state in ("running", "stale", "stopped") else None
    return RunStatus(
        run=folder.resolve().name,
        state=state,
        message=message,
        phase=text(latest, "phase"),
        images_seen=seen,
        total_images=total,
        images_per_second=rate,
        seconds_left=left,
        seconds_trained=number(latest, "seconds") or 0.0,
        silent_seconds=silent,
        checkpoint=checkpoint,
        checkpoint_age_seconds=age,
        restarts=sum(record.get("event") == "resume" for record in records),
        rollbacks=sum(record.get("event") == "rollback" for record in records),
        warnings=len(warnings),
        last_warnings=tuple(warnings[-WARNINGS_SHOWN:]),
        terms=measurements(last),
        metrics=address if alive is not None else "",
    )


def _latest_place(records: Sequence[Record]) -> Record:
    places = [record for record in records if "images_seen" in record and "total_images" in record]
    return max(places, key=lambda record: integer(record, "images_seen") or 0, default={})


def _state(records: Sequence[Record], trains: Sequence[Record], silent: float | None) -> tuple[State, str]:
    ends: dict[str, State] = {"done": "done", "already done": "done", "stopped": "stopped", "failed": "failed"}
    for record in reversed(records):
        if record.get("event") == "end":
            reason = text(record, "reason")
            return ends.get(reason, "failed"), text(record, "message")
        if record.get("event") != "warning":
            break
    if silent is None or silent > _patience(trains):
        return "stale", ""
    return ("running" if trains else "starting"), ""


def _patience(trains: Sequence[Record]) -> float:
    times = [number(record, "seconds") or 0.0 for record in trains[-20:]]
    pauses = [after - before for before, after in itertools.pairwise(times) if after > before]
    return max(PATIENCE_SECONDS, PATIENCE_PAUSES * statistics.median(pauses)) if pauses else 5 * PATIENCE_SECONDS


def _silence(folder: Path, now: float) -> float | None:
    ages = []
    for name in (HISTORY, STATE_FILE):
        try:
            ages.append(now - (folder / name).stat().st_mtime)
        except OSError:
            continue
    return max(min(ages), 0.0) if ages else None


def _ask(folder: Path) -> tuple[str, float | None]:
    """Where the run's metrics are served, and, if they are this run's, seconds since its last step."""
    try:
        kept = json.loads((folder / STATE_FILE).read_bytes())
        address, host, run = str(kept["address"]), str(kept["host"]), str(kept["run"])
    except (OSError, ValueError, KeyError, TypeError):
        return "", None
    name, _, port = address.rpartition(":")
    if name in ("127.0.0.1", "localhost", "::1") and host != socket.gethostname():
        return address, None  # another machine's loopback is not ours
    if name == "0.0.0.0":
        address = f"{'127.0.0.1' if host == socket.gethostname() else host}:{port}"
    values = scrape(address, SCRAPE_SECONDS) if port else {}
    return address, values.get(("vaegan_progress_age_seconds", (("run", run),)))


def _newest_checkpoint(folder: Path, now: float) -> tuple[str, float | None]:
    seals = sorted(folder.glob(f"checkpoint-*/{SEAL}"))
    if not seals:
        return "", None
    return seals[-1].parent.name, max(now - seals[-1].stat().st_mtime, 0.0)


def describe_status(status: RunStatus) -> str:
    """A run's status in lines for people."""
    share = f", {100 * status.images_seen / status.total_images:.0f}%" if status.total_images else ""
    rows = [("run", status.run), ("state", status.state + (f": {status.message}" if status.message else ""))]
    rows.append(("images", f"{status.images_seen:,} of {status.total_images:,}{share}"))
    if status.phase:
        rows.append(("phase", status.phase))
    if status.images_per_second:
        rows.append(("rate", f"{status.images_per_second:,.0f} images/s"))
    if status.seconds_left is not None:
        rows.append(("time left", duration(status.seconds_left)))
    rows.append(("trained for", duration(status.seconds_trained)))
    if status.silent_seconds is not None and status.state not in ("done", "failed", "stopped"):
        rows.append(("last news", f"{duration(status.silent_seconds)} ago"))
    age = status.checkpoint_age_seconds
    rows.append(("checkpoint", f"{status.checkpoint}, {duration(age)} ago" if age is not None else "none yet"))
    if status.restarts or status.rollbacks:
        rows.append(("restarts", f"{status.restarts}, rollbacks {status.rollbacks}"))
    if status.terms:
        rows.append(("terms", "  ".join(f"{key} {short(value)}" for key, value in _terms(status.terms))))
    if status.metrics:
        rows.append(("metrics", f"http://{status.metrics}/metrics"))
    rows += [("warning", warning) for warning in status.last_warnings]
    if status.warnings > len(status.last_warnings):
        rows.append(("", f"{status.warnings - len(status.last_warnings)} earlier warnings in history.jsonl"))
    return "\n".join(f"{name:12} {value}" for name, value in rows)


def _terms(values: dict[str, float]) -> list[tuple[str, float]]:
    wanted = ("loss_", "psnr", "accuracy_", "active_units")
    return [(key, value) for key, value in values.items() if key.startswith(wanted)]
