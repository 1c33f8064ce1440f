"""How the ranks of an evaluation share the work and put their parts together."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

Value = TypeVar("Value")


@dataclass(frozen=True)
class Ranks:
    """One rank among those that evaluate together; alone by default."""

    rank: int = 0
    world_size: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    def steps(self, total: int, batch_size: int) -> Iterator[range]:
        """This rank's numbers of `range(total)`, a run of neighbours, in equally many steps on every rank.

        Args:
            total: numbers over all ranks.
            batch_size: numbers per step over all ranks (rounded up to a multiple of `world_size`). Late steps of a
                rank may be empty.
        """
        rows = math.ceil(batch_size / self.world_size)
        begin, end = total * self.rank // self.world_size, total * (self.rank + 1) // self.world_size
        for step in range(math.ceil(math.ceil(total / self.world_size) / rows)):
            yield range(min(begin + step * rows, end), min(begin + (step + 1) * rows, end))

    def from_first(self, make: Callable[[], Value]) -> Value:
        """What rank 0 makes, on every rank; a collective."""
        if self.world_size == 1:
            return make()
        values = [make() if self.rank == 0 else None]
        dist.broadcast_object_list(values, src=0, device=self.device)
        made = values[0]
        assert made is not None
        return made

    def sum(self, values: Tensor) -> Tensor:
        """Elementwise sum over the ranks; a collective."""
        if self.world_size == 1:
            return values
        total = values.to(self.device, copy=True)
        dist.all_reduce(total)
        return total.to(values.device)

    def gather(self, rows: Tensor) -> Tensor:
        """Every rank's rows, however many each has, in the order of the ranks; a collective."""
        if self.world_size == 1:
            return rows
        counts = [torch.zeros(1, dtype=torch.int64, device=self.device) for _ in range(self.world_size)]
        dist.all_gather(counts, torch.tensor([len(rows)], device=self.device))
        most = int(max(counts))
        padded = torch.zeros(most, *rows.shape[1:], dtype=rows.dtype, device=self.device)
        padded[: len(rows)] = rows.to(self.device)
        parts = [torch.empty_like(padded) for _ in range(self.world_size)]
        dist.all_gather(parts, padded)
        return torch.cat([part[: int(count)] for part, count in zip(parts, counts, strict=True)]).to(rows.device)
