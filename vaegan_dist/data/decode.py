"""One encoded picture into its row of a batch buffer, without a copy where the decoder allows it.

The pictures of a prepared data set have one size; a picture of any other is a fault. One that is larger is found before
any pixel is decoded, which also bounds what a hostile file can make this allocate.
"""

import io

import numpy as np
import numpy.typing as npt
import simplejpeg
from PIL import Image

from vaegan_dist.data.images import MAX_ENCODED_BYTES, PictureError
from vaegan_dist.data.index import PICTURE_KINDS
from vaegan_dist.data.npy import npy_header
from vaegan_dist.data.tar import ShardFile

Pixels = npt.NDArray[np.uint8]

_JPEG = frozenset((PICTURE_KINDS.index("jpg"), PICTURE_KINDS.index("jpeg")))
_NPY = PICTURE_KINDS.index("npy")
_PILLOW_FORMATS = ("PNG", "WEBP", "BMP", "TIFF")
_COLOURS = {1: ("GRAY", "L"), 3: ("RGB", "RGB")}
_OPAQUE = frozenset(("1", "L", "RGB", "P"))


def read_encoded(file: ShardFile, offset: int, size: int) -> bytes:
    """An encoded picture's bytes. Raises PictureError before reading more than any picture needs."""
    if size > MAX_ENCODED_BYTES:
        raise PictureError(f"{size} bytes encoded, the limit is {MAX_ENCODED_BYTES}")
    return file.read(size, offset)


def decode_into(data: bytes, kind: int, row: Pixels) -> None:
    """Decode a member of kind PICTURE_KINDS[kind] into `row`, uint8 `[H, W, C]`, C-contiguous.

    Raises:
        PictureError: empty, damaged, of another size than the row, or transparent.
    """
    if not data:
        raise PictureError("zero bytes")
    if kind in _JPEG:
        _jpeg(data, row)
    elif kind == _NPY:
        _npy(data, row)
    else:
        _pillow(data, row)


def _check_size(height: int, width: int, row: Pixels) -> None:
    if (height, width) != row.shape[:2]:
        raise PictureError(f"{width}x{height} pixels in a data set of {row.shape[1]}x{row.shape[0]}")


def _jpeg(data: bytes, row: Pixels) -> None:
    """The decoder refuses what is larger than the row before it decodes, so only a failure reads the header twice."""
    try:
        pixels = simplejpeg.decode_jpeg(data, _COLOURS[row.shape[2]][0], buffer=row)
    except ValueError as error:
        raise PictureError(_jpeg_fault(data, row, error)) from None
    _check_size(pixels.shape[0], pixels.shape[1], row)


def _jpeg_fault(data: bytes, row: Pixels, error: ValueError) -> str:
    try:
        height, width, _, _ = simplejpeg.decode_jpeg_header(data)
        _check_size(height, width, row)
    except PictureError as size:
        return str(size)
    except ValueError as header:
        error = header
    return f"not a whole JPEG ({error})"


def _npy(data: bytes, row: Pixels) -> None:
    try:
        shape, begin = npy_header(data[:16_384], len(data), np.dtype(np.uint8), None)
    except ValueError as error:
        raise PictureError(str(error)) from None
    if shape not in (row.shape, row.shape[:2] if row.shape[2] == 1 else row.shape):
        raise PictureError(f"array of shape {shape} in a data set of {row.shape}")
    row[...] = np.frombuffer(data, np.uint8, row.size, begin).reshape(row.shape)


def _pillow(data: bytes, row: Pixels) -> None:
    try:
        image = Image.open(io.BytesIO(data), formats=_PILLOW_FORMATS)
        _check_size(image.height, image.width, row)
        if image.mode not in _OPAQUE or "transparency" in image.info:
            raise PictureError(f"mode {image.mode}{' with transparency' * ('transparency' in image.info)} is not read")
        mode = _COLOURS[row.shape[2]][1]
        pixels = np.asarray(image if image.mode == mode else image.convert(mode))
    except PictureError:
        raise
    except Exception as error:  # decoders raise anything on damaged data, SyntaxError and struct.error among it
        raise PictureError(f"cannot be decoded ({' '.join(str(error).split())[:120]})") from None
    row[...] = pixels.reshape(row.shape)
