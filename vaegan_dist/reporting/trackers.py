"""Trackers beside the history: MLflow and Weights & Biases, each an extra that nothing requires.

Both get what TensorBoard gets: the same names, values and step axis (images_seen). They talk to servers, so they live
behind `Background`: training never waits for them, and their trouble is a warning.
"""

import json
import os
import queue
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from vaegan_dist.config import Config
from vaegan_dist.errors import ConfigError
from vaegan_dist.files import write_whole
from vaegan_dist.reporting.records import Record, integer, text
from vaegan_dist.reporting.sinks import Guarded, History, Sink, TensorBoard, scalars

IDS_FILE = ".trackers.json"
HELD_BACK = 1000
CLOSE_SECONDS = 20.0
# MLflow takes so many parameters at a time, and as many characters of each.
PARAMETERS, CHARACTERS = 100, 500
MLFLOW_ENDS = {"done": "FINISHED", "already done": "FINISHED", "stopped": "KILLED", "failed": "FAILED"}

Values = npt.NDArray[np.float32]


def open_sinks(config: Config, folder: Path, resume_at: int | None, warn: Callable[[str], None]) -> list[Sink]:
    """The history, and the trackers that the configuration asks for.

    Args:
        resume_at: see `History`.
        warn: takes a tracker's trouble; called from other threads as well.
    """
    sinks: list[Sink] = [History(folder / "history.jsonl", resume_at)]
    settings = config.reporting
    if settings.tensorboard:
        sinks.append(Guarded(TensorBoard(folder / "tensorboard", resume_at), name="TensorBoard", warn=warn))
    if settings.mlflow:
        sinks.append(Background(lambda: MLflow(config, folder, resume_at), "MLflow", warn))
    if settings.wandb:
        sinks.append(Background(lambda: WeightsAndBiases(config, folder, resume_at), "Weights & Biases", warn))
    return sinks


class Late:
    """A sink that is made when it is first used, and again after that failed."""

    def __init__(self, make: Callable[[], Sink]) -> None:
        self._make, self._sink = make, None

    _sink: Sink | None

    def _made(self) -> Sink:
        if self._sink is None:
            self._sink = self._make()
        return self._sink

    def log(self, record: Record) -> None:
        """Pass a record on."""
        self._made().log(record)

    def pictures(self, name: str, image: Image.Image, images_seen: int) -> None:
        """Pass pictures on."""
        self._made().pictures(name, image, images_seen)

    def histogram(self, name: str, values: Values, images_seen: int) -> None:
        """Pass values on."""
        self._made().histogram(name, values, images_seen)

    def close(self) -> None:
        """Close what was made."""
        if self._sink is not None:
            self._sink.close()


class Background:
    """A sink in a thread of its own, with a bounded queue: a slow one loses the newest and says so, once."""

    def __init__(self, make: Callable[[], Sink], name: str, warn: Callable[[str], None]) -> None:
        self._name, self._warn = name, warn
        self._sink = Guarded(Late(make), name=name, warn=warn)
        self._queue: queue.Queue[Callable[[Sink], None] | None] = queue.Queue(HELD_BACK)
        self._lost = False
        self._thread = threading.Thread(target=self._run, name=f"tracker {name}", daemon=True)
        self._thread.start()

    def log(self, record: Record) -> None:
        """Queue a record."""
        self._put(lambda sink: sink.log(record))

    def pictures(self, name: str, image: Image.Image, images_seen: int) -> None:
        """Queue pictures."""
        self._put(lambda sink: sink.pictures(name, image, images_seen))

    def histogram(self, name: str, values: Values, images_seen: int) -> None:
        """Queue values."""
        self._put(lambda sink: sink.histogram(name, values, images_seen))

    def close(self) -> None:
        """Give the sink a while for what is left."""
        if not self._thread.is_alive():
            return
        deadline = time.monotonic() + CLOSE_SECONDS
        try:
            self._queue.put(None, timeout=CLOSE_SECONDS)
        except queue.Full:
            pass
        else:
            self._thread.join(max(deadline - time.monotonic(), 0.0))
        if self._thread.is_alive():
            self._warn(f"{self._name} has not taken everything within {CLOSE_SECONDS:g} s; the rest is lost to it")

    def _put(self, item: Callable[[Sink], None]) -> None:
        try:
            self._queue.put_nowait(item)
        except queue.Full:
            if not self._lost:
                self._lost = True
                self._warn(f"{self._name} is too slow: {HELD_BACK} entries wait, further ones are lost to it")

    def _run(self) -> None:
        while (item := self._queue.get()) is not None:
            item(self._sink)
        self._sink.close()


class MLflow:
    """A run on the MLflow server of MLFLOW_TRACKING_URI; goes on as the same MLflow run after a restart."""

    def __init__(self, config: Config, folder: Path, resume_at: int | None) -> None:
        try:
            from mlflow.entities import Metric, Param, RunTag
            from mlflow.tracking import MlflowClient
        except ImportError:
            raise ConfigError("mlflow is not installed; pip install 'vaegan-dist[mlflow]'") from None
        uri = os.environ.get("MLFLOW_TRACKING_URI")
        if not uri:
            raise ConfigError("MLFLOW_TRACKING_URI is not set; set it to the server's address")
        self._metric: Any = Metric
        self._client: Any = MlflowClient(tracking_uri=uri)
        known = _read_ids(folder).get("mlflow") if resume_at is not None else None
        if known:
            self._client.update_run(known, status="RUNNING")
        self._run: str = known or self._create(config)
        _keep_id(folder, "mlflow", self._run)
        parameters = [Param(key, value[:CHARACTERS]) for key, value in flat(config.model_dump(mode="json"))]
        tags = [RunTag("vaegan.run", config.run.name)]
        for start in range(0, len(parameters) if not known else 0, PARAMETERS):
            self._client.log_batch(self._run, params=parameters[start : start + PARAMETERS], tags=tags)

    def _create(self, config: Config) -> str:
        name = config.reporting.mlflow_experiment
        found = self._client.get_experiment_by_name(name)
        experiment = found.experiment_id if found else self._client.create_experiment(name)
        run: str = self._client.create_run(experiment, run_name=config.run.name).info.run_id
        return run

    def log(self, record: Record) -> None:
        """Write the numbers of a row; the end of the run is that of the MLflow run."""
        step, now = integer(record, "images_seen") or 0, time.time_ns() // 1_000_000
        metrics = [self._metric(name, value, now, step) for name, value in scalars(record)]
        if metrics:
            self._client.log_batch(self._run, metrics=metrics)
        if record.get("event") == "end":
            self._client.set_terminated(self._run, MLFLOW_ENDS.get(text(record, "reason"), "FAILED"))

    def pictures(self, name: str, image: Image.Image, images_seen: int) -> None:
        """Write a sheet as an image of that step."""
        self._client.log_image(self._run, image.convert("RGB"), key=name, step=images_seen)

    def histogram(self, name: str, values: Values, images_seen: int) -> None:
        """MLflow has no histograms; its quartiles are metrics."""
        now = time.time_ns() // 1_000_000
        quartiles = zip((0, 25, 50, 75, 100), np.percentile(values, (0, 25, 50, 75, 100)).tolist(), strict=True)
        metrics = [self._metric(f"{name}/p{share}", value, now, images_seen) for share, value in quartiles]
        self._client.log_batch(self._run, metrics=metrics)

    def close(self) -> None:
        """Every call has arrived already."""


class WeightsAndBiases:
    """A run of Weights & Biases; goes on as the same one after a restart."""

    def __init__(self, config: Config, folder: Path, resume_at: int | None) -> None:
        try:
            wandb: Any = import_module("wandb")
        except ImportError:
            raise ConfigError("wandb is not installed; pip install 'vaegan-dist[wandb]'") from None
        known = _read_ids(folder).get("wandb") if resume_at is not None else None
        self._wandb = wandb
        self._run: Any = wandb.init(
            project=config.reporting.wandb_project,
            name=config.run.name,
            id=known,
            resume="allow" if known else None,
            dir=str(folder),
            config=config.model_dump(mode="json"),
        )
        # Its own step may not go back, as a resumed run does; the axis is a metric instead.
        self._run.define_metric("images_seen")
        self._run.define_metric("*", step_metric="images_seen")
        _keep_id(folder, "wandb", str(self._run.id))
        self._ended_badly = False

    def log(self, record: Record) -> None:
        """Write the numbers of a row."""
        values = dict(scalars(record))
        if values:
            self._run.log({**values, "images_seen": integer(record, "images_seen") or 0})
        self._ended_badly = record.get("event") == "end" and text(record, "reason") == "failed"

    def pictures(self, name: str, image: Image.Image, images_seen: int) -> None:
        """Write a sheet."""
        self._run.log({name: self._wandb.Image(image.convert("RGB")), "images_seen": images_seen})

    def histogram(self, name: str, values: Values, images_seen: int) -> None:
        """Write a histogram."""
        self._run.log({name: self._wandb.Histogram(values), "images_seen": images_seen})

    def close(self) -> None:
        """Hand over what is held back."""
        self._run.finish(exit_code=int(self._ended_badly))


def flat(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """A configuration's keys as dotted paths, with their values as texts; phases go by their names."""
    for key, value in tree.items():
        if isinstance(value, Mapping):
            yield from flat(value, f"{prefix}{key}.")
        elif isinstance(value, list) and value and isinstance(value[0], Mapping):
            for number, item in enumerate(value):
                yield from flat(item, f"{prefix}{key}.{item.get('name', number)}.")
        else:
            yield prefix + key, "" if value is None else str(value)


def _read_ids(folder: Path) -> dict[str, str]:
    """The trackers' own names of this run, from an earlier start."""
    try:
        ids = json.loads((folder / IDS_FILE).read_bytes())
    except (OSError, ValueError):
        return {}
    return {str(key): str(value) for key, value in ids.items()} if isinstance(ids, dict) else {}


def _keep_id(folder: Path, tracker: str, identity: str) -> None:
    with _IDS_LOCK:
        write_whole(folder / IDS_FILE, json.dumps({**_read_ids(folder), tracker: identity}).encode())


_IDS_LOCK = threading.Lock()
