"""Every kind of source, what it calls its labels and splits, and what it refuses."""

import gzip
import io
import struct
import sys
import tarfile
import types
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from vaegan_dist.data import sources_base
from vaegan_dist.data.images import PictureError
from vaegan_dist.data.sources import number_classes, open_source, with_labels
from vaegan_dist.data.sources_base import Content
from vaegan_dist.errors import InputError

Array = np.ndarray[Any, Any]


def noise(*shape: int, seed: int = 1) -> Array:
    return np.random.Generator(np.random.Philox(key=seed)).integers(0, 256, shape, np.uint8)


def png(value: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("L", (3, 3), value).save(buffer, "PNG")
    return buffer.getvalue()


def load(path: Path | str, kind: Any = "auto", labels: str | None = None) -> Content:
    scratch = Path(path).parent / "scratch"
    return with_labels(open_source(str(path), kind, scratch).load(), labels)


def rows(content: Content, split: str = "train") -> dict[str, tuple[bytes | Array, str | None]]:
    """Raw picture and class name of every picture of a part."""
    part = content.parts[split]
    classes, labels = number_classes(content, "source")
    named = [None if classes is None else classes[labels[split][i]] for i in range(len(part.names))]
    return {name: (part.read(i), named[i]) for i, name in enumerate(part.names)}


def write_folder(root: Path, files: dict[str, bytes]) -> Path:
    for name, data in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(data)
    return root


def write_zip(path: Path, files: dict[str, bytes]) -> Path:
    path = path.with_suffix(".zip")
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in files.items():
            archive.writestr(name, data)
    return path


def tar_writer(suffix: str, mode: Any, prefix: str = "") -> Callable[[Path, dict[str, bytes]], Path]:
    def write(path: Path, files: dict[str, bytes]) -> Path:
        path = path.with_name(path.name + suffix)
        with tarfile.open(path, mode) as archive:
            for name, data in files.items():
                member = tarfile.TarInfo(prefix + name)
                member.size = len(data)
                archive.addfile(member, io.BytesIO(data))
        return path

    return write


CONTAINERS = {
    "folder": write_folder,
    "zip": write_zip,
    "tar": tar_writer(".tar", "w", "./"),
    "tar.gz": tar_writer(".tar.gz", "w:gz"),
    "tar.xz": tar_writer(".txz", "w:xz"),
    "tar.bz2": tar_writer(".tar.bz2", "w:bz2"),
}


@pytest.mark.parametrize("container", CONTAINERS)
def test_encoded_pictures_with_classes_and_splits(tmp_path: Path, container: str) -> None:
    write = CONTAINERS[container]
    flat = {
        "set/b.png": png(1),
        "set/a.PNG": png(2),
        "set/notes.txt": b"hello",
        "set/.a.png": b"",
        "set/deep/c.png": png(3),
    }
    content = load(write(tmp_path / "flat", flat))
    assert list(content.parts) == ["train"]
    assert {name: raw for name, (raw, _) in rows(content).items()} == {
        name: data for name, data in flat.items() if name.endswith(("b.png", "a.PNG", "c.png"))
    }
    assert number_classes(content, "x")[0] is None, "a picture outside every folder has no class"
    assert content.ignored[".txt"] == 1
    classes = {f"set/{name}/{number}.png": png(number) for name in ("dog", "cat") for number in range(3)}
    content = load(write(tmp_path / "classes", classes))
    assert {label for _, label in rows(content).values()} == {"cat", "dog"}
    assert all(label == name.split("/")[1] for name, (_, label) in rows(content).items())
    splits = {f"{split}/{name}/1.png": png(1) for split in ("train", "val", "test") for name in ("b", "a")}
    content = load(write(tmp_path / "splits", splits))
    assert set(content.parts) == {"train", "validation", "test"}
    assert rows(content, "validation") == {f"val/{name}/1.png": (png(1), name) for name in ("a", "b")}


def test_labels_from_a_table(tmp_path: Path) -> None:
    source = write_folder(tmp_path / "in", {f"{number}.png": png(number) for number in range(4)})
    table = tmp_path / "labels.csv"
    table.write_text("id,Label,path\n1,ten,./1.png\n2,two,2.png\n", encoding="utf-8-sig")
    content = load(source, labels=str(table))
    assert rows(content) == {"1.png": (png(1), "ten"), "2.png": (png(2), "two")}
    assert content.ignored["unlisted"] == 2
    table.write_text("1.png,7\n3.png,12\n")
    assert {label for _, label in rows(load(source, labels=str(table))).values()} == {"7", "12"}
    for text, named in (
        ("1.png,7\n9.png,1\n", "1 of 2 rows name no picture of the source, first '9.png'"),
        ("1.png,7\n1.png,8\n", "line 2 gives '1.png' a second label"),
        ("1.png,\n", "line 1 has no path or no label"),
        ("a,b,c\n1,2,3\n", "needs a header"),
        ("", "empty"),
    ):
        table.write_text(text)
        with pytest.raises(InputError, match=named):
            load(source, labels=str(table))
    with pytest.raises(InputError, match=r"absent\.csv"):
        load(source, labels=str(tmp_path / "absent.csv"))


def test_class_numbers() -> None:
    def numbered(labels: Any) -> tuple[Any, list[int]]:
        part = sources_base.Part(sources_base.Numbered("x", len(labels)), lambda i: b"", labels)
        classes, numbers = number_classes(Content({"train": part}), "x")
        return classes, numbers["train"].tolist()

    assert numbered(["10", "9", "0"])[1] == [10, 9, 0]
    assert numbered(np.array([2, 0])) == (("0", "1", "2"), [2, 0])
    assert numbered(["b", "a", "b"]) == (("a", "b"), [1, 0, 1])
    assert numbered(["007", "1"]) == (("007", "1"), [0, 1]), "007 is a name, not the number 7"
    assert numbered(np.array([-5, 10**12])) == (("-5", "1000000000000"), [0, 1])


def idx(pixels: Array) -> bytes:
    return bytes([0, 0, 8, pixels.ndim]) + struct.pack(f">{pixels.ndim}I", *pixels.shape) + pixels.tobytes()


def test_idx_files(tmp_path: Path) -> None:
    images, labels, test = noise(5, 4, 6), np.arange(5, dtype=np.uint8), noise(2, 4, 6, seed=2)
    (tmp_path / "train-images-idx3-ubyte").write_bytes(idx(images))
    (tmp_path / "train-labels.idx1-ubyte.gz").write_bytes(gzip.compress(idx(labels)))
    (tmp_path / "train-labels-idx1-ubyte").write_bytes(idx(labels))
    (tmp_path / "t10k-images.idx3-ubyte.gz").write_bytes(gzip.compress(idx(test)))
    (tmp_path / "t10k-labels.idx1-ubyte.gz").write_bytes(gzip.compress(idx(labels[:2])))
    content = load(tmp_path)
    assert list(content.parts) == ["train", "validation"]
    found = rows(content)
    assert all(np.array_equal(found[f"train-{i:08d}"][0], images[i]) for i in range(5))
    assert [label for _, label in found.values()] == list("01234")
    assert np.array_equal(content.parts["validation"].read(1), test[1])
    alone = load(tmp_path / "t10k-images.idx3-ubyte.gz")
    assert list(alone.parts) == ["train"]
    assert np.array_equal(alone.parts["train"].read(0), test[0])
    assert not list((tmp_path / "scratch").glob("*")), "an unpacked file stays behind"


@pytest.mark.parametrize(
    ("data", "named"),
    [
        (idx(noise(3, 4, 4))[:-1], "header promises"),
        (gzip.compress(idx(noise(3, 4, 4))[:-1], mtime=0), "header promises"),
        (gzip.compress(idx(noise(3, 4, 4)) + b"0" * 10**6, mtime=0), "bomb"),
        (gzip.compress(idx(noise(3, 4, 4)), mtime=0)[:-12], "damaged|cannot be read"),
        (b"\x00\x00\x08\x03\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff", "promises the shape"),
        (b"<html>", "not an IDX file"),
        (b"\x00\x00\x08\x03\x00", "ends inside its header"),
    ],
)
def test_damaged_idx(tmp_path: Path, data: bytes, named: str) -> None:
    path = tmp_path / "train-images-idx3-ubyte"
    path.write_bytes(data)
    with pytest.raises(InputError, match=named):
        load(path)


def test_idx_with_other_number_of_labels(tmp_path: Path) -> None:
    (tmp_path / "train-images-idx3-ubyte").write_bytes(idx(noise(3, 4, 4)))
    (tmp_path / "train-labels-idx1-ubyte").write_bytes(idx(noise(2)))
    with pytest.raises(InputError, match="for 3 pictures"):
        load(tmp_path)


def test_arrays(tmp_path: Path) -> None:
    pixels = noise(4, 6, 5, 3)
    np.save(tmp_path / "a.npy", pixels)
    np.save(tmp_path / "nchw.npy", pixels.transpose(0, 3, 1, 2))
    np.save(tmp_path / "float.npy", pixels.astype(np.float32) / 255)
    np.save(tmp_path / "labels.npy", np.array([3, 1, 0, 2]))
    for name in ("a.npy", "nchw.npy"):
        content = load(tmp_path / name, labels=str(tmp_path / "labels.npy"))
        assert all(np.array_equal(content.parts["train"].read(i), pixels[i]) for i in range(4))
        assert [label for _, label in rows(content).values()] == ["3", "1", "0", "2"]
    assert load(tmp_path / "float.npy").parts["train"].names[3] == "float-00000003"
    for number, (wrong, named) in enumerate(
        (
            (np.full((2, 4, 4), 255.0), "expected 0 to 1"),
            (np.array([[[0.5, np.nan]]]), "nan"),
            (np.full((2, 4, 4), 300), "expected 0 to 255"),
            (noise(4, 4), "shape"),
            (noise(2, 9, 9, 9), "no axis"),
            (np.array([[["x"]]]), "type"),
        )
    ):
        np.save(tmp_path / f"wrong{number}.npy", wrong)
        with pytest.raises(InputError, match=named):
            load(tmp_path / f"wrong{number}.npy")


@pytest.mark.parametrize("names", [("x_{}", "y_{}"), ("{}_images", "{}_labels")])
def test_npz_with_splits(tmp_path: Path, names: tuple[str, str]) -> None:
    arrays = {}
    for split in ("train", "test"):
        arrays[names[0].format(split)] = noise(3, 4, 4, seed=len(split))
        arrays[names[1].format(split)] = np.array([[2], [0], [1]])
    np.savez_compressed(tmp_path / "a.npz", **arrays)
    content = load(tmp_path / "a.npz")
    assert set(content.parts) == {"train", "validation"}
    assert np.array_equal(content.parts["validation"].read(2), arrays[names[0].format("test")][2])
    assert [label for _, label in rows(content, "validation").values()] == ["2", "0", "1"]


class _Opened:
    """Leaves a trace where it is unpickled."""

    def __reduce__(self) -> Any:
        return Path.touch, (Path(self.trace),)

    def __init__(self, trace: Path) -> None:
        self.trace = str(trace)


def test_no_pickle_is_ever_opened(tmp_path: Path) -> None:
    trace = tmp_path / "opened"
    objects = np.array([_Opened(trace)] * 3, dtype=object).reshape(3, 1, 1)
    np.save(tmp_path / "a.npy", objects, allow_pickle=True)
    np.savez(tmp_path / "b.npz", images=objects)
    (tmp_path / "c.npy").write_bytes(b"\x80\x04.")
    for name in ("a.npy", "b.npz", "c.npy"):
        with pytest.raises(InputError, match=r"not a plain \.npy array"):
            load(tmp_path / name)
    assert not trace.exists()


def test_hostile_archive_members_touch_no_disk(tmp_path: Path) -> None:
    path = tmp_path / "in" / "a.tar"
    path.parent.mkdir()
    with tarfile.open(path, "w") as archive:
        for name, kind in (
            ("../evil.png", tarfile.REGTYPE),
            ("/abs/evil.png", tarfile.REGTYPE),
            ("l.png", tarfile.SYMTYPE),
        ):
            member = tarfile.TarInfo(name)
            member.type, member.linkname = kind, "/etc/passwd"
            data = png(1) if kind == tarfile.REGTYPE else b""
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    content = load(path)
    assert [raw for raw, _ in rows(content).values()] == [png(1)], "only the regular picture under a plain name is read"
    assert sum(content.ignored.values()) == 2
    assert [entry for entry in tmp_path.rglob("*") if entry.is_file()] == [path]


def test_damaged_archives(tmp_path: Path) -> None:
    good = CONTAINERS["tar"](tmp_path / "good", {f"{i}.png": noise(3000).tobytes() for i in range(4)})
    data = good.read_bytes()
    header = data.index(b"./2.png")
    for name, wrong, named in (
        ("cut", data[: header - 700], "unexpected end|ends inside"),
        ("flipped", data[:header] + b"X" + data[header + 1 :], f"damaged header.* at byte {header}"),
        ("twice", data + data, "second archive"),
        ("page", b"<html>" * 300, "not a readable tar"),
        ("empty", b"", "not a readable tar"),
    ):
        path = tmp_path / f"{name}.tar"
        path.write_bytes(wrong)
        with pytest.raises(InputError, match=named):
            load(path)
    packed = gzip.compress(data)
    (tmp_path / "cut.tgz").write_bytes(packed[:-2000])
    (tmp_path / "html.zip").write_bytes(b"<html>")
    for name, named in (("cut.tgz", "damaged"), ("html.zip", "not a readable zip")):
        with pytest.raises(InputError, match=named):
            load(tmp_path / name)


def test_a_damaged_zip_member_is_one_broken_picture(tmp_path: Path) -> None:
    path = write_zip(tmp_path / "a", {"a.png": noise(5000).tobytes(), "b.png": png(3)})
    data = bytearray(path.read_bytes())
    data[200:240] = bytes(40)
    path.write_bytes(bytes(data))
    part = load(path).parts["train"]
    with pytest.raises(PictureError, match="damaged in the archive"):
        part.read(0)
    assert part.read(1) == png(3)


def test_links_in_a_folder(tmp_path: Path) -> None:
    source = write_folder(tmp_path / "in", {"a/1.png": png(1)})
    (source / "a" / "loop").symlink_to(source)
    (source / "b").symlink_to(write_folder(tmp_path / "far", {"2.png": png(2)}))
    assert set(load(source).parts["train"].names) == {"a/1.png", "b/2.png"}
    (source / "gone.png").symlink_to(tmp_path / "nothing")
    with pytest.raises(InputError, match=r"gone\.png: a link to nothing"):
        load(source)


def test_what_is_no_source(tmp_path: Path) -> None:
    (tmp_path / "a.parquet").write_bytes(b"")
    (tmp_path / "empty").mkdir()
    for source, named in (
        (tmp_path / "absent", "no such file"),
        (tmp_path / "a.parquet", "kind is not clear"),
        (tmp_path / "empty", "holds no pictures"),
    ):
        with pytest.raises(InputError, match=named):
            load(source)


def test_digits_without_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    from importlib import metadata

    def absent(name: str) -> str:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "version", absent)
    with pytest.raises(InputError, match=r"pip install 'vaegan-dist\[demo\]'"):
        load("digits")


class _Table:
    """As much of a Hugging Face table as its documentation promises and the source uses."""

    def __init__(self, columns: dict[str, list[Any]], features: dict[str, Any]) -> None:
        self.columns, self.features = columns, features
        self.info = types.SimpleNamespace(version="1.0.0")

    def __len__(self) -> int:
        return len(next(iter(self.columns.values())))

    def __getitem__(self, key: Any) -> Any:
        return (
            self.columns[key] if isinstance(key, str) else {name: values[key] for name, values in self.columns.items()}
        )

    def select_columns(self, names: list[str]) -> "_Table":
        return _Table({name: self.columns[name] for name in names}, {name: self.features[name] for name in names})

    def cast_column(self, name: str, feature: Any) -> "_Table":
        assert feature.decode is False
        return self


def test_hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    module = types.ModuleType("datasets")
    image = type("Image", (), {"__init__": lambda self, decode=True: setattr(self, "decode", decode)})
    label = type("ClassLabel", (), {"names": ["cat", "dog"]})
    far = tmp_path / "x.png"
    far.write_bytes(png(9))
    columns = {
        "picture": [{"bytes": png(1), "path": None}, {"bytes": None, "path": str(far)}, None],
        "label": [1, 0, 1],
    }
    table = _Table(columns, {"picture": image(), "label": label()})
    calls: list[tuple[str, str | None]] = []

    def load_dataset(name: str, split: str | None = None) -> Any:
        calls.append((name, split))
        if name == "offline":
            raise ConnectionError("Couldn't reach the Hub\nlong trace")
        return table if split else {"train": table, "test": table}

    vars(module).update(Image=image, ClassLabel=label, load_dataset=load_dataset)
    monkeypatch.setitem(sys.modules, "datasets", module)
    content = load("hf:some/pets")
    assert list(content.parts) == ["train", "validation"]
    assert content.parts["train"].read(0) == png(1)
    assert content.parts["train"].read(1) == png(9)
    with pytest.raises(PictureError, match="no picture"):
        content.parts["train"].read(2)
    classes, numbers = number_classes(content, "x")
    assert classes == ("cat", "dog")
    assert numbers["validation"].tolist() == [1, 0, 1]
    assert list(load("hf:some/pets:test").parts) == ["train"]
    assert calls == [("some/pets", None), ("some/pets", "test")]
    with pytest.raises(InputError, match=r"cannot be loaded \(Couldn't reach the Hub long trace\).*HF_TOKEN"):
        load("hf:offline")
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(InputError, match=r"pip install 'vaegan-dist\[hf\]'"):
        load("hf:some/pets")
