"""The sweep's own small actor: trials say how far they are, the driver reads it; requests to stop go the other way."""

from typing import Any

import ray

Progress = dict[int, tuple[int, float]]
"""images seen and images per second, by trial"""


class SweepHub:
    """What the trials and the driver know of each other between two values of the metric."""

    def __init__(self) -> None:
        self.stop = False
        self.places: Progress = {}

    def note(self, trial: int, images_seen: int, rate: float) -> None:
        """A trial says where it is."""
        self.places[trial] = (images_seen, rate)

    def progress(self) -> Progress:
        """Where the trials are."""
        return self.places

    def request_stop(self) -> None:
        """Ask every trial to stop with a checkpoint."""
        self.stop = True

    def stop_requested(self) -> bool:
        """Whether somebody asked."""
        return self.stop


def start_sweep_hub() -> Any:
    """Start the actor; it ends with the driver that started it."""
    return ray.remote(SweepHub).options(num_cpus=0, max_restarts=-1, max_task_retries=3).remote()


class StopQuestion:
    """Asks the hub whether to stop, without ever waiting for the answer."""

    def __init__(self, hub: Any) -> None:
        self.hub = hub
        self._asked: Any = None
        self._answer = False

    def __call__(self) -> bool:
        """The newest answer."""
        if self._answer:
            return True
        if self._asked is None:
            self._asked = self.hub.stop_requested.remote()
        ready, _ = ray.wait([self._asked], timeout=0)
        if ready:
            try:
                self._answer = bool(ray.get(self._asked))
            except ray.exceptions.RayActorError:
                self._answer = False  # without a hub nobody can ask
            self._asked = None
        return self._answer
