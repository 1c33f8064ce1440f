"""The loop under Ray Train: a TorchTrainer whose workers run `training.loop.train`, watched through the hub."""

import logging
import os
import socket
import sys
import threading
import time
import uuid
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

from vaegan_dist.cluster.hub import Failure, start_hub
from vaegan_dist.cluster.runtime import OnRecord
from vaegan_dist.cluster.signals import stop_signals
from vaegan_dist.config import Config
from vaegan_dist.config_source import validate
from vaegan_dist.errors import ConfigError, VaeganError
from vaegan_dist.reporting.records import Record
from vaegan_dist.training.loop import Outcome, train
from vaegan_dist.training.resume import run_folder

POLL_SECONDS = 0.5
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
        """Tell the driver and end; Ray Train starts the workers again, because a hang may not come back."""
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
    connect(config, address, worker_logs)
    hub = start_hub()
    watcher = _Watcher(hub, on_record)
    trainer = _make_trainer(config, hub)
    with stop_signals(hub.request_stop.remote):
        try:
            trainer.fit()
        except ray.train.TrainingFailedError as error:
            raise _explain(error, hub) from None
        finally:
            watcher.close()
    return watcher.outcome()


def connect(config: Config, address: str = "auto", worker_logs: bool = False) -> None:
    """Join or start Ray, quietly, and say at once when the cluster cannot hold the workers."""
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
        cpus = int(config.cluster.workers * config.cluster.cpus_per_worker + 0.999)
        ray.init(
            address="local",
            num_cpus=max(os.cpu_count() or 1, cpus),
            include_dashboard=False,
            _node_ip_address="127.0.0.1",
            **quiet,
        )
    _warn_of_resources(config)


def _warn_of_resources(config: Config) -> None:
    """Say what the run waits for when the cluster, as it stands, cannot hold it (an autoscaler may still help)."""
    cluster, have = config.cluster, ray.cluster_resources()
    for resource, each in (("CPU", cluster.cpus_per_worker), ("GPU", cluster.gpus_per_worker)):
        need = cluster.workers * each
        if need > have.get(resource, 0.0):
            print(
                f"warning: {cluster.workers} workers need {need:g} {resource}, the cluster has "
                f"{have.get(resource, 0.0):g}; waiting up to {cluster.start_timeout_seconds} s for more "
                f"(cluster.start_timeout_seconds), or set cluster.workers lower",
                file=sys.stderr,
                flush=True,
            )


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


def _make_trainer(config: Config, hub: Any) -> TorchTrainer:
    cluster = config.cluster
    os.environ["RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S"] = str(cluster.start_timeout_seconds)
    resources = {"CPU": cluster.cpus_per_worker}
    if cluster.gpus_per_worker:
        resources["GPU"] = cluster.gpus_per_worker
    return TorchTrainer(
        _train_worker,
        train_loop_config={"config": config.model_dump(mode="json"), "hub": hub},
        torch_config=TorchConfig(
            backend="nccl" if cluster.gpus_per_worker else "gloo", timeout_s=cluster.collective_timeout_seconds
        ),
        scaling_config=ScalingConfig(
            num_workers=cluster.workers, use_gpu=cluster.gpus_per_worker > 0, resources_per_worker=resources
        ),
        run_config=RunConfig(
            # Ray's own bookkeeping; the name is new each time because resuming is the run folder's business.
            name=uuid.uuid4().hex[:12],
            storage_path=str(run_folder(config) / "ray"),
            failure_config=FailureConfig(
                max_failures=cluster.max_failures,
                controller_failure_limit=cluster.max_failures,
                max_preemption_failures=-1,
            ),
        ),
    )


def _train_worker(arguments: dict[str, Any]) -> None:
    """Body of a training worker."""
    hub = arguments["hub"]
    earlier = ray.get(hub.why_failed.remote())
    if earlier is not None:
        raise VaeganError(earlier.message)
    config = validate(arguments["config"])
    torch.set_num_threads(config.training.torch_threads or max(1, int(config.cluster.cpus_per_worker)))
    runtime = RayRuntime(hub)
    try:
        outcome = train(config, runtime)
    except VaeganError as error:
        # An explained failure: no retry mends it, so the next attempt ends before it begins.
        message = f"rank {runtime.rank} on {socket.gethostname()}: {error}"
        ray.get(hub.fail.remote(Failure(message, error.exit_code)))
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


class _Watcher:
    """Reads the hub in a thread and hands every record on; keeps the outcome."""

    def __init__(self, hub: Any, on_record: OnRecord) -> None:
        self.hub, self.on_record = hub, on_record
        self.next = 0
        self.ending = threading.Event()
        self.last: Record | None = None
        self.thread = threading.Thread(target=self._follow, name="hub-watcher", daemon=True)
        self.thread.start()

    def _follow(self) -> None:
        while not self.ending.wait(POLL_SECONDS):
            self._take()

    def _take(self) -> None:
        try:
            records, self.next = ray.get(self.hub.take.remote(self.next), timeout=10)
        except (ray.exceptions.RayActorError, ray.exceptions.GetTimeoutError):
            return
        for record in records:
            if record.get("event") == "outcome":
                self.last = record
            else:
                self.on_record(record)

    def close(self) -> None:
        """Read what is left."""
        self.ending.set()
        self.thread.join()
        self._take()

    def outcome(self) -> Outcome:
        """How rank 0 ended."""
        if self.last is None:
            raise VaeganError("training ended, but rank 0 did not say how; see the log above")
        path = self.last.get("path")
        return Outcome(str(self.last["reason"]), int(self.last["images_seen"] or 0), Path(str(path)) if path else None)


def _explain(error: Exception, hub: Any) -> VaeganError:
    """The root cause first: an explained failure of a worker, else the first failing rank and its last line."""
    try:
        failure = ray.get(hub.why_failed.remote(), timeout=10)
    except (ray.exceptions.RayActorError, ray.exceptions.GetTimeoutError):
        failure = None
    if failure is not None:
        kind = ConfigError if failure.exit_code == ConfigError.exit_code else VaeganError
        return kind(failure.message)
    failures = getattr(error, "worker_failures", None) or {}
    if failures:
        rank, cause = sorted(failures.items())[0]
        last = str(cause).strip().splitlines()[-1] if str(cause).strip() else type(cause).__name__
        return VaeganError(
            f"rank {rank} of {len(failures)} failed: {last}; run the same command again to continue from the last "
            f"checkpoint"
        )
    return VaeganError(f"Ray Train gave up: {str(error).strip().splitlines()[-1]}")
