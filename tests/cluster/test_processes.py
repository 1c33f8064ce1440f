"""Ranks of one machine and their GPUs, seen where there are none."""

import pytest
import torch

from vaegan_dist.cluster.processes import pick_gpu
from vaegan_dist.errors import ConfigError


def gpus(monkeypatch: pytest.MonkeyPatch, count: int) -> list[torch.device]:
    """A torch that sees so many GPUs, and the ones that were taken."""
    taken: list[torch.device] = []
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: count > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    monkeypatch.setattr(torch.cuda, "set_device", taken.append)
    return taken


def test_each_rank_has_a_gpu_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    taken = gpus(monkeypatch, 2)
    assert [pick_gpu(rank, "--gpus", "leave it out").index for rank in (0, 1)] == [0, 1]
    assert [device.index for device in taken] == [0, 1]
    with pytest.raises(ConfigError, match=r"^--gpus: .* has 2 GPUs, and 3 ranks or more.*at most 2.*or leave it out$"):
        pick_gpu(2, "--gpus", "leave it out")


def test_a_launcher_may_show_each_rank_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    gpus(monkeypatch, 1)
    with pytest.raises(ConfigError, match="has 1 GPU, and 4 ranks or more"):
        pick_gpu(3, "--gpus", "leave it out")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3")
    assert pick_gpu(3, "--gpus", "leave it out").index == 0


def test_without_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    gpus(monkeypatch, 0)
    with pytest.raises(ConfigError, match=r"^cluster.gpus_per_worker=1: torch .* sees no GPU on .*; set it to 0$"):
        pick_gpu(0, "cluster.gpus_per_worker=1", "set it to 0")
