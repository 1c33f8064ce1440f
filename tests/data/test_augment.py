"""Mirroring and cropping: what is drawn, what is done with it, and that ranks and restarts do not show."""

import math
from itertools import chain
from pathlib import Path

import numpy as np
import pytest
import torch
from reader_shards import files_set
from test_loader import batches, take

from tests.training.runs import config_of, rows_of, tensors_of
from tests.training.test_resume import StopsAfter
from vaegan_dist.data.augment import Augmentation, crop_resized, uniforms
from vaegan_dist.data.batch import Batch
from vaegan_dist.data.dataset import open_dataset
from vaegan_dist.training.loop import train
from vaegan_dist.training.meter import Agreement
from vaegan_dist.training.resume import run_folder
from vaegan_dist.training.runtime import SingleProcess

CPU = torch.device("cpu")


def batch_of(count: int, size: tuple[int, int] = (6, 5), first: int = 0) -> Batch:
    """Pictures of noise in channels-last memory, as the reader gives them."""
    pixels = np.random.default_rng(first).integers(0, 256, (count, *size, 3), np.uint8)
    return Batch.of(pixels, np.arange(first, first + count), None)


def enlarged(image: np.ndarray, side: float, top: float, left: float) -> np.ndarray:
    """The box of one picture [C, H, W] by its definition, pixel by pixel in float64."""
    channels, height, width = image.shape
    out = np.empty(image.shape)
    for row in range(height):
        for column in range(width):
            y = min(max((top + side * (row + 0.5) / height) * height - 0.5, 0), height - 1)
            x = min(max((left + side * (column + 0.5) / width) * width - 0.5, 0), width - 1)
            up, near = math.floor(y), math.floor(x)
            down, far = min(up + 1, height - 1), min(near + 1, width - 1)
            b, a = y - up, x - near
            for c in range(channels):
                above = (1 - a) * image[c, up, near] + a * image[c, up, far]
                below = (1 - a) * image[c, down, near] + a * image[c, down, far]
                out[c, row, column] = (1 - b) * above + b * below
    return out


def test_the_draws_are_uniform_and_independent() -> None:
    draws = uniforms(3, 0, np.arange(40_000))
    assert draws.shape == (40_000, 4) and draws.min() >= 0 and draws.max() < 1
    for column in draws.T:
        counts = np.histogram(column, 50, (0, 1))[0]
        assert ((counts - 800) ** 2 / 800).sum() < 95  # 49 degrees of freedom: exceeded once in 10,000 times
    others = [uniforms(3, 1, np.arange(40_000)), uniforms(4, 0, np.arange(40_000)), draws[1:]]
    for column, other in [(0, 1), (0, 2), (2, 3)]:
        assert abs(np.corrcoef(draws[:, column], draws[:, other])[0, 1]) < 0.025
    for other in others:
        n = len(other)
        assert all(abs(np.corrcoef(draws[:n, k], other[:, k])[0, 1]) < 0.025 for k in range(4))
    assert uniforms(0, 0, np.array([0, 1, 10**12]))[:, 0].tolist() == PINNED


PINNED = [0.820487373303509, 0.6612038925313969, 0.6323919679150775]


def test_half_of_the_pictures_are_mirrored_and_others_in_every_epoch() -> None:
    batch = batch_of(2000)
    flip = Augmentation(0, True, 1.0, CPU)
    mirrored = []
    for epoch in range(3):
        out = flip(batch, epoch)
        assert out.dtype == torch.uint8
        same = (out == batch.images).all(-1).all(-1).all(-1)
        assert torch.equal(out[~same], batch.images[~same].flip(-1))
        mirrored.append(~same)
        assert abs(float(mirrored[-1].double().mean()) - 0.5) < 0.045  # four standard deviations
    for one, other in [(0, 1), (1, 2), (0, 2)]:
        assert abs(float((mirrored[one] == mirrored[other]).double().mean()) - 0.5) < 0.045


@pytest.mark.parametrize("size", [(6, 5), (16, 16), (1, 7)])
def test_a_crop_is_the_box_enlarged(size: tuple[int, int]) -> None:
    batch = batch_of(40, size)
    draws = uniforms(1, 2, batch.ids.numpy())
    out = Augmentation(1, False, 0.3, CPU)(batch, 2)
    assert out.dtype == torch.uint8 and out.shape == batch.images.shape
    shares = []
    for image, result, (_, area, top, left) in zip(batch.images.numpy(), out.numpy(), draws, strict=True):
        share = 0.3 + 0.7 * area
        side = math.sqrt(share)
        expected = enlarged(image, side, top * (1 - side), left * (1 - side))
        assert np.abs(result - expected).max() < 0.502, "rounded to the nearest, in float32"
        shares.append(share)
    assert min(shares) < 0.4 and max(shares) > 0.9


def test_the_whole_picture_is_itself() -> None:
    images = batch_of(9, (13, 8)).images
    assert torch.equal(crop_resized(images, torch.tensor([[1.0, 0.0, 0.0]] * 9)), images)


def test_without_augmentation_nothing_is_touched() -> None:
    batch = batch_of(3)
    assert Augmentation(0, False, 1.0, CPU)(batch, 0) is batch.images


def test_one_and_two_ranks_get_the_same_pictures(tmp_path: Path) -> None:
    data = open_dataset(str(files_set(tmp_path / "set", (40, 37, 51))), in_memory=False)
    augment = Augmentation(7, True, 0.5, CPU)

    def epoch_of(world_size: int, rank: int) -> list[torch.Tensor]:
        pictures, epoch = [], 0
        for after, batch in take(batches(data, rank=rank, world_size=world_size), 8):  # into the second epoch
            pictures.append(augment(batch, epoch))
            epoch = after.epoch
        return pictures

    alone, pairs = epoch_of(1, 0), zip(epoch_of(2, 0), epoch_of(2, 1), strict=True)
    assert torch.equal(torch.cat(alone), torch.cat(list(chain.from_iterable(pairs))))


def test_an_augmented_run_continues_to_the_same_bytes(
    digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Agreement, "INTERVAL_SECONDS", 0.0)
    short = ("phases=[{name: vae, objective: vae, images: 1792}]", "reporting.sample_images=10000")
    augmented = (*short, "data.flip=true", "data.random_crop=0.7")
    whole, parts, plain = (tmp_path / name for name in ("whole", "parts", "plain"))
    assert train(config_of(digits, whole, *augmented), SingleProcess()).reason == "done"
    assert train(config_of(digits, parts, *augmented), StopsAfter(25)).reason == "stopped"  # in the second epoch
    assert train(config_of(digits, parts, *augmented), SingleProcess()).reason == "done"
    assert train(config_of(digits, plain, *short), SingleProcess()).reason == "done"
    folders = [run_folder(config_of(digits, storage)) for storage in (whole, parts, plain)]
    assert tensors_of(folders[0]) == tensors_of(folders[1]) != tensors_of(folders[2])
    assert rows_of(folders[0], "train") == rows_of(folders[1], "train")
