"""Imports point down, read from the source of every module, so that lazy and type-only imports count as well.

Only the rule against cycles leaves type-only imports out: they are never executed.

errors, config, files, seeding <- data, models, objectives, evaluation, reporting <- training <- cluster, export, use
<- cli, commands <- jobs
"""

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[1]
PACKAGE = "vaegan_dist"

# Room (a package or a single module under vaegan_dist) -> floor. A room may import the rooms of lower floors.
FLOORS = {
    "": 0, "errors": 0, "config": 0, "config_source": 0, "files": 0, "seeding": 0, "presets": 0,
    "data": 1, "models": 1, "objectives": 1, "evaluation": 1, "reporting": 1,
    "training": 2,
    "cluster": 3, "export": 3, "use": 3, "sweeps": 3,
    "cli": 4, "commands": 4, "__main__": 4,
    "jobs": 5,
}  # fmt: skip
# Rooms of one floor that may look at each other, one way.
BESIDE = {
    ("objectives", "models"), ("evaluation", "models"), ("evaluation", "objectives"),
    ("cluster", "sweeps"), ("cli", "commands"), ("__main__", "cli"),
}  # fmt: skip
# The package's front door: `vaegan_dist.load` is fetched when a user asks for it; no module below goes through it.
FRONT_DOOR = (PACKAGE, f"{PACKAGE}.use")
# The ground floor is single modules that know each other; the cycle rule alone orders them.
GROUND = 0
# Libraries that one room alone knows.
ONLY = {
    "ray": "cluster",
    "tarfile": "data", "webdataset": "data", "obstore": "data",
    "prometheus_client": "reporting", "tensorboard": "reporting", "tensorboardX": "reporting",
    "torch.utils.tensorboard": "reporting", "mlflow": "reporting", "wandb": "reporting",
}  # fmt: skip


@dataclass(frozen=True)
class Import:
    """One module names another, at a line of a file."""

    file: str
    line: int
    importer: str
    imported: str
    type_only: bool = False

    def __str__(self) -> str:
        return f"{self.file}:{self.line} imports {self.imported}"


def module_name(relative: Path) -> str:
    """`vaegan_dist/data/order.py` -> `vaegan_dist.data.order`; a package's `__init__.py` is the package."""
    parts = relative.with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def sources(root: Path) -> dict[str, Path]:
    """Every module under `vaegan_dist/` and `jobs/` by its name."""
    files = [file for folder in (PACKAGE, "jobs") for file in sorted((root / folder).rglob("*.py"))]
    return {module_name(file.relative_to(root)): file for file in files}


def type_only_lines(tree: ast.AST) -> set[int]:
    """Lines under `if TYPE_CHECKING:`."""
    lines: set[int] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING"):
            for inner in node.body:
                lines.update(range(inner.lineno, (inner.end_lineno or inner.lineno) + 1))
    return lines


def named_modules(tree: ast.AST, importer: str, is_package: bool, modules: set[str]) -> Iterator[tuple[int, str]]:
    """Line and dotted name of every module that a file imports, wherever in the file and however it says so."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                anchor = importer.split(".")
                anchor = anchor[: len(anchor) - node.level + is_package]
                base = ".".join([*anchor, *filter(None, [node.module])])
            for alias in node.names:
                full = f"{base}.{alias.name}"
                yield node.lineno, full if full in modules or full in ONLY else base
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            called = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            if called in ("import_module", "__import__") and isinstance(node.args[0].value, str):
                yield node.lineno, node.args[0].value


def imports(root: Path) -> list[Import]:
    """Every import of every module."""
    files = sources(root)
    found = []
    for name, file in files.items():
        tree = ast.parse(file.read_text(encoding="utf-8"), filename=str(file))
        unexecuted = type_only_lines(tree)
        for line, target in named_modules(tree, name, file.name == "__init__.py", set(files)):
            found.append(Import(str(file.relative_to(root)), line, name, target, line in unexecuted))
    return found


def room(module: str) -> str:
    """The room a module stands in; `jobs` is one room, the package's own `__init__` is the room ''."""
    parts = module.split(".")
    return "jobs" if parts[0] == "jobs" else (parts[1] if len(parts) > 1 else "")


def ours(module: str) -> bool:
    return module.split(".")[0] in (PACKAGE, "jobs")


def broken_rules(root: Path) -> list[str]:
    """One line for each import that points up, sideways, or at a library of another room; and for each cycle."""
    lines = []
    edges: dict[str, dict[str, Import]] = {}
    files = sources(root)
    lines += [
        f"{file.relative_to(root)}: room {room(name)!r} has no floor; give it one in FLOORS"
        for name, file in files.items()
        if room(name) not in FLOORS
    ]
    for found in imports(root):
        here = room(found.importer)
        if (found.importer, found.imported) == FRONT_DOOR:
            continue
        if not ours(found.imported):
            for library, owner in ONLY.items():
                if f"{found.imported}.".startswith(f"{library}.") and here != owner:
                    lines.append(f"{found}: only {owner}/ may import {library}")
            continue
        if found.imported in files and not found.type_only:
            edges.setdefault(found.importer, {}).setdefault(found.imported, found)
        there = room(found.imported)
        if here == there or here not in FLOORS or there not in FLOORS:
            continue
        if FLOORS[there] == FLOORS[here] == GROUND or (here, there) in BESIDE:
            continue
        if FLOORS[there] > FLOORS[here]:
            lines.append(f"{found}: {there or PACKAGE} stands above {here or PACKAGE}")
        elif FLOORS[there] == FLOORS[here]:
            lines.append(f"{found}: {here} and {there} stand side by side and may not know each other")
    return lines + [f"cycle: {' -> '.join(map(str, cycle))}" for cycle in cycles(edges)]


def cycles(edges: dict[str, dict[str, Import]]) -> list[list[Import]]:
    """A shortest cycle through each group of modules that import each other in a circle."""
    found, covered = [], set()
    for start in sorted(edges):
        if start in covered:
            continue
        paths: dict[str, list[Import]] = {start: []}
        queue = [start]
        for module in queue:
            for target, edge in edges.get(module, {}).items():
                if target == start:
                    cycle = [*paths[module], edge]
                    found.append(cycle)
                    covered.update(step.importer for step in cycle)
                    queue.clear()
                    break
                if target not in paths:
                    paths[target] = [*paths[module], edge]
                    queue.append(target)
    return found


def test_imports_point_down() -> None:
    broken = broken_rules(REPOSITORY)
    assert not broken, "\n".join(broken)


def test_the_checker_reads_the_real_package() -> None:
    """An empty walk would pass everything."""
    found = imports(REPOSITORY)
    assert {"vaegan_dist.config", "vaegan_dist.reporting.sinks"} <= set(sources(REPOSITORY))
    assert any(
        edge.importer == "vaegan_dist.reporting.sinks" and edge.imported == "vaegan_dist.errors" for edge in found
    )
    assert any(edge.imported == "torch.utils.tensorboard" for edge in found)


GOOD = {
    "vaegan_dist/__init__.py": "",
    "vaegan_dist/errors.py": "",
    "vaegan_dist/config.py": "from vaegan_dist.errors import ConfigError",
    "vaegan_dist/data/__init__.py": "from vaegan_dist.data.store import Store",
    "vaegan_dist/data/store.py": "import obstore, tarfile\nfrom vaegan_dist import config\n"
    "if TYPE_CHECKING:\n    from vaegan_dist.data.index import Index",
    "vaegan_dist/data/index.py": "from vaegan_dist.data.store import Store\nfrom . import store",
    "vaegan_dist/models/conv.py": "import torch\nimport arrayobstore\nimport rayon",
    "vaegan_dist/objectives/vae.py": "from vaegan_dist.models import conv",
    "vaegan_dist/evaluation/metrics.py": "from vaegan_dist.objectives import vae\nfrom vaegan_dist.models import conv",
    "vaegan_dist/reporting/sinks.py": "def f():\n    from torch.utils.tensorboard import SummaryWriter",
    "vaegan_dist/training/loop.py": "from vaegan_dist.data.index import Index\nfrom vaegan_dist.reporting import sinks",
    "vaegan_dist/cluster/ray_train.py": "import ray.train\nfrom vaegan_dist.training import loop",
    "vaegan_dist/cli.py": "from vaegan_dist.cluster.ray_train import fit",
    "jobs/train.py": "from vaegan_dist.cli import main",
}


def house(root: Path, **changed: str) -> Path:
    for name, content in (GOOD | {name.replace("__", "/") + ".py": text for name, text in changed.items()}).items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(content + "\n")
    return root


def test_the_checker_accepts_a_sound_house(tmp_path: Path) -> None:
    assert broken_rules(house(tmp_path)) == []


@pytest.mark.parametrize(
    ("file", "snippet", "named"),
    [
        ("vaegan_dist/data/index.py", "import vaegan_dist.training.loop", "training stands above data"),
        ("vaegan_dist/data/index.py", "from ..training import loop", "training stands above data"),
        ("vaegan_dist/data/index.py", "def f():\n    from vaegan_dist import cli", "cli stands above data"),
        ("vaegan_dist/training/loop.py", "if TYPE_CHECKING:\n    from vaegan_dist.cluster import ray_train", "cluster"),
        ("vaegan_dist/config.py", "from vaegan_dist.models.conv import x", "models stands above config"),
        ("vaegan_dist/data/index.py", "from vaegan_dist.models.conv import x", "side by side"),
        ("vaegan_dist/models/conv.py", "from vaegan_dist.objectives.vae import loss", "side by side"),
        ("vaegan_dist/cli.py", "import jobs.train", "jobs stands above cli"),
        ("vaegan_dist/cli.py", 'importlib.import_module("jobs.train")', "jobs stands above cli"),
        ("vaegan_dist/training/loop.py", "import ray", "only cluster/ may import ray"),
        ("vaegan_dist/training/loop.py", "from ray.train import report", "only cluster/ may import ray"),
        ("jobs/train.py", '__import__("ray")', "only cluster/ may import ray"),
        ("vaegan_dist/training/loop.py", "import numpy, tarfile", "only data/ may import tarfile"),
        ("vaegan_dist/models/conv.py", "import webdataset as wds", "only data/ may import webdataset"),
        ("vaegan_dist/training/loop.py", "from obstore.store import S3Store", "only data/ may import obstore"),
        ("vaegan_dist/training/loop.py", "from torch.utils.tensorboard import SummaryWriter", "only reporting/"),
        ("vaegan_dist/training/loop.py", "from torch.utils import tensorboard", "only reporting/"),
        ("vaegan_dist/cluster/ray_train.py", "import prometheus_client.core", "only reporting/"),
        ("vaegan_dist/cluster/ray_train.py", "import mlflow", "only reporting/ may import mlflow"),
        ("vaegan_dist/training/loop.py", "import wandb", "only reporting/ may import wandb"),
        ("vaegan_dist/errors.py", "from vaegan_dist.config import Config", "cycle: "),
        ("vaegan_dist/data/store.py", "def f():\n    from vaegan_dist.data.index import Index", "cycle: "),
        ("vaegan_dist/attic/old.py", "", "room 'attic' has no floor"),
    ],
)
def test_the_checker_names_file_and_import(tmp_path: Path, file: str, snippet: str, named: str) -> None:
    house(tmp_path)
    path = tmp_path / file
    path.parent.mkdir(exist_ok=True)
    before = path.read_text() if path.exists() else ""
    path.write_text(f"{before}{snippet}\n")
    broken = broken_rules(tmp_path)
    # An import that points up often closes a circle as well; that may be said, but nothing else.
    assert named in broken[0] and file in broken[0]
    assert all(line.startswith("cycle: ") for line in broken[1:])
    if snippet:
        assert f"{file}:{len(before.splitlines()) + len(snippet.splitlines())} imports" in broken[0]
