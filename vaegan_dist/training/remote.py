"""Runs whose storage is a URL: written to a folder on this machine first, then uploaded; the store is what counts.

A checkpoint's objects are uploaded one by one, its seal `checkpoint.json` last, so that one without a seal is none.
What the folder on this machine holds is only a copy: a start puts it in the state of the store, whatever it held.
"""

import json
import secrets
import shutil
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from vaegan_dist.config import Config
from vaegan_dist.config_source import validate
from vaegan_dist.data.cache import cache_folder, content_key, locked
from vaegan_dist.data.objects import Objects
from vaegan_dist.data.transfer import ATTEMPTS
from vaegan_dist.data.urls import is_remote
from vaegan_dist.errors import ConfigError, InputError, VaeganError
from vaegan_dist.files import write_whole
from vaegan_dist.training.best import POINTER
from vaegan_dist.training.checkpoint import (
    PREFIX,
    SEAL,
    BrokenCheckpointError,
    checkpoints,
    images_of,
    open_checkpoint,
)
from vaegan_dist.training.resume import refuse_existing, run_folder
from vaegan_dist.training.state import Progress

OWNER = "owner.json"
SMALL_BYTES = 256 * 2**20  # a history of years


class SupersededError(VaeganError):
    """Another process has taken the run over."""


class RemoteRun:
    """A run on an object store, and its copy in a folder on this machine.

    Args:
        url: of the run's folder.
        folder: its copy.
        attempts: requests in a row that may bring nothing before the store is given up.

    Raises:
        InputError: not a usable URL.
    """

    def __init__(self, url: str, folder: Path, attempts: int = ATTEMPTS) -> None:
        self.url, self.folder = url.rstrip("/"), folder
        self.objects = Objects(self.url, attempts=attempts)
        self._token = ""
        self._uploaded: dict[str, tuple[int, int]] = {}

    def take_over(self) -> None:
        """From now on this process writes the run; an earlier one that still lives finds out before it seals."""
        self._token = secrets.token_hex(8)
        self.objects.write(OWNER, json.dumps({"token": self._token}).encode())

    def check_owner(self) -> None:
        """Raises SupersededError when another process has taken the run over."""
        content = self.objects.small(OWNER, SMALL_BYTES)
        if content is None or json.loads(content)["token"] != self._token:
            raise SupersededError(f"{self.url}: another process has taken this run over; this one ends")

    def sealed(self) -> list[str]:
        """Names of the checkpoints that were uploaded whole, newest first."""
        return sorted(self._by_checkpoint(sealed=True), reverse=True)

    def pull(self) -> list[str]:
        """Put the copy in the state of the store: newest whole checkpoint, history and what else a start reads.

        Removes what an interrupted upload left.

        Returns:
            One line for each checkpoint that is damaged in the store; it loses its seal, and its rest goes next time.
        """
        for objects in self._by_checkpoint(sealed=False).values():
            self.objects.delete(objects)
        names, complaints = self.drop_others(), list[str]()
        for name in names:
            try:
                self.fetch(name)
                break
            except BrokenCheckpointError as error:
                complaints.append(str(error))
                self.objects.delete([f"{name}/{SEAL}"])
        for name in self.objects.sizes():
            if "/" not in name and name.endswith((".json", ".jsonl")) and name != OWNER:
                self._fetch_small(name)
        return complaints

    def drop_others(self) -> list[str]:
        """Remove copies of what the store does not have, or has replaced; `sealed` of what it has."""
        names = self.sealed()
        for path in checkpoints(self.folder):
            if path.name not in names or not self._same(path.name):
                shutil.rmtree(path)
        return names

    def fetch(self, name: str) -> Path:
        """A checkpoint's copy on this machine, whole; downloaded unless it is there.

        What stands in the store may have been replaced by another one at the same image count.

        Raises:
            BrokenCheckpointError: it is damaged in the store.
        """
        path = self.folder / name
        self.folder.mkdir(parents=True, exist_ok=True)
        with locked(self.folder / ".fetch"):
            with suppress(BrokenCheckpointError):
                if self._same(name):
                    open_checkpoint(path)
                    return path
            partial = self.folder / f".{name}.partial"
            for stale in (path, partial):
                shutil.rmtree(stale, ignore_errors=True)
            partial.mkdir()
            for object_name, size in self.objects.sizes(name).items():
                file = partial / object_name.rpartition("/")[2]
                self.objects.fill(object_name, object_name, file, size)
            partial.rename(path)
            try:
                open_checkpoint(path)
            except BrokenCheckpointError as error:
                shutil.rmtree(path)
                raise BrokenCheckpointError(f"in {self.url}: {error}") from None
        return path

    def push(self, path: Path) -> None:
        """Upload a checkpoint, after the history that leads up to it; then remove what this machine keeps no more.

        Raises:
            SupersededError: another process has taken the run over.
        """
        self.push_rest()
        for file in sorted(path.iterdir()):
            if file.name != SEAL:
                self.objects.upload(f"{path.name}/{file.name}", file)
        self.check_owner()
        self.objects.upload(f"{path.name}/{SEAL}", path / SEAL)
        kept = {local.name for local in checkpoints(self.folder)} | {path.name}
        self._discard(lambda name: name not in kept)
        self.push_rest()

    def replace(self, path: Path) -> None:
        """The same, in place of what stands at its image count or past it: the run goes back to `path`.

        Interrupted at any moment, an older whole checkpoint stands, or none.
        """
        self.check_owner()
        self._discard(lambda name: name >= path.name)
        self.push(path)

    def _discard(self, unwanted: Callable[[str], bool]) -> None:
        for name, objects in self._by_checkpoint(sealed=True).items():
            if unwanted(name):
                # The seal goes first, so that a half-removed checkpoint can never pass for a whole one.
                self.objects.delete([f"{name}/{SEAL}", *(other for other in objects if not other.endswith(SEAL))])

    def push_rest(self) -> None:
        """Upload everything else that has changed: history, configuration, pictures, events.

        Raises:
            SupersededError: another process has taken the run over, whose history it would overwrite.
        """
        self.check_owner()
        for path in sorted(self.folder.rglob("*")):
            name = path.relative_to(self.folder).as_posix()
            if name.startswith((PREFIX, ".")) and name != ".metrics.json":
                continue
            if name.startswith("ray/") or path.name.endswith((".tmp", ".old", ".lock")) or not path.is_file():
                continue
            status = path.stat()
            seen = (status.st_size, status.st_mtime_ns)
            if self._uploaded.get(name) != seen:
                self.objects.upload(name, path)
                self._uploaded[name] = seen

    def _by_checkpoint(self, sealed: bool) -> dict[str, list[str]]:
        """Objects of the checkpoints that have a seal, or of those that have none."""
        found: dict[str, list[str]] = {}
        for name in self.objects.sizes():
            folder, _, file = name.partition("/")
            if folder.startswith(PREFIX) and file:
                found.setdefault(folder, []).append(name)
        return {folder: names for folder, names in found.items() if (f"{folder}/{SEAL}" in names) == sealed}

    def _same(self, name: str) -> bool:
        """Whether the copy of a checkpoint is of the one in the store."""
        try:
            return (self.folder / name / SEAL).read_bytes() == self.objects.small(f"{name}/{SEAL}", SMALL_BYTES)
        except OSError:
            return False

    def _fetch_small(self, name: str) -> None:
        content = self.objects.small(name, SMALL_BYTES)
        if content is not None:
            write_whole(self.folder / name, content)


def run_url(config: Config) -> str | None:
    """URL of a run's folder; None where `run.storage` is one of this machine's."""
    storage = config.run.storage
    return f"{storage.rstrip('/')}/{config.run.name}" if is_remote(storage) else None


def remote_run(config: Config, attempts: int = ATTEMPTS) -> RemoteRun | None:
    """The run behind `run.storage`; None where that is a folder."""
    url = run_url(config)
    return RemoteRun(url, run_folder(config), attempts) if url else None


def fetch_checkpoint(url: str, which: str = "newest") -> Path:
    """A checkpoint behind a URL as a folder on this machine, verified and kept for the next time.

    Args:
        url: of a run, or of one of its checkpoints.
        which: of a run, "newest" or "best".

    Raises:
        InputError: there is none, it is damaged, or no access.
    """
    run, _, last = url.rstrip("/").rpartition("/")
    run, wanted = (run, last) if last.startswith(PREFIX) else (url.rstrip("/"), "")
    cache = cache_folder("models")
    if cache is None:
        raise InputError(f"{url}: no folder for the copy can be made; set VAEGAN_CACHE to a writable one")
    remote = RemoteRun(run, cache / content_key(run))
    names = remote.sealed()
    if not wanted and which == "best":
        pointer = remote.objects.small(POINTER, SMALL_BYTES)
        wanted = str(json.loads(pointer)["checkpoint"]) if pointer else "none named by best.json"
    wanted = wanted or (names[0] if names else "any")
    if wanted not in names:
        raise InputError(f"{url}: no whole checkpoint there (looked for {wanted}); give the URL of a run")
    return remote.fetch(wanted)


def standing(config: Config) -> tuple[str, int] | None:
    """Where the newest checkpoint of a run behind a URL stands, and its images; None without one."""
    remote = remote_run(config)
    names = remote.sealed() if remote else []
    return (f"{remote.url}/{names[0]}", images_of(Path(names[0]))) if remote and names else None


@dataclass(frozen=True)
class Found:
    """A checkpoint without its tensors."""

    path: Path
    config: Config
    progress: Progress


def progress_of(remote: RemoteRun) -> Found | None:
    """The newest checkpoint, without its tensors (its path is that of its copy, if one is here); None without one."""
    import yaml

    for name in remote.sealed()[:1]:
        state = remote.objects.small(f"{name}/state.json", SMALL_BYTES)
        tree = remote.objects.small(f"{name}/config.yaml", SMALL_BYTES)
        if state is not None and tree is not None:
            progress = Progress.from_json(json.loads(state)["progress"])
            return Found(remote.folder / name, validate(yaml.safe_load(tree)), progress)
    return None


def refuse_standing(config: Config) -> None:
    """For `--fresh`: a run of that name must not stand yet, neither in the storage nor on this machine."""
    remote = remote_run(config)
    if remote is None:
        refuse_existing(run_folder(config))
    elif remote.objects.sizes():
        raise ConfigError(
            f"run.name={config.run.name}: a run of that name stands in {config.run.storage}; choose another run.name, "
            f"or leave out --fresh to continue it"
        )
