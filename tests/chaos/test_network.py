"""Three nodes with addresses of their own, started with the manifests' commands; one is cut off while it trains."""

import json
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.chaos.network import Node, available, nodes, ray_start
from tests.k8s.rendering import Manifest, render
from tests.training.runs import rows_of, tensors_of
from vaegan_dist.cluster.runtime import train_local
from vaegan_dist.config_source import load_config

pytestmark = [pytest.mark.ray, pytest.mark.chaos, pytest.mark.timeout(1200)]
WORKERS = ("worker-1", "worker-2")
IMAGES = 128_000
SETTINGS = (
    f"phases=[{{name: vae, objective: vae, images: {IMAGES // 2}}}, "
    f"{{name: joint, objective: vaegan, images: {IMAGES // 2}}}]",
    "checkpoint.images=8000",
    "reporting.log_images=8000",
    "reporting.sample_images=1000000",
    "reporting.tensorboard=false",
)


@pytest.fixture(scope="module")
def cluster() -> Iterator[tuple[list[Node], Manifest, Path]]:
    """A head and two workers as the overlay `dev` describes them, and its RayJob."""
    lacking = available()
    if lacking:
        pytest.skip(f"{lacking} is missing")
    objects = render("dev")
    job = next(each for each in objects if each["kind"] == "RayJob")
    spec = job["spec"]["rayClusterSpec"]
    pod = spec["headGroupSpec"]["template"]["spec"]["containers"][0]
    # Unix sockets have short paths, so not below pytest's own folder.
    with tempfile.TemporaryDirectory(prefix="vg", dir="/tmp") as name:
        folder = Path(name)
        given = {each["name"]: each["value"] for each in pod["env"] if "value" in each}
        given |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "0123456789abcdef" * 4, "VAEGAN_HOME": str(folder)}
        for config in (each for each in objects if each["kind"] == "ConfigMap"):
            for file, text in config["data"].items():
                (folder / file).write_text(text)
        with nodes(("head", *WORKERS), folder, given) as made:
            head, *workers = made
            head.keep_running(ray_start(spec["headGroupSpec"], 1, None))
            _until(lambda: _alive(head) == 1, 120, "the head is up")
            for worker in workers:
                worker.keep_running(ray_start(spec["workerGroupSpecs"][0], 1, head.address))
            _until(lambda: _alive(head) == 3, 120, "all nodes are there")
            yield made, job, folder


def _until(true: Callable[[], bool], seconds: float, what: str) -> float:
    started = time.monotonic()
    while not true():
        assert time.monotonic() - started < seconds, f"waited {seconds:g} s until {what}"
        time.sleep(0.5)
    return time.monotonic() - started


def _alive(head: Node) -> int:
    """Nodes that the head counts."""
    script = "import json, ray; ray.init('auto', logging_level=50); print(sum(n['Alive'] for n in ray.nodes()))"
    done = head.run(["python", "-c", script], timeout=120)
    return int(done.stdout.strip().splitlines()[-1]) if done.returncode == 0 and done.stdout.strip() else 0


def _rows(history: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in history.read_text().splitlines()] if history.exists() else []


def test_a_node_is_cut_off_and_returns(
    cluster: tuple[list[Node], Manifest, Path], digits: Path, tmp_path: Path
) -> None:
    (head, _, cut), job, folder = cluster
    words = job["spec"]["entrypoint"].replace("/etc/vaegan", str(folder)).replace("/shared", str(folder)).split()
    assert words[:2] == ["python", "jobs/train.py"]
    words += ["--data", str(digits), "--workers", "2", *SETTINGS]
    submit = ["vaegan-dist", "submit", f"--address=http://{head.address}:8265", "--job-id=cut", "--", *words]
    history = folder / "runs" / "smoke" / "history.jsonl"
    with (tmp_path / "job.log").open("wb") as log:
        process = subprocess.Popen(
            head.command(submit), env=head.environment, cwd="/", stdout=log, stderr=subprocess.STDOUT
        )
        try:
            _until(lambda: any(row["event"] == "checkpoint" for row in _rows(history)), 240, "a checkpoint stands")
            before = cut.starts
            cut.cut_off()
            seen = _rows(history)[-1]["images_seen"]
            _until(lambda: _alive(head) == 2, 180, "the head has missed the node")
            cut.reconnect()
            back = _until(lambda: _alive(head) == 3, 240, "the node is back")
            assert cut.starts > before, "its Ray was started again, as a kubelet would"
            assert process.wait(600) == 0, (tmp_path / "job.log").read_text()[-3000:]
        finally:
            process.kill()
            process.wait()
    assert seen < IMAGES, "the cut came in time"
    print(json.dumps({"cut_at_images": seen, "seconds_until_the_node_was_back": round(back, 1)}))
    config = load_config("smoke", overrides=[
        f"run.storage={tmp_path}", "run.name=smoke", f"data.path={digits}", "cluster.workers=2",
        "training.torch_threads=1", *SETTINGS,
    ])  # fmt: skip
    train_local(config, lambda record: None)
    assert tensors_of(folder / "runs" / "smoke") == tensors_of(tmp_path / "smoke")
    kinds = ("train", "phase")
    storm, calm = ([row for row in rows_of(each) if row["event"] in kinds]
                   for each in (folder / "runs" / "smoke", tmp_path / "smoke"))  # fmt: skip
    assert storm == calm
