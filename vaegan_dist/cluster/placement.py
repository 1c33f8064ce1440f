"""Where training workers fit: how many, from when on, and on which nodes they cannot stay.

Ray's own scheduler is asked, by placement groups that are given back at once: it knows what is used, what drains and
what an autoscaler brings, and a group that waits is a demand that an autoscaler sees and that ends with this driver.
"""

import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import ray
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group

from vaegan_dist.config import ClusterSection, Config
from vaegan_dist.errors import VaeganError

SLICE_SECONDS = 0.5
GLANCE_SECONDS = 5.0  # for a number of workers that is hardly expected to fit
TELL_SECONDS = 10.0


def worker_resources(cluster: ClusterSection) -> dict[str, float]:
    """What Ray reserves for one worker."""
    resources = {"CPU": cluster.cpus_per_worker}
    if cluster.gpus_per_worker:
        resources["GPU"] = cluster.gpus_per_worker
    return resources


class Reservation:
    """Room for a number of workers, asked for. Close it before somebody else takes the room."""

    def __init__(self, cluster: ClusterSection, workers: int) -> None:
        # Ray Train packs its workers too.
        self.group: PlacementGroup = placement_group([worker_resources(cluster)] * workers, strategy="PACK")

    def granted(self, seconds: float = 0.0) -> bool:
        """Whether there is room, after waiting so long at most."""
        return bool(self.group.wait(seconds))

    def close(self) -> None:
        """Give the room back."""
        remove_placement_group(self.group)


def own_group() -> str:
    """The placement group that this worker is in; empty for none."""
    group = ray.util.get_current_placement_group()
    return "" if group is None else str(group.id.hex())


def release(groups: Iterable[str]) -> None:
    """Give back the room of workers that have failed.

    A controller of Ray Train that dies leaves it taken: what it set up to clean up asks the dashboard, if there is one.
    """
    for group in groups:
        if group:
            remove_placement_group(PlacementGroup(ray.PlacementGroupID(bytes.fromhex(group))))


def draining_nodes() -> dict[str, int]:
    """Nodes whose end is announced, with its time in ms since 1970 (0: not said)."""
    # What Ray Train asks too; there is no public call that needs no dashboard.
    found: dict[str, int] = ray._private.state.state.get_draining_nodes() or {}
    return found


def wait_for_room(
    config: Config, before: int | None, stop: Callable[[], bool], say: Callable[[str], None]
) -> int | None:
    """Wait until workers fit, and say how many; None when somebody asked to stop meanwhile.

    Args:
        before: number of workers of the attempt before; a range waits `cluster.resize_seconds` for as many.

    Raises:
        VaeganError: too few fit within `cluster.start_timeout_seconds`.
    """
    cluster, wait = config.cluster, _Wait(config.cluster, stop, say)
    expected = before or cluster.most_workers
    while True:
        for workers in reversed(config.world_sizes):
            patience = GLANCE_SECONDS
            if len(config.world_sizes) == 1:
                patience = cluster.start_timeout_seconds
            elif workers == expected:
                patience = cluster.resize_seconds
            if wait.granted(workers, patience):
                return workers
            if stop():
                return None
            if wait.seconds > cluster.start_timeout_seconds:
                raise VaeganError(
                    f"no room for {cluster.fewest_workers} workers within {cluster.start_timeout_seconds} s "
                    f"(cluster.start_timeout_seconds): {_shortage(cluster, free=True)}; add nodes, or set "
                    f"cluster.workers lower, and run the same command again"
                )
        expected = 0


class _Wait:
    """One wait for room, over several numbers of workers."""

    def __init__(self, cluster: ClusterSection, stop: Callable[[], bool], say: Callable[[str], None]) -> None:
        self.cluster, self.stop, self.say = cluster, stop, say
        self.began, self.told = time.monotonic(), False

    @property
    def seconds(self) -> float:
        """So far."""
        return time.monotonic() - self.began

    def granted(self, workers: int, patience: float) -> bool:
        """Whether so many workers fit, within so many seconds."""
        deadline = min(time.monotonic() + patience, self.began + self.cluster.start_timeout_seconds)
        reservation = Reservation(self.cluster, workers)
        try:
            while not reservation.granted(SLICE_SECONDS):
                if time.monotonic() > deadline or self.stop():
                    return False
                self._tell()
            return True
        finally:
            reservation.close()

    def _tell(self) -> None:
        if self.seconds > TELL_SECONDS and not self.told:
            self.told = True
            self.say(f"waiting up to {self.cluster.start_timeout_seconds} s for room: {_shortage(self.cluster)}")


def _shortage(cluster: ClusterSection, free: bool = False) -> str:
    """What workers need against what the living nodes have.

    Args:
        free: say how much of it is free; only without a reservation of our own, which takes its part at once.
    """
    draining = draining_nodes()
    nodes = [node for node in ray.nodes() if node["Alive"] and node["NodeID"] not in draining]
    parts = []
    for resource, each in worker_resources(cluster).items():
        have = sum(node["Resources"].get(resource, 0.0) for node in nodes)
        unused = f", of which {ray.available_resources().get(resource, 0.0):g} are free" if free else ""
        parts.append(
            f"{cluster.fewest_workers} workers need {cluster.fewest_workers * each:g} {resource}, the {len(nodes)} "
            f"nodes have {have:g}{unused}"
        )
    return "; ".join(parts)


def larger_sizes(config: Config, workers: int) -> Sequence[int]:
    """Numbers of workers above the present one, the next one first."""
    return [size for size in config.world_sizes if size > workers]


def names_of(nodes: Sequence[str]) -> str:
    """Nodes for people: their addresses where Ray knows them."""
    known: dict[str, Any] = {node["NodeID"]: node for node in ray.nodes()}
    return ", ".join(f"{known[n]['NodeName']} ({n[:8]})" if n in known else n[:8] for n in nodes)
