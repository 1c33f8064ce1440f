"""Pictures for people: sheets of samples, and originals above their reconstructions."""

import io
import math
from pathlib import Path
from typing import Final

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from vaegan_dist.files import write_whole

READABLE_PIXELS: Final = 64
BACKGROUND: Final = (255, 255, 255)
EDGE: Final = (190, 194, 202)
INK: Final = (60, 64, 72)
LABELS: Final = ("original", "reconstruction")


def to_float(u: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """uint8 to [-1, 1]: u / 127.5 - 1, computed in at least float32 so that bfloat16 keeps all 256 values apart."""
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    return u.to(wide).div(127.5).sub(1.0).to(dtype)


def to_uint8(x: Tensor) -> Tensor:
    """[-1, 1] to uint8, rounded and clamped; undoes `to_float` exactly. NaN becomes black."""
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    scaled = x.detach().to(wide).add(1.0).mul(127.5).round()
    return scaled.nan_to_num(nan=0.0, posinf=255.0, neginf=0.0).clamp(0.0, 255.0).to(torch.uint8)


def grid(images: Tensor, *, columns: int | None = None, scale: int | None = None, padding: int = 2) -> Image.Image:
    """A sheet of pictures, row by row, on white with a thin gap between them.

    Args:
        images: uint8 [N, C, H, W] with 1 or 3 channels, N >= 1.
        columns: pictures per row; by default the sheet is about square.
        scale: whole-number enlargement without smoothing; by default small pictures reach about 64 pixels.
        padding: gap in pixels.
    """
    tiles = _tiles(images, scale)
    columns = min(len(tiles), columns or math.ceil(math.sqrt(len(tiles))))
    rows = math.ceil(len(tiles) / columns)
    height, width = tiles.shape[1:3]
    sheet = Image.new("RGB", (padding + columns * (width + padding), padding + rows * (height + padding)), BACKGROUND)
    for index, tile in enumerate(tiles):
        row, column = divmod(index, columns)
        sheet.paste(Image.fromarray(tile), (padding + column * (width + padding), padding + row * (height + padding)))
    return sheet


def comparison(
    originals: Tensor, reconstructions: Tensor, *, columns: int = 8, scale: int | None = None
) -> Image.Image:
    """Each original directly above its reconstruction; the two rows of a pair touch, pairs stand apart.

    Args:
        originals, reconstructions: uint8 [N, C, H, W] of the same shape.
        columns: pairs per row.
        scale: as in `grid`.
    """
    if originals.shape != reconstructions.shape:
        raise ValueError(f"originals {list(originals.shape)} and reconstructions {list(reconstructions.shape)} differ")
    pair = (_tiles(originals, scale), _tiles(reconstructions, scale))
    count, height, width = pair[0].shape[:3]
    columns = min(count, columns)
    bands = math.ceil(count / columns)
    font = ImageFont.load_default(size=max(11, min(20, height // 4)))
    margin = max(math.ceil(font.getlength(label)) for label in LABELS) + 18
    gap, between = 2, max(10, height // 5)
    band_height = 2 * height + gap
    size = (margin + columns * (width + gap), 2 * gap + bands * band_height + (bands - 1) * between)
    sheet = Image.new("RGB", size, BACKGROUND)
    draw = ImageDraw.Draw(sheet)
    for band in range(bands):
        top = gap + band * (band_height + between)
        draw.line([(margin - 6, top), (margin - 6, top + band_height - 1)], fill=EDGE, width=2)
        for row, label in enumerate(LABELS):
            y = top + row * (height + gap)
            draw.text((margin - 12, y + height // 2), label, fill=INK, font=font, anchor="rm")
            for column in range(min(columns, count - band * columns)):
                tile = pair[row][band * columns + column]
                sheet.paste(Image.fromarray(tile), (margin + column * (width + gap), y))
    return sheet


def _tiles(images: Tensor, scale: int | None) -> np.ndarray[tuple[int, ...], np.dtype[np.uint8]]:
    """Pictures as [N, H·scale, W·scale, 3]."""
    if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] not in (1, 3) or not images.numel():
        raise ValueError(f"pictures must be uint8 [N, 1 or 3, H, W], not {images.dtype} {list(images.shape)}")
    factor = scale or max(1, math.ceil(READABLE_PIXELS / max(images.shape[2:])))
    rows = images.detach().cpu().expand(-1, 3, -1, -1).permute(0, 2, 3, 1).numpy()
    return rows.repeat(factor, axis=1).repeat(factor, axis=2)


def save_png(image: Image.Image, path: Path) -> None:
    """Write a PNG whole or not at all; the folder is created."""
    buffer = io.BytesIO()
    image.save(buffer, format="PNG", optimize=True)
    write_whole(path, buffer.getvalue())
