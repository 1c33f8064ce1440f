"""The loop under Ray Train: a TorchTrainer whose workers run `training.loop.train`, watched through the hub."""

import logging
import os
import socket
import sys
import time
import uuid
from collections.abc import Callable
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any

# Read when Ray is imported. One controller poll bounds every report to the trainer; its default of 2 s is felt.
os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.5")
os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")

import ray
import ray.train
import torch
from ray.train import FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchConfig, TorchTrainer, get_device

from vaegan_dist.cluster.attempts import Budget, Steward, Watcher, describe_failure, kind_of
from vaegan_dist.cluster.hub import Failure, ask, end_of, start_hub
from vaegan_dist.cluster.placement import own_group, release, wait_for_room, worker_resources
from vaegan_dist.cluster.raylet import raylet_watched
from vaegan_dist.cluster.runtime import OnRecord
from vaegan_dist.cluster.signals import stop_signals
from vaegan_dist.config import Config
from vaegan_dist.config_source import validate
from vaegan_dist.errors import ConfigError, VaeganError
from vaegan_dist.reporting.records import Record
from vaegan_dist.reporting.snapshot import RankSnapshot
from vaegan_dist.training.failure import Aftermath
from vaegan_dist.training.finished import outcome_of_finished, outcome_of_stopped
from vaegan_dist.training.loop import Outcome, train
from vaegan_dist.training.resume import run_folder

START_ATTEMPTS = 3
START_SECONDS = 60  # for workers whose room is there
TELL_SECONDS = 1.0  # for a message that is on its way when its process ends


class RayRuntime:
    """One Ray Train worker as the loop sees it."""

    def __init__(self, hub: Any) -> None:
        context = ray.train.get_context()
        self.rank, self.world_size = context.get_world_rank(), context.get_world_size()
        self.device: torch.device = get_device()
        self.hub = hub
        self._asked: Any = None

    def publish(self, record: Record) -> None:
        """Send the record on its way; nobody waits for it."""
        self.hub.publish.remote(record)

    def observe(self, snapshot: RankSnapshot) -> None:
        """Send the snapshot on its way; nobody waits for it."""
        self.hub.observe.remote(snapshot)

    def checkpointed(self, metrics: dict[str, float], checkpoint: Path) -> None:
        """Show Ray Train that the run advances. The checkpoint itself stands in the run's folder already."""
        ray.train.report({**metrics, "checkpoint_path": str(checkpoint)})

    def stop_requested(self) -> bool:
        """The hub's answer to the last question, asked without waiting; rank 0 asks for all."""
        if self.rank != 0:
            return False
        if self._asked is None:
            self._asked = self.hub.stop_requested.remote()
        ready, _ = ray.wait([self._asked], timeout=0)
        if not ready:
            return False
        try:
            answer = bool(ray.get(self._asked))
        except ray.exceptions.RayActorError:
            # Without a hub nobody can ask to stop; training goes on.
            answer = False
        self._asked = None
        return answer

    def abandon(self, message: str) -> None:
        """Tell the driver and end; the workers are started again, because a hang may not come back."""
        self.hub.publish.remote({"event": "warning", "message": message})
        print(f"error: {message}", file=sys.stderr, flush=True)
        time.sleep(TELL_SECONDS)
        os._exit(1)


def train_on_ray(config: Config, on_record: OnRecord, address: str = "auto", worker_logs: bool = False) -> Outcome:
    """Train on a Ray cluster and return how it ended; the driver's side.

    Args:
        address: "auto" joins the cluster of RAY_ADDRESS, of the job, or of this machine, and starts a local one
            where there is none; "local" always starts one; anything else is a cluster's address.
        worker_logs: also show what Ray and its workers print; what matters reaches `on_record` anyway.
    """
    config = with_absolute_paths(config)
    finished = outcome_of_finished(config)
    if finished is not None:
        return finished
    connect(config, address, worker_logs)
    aftermath = Aftermath(config, on_record)
    with raylet_watched(aftermath.block):
        hub = start_hub(config)
        with stop_signals(hub.request_stop.remote):
            return _train_with(config, hub, aftermath.note)


def _train_with(config: Config, hub: Any, on_record: OnRecord) -> Outcome:
    budget = Budget(config.cluster)
    try:
        with closing(Watcher(hub, on_record, budget)) as watcher, end_of(hub):
            return _attempt_until_done(config, hub, watcher, budget)
    except ray.exceptions.RayError as error:
        cause = " ".join(str(error).split())[:200]
        raise VaeganError(f"Ray failed: {cause}; run the same command again to continue") from error


def train_group(config: Config, on_record: OnRecord, on_hub: Callable[[Any], object]) -> Outcome:
    """The same from inside of a process of Ray, such as a trial of a sweep; `on_hub` hears whom to ask to stop."""
    hub = start_hub(config)
    on_hub(hub)
    return _train_with(config, hub, on_record)


def _attempt_until_done(config: Config, hub: Any, watcher: Watcher, budget: Budget) -> Outcome:
    """One attempt after the other until the run ends, is stopped, or has failed too often."""
    workers: int | None = None
    cause = ""
    while True:
        workers = wait_for_room(config, workers, watcher.stopped, watcher.warn)
        if workers is None:
            return outcome_of_stopped(config)
        ask(partial(hub.begin_attempt.remote, cause))
        with Steward(config, hub, workers, watcher.warn) as steward:
            error = _attempt(config, hub, workers)
        if error is None:
            outcome = watcher.outcome()
            if not (steward.moving and outcome.reason == "stopped") or watcher.stopped():
                return outcome
            cause = "preemption" if steward.announced else "resize"
            continue
        release(ask(hub.take_groups.remote))
        explained = watcher.explained()
        if explained is not None:
            raise explained
        kind = kind_of(error, steward.announced)
        cause = kind.name.lower()
        line = budget.spend(kind, describe_failure(error, workers))
        if watcher.stopped():
            return outcome_of_stopped(config)
        watcher.warn(line)


def _attempt(config: Config, hub: Any, workers: int) -> BaseException | None:
    """Train with so many workers; the failure, if it fails."""
    try:
        _make_trainer(config, hub, workers).fit()
    except (ray.train.TrainingFailedError, ray.exceptions.RayError) as error:
        failure: BaseException = error
        return failure
    return None


def connect(config: Config, address: str = "auto", worker_logs: bool = False) -> None:
    """Join or start Ray, quietly."""
    quiet: dict[str, Any] = {
        "logging_level": logging.ERROR,
        "log_to_driver": worker_logs,
        "ignore_reinit_error": True,
    }
    if address != "local":
        try:
            ray.init(address=address, **quiet)
        except ConnectionError as error:
            if address != "auto" or os.environ.get("RAY_ADDRESS"):
                raise ConfigError(f"--address {address}: no Ray cluster answers there: {error}") from None
            address = "local"
    if address == "local":
        _start_local(config, quiet)


def _start_local(config: Config, quiet: dict[str, Any]) -> None:
    """Start a Ray on loopback; its processes have half a minute, which a machine under load may not give them."""
    for attempt in range(1, START_ATTEMPTS + 1):
        try:
            ray.init(
                address="local",
                num_cpus=local_cpus(config),
                include_dashboard=False,
                _node_ip_address="127.0.0.1",
                **quiet,
            )
            return
        except Exception as error:
            # Ray raises nothing more special.
            if "timed out during startup" not in str(error):
                raise
            ray.shutdown()
            if attempt == START_ATTEMPTS:
                raise VaeganError(
                    f"Ray did not start here in {attempt} attempts; see what else loads this machine, and try again"
                ) from None


def local_cpus(config: Config) -> int:
    """CPUs of a Ray that is started here: the machine's, or as many as the workers of one run need."""
    return max(os.cpu_count() or 1, int(config.cluster.most_workers * config.cluster.cpus_per_worker + 0.999))


def with_absolute_paths(config: Config) -> Config:
    """Paths as every worker must see them: a worker has another working directory than the driver.

    In a submitted job relative paths start at VAEGAN_HOME (default: the home directory), because the job's own
    directory is a temporary copy that vanishes with it.
    """
    tree = config.model_dump(mode="json")
    for section, key in (("run", "storage"), ("data", "path")):
        tree[section][key] = absolute_path(tree[section][key])
    return validate(tree)


def absolute_path(path: str) -> str:
    """A local path made absolute (see `with_absolute_paths`); a URL as it is."""
    if "://" in path:
        return path
    base = Path.cwd()
    if "RAY_JOB_CONFIG_JSON_ENV_VAR" in os.environ:
        base = Path(os.environ.get("VAEGAN_HOME", "~")).expanduser()
    return str(base / Path(path).expanduser())


def _make_trainer(config: Config, hub: Any, workers: int) -> TorchTrainer:
    cluster = config.cluster
    # There was room a moment ago; should it be taken since, the next attempt waits anew.
    os.environ["RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S"] = str(min(cluster.start_timeout_seconds, START_SECONDS))
    # The steward watches for announced ends, and lets the run move at a checkpoint.
    os.environ["RAY_TRAIN_ENABLE_PREEMPTION_WATCHER"] = "0"
    return TorchTrainer(
        _train_worker,
        train_loop_config={"config": config.model_dump(mode="json"), "hub": hub},
        torch_config=TorchConfig(
            backend="nccl" if cluster.gpus_per_worker else "gloo", timeout_s=cluster.collective_timeout_seconds
        ),
        scaling_config=ScalingConfig(
            num_workers=workers, use_gpu=cluster.gpus_per_worker > 0, resources_per_worker=worker_resources(cluster)
        ),
        run_config=RunConfig(
            # Ray's own bookkeeping; the name is new each time because resuming is the run folder's business.
            name=uuid.uuid4().hex[:12],
            storage_path=str(run_folder(config) / "ray"),
            # `Budget` counts, because what follows a failure may be another number of workers.
            failure_config=FailureConfig(max_failures=0, controller_failure_limit=0, max_preemption_failures=0),
        ),
    )


def _train_worker(arguments: dict[str, Any]) -> None:
    """Body of a training worker."""
    hub, config = arguments["hub"], validate(arguments["config"])
    torch.set_num_threads(config.training.torch_threads or max(1, int(config.cluster.cpus_per_worker)))
    runtime = RayRuntime(hub)
    hub.arrived.remote(runtime.rank, ray.get_runtime_context().get_node_id(), own_group())
    try:
        outcome = train(config, runtime)
    except VaeganError as error:
        # An explained failure: no retry mends it.
        ray.get(hub.fail.remote(Failure.of(error, f"rank {runtime.rank} on {socket.gethostname()}")))
        raise
    if runtime.rank == 0:
        path = str(outcome.checkpoint) if outcome.checkpoint else None
        record: Record = {
            "event": "outcome",
            "reason": outcome.reason,
            "images_seen": outcome.images_seen,
            "path": path,
        }
        ray.get(hub.publish.remote(record))
