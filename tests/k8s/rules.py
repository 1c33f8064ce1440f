"""What no schema says: the KubeRay operator's own checks (v1.6.2, validation.go) and this project's rules for pods."""

import re
from collections.abc import Iterator
from typing import Any

import yaml

Manifest = dict[str, Any]

HEAD_SERVICE_LABELS = {"app.kubernetes.io/name", "app.kubernetes.io/created-by"}
# Pods that ask the API server for something.
TOKEN_ACCOUNTS = {"vaegan-autoscaler", "vaegan-nightly"}
UNITS = {"": 1, "m": 1e-3, "Ki": 2**10, "Mi": 2**20, "Gi": 2**30, "Ti": 2**40}


def cluster_spec(thing: Manifest) -> Manifest | None:
    """The RayCluster spec in a RayCluster or RayJob."""
    if thing["kind"] == "RayCluster":
        return thing["spec"]
    return thing["spec"].get("rayClusterSpec") if thing["kind"] == "RayJob" else None


def operator_refuses(thing: Manifest) -> Iterator[str]:
    """Why the operator would refuse this RayCluster or RayJob."""
    spec = cluster_spec(thing)
    if thing["kind"] not in ("RayCluster", "RayJob"):
        return
    limit = 53 if thing["kind"] == "RayCluster" else 47
    if not re.fullmatch(r"[a-z]([-a-z0-9]*[a-z0-9])?", thing["metadata"]["name"]):
        yield "the name is no DNS-1035 label"
    if len(thing["metadata"]["name"]) > limit:
        yield f"the name is longer than {limit}"
    if thing["kind"] == "RayJob":
        yield from _refused_job(thing["spec"])
    if spec is None:
        yield "no rayClusterSpec"
        return
    yield from _refused_cluster(spec)


def _refused_job(job: Manifest) -> Iterator[str]:
    shutdown = job.get("shutdownAfterJobFinishes", False)
    if job.get("ttlSecondsAfterFinished", 0) > 0 and not shutdown:
        yield "ttlSecondsAfterFinished needs shutdownAfterJobFinishes"
    if job.get("suspend") and not shutdown:
        yield "suspend needs shutdownAfterJobFinishes"
    if job.get("deletionStrategy"):
        yield "deletionStrategy needs a feature gate that is off"
    for key in ("activeDeadlineSeconds", "preRunningDeadlineSeconds"):
        if job.get(key, 1) <= 0:
            yield f"{key} must be positive"
    if job.get("backoffLimit", 0) < 0:
        yield "backoffLimit must not be negative"
    if not isinstance(yaml.safe_load(job.get("runtimeEnvYAML", "{}")), dict):
        yield "runtimeEnvYAML is not a mapping"
    if job.get("submissionMode") == "SidecarMode" and ("submitterPodTemplate" in job or "submitterConfig" in job):
        yield "SidecarMode takes no submitter"


def _refused_cluster(spec: Manifest) -> Iterator[str]:
    head, workers = spec["headGroupSpec"], spec.get("workerGroupSpecs", [])
    scaling = spec.get("enableInTreeAutoscaling", False)
    version = tuple(int(part) for part in spec.get("rayVersion", "0.0").split(".")[:2])
    if spec.get("authOptions", {}).get("mode") == "token" and version < (2, 52):
        yield "authOptions.mode token needs rayVersion 2.52.0 or newer"
    for group in workers:
        low, high = group.get("minReplicas"), group.get("maxReplicas")
        if not scaling and (low is None or high is None):
            yield "minReplicas and maxReplicas are needed without autoscaling"
        if (low or 0) > (2**31 - 1 if high is None else high):
            yield "minReplicas above maxReplicas"
    for group in (head, *workers):
        given = set(group.get("rayStartParams", {}))
        if given & {"num-cpus", "num-gpus", "memory", "resources"} and group.get("resources"):
            yield "resources both in rayStartParams and in the group"
        if "labels" in given:
            yield "labels in rayStartParams"
        pod = group["template"]["spec"]
        if not pod.get("containers"):
            yield "a group without containers"
        v2 = scaling and spec.get("autoscalerOptions", {}).get("version") == "v2"
        if v2 and pod.get("restartPolicy", "Never") != "Never":
            yield "autoscaler v2 needs restartPolicy Never"
        labels = group["template"].get("metadata", {}).get("labels", {})
        if HEAD_SERVICE_LABELS & set(labels):
            yield "a label by which the operator's services select is overridden"


def pods(thing: Manifest) -> Iterator[tuple[str, Manifest, Manifest]]:
    """(role, labels, pod spec) of every pod that an object makes."""
    spec = cluster_spec(thing)
    if spec is not None:
        groups = [("head", spec["headGroupSpec"]), *(("worker", group) for group in spec.get("workerGroupSpecs", []))]
        for role, group in groups:
            yield role, group["template"]["metadata"]["labels"], group["template"]["spec"]
    template = {
        "RayJob": lambda: thing["spec"]["submitterPodTemplate"],
        "CronJob": lambda: thing["spec"]["jobTemplate"]["spec"]["template"],
        "Job": lambda: thing["spec"]["template"],
    }.get(thing["kind"])
    if template is not None:
        yield "other", template()["metadata"]["labels"], template()["spec"]


def violations(thing: Manifest) -> Iterator[str]:
    """Where the pods of an object break the project's rules."""
    for role, _, pod in pods(thing):
        for message in (*_pod_violations(pod), *_grace_violations(thing, role, pod)):
            yield f"{thing['kind']} {thing['metadata']['name']}, {role}: {message}"
    spec = cluster_spec(thing)
    if spec is not None:
        yield from _cluster_violations(thing, spec)
    if thing["kind"] == "CronJob":
        yield from _cron_violations(thing["spec"])
    if thing["kind"] == "Secret":
        yield "a Secret among the manifests"
    if thing["kind"] in ("Service", "Ingress") or (spec or {}).get("headGroupSpec", {}).get("enableIngress"):
        yield f"{thing['kind']} {thing['metadata']['name']}: the dashboard must not be exposed"


def _cluster_violations(thing: Manifest, spec: Manifest) -> Iterator[str]:
    if spec.get("authOptions", {}).get("mode") != "token" or not spec["authOptions"].get("secretName"):
        yield "token authentication with a Secret is not on"
    if spec["headGroupSpec"].get("serviceType", "ClusterIP") != "ClusterIP":
        yield "the head's service is reachable from outside"
    if spec["headGroupSpec"]["rayStartParams"].get("num-cpus") != "0":
        yield "training could be placed on the head"
    scaler = spec.get("autoscalerOptions")
    if scaler is not None:
        yield from _container_violations({"name": "autoscaler", "image": "x:1", **scaler})
    if thing["kind"] == "RayJob":
        job = thing["spec"]
        for key in ("activeDeadlineSeconds", "preRunningDeadlineSeconds", "ttlSecondsAfterFinished", "backoffLimit"):
            if key not in job:
                yield f"RayJob without {key}"
        if "--name" not in job["entrypoint"]:
            yield "no stable run name: a retry would start over"
        if re.search(r"[;&|<>`$(){}\n]", job["entrypoint"]):
            yield "the submitter's shell would read part of the entrypoint"


def _cron_violations(cron: Manifest) -> Iterator[str]:
    if cron.get("concurrencyPolicy") != "Forbid":
        yield "two nights could run at once"
    needed = {"timeZone", "startingDeadlineSeconds", "successfulJobsHistoryLimit", "failedJobsHistoryLimit"}
    for key in sorted(needed - set(cron)):
        yield f"CronJob without {key}"
    job = cron["jobTemplate"]["spec"]
    if "activeDeadlineSeconds" not in job or "backoffLimit" not in job:
        yield "a night without end"
    pod = job["template"]["spec"]
    if pod.get("restartPolicy") != "Never":
        yield "podFailurePolicy needs restartPolicy Never"
    for word in pod["containers"][0]["command"]:
        name, _, seconds = word.partition("=")
        if name == "--stop-seconds" and not 45 <= float(seconds) < pod.get("terminationGracePeriodSeconds", 30):
            yield f"--stop-seconds={seconds} does not fit between checkpoint and grace period"


def _pod_violations(pod: Manifest) -> Iterator[str]:
    security = pod.get("securityContext", {})
    if security.get("runAsNonRoot") is not True or security.get("runAsUser", 0) == 0:
        yield "may run as root"
    if security.get("seccompProfile", {}).get("type") != "RuntimeDefault":
        yield "seccomp is not RuntimeDefault"
    if pod.get("automountServiceAccountToken") is not (pod.get("serviceAccountName") in TOKEN_ACCOUNTS):
        yield "a service account's token is mounted where none is needed, or missing where one is"
    for key in ("hostNetwork", "hostPID", "hostIPC"):
        if pod.get(key):
            yield key
    volumes = {volume["name"]: volume for volume in pod.get("volumes", [])}
    for name, volume in volumes.items():
        if "hostPath" in volume:
            yield f"hostPath volume {name}"
        if "emptyDir" in volume and "sizeLimit" not in volume["emptyDir"]:
            yield f"emptyDir {name} without a sizeLimit"
    for container in (*pod.get("initContainers", []), *pod["containers"]):
        yield from _container_violations(container)
        for mount in container.get("volumeMounts", []):
            if mount["name"] not in volumes:
                yield f"mounts {mount['name']}, which is no volume"


def _container_violations(container: Manifest) -> Iterator[str]:
    name, security = container["name"], container.get("securityContext", {})
    if security.get("allowPrivilegeEscalation") is not False or security.get("privileged"):
        yield f"{name}: may gain privileges"
    if security.get("capabilities", {}).get("drop") != ["ALL"] or security.get("capabilities", {}).get("add"):
        yield f"{name}: keeps capabilities"
    if security.get("readOnlyRootFilesystem") is not True:
        yield f"{name}: the root file system can be written"
    image = container["image"]
    tag = image.rpartition("/")[2].partition(":")[2]
    if "@sha256:" not in image and tag in ("", "latest"):
        yield f"{name}: image {image} is not pinned"
    resources = container.get("resources", {})
    if not {"cpu", "memory"} <= set(resources.get("limits", {})):
        yield f"{name}: no limits"
    if resources.get("requests") != resources.get("limits"):
        yield f"{name}: requests differ from limits"
    for variable in container.get("env", []):
        if re.search("TOKEN|SECRET|PASSWORD|KEY", variable["name"]) and "value" in variable:
            yield f"{name}: a secret in {variable['name']}"


def _grace_violations(thing: Manifest, role: str, pod: Manifest) -> Iterator[str]:
    """Checkpoint <= stop <= drain < grace, else something is killed in the middle."""
    if role == "other":
        return
    env = {item["name"]: item.get("value") for item in pod["containers"][0].get("env", [])}
    times = [
        float(thing["metadata"].get("annotations", {}).get("vaegan-dist/checkpoint-seconds", "inf")),
        float(env.get("RAY_JOB_STOP_WAIT_TIME_S", 3)),
        float(env.get("RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S", 30)),
        float(pod.get("terminationGracePeriodSeconds", 30)),
    ]
    if times != sorted(times) or times[-1] == times[-2]:
        yield f"checkpoint, stop, drain and grace period do not fit into each other: {times}"
    if thing["kind"] == "RayJob" and role == "head":
        given = yaml.safe_load(thing["spec"]["runtimeEnvYAML"])["env_vars"].get("RAY_JOB_STOP_WAIT_TIME_S")
        if given != env.get("RAY_JOB_STOP_WAIT_TIME_S"):
            yield f"runtimeEnvYAML and the pod differ in RAY_JOB_STOP_WAIT_TIME_S: {given}"


def amount(quantity: str | int) -> float:
    """A Kubernetes quantity as a number."""
    number, unit = re.fullmatch(r"([0-9.]+)([A-Za-z]*)", str(quantity)).groups()
    return float(number) * UNITS[unit]
