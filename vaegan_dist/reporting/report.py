"""A run as one self-contained HTML page: nothing is fetched when it is opened.

`page` and the building blocks of `charts.py` serve other reports (sweeps) as well.
"""

import base64
import datetime
import io
import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import yaml
from jinja2 import Environment, PackageLoader, StrictUndefined, select_autoescape
from markupsafe import Markup
from PIL import Image

import vaegan_dist
from vaegan_dist.config import Config
from vaegan_dist.reporting.charts import LineChart, Series, Shares, Span
from vaegan_dist.reporting.curves import PANELS, Curve, collect, nonfinite_places, phase_spans
from vaegan_dist.reporting.endpoint import STATE_FILE
from vaegan_dist.reporting.progress import duration, short
from vaegan_dist.reporting.records import Record, family, integer, number, text
from vaegan_dist.reporting.sinks import read_history
from vaegan_dist.reporting.status import RunStatus, read_status
from vaegan_dist.reporting.trackers import flat

TEMPLATES = resources.files("vaegan_dist.reporting") / "templates"
# Of each kind of sheet; more are left out evenly, the first and the last stay.
FRAMES = 40
SHEET_PIXELS, SHEET_BYTES = 1024, 200_000
EVENTS_SHOWN = 200
# Keys of an evaluation's row that are no results.
PLACES = ("event", "phase", "images_seen", "total_images", "phase_images_seen", "phase_images", "epoch", "seconds")
_SHEET = re.compile(r"(?P<name>.+)-(?P<images>\d{12})-(?P<phase>[a-z0-9][a-z0-9_-]*)\.png")


@dataclass(frozen=True)
class Frame:
    """One sheet of pictures at one place of the run."""

    images_seen: int
    phase: str
    source: Markup
    """data: URL"""


def environment() -> Environment:
    """The templates; what is put into them is escaped."""
    made = Environment(
        loader=PackageLoader("vaegan_dist.reporting"),
        autoescape=select_autoescape(default=True),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    made.filters |= {"duration": duration, "short": short, "thousands": lambda value: f"{value:,}"}
    return made


def page(template: str, title: str, **values: Any) -> str:
    """A whole page from a template that extends `page.html`."""
    made = environment()
    style, script = (Markup((TEMPLATES / name).read_text()) for name in ("style.css", "script.js"))
    now = datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC")
    return made.get_template(template).render(
        title=title, style=style, script=script, made=now, version=vaegan_dist.__version__, **values
    )


def run_report(folder: Path, dataset: Mapping[str, Any] | None = None, now: float | None = None) -> str:
    """The page of a run.

    Args:
        dataset: what its dataset.json says, where that can be read.

    Raises:
        InputError: no run there, or a broken history.
    """
    status, records = read_status(folder, now), read_history(folder / "history.jsonl")
    tree = _config_tree(folder)
    return page(
        "run.html",
        status.run,
        status=status,
        tiles=_tiles(status, records),
        sheets=sheets(folder / "pictures"),
        charts=curve_charts(records),
        evaluations=_evaluations(records),
        phases=_phases(records, tree),
        events=_events(records)[-EVENTS_SHOWN:],
        restarts=_restart_causes(folder),
        time=_where_time_went(records, int((tree.get("training") or {}).get("batch_size", 1))),
        dataset=_dataset_card(dataset, tree),
        made_by=_made_by(dataset),
        changed=_changed(tree),
        config=yaml.safe_dump(tree, sort_keys=False, allow_unicode=True) if tree else "",
    )


def curve_charts(records: Sequence[Record]) -> list[LineChart]:
    """Every measured quantity over images seen, a chart for each family and scale."""
    curves, bad = collect(records), nonfinite_places(records)
    spans = [Span(*span) for span in phase_spans(records)]
    charts = []
    for panel in PANELS:
        own = {key: curve for key, curve in curves.items() if family(key) in panel.families}
        left = {key: curve for key, curve in own.items() if not panel.right(key)}
        right = {key: curve for key, curve in own.items() if key not in left}
        for part, title, unit in ((left, panel.title, panel.unit), (right, panel.right_unit, "")):
            if not part:
                continue
            main = part is left
            charts.append(
                LineChart(
                    title[:1].upper() + title[1:],
                    unit,
                    _series(part),
                    spans=spans,
                    log=panel.log and main,
                    limits=panel.limits if main else None,
                    from_zero=panel.from_zero if main else panel.right_from_zero,
                    marks=sorted({place for key in part for place in bad.get(key, [])}),
                )
            )
    return charts


def _series(curves: Mapping[str, Curve]) -> list[Series]:
    return [Series(key, places, values) for key, (places, values) in curves.items()]


def sheets(folder: Path) -> dict[str, list[Frame]]:
    """Sheets of pictures by name (samples, reconstructions, …), in order, as images inside the page."""
    found: dict[str, list[tuple[int, str, Path]]] = {}
    for path in sorted(folder.glob("*.png")):
        match = _SHEET.fullmatch(path.name)
        if match:
            found.setdefault(match["name"], []).append((int(match["images"]), match["phase"], path))
    order = sorted(found, key=lambda name: (name != "samples", name != "reconstructions", name))
    return {
        name: [Frame(seen, phase, embedded(path)) for seen, phase, path in _evenly(sorted(found[name]), FRAMES)]
        for name in order
    }


def _evenly(items: list[Any], most: int) -> list[Any]:
    if len(items) <= most:
        return items
    return [items[round(index * (len(items) - 1) / (most - 1))] for index in range(most)]


def embedded(path: Path) -> Markup:
    """A picture as a data: URL; a large one is made smaller."""
    content, kind = path.read_bytes(), "png"
    if len(content) > SHEET_BYTES:
        with Image.open(io.BytesIO(content)) as image:
            smaller = image.convert("RGB")
        smaller.thumbnail((SHEET_PIXELS, SHEET_PIXELS))
        buffer = io.BytesIO()
        smaller.save(buffer, "JPEG", quality=85)
        content, kind = buffer.getvalue(), "jpeg"
    return Markup("data:image/{};base64,{}").format(kind, base64.b64encode(content).decode())


def _config_tree(folder: Path) -> dict[str, Any]:
    try:
        tree = yaml.safe_load((folder / "config.yaml").read_text())
    except (OSError, yaml.YAMLError):
        return {}
    return tree if isinstance(tree, dict) else {}


def _changed(tree: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Keys that differ from the defaults; all keys of the phases."""
    defaults = dict(flat(Config().model_dump(mode="json")))
    return [(key, value) for key, value in flat(tree) if defaults.get(key) != value and value]


def _tiles(status: RunStatus, records: Sequence[Record]) -> list[tuple[str, str]]:
    share = f" ({100 * status.images_seen / status.total_images:.0f}%)" if status.total_images else ""
    tiles = [("images seen", f"{status.images_seen:,}{share}"), ("training time", duration(status.seconds_trained))]
    if status.seconds_trained:
        tiles.append(("images per second, mean", f"{status.images_seen / status.seconds_trained:,.0f}"))
    results = next((record for record in reversed(records) if record.get("event") == "evaluation"), {})
    for key in ("fid", "kid", "psnr", "ssim"):
        value = number(results, key)
        if value is not None:
            tiles.append((f"{key.upper()}, last evaluation", short(value)))
    for key, name in (("loss_rec", "reconstruction, nats per image"), ("loss_kl", "KL, nats per image")):
        if key in status.terms:
            tiles.append((name, short(status.terms[key])))
    tiles += [
        ("restarts", f"{status.restarts}"),
        ("rollbacks", f"{status.rollbacks}"),
        ("warnings", f"{status.warnings}"),
    ]
    return tiles


def _evaluations(records: Sequence[Record]) -> dict[str, list[Any]]:
    """A table: the metrics' names, and a row for each evaluation."""
    rows = [record for record in records if record.get("event") == "evaluation"]
    names = list(dict.fromkeys(key for row in rows for key in row if key not in PLACES))
    numbers = [name for name in names if any(number(row, name) is not None for row in rows)]
    about = [name for name in names if name not in numbers]
    return {
        "names": numbers,
        "rows": [
            (integer(row, "images_seen") or 0, text(row, "phase"), [_cell(number(row, name)) for name in numbers])
            for row in rows
        ],
        "about": [(name, text(rows[-1], name)) for name in about if text(rows[-1], name)] if rows else [],
    }


def _cell(value: float | None) -> str:
    return "–" if value is None else short(value)


def _phases(records: Sequence[Record], tree: Mapping[str, Any]) -> list[dict[str, str]]:
    """A row for each phase of the configuration: its budget, and what it took so far."""
    reached: dict[str, tuple[int, float]] = {}
    began: dict[str, float] = {}
    trains: dict[str, str] = {}
    for record in records:
        name, seconds = text(record, "phase"), number(record, "seconds")
        if not name or seconds is None:
            continue
        began[name] = min(began.get(name, math.inf), seconds)
        seen = integer(record, "phase_images_seen") or 0
        images, until = reached.get(name, (0, 0.0))
        reached[name] = (max(images, seen), max(until, seconds))
        trains[name] = text(record, "trains").replace(",", ", ") or trains.get(name, "")
    rows = []
    for phase in tree.get("phases") or []:
        name = str(phase.get("name"))
        images, until = reached.get(name, (0, 0.0))
        took = until - began.get(name, until)
        rows.append(
            {
                "name": name,
                "objective": str(phase.get("objective", "")),
                "trains": trains.get(name, ""),
                "images": f"{images:,}",
                "budget": f"{phase.get('images', 0):,}",
                "time": duration(took) if images else "–",
                "rate": f"{images / took:,.0f}" if took > 0 and images else "–",
                "settings": ", ".join(f"{key}={value}" for key, value in flat(phase.get("settings") or {})),
            }
        )
    return rows


def _events(records: Sequence[Record]) -> list[tuple[str, str, str]]:
    """Restarts, rollbacks, warnings and ends: place, kind, what."""
    events = []
    for record in records:
        kind = str(record.get("event"))
        if kind in ("resume", "rollback", "warning", "end"):
            restarts = integer(record, "restarts")
            what = text(record, "message") or text(record, "reason")
            if kind == "resume":
                what = f"start number {restarts + 1}" if restarts else "continued"
            events.append((f"{integer(record, 'images_seen') or 0:,}", kind, what))
    return events


def _restart_causes(folder: Path) -> list[tuple[str, int]]:
    """Restarts by what ended the start before, from the metrics that were kept; empty where none were."""
    try:
        counters = json.loads((folder / STATE_FILE).read_bytes())["metrics"]["counters"]
        return [
            (labels[0], int(value)) for name, labels, value in counters if name == "vaegan_restarts_total" and value
        ]
    except (OSError, ValueError, KeyError, TypeError, IndexError):
        return []


def _where_time_went(records: Sequence[Record], batch_size: int) -> Shares | None:
    """Training time by what the workers did, from the mean steps of each log interval; the rest is all else."""
    names = {
        "compute_seconds": "computing",
        "communication_seconds": "waiting for other workers",
        "data_wait_seconds": "waiting for data",
    }
    parts = dict.fromkeys(names, 0.0)
    clock, before = 0.0, 0
    for record in records:
        seen = integer(record, "images_seen") or 0
        clock = max(clock, number(record, "seconds") or 0.0)
        if record.get("event") == "train" and "step_seconds" in record:
            steps, before = (seen - before) / batch_size, seen
            for key in parts:
                parts[key] += steps * (number(record, key) or 0.0)
    if not any(parts.values()):
        return None
    rest = ("start, logs, pictures, checkpoints", max(clock - sum(parts.values()), 0.0))
    return Shares([*((names[key], value) for key, value in parts.items()), rest])


def _dataset_card(dataset: Mapping[str, Any] | None, tree: Mapping[str, Any]) -> list[tuple[str, str]]:
    """What the data set is, in rows."""
    path = str((tree.get("data") or {}).get("path", ""))
    rows = [("path", path)] if path else []
    if not dataset:
        return [*rows, ("dataset.json", "could not be read from here")]
    shards = dataset.get("shards") or []
    classes = dataset.get("classes")
    rows += [
        ("split", str(dataset.get("split", ""))),
        ("pictures", f"{sum(int(shard['samples']) for shard in shards):,}"),
        ("size", f"{dataset.get('width')} × {dataset.get('height')} × {dataset.get('channels')}"),
        ("shards", f"{len(shards):,}, {sum(int(shard['bytes']) for shard in shards) / 2**20:,.1f} MiB"),
        ("layout", str(dataset.get("layout", ""))),
    ]
    if classes:
        names = ", ".join(map(str, classes[:20])) + (" …" if len(classes) > 20 else "")
        rows.append(("classes", f"{len(classes)}: {names}"))
    return rows


def _made_by(dataset: Mapping[str, Any] | None) -> list[tuple[str, str]]:
    """What `prepare` wrote down of itself."""
    return [(key, value) for key, value in flat((dataset or {}).get("created") or {}) if value and len(value) < 200]
