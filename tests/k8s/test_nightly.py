"""The creator of the CronJob against an API server that is a stub: what it asks for is recorded and checked."""

import json
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import pytest

from tests.k8s.rendering import Manifest, render
from tests.k8s.rules import operator_refuses, violations
from tests.k8s.test_manifests import check
from vaegan_dist.cluster.nightly import Cluster, copy_of, run, scheduled_date
from vaegan_dist.errors import ConfigError, InputError, VaeganError

TOKEN = "from-the-kubelet"
PATH = "/apis/ray.io/v1/namespaces/vaegan/rayjobs"
NIGHT = "vaegan-nightly-29730330"  # 2026-07-12 01:30 UTC, in minutes


class ApiServer:
    """RayJobs in memory behind HTTP, with the API server's answers; `ends` is what a RayJob's status becomes."""

    def __init__(self) -> None:
        self.jobs: dict[str, Manifest] = {}
        self.requests: list[tuple[str, str]] = []
        self.ends: list[Manifest] = [{}, {"jobDeploymentStatus": "Complete", "jobStatus": "SUCCEEDED"}]
        self.failures: list[int] = []
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        self.url = f"http://127.0.0.1:{self.server.server_port}"

    def answer(self, method: str, url: str, token: str | None, body: Manifest | None) -> tuple[int, Manifest]:
        self.requests.append((method, url))
        parts = urlsplit(url)
        name = parts.path.removeprefix(PATH).strip("/")
        if token != f"Bearer {TOKEN}":
            return 403, {"message": "rayjobs.ray.io is forbidden"}
        if self.failures:
            return self.failures.pop(0), {"message": "etcdserver: leader changed"}
        if method == "POST" and body is not None:
            if body["metadata"]["name"] in self.jobs:
                return 409, {"message": "already exists"}
            self.jobs[body["metadata"]["name"]] = body
            return 201, body
        if name:
            if name not in self.jobs:
                return 404, {"message": f'rayjobs.ray.io "{name}" not found'}
            job = self.jobs[name]
            if not job["spec"].get("suspend"):
                job["status"] = self.ends.pop(0) if len(self.ends) > 1 else self.ends[0]
            return 200, job
        key, value = parse_qs(parts.query)["labelSelector"][0].split("=")
        return 200, {
            "items": [job for job in self.jobs.values() if job["metadata"].get("labels", {}).get(key) == value]
        }

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        stub = self

        class Handler(BaseHTTPRequestHandler):
            def _do(self) -> None:
                length = int(self.headers.get("Content-Length", 0))
                body = json.loads(self.rfile.read(length)) if length else None
                code, content = stub.answer(self.command, self.path, self.headers.get("Authorization"), body)
                data = json.dumps(content).encode()
                self.send_response(code)
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            do_GET = do_POST = _do  # noqa: N815

            def log_message(self, *args: Any) -> None:
                """Quiet."""

        return Handler


@pytest.fixture
def api() -> Iterator[ApiServer]:
    stub = ApiServer()
    thread = threading.Thread(target=stub.server.serve_forever, args=(0.05,))
    thread.start()
    yield stub
    stub.server.shutdown()
    thread.join()
    stub.server.server_close()


@pytest.fixture
def account(tmp_path: Path) -> Path:
    (tmp_path / "namespace").write_text("vaegan\n")
    (tmp_path / "token").write_text(TOKEN)
    return tmp_path


@pytest.fixture(scope="module")
def night() -> list[Manifest]:
    return render("cron")


@pytest.fixture
def template(night: list[Manifest], api: ApiServer) -> Manifest:
    """The overlay's own template, as the API server would hand it out."""
    job: Manifest = json.loads(json.dumps(next(thing for thing in night if thing["kind"] == "RayJob")))
    job["metadata"] |= {"uid": "1", "resourceVersion": "7", "finalizers": ["ray.io/rayjob-finalizer"]}
    job["status"] = {"jobDeploymentStatus": "Suspended", "jobId": "old", "rayClusterName": "old"}
    api.jobs["vaegan-nightly"] = job
    return job


def test_the_request_is_a_valid_rayjob_of_its_own(
    api: ApiServer, account: Path, template: Manifest, shared: Path, tmp_path: Path
) -> None:
    assert run(Cluster(account, api.url), "vaegan-nightly", NIGHT, "uid-of-the-job", 0.01) == 0
    made = dict(api.jobs[NIGHT])
    made.pop("status")
    assert made["metadata"]["ownerReferences"] == [
        {"apiVersion": "batch/v1", "kind": "Job", "name": NIGHT, "uid": "uid-of-the-job"}
    ]
    assert set(made["metadata"]) == {"name", "labels", "annotations", "ownerReferences"}
    assert "suspend" not in made["spec"]
    assert "--name nightly-2026-07-12" in made["spec"]["entrypoint"]
    assert made["spec"]["rayClusterSpec"] == template["spec"]["rayClusterSpec"]
    assert check(shared, [made], tmp_path) == [True]
    assert [*operator_refuses(made), *violations(made)] == []


def test_the_role_allows_exactly_what_is_asked(
    api: ApiServer, account: Path, template: Manifest, night: list[Manifest]
) -> None:
    run(Cluster(account, api.url), "vaegan-nightly", NIGHT, None, 0.01)
    asked = {
        "create" if method == "POST" else "list" if "?" in url else "get" for method, url in api.requests
    }  # fmt: skip
    (rule,) = next(thing for thing in night if thing["kind"] == "Role")["rules"]
    assert (rule["apiGroups"], rule["resources"], set(rule["verbs"])) == (["ray.io"], ["rayjobs"], asked)


def test_a_second_pod_finds_the_rayjob_of_the_first(api: ApiServer, account: Path, template: Manifest) -> None:
    cluster = Cluster(account, api.url)
    cluster.create(copy_of(template, NIGHT, "2026-07-12"))
    assert run(cluster, "vaegan-nightly", NIGHT, None, 0.01) == 0
    assert sorted(api.jobs) == ["vaegan-nightly", NIGHT]


def test_an_unfinished_night_keeps_the_next_from_starting(api: ApiServer, account: Path, template: Manifest) -> None:
    cluster = Cluster(account, api.url)
    cluster.create(copy_of(template, "vaegan-nightly-1", "1970-01-01"))
    with pytest.raises(VaeganError, match="vaegan-nightly-1 of an earlier night has not ended"):
        run(cluster, "vaegan-nightly", NIGHT, None, 0.01)
    assert NIGHT not in api.jobs


def test_a_failed_rayjob_is_a_failed_night(api: ApiServer, account: Path, template: Manifest) -> None:
    api.ends = [{"jobDeploymentStatus": "Failed", "reason": "DeadlineExceeded", "message": "too long"}]
    with pytest.raises(VaeganError, match=f"RayJob {NIGHT} ended Failed: DeadlineExceeded too long"):
        run(Cluster(account, api.url), "vaegan-nightly", NIGHT, None, 0.01)


def test_a_server_that_stumbles_is_asked_again(api: ApiServer, account: Path, template: Manifest) -> None:
    cluster = Cluster(account, api.url)
    cluster.create(copy_of(template, NIGHT, "2026-07-12"))
    api.ends = [{}, {"jobDeploymentStatus": "Complete", "jobStatus": "SUCCEEDED"}]
    from vaegan_dist.cluster.nightly import _wait

    api.failures = [500, 503, 429]
    assert _wait(cluster, NIGHT, 0.01) == 0
    assert api.failures == []


def test_kueue_starts_the_copies(api: ApiServer, account: Path) -> None:
    queued = next(thing for thing in render("cron", ("kueue",)) if thing["kind"] == "RayJob")
    assert "kueue.x-k8s.io/queue-name" not in queued["metadata"]["labels"]
    made = copy_of(queued, NIGHT, "2026-07-12")
    assert made["metadata"]["labels"]["kueue.x-k8s.io/queue-name"] == "vaegan"
    assert made["spec"]["suspend"] is True


def test_errors_name_the_remedy(api: ApiServer, account: Path, template: Manifest) -> None:
    cluster = Cluster(account, api.url)
    with pytest.raises(InputError, match="is the template applied, and KubeRay installed"):
        run(cluster, "absent", NIGHT)
    template["spec"]["suspend"] = False
    with pytest.raises(ConfigError, match="is not suspended"):
        run(cluster, "vaegan-nightly", NIGHT)
    with pytest.raises(ConfigError, match="the operator takes 47"):
        copy_of(template, "x" * 48, "")
    (account / "token").write_text("stale")
    with pytest.raises(ConfigError, match=r"403 .*get, list and create"):
        run(cluster, "vaegan-nightly", NIGHT)
    (account / "token").unlink()
    with pytest.raises(ConfigError, match="automountServiceAccountToken"):
        Cluster(account, api.url)


def test_the_date_is_the_schedules() -> None:
    assert scheduled_date("vaegan-nightly-0") == "1970-01-01"
    assert scheduled_date("vaegan-nightly-1439") == "1970-01-01"
    assert scheduled_date("vaegan-nightly-1440") == "1970-01-02"


def test_outside_a_pod_the_command_says_so(night: list[Manifest]) -> None:
    """The overlay's own command."""
    (job,) = (thing for thing in night if thing["kind"] == "CronJob")
    command = job["spec"]["jobTemplate"]["spec"]["template"]["spec"]["containers"][0]["command"]
    assert command[0] == "python"
    done = subprocess.run(
        [sys.executable, *command[1:]], env={"JOB_NAME": NIGHT}, capture_output=True, text=True, timeout=60
    )
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert "KUBERNETES_SERVICE_HOST is not set" in done.stderr
