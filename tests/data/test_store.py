"""Remote shards against a local S3 server and a web server that misbehaves on demand."""

import hashlib
import http.server
import multiprocessing
import re
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import obstore
import pytest
from reader_shards import files_set
from s3_server import SECRET, Bucket

from vaegan_dist.data import transfer
from vaegan_dist.data.dataset import open_dataset
from vaegan_dist.data.manifest import Manifest, ShardInfo
from vaegan_dist.data.store import RemoteShards
from vaegan_dist.data.urls import is_remote
from vaegan_dist.errors import DataError, InputError, VaeganError

SIZE = 600_000


def content(number: int) -> bytes:
    return np.random.Generator(np.random.Philox(key=number)).bytes(SIZE)


def info(number: int) -> ShardInfo:
    data = content(number)
    name = f"shard-{number:06d}.tar"
    return ShardInfo(name=name, samples=3, bytes=len(data), sha256=hashlib.sha256(data).hexdigest())


MANIFEST = Manifest(layout="files", height=4, width=4, channels=3, shards=tuple(info(n) for n in range(4)))


class Server(http.server.ThreadingHTTPServer):
    """Serves the data set below /set/, with the faults that a test sets for a shard."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.faults: dict[str, list[str]] = {}
        """by file name: what goes wrong in each request; the last entry stays, `ok` serves"""
        self.log: list[tuple[str, str | None]] = []
        self.released = threading.Event()
        self.files = {info(number).name: content(number) for number in range(4)}
        self.files["dataset.json"] = MANIFEST.model_dump_json().encode()
        self.url = f"http://127.0.0.1:{self.server_port}/set"

    def requests(self, number: int) -> list[str | None]:
        return [header for name, header in self.log if name == info(number).name]


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Server

    def log_message(self, *args: object) -> None:
        pass

    def do_GET(self) -> None:
        name = self.path.rsplit("/", 1)[1]
        wanted = self.headers.get("Range")
        self.server.log.append((name, wanted))
        faults = self.server.faults.get(name, ["ok"])
        fault = faults.pop(0) if len(faults) > 1 else faults[0]
        body = self.server.files.get(name) if self.path in (f"/set/{name}", f"/set/train/{name}") else None
        if body is None or "/train/" in self.path or fault.isdigit():
            answer = f"<Error>{SECRET}</Error>".encode()
            self._head(int(fault) if fault.isdigit() else 404, len(answer))
            self.wfile.write(answer)
            return
        begin = int(match[1]) if wanted and (match := re.match(r"bytes=(\d+)-", wanted)) and fault != "norange" else 0
        self._head(
            206 if begin else 200, len(body) - begin, f"bytes {begin}-{len(body) - 1}/{len(body)}" if begin else ""
        )
        part = body[begin:]
        if fault == "cut":
            self.wfile.write(part[: max(100_000, len(part) // 3)])
            self.close_connection = True
        elif fault == "stall":
            self.wfile.write(part[:10])
            self.wfile.flush()
            self.server.released.wait(60)
            self.close_connection = True
        else:
            self.wfile.write(bytes(len(part)) if fault == "zeros" else part)

    def _head(self, status: int, length: int, content_range: str = "") -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(length))
        if content_range:
            self.send_header("Content-Range", content_range)
        self.end_headers()


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setattr(transfer, "FIRST_PAUSE", 0.01)
    with Server() as running:
        thread = threading.Thread(target=running.serve_forever, args=(0.01,))
        thread.start()
        yield running
        running.released.set()
        running.shutdown()
        thread.join()


def shards(server: Server, cache: Path, **options: object) -> RemoteShards:
    return RemoteShards(server.url, cache=cache, **{"timeout": 20.0, **options})  # type: ignore[arg-type]


def kept(cache: Path) -> set[str]:
    return {path.name for path in cache.iterdir() if path.suffix in (".tar", ".part")}


@pytest.mark.parametrize(
    ("faults", "requests"),
    [
        (["ok"], 1),
        (["cut", "cut", "ok"], 3),
        (["500", "503", "ok"], 3),
        (["429", "ok"], 2),
        (["cut", "500", "cut", "ok"], 4),
        (["zeros", "ok"], 2),
        (["cut", "norange"], None),
    ],
)
def test_right_bytes_whatever_happens_on_the_way(
    server: Server, tmp_path: Path, faults: list[str], requests: int | None
) -> None:
    server.faults[info(0).name] = faults
    remote = shards(server, tmp_path)
    assert remote.manifest == MANIFEST
    path = remote.fetch(info(0))
    assert path.read_bytes() == content(0)
    assert requests is None or len(server.requests(0)) == requests
    assert kept(tmp_path) == {path.name}
    remote.close()


def test_attempts_count_only_while_nothing_comes(server: Server, tmp_path: Path) -> None:
    server.faults[info(0).name] = ["cut", "cut", "cut", "500", "ok"]
    remote = shards(server, tmp_path, attempts=2)
    assert remote.fetch(info(0)).read_bytes() == content(0)
    remote.close()


def test_a_lost_cache_folder_is_named(server: Server, tmp_path: Path) -> None:
    remote = shards(server, tmp_path / "cache")
    (tmp_path / "cache").rmdir()
    with pytest.raises(DataError, match=r"cannot be kept in .*cache \(No such file or directory\)"):
        remote.fetch(info(0))
    remote.close()


def test_a_cut_download_is_continued_not_started_over(server: Server, tmp_path: Path) -> None:
    server.faults[info(0).name] = ["cut", "cut", "ok"]
    remote = shards(server, tmp_path)
    remote.fetch(info(0))
    begins = [int(match[1]) for header in server.requests(0)[1:] if header and (match := re.search(r"(\d+)-", header))]
    assert len(begins) == 2
    assert 0 < begins[0] < begins[1] < SIZE
    # so is one that another process left behind, and one with foreign bytes is noticed
    for number, rest, first in ((1, content(1)[:250_000], "bytes=250000-"), (2, bytes(1000), "bytes=1000-")):
        (tmp_path / f"{info(number).sha256}.{SIZE}.part").write_bytes(rest)
        assert remote.fetch(info(number)).read_bytes() == content(number)
        assert server.requests(number)[0] == first
    assert server.requests(2) == ["bytes=1000-", None]
    remote.close()


@pytest.mark.parametrize(
    ("fault", "kind", "named"),
    [
        ("403", InputError, "access denied"),
        ("401", InputError, "credentials missing or wrong"),
        ("404", InputError, "is not there"),
        ("418", InputError, "refuses it"),
        ("500", DataError, "after 3 attempts (the server answers 500)"),
        ("stall", DataError, "after 3 attempts (no answer in time)"),
        ("zeros", DataError, "not those that dataset.json has the sha256 of"),
    ],
)
def test_a_clear_error_in_bounded_time(
    server: Server, tmp_path: Path, fault: str, kind: type[VaeganError], named: str
) -> None:
    server.faults[info(0).name] = [fault]
    remote = shards(server, tmp_path, attempts=3, timeout=0.5 if fault == "stall" else 20.0)
    begun = time.monotonic()
    with pytest.raises(kind) as caught:
        remote.fetch(info(0))
    assert time.monotonic() - begun < 30
    message = str(caught.value)
    assert named in message
    assert info(0).name in message
    assert "\n" not in message
    assert SECRET not in message
    server.faults.clear()
    assert remote.fetch(info(0)).read_bytes() == content(0), "a failed fetch must not stand in the way of the next"
    remote.close()


def test_a_shard_of_another_size(server: Server, tmp_path: Path) -> None:
    server.files[info(0).name] += b"more"
    remote = shards(server, tmp_path)
    with pytest.raises(DataError, match=rf"has {SIZE + 4} bytes at .*, dataset.json says {SIZE}"):
        remote.fetch(info(0))
    remote.close()


def test_the_cache_survives_and_is_bounded(server: Server, tmp_path: Path) -> None:
    first = shards(server, tmp_path, cache_bytes=3 * SIZE)
    for number in (0, 1, 2):
        first.fetch(info(number))
    first.close()
    again = shards(server, tmp_path, cache_bytes=3 * SIZE)
    changed = again.fetch(info(0)).stat().st_mtime_ns
    assert len(server.requests(0)) == 1, "what survived was fetched again"
    again.prefetch([info(3)])
    assert again.fetch(info(3)).read_bytes() == content(3)
    assert kept(tmp_path) == {f"{info(number).sha256}.tar" for number in (0, 2, 3)}, "1 was used longest ago"
    assert again.fetch(info(0)).stat().st_mtime_ns == changed, "use must not look like a change"
    again.close()
    with pytest.raises(InputError, match=r"do not fit data\.cache_bytes"):
        shards(server, tmp_path, cache_bytes=SIZE - 1)


def test_a_damaged_survivor_is_replaced(server: Server, tmp_path: Path) -> None:
    remote = shards(server, tmp_path)
    remote.fetch(info(0)).write_bytes(b"short")
    assert remote.fetch(info(0)).read_bytes() == content(0)
    remote.close()


def _fetch_all(url: str, cache: Path, results: "multiprocessing.SimpleQueue[list[bytes]]") -> None:
    remote = RemoteShards(url, cache=cache)
    remote.prefetch(MANIFEST.shards)
    results.put([hashlib.sha256(remote.fetch(shard).read_bytes()).digest() for shard in MANIFEST.shards])
    remote.close()


def test_the_ranks_of_a_node_share_one_download(server: Server, tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    results = context.SimpleQueue()
    ranks = [context.Process(target=_fetch_all, args=(server.url, tmp_path, results)) for _ in range(3)]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join(120)
    assert [rank.exitcode for rank in ranks] == [0, 0, 0]
    expected = [hashlib.sha256(content(number)).digest() for number in range(4)]
    assert [results.get() for _ in ranks] == [expected] * 3
    assert [len(server.requests(number)) for number in range(4)] == [1, 1, 1, 1]


def test_where_there_is_no_data_set(server: Server, tmp_path: Path) -> None:
    del server.files["dataset.json"]
    with pytest.raises(InputError, match=r"no prepared data set \(looked for train/dataset.json and dataset.json\)"):
        shards(server, tmp_path)
    server.files["dataset.json"] = b"<html>"
    with pytest.raises(InputError, match="not JSON"):
        shards(server, tmp_path)
    server.files["dataset.json"] = MANIFEST.model_dump_json().replace(info(0).name, "../../etc/passwd").encode()
    with pytest.raises(InputError, match="stays below"):
        shards(server, tmp_path)


@pytest.mark.parametrize(
    "url",
    [f"https://me:{SECRET}@host/x", f"https://host/x?sig={SECRET}", f"https://host/x#{SECRET}", f"ftp://{SECRET}/x"],
)
def test_urls_with_secrets_are_refused_and_not_repeated(url: str, tmp_path: Path) -> None:
    with pytest.raises(InputError) as caught:
        RemoteShards(url, cache=tmp_path)
    assert SECRET not in str(caught.value)


def test_local_files_need_no_cache(tmp_path: Path) -> None:
    folder = files_set(tmp_path / "a set", (3,))
    data = open_dataset(folder.as_uri(), in_memory=False, cache_dir=str(tmp_path / "cache"))
    assert data.source == folder and len(data.read(range(3)).ids) == 3
    assert not (tmp_path / "cache").exists()
    assert is_remote("s3://bucket/x")
    assert not is_remote("data/digits")


def test_s3(bucket: Bucket, server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    obstore.put(bucket.store, "my/set/train/dataset.json", MANIFEST.model_dump_json().encode())
    for number in (0, 1):
        obstore.put(bucket.store, f"my/set/train/{info(number).name}", content(number))
    remote = RemoteShards("s3://shards/my/set", cache=tmp_path)
    remote.prefetch([info(0), info(1)])
    for number in (0, 1):
        assert remote.fetch(info(number)).read_bytes() == content(number)
    (tmp_path / f"{info(1).sha256}.tar").unlink()
    (tmp_path / f"{info(1).sha256}.{SIZE}.part").write_bytes(content(1)[:123_456])
    assert remote.fetch(info(1)).read_bytes() == content(1)
    with pytest.raises(InputError, match=r"shard-000002\.tar at s3://shards/my/set: is not there"):
        remote.fetch(info(2))
    remote.close()
    with pytest.raises(InputError, match="no prepared data set"):
        RemoteShards("s3://shards/elsewhere", cache=tmp_path)
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_METADATA_ENDPOINT", server.url.removesuffix("/set"))  # a machine without a role
    with pytest.raises(InputError, match="no credentials found; set the cloud SDK's variables"):
        RemoteShards("s3://shards/my/set", cache=tmp_path, attempts=2, timeout=5)
