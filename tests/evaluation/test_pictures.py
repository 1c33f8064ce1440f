"""Pictures: exact pixel values, and sheets in which every picture stands where it should."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from vaegan_dist.evaluation.pictures import comparison, grid, save_png, to_float, to_uint8

ALL = torch.arange(256, dtype=torch.uint8)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_to_uint8_undoes_to_float_for_every_value(dtype: torch.dtype) -> None:
    x = to_float(ALL, dtype)
    assert x.dtype == dtype
    assert torch.equal(to_uint8(x), ALL)
    assert x[0] == -1 and x[255] == 1


def test_to_float_is_the_formula() -> None:
    expected = np.arange(256, dtype=np.float64) / 127.5 - 1
    assert np.array_equal(to_float(ALL, torch.float64).numpy(), expected)
    assert np.abs(to_float(ALL, torch.float32).numpy() - expected).max() < 1e-7


def test_to_uint8_rounds_and_clamps() -> None:
    steps = torch.tensor([10.4, 10.6, -3.0, 300.0, torch.inf, -torch.inf, torch.nan], dtype=torch.float64)
    assert to_uint8(steps / 127.5 - 1).tolist() == [10, 11, 0, 255, 255, 0, 0]


def noise(count: int, channels: int, height: int, width: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (count, channels, height, width), dtype=torch.uint8, generator=generator)


def pixels(image: Image.Image) -> np.ndarray:
    return np.asarray(image.convert("RGB"))


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize(("count", "columns"), [(7, 3), (1, None), (2, 8), (9, None)])
def test_grid_holds_every_picture_in_order(channels: int, count: int, columns: int | None) -> None:
    images, scale, padding = noise(count, channels, 5, 4), 3, 2
    sheet = pixels(grid(images, columns=columns, scale=scale, padding=padding))
    across = min(count, columns or {1: 1, 9: 3}[count])
    down = -(-count // across)
    assert sheet.shape == (down * (15 + padding) + padding, across * (12 + padding) + padding, 3)
    for index in range(count):
        top, left = padding + index // across * (15 + padding), padding + index % across * (12 + padding)
        shown = sheet[top : top + 15, left : left + 12]
        expected = images[index].permute(1, 2, 0).numpy()
        assert np.array_equal(shown[1::3, 1::3], np.broadcast_to(expected, (5, 4, 3)))
        assert np.array_equal(shown, shown[1::3, 1::3].repeat(3, 0).repeat(3, 1)), "enlarged without smoothing"


def test_small_pictures_are_enlarged_and_large_ones_left() -> None:
    assert grid(noise(1, 1, 28, 28), padding=0).size == (84, 84)
    assert grid(noise(1, 3, 256, 256), padding=0).size == (256, 256)


def find(sheet: np.ndarray, tile: np.ndarray) -> tuple[int, int]:
    """Top left corner of the only place where the sheet shows the tile."""
    windows = np.lib.stride_tricks.sliding_window_view(sheet, tile.shape)[:, :, 0]
    places = np.argwhere((windows == tile).all(axis=(2, 3, 4)))
    assert len(places) == 1
    return int(places[0][0]), int(places[0][1])


def test_comparison_puts_each_original_directly_above_its_reconstruction() -> None:
    originals, reconstructions = noise(5, 3, 8, 6, seed=1), noise(5, 3, 8, 6, seed=2)
    sheet = pixels(comparison(originals, reconstructions, columns=2, scale=1))
    tops = []
    for original, reconstruction in zip(originals, reconstructions, strict=True):
        above = find(sheet, original.permute(1, 2, 0).numpy())
        below = find(sheet, reconstruction.permute(1, 2, 0).numpy())
        assert above[1] == below[1] and 0 <= below[0] - above[0] - 8 <= 2
        tops.append(above[0])
    assert tops[0] == tops[1] < tops[2] == tops[3] < tops[4]
    assert tops[2] - (tops[0] + 16) > 8, "pairs stand clearly apart"
    left = find(sheet, originals[0].permute(1, 2, 0).numpy())[1]
    assert (sheet[:, : left - 8] < 128).any(), "a label stands at the side"


@pytest.mark.parametrize(
    "images",
    [torch.zeros(2, 1, 4, 4), ALL.reshape(1, 4, 8, 8), ALL.reshape(16, 16), torch.zeros(0, 1, 4, 4, dtype=torch.uint8)],
)
def test_what_is_no_batch_of_pictures_is_refused(images: torch.Tensor) -> None:
    with pytest.raises(ValueError, match="pictures must be uint8"):
        grid(images)


def test_comparison_refuses_unequal_shapes() -> None:
    with pytest.raises(ValueError, match="differ"):
        comparison(noise(2, 1, 4, 4), noise(3, 1, 4, 4))


def test_save_png_is_whole_or_absent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, first = tmp_path / "a" / "samples.png", grid(noise(4, 3, 8, 8))
    save_png(first, path)

    def cut(self: Path, target: Path) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "replace", cut)
    with pytest.raises(OSError, match="No space"):
        save_png(grid(noise(4, 3, 8, 8, seed=5)), path)
    assert np.array_equal(pixels(Image.open(path)), pixels(first))
    assert [entry.name for entry in path.parent.iterdir()] == ["samples.png"]
