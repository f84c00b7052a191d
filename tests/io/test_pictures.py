"""Pictures as they are seen, of every kind of file, and files that are none."""

import logging as python_logging
import struct
import tracemalloc
import zlib

import numpy as np
import pytest
from PIL import ExifTags, Image, ImageOps

from diffpose_jax.io import pictures
from diffpose_jax.io.pictures import PictureError

HEIGHT, WIDTH = 24, 40


def blocks(channels=3):
    """Four quarters of other colours, which JPEG and palettes keep: (24, 40, channels)."""
    quarters = np.array(
        [[[250, 10, 10, 255], [10, 250, 10, 128]], [[10, 10, 250, 0], [240, 240, 10, 255]]]
    )
    return np.uint8(quarters.repeat(HEIGHT // 2, 0).repeat(WIDTH // 2, 1)[..., :channels])


def assert_alike(image, expected, atol=0):
    assert image.dtype == np.uint8
    assert image.shape == expected.shape
    assert np.abs(image.astype(int) - expected.astype(int)).max() <= atol


LOSSLESS = {"tif": {"compression": "tiff_lzw"}, "webp": {"lossless": True}}


@pytest.mark.parametrize("suffix", ["png", "bmp", "tif", "webp", "ppm", "jp2", "gif", "jpg"])
def test_formats(tmp_path, suffix):
    path, atol = tmp_path / f"picture.{suffix}", 12 if suffix == "jpg" else 0
    options = {"quality": 95, "subsampling": 0} if suffix == "jpg" else LOSSLESS.get(suffix, {})
    Image.fromarray(blocks()).save(path, **options)
    assert_alike(pictures.read(path), blocks(), atol)
    assert pictures.find(tmp_path) == [path]
    without_ending = path.rename(tmp_path / "picture")
    assert_alike(pictures.read(str(without_ending)), blocks(), atol)


def exif_of(orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    return exif


@pytest.mark.parametrize(
    ("suffix", "orientation"),
    [*(("jpg", orientation) for orientation in range(1, 9)), ("png", 6), ("tif", 6), ("webp", 6)],
)
def test_orientation(tmp_path, suffix, orientation):
    """Stored turned, with the note how to turn it back."""
    turned = Image.fromarray(blocks())
    turned.getexif()[0x0112] = {6: 8, 8: 6}.get(orientation, orientation)
    stored = ImageOps.exif_transpose(turned)
    path = tmp_path / f"picture.{suffix}"
    stored.save(path, exif=exif_of(orientation), **LOSSLESS.get(suffix, {"quality": 95}))
    assert (stored.size == (HEIGHT, WIDTH)) == (orientation > 4)
    # Chroma is subsampled, but the middle of each quarter keeps its colour.
    assert_alike(pictures.read(path)[6::12, 10::20], blocks()[6::12, 10::20], 12)


@pytest.mark.parametrize("content", [b"", b"garbage" + bytes(20), b"MM\0*\0\0", None])
def test_damaged_metadata_do_not_matter(tmp_path, content):
    exif = exif_of(9) if content is None else b"Exif\0\0" + content
    Image.fromarray(blocks()).save(tmp_path / "a.jpg", exif=exif, quality=95, subsampling=0)
    assert_alike(pictures.read(tmp_path / "a.jpg"), blocks(), 12)


def assert_read_as(tmp_path, picture, expected, atol=0, suffix="png", **options):
    path = tmp_path / f"a.{suffix}"
    picture.save(path, **options)
    assert_alike(pictures.read(path), np.uint8(expected), atol)


def test_grey(tmp_path):
    grey = blocks()[..., 0]
    assert_read_as(tmp_path, Image.fromarray(grey), np.stack([grey] * 3, -1))
    bits = grey > 100
    assert_read_as(tmp_path, Image.fromarray(bits), np.stack([bits * 255] * 3, -1))


@pytest.mark.parametrize("suffix", ["png", "tif", "pgm"])
def test_16_bits(tmp_path, suffix):
    """A ramp over all values, of which Pillow itself would make white."""
    ramp = np.linspace(0, 65535, HEIGHT * WIDTH).astype(np.uint16).reshape(HEIGHT, WIDTH)
    expected = np.stack([ramp / 257] * 3, -1)
    assert_read_as(tmp_path, Image.fromarray(ramp), expected, 1, suffix)


def test_16_bits_of_colour(tmp_path):
    ramp = np.linspace(0, 65535, HEIGHT * WIDTH * 3).astype(">u2").reshape(HEIGHT, WIDTH, 3)
    rows = b"".join(b"\0" + row.tobytes() for row in ramp)
    path = tmp_path / "a.png"
    path.write_bytes(png(WIDTH, HEIGHT, rows, depth=16))
    assert_alike(pictures.read(path), (ramp / 257).astype(np.uint8), 1)


def on_white(rgba):
    alpha = rgba[..., 3:] / 255
    return np.uint8(np.rint(rgba[..., :3] * alpha + 255 * (1 - alpha)))


def test_transparent_parts_are_white(tmp_path):
    rgba = blocks(4)
    assert_read_as(tmp_path, Image.fromarray(rgba), on_white(rgba), 1)
    grey = Image.fromarray(rgba[..., [0, 3]], "LA")
    assert_read_as(tmp_path, grey, on_white(rgba[..., [0, 0, 0, 3]]), 1)


def test_palettes(tmp_path):
    picture = Image.fromarray(blocks()).convert("P", palette=Image.Palette.ADAPTIVE)
    assert_read_as(tmp_path, picture, blocks(), 1)
    indices = np.zeros((HEIGHT, WIDTH), np.uint8)
    indices[:, WIDTH // 2 :] = 1
    picture = Image.fromarray(indices)
    picture.putpalette([10, 20, 30, 200, 100, 50])
    expected = np.where(indices[..., None] == 1, [200, 100, 50], 255)
    for suffix in ("png", "gif"):
        assert_read_as(tmp_path, picture, expected, suffix=suffix, transparency=0)


def test_cmyk(tmp_path):
    Image.fromarray(blocks()).convert("CMYK").save(tmp_path / "a.jpg", quality=95)
    image = pictures.read(tmp_path / "a.jpg")
    assert_alike(image[6::12, 10::20], blocks()[6::12, 10::20], 12)


@pytest.mark.parametrize("suffix", ["gif", "png", "webp"])
def test_of_an_animation_the_first_frame(tmp_path, caplog, suffix):
    path = tmp_path / f"a.{suffix}"
    frames = [Image.fromarray(blocks()), Image.fromarray(255 - blocks())]
    frames[0].save(path, save_all=True, append_images=frames[1:], lossless=True)
    with caplog.at_level(python_logging.WARNING, logger="absl"):
        assert_alike(pictures.read(path), blocks())
    assert f"a.{suffix} is animated: only its first frame" in caplog.text


def png(width, height, rows=b"", depth=8):
    """A PNG file of RGB, with a header that says what one likes."""

    def chunk(name, content):
        checksum = zlib.crc32(name + content)
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", checksum)

    header = struct.pack(">IIBBBBB", width, height, depth, 2, 0, 0, 0)
    content = chunk(b"IDAT", zlib.compress(rows))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + content + chunk(b"IEND", b"")


def error_of(path):
    with pytest.raises(PictureError) as error:
        pictures.read(path)
    message = str(error.value)
    assert message.startswith(str(path))
    assert "\n" not in message
    assert len(message) < len(str(path)) + 220
    return message.removeprefix(str(path))


@pytest.mark.parametrize("content", [b"", b"%!PS-Adobe-3.0 EPSF-3.0\n", b"\0\0\0\x18ftypheic"])
def test_not_a_picture(tmp_path, content):
    path = tmp_path / "a.jpg"
    path.write_bytes(content)
    assert "not a picture of a kind that can be read" in error_of(path)


@pytest.mark.parametrize("suffix", ["jpg", "png", "gif", "tif", "webp", "bmp", "jp2"])
@pytest.mark.parametrize("part", [0.02, 0.8])
def test_truncated(tmp_path, suffix, part):
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    path = tmp_path / f"a.{suffix}"
    Image.fromarray(noise).save(path)
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * part)])
    assert "damaged" in error_of(path)


@pytest.mark.parametrize(("width", "height"), [(15, 400), (400, 15)])
def test_too_small(tmp_path, width, height):
    path = tmp_path / "a.png"
    path.write_bytes(png(width, height))
    assert f"{width} x {height} px: too small" in error_of(path)


@pytest.mark.parametrize(("width", "height"), [(12_000, 12_000), (16_001, 20), (10**6, 10**6)])
def test_too_large_is_found_in_the_header(tmp_path, width, height):
    path = tmp_path / "a.png"
    path.write_bytes(png(width, height))
    tracemalloc.start()
    message = error_of(path)
    assert tracemalloc.get_traced_memory()[1] < 20e6
    tracemalloc.stop()
    assert "more than 120 megapixels or 16,000 px to a side" in message


def test_floating_point(tmp_path):
    path = tmp_path / "a.tif"
    Image.fromarray(np.ones((HEIGHT, WIDTH), np.float32)).save(path)
    assert "nothing says which of them is white" in error_of(path)


def test_not_a_file(tmp_path):
    assert error_of(tmp_path / "nothing.jpg") == " does not exist"
    assert error_of(tmp_path) == " is not a file"


def test_find_gives_pictures_alone_in_order(tmp_path):
    for name in ("b.JPG", "a.png", "c.txt", ".d.png", "e.heic", "Thumbs.db"):
        (tmp_path / name).touch()
    (tmp_path / "f.png").mkdir()
    assert [path.name for path in pictures.find(tmp_path)] == ["a.png", "b.JPG", "e.heic"]
    with pytest.raises(PictureError, match=r"f\.png holds no pictures"):
        pictures.find(tmp_path / "f.png")


@pytest.mark.parametrize(("tag", "expected"), [(28, 28 / np.hypot(36, 24) * 500), (0, None)])
def test_the_focal_length_of_a_camera(tmp_path, tag, expected):
    exif = Image.Exif()
    exif.get_ifd(ExifTags.IFD.Exif)[ExifTags.Base.FocalLengthIn35mmFilm] = tag
    Image.new("RGB", (400, 300)).save(tmp_path / "a.jpg", exif=exif)
    assert pictures.focal_px(tmp_path / "a.jpg") == (expected and pytest.approx(expected))
    Image.new("RGB", (400, 300)).save(tmp_path / "b.jpg")
    assert pictures.focal_px(tmp_path / "b.jpg") is None
