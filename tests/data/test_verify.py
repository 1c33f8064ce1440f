"""Checking data sets and adopting shards that somebody else wrote."""

import io
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import webdataset
from PIL import Image

from vaegan_dist.data.existing import index_existing
from vaegan_dist.data.manifest import read_manifest
from vaegan_dist.data.prepare import PrepareOptions, prepare
from vaegan_dist.data.verify import verify
from vaegan_dist.errors import DataError, InputError

Damage = Callable[[Path], None]


def noise(*shape: int, seed: int = 1) -> np.ndarray[Any, np.dtype[np.uint8]]:
    return np.random.Generator(np.random.Philox(key=seed)).integers(0, 256, shape, np.uint8)


@pytest.fixture(scope="module", params=["files", "chunks"])
def made(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data set of 600 labelled pictures in 3 shards, with a validation split."""
    root = tmp_path_factory.mktemp(request.param)
    np.savez(root / "in.npz", images=noise(600, 8, 8, 3), labels=np.arange(600) % 5)
    options: dict[str, Any] = {"layout": request.param, "shard_samples": 250, "validation": 0.1, "encoding": "png"}
    prepare(PrepareOptions(source=str(root / "in.npz"), output=str(root / "set"), **options))
    return root / "set"


@pytest.fixture
def copy(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made, tmp_path / "set"))


def test_a_whole_data_set_has_no_problems(made: Path) -> None:
    seen: list[tuple[int, int | None]] = []
    assert verify(made) == []
    assert verify(made, full=True, progress=lambda done, total: seen.append((done, total))) == []
    assert seen[-1] == (600, 600)
    assert verify(made / "train/dataset.json", full=True, split="train") == []


def flip_payload(path: Path) -> None:
    data = bytearray(path.read_bytes())
    at = data.index(b"\x89PNG") + 60 if b"\x89PNG" in data else 2000
    data[at] ^= 0xFF
    path.write_bytes(data)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def grow(path: Path) -> None:
    path.write_bytes(path.read_bytes() + bytes(512))


def zero_header(path: Path) -> None:
    data = bytearray(path.read_bytes())
    second = data.index(b"ustar", 600) - 257
    data[second : second + 512] = bytes(512)
    path.write_bytes(data)


def page(path: Path) -> None:
    path.write_bytes(b"<html>moved</html>".ljust(path.stat().st_size))


@pytest.mark.parametrize(
    ("damage", "fast", "named"),
    [
        (Path.unlink, True, "missing"),
        (cut, True, "bytes, dataset.json says"),
        (grow, True, "bytes, dataset.json says"),
        (zero_header, True, "at byte"),
        (page, True, "not a tar archive"),
        (flip_payload, False, "sha256 is not the one"),
    ],
)
def test_damage_is_found_and_placed(copy: Path, damage: Damage, fast: bool, named: str) -> None:
    damage(copy / "train/shard-000001.tar")
    quick, thorough = verify(copy), verify(copy, full=True)
    assert bool(quick) is fast
    assert any(named in str(problem) for problem in thorough)
    for problem in [*quick, *thorough]:
        assert problem.shard == "shard-000001.tar"
        assert "shard-000001.tar" in str(problem)
        assert "\n" not in str(problem)


def test_a_broken_picture_is_named_with_its_member(tmp_path: Path) -> None:
    np.save(tmp_path / "in.npy", noise(20, 8, 8, 3))
    output = tmp_path / "set"
    prepare(PrepareOptions(source=str(tmp_path / "in.npy"), output=str(output), layout="files", encoding="png"))
    flip_payload(output / "train/shard-000000.tar")
    problems = [str(problem) for problem in verify(output, full=True)]
    assert any("member 'in-000" in problem and ".png' at byte" in problem for problem in problems), problems


def test_a_wrong_manifest_is_a_problem(copy: Path) -> None:
    path = copy / "train/dataset.json"
    tree = json.loads(path.read_text())
    tree["shards"][0]["samples"] += 1
    tree["shards"][1]["name"] = "absent.tar"
    tree["classes"] = tree["classes"][:4]
    path.write_text(json.dumps(tree))
    (copy / "validation/dataset.json").write_text("{")
    problems = " | ".join(map(str, verify(copy, full=True)))
    for named in (
        "250 samples can be read, dataset.json says 251",
        "absent.tar: missing",
        "shard-000001.tar: not listed",
        "label 4 in a data set of 4 classes",
        "validation/dataset.json: not JSON",
    ):
        assert named in problems
    with pytest.raises(InputError, match="no prepared data set"):
        verify(copy / "elsewhere")


def write_shards(folder: Path, *, sizes: tuple[int, ...] = (8, 8), label: Callable[[int], Any] | None = None) -> None:
    """Shards as another tool would write them, with the library's own writer."""
    folder.mkdir(parents=True, exist_ok=True)
    for number, size in enumerate(sizes):
        with webdataset.TarWriter(str(folder / f"part-{number}.tar")) as writer:
            for place in range(7):
                buffer = io.BytesIO()
                Image.fromarray(noise(size, size, 3, seed=place)).save(buffer, "WEBP")
                sample = {"__key__": f"{number}/{place:03d}", "webp": buffer.getvalue(), "txt": "a caption"}
                writer.write(sample if label is None else {**sample, "cls": label(place)})


@pytest.mark.parametrize("urls", ["part-{0..1}.tar", "part-*.tar", "", "part-{0,1}.tar"])
def test_shards_of_others(tmp_path: Path, urls: str) -> None:
    write_shards(tmp_path / "far", label=lambda place: place % 3)
    before = {path: path.read_bytes() for path in (tmp_path / "far").iterdir()}
    path = index_existing([f"{tmp_path}/far/{urls}"])
    manifest = read_manifest(path)
    assert path == tmp_path / "far/dataset.json"
    assert [shard.name for shard in manifest.shards] == ["part-0.tar", "part-1.tar"]
    assert (manifest.samples, manifest.height, manifest.channels, manifest.layout) == (14, 8, 3, "files")
    assert manifest.classes == ("0", "1", "2")
    assert {path: path.read_bytes() for path in before} == before
    assert verify(path, full=True) == []
    with pytest.raises(InputError, match="is there already"):
        index_existing([str(tmp_path / "far")])
    assert index_existing([str(tmp_path / "far")], overwrite=True, classes=["a", "b", "c"]) == path


def test_prepared_shards_index_to_the_same_manifest(made: Path, copy: Path) -> None:
    (copy / "train/dataset.json").unlink()
    again = read_manifest(index_existing([f"file://{copy}/train/shard-{{000000..000002}}.tar"]))
    first = read_manifest(made / "train/dataset.json")
    assert again.model_copy(update={"created": {}}) == first.model_copy(update={"created": {}})


def test_shards_that_cannot_be_adopted(tmp_path: Path) -> None:
    write_shards(tmp_path / "sizes", sizes=(8, 9))
    write_shards(tmp_path / "words", label=lambda place: "cat")
    write_shards(tmp_path / "text")
    with webdataset.TarWriter(str(tmp_path / "text/part-1.tar")) as writer:
        writer.write({"__key__": "a", "txt": "no picture"})
    write_shards(tmp_path / "cut")
    cut(tmp_path / "cut/part-1.tar")
    (tmp_path / "empty").mkdir()
    for urls, named in (
        ("sizes", r"9x9 pixels, .*8x8"),
        ("words", "a label that is no integer"),
        ("text", "holds no pictures"),
        ("empty", "no shard at"),
        ("sizes/part-{0..5}.tar", r"no shard at .*part-2\.tar"),
    ):
        with pytest.raises(InputError, match=named):
            index_existing([f"{tmp_path}/{urls}"])
    with pytest.raises(DataError, match=r"part-1\.tar: .*at byte"):
        index_existing([str(tmp_path / "cut")])
    with pytest.raises(InputError, match="is not below"):
        index_existing([str(tmp_path / "sizes")], folder=tmp_path / "empty")
    for remote in ("s3://bucket/x.tar", "pipe:cat /etc/passwd"):
        with pytest.raises(InputError, match="not a path"):
            index_existing([remote])
    assert not list(tmp_path.rglob("dataset.json"))
