"""One function on every rank, without Ray: in this process, or in processes of its own on this machine."""

from collections.abc import Callable
from typing import Any, TypeAlias

import torch

from vaegan_dist.cluster.processes import Seat, join_group, pick_gpu, run_ranks
from vaegan_dist.evaluation.ranks import Ranks

TIMEOUT_SECONDS = 1800  # of a collective: a rank may train a classifier while the others wait
Tell = Callable[[int], None]
Work: TypeAlias = Callable[[dict[str, Any], Ranks, Tell], dict[str, Any] | None]
"""(arguments, this rank, who to tell how many pictures are done) -> plain data; must be importable by its name"""


def fan_out_local(
    work: Work, arguments: dict[str, Any], *, workers: int, gpus: bool, tell: Tell
) -> dict[str, Any] | None:
    """Run `work` on `workers` ranks of this machine; what rank 0 returns.

    Args:
        gpus: each rank takes a GPU.
        tell: told on this side, for every rank.

    Raises:
        VaeganError: a rank failed; names it and why.
    """
    if workers == 1:
        return work(arguments, Ranks(0, 1, _device_of(gpus, 0)), tell)
    result: dict[str, Any] | None = run_ranks(
        _work_on_rank, (work, arguments, gpus), workers, tell, "run the same command again"
    )
    return result


def _device_of(gpus: bool, local_rank: int) -> torch.device:
    return pick_gpu(local_rank, "--gpus", "leave it out") if gpus else torch.device("cpu")


def _work_on_rank(seat: Seat, work: Work, arguments: dict[str, Any], gpus: bool) -> dict[str, Any] | None:
    """Body of a rank's process."""
    torch.set_num_threads(max(1, torch.get_num_threads() // seat.world_size))
    device = _device_of(gpus, seat.rank)
    join_group(device, seat.address, seat.rank, seat.world_size, TIMEOUT_SECONDS)
    return work(arguments, Ranks(seat.rank, seat.world_size, device), seat.say)
