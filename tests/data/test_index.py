"""The tar index against the standard library's tarfile and the stock webdataset reader."""

import os
import tarfile

import numpy as np
import pytest
import webdataset
from hypothesis import given, settings
from hypothesis import strategies as st
from reader_shards import chunk_set, describe, encoded, files_set, npy, pack, picture

from vaegan_dist.data import shards as shards_module
from vaegan_dist.data.dataset import open_dataset
from vaegan_dist.data.index import NO_LABEL, PICTURE_KINDS, index_file, index_shard, shard_keys, split_name
from vaegan_dist.data.tar import ShardFile, walk
from vaegan_dist.errors import DataError

FORMATS = {"ustar": tarfile.USTAR_FORMAT, "gnu": tarfile.GNU_FORMAT, "pax": tarfile.PAX_FORMAT}
names = st.text(
    st.characters(codec="utf-8", exclude_characters="\0\n", exclude_categories=["Cs"]), min_size=1, max_size=160
)


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(["gnu", "pax"]), st.lists(st.tuples(names, st.binary(max_size=1500)), max_size=8))
def test_walk_finds_what_tarfile_finds(tmp_path_factory, form, members):
    path = pack(tmp_path_factory.mktemp("walk") / "a.tar", members, FORMATS[form])
    with tarfile.open(path) as tar, ShardFile(path, "a.tar") as file:
        expected = [(m.name.rstrip("/"), m.offset, m.offset_data, m.size) for m in tar.getmembers() if m.isreg()]
        found = [(m.name.rstrip("/"), m.header, m.offset, m.size) for m in walk(file) if m.type is None]
    assert found == expected


@pytest.mark.parametrize("form", FORMATS)
def test_long_names_are_whole(tmp_path, form):
    key = "/".join(["folder" * 6] * 4) + "/" + "n" * 60 if form == "ustar" else "/".join(["ordner-ü" * 20] * 5)
    path = pack(tmp_path / "a.tar", [(f"{key}.png", b"x"), (f"{key}.cls", b"3")], FORMATS[form])
    assert shard_keys(path, "a.tar", "files") == [key]
    assert index_shard(path, "a.tar", "files").label.tolist() == [3]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("a.jpg", ("a", "jpg")),
        ("A.JPG", ("A", "jpg")),
        ("d.x/a.images.npy", ("d.x/a", "images.npy")),
        ("a.b.jpg", ("a", "b.jpg")),
        ("README", ("README", "")),
        (".hidden.jpg", (".hidden.jpg", "")),
        ("d/._a.jpg", ("d/._a.jpg", "")),
        ("../../etc/a.jpg", ("../../etc/a", "jpg")),
    ],
)
def test_key_ends_at_the_first_dot(name, expected):
    assert split_name(name) == expected


def test_same_samples_as_the_stock_reader(tmp_path):
    """Keys, payloads and labels of shards by webdataset, and of one with members in odd order and foreign ones."""
    folder = files_set(tmp_path / "set", (11,))
    odd = pack(
        tmp_path / "odd.tar",
        [
            ("b/x.cls", b"2"),
            ("b/x.png", b"PX"),
            ("b/x.txt", b"t"),
            ("readme.md", b"#"),
            ("a.webp", b"AW"),
            ("a.cls", b"1"),
        ],
    )
    for path in (folder / "shard-000000.tar", odd):
        index, keys, data = (
            index_shard(path, path.name, "files"),
            shard_keys(path, path.name, "files"),
            path.read_bytes(),
        )
        stock = [s for s in webdataset.WebDataset(str(path), shardshuffle=False, empty_check=False) if "cls" in s]
        assert keys == [sample["__key__"] for sample in stock]
        for row, sample in enumerate(stock):
            extension = PICTURE_KINDS[index.kind[row]]
            assert data[index.offset[row] :][: index.size[row]] == sample[extension]
            assert index.label[row] == int(sample["cls"])
    assert index_shard(odd, "odd", "files").notes == {".md": 1}


def test_chunks_are_pictures_with_keys_and_labels(tmp_path):
    path = chunk_set(tmp_path, (17,)) / "shard-000000.tar"
    index = index_shard(path, path.name, "chunks")
    data = path.read_bytes()
    assert index.shape == (16, 12, 1) and index.samples == 17 and index.label.tolist() == [n % 10 for n in range(17)]
    assert shard_keys(path, path.name, "chunks") == [f"k{n}" for n in range(17)]
    for n in range(17):
        assert data[index.offset[n] :][: 16 * 12] == picture(n, channels=1).tobytes()


def test_chunk_without_keys_and_labels(tmp_path):
    path = pack(tmp_path / "a.tar", [("c.images.npy", npy(np.zeros((3, 4, 4, 3), np.uint8)))])
    assert shard_keys(path, "a", "chunks") == ["c-0", "c-1", "c-2"]
    assert index_shard(path, "a", "chunks").label.tolist() == [NO_LABEL] * 3


def test_real_pictures_of_somebody_else(shared):
    """A tar that nobody here packed: folders, long archive, webp."""
    path = shared / "data" / "fluent-emoji-3d.tar"
    index = index_shard(path, path.name, "files")
    with tarfile.open(path) as tar:
        members = [m for m in tar.getmembers() if m.isreg() and m.name.endswith(".webp")]
    assert index.offset.tolist() == [m.offset_data for m in members]
    assert index.size.tolist() == [m.size for m in members]


@pytest.fixture
def walks(monkeypatch):
    """Counts the walks over shards."""
    calls = []

    def counted(file, layout, *, tolerant):
        calls.append(file.name)
        return index_file(file, layout, tolerant=tolerant)

    monkeypatch.setattr(shards_module, "index_file", counted)
    return calls


def test_index_is_cached_by_content(tmp_path, monkeypatch, walks):
    monkeypatch.setenv("VAEGAN_CACHE", str(tmp_path / "cache"))
    a, b = files_set(tmp_path / "a" / "train", (6,)), files_set(tmp_path / "b" / "train", (5,))
    for _ in range(2):  # same basenames, another content: never mixed up
        assert len(open_dataset(str(a), in_memory=False).read(range(6)).ids) == 6
        assert len(open_dataset(str(b), in_memory=False).read(range(5)).ids) == 5
    assert len(walks) == 2
    os.utime(a / "shard-000000.tar", ns=(1, 1))  # touched: walked and hashed anew
    open_dataset(str(a), in_memory=False).read([0])
    assert len(walks) == 3


@pytest.mark.parametrize("damage", [b"", b"PK\x03\x04 no zip", None])
def test_damaged_index_cache_is_made_again(tmp_path, monkeypatch, walks, damage):
    monkeypatch.setenv("VAEGAN_CACHE", str(tmp_path / "cache"))
    folder = files_set(tmp_path / "set", (6,))
    expected = open_dataset(str(folder), in_memory=False).read(range(6)).images
    (cached,) = (tmp_path / "cache" / "index").glob("*.npz")
    cached.write_bytes(cached.read_bytes()[:-100] if damage is None else damage)
    assert (open_dataset(str(folder), in_memory=False).read(range(6)).images == expected).all()
    assert len(walks) == 2
    open_dataset(str(folder), in_memory=False).read([0])
    assert len(walks) == 2  # whole again


def test_without_any_cache_folder_it_still_reads(tmp_path, monkeypatch):
    blocked = tmp_path / "file"
    blocked.write_text("")
    monkeypatch.setenv("VAEGAN_CACHE", str(blocked / "below a file"))
    folder = files_set(tmp_path / "set", (6,))
    for in_memory in (False, True):
        images = open_dataset(str(folder), in_memory=in_memory).read(range(6)).images
        assert images.shape == (6, 3, 16, 12)


def test_counts_of_the_manifest_are_checked(tmp_path):
    path = pack(tmp_path / "a.tar", [("a.jpg", encoded(picture(0))), ("a.cls", b"0"), ("b.pkl", b"."), ("c.JPG2", b"")])
    describe(tmp_path, [(path, 2)])
    with pytest.raises(DataError, match=r"a\.tar: 1 samples, dataset\.json says 2 .*1 \.pkl, 1 \.jpg2"):
        open_dataset(str(tmp_path), in_memory=False).read([0])
