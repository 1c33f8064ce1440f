"""One function on every rank of a Ray cluster: evaluation and encoding, data parallel."""

import shutil
import socket
import uuid
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
import ray.train
from ray.train import FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchConfig, TorchTrainer, get_device

import vaegan_dist.cluster.ray_train as ray_train  # first: it sets what Ray reads when it is imported
from vaegan_dist.cluster.background import background
from vaegan_dist.cluster.fan_out import TIMEOUT_SECONDS, Tell, Work
from vaegan_dist.cluster.placement import worker_resources
from vaegan_dist.config import ClusterSection, Config
from vaegan_dist.errors import VaeganError
from vaegan_dist.evaluation.ranks import Ranks

POLL_SECONDS = 0.5


class Board:
    """What the ranks say, where the driver can read it; an actor without resources."""

    def __init__(self) -> None:
        self.done = 0
        self.result: dict[str, Any] | None = None
        self.failure: tuple[str, int] | None = None

    def tell(self, count: int) -> None:
        """Some pictures are done."""
        self.done += count

    def take(self) -> int:
        """Pictures done since the last call."""
        done, self.done = self.done, 0
        return done

    def finish(self, result: dict[str, Any] | None) -> None:
        """Rank 0 is through."""
        self.result = result

    def fail(self, message: str, exit_code: int) -> None:
        """A rank explains why it failed; the first one counts."""
        self.failure = self.failure or (message, exit_code)

    def ending(self) -> tuple[dict[str, Any] | None, tuple[str, int] | None]:
        """Result and failure."""
        return self.result, self.failure


@dataclass(frozen=True)
class Placing:
    """Where the ranks run."""

    workers: int
    cpus_per_worker: float = 1.0
    gpus_per_worker: float = 0.0
    address: str = "auto"


def fan_out_on_ray(
    work: Work, arguments: dict[str, Any], placing: Placing, *, scratch: Path, tell: Tell
) -> dict[str, Any] | None:
    """Run `work` on the ranks of a cluster; what rank 0 returns.

    Args:
        scratch: folder that all nodes share, for Ray's own bookkeeping; removed at the end.
        tell: told on this side, for every rank.

    Raises:
        VaeganError: a rank failed, or the cluster has no room.
    """
    cluster = ClusterSection(
        workers=placing.workers, cpus_per_worker=placing.cpus_per_worker, gpus_per_worker=placing.gpus_per_worker
    )
    ray_train.connect(Config(cluster=cluster), placing.address)
    board = ray.remote(Board).options(num_cpus=0).remote()
    trainer = TorchTrainer(
        _worker,
        train_loop_config={"work": work, "arguments": arguments, "board": board},
        torch_config=TorchConfig(backend="nccl" if placing.gpus_per_worker else "gloo", timeout_s=TIMEOUT_SECONDS),
        scaling_config=ScalingConfig(
            num_workers=placing.workers,
            use_gpu=placing.gpus_per_worker > 0,
            resources_per_worker=worker_resources(cluster),
        ),
        run_config=RunConfig(
            name=uuid.uuid4().hex[:12],
            storage_path=str(scratch),
            failure_config=FailureConfig(max_failures=0, controller_failure_limit=3, max_preemption_failures=0),
        ),
    )

    def follow() -> None:
        with suppress(ray.exceptions.RayActorError, ray.exceptions.GetTimeoutError):  # the end is told otherwise
            tell(ray.get(board.take.remote(), timeout=10))

    try:
        with background("board-watcher", follow, POLL_SECONDS, once_more=True):
            trainer.fit()
    except ray.train.TrainingFailedError as error:
        _, failure = ray.get(board.ending.remote())
        if failure is not None:
            explained = VaeganError(failure[0])
            explained.exit_code = failure[1]
            raise explained from None
        last = str(error).strip().splitlines()[-1]
        raise VaeganError(f"a rank failed: {last}; run the same command again") from None
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    result: dict[str, Any] | None = ray.get(board.ending.remote())[0]
    return result


def _worker(arguments: dict[str, Any]) -> None:
    """Body of a worker."""
    context, board = ray.train.get_context(), arguments["board"]
    rank = context.get_world_rank()
    ranks = Ranks(rank, context.get_world_size(), get_device())
    try:
        result = arguments["work"](arguments["arguments"], ranks, lambda count: board.tell.remote(count))
    except VaeganError as error:
        ray.get(board.fail.remote(f"rank {rank} on {socket.gethostname()}: {error}", error.exit_code))
        raise
    if rank == 0:
        ray.get(board.finish.remote(result))
