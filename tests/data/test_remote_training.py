"""Training from a bucket: the same bytes as from the folder, with a cache smaller than the data; a server that dies."""

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
from reader_shards import files_set
from s3_server import SECRET, Bucket
from test_loader import batches, take

from tests.training.runs import rows_of, tensors_of
from vaegan_dist.cli import main
from vaegan_dist.data import store as store_module
from vaegan_dist.data import transfer
from vaegan_dist.data.dataset import open_dataset
from vaegan_dist.data.manifest import read_manifest
from vaegan_dist.data.prepare import PrepareOptions, prepare
from vaegan_dist.data.transfer import Transfer
from vaegan_dist.data.verify import verify
from vaegan_dist.training import loop
from vaegan_dist.training.watchdog import Watchdog

BOUNDED_SECONDS = 120


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """1,280 digits in 20 shards."""
    made = tmp_path_factory.mktemp("sharded")
    prepare(PrepareOptions(source="digits", output=str(made), limit=1280, shard_samples=64))
    return made


def run(data: str, storage: Path, *more: str) -> int:
    """`vaegan-dist train` of the preset smoke, reading from the shards as they come."""
    fixed = ["data.streams=2", "data.block_shards=2", "data.in_memory=false", "reporting.tensorboard=false"]
    start = ["train", "--preset", "smoke", "--runtime", "local", "--data", data, "--storage", str(storage)]
    return main([*start, *fixed, "training.torch_threads=1", *more])


def whole_shards(cache: Path) -> dict[tuple[int, int], int]:
    """Bytes of each whole shard in a cache, by what tells one file from a later one of its name."""
    found = {}
    for path in cache.glob("*.tar"):
        with suppress(FileNotFoundError):
            status = path.stat()
            found[status.st_ino, status.st_mtime_ns] = status.st_size
    return found


@contextmanager
def watched(cache: Path) -> Iterator[list[int]]:
    """Bytes of whole shards in a cache, looked at again and again; what two looks saw was there at one moment."""
    seen, done = [0], threading.Event()

    def look() -> None:
        before = whole_shards(cache)
        while not done.wait(0.002):
            now = whole_shards(cache)
            seen.append(sum(size for file, size in now.items() if file in before))
            before = now

    thread = threading.Thread(target=look)
    thread.start()
    yield seen
    done.set()
    thread.join()


@pytest.mark.parametrize("workers", [0, 1])
def test_from_a_bucket_as_from_the_folder(bucket: Bucket, folder: Path, tmp_path: Path, workers: int) -> None:
    assert run(str(folder), tmp_path / "local") == 0
    shards = read_manifest(folder / "train" / "dataset.json").shards
    assert len(shards) == 20
    budget = 9 * max(shard.bytes for shard in shards)
    cache = tmp_path / "cache"
    limits = [f"data.cache_dir={cache}", f"data.cache_bytes={budget}", f"data.loader_workers={workers}"]
    with watched(cache) as bytes_kept:
        assert run(bucket.upload(folder, "digits"), tmp_path / "remote", *limits) == 0
    assert 0 < max(bytes_kept) <= budget < sum(shard.bytes for shard in shards)
    local, remote = tmp_path / "local" / "smoke", tmp_path / "remote" / "smoke"
    assert tensors_of(remote) == tensors_of(local)
    assert rows_of(remote) == rows_of(local)
    assert SECRET not in "".join(path.read_text() for path in remote.glob("*.[jy]*"))


@pytest.mark.multiprocess
@pytest.mark.timeout(900)
def test_two_ranks_from_a_bucket_as_from_the_folder(bucket: Bucket, folder: Path, tmp_path: Path) -> None:
    """With augmentation, a filled last batch, and each rank's half of a cache that is too small for the data."""
    budget = 10 * max(shard.bytes for shard in read_manifest(folder / "train" / "dataset.json").shards)
    fixed = ["--workers", "2", "data.flip=true", "data.random_crop=0.8", "data.remainder=pad"]
    assert run(str(folder), tmp_path / "local", *fixed) == 0
    limits = [f"data.cache_dir={tmp_path / 'cache'}", f"data.cache_bytes={budget}"]
    assert run(bucket.upload(folder, "digits"), tmp_path / "remote", *fixed, *limits) == 0
    assert 0 < sum(whole_shards(tmp_path / "cache").values()) <= budget
    local, remote = tmp_path / "local" / "smoke", tmp_path / "remote" / "smoke"
    assert tensors_of(remote) == tensors_of(local)
    assert rows_of(remote) == rows_of(local)


class Slow(Transfer):
    """Every shard takes a second."""

    def fill(self, name: str, what: str, part: Path, size: int) -> None:
        time.sleep(1.0)
        super().fill(name, what, part, size)


def test_a_first_fetch_may_take_longer_than_a_step(
    bucket: Bucket, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Four at a time, the 20 shards of the first batches take five seconds; the watchdog hears of it all the while."""
    monkeypatch.setattr(store_module, "Transfer", Slow)
    beats: list[str] = []
    beat = Watchdog.beat
    monkeypatch.setattr(Watchdog, "beat", lambda self, doing, seen: (beats.append(doing), beat(self, doing, seen))[1])
    monkeypatch.setattr(loop, "FETCH_SECONDS", 0.25)
    all_at_once = ["data.streams=64", f"data.cache_dir={tmp_path / 'cache'}"]
    assert run(bucket.upload(folder, "digits"), tmp_path, *all_at_once) == 0
    assert beats.count("fetching shards") >= 5 and beats.index("fetching shards") < beats.index("training")


def test_a_server_that_dies_is_one_line_in_bounded_time(
    bucket: Bucket,
    folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(transfer, "FIRST_PAUSE", 0.01)
    url = bucket.upload(folder, "digits")
    history = tmp_path / "smoke" / "history.jsonl"
    died: list[float] = []

    def kill() -> None:
        while not (history.exists() and '"event": "train"' in history.read_text()):
            time.sleep(0.01)
        bucket.kill()
        died.append(time.monotonic())

    killer = threading.Thread(target=kill, daemon=True)
    killer.start()
    budget = 9 * 64 * 28 * 28
    long = "phases=[{name: vae, objective: vae, images: 100000000}]"
    code = run(url, tmp_path, long, f"data.cache_dir={tmp_path / 'cache'}", f"data.cache_bytes={budget}")
    killer.join(BOUNDED_SECONDS)
    said = capsys.readouterr().err
    assert code == 1 and time.monotonic() - died[0] < BOUNDED_SECONDS
    assert "Traceback" not in said
    (line,) = [line for line in said.splitlines() if line.startswith("error: ")]
    assert line.startswith("error: shard ") and "cannot be fetched from s3://shards/digits after" in line
    assert "check the network and run the same command again" in line


def test_a_cache_too_small_for_what_is_read_together_is_said_and_right(
    bucket: Bucket, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Every shard in its turn, over and over: slow, but the same pictures."""
    folder = files_set(tmp_path / "set", (40, 37, 51, 29, 43))
    url = bucket.upload(folder, "set")
    budget = int(1.5 * max(path.stat().st_size for path in folder.glob("*.tar")))
    local = open_dataset(str(folder), in_memory=False)
    cache = tmp_path / "cache"
    remote = open_dataset(url, in_memory=False, cache_dir=str(cache), cache_bytes=budget)
    for (after, one), (there, other) in zip(take(batches(local), 5), take(batches(remote), 5), strict=True):
        assert after == there and (one.ids == other.ids).all() and (one.images == other.images).all()
    assert "are read at the same time" in caplog.text and "data.cache_bytes" in caplog.text
    assert sum(path.stat().st_size for path in cache.glob("*.tar")) <= budget
    remote.close()


def test_in_memory_fetches_once(bucket: Bucket, tmp_path: Path) -> None:
    folder = files_set(tmp_path / "set", (10, 11, 12))
    url = bucket.upload(folder, "set")
    held = open_dataset(url, cache_dir=str(tmp_path / "cache"))
    assert held.in_memory and not held.remote
    bucket.kill()
    local = open_dataset(str(folder), in_memory=False)
    assert (held.read(range(33)).images == local.read(range(33)).images).all()
    held.close()


def test_verify_of_a_url(bucket: Bucket, tmp_path: Path) -> None:
    folder = files_set(tmp_path / "set", (5, 6, 7))
    url = bucket.upload(folder, "set")
    assert verify(url) == [] and verify(url, full=True, cache_dir=str(tmp_path / "cache")) == []
    other = folder / "shard-000001.tar"
    data = bytearray(other.read_bytes())
    data[2000] ^= 255
    other.write_bytes(data)
    (folder / "shard-000002.tar").write_bytes(b"cut")
    url = bucket.upload(folder, "damaged")
    assert [problem.shard for problem in verify(url)] == ["shard-000002.tar"]
    found = verify(url, full=True, cache_dir=str(tmp_path / "empty"))
    assert [problem.shard for problem in found] == ["shard-000001.tar", "shard-000002.tar"]
    assert "are not those that dataset.json has the sha256 of" in str(found[0])
    assert "has 3 bytes at s3://shards/damaged, dataset.json says" in str(found[1])
