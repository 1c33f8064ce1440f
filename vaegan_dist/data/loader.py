"""Batches for one rank: read ahead in a thread or in processes, counted only where they are consumed.

Nothing that is read ahead is state: the position is (epoch, images consumed), and the order is a function of it.
"""

import math
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

from vaegan_dist.data.batch import Batch, Ids
from vaegan_dist.data.dataset import ShardDataset
from vaegan_dist.data.order import WINDOW_STEPS, EpochOrder, Remainder
from vaegan_dist.data.processes import read_in_processes
from vaegan_dist.errors import InputError

Item = TypeVar("Item")
Result = TypeVar("Result")

EVALUATION_PREFETCH = 2


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
    remainder: Remainder = "drop",
) -> Generator[tuple[Position, Batch], None, None]:
    """This rank's rows of every global batch from `position` on, without end.

    Args:
        dataset: what to read.
        seed, streams, batch_size, block_shards, remainder: of the order; `batch_size` is over all ranks.
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
        return EpochOrder(dataset.shard_samples, seed, epoch, streams, batch_size, block_shards, remainder)

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


def evaluation_batches(
    dataset: ShardDataset, batch_size: int, rank: int = 0, world_size: int = 1, limit: int | None = None
) -> Generator[tuple[Batch, Tensor], None, None]:
    """Every sample of a split once over all ranks, in equally many batches of one size on every rank.

    A rank reads a run of neighbours in the manifest, so that it needs few shards. Rows that only fill up a batch are
    masked out; all that is left, over all ranks, is each sample once, so that sums over it do not depend on
    `world_size`. `prepare` has shuffled what it wrote: the first `limit` samples are as good as any.

    Args:
        dataset: what to read; `open_dataset(path, split=..., cache_dir=..., cache_bytes=...)`.
        batch_size: images per batch over all ranks (rounded up to a multiple of `world_size`).
        rank, world_size: whose part.
        limit: only the first so many samples of the manifest; None: all.

    Yields:
        The batch (uint8 images [b, C, H, W], ids [b], labels [b] where the shards have classes), and a mask, bool [b]:
        False where a row only fills up the batch (it repeats another sample).

    Raises:
        InputError: a limit below 1.
        DataError: what reading raises.
    """
    if limit is not None and limit < 1:
        raise InputError(f"limit={limit}: at least one sample must be read")
    total = len(dataset) if limit is None else min(limit, len(dataset))
    rows = -(-batch_size // world_size)
    begin, end = total * rank // world_size, total * (rank + 1) // world_size
    steps = math.ceil(math.ceil(total / world_size) / rows)  # of the rank with most samples
    return _evaluation(dataset, begin, end, rows, steps)


def _evaluation(
    dataset: ShardDataset, begin: int, end: int, rows: int, steps: int
) -> Generator[tuple[Batch, Tensor], None, None]:
    def walk() -> Iterator[tuple[Tensor, Ids]]:
        for step in range(steps):
            ids = begin + step * rows + np.arange(rows, dtype=np.int64)
            if ids[0] < end:
                dataset.prefetch_from(int(ids[0]), end)
            yield torch.from_numpy(ids < end), np.minimum(ids, max(begin, end - 1))

    with closing(_threaded(walk(), dataset.read, EVALUATION_PREFETCH)) as batches:
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
