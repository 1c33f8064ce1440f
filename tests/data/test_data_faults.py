"""The table of faults: each is injected, and ends in a line that names shard, place, remedy, or in the right pictures.

`rot` faults happen to a shard after its dataset.json was written; `packed` ones were there when it was. With
`max_bad_samples` what can be read is read and the rest replaced; a shard that is not there at all, or another one than
the manifest says, always fails.
"""

import io
import os
import re
import struct
import tarfile
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from pydantic import ValidationError
from reader_shards import chunk_set, describe, encoded, npy, pack, picture

from vaegan_dist.data.dataset import open_dataset
from vaegan_dist.data.existing import index_existing
from vaegan_dist.errors import DataError, InputError, VaeganError

COUNT = 12
Members = list[tuple[str, bytes]]


def members() -> Members:
    """Twelve samples: label, then picture, as webdataset packs them."""
    both = [[(f"{n:03d}.cls", str(n % 10).encode()), (f"{n:03d}.jpg", encoded(picture(n)))] for n in range(COUNT)]
    return [member for sample in both for member in sample]


def place(path: Path, name: str) -> tarfile.TarInfo:
    """Where a member lies, by the standard library."""
    with tarfile.open(path) as tar:
        return tar.getmember(name)


def overwrite(path: Path, offset: int, data: bytes) -> None:
    with path.open("r+b") as file:
        file.seek(offset)
        file.write(data)


def cut_at_header(path: Path) -> None:
    os.truncate(path, place(path, "007.jpg").offset)


def cut_in_header(path: Path) -> None:
    os.truncate(path, place(path, "007.jpg").offset + 100)


def cut_in_payload(path: Path) -> None:
    os.truncate(path, place(path, "007.jpg").offset_data + 50)


def cut_end_mark(path: Path) -> None:
    last = place(path, f"{COUNT - 1:03d}.jpg")
    os.truncate(path, last.offset_data + -(-last.size // 512) * 512)


def random_bytes(path: Path) -> None:
    overwrite(path, place(path, "007.jpg").offset, np.random.default_rng(0).bytes(512))


def zeroed_header(path: Path) -> None:
    overwrite(path, place(path, "007.jpg").offset, bytes(512))


def flipped_size(path: Path) -> None:
    overwrite(path, place(path, "007.jpg").offset + 130, b"7")


def joined(path: Path) -> None:
    path.write_bytes(path.read_bytes() * 2)


def random_payload(path: Path) -> None:
    where = place(path, "007.jpg")
    overwrite(path, where.offset_data, np.random.default_rng(0).bytes(where.size))


def zeroed_payload(path: Path) -> None:
    where = place(path, "007.jpg")
    overwrite(path, where.offset_data + where.size // 2, bytes(where.size - where.size // 2))


def empty(path: Path) -> None:
    path.write_bytes(b"")


def html(path: Path) -> None:
    path.write_bytes(b"<!DOCTYPE html><html><body>503 Service Unavailable</body></html>" * 400)


Fault = Callable[[Path], None]
HEADER_FAULTS: list[tuple[Fault, str]] = [
    (cut_at_header, r"at byte \d+: cut between two members: the archive's end mark is missing"),
    (cut_in_header, r"at byte \d+: cut inside a member's header \(100 of 512 bytes\)"),
    (cut_in_payload, r"member '007\.jpg' at byte \d+: cut inside its payload \(50 of \d+ bytes\)"),
    (random_bytes, r"at byte \d+: a damaged member header: it begins with b'"),
    (zeroed_header, r"at byte \d+: zeros stand in place of a member's header, but data follows at byte \d+"),
    (flipped_size, r"at byte \d+: a damaged member header"),
]
SHARD_FAULTS: list[tuple[Fault, str]] = [
    (cut_end_mark, r"at byte \d+: cut between two members"),
    (joined, r"zeros stand in place .* or archives that were joined"),
    (html, r"at byte 0: not a tar archive: it begins with b'<!DOCTYPE html>"),
]
PAYLOAD_FAULTS: list[tuple[Fault, str]] = [
    (random_payload, r"member '007\.jpg' at byte \d+: not a whole JPEG"),
    (zeroed_payload, r"member '007\.jpg' at byte \d+: not a whole JPEG"),
]


def fails(folder: Path, match: str, error: type[VaeganError] = DataError, **options) -> None:
    """Opening and reading everything ends in one line that names the shard and a remedy; in memory as well."""
    for in_memory in (False, True):
        with pytest.raises(error) as caught:
            data = open_dataset(str(folder), in_memory=in_memory, **options)
            data.read(range(len(data)))
        line = str(caught.value)
        assert re.search(match, line), line
        assert line.startswith("shard a.tar: ") and "\n" not in line
        assert re.search(r"; .*(restore|prepare|pack|keep|remove|index|set data)", line), line


def replaces(folder: Path, bad: list[int], budget: int | None = None) -> None:
    """Within the budget everything is read, in memory or not, the bad ones as the next good one, and all are listed."""
    budget = len(bad) if budget is None else budget
    for in_memory in (False, True):
        data = open_dataset(str(folder), in_memory=in_memory, max_bad_samples=budget)
        images = data.read(range(len(data))).images
        assert sorted(data.bad_samples) == bad
        assert all(cause.startswith("shard a.tar: ") for cause in data.bad_samples.values())
        good = [n for n in range(len(data)) if n not in bad]
        for n in range(len(data)):
            instead = n if n in good else min(good, key=lambda other: (other - n) % len(data))
            expected = picture(instead)
            assert np.abs(images[n].permute(1, 2, 0).numpy().astype(int) - expected).mean() < 12, n
    if budget > 1:
        fails(folder, f"more bad samples than data.max_bad_samples={budget - 1}", max_bad_samples=budget - 1)


@pytest.fixture
def shard(tmp_path):
    return pack(tmp_path / "a.tar", members())


@pytest.mark.parametrize(
    ("fault", "match"), HEADER_FAULTS + SHARD_FAULTS, ids=lambda value: getattr(value, "__name__", "")
)
def test_packed_with_a_damaged_structure(shard, fault, match):
    fault(shard)
    fails(describe(shard.parent, [(shard, COUNT)]), match)


def test_an_empty_shard_is_refused_by_the_manifest_already(shard):
    empty(shard)
    with pytest.raises(ValidationError, match=r"shard a\.tar: 12 samples cannot lie in 0 bytes"):
        describe(shard.parent, [(shard, COUNT)])
    with pytest.raises(DataError, match=r"shard a\.tar: at byte 0: the file is empty"):
        index_existing([str(shard)])


@pytest.mark.parametrize(("fault", "_"), HEADER_FAULTS, ids=lambda value: getattr(value, "__name__", ""))
def test_damaged_structure_within_the_budget(shard, fault, _):
    """What lies behind the damage is lost: those samples are bad ones."""
    folder = describe(shard.parent, [(shard, COUNT)])
    fault(shard)
    replaces(folder, list(range(7, COUNT)))


@pytest.mark.parametrize("fault", [empty, html], ids=lambda value: value.__name__)
def test_a_shard_with_nothing_to_read_fails_whatever_the_budget(shard, fault):
    folder = describe(shard.parent, [(shard, COUNT)])
    fault(shard)
    fails(folder, r"0 samples, dataset\.json says 12", max_bad_samples=99)


@pytest.mark.parametrize(
    "fault", [cut_at_header, cut_in_header, cut_in_payload, empty, html, joined], ids=lambda value: value.__name__
)
def test_rot_that_changes_the_size(shard, fault):
    folder = describe(shard.parent, [(shard, COUNT)])
    fault(shard)
    fails(folder, r"has \d+ bytes, dataset\.json says \d+: it was cut or changed")


@pytest.mark.parametrize(
    "fault", [random_bytes, zeroed_header, random_payload, zeroed_payload], ids=lambda value: value.__name__
)
def test_rot_that_keeps_the_size(shard, fault):
    """Found by the hash on the first reading; and again when it happens after that one, by the changed time."""
    folder = describe(shard.parent, [(shard, COUNT)])
    open_dataset(str(folder), in_memory=False).read(range(COUNT))
    fault(shard)
    os.utime(shard, ns=(5, 5))
    fails(folder, r"its bytes are not those that dataset\.json has the sha256 of")


def test_another_good_shard_of_the_same_size_is_not_taken_for_it(shard):
    folder = describe(shard.parent, [(shard, COUNT)])
    size = shard.stat().st_size
    pack(shard, [(name.replace("0", "1"), data) for name, data in members()])
    assert shard.stat().st_size == size
    fails(folder, "sha256")


def test_change_while_in_use(shard):
    data = open_dataset(str(describe(shard.parent, [(shard, COUNT)])), in_memory=False)
    data.read([0])
    data.after_fork()  # forgets the open file, as one among too many others would be
    shard.write_bytes(shard.read_bytes()[:-1024])
    with pytest.raises(DataError, match=r"shard a\.tar: .*changed while in use"):
        data.read([0])
    pack(shard, members())
    data = open_dataset(str(shard.parent), in_memory=False)
    data.read([0])
    os.truncate(shard, 2048)
    with pytest.raises(DataError, match=r"shard a\.tar: at byte \d+: .*shrank while in use"):
        data.read([COUNT - 1])


@pytest.mark.parametrize("budget", [0, 99])
def test_missing_shard(shard, budget):
    folder = describe(shard.parent, [(shard, COUNT)])
    shard.unlink()
    fails(folder, r"cannot be found at .*a\.tar \(No such file", InputError, max_bad_samples=budget)


@pytest.mark.parametrize(("fault", "match"), PAYLOAD_FAULTS, ids=lambda value: getattr(value, "__name__", ""))
def test_damaged_picture(shard, fault, match):
    fault(shard)
    folder = describe(shard.parent, [(shard, COUNT)])
    fails(folder, match)
    replaces(folder, [7])


def bomb() -> bytes:
    """A PNG of 60,000 x 60,000 pixels in a few bytes."""

    def part(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + part(b"IHDR", header) + part(b"IDAT", zlib.compress(bytes(10**6))) + part(b"IEND", b"")
    )


BAD_PICTURES = {
    "zero bytes": ("jpg", b"", "zero bytes"),
    "wrong size": ("jpg", encoded(picture(7, (16, 14))), r"14x16 pixels in a data set of 12x16"),
    "wrong size png": ("png", encoded(picture(7, (8, 12)), "png"), r"12x8 pixels in a data set of 12x16"),
    "bomb": ("png", bomb(), r"3600000000 pixels.*bomb"),
    "not a png": ("png", b"GIF89a no", "cannot be decoded"),
    "png under another name": ("jpg", encoded(picture(7), "png"), "not a whole JPEG"),
    "half a png": ("png", encoded(picture(7), "png")[:-60], "cannot be decoded"),
    "pickle in npy": ("npy", npy(np.array([print], object)), "array of type object"),
}


@pytest.mark.parametrize("what", BAD_PICTURES)
def test_bad_picture(tmp_path, what):
    extension, data, match = BAD_PICTURES[what]
    packed = [(f"007.{extension}", data) if name == "007.jpg" else (name, good) for name, good in members()]
    folder = describe(tmp_path, [(pack(tmp_path / "a.tar", packed), COUNT)])
    fails(folder, rf"member '007\.{extension}' at byte \d+: .*{match}")
    replaces(folder, [7])


@pytest.mark.parametrize(
    ("label", "match"),
    [
        (None, "no .cls label"),
        (b"seven", "its label is no integer"),
        (b"-1", "its label is no integer"),
        (b"9" * 40, "its label is no integer"),
        (b"10", "label 10 in a data set of 10 classes"),
    ],
)
def test_bad_label(tmp_path, label, match):
    packed = [(name, label if name == "007.cls" else data) for name, data in members()]
    packed = [(name, data) for name, data in packed if data is not None]
    folder = describe(tmp_path, [(pack(tmp_path / "a.tar", packed), COUNT)])
    fails(folder, rf"member '007\.jpg' at byte \d+: {match}")
    replaces(folder, [7])


CONTRADICTIONS = {
    "duplicate key": ([("003.jpg", encoded(picture(3)))], r"member '003\.jpg' at byte \d+: the same name as"),
    "two pictures": ([("003.png", encoded(picture(3), "png"))], r"member '003\.png' at byte \d+: sample '003' has a"),
    "label alone": ([("zzz.cls", b"1")], r"member 'zzz\.cls' at byte \d+: a label without a picture"),
}


@pytest.mark.parametrize("what", CONTRADICTIONS)
@pytest.mark.parametrize("budget", [0, 99])
def test_contradictions(tmp_path, what, budget):
    more, match = CONTRADICTIONS[what]
    folder = describe(tmp_path, [(pack(tmp_path / "a.tar", members() + more), COUNT)])
    fails(folder, match, max_bad_samples=budget)


def test_a_missing_end_mark_within_the_budget_is_said(shard, caplog):
    folder = describe(shard.parent, [(shard, COUNT)])
    cut_end_mark(shard)
    replaces(folder, [], budget=1)
    assert "cut between two members" in caplog.text and "dataset.json says" in caplog.text


def test_members_apart_from_each_other(tmp_path):
    """The stock reader makes two broken samples of them; here they are one."""
    packed = sorted(members(), key=lambda member: member[0].endswith("cls"))
    data = open_dataset(str(describe(tmp_path, [(pack(tmp_path / "a.tar", packed), COUNT)])), in_memory=False)
    assert data.read(range(COUNT)).labels.tolist() == [n % 10 for n in range(COUNT)]


def test_members_that_do_not_count(tmp_path, monkeypatch):
    """Without extension, pickles, hidden ones, links, `..`: passed over and counted, and nothing touches the disk."""
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "inside" / "a.tar"
    path.parent.mkdir()
    with tarfile.open(path, "w") as tar:
        for number, (name, data) in enumerate(members()):
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
            extra = tarfile.TarInfo(["noext", "x.pkl", "._x.jpg", "../../up.txt", "/abs.exe"][number % 5])
            extra.size = 4
            tar.addfile(extra, io.BytesIO(b"cos.")) if number < 5 else None
        for name, kind, target in (("l.jpg", tarfile.SYMTYPE, "/etc/passwd"), ("h.jpg", tarfile.LNKTYPE, "000.jpg")):
            link = tarfile.TarInfo(name)
            link.type, link.linkname = kind, target
            tar.addfile(link)
        folder = tarfile.TarInfo("folder")
        folder.type = tarfile.DIRTYPE
        tar.addfile(folder)
    before = sorted(tmp_path.rglob("*"))
    data = open_dataset(str(describe(path.parent, [(path, COUNT)])), in_memory=False)
    assert data.read(range(COUNT)).labels.tolist() == [n % 10 for n in range(COUNT)]
    assert data.ignored == {"no extension": 2, ".pkl": 1, ".exe": 1, "symbolic link": 1, "hard link": 1, "folder": 1}
    assert sorted(tmp_path.rglob("*")) == sorted([*before, path.parent / "dataset.json"])
    with pytest.raises(DataError, match=r"12 samples, dataset\.json says 14 .*1 symbolic link"):
        open_dataset(str(describe(path.parent, [(path, 14)])), in_memory=False).read([0])


def test_up_going_keys_are_only_names(tmp_path):
    packed = [(f"../../{name}", data) for name, data in members()]
    data = open_dataset(str(describe(tmp_path, [(pack(tmp_path / "a.tar", packed), COUNT)])), in_memory=False)
    assert data.key(3) == "../../003" and data.read([3]).labels.tolist() == [3]


CHUNK_FAULTS = {
    "labels": (lambda path: chunk(path, labels=np.zeros(4, np.int64)), "4 labels for 5 pictures"),
    "type": (lambda path: chunk(path, images=np.zeros((5, 16, 12, 1), np.float32)), "type float32"),
    "dimensions": (lambda path: chunk(path, images=np.zeros((5, 16, 12), np.uint8)), "4 dimensions are read"),
    "pickle": (lambda path: chunk(path, images=np.array([[[[print]]]], object)), "type object"),
    "size": (lambda path: chunk(path, images=np.zeros((5, 12, 16, 1), np.uint8)), r"pictures of \(12, 16, 1\)"),
    "no images": (lambda path: pack(path, [("c.keys.json", b"[]")]), "a chunk without images.npy"),
}


def chunk(path: Path, images: np.ndarray | None = None, labels: np.ndarray | None = None) -> Path:
    images = np.zeros((5, 16, 12, 1), np.uint8) if images is None else images
    labels = np.zeros(5, np.int64) if labels is None else labels
    return pack(path, [("c.images.npy", npy(images)), ("c.labels.npy", npy(labels)), ("c.keys.json", b'["a"]')])


@pytest.mark.parametrize("what", CHUNK_FAULTS)
def test_bad_chunk(tmp_path, what):
    make, match = CHUNK_FAULTS[what]
    folder = describe(tmp_path, [(make(tmp_path / "a.tar"), 5)], layout="chunks", channels=1)
    fails(folder, match)


def test_bad_keys_of_a_chunk_are_an_error_of_the_keys_only(tmp_path):
    folder = describe(tmp_path, [(chunk(tmp_path / "a.tar"), 5)], layout="chunks", channels=1)
    data = open_dataset(str(folder), in_memory=False)
    assert data.read(range(5)).labels.tolist() == [0] * 5
    with pytest.raises(DataError, match=r"member 'c\.keys\.json' at byte \d+: not a JSON list of 5 strings"):
        data.key(0)


def test_layout_of_another_kind(tmp_path):
    chunks = chunk_set(tmp_path, (5,)) / "shard-000000.tar"
    with pytest.raises(DataError, match=r"0 samples, dataset\.json says 5"):
        open_dataset(str(describe(tmp_path, [(chunks, 5)], layout="files", channels=1)), in_memory=False).read([0])
