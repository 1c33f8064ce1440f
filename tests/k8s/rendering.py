"""Renders the overlays of k8s/, alone and with components, as `kubectl kustomize` does for `kubectl apply -k`."""

import itertools
import os
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import yaml

from tests.needs import needed

REPOSITORY = Path(__file__).resolve().parents[2]
K8S = REPOSITORY / "k8s"
OVERLAYS = sorted(path.name for path in (K8S / "overlays").iterdir())
COMPONENTS = sorted(path.name for path in (K8S / "components").iterdir())
# Kueue does not manage a RayCluster that scales itself.
APART = {"autoscaling", "kueue"}

Manifest = dict[str, Any]


def own_components(overlay: str) -> set[str]:
    """The components that an overlay uses by itself, or through the overlay it builds on."""
    content = yaml.safe_load((K8S / "overlays" / overlay / "kustomization.yaml").read_text())
    found = {Path(component).name for component in content.get("components", [])}
    below = [resource.removeprefix("../") for resource in content["resources"]]
    return found.union(*(own_components(name) for name in below if name in OVERLAYS))


def combinations() -> list[tuple[str, tuple[str, ...]]]:
    """Every overlay with no further component, with each, and with all that go together; two overlays, one with a
    RayJob and one with a RayCluster, also with each pair."""
    made = []
    for overlay in OVERLAYS:
        have = own_components(overlay)
        free = [name for name in COMPONENTS if name not in have and not have | {name} >= APART]
        everything = tuple(name for name in free if name != "autoscaling" or "kueue" not in free)
        pairs = itertools.combinations(free, 2) if overlay in ("train", "cluster") else ()
        wanted = [(), *((name,) for name in free), *pairs, everything]
        made += [(overlay, extra) for extra in dict.fromkeys(wanted) if not set(extra) >= APART]
    return made


def render(overlay: str, components: tuple[str, ...] = ()) -> list[Manifest]:
    """The objects of one overlay with further components."""
    kubectl = needed("kubectl")
    with tempfile.TemporaryDirectory() as folder:
        top = Path(os.path.realpath(folder))
        here = {
            "apiVersion": "kustomize.config.k8s.io/v1beta1",
            "kind": "Kustomization",
            "resources": [os.path.relpath(K8S / "overlays" / overlay, top)],
            "components": [os.path.relpath(K8S / "components" / name, top) for name in components],
            "namespace": "vaegan",
        }
        (top / "kustomization.yaml").write_text(yaml.safe_dump(here))
        done = subprocess.run([kubectl, "kustomize", str(top)], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, f"{overlay} + {components}: {done.stderr}"
    return list(yaml.load_all(done.stdout, yaml.CSafeLoader))
