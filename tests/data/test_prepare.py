"""Preparing data sets: the stock webdataset reader and the raw sources are what results are compared with."""

import fcntl
import gzip
import hashlib
import io
import json
import multiprocessing
import os
import re
import signal
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import webdataset
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from pydantic import ValidationError

from vaegan_dist.data.dataset import open_dataset
from vaegan_dist.data.manifest import read_manifest
from vaegan_dist.data.plan import make_plan, member_keys
from vaegan_dist.data.prepare import Prepared, PrepareOptions, prepare
from vaegan_dist.data.sources_base import Content, Part
from vaegan_dist.errors import InputError


def noise(*shape: int, seed: int = 1) -> np.ndarray[Any, np.dtype[np.uint8]]:
    return np.random.Generator(np.random.Philox(key=seed)).integers(0, 256, shape, np.uint8)


def png(pixels: np.ndarray[Any, Any]) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def folder(root: Path, names: list[str], size: int = 8) -> Path:
    """A folder of pictures, each with its own pixels."""
    for number, name in enumerate(names):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(png(noise(size, size, 3, seed=number)))
    return root


def run(source: Path | str, output: Path, **options: Any) -> Prepared:
    return prepare(PrepareOptions(source=str(source), output=str(output), **options))


def stock(manifest: Path) -> list[dict[str, Any]]:
    """All samples of a split, as the webdataset library reads them."""
    urls = [str(manifest.parent / shard.name) for shard in read_manifest(manifest).shards]
    return list(webdataset.WebDataset(urls, shardshuffle=False, empty_check=False))


def pictures(manifest: Path) -> dict[str, tuple[np.ndarray[Any, Any], int | None]]:
    """Pixels and label of every picture of a split by its key, through the stock reader."""
    found: dict[str, tuple[np.ndarray[Any, Any], int | None]] = {}
    for sample in stock(manifest):
        if "images.npy" in sample:
            pixels = np.load(io.BytesIO(sample["images.npy"]), allow_pickle=False)
            labels = np.load(io.BytesIO(sample["labels.npy"])) if "labels.npy" in sample else [None] * len(pixels)
            keys = json.loads(sample["keys.json"])
            assert len(keys) == len(pixels) == len(labels)
            assert pixels.dtype == np.uint8
            rows = zip(keys, pixels, labels, strict=True)
        else:
            image = Image.open(io.BytesIO(sample.get("png") or sample["jpg"]))
            label = int(sample["cls"]) if "cls" in sample else None
            rows = zip([sample["__key__"]], [np.asarray(image)], [label], strict=True)
        for key, array, label in rows:
            assert key not in found, "a key occurs twice"
            found[key] = array, None if label is None else int(label)
    return found


def shard_hashes(output: Path) -> dict[str, str]:
    files = sorted(output.glob("*/shard-*.tar"))
    return {str(path.relative_to(output)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def test_mnist_through_the_stock_reader(shared: Path, tmp_path: Path) -> None:
    source = shared / "data" / "mnist"
    made = run(source, tmp_path, limit=5000)
    assert list(made.samples.items()) == [("train", 5000), ("validation", 5000)]
    manifest = read_manifest(made.manifests["train"])
    assert (manifest.layout, manifest.height, manifest.width, manifest.channels) == ("chunks", 28, 28, 1)
    assert manifest.classes == tuple("0123456789")
    for split, stem in (("train", "train"), ("validation", "t10k")):
        raw = gzip.decompress((source / f"{stem}-images.idx3-ubyte.gz").read_bytes())
        digits = np.frombuffer(raw, np.uint8, offset=16).reshape(-1, 28, 28, 1)
        labels = gzip.decompress((source / f"{stem}-labels.idx1-ubyte.gz").read_bytes())[8:]
        found = pictures(made.manifests[split])
        assert len(found) == 5000
        for key, (pixels, label) in found.items():
            index = int(key.removeprefix(f"{stem}-"))
            assert np.array_equal(pixels, digits[index])
            assert label == labels[index]
    sizes = [len(json.loads(sample["keys.json"])) for sample in stock(made.manifests["train"])]
    assert set(sizes[:-1]) == {256}


def test_emoji_through_the_stock_reader(shared: Path, tmp_path: Path) -> None:
    source, background = shared / "data" / "fluent-emoji-3d.tar", np.array([32, 96, 192])
    tones = re.compile("-1f3f[b-f]")
    options: dict[str, Any] = {"validation": 0.2, "validation_by": tones.pattern, "limit": 60}
    made = run(source, tmp_path, resolution=256, encoding="png", background="#2060c0", **options)
    groups = {}
    with tarfile.open(source) as archive:
        for split, manifest in made.manifests.items():
            found = pictures(manifest)
            groups[split] = {tones.sub("", key) for key in found}
            for key, (pixels, label) in found.items():
                member = archive.extractfile(f"{key}.webp")
                assert member is not None
                rgba = np.asarray(Image.open(member).convert("RGBA")).astype(float)
                rgba = rgba[:, (rgba.shape[1] - 256) // 2 :][:, :256]
                rgba = rgba[(rgba.shape[0] - 256) // 2 :][:256]
                alpha = rgba[:, :, 3:] / 255
                assert np.abs(pixels - (rgba[:, :, :3] * alpha + background * (1 - alpha))).max() <= 1
                assert label is None
    assert not groups["train"] & groups["validation"], "a skin tone leaked across the split"


def test_digits(tmp_path: Path) -> None:
    made = run("digits", tmp_path / "a", validation=0.1)
    assert sum(made.samples.values()) == 5000
    assert 400 < made.samples["validation"] < 600
    labels = [label for split in made.manifests.values() for _, label in pictures(split).values()]
    assert np.bincount(np.array(labels, int)).tolist() == [500] * 10


def test_same_bytes_whatever_the_threads_and_a_mixed_order(tmp_path: Path) -> None:
    names = [f"{name}/{number}.png" for name in ("cat", "dog") for number in range(30)]
    source = folder(tmp_path / "in", names)
    options = {"layout": "files", "shard_samples": 13}
    run(source, tmp_path / "one", workers=1, **options)
    run(source, tmp_path / "four", workers=4, **options)
    assert shard_hashes(tmp_path / "one") == shard_hashes(tmp_path / "four")
    run(source, tmp_path / "other", seed=1, **options)
    assert shard_hashes(tmp_path / "one") != shard_hashes(tmp_path / "other")
    manifest = read_manifest(tmp_path / "one/train/dataset.json")
    assert [shard.samples for shard in manifest.shards] == [13, 13, 13, 13, 8]
    for shard in manifest.shards:
        path = tmp_path / "one/train" / shard.name
        assert (path.stat().st_size, hashlib.sha256(path.read_bytes()).hexdigest()) == (shard.bytes, shard.sha256)
    assert manifest.classes == ("cat", "dog")
    order = [int(sample["cls"]) for sample in stock(tmp_path / "one/train/dataset.json")]
    assert 0 < sum(order[:13]) < 13, "the shards hold one class each: nothing was shuffled"


@pytest.mark.parametrize("layout", ["files", "chunks"])
def test_the_training_reader_sees_the_source(tmp_path: Path, layout: str) -> None:
    pixels, labels = noise(300, 8, 8, 3), np.arange(300) % 7
    np.savez(tmp_path / "in.npz", images=pixels, labels=labels)
    run(tmp_path / "in.npz", tmp_path / "out", layout=layout, encoding="png", shard_samples=128)
    data = open_dataset(str(tmp_path / "out"))
    batch = data.read(range(300))
    places = [int(data.key(sample).removeprefix("in-")) for sample in range(300)]
    assert sorted(places) == list(range(300))
    assert np.array_equal(batch.images.permute(0, 2, 3, 1).numpy(), pixels[places])
    assert batch.labels is not None
    assert batch.labels.tolist() == labels[places].tolist()


def test_shards_end_by_bytes(tmp_path: Path) -> None:
    source = folder(tmp_path / "in", [f"{number}.png" for number in range(12)], size=100)
    made = run(source, tmp_path / "out", encoding="png", shard_bytes=2**16)
    infos = read_manifest(made.manifests["train"]).shards
    assert len(infos) == 4
    assert made.bytes == sum(shard.bytes for shard in infos)


def _killed(source: Path, output: Path, after: int) -> None:
    def progress(done: int, total: int | None) -> None:
        if done == after:
            os.kill(os.getpid(), signal.SIGKILL)

    options = PrepareOptions(source=str(source), output=str(output), shard_samples=10, layout="files", validation=0.2)
    prepare(options, progress)


def test_a_killed_run_continues_to_the_same_bytes(tmp_path: Path) -> None:
    source = folder(tmp_path / "in", [f"{number}.png" for number in range(90)])
    options: dict[str, Any] = {"shard_samples": 10, "layout": "files", "validation": 0.2}
    whole = run(source, tmp_path / "whole", **options)
    output = tmp_path / "killed"
    process = multiprocessing.get_context("spawn").Process(target=_killed, args=(source, output, 55))
    process.start()
    process.join(120)
    assert process.exitcode == -signal.SIGKILL
    assert len(shard_hashes(output)) == 5
    assert not list(output.glob("*/dataset.json")), "an unfinished data set looks complete"
    with pytest.raises(InputError, match=r"unfinished data set made with shard_samples=10, now 20"):
        run(source, output, **{**options, "shard_samples": 20})
    (output / "train/shard-000003.tar").write_bytes(b"damaged meanwhile")
    kept = (output / "train/shard-000000.tar").stat().st_ino
    continued = run(source, output, **options)
    assert continued.continued == 3
    assert (output / "train/shard-000000.tar").stat().st_ino == kept, "a finished shard was made again"
    assert continued.samples == whole.samples
    assert shard_hashes(output) == shard_hashes(tmp_path / "whole")
    manifests = ("train/dataset.json", "validation/dataset.json")
    assert all((output / name).read_bytes() == (tmp_path / "whole" / name).read_bytes() for name in manifests)
    assert not list(output.glob("**/.*")), "temporary files or the journal stay behind"


def test_a_finished_data_set_is_reused_or_refused(tmp_path: Path) -> None:
    source, output = folder(tmp_path / "in", ["a.png", "b.png", "notes.txt.png"]), tmp_path / "out"
    first = run(source, output)
    again = run(source, output, workers=3, max_bad=2)
    assert not first.reused
    assert again.reused
    assert (again.samples, again.bytes, again.manifests) == (first.samples, first.bytes, first.manifests)
    with pytest.raises(InputError, match="made with resolution=None, now 4; use --overwrite"):
        run(source, output, resolution=4)
    (source / "c.png").write_bytes(png(noise(8, 8, 3)))
    with pytest.raises(InputError, match="the source has changed since"):
        run(source, output)
    replaced = run(source, output, resolution=4, overwrite=True, validation=0.4)
    assert sum(replaced.samples.values()) == 4
    (output / "train/shard-000000.tar").unlink()
    with pytest.raises(InputError, match="missing or of another size"):
        run(source, output, resolution=4, validation=0.4)
    repaired = run(source, output, resolution=4, overwrite=True)
    assert not (output / "validation/dataset.json").exists(), "the old validation split outlives the data set"
    assert repaired.samples == {"train": 4}


def test_strange_files_and_a_second_run_are_refused(tmp_path: Path) -> None:
    source, output = folder(tmp_path / "in", ["a.png"]), tmp_path / "out"
    (output / "train").mkdir(parents=True)
    (output / "train/shard-000000.tar").write_bytes(b"somebody's")
    (output / "train/notes.txt").write_text("keep")
    with pytest.raises(InputError, match="no known data set"):
        run(source, output)
    run(source, output, overwrite=True)
    assert (output / "train/notes.txt").read_text() == "keep"
    descriptor = os.open(output, os.O_RDONLY)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    with pytest.raises(InputError, match="another preparation"):
        run(source, output)
    os.close(descriptor)


def test_broken_pictures_are_named_and_counted(tmp_path: Path) -> None:
    source, output = folder(tmp_path / "in", [f"{number}.png" for number in range(20)]), tmp_path / "out"
    (source / "3.png").write_bytes(b"")
    (source / "odd\nname.png").write_bytes(png(noise(8, 8, 3))[:60])
    with pytest.raises(InputError, match=r"1 broken pictures, max_bad allows 0 .*raise --max-bad") as caught:
        run(source, output, shard_samples=4)
    assert "\n" not in str(caught.value)
    made = run(source, output, shard_samples=4, max_bad=2)
    assert {item.name for item in made.broken} == {"3.png", "odd\\nname.png"}
    assert made.samples == {"train": 19}
    assert run(source, output, shard_samples=4).broken == made.broken
    assert len(pictures(made.manifests["train"])) == 19
    created = read_manifest(made.manifests["train"]).created
    assert created["broken_count"] == 2
    assert {"name": "3.png", "cause": "empty (zero bytes)"} in created["broken"]


def test_pictures_that_do_not_fit(tmp_path: Path) -> None:
    source = folder(tmp_path / "in", ["a.png", "b.png"])
    (source / "c.png").write_bytes(png(noise(9, 8, 3)))
    with pytest.raises(InputError, match=r"pixels, others have .*set --resolution"):
        run(source, tmp_path / "out")
    assert run(source, tmp_path / "out2", resolution=8).samples == {"train": 3}
    with pytest.raises(InputError, match="not one of its 1 pictures"):
        (tmp_path / "bad").mkdir()
        (tmp_path / "bad/x.jpg").write_bytes(b"no")
        run(tmp_path / "bad", tmp_path / "out3")


def test_channels_follow_the_source_or_say_why_not(tmp_path: Path) -> None:
    source = tmp_path / "in"
    source.mkdir()
    for number in range(100):
        (source / f"{number}.png").write_bytes(png(noise(4, 4, seed=number)))
    made = run(source, tmp_path / "grey")
    assert read_manifest(made.manifests["train"]).channels == 1
    assert run(source, tmp_path / "rgb", channels=3).samples == {"train": 100}
    order = list(pictures(made.manifests["train"]))
    (source / f"{order[-1]}.png").write_bytes(png(noise(4, 4, 3)))
    with pytest.raises(InputError, match="has colour, the first 64 pictures are grey"):
        run(source, tmp_path / "mixed")


def test_a_fitting_jpeg_is_kept_byte_for_byte(tmp_path: Path) -> None:
    source = tmp_path / "in"
    source.mkdir()
    Image.fromarray(noise(64, 64, 3)).save(source / "a.jpg", quality=40)
    made = run(source, tmp_path / "out", resolution=64)
    assert stock(made.manifests["train"])[0]["jpg"] == (source / "a.jpg").read_bytes()


@pytest.mark.parametrize(
    ("wrong", "named"),
    [
        ({"background": "clear"}, "background"),
        ({"validation_by": "("}, "validation_by"),
        ({"validation": 1.0}, "validation"),
        ({"resolution": 0}, "resolution"),
        ({"sized": 3}, "sized"),
    ],
)
def test_wrong_options(wrong: dict[str, Any], named: str) -> None:
    with pytest.raises(ValidationError, match=named):
        PrepareOptions(source="x", output="y", **wrong)


def plan_of(names: list[str], **options: Any) -> dict[str, set[str]]:
    content = Content({"train": Part(names, lambda index: b"")})
    defaults: dict[str, Any] = {"seed": 0, "validation": None, "validation_by": None, "limit": None, "source": "x"}
    plans = make_plan(content, {}, **{**defaults, **options})
    return {plan.split: {names[index] for index in plan.order} for plan in plans}


def test_the_split_is_stable_and_of_the_wanted_size() -> None:
    names = [f"photo {number}.jpg" for number in range(5000)]
    small, large = plan_of(names[:4000], validation=0.1, seed=5), plan_of(names, validation=0.1)
    assert abs(len(large["validation"]) - 500) < 5 * np.sqrt(5000 * 0.1 * 0.9)
    assert small["validation"] == large["validation"] & set(names[:4000]), "new pictures moved old ones"
    assert large["train"] | large["validation"] == set(names)
    half, tenth = plan_of(names, limit=2500)["train"], plan_of(names, limit=500)["train"]
    assert tenth < half
    with pytest.raises(InputError, match="leaves no picture in 'validation'"):
        plan_of(names[:3], validation=0.001)


@given(
    st.lists(st.text(st.characters(blacklist_categories=("Cs",), blacklist_characters="\0"), min_size=1), unique=True)
)
def test_member_keys_survive_the_stock_reader(names: list[str]) -> None:
    keys = member_keys([f"x{name}" for name in names])
    assert len(set(keys)) == len(keys)
    for key in keys:
        assert key.isascii()
        assert len(key) <= 90
        assert webdataset.tariterators.base_plus_ext(f"{key}.images.npy") == (key, "images.npy")
