"""Reading by id against Pillow and the stock webdataset reader; in memory and from the shards, alone and in company."""

import io
import json
import multiprocessing
import pickle
import tarfile
import threading

import numpy as np
import pytest
import torch
import webdataset
from PIL import Image
from reader_shards import chunk_set, describe, encoded, files_set, npy, pack, picture

from vaegan_dist.data import dataset as dataset_module
from vaegan_dist.data import memory, shards
from vaegan_dist.data.dataset import open_dataset
from vaegan_dist.errors import DataError, InputError

KINDS = ["jpg", "jpeg", "png", "webp", "bmp", "tif", "npy"]


@pytest.mark.parametrize(("kind", "channels"), [(k, c) for k in KINDS for c in (1, 3) if (k, c) != ("webp", 1)])
def test_pixels_are_pillows(tmp_path, kind, channels):
    folder = files_set(tmp_path, (5, 4), kind, channels)
    batch = open_dataset(str(folder), in_memory=False).read([8, 0, 5, 0])
    assert batch.images.dtype == torch.uint8 and batch.images.shape == (4, channels, 16, 12)
    assert batch.images.is_contiguous(memory_format=torch.channels_last)
    assert batch.ids.tolist() == [8, 0, 5, 0] and batch.labels is not None and batch.labels.tolist() == [8, 0, 5, 0]
    for row, number in enumerate((8, 0, 5, 0)):
        expected = picture(number, channels=channels)
        if kind in ("jpg", "jpeg"):
            expected = np.asarray(Image.open(io.BytesIO(encoded(expected, kind)))).reshape(expected.shape)
        assert np.array_equal(batch.images[row].permute(1, 2, 0).numpy(), expected)


def test_colour_spaces_are_converted_as_pillow_does(tmp_path):
    """Grey and palette pictures in an RGB data set, colour pictures in a grey one."""
    grey, colour = picture(0, channels=1), picture(1)
    palette = io.BytesIO()
    Image.fromarray(colour).quantize(8).save(palette, "PNG")
    members = [("a.png", encoded(grey, "png")), ("b.jpg", encoded(grey)), ("c.png", palette.getvalue())]
    folder = describe(tmp_path, [(pack(tmp_path / "a.tar", members), 3)], classes=None)
    images = open_dataset(str(folder), in_memory=False).read(range(3)).images.permute(0, 2, 3, 1).numpy()
    for image, (_, data) in zip(images, members, strict=True):
        assert np.array_equal(image, np.asarray(Image.open(io.BytesIO(data)).convert("RGB")))
    members = [("a.png", encoded(colour, "png")), ("b.jpg", encoded(colour))]
    folder = describe(tmp_path, [(pack(tmp_path / "a.tar", members), 2)], classes=None, channels=1)
    images = open_dataset(str(folder), in_memory=False).read(range(2)).images[:, 0].numpy()
    for image, (_, data) in zip(images, members, strict=True):
        reference = Image.open(io.BytesIO(data))
        reference.draft("L", None)  # a JPEG's luma is taken as it is stored, not by way of RGB
        assert np.array_equal(image, np.asarray(reference.convert("L")))


@pytest.mark.parametrize("make", [files_set, chunk_set])
def test_same_as_the_stock_reader(tmp_path, make):
    folder = make(tmp_path, (9, 0, 16))
    data = open_dataset(str(folder), in_memory=False)
    pixels, labels, keys = [], [], []
    urls = [str(folder / f"shard-00000{n}.tar") for n in (0, 2)]
    for sample in webdataset.WebDataset(urls, shardshuffle=False):
        if "jpg" in sample:
            pixels.append(np.asarray(Image.open(io.BytesIO(sample["jpg"]))))
            labels.append(int(sample["cls"]))
            keys.append(sample["__key__"])
        else:
            pixels.extend(np.load(io.BytesIO(sample["images.npy"])))
            labels.extend(np.load(io.BytesIO(sample["labels.npy"])))
            keys.extend(json.loads(sample["keys.json"]))
    batch = data.read(range(25))
    assert np.array_equal(batch.images.permute(0, 2, 3, 1).numpy(), np.stack(pixels))
    assert batch.labels is not None and batch.labels.tolist() == labels
    assert [data.key(n) for n in range(25)] == keys
    assert data.shard_samples == (9, 0, 16) and len(data) == 25


@pytest.mark.parametrize("make", [files_set, chunk_set])
def test_in_memory_is_the_same(tmp_path, monkeypatch, make):
    monkeypatch.setattr(memory, "PART", 7)
    folder = make(tmp_path, (20, 11))
    lazy, held = open_dataset(str(folder), in_memory=False), open_dataset(str(folder))
    assert held.in_memory and not lazy.in_memory
    ids = np.random.default_rng(0).integers(0, 31, 50)
    one, two = lazy.read(ids), held.read(ids)
    assert torch.equal(one.images, two.images) and torch.equal(one.labels, two.labels)
    assert torch.equal(one.ids, two.ids) and held.key(30) == lazy.key(30)
    monkeypatch.setattr(dataset_module, "IN_MEMORY_BYTES", 31 * 16 * 12)
    assert not open_dataset(str(folder)).in_memory


def test_without_classes_there_are_no_labels(tmp_path):
    for in_memory in (False, True):
        assert open_dataset(str(chunk_set(tmp_path, (5,), labels=False)), in_memory=in_memory).read([3]).labels is None


def _open_and_count(folder, barrier, results):
    """In a child: open in memory at the same moment as the others; tell whether this process built the file."""
    built = []
    build = memory._build
    memory._build = lambda *args: (built.append(1), build(*args))[1]  # type: ignore[assignment, func-returns-value]
    barrier.wait(60)
    images = open_dataset(folder, in_memory=True).read(range(30)).images
    results.put((len(built), images.sum().item()))


@pytest.mark.multiprocess
def test_ranks_of_a_node_decode_once(tmp_path, monkeypatch):
    monkeypatch.setenv("VAEGAN_CACHE", str(tmp_path / "cache"))
    folder = str(files_set(tmp_path / "set", (30,)))
    context = multiprocessing.get_context("fork")
    barrier, results = context.Barrier(3), context.Queue()
    ranks = [context.Process(target=_open_and_count, args=(folder, barrier, results)) for _ in range(3)]
    for rank in ranks:
        rank.start()
    told = [results.get(timeout=60) for _ in ranks]
    for rank in ranks:
        rank.join(60)
    assert sum(built for built, _ in told) == 1 and len({total for _, total in told}) == 1


@pytest.mark.parametrize("damage", ["cut", "other", "no labels"])
def test_damaged_decoded_file_is_made_again(tmp_path, monkeypatch, damage):
    monkeypatch.setenv("VAEGAN_CACHE", str(tmp_path / "cache"))
    folder = str(files_set(tmp_path / "set", (30,)))
    expected = open_dataset(folder, in_memory=True).read(range(30))
    (pixels,), (notes,) = ((tmp_path / "cache" / "decoded").glob(f"*.{kind}") for kind in ("npy", "npz"))
    if damage == "cut":
        pixels.write_bytes(pixels.read_bytes()[:-50])
    elif damage == "other":
        np.save(pixels, np.zeros((30, 1), np.uint8))
    else:
        notes.unlink()
    again = open_dataset(folder, in_memory=True).read(range(30))
    assert torch.equal(again.images, expected.images) and torch.equal(again.labels, expected.labels)


def test_full_disk_leaves_an_own_copy(tmp_path, monkeypatch, caplog):
    def full(*_):
        raise OSError(28, "No space left on device")

    folder = str(files_set(tmp_path, (30,)))
    monkeypatch.setattr(memory, "replace_file", full)
    monkeypatch.setenv("VAEGAN_CACHE", str(tmp_path / "cache"))
    data = open_dataset(folder, in_memory=True)
    assert data.in_memory and data.read([29]).labels.tolist() == [9]
    assert "No space left on device" in caplog.text


def test_decoded_files_stay_within_their_budget(tmp_path, monkeypatch):
    monkeypatch.setenv("VAEGAN_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(memory, "CACHE_BYTES", 3 * 30 * 16 * 12 * 3)
    kept = [open_dataset(str(files_set(tmp_path / f"{n}", (30, n))), in_memory=True) for n in range(6)]
    assert 1 <= len(list((tmp_path / "cache" / "decoded").glob("*.npy"))) <= 3
    assert kept[0].read([3]).labels.tolist() == [3]  # its file lost its name, not its pages


def test_many_shards_few_open_files(tmp_path, monkeypatch):
    monkeypatch.setattr(shards, "OPEN_FILES", 2)
    data = open_dataset(str(files_set(tmp_path, (3,) * 9)), in_memory=False)
    ids = np.random.default_rng(1).integers(0, 27, 200)
    assert data.read(ids).labels.tolist() == (ids % 10).tolist()
    assert len(data._shards._files) == 2


def test_threads_and_copies_read_the_same(tmp_path, monkeypatch):
    monkeypatch.setattr(shards, "OPEN_FILES", 2)
    data = open_dataset(str(files_set(tmp_path, (5,) * 6)), in_memory=False)
    wrong = []

    def work(seed):
        drawn = np.random.default_rng(seed).integers(0, 30, (20, 16))
        wrong.extend(seed for ids in drawn if data.read(ids).labels.tolist() != (ids % 10).tolist())

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    copy = pickle.loads(pickle.dumps(data))  # noqa: S301 - what a spawned reader process gets
    assert torch.equal(copy.read(range(30)).images, data.read(range(30)).images)


def test_all_of_the_emoji_as_their_packer_left_them(shared, tmp_path):
    """Somebody else's tar as a data set: transparent webp, which only `prepare` knows how to flatten, and says so."""
    with tarfile.open(shared / "data" / "fluent-emoji-3d.tar") as tar:
        members = [m for m in tar if m.name.endswith(".webp")][:6]
        packed = [(m.name, tar.extractfile(m).read()) for m in members]
    opaque = []
    for name, data in packed:
        stream = io.BytesIO()
        Image.open(io.BytesIO(data)).convert("RGB").save(stream, "WEBP", lossless=True)
        opaque.append((name, stream.getvalue()))
    folder = describe(tmp_path, [(pack(tmp_path / "a.tar", opaque), 6)], size=(256, 256), classes=None)
    images = open_dataset(str(folder), in_memory=False).read(range(6)).images.permute(0, 2, 3, 1).numpy()
    for image, (_, data) in zip(images, opaque, strict=True):
        assert np.array_equal(image, np.asarray(Image.open(io.BytesIO(data)).convert("RGB")))
    folder = describe(tmp_path, [(pack(tmp_path / "a.tar", packed), 6)], size=(256, 256), classes=None)
    with pytest.raises(DataError, match=r"assets/.*\.webp' at byte \d+: mode RGBA is not read"):
        open_dataset(str(folder), in_memory=False).read(range(6))


@pytest.mark.parametrize("ids", [[-1], [31], [0, 5, 99]])
def test_ids_outside_are_named(tmp_path, ids):
    data = open_dataset(str(files_set(tmp_path, (31,))))
    with pytest.raises(InputError, match=f"sample {ids[-1]} of a data set of 31"):
        data.read(ids)
    with pytest.raises(InputError):
        data.key(ids[-1])


def test_hostile_npy_headers_do_not_pass(tmp_path):
    """Objects (a pickle), another order, another length than the shape says, a shape over the size of the memory."""
    good = npy(np.zeros((16, 12, 3), np.uint8))
    bad = {
        "objects": npy(np.array([{}], object)),
        "order": npy(np.asfortranarray(np.zeros((16, 12, 3), np.uint8))),
        "type": npy(np.zeros((16, 12, 3), np.float32)),
        "short": good[:-1],
        "shape": npy(np.zeros((12, 16, 3), np.uint8)),
        "huge": good.replace(b"(16, 12, 3), }          ", b"(1600000000000, 12, 3), }"),
        "code": good.replace(b"{'descr'", b"__import", 1),
    }
    assert len(bad["huge"]) >= len(good) and bad["huge"] != good
    for what, data in bad.items():
        folder = describe(tmp_path, [(pack(tmp_path / "a.tar", [("a.npy", data)]), 1)], classes=None)
        with pytest.raises(DataError, match=r"member 'a\.npy' at byte \d+: "):
            open_dataset(str(folder), in_memory=False).read([0])
            pytest.fail(what)
