"""A run as a RayJob: an overlay of k8s/ with another command line. `vaegan-dist submit --render`."""

import shlex
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from vaegan_dist.cluster.nightly import check_name
from vaegan_dist.errors import ConfigError, InputError, VaeganError

Manifest = dict[str, Any]
SHOWN = ("ConfigMap", "RayJob")  # the rest of an overlay is applied once, not for each run


def render(overlay: Path, words: Sequence[str], ours: bool, name: str | None = None) -> str:
    """The overlay's RayJob and ConfigMaps as YAML, with `words` as its command.

    Args:
        words: a command and its arguments.
        ours: it is one of this program, such as `train`: its arguments are then appended to the overlay's own command
            line, whose files say where data and storage are, and later words win. Any other replaces the command line.
            A `--workers N` also sets the number of worker pods.

    Raises:
        ConfigError: the overlay has no RayJob, or the name is none that the operator takes.
        InputError: no such overlay.
        VaeganError: kubectl is missing or refuses the overlay.
    """
    documents = _kustomize(overlay)
    jobs = [document for document in documents if document["kind"] == "RayJob"]
    if not jobs:
        raise ConfigError(f"--overlay {overlay}: it makes no RayJob; take train, dev or sweep")
    for job in jobs:
        if name is not None:
            check_name(name)
            job["metadata"]["name"] = name
        spec = job["spec"]
        spec["entrypoint"] = _entrypoint(shlex.split(spec["entrypoint"]), words, overlay) if ours else shlex.join(words)
        workers = _workers(words)
        if workers is not None:
            group = spec["rayClusterSpec"]["workerGroupSpecs"][0]
            group["maxReplicas"] = max(workers, group["maxReplicas"])
            if not spec["rayClusterSpec"].get("enableInTreeAutoscaling"):
                group["replicas"] = group["minReplicas"] = workers
    kept = [document for document in documents if document["kind"] in SHOWN]
    return yaml.dump_all(kept, Dumper=_Dumper, sort_keys=False, width=120)


class _Dumper(yaml.SafeDumper):
    """Writes text of several lines as a block, so that the ConfigMaps stay readable."""


def _text(dumper: yaml.SafeDumper, value: str) -> yaml.ScalarNode:
    return dumper.represent_scalar("tag:yaml.org,2002:str", value, style="|" if "\n" in value else None)


_Dumper.add_representer(str, _text)


def _kustomize(overlay: Path) -> list[Manifest]:
    if not (overlay / "kustomization.yaml").exists():
        raise InputError(f"--overlay {overlay}: no kustomization.yaml there; name a folder like k8s/overlays/train")
    kubectl = shutil.which("kubectl")
    if kubectl is None:
        raise VaeganError("--render: kubectl is not on the PATH; install it, version 1.30 or newer")
    done = subprocess.run([kubectl, "kustomize", str(overlay)], capture_output=True, text=True, timeout=120)
    if done.returncode:
        raise VaeganError(f"kubectl kustomize {overlay}: {done.stderr.strip().splitlines()[-1]}")
    return list(yaml.safe_load_all(done.stdout))


def _entrypoint(own: Sequence[str], words: Sequence[str], overlay: Path) -> str:
    """One simple command, because the submitter's shell reads it first."""
    if own[:2] != ["python", f"jobs/{words[0]}.py"]:
        raise ConfigError(
            f"{words[0]}: the overlay {overlay} runs {' '.join(own[:2])}; name one that runs jobs/{words[0]}.py"
        )
    return shlex.join([*own, *words[1:]])


def _workers(words: Sequence[str]) -> int | None:
    """The number after `--workers`, if the words name one."""
    for index, word in enumerate(words):
        name, _, value = word.lstrip("-").partition("=")
        if name in ("workers", "cluster.workers"):
            number = value or (words[index + 1] if index + 1 < len(words) else "")
            if not number.isdecimal() or not int(number):
                raise ConfigError(f"--workers={number}: give a number above 0")
            return int(number)
    return None
