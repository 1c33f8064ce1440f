"""Batches for one rank: read ahead in a thread or in processes, counted only where they are consumed.

Nothing that is read ahead is state: the position is (epoch, images consumed), and the order is a function of it.
"""

from collections import deque
from collections.abc import Callable, Generator, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from itertools import count
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from vaegan_dist.data.dataset import Batch, Ids, ShardDataset
from vaegan_dist.data.order import EpochOrder
from vaegan_dist.errors import DataError, InputError, VaeganError

Item = TypeVar("Item")
Result = TypeVar("Result")

VALIDATION_PREFETCH = 2
STUCK_SECONDS = 600
"""Time after which a reader process that delivers nothing is taken for stuck"""


@dataclass(frozen=True)
class Position:
    """How far the data is consumed: images of this epoch, over all ranks."""

    epoch: int
    consumed: int


def train_batches(
    dataset: ShardDataset,
    *,
    seed: int,
    streams: int,
    batch_size: int,
    block_shards: int,
    position: Position,
    rank: int,
    world_size: int,
    loader_workers: int,
    prefetch: int,
    pin_memory: bool = False,
) -> Generator[tuple[Position, Batch], None, None]:
    """This rank's rows of every global batch from `position` on, without end.

    Args:
        dataset: what to read.
        seed, streams, batch_size, block_shards: of the order; `batch_size` is over all ranks.
        position: what is consumed already.
        rank, world_size: whose rows.
        loader_workers: reader processes; 0 reads in a thread.
        prefetch: batches read ahead, per reader.
        pin_memory: page-locked batches, for a copy to the GPU that does not block.

    Yields:
        The position after the batch (what a checkpoint holds once the batch is used), and the batch. Closing the
        generator ends its thread or processes.

    Raises:
        InputError: less data than one batch, or a position that is not at the end of a batch.
        DataError: what reading raises.
    """
    if position.consumed % batch_size or position.consumed < 0:
        raise InputError(
            f"the checkpoint stands at image {position.consumed} of epoch {position.epoch}, which is not the end of a "
            f"batch of training.batch_size={batch_size}; continue with the batch size that it was made with"
        )

    def order(epoch: int) -> EpochOrder:
        return EpochOrder(dataset.shard_samples, seed, epoch, streams, batch_size, block_shards)

    def walk() -> Iterator[tuple[Position, Ids]]:
        first = position.consumed // batch_size
        for epoch in count(position.epoch):
            batches = order(epoch)
            for step in range(first, batches.steps):
                end = step + 1 == batches.steps
                after = Position(epoch + 1, 0) if end else Position(epoch, (step + 1) * batch_size)
                yield after, batches.batch(step, rank, world_size)
            first = 0

    order(position.epoch).batch(0, rank, world_size)  # what cannot work fails here, not at the first batch
    return _run(dataset, walk, loader_workers, prefetch, pin_memory)


def validation_batches(
    dataset: ShardDataset, *, batch_size: int, rank: int, world_size: int
) -> Generator[tuple[Batch, Tensor], None, None]:
    """Every sample once over all ranks, in manifest order, in equally many batches of one size on every rank.

    Args:
        dataset: what to read.
        batch_size: images per batch over all ranks (rounded up to a multiple of `world_size`).
        rank, world_size: whose rows.

    Yields:
        The batch, and bool [b]: False where a row only fills up the last batch (it repeats the last sample).
    """
    rows = -(-batch_size // world_size)
    total = len(dataset)

    def walk() -> Iterator[tuple[Tensor, Ids]]:
        for first in range(0, total, rows * world_size):
            ids = first + rank * rows + np.arange(rows, dtype=np.int64)
            yield torch.from_numpy(ids < total), np.minimum(ids, total - 1)

    with closing(_threaded(walk(), dataset.read, VALIDATION_PREFETCH)) as batches:
        for mask, batch in batches:
            yield batch, mask


def _run(
    dataset: ShardDataset,
    walk: Callable[[], Iterator[tuple[Position, Ids]]],
    workers: int,
    prefetch: int,
    pin_memory: bool,
) -> Generator[tuple[Position, Batch], None, None]:
    if workers:
        yield from _processes(dataset, walk, workers, prefetch, pin_memory)
        return

    def read(ids: Ids) -> Batch:
        batch = dataset.read(ids)
        return batch.pin_memory() if pin_memory else batch

    yield from _threaded(walk(), read, prefetch)


def _threaded(
    items: Iterator[tuple[Item, Ids]], read: Callable[[Ids], Result], ahead: int
) -> Generator[tuple[Item, Result], None, None]:
    """Results in order, `ahead` of them being read in one thread; its errors are raised in their place."""
    waiting: deque[tuple[Item, Future[Result]]] = deque()
    with ThreadPoolExecutor(1, thread_name_prefix="data-reader") as reader:
        try:
            for item, ids in items:
                waiting.append((item, reader.submit(read, ids)))
                if len(waiting) > ahead:
                    done, future = waiting.popleft()
                    yield done, future.result()
            while waiting:
                done, future = waiting.popleft()
                yield done, future.result()
        finally:
            reader.shutdown(wait=True, cancel_futures=True)


@dataclass(frozen=True)
class _Delivery:
    """What a reader process sends: a batch or an error line, and the bad samples that it has met so far."""

    batch: Batch | None
    error: VaeganError | None
    bad: Mapping[int, str]

    def pin_memory(self) -> "_Delivery":
        return _Delivery(self.batch.pin_memory() if self.batch else None, self.error, self.bad)


class _Reader(Dataset[_Delivery]):
    """The data set as reader processes see it: errors travel as values, since a DataLoader would bury their one line
    in a traceback of its own."""

    def __init__(self, dataset: ShardDataset) -> None:
        self.dataset = dataset
        self.told = 0

    def __getitem__(self, index: int) -> _Delivery:
        return self.__getitems__([index])

    def __getitems__(self, ids: Ids) -> _Delivery:
        try:
            batch = self.dataset.read(ids)
        except VaeganError as error:
            return _Delivery(None, error, {})
        bad = self.dataset.bad_samples
        news, self.told = (bad if len(bad) > self.told else {}), len(bad)
        return _Delivery(batch, None, news)


class _Ids:
    """The batch sampler: only the ids of the walk. A DataLoader runs ahead of what is consumed with it."""

    def __init__(self, walk: Callable[[], Iterator[tuple[Position, Ids]]]) -> None:
        self.walk = walk

    def __iter__(self) -> Iterator[Ids]:
        return (ids for _, ids in self.walk())


def _as_is(delivery: Any) -> Any:
    """In place of collation: the batch is one already."""
    return delivery


def _processes(
    dataset: ShardDataset,
    walk: Callable[[], Iterator[tuple[Position, Ids]]],
    workers: int,
    prefetch: int,
    pin_memory: bool,
) -> Generator[tuple[Position, Batch], None, None]:
    """Batches in order from reader processes. The order is walked twice: by the sampler ahead, and here in step."""
    loader = DataLoader(
        _Reader(dataset),
        batch_sampler=_Ids(walk),  # type: ignore[arg-type]
        num_workers=workers,
        prefetch_factor=prefetch,
        persistent_workers=True,
        pin_memory=pin_memory,
        collate_fn=_as_is,
        timeout=STUCK_SECONDS,
        generator=torch.Generator().manual_seed(0),  # else iter() would draw from the global generator
    )
    # Started from a thread of its own: from the main thread a DataLoader installs a SIGCHLD handler that raises in the
    # middle of whatever runs when a reader dies. Without it the death is found here, in `next`.
    with ThreadPoolExecutor(1) as starter:
        deliveries = starter.submit(iter, loader).result()
    try:
        for after, _ in walk():
            try:
                delivery = next(deliveries)
            except RuntimeError as error:  # a reader was killed or is stuck
                cause = " ".join(str(error).split())[:200]
                raise DataError(
                    f"a reader process ended ({cause}); give the node more memory or set data.loader_workers=0"
                ) from None
            dataset.note_bad_samples(delivery.bad)
            if delivery.error is not None:
                raise delivery.error
            assert delivery.batch is not None
            yield after, delivery.batch
    finally:
        # The processes end with the iterator; the loader keeps a reference to it while workers are persistent.
        loader._iterator = None
        del deliveries
