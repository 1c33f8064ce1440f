"""Pictures of any common kind in, uint8 arrays `[H, W, C]` of one kind out, and the encodings of the shards.

What comes in is not trusted: the formats are an allow-list, dimensions and bytes are bounded before pixels are decoded.
"""

import io
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt
import simplejpeg
from PIL import Image, ImageColor, ImageOps, UnidentifiedImageError

Pixels = npt.NDArray[np.uint8]
Crop = Literal["center", "pad", "none"]
Encoding = Literal["jpeg", "png"]

MAX_SIDE = 65_535
MAX_PIXELS = 89_478_485  # Pillow's own threshold for a decompression bomb: 256 MiB of RGB
MAX_ENCODED_BYTES = 256 * 2**20
EXTENSIONS = frozenset(
    {"png", "jpg", "jpeg", "jpe", "jfif", "webp", "bmp", "dib", "gif", "tif", "tiff", "avif", "jp2", "j2k", "tga"}
    | {"ppm", "pgm", "pbm", "pnm"}
)
# EPS, WMF and PDF are left out on purpose: decoding them runs other programs.
FORMATS = ("PNG", "JPEG", "MPO", "WEBP", "BMP", "DIB", "GIF", "TIFF", "PPM", "TGA", "AVIF", "JPEG2000")
GREY_MODES = frozenset(("1", "L", "LA", "La", "I", "I;16", "I;16B", "I;16L", "I;16N"))
ALPHA_MODES = frozenset(("RGBA", "RGBa", "LA", "La", "PA"))


class PictureError(Exception):
    """A picture that cannot be used; the message is the cause."""


@dataclass(frozen=True)
class Target:
    """What every picture is turned into."""

    resolution: int | None
    crop: Crop = "center"
    background: tuple[int, int, int] = (255, 255, 255)
    channels: Literal[1, 3] = 3


@dataclass(frozen=True)
class Decoded:
    """A picture as it came: oriented upright, and the JPEG bytes when they may be kept as they are."""

    image: Image.Image
    jpeg: bytes | None = None


def parse_colour(text: str) -> tuple[int, int, int]:
    """An RGB triple from a CSS name or `#rrggbb`; `ValueError` names the text."""
    try:
        colour = ImageColor.getrgb(text)
    except ValueError:
        raise ValueError(f"{text!r} is no colour; use a name like white or #rrggbb") from None
    if len(colour) == 4 and colour[3] != 255:
        raise ValueError(f"{text!r} is transparent; the background must be opaque")
    return colour[0], colour[1], colour[2]


def is_picture_name(name: str) -> bool:
    """Whether a file's name promises a picture; hidden files and macOS resource forks never do."""
    parts = name.split("/")
    hidden = any(part.startswith(".") or part == "__MACOSX" for part in parts)
    return not hidden and "." in parts[-1] and parts[-1].rsplit(".", 1)[1].lower() in EXTENSIONS


def decode(data: bytes, resolution: int | None = None) -> Decoded:
    """Decode one encoded picture, first frame, upright by its EXIF orientation.

    Args:
        data: the file's bytes.
        resolution: side that the picture will be reduced to; a JPEG is then decoded at a smaller scale, still at
            least twice as large, which is several times as fast.

    Raises:
        PictureError: unreadable, truncated, empty, of a format that is not allowed, or over the bounds.
    """
    if not data:
        raise PictureError("empty (zero bytes)")
    if len(data) > MAX_ENCODED_BYTES:
        raise PictureError(f"{len(data)} bytes encoded, the limit is {MAX_ENCODED_BYTES}")
    try:
        image = Image.open(io.BytesIO(data), formats=_formats())
        _check_size(*image.size)
        size = image.size
        if resolution is not None and image.format in ("JPEG", "MPO"):
            scale = 2 * resolution / min(image.size)
            image.draft(None, (round(image.width * scale), round(image.height * scale)))
        image.load()
        plain = image.format == "JPEG" and image.mode in ("L", "RGB") and image.getexif().get(0x0112, 1) == 1
        return Decoded(ImageOps.exif_transpose(image), data if plain and image.size == size else None)
    except PictureError:
        raise
    except Exception as error:  # decoders raise anything on damaged data, SyntaxError and struct.error among it
        raise PictureError(_cause(error)) from None


def from_array(pixels: npt.NDArray[np.generic]) -> Decoded:
    """A picture from `[H, W]` or `[H, W, C]`, C in 1, 2 (grey, alpha), 3, 4; the types that `to_uint8` converts."""
    if pixels.ndim == 3 and pixels.shape[2] == 1:
        pixels = pixels[:, :, 0]
    if pixels.ndim not in (2, 3) or (pixels.ndim == 3 and pixels.shape[2] not in (2, 3, 4)):
        raise PictureError(f"array of shape {pixels.shape} is no picture")
    if 0 in pixels.shape:
        raise PictureError(f"array of shape {pixels.shape} is empty")
    _check_size(pixels.shape[1], pixels.shape[0])
    return Decoded(Image.fromarray(np.ascontiguousarray(to_uint8(pixels))))


def to_uint8(pixels: npt.NDArray[np.generic]) -> Pixels:
    """Pixels as uint8: uint16 scaled by 255/65535, floats in [0, 1] by 255, booleans to 0 and 255."""
    if pixels.dtype == np.uint8:
        return pixels.astype(np.uint8, copy=False)
    if pixels.dtype == np.bool_:
        return pixels.astype(np.uint8) * np.uint8(255)
    if np.issubdtype(pixels.dtype, np.floating):
        return np.rint(pixels.astype(np.float64) * 255).astype(np.uint8)
    if pixels.dtype == np.uint16:
        return ((pixels.astype(np.uint32) * 255 + 32767) // 65535).astype(np.uint8)
    return pixels.astype(np.uint8)  # integers whose whole array was found to lie in 0..255


def is_grey(image: Image.Image) -> bool:
    """Whether a picture's mode has no colour."""
    return image.mode in GREY_MODES


def normalise(image: Image.Image, target: Target) -> Pixels:
    """The picture as uint8 `[H, W, C]`: alpha composited, cropped or padded, resized (Lanczos), channels converted.

    Transparent pixels are composited before resizing: resized apart from their alpha, their hidden colours would bleed
    into the edge as a halo.

    Raises:
        PictureError: floating point or 32-bit pixels, whose range nobody states.
    """
    image = _flatten(image, target.background)
    image = image.convert("L" if target.channels == 1 else "RGB")
    if target.resolution is not None:
        image = _FIT[target.crop](image, target.resolution, target.background)
    pixels = np.asarray(image, dtype=np.uint8)
    return pixels[:, :, None] if pixels.ndim == 2 else pixels


def encode(pixels: Pixels, encoding: Encoding, quality: int) -> bytes:
    """Encode uint8 `[H, W, C]` (C in 1, 3): JPEG with full colour resolution (4:4:4), or PNG."""
    if encoding == "jpeg":
        space = "GRAY" if pixels.shape[2] == 1 else "RGB"
        sampling = "Gray" if pixels.shape[2] == 1 else "444"
        data = simplejpeg.encode_jpeg(np.ascontiguousarray(pixels), quality, space, sampling, fastdct=False)
        return bytes(data)
    buffer = io.BytesIO()
    Image.fromarray(pixels[:, :, 0] if pixels.shape[2] == 1 else pixels).save(buffer, "PNG", compress_level=6)
    return buffer.getvalue()


def _formats() -> list[str]:
    Image.init()
    return [name for name in FORMATS if name in Image.OPEN]


def _check_size(width: int, height: int) -> None:
    if max(width, height) > MAX_SIDE or width * height > MAX_PIXELS:
        raise PictureError(f"{width}x{height} pixels, the limit is {MAX_PIXELS} (a decompression bomb?)")
    if min(width, height) < 1:
        raise PictureError(f"{width}x{height} pixels")


def _cause(error: Exception) -> str:
    if isinstance(error, UnidentifiedImageError):
        return "not a picture of a known format"
    text = " ".join(str(error).split())[:160]
    return text or type(error).__name__


def _flatten(image: Image.Image, background: tuple[int, int, int]) -> Image.Image:
    """The picture without alpha and with 8 bits per channel."""
    if image.mode == "F":
        raise PictureError("floating point pixels have no stated range; convert to 8 or 16 bits")
    if image.mode.startswith("I"):
        wide = np.asarray(image)
        if wide.min() < 0 or wide.max() > 65535:
            raise PictureError("32-bit pixels have no stated range; convert to 8 or 16 bits")
        alpha = _keyed_alpha(wide, image.info.get("transparency"))
        image = Image.fromarray(to_uint8(wide.astype(np.uint16)))
        if alpha is not None:
            image.putalpha(alpha)
    if image.mode not in ALPHA_MODES and "transparency" not in image.info:
        return image
    canvas = Image.new("RGBA", image.size, (*background, 255))
    return Image.alpha_composite(canvas, image.convert("RGBA")).convert("RGB")


def _keyed_alpha(wide: npt.NDArray[np.generic], transparent: object) -> Image.Image | None:
    """Alpha of a 16-bit grey PNG that names one of its values as transparent."""
    if not isinstance(transparent, int):
        return None
    return Image.fromarray(np.where(wide == transparent, 0, 255).astype(np.uint8))


def _center(image: Image.Image, side: int, background: tuple[int, int, int]) -> Image.Image:
    """The largest square in the middle, resized."""
    edge = min(image.size)
    left, top = (image.width - edge) // 2, (image.height - edge) // 2
    return image.resize((side, side), Image.Resampling.LANCZOS, (left, top, left + edge, top + edge), reducing_gap=3.0)


def _pad(image: Image.Image, side: int, background: tuple[int, int, int]) -> Image.Image:
    """The whole picture inside the square, on the background."""
    scale = side / max(image.size)
    size = max(1, round(image.width * scale)), max(1, round(image.height * scale))
    fill = background if image.mode == "RGB" else Image.new("RGB", (1, 1), background).convert("L").getpixel((0, 0))
    canvas = Image.new(image.mode, (side, side), fill)
    small = image.resize(size, Image.Resampling.LANCZOS, reducing_gap=3.0)
    canvas.paste(small, ((side - size[0]) // 2, (side - size[1]) // 2))
    return canvas


def _stretch(image: Image.Image, side: int, background: tuple[int, int, int]) -> Image.Image:
    """The whole picture, stretched to the square."""
    return image.resize((side, side), Image.Resampling.LANCZOS, reducing_gap=3.0)


_FIT: dict[Crop, Callable[[Image.Image, int, tuple[int, int, int]], Image.Image]] = {
    "center": _center,
    "pad": _pad,
    "none": _stretch,
}
