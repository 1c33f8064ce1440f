"""Starts a fresh RayJob from a suspended one, and waits for it: what the CronJob of k8s/overlays/cron runs.

`python -m vaegan_dist.cluster.nightly --template vaegan-nightly`. The template is an ordinary RayJob with
`suspend: true`: the API server checks it when it is applied and the operator leaves it alone. Talks to the API server
of the pod it runs in, with the service account's token; exit code 0 when the RayJob succeeded, else 1.
"""

import argparse
import copy
import json
import os
import re
import ssl
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from vaegan_dist.errors import ConfigError, InputError, VaeganError

ACCOUNT = Path("/var/run/secrets/kubernetes.io/serviceaccount")
TEMPLATE_LABEL = "vaegan-dist/template"
QUEUE_ANNOTATION = "vaegan-dist/queue-name"
QUEUE_LABEL = "kueue.x-k8s.io/queue-name"
NAME_LIMIT = 47  # the operator's, for RayJobs
DATE = "RUN_DATE"
POLL_SECONDS = 10.0
REQUEST_SECONDS = 30.0
SILENCE_SECONDS = 600.0
ENDED = {"Complete", "Failed", "ValidationFailed"}

Manifest = dict[str, Any]


class Cluster:
    """The RayJobs of one namespace, through the API server."""

    def __init__(self, account: Path = ACCOUNT, server: str | None = None) -> None:
        """`server` is the API server's URL; by default that of the pod's environment.

        Raises:
            ConfigError: not in a pod, or in one without a service account's token.
        """
        if server is None:
            host, port = os.environ.get("KUBERNETES_SERVICE_HOST"), os.environ.get("KUBERNETES_SERVICE_PORT", "443")
            if not host:
                raise ConfigError("KUBERNETES_SERVICE_HOST is not set: this command runs in a pod (k8s/overlays/cron)")
            server = f"https://{f'[{host}]' if ':' in host else host}:{port}"
        try:
            self.namespace = (account / "namespace").read_text().strip()
            (account / "token").read_bytes()
        except OSError as error:
            raise ConfigError(
                f"{error.filename}: {error.strerror}; the pod needs automountServiceAccountToken: true"
            ) from None
        self.account = account
        self.url = f"{server}/apis/ray.io/v1/namespaces/{self.namespace}/rayjobs"
        certificate = account / "ca.crt"
        secure = server.startswith("https:")
        self.tls = ssl.create_default_context(cafile=str(certificate)) if secure else None

    def get(self, name: str) -> Manifest:
        """One RayJob; `InputError` where there is none."""
        return self._request("GET", f"/{name}")

    def unfinished_of(self, template: str) -> list[str]:
        """Names of the RayJobs that were made from the template and have not ended."""
        found = self._request("GET", f"?labelSelector={TEMPLATE_LABEL}%3D{template}")["items"]
        return [job["metadata"]["name"] for job in found if _state(job) not in ENDED]

    def create(self, job: Manifest) -> bool:
        """Create the RayJob; False where one of that name stands already."""
        try:
            self._request("POST", "", job)
        except _AlreadyThereError:
            return False
        return True

    def _request(self, method: str, path: str, body: Manifest | None = None) -> Manifest:
        # Read each time: the kubelet renews the token.
        token = (self.account / "token").read_text().strip()
        request = urllib.request.Request(  # the scheme is ours: https, or a test's http
            self.url + path,
            method=method,
            data=None if body is None else json.dumps(body).encode(),
            headers={
                "Authorization": f"Bearer {token}",
                "Accept": "application/json",
                "Content-Type": "application/json",
            },
        )
        try:
            with urllib.request.urlopen(request, timeout=REQUEST_SECONDS, context=self.tls) as answer:
                content: Manifest = json.load(answer)
                return content
        except urllib.error.HTTPError as error:
            raise _explain(error, method, self.namespace, path) from None
        except (OSError, ValueError) as error:
            reason = getattr(error, "reason", error)
            raise _UnreachableError(f"{self.url}: the API server does not answer: {reason}") from None


class _AlreadyThereError(VaeganError):
    """HTTP 409."""


class _UnreachableError(VaeganError):
    """No answer, or a server's own failure: worth another try."""


def _explain(error: urllib.error.HTTPError, method: str, namespace: str, path: str) -> VaeganError:
    try:
        message = str(json.load(error)["message"])
    except (ValueError, KeyError, TypeError):
        message = str(error.reason)
    line = f"API server, {method} rayjobs{path} in namespace {namespace}: {error.code} {message}"
    if error.code == 409:
        return _AlreadyThereError(line)
    if error.code == 404:
        return InputError(f"{line}; is the template applied, and KubeRay installed?")
    if error.code in (401, 403):
        return ConfigError(f"{line}; the account needs get, list and create on rayjobs")
    if error.code == 429 or error.code >= 500:
        return _UnreachableError(line)
    return VaeganError(line)


def check_name(name: str) -> None:
    """Refuse a RayJob's name that the API server or the operator would refuse."""
    if len(name) > NAME_LIMIT:
        raise ConfigError(f"RayJob name '{name}' has {len(name)} characters, the operator takes {NAME_LIMIT}")
    if not re.fullmatch(r"[a-z]([a-z0-9-]*[a-z0-9])?", name):
        raise ConfigError(f"RayJob name '{name}': small letters, digits and '-' only, a letter first")


def copy_of(template: Manifest, name: str, date: str, owner_uid: str | None = None) -> Manifest:
    """The RayJob to create: the template's content under a new name, not suspended, RUN_DATE filled in.

    Args:
        owner_uid: of the Kubernetes Job of that name; the RayJob goes with it when the CronJob's history ends.

    Raises:
        ConfigError: a name that the operator would refuse.
    """
    check_name(name)
    spec = copy.deepcopy(template["spec"])
    spec["entrypoint"] = spec["entrypoint"].replace(DATE, date)
    # Set by the operator or Kueue on the template; a copy must not share them.
    for key in ("jobId", "managedBy", "suspend"):
        spec.pop(key, None)
    metadata = template["metadata"]
    labels = {**metadata.get("labels", {}), TEMPLATE_LABEL: metadata["name"], "app.kubernetes.io/component": "training"}
    kept = {key: value for key, value in metadata.get("annotations", {}).items() if key.startswith("vaegan-dist/")}
    if queue := kept.pop(QUEUE_ANNOTATION, None):
        labels[QUEUE_LABEL] = queue
        spec["suspend"] = True  # Kueue lifts it when the resources are free
    copied: Manifest = {
        "apiVersion": template["apiVersion"],
        "kind": template["kind"],
        "metadata": {"name": name, "labels": labels, "annotations": kept},
        "spec": spec,
    }
    if owner_uid:
        owner = {"apiVersion": "batch/v1", "kind": "Job", "name": name, "uid": owner_uid}
        copied["metadata"]["ownerReferences"] = [owner]
    return copied


def scheduled_date(job_name: str) -> str:
    """The day, in UTC, of the schedule that a CronJob's Job was made for; today's for one made by hand.

    A CronJob calls its Jobs <name>-<minutes since 1970>, so that a retry after midnight still means the same night.
    """
    minutes = job_name.rpartition("-")[2]
    when = datetime.fromtimestamp(int(minutes) * 60, UTC) if minutes.isdigit() else datetime.now(UTC)
    return when.strftime("%Y-%m-%d")


def run(
    cluster: Cluster, template_name: str, name: str, owner_uid: str | None = None, poll_seconds: float = POLL_SECONDS
) -> int:
    """Create the RayJob `name` and wait for its end; one that is there already, from an earlier try, is waited for."""
    template = cluster.get(template_name)
    if not template["spec"].get("suspend"):
        raise ConfigError(f"RayJob {template_name} is not suspended: a template has spec.suspend: true")
    others = [other for other in cluster.unfinished_of(template_name) if other != name]
    if others:
        # Two clusters would write one run's folder.
        raise VaeganError(f"RayJob {others[0]} of an earlier night has not ended: wait for it, or delete it")
    job = copy_of(template, name, scheduled_date(name), owner_uid)
    made = cluster.create(job)
    print(f"RayJob {name}: {'created' if made else 'found, from an earlier try'}", flush=True)
    return _wait(cluster, name, poll_seconds)


def _wait(cluster: Cluster, name: str, poll_seconds: float) -> int:
    before, heard = "", time.monotonic()
    while True:
        try:
            job = cluster.get(name)
        except _UnreachableError:
            # The RayJob does not need us: only a long silence ends the wait.
            if time.monotonic() - heard > SILENCE_SECONDS:
                raise
            time.sleep(poll_seconds)
            continue
        heard = time.monotonic()
        status = job.get("status", {})
        state = _state(job)
        if state != before:
            print(f"RayJob {name}: {state or 'New'}", flush=True)
            before = state
        if state in ENDED:
            if state == "Complete" and status.get("jobStatus") == "SUCCEEDED":
                return 0
            reason = " ".join(str(status[key]) for key in ("jobStatus", "reason", "message") if status.get(key))
            raise VaeganError(f"RayJob {name} ended {state}: {reason or 'no reason given'}; see kubectl describe")
        time.sleep(poll_seconds)


def _state(job: Manifest) -> str:
    return str(job.get("status", {}).get("jobDeploymentStatus", ""))


def main(arguments: Sequence[str] | None = None) -> int:
    """The command of the CronJob's pod."""
    parser = argparse.ArgumentParser(prog="python -m vaegan_dist.cluster.nightly", description=__doc__.split("\n")[0])
    parser.add_argument("--template", required=True, help="name of the suspended RayJob")
    parser.add_argument("--name", default=os.environ.get("JOB_NAME"), help="name of the new one (default: $JOB_NAME)")
    options = parser.parse_args(arguments)
    try:
        if not options.name:
            raise ConfigError("--name: a name for the RayJob is missing, and JOB_NAME is not set")
        # Only the Job of that name can own it.
        owner = os.environ.get("JOB_UID") if options.name == os.environ.get("JOB_NAME") else None
        return run(Cluster(), options.template, options.name, owner)
    except VaeganError as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return error.exit_code


if __name__ == "__main__":
    sys.exit(main())
