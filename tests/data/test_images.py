"""Pictures of every common kind against values worked out by hand or by numpy."""

import io
import struct
import zlib
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst
from PIL import Image

from vaegan_dist.data.images import (
    PictureError,
    Pixels,
    Target,
    decode,
    encode,
    from_array,
    is_grey,
    is_picture_name,
    normalise,
    parse_colour,
)

WHITE = (255, 255, 255)


def encoded(image: Image.Image, kind: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def pixels_of(data: bytes, **target: Any) -> Pixels:
    return normalise(decode(data).image, Target(**{"resolution": None, **target}))


def noise(*shape: int) -> Pixels:
    return np.random.Generator(np.random.Philox(key=7)).integers(0, 256, shape, np.uint8)


@settings(max_examples=30, deadline=None)
@given(npst.arrays(np.uint8, st.tuples(st.integers(1, 9), st.integers(1, 9), st.sampled_from([1, 3]))))
def test_png_round_trip(pixels: Pixels) -> None:
    back = pixels_of(encode(pixels, "png", 95), channels=pixels.shape[2])
    assert np.array_equal(back, pixels)


def test_jpeg_keeps_full_colour_resolution() -> None:
    stripes = np.zeros((16, 16, 3), np.uint8)
    stripes[:, ::2, 0] = stripes[:, 1::2, 2] = 255  # red and blue columns: halved colour resolution would mix them
    back = pixels_of(encode(stripes, "jpeg", 95)).astype(int)
    assert np.abs(back - stripes).max() < 40
    assert Image.open(io.BytesIO(encode(noise(8, 8, 1), "jpeg", 95))).mode == "L"


def test_transparency_is_composited_before_resizing() -> None:
    rgba = np.zeros((64, 64, 4), np.uint8)
    rgba[16:48, 16:48] = 255  # a white square, opaque; around it transparent black
    result = pixels_of(encoded(Image.fromarray(rgba), "WEBP", lossless=True), resolution=16, background=WHITE)
    assert (result == 255).all(), "the hidden black bled into the edge"


def test_partial_alpha_against_the_formula() -> None:
    rgba = noise(20, 30, 4)
    background = (10, 200, 90)
    alpha = rgba[:, :, 3:].astype(float) / 255
    expected = rgba[:, :, :3] * alpha + np.array(background) * (1 - alpha)
    result = pixels_of(encoded(Image.fromarray(rgba), "PNG"), background=background)
    assert np.abs(result - expected).max() <= 1


def test_palette_with_a_transparent_entry() -> None:
    image = Image.new("P", (4, 4), 0)
    image.putpalette([255, 0, 0, 0, 255, 0])
    image.putpixel((1, 2), 1)
    for transparency in (0, bytes([0, 255])):
        result = pixels_of(encoded(image, "PNG", transparency=transparency), background=(1, 2, 3))
        assert result[2, 1].tolist() == [0, 255, 0]
        assert result[0, 0].tolist() == [1, 2, 3]


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_sixteen_bit_grey_is_scaled_not_clipped(kind: str) -> None:
    values = (np.arange(256, dtype=np.uint16) * 257).reshape(16, 16)
    result = pixels_of(encoded(Image.fromarray(values), kind), channels=1)
    assert np.array_equal(result[:, :, 0], np.arange(256).reshape(16, 16))


def test_sixteen_bit_grey_with_a_transparent_value() -> None:
    values = np.full((4, 4), 65535, np.uint16)
    values[0, 0] = 1000
    png = encoded(Image.fromarray(values), "PNG")
    chunk = b"tRNS" + struct.pack(">H", 1000)
    at = png.index(b"IDAT") - 4
    keyed = png[:at] + struct.pack(">I", 2) + chunk + struct.pack(">I", zlib.crc32(chunk)) + png[at:]
    result = pixels_of(keyed, background=(9, 8, 7))
    assert result[0, 0].tolist() == [9, 8, 7]
    assert (result[1:] == 255).all()


def test_cmyk_bilevel_and_grey_alpha() -> None:
    cmyk = Image.new("CMYK", (8, 8), (0, 255, 255, 0))
    assert np.abs(pixels_of(encoded(cmyk, "JPEG", quality=100))[4, 4].astype(int) - [255, 0, 0]).max() <= 3
    bilevel = Image.fromarray(noise(8, 8) > 128)
    assert np.array_equal(pixels_of(encoded(bilevel, "PNG"), channels=1)[:, :, 0], (noise(8, 8) > 128) * 255)
    grey_alpha = Image.merge("LA", [Image.new("L", (4, 4), 100), Image.new("L", (4, 4), 0)])
    assert (pixels_of(encoded(grey_alpha, "PNG"), channels=1, background=(50, 50, 50)) == 50).all()


@pytest.mark.parametrize(
    ("orientation", "stored"),
    [
        (1, lambda a: a),
        (2, lambda a: a[:, ::-1]),
        (3, lambda a: a[::-1, ::-1]),
        (4, lambda a: a[::-1]),
        (5, lambda a: a.transpose(1, 0, 2)),
        (6, lambda a: np.rot90(a, 1)),
        (7, lambda a: np.rot90(a, 2).transpose(1, 0, 2)),
        (8, lambda a: np.rot90(a, -1)),
    ],
)
def test_exif_orientation(orientation: int, stored: Any) -> None:
    upright = noise(5, 7, 3)
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encoded(Image.fromarray(np.ascontiguousarray(stored(upright))), "PNG", exif=exif)
    assert np.array_equal(pixels_of(data), upright)


def test_first_frame_of_an_animation() -> None:
    frames = [Image.new("RGB", (6, 6), colour) for colour in ("red", "blue")]
    for kind in ("GIF", "WEBP"):
        data = encoded(frames[0], kind, save_all=True, append_images=frames[1:])
        assert np.abs(pixels_of(data)[3, 3].astype(int) - [255, 0, 0]).max() <= 6


def test_crops() -> None:
    image = np.zeros((10, 30, 3), np.uint8)
    image[:, :10, 0], image[:, 10:20, 1], image[:, 20:, 2] = 255, 255, 255
    data = encode(image, "png", 0)
    centre = pixels_of(data, resolution=10, crop="center")
    assert (centre == [0, 255, 0]).all()
    padded = pixels_of(data, resolution=30, crop="pad", background=(7, 7, 7))
    assert (padded[:10] == 7).all()
    assert (padded[20:] == 7).all()
    assert np.array_equal(padded[10:20], image)
    stretched = pixels_of(data, resolution=30, crop="none")
    assert stretched.shape == (30, 30, 3)
    assert stretched[15, 2].tolist() == [255, 0, 0]
    grey = pixels_of(data, resolution=30, crop="pad", background=(7, 7, 7), channels=1)
    assert (grey[:10] == 7).all()


def test_a_reduced_jpeg_is_close_to_the_whole_one() -> None:
    ramp = np.linspace(0, 255, 800).astype(np.uint8)
    photo = np.stack(
        [np.tile(ramp, (600, 1)), np.tile(ramp[:600, None], (1, 800)), np.full((600, 800), 90, np.uint8)], 2
    )
    data = encoded(Image.fromarray(photo), "JPEG", quality=95)
    reduced = decode(data, 64)
    assert min(reduced.image.size) >= 128, "decoded at less than twice the target"
    assert reduced.image.size != (800, 600), "decoded at full size"
    assert reduced.jpeg is None, "a reduced picture is not the one in the bytes"
    target = Target(64)
    difference = normalise(reduced.image, target).astype(int) - normalise(decode(data).image, target)
    assert np.abs(difference).max() <= 4


def test_only_a_plain_jpeg_may_be_kept() -> None:
    data = encode(noise(8, 8, 3), "jpeg", 90)
    assert decode(data, 8).jpeg == data
    exif = Image.Exif()
    exif[0x0112] = 6
    assert decode(encoded(Image.fromarray(noise(8, 8, 3)), "JPEG", exif=exif)).jpeg is None
    assert decode(encoded(Image.new("CMYK", (8, 8)), "JPEG")).jpeg is None
    assert decode(encode(noise(8, 8, 3), "png", 90)).jpeg is None


def bomb(width: int, height: int) -> bytes:
    """A PNG that promises so many pixels and holds none."""
    chunks = b""
    for kind, body in ((b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)), (b"IDAT", zlib.compress(b""))):
        chunks += struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
    return b"\x89PNG\r\n\x1a\n" + chunks


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize(
    ("data", "cause"),
    [
        (b"", "zero bytes"),
        (b"<html>not here</html>", "not a picture"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "not a picture"),
        (encode(noise(64, 64, 3), "jpeg", 90)[:700], "truncated"),
        (encode(noise(64, 64, 3), "png", 90)[:900], "truncated"),
        (bomb(100_000, 100_000), "bomb"),
        (bomb(12_000, 12_000), "limit"),
        (bomb(70_000, 1), "limit"),
        (b"\x80\x04\x95pickle", "not a picture"),
    ],
)
def test_unusable_pictures_have_a_cause(data: bytes, cause: str) -> None:
    with pytest.raises(PictureError) as caught:
        decode(data)
    assert cause in str(caught.value)
    assert "\n" not in str(caught.value)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_damaged_bytes_never_raise_anything_else(data: st.DataObject) -> None:
    whole = bytearray(encode(noise(12, 12, 3), data.draw(st.sampled_from(["png", "jpeg"])), 90))
    for _ in range(data.draw(st.integers(1, 6))):
        whole[data.draw(st.integers(0, len(whole) - 1))] = data.draw(st.integers(0, 255))
    try:
        result = pixels_of(bytes(whole))
    except PictureError:
        return
    assert result.dtype == np.uint8
    assert result.shape[2] == 3


def test_arrays() -> None:
    grey = noise(5, 6)
    assert np.array_equal(normalise(from_array(grey).image, Target(None, channels=1))[:, :, 0], grey)
    assert np.array_equal(normalise(from_array(grey[:, :, None]).image, Target(None, channels=1))[:, :, 0], grey)
    wide = grey.astype(np.uint16) * 257
    assert np.array_equal(normalise(from_array(wide).image, Target(None, channels=1))[:, :, 0], grey)
    unit = grey.astype(np.float32) / 255
    assert np.array_equal(normalise(from_array(unit).image, Target(None, channels=1))[:, :, 0], grey)
    assert np.array_equal(normalise(from_array(grey > 9).image, Target(None, channels=1))[:, :, 0], (grey > 9) * 255)
    assert is_grey(from_array(noise(5, 6, 2)).image)
    with pytest.raises(PictureError, match="shape"):
        from_array(noise(5, 6, 7))


def test_names_and_colours() -> None:
    assert all(map(is_picture_name, ["a.JPG", "x/y.z.png", "ü.webp"]))
    assert not any(
        map(is_picture_name, [".a.png", "__MACOSX/a.png", "x/._a.png", ".git/a.png", "a.txt", "png", "a.pyd"])
    )
    assert parse_colour("#0080ff") == (0, 128, 255)
    for wrong in ("colourless", "#12345", "rgba(1,2,3,0)"):
        with pytest.raises(ValueError, match=r"colour|transparent"):
            parse_colour(wrong)


def test_float_pictures_are_refused() -> None:
    with pytest.raises(PictureError, match="range"):
        pixels_of(encoded(Image.fromarray(np.ones((4, 4), np.float32)), "TIFF"))
    with pytest.raises(PictureError, match="range"):
        pixels_of(encoded(Image.fromarray(np.full((4, 4), 10**6, np.int32)), "TIFF"))
