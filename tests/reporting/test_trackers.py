"""A real MLflow server and TensorBoard read back: the same values on the same axis; trackers that fail without harm."""

import importlib.util
import json
import os
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tests.monitoring.servers import free_port, get, running, wait_until
from tests.needs import missing
from vaegan_dist.config import Config
from vaegan_dist.config_source import load_config
from vaegan_dist.reporting import trackers
from vaegan_dist.reporting.records import Record
from vaegan_dist.reporting.sinks import Fanout
from vaegan_dist.reporting.trackers import Background, flat, open_sinks


@pytest.fixture(scope="module")
def mlflow_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    for package in ("mlflow", "flask"):
        if importlib.util.find_spec(package) is None:
            missing(f"the Python package {package}")
    folder, port = tmp_path_factory.mktemp("mlflow"), free_port()
    url = f"http://127.0.0.1:{port}"
    command = [
        "env",
        "MLFLOW_ALLOW_FILE_STORE=true",
        sys.executable,
        "-m",
        "mlflow",
        "server",
        "--host",
        "127.0.0.1",
        "--port",
        str(port),
        "--workers",
        "1",
    ]
    where = ["--backend-store-uri", f"file://{folder}/store", "--artifacts-destination", f"{folder}/artifacts"]
    with running(*command, *where):
        wait_until(lambda: get(f"{url}/health") == "OK", "the MLflow server")
        yield url


def config_of(*overrides: str) -> Config:
    return load_config("smoke", overrides=overrides)


def train(seen: int, value: float) -> Record:
    return {"event": "train", "phase": "joint", "images_seen": seen, "loss_rec": value, "lr_encoder": 1e-3}


def read_tensorboard(folder: Path) -> dict[str, list[tuple[int, float]]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder))
    events.Reload()
    assert set(events.Tags()["images"]) == {"samples"} and set(events.Tags()["histograms"]) == {"latent/mu"}
    return {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def test_mlflow_and_tensorboard_have_the_same(
    mlflow_server: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mlflow.tracking import MlflowClient

    monkeypatch.setenv("MLFLOW_TRACKING_URI", mlflow_server)
    warnings: list[str] = []
    config = config_of("reporting.mlflow=true", "run.name=tracked")
    rows = [train(64 * n, 100.0 / n) for n in range(1, 6)]
    with Fanout(open_sinks(config, tmp_path, None, warnings.append)) as sinks:
        for row in rows:
            sinks.log(row)
        sinks.pictures("samples", Image.new("L", (8, 8), 128), 320)
        sinks.histogram("latent/mu", np.linspace(-1, 1, 101, dtype=np.float32), 320)
        sinks.log({"event": "end", "reason": "stopped", "images_seen": 320})
    # Another process goes on with the same MLflow run.
    with Fanout(open_sinks(config, tmp_path, 320, warnings.append)) as sinks:
        sinks.log(train(384, 10.0))
        sinks.log({"event": "evaluation", "fid": 12.5, "images_seen": 384})
        sinks.log({"event": "end", "reason": "done", "images_seen": 384})
    assert warnings == []
    client = MlflowClient(mlflow_server)
    experiment = client.get_experiment_by_name("vaegan_dist")
    (run,) = client.search_runs([experiment.experiment_id])
    assert (run.info.run_name, run.info.status) == ("tracked", "FINISHED")
    assert run.data.params["training.batch_size"] == str(config.training.batch_size)
    scalars = read_tensorboard(tmp_path / "tensorboard")
    for tag, points in scalars.items():
        kept = [(m.step, m.value) for m in client.get_metric_history(run.info.run_id, tag)]
        assert [step for step, _ in kept] == [step for step, _ in points]
        # TensorBoard keeps 32 bits.
        assert np.allclose([v for _, v in kept], [v for _, v in points], rtol=1e-6)
    assert scalars["reconstruction/loss_rec"][-1][0] == 384 and "evaluation/fid" in scalars
    assert [m.value for m in client.get_metric_history(run.info.run_id, "latent/mu/p100")] == [1.0]
    assert any("samples" in item.path for item in client.list_artifacts(run.info.run_id, "images"))


@pytest.mark.parametrize(
    ("tracker", "reason"),
    [("mlflow", "MLFLOW_TRACKING_URI is not set"), ("wandb", "wandb")],
)
def test_a_tracker_that_cannot_start_is_a_warning(
    tracker: str, reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if tracker == "mlflow" and importlib.util.find_spec("mlflow") is None:
        missing("the Python package mlflow")
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.setitem(sys.modules, "wandb", None)  # as if it were not installed
    warnings: list[str] = []
    config = config_of(f"reporting.{tracker}=true", "reporting.tensorboard=false")
    with Fanout(open_sinks(config, tmp_path, None, warnings.append)) as sinks:
        for number in range(1, 9):
            sinks.log(train(64 * number, 1.0))
    assert len((tmp_path / "history.jsonl").read_text().splitlines()) == 8
    assert len(warnings) == 2 and reason in warnings[0] and "switched off" in warnings[1]


class Slow:
    """A tracker whose server does not answer."""

    def __init__(self) -> None:
        self.go = threading.Event()
        self.seen = 0

    def log(self, record: Record) -> None:
        self.go.wait(60)
        self.seen += 1

    def pictures(self, name: str, image: Image.Image, images_seen: int) -> None: ...

    def histogram(self, name: str, values: Any, images_seen: int) -> None: ...

    def close(self) -> None: ...


def test_nobody_waits_for_a_slow_tracker(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trackers, "CLOSE_SECONDS", 0.2)
    warnings: list[str] = []
    slow = Slow()
    sink = Background(lambda: slow, "Slow", warnings.append)
    began = time.monotonic()
    for number in range(trackers.HELD_BACK + 50):
        sink.log(train(number, 1.0))
    sink.close()
    assert time.monotonic() - began < 20
    assert [word for word in ("too slow", "within") if any(word in line for line in warnings)] == ["too slow", "within"]
    slow.go.set()


class FakeWandb:
    """What the sink asks of the library, kept in memory."""

    def __init__(self) -> None:
        self.logged: list[dict[str, Any]] = []
        self.axis: dict[str, Any] = {}
        self.id = "abc"
        self.init_arguments: list[dict[str, Any]] = []
        self.exit_code: int | None = None

    def init(self, **arguments: Any) -> "FakeWandb":
        self.init_arguments.append(arguments)
        return self

    def define_metric(self, name: str, **options: Any) -> None:
        self.axis[name] = options

    def log(self, values: dict[str, Any]) -> None:
        self.logged.append(values)

    def finish(self, exit_code: int) -> None:
        self.exit_code = exit_code

    Image = staticmethod(lambda image: ("image", image.size))
    Histogram = staticmethod(lambda values: ("histogram", len(values)))


def test_wandb_gets_the_same_values_on_the_same_axis(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", fake)  # type: ignore[arg-type]
    config = config_of("reporting.wandb=true", "reporting.tensorboard=false")
    warnings: list[str] = []
    for resume_at in (None, 64):
        with Fanout(open_sinks(config, tmp_path, resume_at, warnings.append)) as sinks:
            sinks.log(train(64, 5.0))
            sinks.pictures("samples", Image.new("L", (8, 8)), 64)
            sinks.histogram("latent/mu", np.zeros(5, np.float32), 64)
    assert warnings == []
    assert fake.logged[0] == {"reconstruction/loss_rec": 5.0, "learning_rate/lr_encoder": 1e-3, "images_seen": 64}
    assert fake.logged[1]["samples"] == ("image", (8, 8)) and fake.logged[2]["latent/mu"] == ("histogram", 5)
    assert fake.axis["*"] == {"step_metric": "images_seen"}
    assert [each["id"] for each in fake.init_arguments] == [None, "abc"], "a resumed run goes on as the same one"
    assert fake.exit_code == 0
    assert json.loads((tmp_path / ".trackers.json").read_text()) == {"wandb": "abc"}


def test_parameters_go_by_dotted_names() -> None:
    rows = dict(flat({"a": {"b": 1, "c": None}, "phases": [{"name": "x", "images": 5}], "d": [1, 2]}))
    assert rows == {"a.b": "1", "a.c": "", "phases.x.name": "x", "phases.x.images": "5", "d": "[1, 2]"}
    assert os.sep not in "".join(rows)
