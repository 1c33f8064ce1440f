"""What a start can say of a run without training: that it is finished, or that it stopped before it went on."""

from vaegan_dist.config import Config
from vaegan_dist.errors import VaeganError
from vaegan_dist.training.checkpoint import newest_whole
from vaegan_dist.training.loop import Outcome
from vaegan_dist.training.remote import Found, progress_of, remote_run
from vaegan_dist.training.resume import refuse_changes, run_folder
from vaegan_dist.training.state import Progress


def outcome_of_finished(config: Config) -> Outcome | None:
    """The outcome of a run that has spent its budget, found without data, networks or workers; else None.

    Raises:
        ConfigError: the run was started with what the configuration may not change.
    """
    found = _newest(config)
    if found is None:
        return None
    refuse_changes(config, found)
    return _outcome("already done", found) if _finished(config, found.progress) else None


def outcome_of_stopped(config: Config) -> Outcome:
    """The outcome of a run that was asked to stop while no worker ran.

    Raises:
        VaeganError: no checkpoint stands, so that there is nothing to continue from.
    """
    found = _newest(config)
    if found is None:
        raise VaeganError("stopped before the first checkpoint; the same command starts the run again")
    return _outcome("stopped", found)


def _newest(config: Config) -> Found | None:
    remote = remote_run(config)
    if remote is not None:
        return progress_of(remote)
    found, _ = newest_whole(run_folder(config))
    return Found(found.path, found.config, found.progress) if found else None


def _finished(config: Config, progress: Progress) -> bool:
    last = progress.phase == len(config.phases) - 1
    return last and progress.phase_images >= config.phase_images(config.phases[progress.phase])


def _outcome(reason: str, found: Found) -> Outcome:
    return Outcome(reason, found.progress.images_seen, found.path)
