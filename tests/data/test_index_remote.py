"""dataset.json for shards in a bucket or on a web server: the manifest that the same files get on this machine."""

import functools
import http.server
import threading
from collections.abc import Iterator
from pathlib import Path

import obstore
import pytest
import torch
from reader_shards import chunk_set, encoded, files_set, pack, picture
from s3_server import SECRET, Bucket

from vaegan_dist.cli import main
from vaegan_dist.data import transfer
from vaegan_dist.data.cache import cache_folder
from vaegan_dist.data.dataset import open_dataset
from vaegan_dist.data.existing import index_existing
from vaegan_dist.data.existing_remote import index_remote
from vaegan_dist.data.manifest import MANIFEST_NAME, Manifest, read_manifest
from vaegan_dist.errors import DataError, InputError


def bare(folder: Path) -> Path:
    """Shards without their dataset.json."""
    (folder / MANIFEST_NAME).unlink()
    return folder


def listed(bucket: Bucket) -> set[str]:
    return {str(entry["path"]) for chunk in obstore.list(bucket.store) for entry in chunk}


@pytest.fixture
def far(bucket: Bucket, tmp_path: Path) -> tuple[Manifest, Path]:
    """Three shards in the bucket, and the manifest that they have here."""
    folder = bare(files_set(tmp_path / "set", (9, 8, 7)))
    bucket.upload(folder, "far/train")
    return read_manifest(index_existing([str(folder)])), folder


PATTERNS = ["shard-{000000..000002}.tar", "shard-*.tar", "", "shard-00000[0-2].tar", "shard-00000?.tar"]


@pytest.mark.parametrize("pattern", PATTERNS)
def test_a_bucket(bucket: Bucket, far: tuple[Manifest, Path], pattern: str) -> None:
    expected, folder = far
    before = listed(bucket)
    place, manifest = index_remote([f"s3://shards/far/train/{pattern}"])
    assert place == "s3://shards/far/train/dataset.json" and manifest == expected
    assert listed(bucket) == before | {"far/train/dataset.json"}
    scratch = cache_folder("index-fetch")
    assert scratch is not None and not list(scratch.iterdir()), "a copy stayed behind"
    local, remote = open_dataset(str(folder), in_memory=False), open_dataset("s3://shards/far", in_memory=False)
    assert torch.equal(local.read(range(24)).images, remote.read(range(24)).images)
    remote.close()
    with pytest.raises(InputError, match="is there already"):
        index_remote([f"s3://shards/far/train/{pattern}"])
    assert index_remote([f"s3://shards/far/train/{pattern}"], overwrite=True)[1] == expected


def test_the_command_writes_where_it_is_told(
    bucket: Bucket, far: tuple[Manifest, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shards = "s3://shards/far/train/*.tar"
    assert main(["index", shards, "--folder", str(tmp_path / "here")]) == 0
    assert read_manifest(tmp_path / "here" / MANIFEST_NAME) == far[0]
    assert f"{tmp_path}/here/dataset.json: 24 pictures in 3 shards" in capsys.readouterr().out
    assert main(["index", shards, "--folder", "s3://shards/far"]) == 0
    above = open_dataset("s3://shards/far/", in_memory=False)
    assert above.manifest.shards[0].name == "train/shard-000000.tar"
    assert above.read([23]).labels.tolist() == [3]  # type: ignore[union-attr]
    above.close()


def test_chunks_in_a_bucket(bucket: Bucket, tmp_path: Path) -> None:
    folder = bare(chunk_set(tmp_path / "set", (9, 8)))
    url = bucket.upload(folder, "chunks")
    assert index_remote([url])[1] == read_manifest(index_existing([str(folder)]))


def test_what_cannot_be_indexed(
    bucket: Bucket, far: tuple[Manifest, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(transfer, "FIRST_PAUSE", 0.01)
    damaged = bare(files_set(tmp_path / "damaged", (3,)))
    shard = damaged / "shard-000000.tar"
    shard.write_bytes(shard.read_bytes()[:2000])
    bucket.upload(damaged, "damaged")
    pack(tmp_path / "other.tar", [("a.jpg", encoded(picture(0, (8, 8))))])
    obstore.put(bucket.store, "mixed/a.tar", (tmp_path / "other.tar").read_bytes())
    obstore.put(bucket.store, "mixed/b.tar", (far[1] / "shard-000000.tar").read_bytes())
    for urls, kind, named in (
        (["s3://shards/nowhere"], InputError, "no shard there"),
        (["s3://shards/far/train/shard-{000000..000007}.tar"], InputError, r"shard-000003\.tar at .*is not there"),
        (["s3://shards/damaged/*.tar"], DataError, r"shard-000000\.tar: .*at byte \d+: cut"),
        (["s3://shards/mixed"], InputError, "12x16 pixels, .*8x8"),
        (["s3://shards/far/train/*.tar", str(tmp_path)], InputError, "a path beside URLs"),
        (["s3://shards/far/train/a.tar", "s3://other/b.tar"], InputError, "not in one bucket"),
        ([f"https://me:{SECRET}@host/x.tar"], InputError, "holds a user or password"),
        (["ftp://host/x.tar"], InputError, "not a known kind of URL"),
        (["https://127.0.0.1:9/x/*.tar"], InputError, "a web server gives no list"),
        (["https://127.0.0.1:9/x/a.tar"], InputError, "use --folder"),
    ):
        with pytest.raises(kind, match=named) as caught:
            index_remote(urls)
        assert SECRET not in str(caught.value) and "\n" not in str(caught.value)
    with pytest.raises(InputError, match="is not below s3://shards/mixed"):
        index_remote(["s3://shards/far/train/*.tar"], folder="s3://shards/mixed")
    assert not [name for name in listed(bucket) if name.endswith(".json")]
    monkeypatch.setattr(obstore, "put", lambda *_: (_ for _ in ()).throw(FileNotFoundError("status code: 403")))
    with pytest.raises(InputError, match=r"cannot be written \(the server answers 403\); use --folder"):
        index_remote(["s3://shards/far/train/*.tar"])


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *args: object) -> None:
        pass


@pytest.fixture
def web(tmp_path: Path) -> Iterator[tuple[str, Path]]:
    """A plain web server without ranges, and its folder."""
    folder = bare(files_set(tmp_path / "web", (5, 6)))
    handler = functools.partial(Quiet, directory=str(folder))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}", folder
        server.shutdown()
        thread.join()


def test_a_web_server(web: tuple[str, Path], tmp_path: Path) -> None:
    url, folder = web
    place, manifest = index_remote([f"{url}/shard-{{000000..000001}}.tar"], folder=str(tmp_path / "here"))
    assert manifest == read_manifest(index_existing([str(folder)])) == read_manifest(place)
    remote = open_dataset(url, in_memory=False, cache_dir=str(tmp_path / "cache"))
    assert len(remote.read(range(11)).ids) == 11
    remote.close()
