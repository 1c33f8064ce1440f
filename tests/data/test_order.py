"""The epoch's order: exactly once, the same for every world size and restart, well mixed, and the same for ever."""

import hashlib
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vaegan_dist.data.order import EpochOrder, permutation
from vaegan_dist.errors import ConfigError, InputError


@st.composite
def cases(draw):
    """Shards of any sizes (empty ones too), streams, a batch, blocks, and world sizes that divide the streams."""
    shards = draw(st.lists(st.integers(0, 60), min_size=1, max_size=20))
    streams = draw(st.sampled_from([1, 2, 3, 4, 6, 12]))
    share = draw(st.integers(1, 4))
    block = draw(st.integers(1, 6))
    worlds = [w for w in range(1, streams + 1) if streams % w == 0]
    restarts = draw(st.lists(st.tuples(st.sampled_from(worlds), st.integers(1, 9)), min_size=1, max_size=5))
    return shards, streams, streams * share, block, restarts, draw(st.integers(0, 2**40)), draw(st.integers(0, 5))


@settings(max_examples=150, deadline=None)
@given(cases())
def test_every_sample_once_across_restarts_and_world_sizes(case):
    shards, streams, batch, block, restarts, seed, epoch = case

    def fresh():
        return EpochOrder(tuple(shards), seed, epoch, streams, batch, block)

    samples = sum(shards)
    if samples < batch:
        with pytest.raises(InputError, match=rf"{samples} samples.*batch_size={batch}"):
            fresh().batch(0)
        return
    steps = fresh().steps
    assert steps == samples // batch
    seen, step, turn = [], 0, 0
    while step < steps:  # every restart: new objects, another world size, some steps
        world, some = restarts[turn % len(restarts)]
        ranks = [fresh() for _ in range(world)]
        for _ in range(min(some, steps - step)):
            parts = [order.batch(step, rank, world) for rank, order in enumerate(ranks)]
            assert {len(part) for part in parts} == {batch // world}
            seen.append(np.concatenate(parts))
            step += 1
        turn += 1
    whole = fresh()
    assert np.array_equal(np.stack(seen), np.stack([whole.batch(s) for s in range(steps)]))
    ids = np.concatenate(seen)
    assert len(np.unique(ids)) == len(ids) == steps * batch
    assert ids.min() >= 0 and ids.max() < samples


@settings(max_examples=60, deadline=None)
@given(cases())
def test_streams_are_balanced_to_one_sample(case):
    """A row of a batch belongs to one stream, and no stream is longer than another by more than one sample."""
    shards, streams, batch, block, _, seed, epoch = case
    if sum(shards) < batch:
        return
    order = EpochOrder(tuple(shards), seed, epoch, streams, batch, block)
    lengths = np.diff(order._layout.stream_ends)
    assert lengths.sum() == sum(shards) and lengths.max() - lengths.min() <= 1
    rows = np.stack([order.batch(s) for s in range(order.steps)]).reshape(order.steps, streams, -1)
    assert rows.shape[2] * order.steps <= lengths.min()


@settings(max_examples=150, deadline=None)
@given(cases())
def test_padded_every_sample_and_the_last_batch_filled_from_the_streams_beginnings(case):
    """Any restarts and world sizes: the batches of `drop`, then one that ends every stream and begins it once more."""
    shards, streams, batch, block, restarts, seed, epoch = case

    def fresh(remainder="pad"):
        return EpochOrder(tuple(shards), seed, epoch, streams, batch, block, remainder)

    samples = sum(shards)
    if samples < streams:
        with pytest.raises(InputError, match=rf"{samples} samples.*data\.streams={streams}"):
            fresh().batch(0)
        return
    steps = fresh().steps
    assert steps == -(-samples // batch)
    seen = []
    for step in range(steps):
        world, _ = restarts[step % len(restarts)]
        parts = [fresh().batch(step, rank, world) for rank in range(world)]
        assert {len(part) for part in parts} == {batch // world}
        seen.append(np.concatenate(parts))
    whole = fresh()
    assert np.array_equal(np.stack(seen), np.stack([whole.batch(s) for s in range(steps)]))
    if samples >= batch:
        dropped = fresh("drop")
        assert all(np.array_equal(seen[s], dropped.batch(s)) for s in range(dropped.steps))
    rows = np.stack(seen).reshape(steps, streams, -1).swapaxes(0, 1).reshape(streams, -1)
    lengths = np.diff(whole._layout.stream_ends)
    for row, length in zip(rows, lengths, strict=True):
        assert len(np.unique(row[:length])) == length
        assert np.array_equal(row, np.resize(row[:length], len(row)))
    assert set(rows.ravel().tolist()) == set(range(samples))


def test_padding_repeats_no_sample_more_often_than_needed():
    order = EpochOrder((37, 26), 0, 0, 4, 16, 4, "pad")
    counts = np.bincount(np.concatenate([order.batch(s) for s in range(order.steps)]), minlength=63)
    assert counts.sum() == 64 and sorted(set(counts.tolist())) == [1, 2]
    ahead = EpochOrder((50,) * 64, 0, 0, 8, 32, 4, "pad").shards_ahead(10**6)
    assert next(ahead)  # what fills up is fetched, too


def test_epochs_and_seeds_differ_and_so_does_what_is_left_out():
    def ids(seed, epoch):
        order = EpochOrder((40,) * 25, seed, epoch, 8, 64, 4)
        return np.concatenate([order.batch(s) for s in range(order.steps)])

    runs = [ids(seed, epoch) for seed in (0, 1) for epoch in range(4)]
    for a in range(len(runs)):
        for b in range(a):
            assert np.mean(runs[a] == runs[b]) < 0.02
    left = [frozenset(range(1000)) - frozenset(run.tolist()) for run in runs]
    assert all(len(rest) == 1000 % 64 for rest in left) and len(set(left)) == len(left)


def test_order_is_the_same_for_ever():
    """A checkpoint holds a position only: another order under the same position would repeat and lose samples."""
    small = EpochOrder((5, 0, 7, 3), 1, 2, 2, 4, 4)
    assert [small.batch(s).tolist() for s in range(3)] == PINNED_SMALL
    large = EpochOrder((1000,) * 300, 7, 3, 16, 128, 4)
    digest = hashlib.sha256(b"".join(large.batch(s).astype("<i8").tobytes() for s in range(large.steps))).hexdigest()
    assert digest == PINNED_LARGE


PINNED_SMALL = [[0, 10, 13, 6], [11, 1, 14, 7], [5, 3, 4, 8]]
PINNED_LARGE = "20f41312d617b9ff25f73262db4378dd3936859661af26a74d0601c9205ed3c0"


def test_permutation_is_uniform():
    counts = np.zeros(24)
    codes: dict[tuple[int, ...], int] = {}
    for seed in range(24_000):
        counts[codes.setdefault(tuple(permutation(4, seed).tolist()), len(codes))] += 1
    assert len(codes) == 24
    chi2 = ((counts - 1000) ** 2 / 1000).sum()
    assert chi2 < 58  # 23 degrees of freedom: exceeded once in 13,000 times
    assert permutation(0, 1).tolist() == [] and permutation(1, 1).tolist() == [0]


@pytest.mark.parametrize(
    ("shards", "streams"),
    [((2500,) * 2, 64), ((1000,) * 64, 64), ((500,) * 400, 16)],
    ids=["2x2500", "64x1000", "400x500"],
)
def test_position_correlation_is_low(shards, streams, record_property):
    """Places in the manifest against places in the epoch, and the distance at which neighbours come out."""
    samples = sum(shards)
    place, gap = [], []
    for epoch in range(8):
        order = EpochOrder(shards, 0, epoch, streams, 128, 4)
        step = np.full(samples, -1)
        for s in range(order.steps):
            step[order.batch(s)] = s
        out = step >= 0
        place.append(np.corrcoef(np.flatnonzero(out), step[out])[0, 1])
        both = out[:-1] & out[1:]
        gap.append(np.mean(np.abs(np.diff(step))[both] <= 1) * order.steps / 3)
    record_property("position_correlation", float(np.mean(np.abs(place))))
    record_property("neighbours_within_one_step_against_chance", float(np.mean(gap)))
    assert np.mean(np.abs(place)) < 0.1
    # Neighbours of one shard share a block: they meet more often than by chance by epoch length over block length.
    blocks_per_stream = max(1, len(shards) // 4 // streams)
    assert np.mean(gap) < 1.5 * blocks_per_stream


def test_few_shards_are_mixed_over_all_streams(record_property):
    """5,000 samples in 2 shards, 64 streams: samples do not stay in their stream, and any two meet as by chance."""
    stream_of, batch_of = [], []
    for epoch in range(60):
        order = EpochOrder((2500, 2500), 3, epoch, 64, 128, 4)
        stream, batch = np.full(5000, -1), np.full(5000, -1)
        for s in range(order.steps):
            ids = order.batch(s)
            stream[ids], batch[ids] = np.arange(128) // 2, s
        stream_of.append(stream)
        batch_of.append(batch)
    kept = float(np.mean([np.mean(a == b) for a, b in pairwise(stream_of)]))
    record_property("returns_to_its_stream", kept)
    assert abs(kept - 1 / 64) < 0.002
    # Pairs of neighbours (at the distances of one digit to the next, and inside what would be one stream).
    batches = np.stack(batch_of)
    for distance in (1, 7, 64):
        meet = np.mean((batches[:, :-distance] == batches[:, distance:]) & (batches[:, :-distance] >= 0))
        record_property(f"pairs_at_{distance}_meet_times_chance", float(meet * 5000 / 127))
        assert abs(meet * 5000 / 127 - 1) < 0.05


def test_a_rank_opens_only_its_own_shards():
    shards = (50,) * 256
    owners: dict[int, set[int]] = {}
    for rank in range(4):
        order = EpochOrder(shards, 0, 0, 8, 32, 4)
        for s in range(order.steps):
            for shard in (order.batch(s, rank, 4) // 50).tolist():
                owners.setdefault(shard, set()).add(rank)
    assert len(owners) == 256
    assert sum(len(ranks) - 1 for ranks in owners.values()) <= 3  # a cut may go through a shard


def test_only_blocks_in_use_are_evaluated():
    """100 million samples: the first batches cost a block per stream, not the list."""
    order = EpochOrder((10_000,) * 10_000, 0, 0, 64, 4096, 4)
    for step in range(3):
        order.batch(step)
    assert len(order._blocks) <= 64
    assert sum(len(block) for block in order._blocks.values()) <= 64 * 2 * 40_000
    last = order.batch(order.steps - 1)
    assert len(np.unique(last)) == 4096 and len(order._blocks) <= 64


@pytest.mark.parametrize(("streams", "batch"), [(3, 8), (0, 8), (16, 8)])
def test_streams_must_divide_the_batch(streams, batch):
    with pytest.raises(ConfigError, match=rf"data\.streams={streams} .*batch_size={batch}"):
        EpochOrder((100,), 0, 0, streams, batch, 4)


def test_workers_must_divide_the_streams():
    with pytest.raises(ConfigError, match=r"cluster\.workers=5 .*streams=4"):
        EpochOrder((100,), 0, 0, 4, 8, 4).batch(0, 0, 5)
    with pytest.raises(IndexError, match="step 12 of an epoch with 12"):
        EpochOrder((100,), 0, 0, 4, 8, 4).batch(12)
