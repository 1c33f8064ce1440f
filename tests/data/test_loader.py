"""Batches in step, in threads and processes: resume with other world sizes, errors in one line, nothing left over."""

import multiprocessing
import os
import signal
import threading
from contextlib import closing
from itertools import chain
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from reader_shards import chunk_set, describe, encoded, files_set, pack, picture
from torch.nn.parallel import DistributedDataParallel

from vaegan_dist.data.dataset import open_dataset
from vaegan_dist.data.loader import Position, evaluation_batches, train_batches
from vaegan_dist.errors import ConfigError, DataError, InputError

BATCH = 24
ORDER = {"seed": 5, "streams": 12, "batch_size": BATCH, "block_shards": 2}


def batches(data, position=Position(0, 0), *, rank=0, world_size=1, workers=0, prefetch=3, **order):  # noqa: B008
    """`train_batches` of these tests."""
    return train_batches(
        data,
        **(ORDER | order),
        position=position,
        rank=rank,
        world_size=world_size,
        loader_workers=workers,
        prefetch=prefetch,
    )


def take(stream, n):
    """The next n items, then the end of the generator."""
    with closing(stream):
        return [next(stream) for _ in range(n)]


@pytest.fixture
def data(tmp_path):
    return open_dataset(str(files_set(tmp_path / "set", (40, 37, 51, 29, 43))), in_memory=False)


def test_threads_and_processes_yield_the_same(data):
    plain = take(batches(data), 20)
    ahead = take(batches(data, workers=2), 20)
    assert [after for after, _ in plain] == [after for after, _ in ahead]
    for (_, one), (_, two) in zip(plain, ahead, strict=True):
        assert torch.equal(one.ids, two.ids) and torch.equal(one.images, two.images)
        assert torch.equal(one.labels, two.labels) and torch.equal(one.labels, one.ids % 10)
        assert two.images.is_contiguous(memory_format=torch.channels_last)


def test_positions_lead_on_at_every_place(data):
    """200 samples, 8 whole batches: every yielded position continues with the very next batch, also in a new epoch."""
    stream = take(batches(data), 20)
    assert [after for after, _ in stream[6:10]] == [Position(0, 168), Position(1, 0), Position(1, 24), Position(1, 48)]
    for place in range(19):
        (after, batch), *_ = take(batches(data, stream[place][0]), 1)
        assert after == stream[place + 1][0] and torch.equal(batch.ids, stream[place + 1][1].ids)
    (after, batch), *_ = take(batches(data, Position(0, 192)), 1)  # the same place, said otherwise
    assert torch.equal(batch.ids, stream[8][1].ids)


def test_what_cannot_work_fails_at_once(data):
    with pytest.raises(InputError, match=r"image 30 of epoch 2.*batch_size=24"):
        batches(data, Position(2, 30))
    with pytest.raises(InputError, match=r"200 samples.*set training\.batch_size to 200 or less"):
        batches(data, batch_size=240)
    with pytest.raises(ConfigError, match=r"cluster\.workers=5"):
        batches(data, world_size=5)


@pytest.mark.parametrize("workers", [0, 2])
def test_closing_leaves_nothing_behind(data, workers):
    threads, children = set(threading.enumerate()), set(multiprocessing.active_children())
    stream = batches(data, workers=workers)
    next(stream)
    if workers:
        assert len(set(multiprocessing.active_children()) - children) == workers
    stream.close()
    assert set(multiprocessing.active_children()) <= children
    assert {t for t in threading.enumerate() if t.is_alive()} <= threads


def test_reading_ahead_is_bounded(data, monkeypatch):
    read, wanted = data.read, []
    monkeypatch.setattr(data, "read", lambda ids: (wanted.append(1), read(ids))[1])
    stream = batches(data, prefetch=3)
    for used in range(1, 6):
        next(stream)
        assert len(wanted) <= used + 3
    stream.close()
    assert len(wanted) <= 8


def test_global_generators_are_left_alone(data):
    torch.manual_seed(1)
    before = torch.get_rng_state(), np.random.get_state()[1].tolist()
    take(batches(data, workers=1), 2)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert np.random.get_state()[1].tolist() == before[1]


def broken_set(folder: Path, bad=(3, 7)) -> str:
    """48 pictures in one shard, some of them not pictures."""
    members = []
    for n in range(48):
        data = encoded(picture(n))
        members += [
            (f"{n:03d}.jpg", data[: len(data) // 2] if n in bad else data),
            (f"{n:03d}.cls", str(n % 10).encode()),
        ]
    folder.mkdir()
    return str(describe(folder, [(pack(folder / "a.tar", members), 48)]))


@pytest.mark.parametrize("workers", [0, 1])
def test_errors_of_readers_are_one_line(tmp_path, workers):
    data = open_dataset(broken_set(tmp_path / "set"), in_memory=False)
    with pytest.raises(DataError) as caught:
        take(batches(data, workers=workers), 2)
    assert str(caught.value).startswith("shard a.tar: member '00") and "\n" not in str(caught.value)
    assert not multiprocessing.active_children()


@pytest.mark.parametrize("workers", [0, 2])
def test_bad_samples_of_readers_are_counted(tmp_path, workers):
    folder = broken_set(tmp_path / "set")
    data = open_dataset(folder, in_memory=False, max_bad_samples=2)
    taken = take(batches(data, workers=workers), 4)  # two epochs
    assert sorted(data.bad_samples) == [3, 7] and all("a.tar" in cause for cause in data.bad_samples.values())
    rows = {int(i): image for _, batch in taken for i, image in zip(batch.ids, batch.images, strict=True)}
    assert torch.equal(rows[3], rows[4]) and torch.equal(rows[7], rows[8])
    data = open_dataset(folder, in_memory=False, max_bad_samples=1)
    with pytest.raises(DataError, match=r"more bad samples than data\.max_bad_samples=1 allows"):
        take(batches(data, workers=workers), 2)


def test_a_killed_reader_is_an_error(data):
    stream = batches(data, workers=1)
    next(stream)
    (child,) = multiprocessing.active_children()
    os.kill(child.pid, signal.SIGKILL)
    with pytest.raises(DataError, match=r"a reader process was killed .*data\.loader_workers=0"):
        for _ in range(100):
            next(stream)
    assert not multiprocessing.active_children()


def _holder(folder, pids):
    """A process that reads by a reader process and is killed."""
    stream = batches(open_dataset(folder, in_memory=False), workers=1)
    next(stream)
    pids.put([child.pid for child in multiprocessing.active_children()])
    threading.Event().wait(120)


def test_readers_end_when_their_parent_is_killed(data):
    context = multiprocessing.get_context("fork")
    pids = context.Queue()
    holder = context.Process(target=_holder, args=(str(data.source), pids))
    holder.start()
    (reader,) = pids.get(timeout=60)
    os.kill(holder.pid, signal.SIGKILL)
    holder.join(60)
    ended = threading.Event()
    for _ in range(600):
        try:
            state = Path(f"/proc/{reader}/stat").read_text().rsplit(")", 1)[1].split()[0]
        except FileNotFoundError:
            break
        if state == "Z":  # ended, and its new parent has not asked yet
            break
        ended.wait(0.1)
    else:
        os.kill(reader, signal.SIGKILL)
        pytest.fail("the reader outlived its parent")


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 70), st.integers(1, 30), st.integers(1, 5), st.none() | st.integers(1, 90))
def test_evaluation_reads_every_sample_once(tmp_path_factory, samples, batch_size, world_size, limit):
    data = open_dataset(str(chunk_set(tmp_path_factory.mktemp("set"), (samples,))), in_memory=False)
    ranks = [list(evaluation_batches(data, batch_size, rank, world_size, limit)) for rank in range(world_size)]
    assert len({len(rank) for rank in ranks}) == 1
    seen = []
    for batch, mask in chain.from_iterable(ranks):
        assert mask.dtype == torch.bool and mask.shape == batch.ids.shape == (-(-batch_size // world_size),)
        assert batch.labels.tolist() == (batch.ids % 10).tolist()
        seen.extend(batch.ids[mask].tolist())
    assert seen == list(range(min(samples, limit or samples)))
    assert len(ranks[0]) <= -(-samples // batch_size) + 1


def test_evaluation_stops_when_left_early(data):
    with pytest.raises(InputError, match="limit=0"):
        evaluation_batches(data, 8, limit=0)
    stream = evaluation_batches(data, 8)
    next(stream)
    stream.close()
    assert not [t for t in threading.enumerate() if t.name.startswith("data-reader")]


class _Mean(torch.nn.Module):
    """A model whose gradient is the mean of its batch."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(3, dtype=torch.float64))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return (images.double().mean((0, 2, 3)) * self.weight).sum()


def _rank(folder, rendezvous, rank, world_size, position, steps, results):
    """One rank: real DDP over gloo, a real reader process, some steps from a position on."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=world_size)
    model = DistributedDataParallel(_Mean())
    stream = batches(open_dataset(folder, in_memory=False), position, rank=rank, world_size=world_size, workers=1)
    told = []
    with closing(stream):
        for _ in range(steps):
            position, batch = next(stream)
            model.zero_grad()
            model(batch.images).backward()
            told.append((position, batch.ids.tolist(), model.module.weight.grad.tolist()))
    results.put((rank, told))
    dist.destroy_process_group()


@pytest.mark.multiprocess
def test_four_two_one_three_ranks_see_one_stream(data, tmp_path):
    """Restarts in the middle of epochs with other numbers of ranks: ids and all-reduced gradients of one process."""
    folder = str(data.source)
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["test_loader", "torch._dynamo"])  # what DDP imports, once for all ranks
    position, seen = Position(0, 0), []
    for turn, (world_size, steps) in enumerate([(4, 5), (2, 6), (1, 3), (3, 5)]):
        results = context.Queue()
        arguments = [
            (folder, tmp_path / f"r{turn}", rank, world_size, position, steps, results) for rank in range(world_size)
        ]
        ranks = [context.Process(target=_rank, args=some) for some in arguments]
        for process in ranks:
            process.start()
        try:
            told = dict(results.get(timeout=120) for _ in ranks)
        finally:
            for process in ranks:
                process.join(60)
                process.kill()
        assert [process.exitcode for process in ranks] == [0] * world_size
        for step in range(steps):
            positions, ids, gradients = zip(*(told[rank][step] for rank in range(world_size)), strict=True)
            assert len(set(positions)) == 1 and len(set(map(tuple, gradients))) == 1
            seen.append((positions[0], list(chain.from_iterable(ids)), gradients[0]))
        position = seen[-1][0]
    alone = take(batches(data), 19)
    assert [(after, ids) for after, ids, _ in seen] == [(after, batch.ids.tolist()) for after, batch in alone]
    for (_, _, gradient), (_, batch) in zip(seen, alone, strict=True):
        assert np.allclose(gradient, batch.images.double().mean((0, 2, 3)), rtol=1e-12)
