"""Writing a checkpoint so that it is whole or absent, and removing old ones."""

import json
import os
import shutil
from pathlib import Path

from safetensors.torch import save_file

import vaegan_dist
from vaegan_dist.files import file_sha256, sync_folder
from vaegan_dist.training.checkpoint import (
    FORMAT_VERSION,
    PREFIX,
    SEAL,
    BrokenCheckpointError,
    checkpoints,
    folder_name,
    images_of,
    open_checkpoint,
)
from vaegan_dist.training.snapshot import Snapshot

PARTIAL = ".partial"
DAMAGED = "damaged-"


def write_checkpoint(snapshot: Snapshot, folder: Path) -> Path:
    """Write a snapshot below `folder` and return the checkpoint's own folder.

    Raises:
        OSError: when the storage is full, read-only or gone; nothing is left under the checkpoint's name then.
    """
    final = folder / folder_name(snapshot.images_seen)
    temporary = folder / f".{final.name}{PARTIAL}"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()  # in a folder that must be there: one made anew would hide that the run's own is gone
    try:
        _write_files(snapshot, temporary)
        seal(temporary)
        # The rows that lead up to this image must outlive a power cut if the checkpoint does.
        history = folder / "history.jsonl"
        if history.exists():
            _sync(history)
        _put_in_place(temporary, final)
        sync_folder(folder)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    return final


def _write_files(snapshot: Snapshot, folder: Path) -> None:
    metadata = {"format": "pt", "vaegan.version": vaegan_dist.__version__}
    for name, tensors in snapshot.files.items():
        save_file(tensors, folder / name, metadata)
    (folder / "config.yaml").write_text(snapshot.config)
    (folder / "state.json").write_text(json.dumps(snapshot.summary, indent=1))


def seal(folder: Path) -> None:
    """Sync every file, and write their sizes and hashes into `checkpoint.json`."""
    files = {}
    for path in sorted(folder.iterdir()):
        files[path.name] = {"bytes": path.stat().st_size, "sha256": file_sha256(path)}
        _sync(path)
    written = folder / SEAL
    written.write_text(json.dumps({"format_version": FORMAT_VERSION, "files": files}, indent=1))
    _sync(written)
    sync_folder(folder)


def _put_in_place(temporary: Path, final: Path) -> None:
    if final.exists():
        try:
            open_checkpoint(final)
        except BrokenCheckpointError:
            shutil.rmtree(final)
        else:
            # The same images of the same run are the same bytes: there is nothing to replace a whole one for.
            shutil.rmtree(temporary)
            return
    temporary.rename(final)


def _sync(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())


def prune(folder: Path, keep_last: int, keep_every_images: int = 0, best: Path | None = None) -> list[Path]:
    """Remove old checkpoints and return what went.

    Kept are the newest `keep_last`, those marked to be kept (the last of a phase), the first at or after each
    multiple of `keep_every_images` (0: none), and the best.
    """
    removed = []
    found = checkpoints(folder)
    kept = set(found[:keep_last]) | (_milestones(found, keep_every_images) if keep_every_images else set())
    for path in found:
        if path not in kept and path != best and not _marked(path):
            # The seal goes first, so that a half-removed checkpoint can never pass for a whole one.
            (path / SEAL).unlink(missing_ok=True)
            shutil.rmtree(path, ignore_errors=True)
            removed.append(path)
    return removed


def _milestones(found: list[Path], every: int) -> set[Path]:
    """The oldest checkpoint between each two multiples of `every`, past the first multiple."""
    oldest = {images_of(path) // every: path for path in found}
    return {path for number, path in oldest.items() if number}


def _marked(path: Path) -> bool:
    try:
        return bool(json.loads((path / "state.json").read_text()).get("keep", False))
    except (OSError, ValueError):
        return False


def clean(folder: Path, broken: list[Path]) -> None:
    """At a start: remove what an interrupted write left, and set damaged checkpoints aside.

    A damaged one that kept its name would count as one of the newest, and whole ones would be removed for it.
    """
    for path in folder.glob(f".{PREFIX}*{PARTIAL}"):
        shutil.rmtree(path)
    for path in broken:
        aside = path.with_name(DAMAGED + path.name)
        if aside.exists():
            shutil.rmtree(aside)
        path.rename(aside)
