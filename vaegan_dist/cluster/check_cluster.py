"""Whether a cluster is fit to train on: every node is asked the same, and what differs or fails is one line each."""

import secrets
import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from vaegan_dist.cluster import node_probe
from vaegan_dist.cluster.node_probe import LinkRate, NodeFacts, StorageRate
from vaegan_dist.cluster.processes import free_port
from vaegan_dist.errors import VaeganError

CLOCK_LIMIT_SECONDS = 1.0
CLOCK_QUESTIONS = 5
SLOW_FACTOR = 0.5  # of the median of its peers
SMALL_SHM = 2**30


@dataclass
class NodeReport:
    """One node's answers; None where it gave none."""

    facts: NodeFacts
    trains: bool
    clock_seconds: float
    storage: StorageRate | None = None
    link: LinkRate | None = None


@dataclass
class Report:
    """All nodes, what is wrong (a run would fail or mislead) and what only costs time."""

    nodes: list[NodeReport]
    problems: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        """For machines: rates in bytes per second, times in seconds."""
        return asdict(self)


class _Probe:
    """A node's end, as an actor that takes no resources."""

    def facts(self, address: str) -> NodeFacts:
        return node_probe.node_facts(address)

    def clock(self) -> float:
        return time.time()

    def storage(self, folder: str, size: int) -> StorageRate:
        return node_probe.storage_rate(Path(folder), size)

    def mark(self, folder: str, name: str) -> None:
        node_probe.leave_mark(Path(folder), name)

    def sees(self, folder: str, names: Sequence[str]) -> list[str]:
        return [name for name in names if not (Path(folder) / name).exists()]

    def unmark(self, folder: str, name: str) -> None:
        (Path(folder) / name).unlink(missing_ok=True)

    def free_port(self, address: str) -> int:
        return free_port(address)

    def link(self, rank: int, world_size: int, master: str, port: int, size: int, seconds: float) -> LinkRate:
        return node_probe.link_rate(rank, world_size, master, port, size, seconds)


def check_cluster(storage: str, size: int, seconds: float, say: Callable[[str], None]) -> Report:
    """Ask every node of the connected cluster.

    Args:
        storage: the folder that runs will be written to.
        size: bytes that are written, read and reduced.
        seconds: time that a node has for each answer.
        say: told what is being done.

    Raises:
        VaeganError: a node does not answer, with its address.
    """
    nodes = sorted((node for node in ray.nodes() if node["Alive"]), key=lambda node: node["NodeManagerAddress"])
    asked = _Asked(nodes, seconds)
    try:
        say(f"asking {len(nodes)} nodes what they have")
        facts = asked.all("facts", [(address,) for address in asked.addresses])
        reports = [
            NodeReport(facts=fact, trains=_trains(node), clock_seconds=asked.clock(index))
            for index, (fact, node) in enumerate(zip(facts, nodes, strict=True))
        ]
        report = Report(reports)
        say(f"writing and reading {size // node_probe.MIB} MiB in {storage} on each node, one after another")
        _check_storage(report, asked, storage, size)
        _check_links(report, asked, size, seconds, say)
        _compare(report)
        return report
    finally:
        asked.close()


def _trains(node: dict[str, Any]) -> bool:
    """Whether training workers can be placed there; not on a head that was started with no CPUs."""
    return any(node["Resources"].get(resource, 0) > 0 for resource in ("CPU", "GPU"))


class _Asked:
    """A probe on each node."""

    def __init__(self, nodes: Sequence[dict[str, Any]], seconds: float) -> None:
        self.addresses = [str(node["NodeManagerAddress"]) for node in nodes]
        self.seconds = seconds
        probe = ray.remote(
            num_cpus=0,
            max_restarts=0,
            # An actor without a share of a GPU may look at all of them.
            runtime_env={"env_vars": {"RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0"}},
        )(_Probe)
        self.actors = [
            probe.options(scheduling_strategy=NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)).remote()
            for node in nodes
        ]

    def one(self, index: int, method: str, *arguments: object, seconds: float | None = None) -> Any:
        """One node's answer, or what it failed with as a `VaeganError` that names the node."""
        asked = getattr(self.actors[index], method).remote(*arguments)
        return self._answer(index, asked, seconds or self.seconds)

    def all(self, method: str, arguments: Sequence[tuple[object, ...]], seconds: float | None = None) -> list[Any]:
        """All nodes' answers, asked at the same time."""
        asked = [getattr(actor, method).remote(*each) for actor, each in zip(self.actors, arguments, strict=True)]
        return [self._answer(index, each, seconds or self.seconds) for index, each in enumerate(asked)]

    def clock(self, index: int) -> float:
        """Seconds by which a node's clock is ahead of ours, of the question with the quickest answer."""
        best, ahead = float("inf"), 0.0
        for _ in range(CLOCK_QUESTIONS):
            before = time.time()
            there = self.one(index, "clock")
            after = time.time()
            if after - before < best:
                best, ahead = after - before, there - (before + after) / 2
        return ahead

    def _answer(self, index: int, asked: Any, seconds: float) -> Any:
        node = self.addresses[index]
        try:
            return ray.get(asked, timeout=seconds)
        except ray.exceptions.GetTimeoutError:
            raise VaeganError(
                f"node {node}: no answer within {seconds:g} s; look at its raylet's log, or give more --timeout"
            ) from None
        except ray.exceptions.RayTaskError as error:
            raise VaeganError(f"node {node}: {_cause(error)}") from None
        except ray.exceptions.RayActorError as error:
            raise VaeganError(f"node {node}: its worker process ended: {str(error).splitlines()[0]}") from None

    def close(self) -> None:
        """End the probes."""
        for actor in self.actors:
            with suppress(ray.exceptions.RayError):
                ray.kill(actor)


def _cause(error: Exception) -> str:
    cause = getattr(error, "cause", None) or error
    return f"{type(cause).__name__}: {(str(cause).strip().splitlines() or [''])[0]}"


def _check_storage(report: Report, asked: _Asked, storage: str, size: int) -> None:
    """Rates of each node alone, and whether every node sees what the others wrote."""
    marks = [f".seen-by-all-{secrets.token_hex(4)}" for _ in report.nodes]
    written = []
    for index, node in enumerate(report.nodes):
        try:
            node.storage = asked.one(index, "storage", storage, size)
            asked.one(index, "mark", storage, marks[index])
            written.append(index)
        except VaeganError as error:
            report.problems.append(f"{error}; storage {storage} must be a folder that every node can write")
    for index in range(len(report.nodes)):
        missing = asked.one(index, "sees", storage, [marks[other] for other in written])
        others = [asked.addresses[other] for other in written if marks[other] in missing]
        if others:
            report.problems.append(
                f"node {asked.addresses[index]}: does not see in {storage} what {', '.join(others)} wrote there; "
                f"--storage must be a folder that all nodes share, or a bucket's URL"
            )
    for index in written:
        asked.one(index, "unmark", storage, marks[index])


def _check_links(report: Report, asked: _Asked, size: int, seconds: float, say: Callable[[str], None]) -> None:
    """All-reduce between the nodes that train, and each one's way to the next."""
    ranks = [index for index, node in enumerate(report.nodes) if node.trains]
    if len(ranks) < 2:
        report.warnings.append("fewer than two nodes can train: no network was measured")
        return
    say(f"reducing {size // node_probe.MIB} MiB between {len(ranks)} nodes")
    master = asked.addresses[ranks[0]]
    port = asked.one(ranks[0], "free_port", master)
    running = [
        asked.actors[index].link.remote(rank, len(ranks), master, port, size, seconds)
        for rank, index in enumerate(ranks)
    ]
    for index, each in zip(ranks, running, strict=True):
        try:
            # The group's own time-out ends first.
            report.nodes[index].link = asked._answer(index, each, 2 * seconds)
        except VaeganError as error:
            report.problems.append(
                f"{error}; the nodes cannot talk: look at NCCL_SOCKET_IFNAME, GLOO_SOCKET_IFNAME and network policies"
            )
            return


def _compare(report: Report) -> None:
    """What must be equal on all nodes, and what is slow on one of them."""
    _compare_packages(report)
    for node in report.nodes:
        where, ahead = f"node {node.facts.address}", node.clock_seconds
        if abs(ahead) > CLOCK_LIMIT_SECONDS:
            way = "ahead of" if ahead > 0 else "behind"
            report.problems.append(f"{where}: its clock is {abs(ahead):.1f} s {way} this one; run NTP or chrony there")
        if node.trains and node.facts.shm < SMALL_SHM:
            report.warnings.append(
                f"{where}: /dev/shm has {node.facts.shm / node_probe.MIB:.0f} MiB; reader processes "
                f"(data.loader_workers) want 1 GiB or more"
            )
        if node.facts.gpus and node.facts.missing:
            report.warnings.append(
                f"{where}: Triton does not find {' and '.join(node.facts.missing)}, and group norms go by torch, which "
                f"takes about twice as long in bfloat16; install what is missing"
            )
    kinds = {node.facts.gpus: node.facts.address for node in report.nodes if node.trains}
    if len(kinds) > 1:
        each = "; ".join(f"{address} has {_gpus(gpus)}" for gpus, address in kinds.items())
        report.warnings.append(f"the nodes have different GPUs, and the slowest sets the pace: {each}")
    drivers = {node.facts.driver: node.facts.address for node in report.nodes if node.facts.gpus}
    if len(drivers) > 1:
        each = "; ".join(f"{address} has {driver}" for driver, address in drivers.items())
        report.problems.append(f"the nodes have different GPU drivers: {each}")
    _compare_rates(report, "writes to the storage", lambda node: node.storage.write if node.storage else None)
    _compare_rates(report, "reads from the storage", lambda node: node.storage.read if node.storage else None)
    _compare_rates(report, "sends to the next node", lambda node: node.link.next_node if node.link else None)


def _compare_packages(report: Report) -> None:
    versions: dict[str, dict[str, list[str]]] = {}
    everything = {name for node in report.nodes for name in node.facts.packages}
    for node in report.nodes:
        for name in everything:
            version = node.facts.packages.get(name, "absent")
            versions.setdefault(name, {}).setdefault(version, []).append(node.facts.address)
    for name, found in sorted(versions.items()):
        if len(found) > 1:
            common = max(found, key=lambda version: len(found[version]))
            odd = "; ".join(
                f"{version} on {', '.join(found[version])}" for version in sorted(found) if version != common
            )
            report.problems.append(f"{name}: {odd}, but {common} on the others; use one image for all nodes")


def _compare_rates(report: Report, what: str, rate: Callable[[NodeReport], float | None]) -> None:
    rates = {node.facts.address: value for node in report.nodes if (value := rate(node))}
    if len(rates) < 3:
        return
    median = statistics.median(rates.values())
    for address, value in rates.items():
        if value < SLOW_FACTOR * median:
            report.warnings.append(
                f"node {address}: {what} at {value / 1e6:.0f} MB/s, half of the nodes at {median / 1e6:.0f} or more"
            )


def _gpus(names: Sequence[str]) -> str:
    return f"{len(names)} x {names[0]}" if names else "none"
