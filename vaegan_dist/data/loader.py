"""Batches for one rank: read ahead in a thread or in processes, counted only where they are consumed.

Nothing that is read ahead is state: the position is (epoch, images consumed), and the order is a function of it.
"""

import os
from collections import deque
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from itertools import chain, count
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from vaegan_dist.data.dataset import Batch, Ids, ShardDataset
from vaegan_dist.data.order import WINDOW_STEPS, EpochOrder
from vaegan_dist.data.processes import read_in_processes
from vaegan_dist.errors import InputError

Item = TypeVar("Item")
Result = TypeVar("Result")

VALIDATION_PREFETCH = 2


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
                if step == first or step % WINDOW_STEPS == 0:
                    dataset.prefetch(ahead(epoch, step))
                end = step + 1 == batches.steps
                after = Position(epoch + 1, 0) if end else Position(epoch, (step + 1) * batch_size)
                yield after, batches.batch(step, rank, world_size)
            first = 0

    def ahead(epoch: int, step: int) -> Iterator[int]:
        """Shards in the order in which they are needed, to the end of the next epoch."""
        for later, first in ((epoch, step), (epoch + 1, 0)):
            yield from chain.from_iterable(order(later).shards_ahead(first, rank, world_size))

    order(position.epoch).batch(0, rank, world_size)  # what cannot work fails here, not at the first batch
    if dataset.remote:
        now = order(position.epoch).shards_ahead(position.consumed // batch_size, rank, world_size)
        dataset.share_cache(int(os.environ.get("LOCAL_WORLD_SIZE", world_size)), next(now, []))
    return _run(dataset, walk(), loader_workers, prefetch, pin_memory)


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
            dataset.prefetch_from(first)
            ids = first + rank * rows + np.arange(rows, dtype=np.int64)
            yield torch.from_numpy(ids < total), np.minimum(ids, total - 1)

    with closing(_threaded(walk(), dataset.read, VALIDATION_PREFETCH)) as batches:
        for mask, batch in batches:
            yield batch, mask


def _run(
    dataset: ShardDataset, walk: Iterator[tuple[Position, Ids]], workers: int, prefetch: int, pin_memory: bool
) -> Generator[tuple[Position, Batch], None, None]:
    def read(ids: Ids) -> Batch:
        batch = dataset.read(ids)
        return batch.pin_memory() if pin_memory else batch

    try:
        if workers:
            yield from read_in_processes(dataset, walk, workers, prefetch, pin_memory)
        else:
            yield from _threaded(walk, read, prefetch)
    finally:
        dataset.stop_prefetch()


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
