"""Data that means harm: every limit is met, in one line, before it costs memory, time or a file on the disk."""

import io
import json
import os
import struct
import tarfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import webdataset
from reader_shards import describe, encoded, files_set, info, npy, pack, picture

from vaegan_dist.data import decode as decode_module
from vaegan_dist.data import index as index_module
from vaegan_dist.data.dataset import open_dataset
from vaegan_dist.data.existing import index_existing
from vaegan_dist.data.manifest import MANIFEST_NAME, find_manifest, read_manifest
from vaegan_dist.data.verify import verify
from vaegan_dist.errors import DataError, InputError, VaeganError

MEMORY = 256 * 2**20


@contextmanager
def little_memory() -> Iterator[None]:
    """The block takes no memory to speak of, not even for a moment."""
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark begins anew
    before = high_water()
    yield
    assert high_water() - before < MEMORY


def high_water() -> int:
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(lines["VmHWM"].split()[0]) * 1024


def refused(folder: Path, match: str, kind: type[VaeganError] = DataError) -> None:
    """Reading fails in one printable line, and takes no memory to speak of."""
    with little_memory(), pytest.raises(kind, match=match) as caught:
        data = open_dataset(str(folder), in_memory=False)
        data.read(range(len(data)))
    line = str(caught.value)
    assert line.isprintable() and "; " in line and len(line) < 2000


def one(tmp_path: Path, name: str, content: bytes, **more: Any) -> Path:
    """A data set of one member."""
    return describe(tmp_path, [(pack(tmp_path / "a.tar", [(name, content)]), 1)], **{"classes": None, **more})


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(*chunks: bytes, width: int = 12, height: int = 16) -> bytes:
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + b"".join(chunks) + chunk(b"IEND", b"")


def gibibyte_of_zeros() -> bytes:
    """In about a mebibyte."""
    packer = zlib.compressobj(9)
    return b"".join(packer.compress(bytes(2**20)) for _ in range(1024)) + packer.flush()


ZEROS = gibibyte_of_zeros()
HUGE_BMP = b"BM" + struct.pack("<IIIIiiHHIIiiII", 99, 0, 54, 40, 2**30, 2**30, 1, 24, 0, 0, 0, 0, 0, 0)
HUGE_JPEG = encoded(picture(0)).replace(struct.pack(">HH", 16, 12), struct.pack(">HH", 65_000, 65_000), 1)
ROWS = chunk(b"IDAT", zlib.compress(bytes((12 * 3 + 1) * 16)))


@pytest.mark.parametrize(
    ("name", "content", "match"),
    [
        ("a.png", png(chunk(b"IDAT", ZEROS), width=60_000, height=60_000), "bomb|pixels in a data set"),
        ("a.png", png(chunk(b"IDAT", ZEROS), width=9_000, height=9_000), "9000x9000 pixels in a data set of 12x16"),
        ("a.png", png(chunk(b"zTXt", b"k\0\0" + ZEROS), ROWS), "cannot be decoded"),
        ("a.bmp", HUGE_BMP, "bomb|pixels"),
        ("a.jpg", HUGE_JPEG, "65000x"),
    ],
    ids=["pixels", "size", "text", "bmp", "jpeg"],
)  # fmt: skip
def test_pictures_that_grow(tmp_path: Path, name: str, content: bytes, match: str) -> None:
    refused(one(tmp_path, name, content), match)


def test_pixels_behind_the_last_row_are_not_unpacked(tmp_path: Path) -> None:
    """A gibibyte of zeros where 592 bytes are due: the picture is read, or refused, but never the rest."""
    data = open_dataset(str(one(tmp_path, "a.png", png(chunk(b"IDAT", ZEROS)))), in_memory=False)
    with little_memory():
        assert data.read([0]).images.sum() == 0


def test_an_encoded_picture_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = encoded(picture(0))
    monkeypatch.setattr(decode_module, "MAX_ENCODED_BYTES", len(data) - 1)
    folder = one(tmp_path, "a.jpg", data)
    refused(folder, rf"member 'a\.jpg' at byte 512: {len(data)} bytes encoded, the limit is {len(data) - 1}")
    assert "bytes encoded" in str(verify(folder, full=True)[0])
    with pytest.raises(DataError, match="bytes encoded"):
        index_existing([str(folder)], overwrite=True)


def header(shape: str, kind: str = "|u1") -> bytes:
    """A `.npy` header that says what it likes, with nothing behind it."""
    text = f"{{'descr': '{kind}', 'fortran_order': False, 'shape': {shape}, }}".ljust(117) + "\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text.encode()


@pytest.mark.parametrize("layout", ["files", "chunks"])
@pytest.mark.parametrize(
    "content",
    [
        header("(1000000000000, 0, 0, 1)"),
        header("(-1, -1, 0, 1)"),
        header("(-16, -12, 3)") + bytes(576),
        header("(99999999999999999999999999, 16, 12, 3)"),
        header("(" + "1, " * 40 + ")") + bytes(1),
        header("(5, 16, 12, 3)", "|O"),
        header("__import__('os').system('touch exploded')"),
        b"\x93NUMPY\x02\x00" + struct.pack("<I", 2**32 - 1) + b"{",
        npy(np.array([print], object)),
    ],
    ids=["zeros", "negative", "minus", "huge", "dimensions", "objects", "code", "long header", "pickle"],
)
def test_arrays_that_lie(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, layout: str, content: bytes) -> None:
    monkeypatch.chdir(tmp_path)
    name = "a.npy" if layout == "files" else "a.images.npy"
    refused(one(tmp_path, name, content, layout=layout), "npy array")
    assert not (tmp_path / "exploded").exists()


def test_samples_of_a_shard_are_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(index_module, "MAX_SHARD_SAMPLES", 4)
    refused(files_set(tmp_path / "files", (5,)), r"member '000004\.jpg' at byte \d+: more than 4 samples in one shard")
    arrays = npy(np.zeros((5, 16, 12, 3), np.uint8))
    refused(one(tmp_path, "c.images.npy", arrays, layout="chunks"), "more than 4 samples in one shard")


def pax(path: Path, records: dict[str, str], repeat: int = 1) -> Path:
    """A shard whose picture stands behind so many pax headers."""
    data = encoded(picture(0))
    body = b"".join(_record(key, value) for key, value in records.items())
    extended = tarfile.TarInfo("pax")
    extended.type, extended.size = tarfile.XHDTYPE, len(body)
    member = tarfile.TarInfo("a.jpg")
    member.size = len(data)
    with path.open("wb") as file:
        for number in range(repeat):
            file.write(extended.tobuf() + _padded(body.replace(b"NUMBER", b"%06d" % number)))
        file.write(member.tobuf() + _padded(data) + bytes(1024))
    return path


def _record(key: str, value: str) -> bytes:
    rest = f" {key}={value}\n".encode()
    length = len(rest) + len(str(len(rest)))
    length += len(str(length)) - len(str(len(rest)))
    return str(length).encode() + rest


def _padded(data: bytes) -> bytes:
    return data + bytes(-len(data) % 512)


@pytest.mark.parametrize(
    ("records", "match"),
    [
        ({"path": "d/" * 3000 + "a.jpg"}, r"a name of 6005 characters \(limit 4096\)"),
        ({"comment": "x" * 2**20}, r"an extended header of \d+ bytes \(limit 1048576\)"),
        ({"size": "9" * 19}, r"cut inside its payload"),
        ({"size": "9" * 4000}, r"a pax header with size"),
        ({"size": "-1"}, r"a pax header with size '-1'"),
        ({"size": "٣"}, r"a pax header with size"),
    ],
    ids=["name", "header", "size", "digits", "negative", "other digits"],
)
def test_extended_headers(tmp_path: Path, records: dict[str, str], match: str) -> None:
    refused(describe(tmp_path, [(pax(tmp_path / "a.tar", records), 1)], classes=None), match)


def test_headers_without_end_are_forgotten(tmp_path: Path) -> None:
    """More records that nobody needs than may be held at a time."""
    path = pax(tmp_path / "a.tar", {"vendor.NUMBER": "x" * 1_000_000}, repeat=400)
    with little_memory():
        folder = index_existing([str(path)]).parent
        assert open_dataset(str(folder), in_memory=False).key(0) == "a"


def test_a_header_with_an_absurd_size(tmp_path: Path) -> None:
    member = bytearray(tarfile.TarInfo("a.jpg").tobuf())
    member[124:136] = b"\x80" + b"\x7f" * 11
    member[148:156] = b"%06o\0 " % (sum(member[:148]) + sum(member[156:]) + 8 * 32)
    (tmp_path / "a.tar").write_bytes(bytes(member) + bytes(2048))
    refused(
        describe(tmp_path, [(tmp_path / "a.tar", 1)], classes=None), r"cut inside its payload \(2048 of \d{20,} bytes\)"
    )


NAMES = ["../../../../tmp/x.jpg", "/etc/passwd.jpg", "a\nb.jpg", "\x1b[31m.jpg", "~/x.jpg", "|sh.jpg", "$(touch x).jpg"]


def test_names_are_never_paths_and_never_printed_raw(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    inside = tmp_path / "inside"
    inside.mkdir()
    monkeypatch.chdir(inside)
    good = [(name, encoded(picture(n))) for n, name in enumerate(NAMES)]
    others = [("x.\n\x1b[2Jevil", b"1"), ("y.\udc80", b"2"), ("pipe:touch x", b"3")]
    shard = inside / "a.tar"
    with tarfile.open(shard, "w", errors="surrogateescape") as tar:
        for name, content in good + others:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    folder = describe(inside, [(shard, len(NAMES))], classes=None)
    before = sorted(tmp_path.rglob("*"))
    data = open_dataset(str(folder), in_memory=False)
    data.read(range(len(data)))
    assert [data.key(n) for n in range(len(data))] == [name.removesuffix(".jpg") for name in NAMES]
    assert all(what.isprintable() for what in data.ignored) and sum(data.ignored.values()) == 3
    made = read_manifest(index_existing([str(folder)], overwrite=True))
    assert made.created["passed_over"].keys() == data.ignored.keys()
    assert sorted(tmp_path.rglob("*")) == before
    for name in NAMES:
        refused(one(inside, name, b"no picture"), "at byte 512: not a whole JPEG")


def change(**keys: Any) -> Callable[[dict[str, Any]], None]:
    return lambda tree: tree.update(keys)


def shard(**keys: Any) -> Callable[[dict[str, Any]], None]:
    return lambda tree: tree["shards"][0].update(keys)


@pytest.mark.parametrize(
    ("damage", "match"),
    [
        (shard(samples=10**18), "samples=10{18}: Input should be less than or equal to 16777216"),
        (shard(samples=16_000_000), "16000000 samples cannot lie in"),
        (shard(samples=-1), "samples=-1"),
        (shard(samples=1e300), "samples=1e\\+300"),
        (shard(bytes=2**60), "bytes="),
        (shard(name="../../etc/passwd"), "stays below"),
        (shard(name="/etc/passwd"), "stays below"),
        (shard(name="s3://other/x.tar"), "colon"),
        (shard(name="a\\..\\b"), "backslash"),
        (shard(name="pipe:sh"), "colon"),
        (shard(name="a\nb"), "control"),
        (shard(name="x/" * 600 + "a.tar"), "at most 1024"),
        (change(height=10**9), "height=1000000000"),
        (change(width=0), "width=0"),
        (change(channels=400), "channels=400"),
        (change(layout="pickle"), "layout='pickle'"),
        (change(split="../x"), "split="),
        (change(code="import os"), "code="),
    ],
)
def test_manifests_with_absurd_content(tmp_path: Path, damage: Callable[[dict[str, Any]], None], match: str) -> None:
    folder = files_set(tmp_path, (3,))
    tree = json.loads((folder / MANIFEST_NAME).read_text())
    damage(tree)
    (folder / MANIFEST_NAME).write_text(json.dumps(tree))
    with pytest.raises(InputError, match=match) as caught:
        open_dataset(str(folder))
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 500


@pytest.mark.parametrize(
    "text", ["[" * 10**6, '{"a":' * 10**5, "9" * 10**5, '{"format_version": 1, "shards": 1e999}', "\0"]
)
def test_manifests_that_are_hard_to_read(tmp_path: Path, text: str) -> None:
    (tmp_path / MANIFEST_NAME).write_text(text)
    with pytest.raises(InputError, match=r"dataset\.json: "):
        read_manifest(find_manifest(tmp_path))


def test_a_manifest_is_bounded(tmp_path: Path) -> None:
    with (tmp_path / MANIFEST_NAME).open("wb") as file:
        file.truncate(2**40)
    with pytest.raises(InputError, match=r"so not a dataset\.json"):
        read_manifest(tmp_path / MANIFEST_NAME)


def test_a_shard_that_is_no_file(tmp_path: Path) -> None:
    """A pipe under a shard's name would be waited for without end."""
    folder = files_set(tmp_path, (3,))
    path = folder / "shard-000000.tar"
    path.unlink()
    os.mkfifo(path)
    refused(folder, "is not a regular file", InputError)
    assert "missing" in str(verify(folder)[0])


def test_the_stock_reader_sees_what_we_see(tmp_path: Path) -> None:
    """The limits stand in nobody's way: a shard with long names, captions and metadata reads as ever."""
    path = tmp_path / "a.tar"
    with webdataset.TarWriter(str(path), encoder=False) as tar:
        for n in range(5):
            tar.write({"__key__": f"{'folder/' * 30}{n}", "jpg": encoded(picture(n)), "txt": b"x" * 10_000})
    folder = describe(tmp_path, [(path, 5)], classes=None)
    data = open_dataset(str(folder), in_memory=False)
    keys = [sample["__key__"] for sample in webdataset.WebDataset(str(path), shardshuffle=False)]
    assert [data.key(n) for n in range(5)] == keys and info(path, 5) == data.manifest.shards[0]
