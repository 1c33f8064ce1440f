"""Another run's checkpoint becomes this run's newest one, under this run's own configuration: for copies in a sweep."""

import json
import shutil
from pathlib import Path

from vaegan_dist.config import Config
from vaegan_dist.config_source import dump_yaml
from vaegan_dist.training.checkpoint import SEAL, Checkpoint, checkpoints, folder_name, images_of, open_checkpoint
from vaegan_dist.training.commit import PARTIAL, seal
from vaegan_dist.training.resume import run_folder


def graft(source: Path, config: Config) -> Checkpoint:
    """Put a copy of the checkpoint `source` into the run's folder; weights, average, optimiser and place are its own.

    Checkpoints of the run at or past that image count go. Interrupted at any moment, the run still has an older
    whole checkpoint or starts anew.

    Raises:
        BrokenCheckpointError: `source` is not whole.
    """
    donor = open_checkpoint(source)
    folder = run_folder(config)
    final = folder / folder_name(donor.progress.images_seen)
    temporary = folder / f".{final.name}{PARTIAL}"
    shutil.rmtree(temporary, ignore_errors=True)
    # Only what the seal names: whoever carried the folder here may have put files of its own beside.
    temporary.mkdir(parents=True)
    for name in json.loads((source / SEAL).read_text())["files"]:
        shutil.copyfile(source / name, temporary / name)
    (temporary / "config.yaml").write_text(dump_yaml(config))
    seal(temporary)
    for path in checkpoints(folder):
        if images_of(path) >= donor.progress.images_seen:
            (path / SEAL).unlink(missing_ok=True)
            shutil.rmtree(path)
    temporary.rename(final)
    return open_checkpoint(final)
