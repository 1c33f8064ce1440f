"""A sweep on Ray Tune: its schedulers and its controller, our ledger.

Tune runs the trials, uses their processes again and judges them; what was tried and measured stands in the sweep's own
ledger, and each start makes a new experiment out of it. Tune's own restore would go on from a state that is saved every
few seconds at best, and without its scheduler's.
"""

import logging
import os
import shutil
import uuid
import warnings
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, Literal

# Read by Tune in this process when an experiment starts.
os.environ.update(
    TUNE_DISABLE_AUTO_CALLBACK_LOGGERS="1",
    TUNE_DISABLE_SIGINT_HANDLER="1",
    TUNE_GLOBAL_CHECKPOINT_S=str(10**9),
    TUNE_WARN_EXCESSIVE_EXPERIMENT_CHECKPOINT_SYNC_THRESHOLD_S="0",
    RAY_AIR_NEW_OUTPUT="0",
)

import ray
from ray import tune
from ray.tune.experiment import Trial as TuneTrial
from ray.tune.search import ConcurrencyLimiter, Searcher

from vaegan_dist.cluster.background import background
from vaegan_dist.cluster.placement import worker_resources
from vaegan_dist.cluster.ray_train import connect, local_cpus
from vaegan_dist.cluster.signals import stop_signals
from vaegan_dist.cluster.sweep_hub import Progress, start_sweep_hub
from vaegan_dist.cluster.sweep_schedulers import make_scheduler, number_of
from vaegan_dist.cluster.sweep_trial import Shared, run_trial
from vaegan_dist.config import Config
from vaegan_dist.data.arrow import arrow_filesystem
from vaegan_dist.errors import ConfigError, VaeganError
from vaegan_dist.sweeps.ledger import Trial, trial_name
from vaegan_dist.sweeps.plan import Plan
from vaegan_dist.training.remote import remote_run

OnProgress = Callable[[Progress], None]
Ending = Literal["done", "stopped"]
BOOKKEEPING = "ray"
# Schedulers that must know all trials from the start.
TOGETHER = ("hyperband", "pbt")
POLL_SECONDS = 1.0
DRIVER_MEMORY = 64 * 2**20
KEPT_FOR_COPIES = 4


def run_sweep(plan: Plan, on_progress: OnProgress, address: str = "auto", worker_logs: bool = False) -> Ending:
    """Run what is left of a sweep and return how it ended; the driver's side.

    Args:
        on_progress: called about once a second with where the trials are that have a process.
        address, worker_logs: as in `train_on_ray`.
    """
    if not plan.left:
        return "done"
    connect(plan.config, address, worker_logs)
    concurrent = min(concurrency(plan), plan.left)
    hub = start_sweep_hub()
    _clear_bookkeeping(plan)
    if plan.settings.scheduler in TOGETHER:
        plan.propose_all()
    book = _Book(plan)
    try:
        with stop_signals(lambda: _stop(book, hub)), _followed(hub, book, on_progress), _quiet():
            _tuner(plan, hub, book, concurrent).fit()
    except Exception:
        if plan.ledger.trouble is None:
            raise
    if plan.ledger.trouble is not None:
        # Tune wraps it into an error of its own, or only logs it.
        raise plan.ledger.trouble
    _clear_bookkeeping(plan)
    if plan.left and not book.stopping:
        raise VaeganError(
            f"Ray Tune ended with {plan.left} trials left{book.why}; run the same command again to continue"
        )
    return "stopped" if plan.left else "done"


def _clear_bookkeeping(plan: Plan) -> None:
    """Remove what Tune left, of this start or of an earlier one."""
    shutil.rmtree(plan.folder / BOOKKEEPING, ignore_errors=True)
    remote = remote_run(plan.config)
    if remote is not None:
        remote.objects.delete(remote.objects.sizes(BOOKKEEPING))


def _storage(plan: Plan) -> dict[str, Any]:
    """Where Tune keeps its own files: on the driver, but for the checkpoints of pbt, which every node must reach."""
    remote = remote_run(plan.config)
    if remote is None or plan.settings.scheduler != "pbt":
        return {"storage_path": str(plan.folder / BOOKKEEPING)}
    filesystem, path = arrow_filesystem(f"{remote.url}/{BOOKKEEPING}")
    return {"storage_path": path, "storage_filesystem": filesystem}


def _stop(book: "_Book", hub: Any) -> None:
    book.stopping = True
    hub.request_stop.remote()


def concurrency(plan: Plan) -> int:
    """Trials that run at a time: what the settings say, or as many as the cluster holds.

    Raises:
        ConfigError: not one fits, or fewer than the settings want.
    """
    if plan.settings.autoscaling and plan.settings.concurrent:
        return plan.settings.concurrent
    room = slots([node["Resources"] for node in ray.nodes() if node["Alive"]], plan.config)
    if room < (plan.settings.concurrent or 1):
        have = ray.cluster_resources()
        raise _too_many(plan, room, have.get("CPU", 0.0), have.get("GPU", 0.0))
    return plan.settings.concurrent or room


def concurrency_at(plan: Plan, address: str) -> tuple[int, str]:
    """The same without starting Ray: of the cluster that is there, else of this machine; and which of them it was."""
    if address == "local" or (address == "auto" and "RAY_ADDRESS" not in os.environ):
        cpus = local_cpus(plan.config)
        room = slots([{"CPU": cpus}], plan.config)
        if room < (plan.settings.concurrent or 1):
            raise _too_many(plan, room, cpus, 0)
        return plan.settings.concurrent or room, f"on a Ray of this machine's {cpus} CPUs"
    connect(plan.config, address)
    return concurrency(plan), f"the cluster has {ray.cluster_resources().get('CPU', 0):g} CPU"


def _too_many(plan: Plan, room: int, cpus: float, gpus: float) -> ConfigError:
    wanted, each = plan.settings.concurrent or 1, f"{plan.config.cluster.most_workers} workers of {_needs(plan.config)}"
    return ConfigError(
        f"concurrent={wanted}: the cluster has {cpus:g} CPU and {gpus:g} GPU, room for {room} trials of {each}; set "
        f"concurrent, workers_per_trial or cluster.cpus_per_worker lower, or add nodes"
    )


def slots(nodes: list[dict[str, float]], config: Config) -> int:
    """Trials that nodes with these resources hold at a time: a worker is on one node, a group may span several."""
    each = worker_resources(config.cluster)
    # Ray counts in ten-thousandths; a third of a GPU fits three times.
    workers = sum(int(min(node.get(name, 0.0) / need + 1e-4 for name, need in each.items())) for node in nodes)
    return workers // config.cluster.most_workers


def _needs(config: Config) -> str:
    return " and ".join(f"{amount:g} {name}" for name, amount in worker_resources(config.cluster).items())


def _tuner(plan: Plan, hub: Any, book: "_Book", concurrent: int) -> tune.Tuner:
    scheduler = plan.settings.scheduler
    together = scheduler in TOGETHER
    os.environ["TUNE_MAX_PENDING_TRIALS_PG"] = str(plan.left if together else concurrent)
    shared = Shared(
        folder=plan.folder,
        config=plan.config.model_dump(mode="json"),
        judged=plan.judged,
        hub=hub,
        session=uuid.uuid4().hex,
        checkpoints=scheduler == "pbt",
    )
    search: dict[str, Any] = {"search_alg": book if together else ConcurrencyLimiter(book, max_concurrent=concurrent)}
    space: dict[str, Any] = {}
    if scheduler == "pbt":
        # Tune's PBT takes its population from a grid and from nothing else.
        search, space = {}, {"proposal": tune.grid_search([_proposal(trial) for trial in _unfinished(plan)])}
    return tune.Tuner(
        tune.with_resources(tune.with_parameters(run_trial, shared=shared), _resources(plan.config)),
        param_space=space,
        tune_config=tune.TuneConfig(
            scheduler=make_scheduler(plan, concurrent),
            num_samples=1 if scheduler == "pbt" else plan.left,
            reuse_actors=True,
            trial_name_creator=_name,
            trial_dirname_creator=_name,
            **search,
        ),
        run_config=tune.RunConfig(
            name=shared.session[:12],
            **_storage(plan),
            failure_config=tune.FailureConfig(max_failures=plan.config.cluster.max_failures),
            checkpoint_config=tune.CheckpointConfig(num_to_keep=KEPT_FOR_COPIES),
            callbacks=[book.callback],
            verbose=0,
        ),
    )


def _name(trial: Any) -> str:
    return f"{number_of(trial):04d}"


def _resources(config: Config) -> tune.PlacementGroupFactory:
    """What Tune reserves for a trial: its worker, or for a group's driver only what workers never need.

    Drivers that held CPUs could leave too few for every group, and all would wait for each other.
    """
    if config.cluster.most_workers > 1:
        return tune.PlacementGroupFactory([{"memory": DRIVER_MEMORY}])
    return tune.PlacementGroupFactory([worker_resources(config.cluster)])


def _unfinished(plan: Plan) -> list[Trial]:
    return [trial for trial in plan.ledger.trials.values() if not trial.ended]


def _proposal(trial: Trial) -> dict[str, Any]:
    return {"trial": trial.number, "params": trial.params, "known": trial.images_seen}


class _Book(Searcher):  # type: ignore[misc]
    """Between Tune and the ledger: proposes what the ledger holds unfinished, then what is new; writes what happens."""

    def __init__(self, plan: Plan) -> None:
        super().__init__(metric=None, mode=None)
        self.plan, self.stopping = plan, False
        self.under_way: frozenset[int] = frozenset()
        """trials that have a process; others of the ledger's may be paused, or have yet to begin"""
        self.superseded: list[int] = []
        """trials that another command has taken over; they stay unfinished"""
        self.waiting = deque(_unfinished(plan))
        self.callback = _Callback(self)

    def suggest(self, trial_id: str) -> dict[str, Any] | str | None:
        """The next trial; FINISHED when there is none, or somebody asked to stop."""
        if self.stopping or self.plan.ledger.trouble is not None:
            return str(Searcher.FINISHED)
        trial = self.waiting.popleft() if self.waiting else self.plan.proposals.next()
        return {"proposal": _proposal(trial)} if trial is not None else str(Searcher.FINISHED)

    def set_search_properties(self, metric: str | None, mode: str | None, config: dict[str, Any], **spec: Any) -> bool:
        """Nothing of it matters: the ledger knows metric and space."""
        return True

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        """The callback has seen it."""

    def save(self, checkpoint_path: str) -> None:
        """Everything stands in the ledger."""

    def restore(self, checkpoint_path: str) -> None:
        """Everything stands in the ledger."""

    def heard(self, number: int, result: dict[str, Any]) -> None:
        """A trial's values."""
        row = result.get("row") or {}
        if len(row) > 1 and row["images_seen"] > self.plan.ledger.trials[number].images_seen:
            self.plan.ledger.row(number, row)

    def ended(self, number: int, result: dict[str, Any]) -> None:
        """A trial ended by itself, or the scheduler stopped it."""
        state, message = result.get("state", "early"), result.get("message", "")
        if state != "stopped":
            self.plan.ledger.end(number, state, message, self.plan.ledger.trials[number].seconds_spent)
        elif message:
            self.superseded.append(number)
            # No line tells whether this command is the one to end, and it would take over the next trial.
            self.plan.ledger.check_owner()

    @property
    def why(self) -> str:
        """Why trials are left that nobody asked to stop, as far as it is known."""
        names = ", ".join(trial_name(number) for number in self.superseded)
        return f" (taken over by another command: {names})" if names else ""

    def died(self, number: int, message: str) -> None:
        """A trial's process died once more than it may."""
        if not self.stopping:
            self.plan.ledger.end(number, "failed", message)


class _Callback(tune.Callback):  # type: ignore[misc]
    """Hands on what Tune tells."""

    def __init__(self, book: _Book) -> None:
        self.book = book

    def on_step_end(self, iteration: int, trials: list[Any], **info: Any) -> None:
        """Called all the time; Tune tells in no other way that a trial is paused."""
        self.book.under_way = frozenset(number_of(trial) for trial in trials if trial.status == TuneTrial.RUNNING)

    def on_trial_result(
        self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **info: Any
    ) -> None:
        """Also called for the result with which the scheduler stops a trial."""
        self.book.heard(number_of(trial), result)

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """Called when a trial is over, and not when it is paused."""
        self.book.ended(number_of(trial), trial.last_result or {})

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """Called when Tune gives a trial up."""
        limit = self.book.plan.config.cluster.max_failures
        self.book.died(number_of(trial), f"its process died {limit + 1} times (cluster.max_failures={limit})")


@contextmanager
def _followed(hub: Any, book: "_Book", on_progress: OnProgress) -> Iterator[None]:
    """Within the block, a thread shows where the trials are."""

    def follow() -> None:
        with suppress(ray.exceptions.RayError, ray.exceptions.GetTimeoutError):  # the next look may have an answer
            places = ray.get(hub.progress.remote(), timeout=10)
            on_progress({number: places.get(number, (0, 0.0)) for number in book.under_way})

    with background("sweep-table", follow, POLL_SECONDS):
        yield


@contextmanager
def _quiet() -> Iterator[None]:
    """Tune's own prints are not for people; what matters is in the table and the ledger."""
    loggers = [logging.getLogger(name) for name in ("ray.tune", "ray.air", "ray.train")]
    before = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, before, strict=True):
            logger.setLevel(level)
