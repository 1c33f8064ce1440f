"""Every overlay and component combination renders, is valid, names only what exists, and obeys the rules."""

import copy
import importlib.util
import itertools
import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.k8s.rendering import K8S, OVERLAYS, Manifest, combinations, render
from tests.k8s.rules import amount, cluster_spec, operator_refuses, pods, violations
from tests.needs import missing, needed
from vaegan_dist.config_source import load_config

# The Secrets that a person makes (docs/kubernetes.md).
SECRETS = {"vaegan-ray-token", "vaegan-s3"}
Combination = tuple[str, tuple[str, ...]]


@pytest.fixture(scope="session")
def rendered() -> dict[Combination, list[Manifest]]:
    """The objects of every combination."""
    needed("kubectl")
    wanted = combinations()
    with ThreadPoolExecutor(2) as pool:
        return dict(zip(wanted, pool.map(lambda each: render(*each), wanted), strict=True))


@pytest.fixture(scope="session")
def objects(rendered: dict[Combination, list[Manifest]]) -> list[Manifest]:
    """Every different object once."""
    every = {json.dumps(thing, sort_keys=True): thing for made in rendered.values() for thing in made}
    return list(every.values())


def check(shared: Path, documents: list[Manifest], folder: Path) -> list[bool]:
    """Which documents the strict validator takes: KubeRay's, Kueue's and Prometheus' CRDs, and the core kinds."""
    for module in ("jsonschema", "kubernetes_validate"):
        if importlib.util.find_spec(module) is None:
            missing(f"the Python package {module}")
    file = folder / "all.yaml"
    file.write_text("---\n".join(yaml.safe_dump(document) for document in documents))
    crds = [f"--crds={folder}" for folder in sorted((shared / "crds").iterdir()) if folder.is_dir()]
    command = [sys.executable, str(shared / "tools" / "crd_validate.py"), *crds, str(file)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    verdicts = [line.startswith("ok") for line in done.stdout.splitlines() if line.startswith(("ok ", "FAIL "))]
    assert len(verdicts) == len(documents), done.stdout[-2000:] + done.stderr[-2000:]
    return verdicts


def test_every_object_is_valid(shared: Path, objects: list[Manifest], tmp_path: Path) -> None:
    admins = list(yaml.safe_load_all((K8S / "cluster-scope/kueue/queues.yaml").read_text()))
    everything = objects + admins
    verdicts = check(shared, everything, tmp_path)
    assert len(everything) > 50
    assert [thing for thing, good in zip(everything, verdicts, strict=True) if not good] == []


FREE = {"labels", "annotations", "matchLabels", "rayStartParams", "requests", "limits", "data", "hard", "default"}
FREE |= {"nodeSelector", "defaultRequest", "matchExpressions", "value"}


def keys(thing: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Every key whose spelling a schema fixes."""
    items = thing.items() if isinstance(thing, dict) else enumerate(thing) if isinstance(thing, list) else ()
    for key, value in items:
        if isinstance(key, str):
            yield (*path, key)
        if key not in FREE:
            yield from keys(value, (*path, key))


def at(thing: Any, path: tuple[Any, ...]) -> Any:
    for key in path:
        thing = thing[key]
    return thing


def misspell(parent: Manifest, key: str) -> None:
    parent[key + "x"] = parent.pop(key)


def mistype(parent: Manifest, key: str) -> None:
    parent[key] = 1.5 if isinstance(parent[key], dict | list) else {"a": 1}


@pytest.mark.parametrize("mutate", [misspell, mistype])
def test_a_wrong_field_anywhere_is_refused(
    shared: Path,
    rendered: dict[Combination, list[Manifest]],
    tmp_path: Path,
    mutate: Callable[[Manifest, str], None],
) -> None:
    """Every seventh key of every kind of object, in turn misspelt or given a wrong type; no object is valid with it."""
    kinds = {thing["kind"]: thing for overlay in OVERLAYS for thing in rendered[overlay, ()]}
    mutants = []
    for thing in kinds.values():
        for path in itertools.islice(keys(thing.get("spec", {})), 0, None, 7):
            mutant = copy.deepcopy(thing)
            mutate(at(mutant["spec"], path[:-1]), path[-1])
            mutants.append((path, mutant))
    verdicts = check(shared, [mutant for _, mutant in mutants], tmp_path)
    assert len(mutants) > 60
    assert [path for (path, _), good in zip(mutants, verdicts, strict=True) if good] == []


def test_the_operator_and_the_policy_take_every_object(objects: list[Manifest]) -> None:
    assert [message for thing in objects for message in (*operator_refuses(thing), *violations(thing))] == []
    assert sum(len(list(pods(thing))) for thing in objects) > 20


def head(job: Manifest) -> Manifest:
    return cluster_spec(job)["headGroupSpec"]["template"]["spec"]


def worker(job: Manifest) -> Manifest:
    return cluster_spec(job)["workerGroupSpecs"][0]["template"]["spec"]


def set_env(pod: Manifest, name: str, value: str) -> None:
    next(item for item in pod["containers"][0]["env"] if item["name"] == name)["value"] = value


MUTATIONS: dict[str, Callable[[Manifest], Any]] = {
    "root": lambda job: head(job)["securityContext"].update(runAsNonRoot=False),
    "seccomp": lambda job: worker(job)["securityContext"].pop("seccompProfile"),
    "token mounted": lambda job: worker(job).update(automountServiceAccountToken=True),
    "hostPath": lambda job: worker(job)["volumes"][0].update(hostPath={"path": "/"}),
    "unbounded emptyDir": lambda job: worker(job)["volumes"][2].update(emptyDir={}),
    "mount without volume": lambda job: worker(job)["volumes"].pop(),
    "host network": lambda job: head(job).update(hostNetwork=True),
    "latest": lambda job: worker(job)["containers"][0].update(image="registry:5000/vaegan-dist:latest"),
    "no tag": lambda job: worker(job)["containers"][0].update(image="registry:5000/vaegan-dist"),
    "no limits": lambda job: worker(job)["containers"][0].update(resources={}),
    "requests below limits": lambda job: worker(job)["containers"][0]["resources"]["requests"].update(cpu="1"),
    "capabilities": lambda job: worker(job)["containers"][0]["securityContext"].pop("capabilities"),
    "escalation": lambda job: head(job)["containers"][0]["securityContext"].update(allowPrivilegeEscalation=True),
    "writable root": lambda job: job["spec"]["submitterPodTemplate"]["spec"]["containers"][0].pop("securityContext"),
    "plain secret": lambda job: head(job)["containers"][0]["env"].append({"name": "RAY_AUTH_TOKEN", "value": "x"}),
    "short grace": lambda job: worker(job).update(terminationGracePeriodSeconds=90),
    "default grace": lambda job: head(job).pop("terminationGracePeriodSeconds"),
    "short drain": lambda job: set_env(head(job), "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S", "59"),
    "short stop": lambda job: set_env(head(job), "RAY_JOB_STOP_WAIT_TIME_S", "44"),
    "stop differs": lambda job: job["spec"].update(runtimeEnvYAML="env_vars: {RAY_JOB_STOP_WAIT_TIME_S: '3'}"),
    "slow checkpoint": lambda job: job["metadata"]["annotations"].update({"vaegan-dist/checkpoint-seconds": "61"}),
    "no token authentication": lambda job: cluster_spec(job).pop("authOptions"),
    "exposed": lambda job: cluster_spec(job)["headGroupSpec"].update(serviceType="LoadBalancer"),
    "work on the head": lambda job: cluster_spec(job)["headGroupSpec"].update(rayStartParams={}),
    "no deadline": lambda job: job["spec"].pop("activeDeadlineSeconds"),
    "shell": lambda job: job["spec"].update(entrypoint=job["spec"]["entrypoint"] + " && true"),
    "TTL without shutdown": lambda job: job["spec"].pop("shutdownAfterJobFinishes"),
    "negative deadline": lambda job: job["spec"].update(activeDeadlineSeconds=-1),
    "no replica bounds": lambda job: cluster_spec(job)["workerGroupSpecs"][0].pop("maxReplicas"),
    "bounds crossed": lambda job: cluster_spec(job)["workerGroupSpecs"][0].update(minReplicas=9),
    "old Ray": lambda job: cluster_spec(job).update(rayVersion="2.51.0"),
    "long name": lambda job: job["metadata"].update(name="a" * 48),
    "name with a dot": lambda job: job["metadata"].update(name="a.b"),
    "operator's label": lambda job: cluster_spec(job)["headGroupSpec"]["template"]["metadata"]["labels"].update(
        {"app.kubernetes.io/name": "vaegan-dist"}
    ),
}


@pytest.mark.parametrize("mutation", MUTATIONS)
def test_the_policy_notices(rendered: dict[Combination, list[Manifest]], mutation: str) -> None:
    job = copy.deepcopy(next(thing for thing in rendered["train", ()] if thing["kind"] == "RayJob"))
    MUTATIONS[mutation](job)
    assert [*operator_refuses(job), *violations(job)] != []


CRON_MUTATIONS: dict[str, Callable[[Manifest], Any]] = {
    "concurrency": lambda cron: cron.update(concurrencyPolicy="Allow"),
    "no time zone": lambda cron: cron.pop("timeZone"),
    "no starting deadline": lambda cron: cron.pop("startingDeadlineSeconds"),
    "no end": lambda cron: cron["jobTemplate"]["spec"].pop("activeDeadlineSeconds"),
    "short grace": lambda cron: cron["jobTemplate"]["spec"]["template"]["spec"].update(
        terminationGracePeriodSeconds=60
    ),
    "token": lambda cron: cron["jobTemplate"]["spec"]["template"]["spec"].pop("automountServiceAccountToken"),
}


@pytest.mark.parametrize("mutation", CRON_MUTATIONS)
def test_the_policy_notices_in_cron_jobs(rendered: dict[Combination, list[Manifest]], mutation: str) -> None:
    job = copy.deepcopy(next(thing for thing in rendered["cron-submit", ()] if thing["kind"] == "CronJob"))
    assert list(violations(job)) == []
    CRON_MUTATIONS[mutation](job["spec"])
    assert list(violations(job)) != []


def test_what_is_named_exists(rendered: dict[Combination, list[Manifest]]) -> None:
    """Accounts, ConfigMaps, claims, queues and services that the pods name are there, and selectors meet pods."""
    for combination, made in rendered.items():
        have = {(thing["kind"], thing["metadata"]["name"]) for thing in made}
        for thing in made:
            for _, _, pod in pods(thing):
                absent = set(_named(pod)) - have - {("Secret", name) for name in SECRETS}
                assert not absent, (combination, absent)
            if thing["kind"] == "RoleBinding":
                assert {(subject["kind"], subject["name"]) for subject in thing["subjects"]} <= have
                assert ("Role", thing["roleRef"]["name"]) in have
        assert {thing["metadata"].get("namespace") for thing in made} - {None} == {"vaegan"}, combination


def _named(pod: Manifest) -> Iterator[tuple[str, str]]:
    yield "ServiceAccount", pod["serviceAccountName"]
    for volume in pod["volumes"]:
        if "configMap" in volume:
            yield "ConfigMap", volume["configMap"]["name"]
        if "persistentVolumeClaim" in volume:
            yield "PersistentVolumeClaim", volume["persistentVolumeClaim"]["claimName"]
    for container in (*pod.get("initContainers", []), *pod["containers"]):
        for source in container.get("envFrom", []):
            kind = "ConfigMap" if "configMapRef" in source else "Secret"
            yield kind, next(iter(source.values()))["name"]
        for variable in container.get("env", []):
            if "secretKeyRef" in variable.get("valueFrom", {}):
                yield "Secret", variable["valueFrom"]["secretKeyRef"]["name"]


def test_selectors_meet_pods(rendered: dict[Combination, list[Manifest]]) -> None:
    """Each NetworkPolicy, PodMonitor and budget selects a pod of some overlay; an egress rule has its ingress."""
    labelled, selectors = [], []
    for made in rendered.values():
        for thing in made:
            for role, labels, _ in pods(thing):
                ray = {} if role == "other" else {"ray.io/is-ray-node": "yes", "ray.io/node-type": role}
                labelled.append({**labels, **ray})
            if thing["kind"] in ("NetworkPolicy", "PodMonitor", "PodDisruptionBudget"):
                spec = thing["spec"]
                chosen = spec.get("podSelector", spec.get("selector")).get("matchLabels", {})
                selectors.append((thing["metadata"]["name"], chosen))
    for name, chosen in selectors:
        assert any(chosen.items() <= labels.items() for labels in labelled), name


def test_components_do_what_they_say(rendered: dict[Combination, list[Manifest]]) -> None:
    """A patch whose target matches nothing is silent; so each component must change each overlay it is added to."""
    for overlay, extra in rendered:
        if len(extra) == 1:
            before, after = rendered[overlay, ()], rendered[overlay, extra]
            assert before != after, (overlay, extra)
            changed = [thing for thing in after if thing not in before]
            kinds = {thing["kind"] for thing in changed}
            expected = {"monitoring": "PodMonitor", "kueue": "LocalQueue"}.get(extra[0])
            assert expected in kinds if expected else kinds & {"RayJob", "RayCluster"}, (overlay, extra, kinds)


def test_the_quota_holds_the_largest_cluster(rendered: dict[Combination, list[Manifest]]) -> None:
    for combination, made in rendered.items():
        hard = next(thing for thing in made if thing["kind"] == "ResourceQuota")["spec"]["hard"]
        total = dict.fromkeys(("cpu", "memory", "nvidia.com/gpu"), 0.0)
        for thing in made:
            spec = cluster_spec(thing)
            many = {"worker": spec["workerGroupSpecs"][0]["maxReplicas"]} if spec else {}
            for role, _, pod in pods(thing):
                for container in pod["containers"]:
                    for resource in total:
                        total[resource] += many.get(role, 1) * amount(
                            container["resources"]["limits"].get(resource, "0")
                        )
        over = {name: value for name, value in total.items() if value > amount(hard[f"requests.{name}"])}
        assert not over, (combination, over, hard)


def test_the_runs_configuration_is_accepted(rendered: dict[Combination, list[Manifest]], tmp_path: Path) -> None:
    """Each entrypoint's own files and options resolve, and its workers fit the worker pods."""
    for number, ((overlay, extra), made) in enumerate(rendered.items()):
        data = next(thing for thing in made if thing["metadata"]["name"] == "vaegan-config")["data"]
        folder = tmp_path / str(number)
        folder.mkdir()
        for name, text in data.items():
            (folder / name).write_text(text)
        job = next((thing for thing in made if thing["kind"] == "RayJob"), None)
        preset = job["spec"]["entrypoint"].split("--preset ")[1].split()[0] if job else "digits-conv"
        config = load_config(preset, [folder / name for name in ("run.yaml", "data.yaml", "cluster.yaml")])
        spec = next(spec for spec in map(cluster_spec, made) if spec)
        group = spec["workerGroupSpecs"][0]
        limits = group["template"]["spec"]["containers"][0]["resources"]["limits"]
        assert config.cluster.cpus_per_worker == float(limits["cpu"]), (overlay, extra)
        assert config.cluster.gpus_per_worker == float(limits.get("nvidia.com/gpu", 0)), (overlay, extra)
        assert config.cluster.most_workers <= group["maxReplicas"], (overlay, extra)
        if job:
            assert config.cluster.start_timeout_seconds <= job["spec"]["preRunningDeadlineSeconds"]
