"""Keeps what a run writes beside its checkpoints up to date on an object store."""

import threading

from vaegan_dist.errors import VaeganError
from vaegan_dist.training.remote import RemoteRun

MIRROR_SECONDS = 60.0


class Mirror:
    """A thread of rank 0 that uploads history, pictures and events at intervals, and once more at the end.

    Its trouble is a warning: a checkpoint uploads the history that it needs itself.
    """

    def __init__(self, remote: RemoteRun, seconds: float = MIRROR_SECONDS) -> None:
        self.remote, self.seconds = remote, seconds
        self._trouble, self._told = "", False
        self._ending = threading.Event()
        # A daemon, so that a store that hangs cannot keep the process.
        self._thread = threading.Thread(target=self._run, name="mirror", daemon=True)
        self._thread.start()

    def warnings(self) -> list[str]:
        """One line when uploads begin to fail."""
        if not self._trouble or self._told:
            return []
        self._told = True
        return [f"{self._trouble}; trying again every {self.seconds:g} s"]

    def close(self) -> str:
        """Upload what is left; empty, or why that failed."""
        self._ending.set()
        self._thread.join(self.seconds)
        self._push()
        return self._trouble

    def _run(self) -> None:
        while not self._ending.wait(self.seconds):
            self._push()

    def _push(self) -> None:
        try:
            self.remote.push_rest()
        except (VaeganError, OSError) as error:
            self._trouble = f"history and pictures could not be uploaded: {error}"
        else:
            self._trouble, self._told = "", False
