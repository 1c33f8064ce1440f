"""The order of an epoch as a pure function: which samples make up global batch `step`, and which rows are a rank's.

    permuted shards        one long list of samples, shard after shard, in the epoch's order of shards
    blocks                 the list in runs of at least `block_shards` shards' worth; each is shuffled completely
    streams                the same list in `streams` equal parts; every batch takes the same share from each

Ends of blocks lie on ends of streams, one way or the other. Much data: a stream is several blocks, walked one after
another, so that a rank opens few shards at a time and never another rank's. Little data: a block spans several streams
(all of them, below two blocks' worth), so that samples change streams and neighbours from epoch to epoch. Shuffling
inside a stream alone would tie them: with 2 shards and 64 streams a sample came back to the stream it was in the epoch
before in half of all epochs, and its 78 neighbours with it; shuffled before the cut, in 1 of 64.

What does not fill the last batch is left out (`drop`), or that batch is filled: every stream begins once more (`pad`).

Only (epoch, images consumed) has to be saved to continue, with any number of ranks that divides `streams`.
"""

from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, NamedTuple

import numpy as np
import numpy.typing as npt

from vaegan_dist.errors import ConfigError, InputError
from vaegan_dist.seeding import derive_seed

Ids = npt.NDArray[np.int64]
Remainder = Literal["drop", "pad"]

WINDOW_STEPS = 32
"""Steps that are laid out at once: spreads the cost of visiting every stream."""


def permutation(n: int, seed: int) -> Ids:
    """A uniform permutation of 0..n-1 from a 63-bit seed, the same for ever.

    NumPy promises the raw words of Philox, not the shuffles that it builds on them, so random words are sorted here:
    the upper bits random, the lower bits the index itself. Fewer than 2**27 items leave 37 random bits or more.
    """
    if n < 2:
        return np.zeros(n, np.int64)
    index_bits = np.uint64((n - 1).bit_length())
    words = np.random.Philox(key=seed).random_raw(n)
    words >>= index_bits
    words <<= index_bits
    words |= np.arange(n, dtype=np.uint64)
    words.sort()
    words &= (np.uint64(1) << index_bits) - np.uint64(1)
    return words.view(np.int64)


class _Layout(NamedTuple):
    """Where shards, streams and blocks lie in the epoch's list of samples."""

    samples: int
    shards: Ids  # shard at each place of the epoch's order
    shard_starts: Ids  # first sample id of the shard at each place of the epoch's order
    place_ends: Ids  # where that shard ends in the epoch's list
    stream_ends: Ids  # 0 first
    block_ends: Ids  # 0 first


@dataclass(frozen=True)
class EpochOrder:
    """The batches of one epoch. Cheap to make: blocks are evaluated when a batch first touches them.

    Args:
        remainder: of an epoch, less than one batch: `drop` leaves it out; `pad` fills the last batch, each stream from
            its own beginning, so that a sample comes once or, there, once more.

    Raises:
        ConfigError: `streams` does not divide `batch_size`.
        InputError: not even one batch, or one sample for each stream (on `steps`).
    """

    shard_samples: Sequence[int]
    seed: int
    epoch: int
    streams: int
    batch_size: int
    block_shards: int
    remainder: Remainder = "drop"

    def __post_init__(self) -> None:
        if self.streams < 1 or self.batch_size < 1 or self.batch_size % self.streams:
            raise ConfigError(
                f"data.streams={self.streams} does not divide training.batch_size={self.batch_size}; "
                f"choose a divisor of {self.batch_size}"
            )

    @property
    def steps(self) -> int:
        """Global batches in the epoch: the same on every rank. The rest (less than one batch) is left out or filled."""
        samples = self._layout.samples
        if self.remainder == "pad":
            if samples < self.streams:
                raise InputError(
                    f"the data set has {samples} samples, less than one for each of data.streams={self.streams}; set "
                    f"data.streams to {samples} or less, or add data"
                )
            return -(-samples // self.batch_size)
        if samples < self.batch_size:
            raise InputError(
                f"the data set has {samples} samples, less than one batch of training.batch_size="
                f"{self.batch_size}; set training.batch_size to {samples} or less, or add data"
            )
        return samples // self.batch_size

    def batch(self, step: int, rank: int = 0, world_size: int = 1) -> Ids:
        """Sample ids of this rank's rows of global batch `step`, stream after stream; int64 [batch_size/world_size].

        Raises:
            ConfigError: `world_size` does not divide `streams`.
            IndexError: the epoch has no such step.
        """
        if self.streams % world_size:
            raise ConfigError(
                f"cluster.workers={world_size} does not divide data.streams={self.streams}; set cluster.workers to a "
                f"divisor of {self.streams}, or data.streams to a multiple of {world_size}"
            )
        if not 0 <= step < self.steps:
            raise IndexError(f"step {step} of an epoch with {self.steps} steps")
        number = step // WINDOW_STEPS
        kept, window = self._windows.get((rank, world_size), (-1, None))
        if window is None or kept != number:
            window = self._window(number, rank, world_size)
            self._windows[rank, world_size] = number, window
        rows: Ids = window[step - number * WINDOW_STEPS]
        return rows

    def shards_ahead(self, step: int, rank: int = 0, world_size: int = 1) -> Iterator[list[int]]:
        """Shards that this rank's rows come from, from `step` on: those of the blocks that its streams are in, then
        those of the blocks after them, and so on. A shard at the end of a block comes again with the next."""
        layout, own, share = self._layout, self.streams // world_size, self.batch_size // self.streams
        starts = layout.stream_ends[rank * own : (rank + 1) * own] + step * share
        ends = layout.stream_ends[rank * own + 1 : (rank + 1) * own + 1]
        blocks = np.searchsorted(layout.block_ends, starts, side="right") - 1
        last = np.searchsorted(layout.block_ends, ends - 1, side="right") - 1
        while (running := blocks <= last).any():
            yield [shard for block in np.unique(blocks[running]).tolist() for shard in self._block_shards(block)]
            blocks += 1
        if self.remainder == "pad":  # the last batch begins the streams once more
            again = np.searchsorted(layout.block_ends, layout.stream_ends[rank * own : (rank + 1) * own], side="right")
            yield [shard for block in np.unique(again - 1).tolist() for shard in self._block_shards(block)]

    def _block_shards(self, block: int) -> list[int]:
        layout = self._layout
        low, high = self._block_places(block)
        return [int(shard) for shard in layout.shards[low:high]]

    def _block_places(self, block: int) -> tuple[int, int]:
        """Places in the epoch's order of shards that a block's samples come from."""
        layout = self._layout
        first, last = int(layout.block_ends[block]), int(layout.block_ends[block + 1])
        low = int(np.searchsorted(layout.place_ends, first, side="right"))
        return low, int(np.searchsorted(layout.place_ends, last, side="left")) + 1

    def _window(self, number: int, rank: int, world_size: int) -> Ids:
        """A rank's rows of WINDOW_STEPS batches (fewer at the epoch's end): int64 [steps, rows]."""
        share, own = self.batch_size // self.streams, self.streams // world_size
        first = number * WINDOW_STEPS
        steps = min(WINDOW_STEPS, self.steps - first)
        rows = [self._rows(s, first * share, steps * share) for s in range(rank * own, (rank + 1) * own)]
        while len(self._blocks) > self.streams:
            self._blocks.popitem(last=False)
        return np.stack(rows).reshape(own, steps, share).swapaxes(0, 1).reshape(steps, own * share)

    @cached_property
    def _windows(self) -> dict[tuple[int, int], tuple[int, Ids]]:
        return {}

    @cached_property
    def _blocks(self) -> "OrderedDict[int, Ids]":
        return OrderedDict()

    @cached_property
    def _layout(self) -> _Layout:
        counts = np.asarray(self.shard_samples, np.int64)
        samples = int(counts.sum())
        shards = permutation(len(counts), derive_seed(self.seed, "order.shards", self.epoch))
        stream_ends = samples * np.arange(self.streams + 1, dtype=np.int64) // self.streams
        blocks = max(1, len(counts) // self.block_shards)
        starts, ends = np.cumsum(counts) - counts, np.cumsum(counts[shards])
        return _Layout(samples, shards, starts[shards], ends, stream_ends, _block_ends(stream_ends, blocks))

    def _rows(self, stream: int, start: int, count: int) -> Ids:
        """`count` samples of a stream from its row `start` on; at its end it begins once more."""
        begin, end = self._layout.stream_ends[stream : stream + 2].tolist()
        parts = []
        while count:
            start %= end - begin
            some = min(count, end - begin - start)
            parts.append(self._stretch(begin + start, begin + start + some))
            start, count = start + some, count - some
        return parts[0] if len(parts) == 1 else np.concatenate(parts)

    def _stretch(self, position: int, end: int) -> Ids:
        """Samples at these places of the epoch, out of one block or of several."""
        layout = self._layout
        parts = []
        while position < end:
            block = int(np.searchsorted(layout.block_ends, position, side="right")) - 1
            first, last = int(layout.block_ends[block]), int(layout.block_ends[block + 1])
            parts.append(self._block(block)[position - first : min(end, last) - first])
            if end >= last:  # walked to its end: nobody needs it again
                self._blocks.pop(block, None)
            position = min(end, last)
        return parts[0] if len(parts) == 1 else np.concatenate(parts)

    def _block(self, block: int) -> Ids:
        """Sample ids of a block in their shuffled order, from the cache of blocks that are being walked."""
        if block in self._blocks:
            self._blocks.move_to_end(block)
            return self._blocks[block]
        layout = self._layout
        first, last = int(layout.block_ends[block]), int(layout.block_ends[block + 1])
        ids = permutation(last - first, derive_seed(self.seed, "order.block", self.epoch, block))
        ids += first
        # From places in the epoch's list to sample ids: a place keeps its distance from the end of its shard.
        low, high = self._block_places(block)
        ends, starts = layout.place_ends[low:high], layout.shard_starts[low:high]
        lengths = np.diff(ends, prepend=layout.place_ends[low - 1] if low else 0)
        ids += (starts - (ends - lengths))[np.searchsorted(ends, ids, side="right")]
        self._blocks[block] = ids
        return ids


def _block_ends(stream_ends: Ids, wanted: int) -> Ids:
    """Ends of about `wanted` blocks (0 first): whole streams each, or equal parts of a stream."""
    streams = len(stream_ends) - 1
    if wanted <= streams:
        return stream_ends[streams * np.arange(wanted + 1) // wanted]
    parts = wanted // streams
    inner = np.arange(parts)[None, :] * np.diff(stream_ends)[:, None] // parts
    return np.append((stream_ends[:-1, None] + inner).ravel(), stream_ends[-1])
