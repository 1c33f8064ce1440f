"""Reading ahead in processes: pixels come back through memory that was shared before the fork.

Why not a torch DataLoader: when one of its readers was killed (the kernel's out-of-memory killer does that) its error
came in the middle of whatever the main thread ran, from a signal handler; without that handler a batch whose descriptor
the reader had not handed over yet was waited for without end. It also passes batches through /dev/shm, which containers
limit to 64 MiB. Here a dead reader is an error of the batch that was waited for, and nothing needs /dev/shm.
"""

import mmap
import multiprocessing
import os
import signal
import threading
import time
from collections import deque
from collections.abc import Generator, Iterator, Mapping
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from itertools import cycle
from typing import TypeVar

import numpy as np
import numpy.typing as npt

from vaegan_dist.data.batch import Batch, Ids
from vaegan_dist.data.cache import NotFetchedError
from vaegan_dist.data.dataset import ShardDataset
from vaegan_dist.errors import DataError, VaeganError

Item = TypeVar("Item")
Pixels = npt.NDArray[np.uint8]
Answer = tuple[npt.NDArray[np.int64] | None, Mapping[int, str]] | None

PARENT_CHECK_SECONDS = 2.0
FETCH_ATTEMPTS = 5


class _Reader:
    """What a reader process has: its copy of the data set, and the buffers that it shares with its parent."""

    def __init__(self, dataset: ShardDataset, slots: list[Pixels]) -> None:
        self.dataset, self.slots, self.told = dataset, slots, 0

    def read(self, slot: int, ids: npt.NDArray[np.int64]) -> Answer:
        """Fill a slot; returns the labels, and the bad samples if there are new ones; None if a shard is not here."""
        try:
            labels = self.dataset.read_into(ids, self.slots[slot][: len(ids)])
        except NotFetchedError:
            return None  # only the parent can fetch
        bad = self.dataset.bad_samples
        news, self.told = (bad if len(bad) > self.told else {}), len(bad)
        return labels, news


_reader: _Reader | None = None  # one per reader process; the parent's stays None


def _begin(dataset: ShardDataset, slots: list[Pixels], parent: int) -> None:
    """Start of a reader process. Its parent's signal handlers are not its own: Ctrl-C is the parent's to handle."""
    global _reader
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    dataset.after_fork()
    _reader = _Reader(dataset, slots)
    threading.Thread(target=_end_with_parent, args=(parent,), daemon=True).start()


def _end_with_parent(parent: int) -> None:
    """A killed parent cannot end its readers, and they hold the pipe that they wait on open themselves."""
    while os.getppid() == parent:
        time.sleep(PARENT_CHECK_SECONDS)
    os._exit(1)


def _read(slot: int, ids: npt.NDArray[np.int64]) -> Answer:
    assert _reader is not None
    return _reader.read(slot, ids)


def read_in_processes(
    dataset: ShardDataset, items: Iterator[tuple[Item, Ids]], workers: int, prefetch: int, pin_memory: bool
) -> Generator[tuple[Item, Batch], None, None]:
    """Batches in the order of `items`, `prefetch` of them read ahead per process.

    Raises:
        DataError: what reading raises, or that a reader process died. Closing the generator ends the processes.
    """
    first = next(items)
    rows = len(first[1])
    shape = rows, *dataset.picture_shape
    slots = [
        np.frombuffer(mmap.mmap(-1, int(np.prod(shape))), np.uint8).reshape(shape) for _ in range(workers * prefetch)
    ]
    free = cycle(range(len(slots)))
    waiting: deque[tuple[Item, npt.NDArray[np.int64], int, Future[Answer]]] = deque()
    context = multiprocessing.get_context("fork")
    with ProcessPoolExecutor(workers, context, _begin, (dataset, slots, os.getpid())) as readers:

        def send(item: Item, ids: Ids) -> None:
            slot = next(free)
            wanted = np.array(ids, np.int64)
            waiting.append((item, wanted, slot, readers.submit(_read, slot, wanted)))

        def receive() -> tuple[Item, Batch]:
            """Take the oldest batch out of its slot, which the next one may then use."""
            item, ids, slot, future = waiting.popleft()
            for _ in range(FETCH_ATTEMPTS):
                answer = _result(future)
                if answer is not None:
                    return item, _batch(dataset, slots[slot], ids, answer, pin_memory)
                dataset.fetch_for(ids)
                future = readers.submit(_read, slot, ids)
            raise DataError(
                "the shards of one batch do not stay in the cache together; make data.cache_bytes larger, or "
                "data.streams or data.block_shards smaller"
            )

        try:
            send(*first)
            for item, ids in items:
                if len(waiting) == len(slots):
                    yield receive()
                send(item, ids)
            while waiting:
                yield receive()
        except BrokenProcessPool:
            raise DataError(
                "a reader process was killed (out of memory?); give the node more memory, or set data.loader_workers=0"
            ) from None
        finally:
            readers.shutdown(wait=True, cancel_futures=True)


def _result(future: Future[Answer]) -> Answer:
    try:
        return future.result()
    except VaeganError as error:
        raise error from None  # without the reader's traceback


def _batch(
    dataset: ShardDataset,
    slot: Pixels,
    ids: npt.NDArray[np.int64],
    answer: tuple[npt.NDArray[np.int64] | None, Mapping[int, str]],
    pin_memory: bool,
) -> Batch:
    labels, bad = answer
    dataset.note_bad_samples(bad)
    batch = Batch.of(slot.copy(), ids, labels)
    return batch.pin_memory() if pin_memory else batch
