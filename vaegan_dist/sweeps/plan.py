"""A sweep that is checked and ready: settings, space, the configuration under it, and by what its trials are judged."""

from dataclasses import dataclass
from pathlib import Path

from vaegan_dist.config import Config
from vaegan_dist.config_source import with_changes
from vaegan_dist.errors import ConfigError
from vaegan_dist.sweeps.judge import judge
from vaegan_dist.sweeps.ledger import Ledger, read_ledger
from vaegan_dist.sweeps.search import Proposals
from vaegan_dist.sweeps.settings import SweepSettings
from vaegan_dist.sweeps.space import Space, check_space, read_space
from vaegan_dist.sweeps.trial import Judged
from vaegan_dist.training.remote import run_url

# Kinds of stores that Tune can write to by way of `data/arrow.py`, which costs the import of pyarrow.
COPIED = ("s3", "gs", "az")

# Part of the budget at which asha first judges: after a twelfth it stopped the best β (docs/sweeps.md, Measured).
FIRST_RUNG = 6


@dataclass(frozen=True)
class Plan:
    """All that a sweep needs but Ray."""

    settings: SweepSettings
    space: Space
    config: Config
    judged: Judged
    ledger: Ledger
    proposals: Proposals

    @property
    def folder(self) -> Path:
        """The sweep's folder on this machine; a copy, where `run.storage` is a URL."""
        return self.ledger.folder

    @property
    def place(self) -> str:
        """Where the sweep stands, for people: its folder, or its URL."""
        return run_url(self.config) or str(self.folder)

    @property
    def grace(self) -> int:
        """Images that every trial may spend before asha, hyperband or the median rule compare it with others."""
        least = self.judged.interval
        if self.settings.scheduler == "asha":
            least = max(least, -(-self.config.total_images // FIRST_RUNG))
        return self.settings.grace_images or least

    @property
    def left(self) -> int:
        """Trials that have not ended, begun or not."""
        return self.proposals.total - sum(trial.ended for trial in self.ledger.trials.values())

    def propose_all(self) -> None:
        """Have every trial in the ledger, for a scheduler that must know all of them from the start."""
        while self.proposals.next() is not None:
            pass


def make_plan(settings: SweepSettings, config: Config, ledger: Ledger | None = None) -> Plan:
    """Check a sweep against the configuration's schema, its metric and its scheduler; nothing is written.

    Raises:
        ConfigError: one line that names key, value and remedy.
    """
    _refuse_uncopied(settings, config)
    config = base_config(settings, config)
    space = read_space(settings.space)
    if settings.searcher == "grid":
        _refuse_infinite(space)
    check_space(space, config, settings.initial)
    judged = judge(settings, config)
    if settings.scheduler != "none" and judged.interval >= config.total_images:
        raise ConfigError(
            f"scheduler={settings.scheduler}: its first look at a trial would be after {judged.interval:,} of "
            f"{config.total_images:,} images; set interval_images lower, or scheduler: none"
        )
    ledger = ledger or read_ledger(config)
    proposals = Proposals(settings, space, config, ledger, judged.metrics)
    return Plan(settings, space, config, judged, ledger, proposals)


def base_config(settings: SweepSettings, config: Config) -> Config:
    """The configuration under all trials: workers of one trial, and threads that do not depend on the machine."""
    workers = settings.workers_per_trial or config.cluster.most_workers
    threads = config.training.torch_threads or max(1, int(config.cluster.cpus_per_worker))
    return with_changes(config, {"cluster.workers": workers, "training.torch_threads": threads})


def _refuse_uncopied(settings: SweepSettings, config: Config) -> None:
    """Tune carries the weights that pbt copies, and writes to these stores only."""
    scheme = config.run.storage.partition("://")[0]
    if settings.scheduler == "pbt" and run_url(config) and scheme not in COPIED:
        raise ConfigError(
            f"scheduler=pbt: weights cannot be copied by way of {scheme}://; use one of {', '.join(COPIED)} "
            f"or a folder as run.storage, or another scheduler"
        )


def _refuse_infinite(space: Space) -> None:
    for key, branches in space.domains.items():
        for domain in branches:
            if not domain.finite:
                raise ConfigError(
                    f"searcher=grid: space.{key} is {domain.kind}, which has no end; write {{grid: [...]}}, or choose "
                    f"searcher: random or tpe"
                )
