"""Image files: what is decoded and what is refused, by content; upright; and no more memory than an image."""

import io
import itertools
import json
import os
import struct
import subprocess
import sys
import tracemalloc
import zlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps

from repopt_jax.data import check_images, check_quickly, hold_out, images, open_source
from repopt_jax.data.images import decode_image, image_header, quick_problem, read_encoded

FORMATS = ("PNG", "JPEG", "WebP", "BMP")
# Bytes of memory for each pixel of the largest image that is decoded, beside what the process has before.
# Measured: 10.1, 10.1, 18.1; with one copy more, as `convert` to the same mode makes it, 14.1, 14.1, 22.1.
MEMORY = {"PNG": 12, "JPEG": 12, "WebP": 20}
PIXELS = np.random.default_rng(0).integers(0, 256, (6, 9, 3), dtype=np.uint8)


def encoded(kind, pixels=PIXELS, **options):
    if kind == "WebP":
        options = {"lossless": True, **options}
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, kind, **options)
    return buffer.getvalue()


def decoded(content, channels=3):
    return decode_image(content, channels=channels, name="some/file")


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("pixels", [PIXELS, PIXELS[..., 0]], ids=["colour", "grey"])
def test_four_formats_are_told_by_their_content(kind, pixels, tmp_path):
    """Under the suffix of another one, against Pillow's own reading."""
    content = encoded(kind, pixels)
    path = tmp_path / "image.gif"
    path.write_bytes(content)
    for channels, mode in ((1, "L"), (3, "RGB")):
        expected = np.asarray(Image.open(io.BytesIO(content)).convert(mode)).reshape(6, 9, channels)
        np.testing.assert_array_equal(decoded(read_encoded(str(path)), channels), expected)
    assert image_header(str(path))[0] == (6, 9)
    assert quick_problem(str(path)) is None
    assert images._format(content) == kind


# -- orientation
# ---


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WebP"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_the_orientation_of_exif_is_applied(kind, orientation, tmp_path):
    exif = Image.Exif()
    exif[images.ORIENTATION] = orientation
    content = encoded(kind, exif=exif)
    stored = np.asarray(Image.open(io.BytesIO(content)).convert("RGB"))
    upright = np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(content)).convert("RGB")))
    found = decoded(content)
    np.testing.assert_array_equal(found, upright)
    if orientation > 1:
        assert found.shape != stored.shape or (found != stored).any(), "the control: it is turned"
    (tmp_path / "image").write_bytes(content)
    assert image_header(str(tmp_path / "image"))[0] == found.shape[:2]


@pytest.mark.parametrize("value", [0, 9, 300])
def test_an_orientation_that_is_none_is_passed_over(value):
    exif = Image.Exif()
    exif[images.ORIENTATION] = value
    assert decoded(encoded("PNG", exif=exif)).shape == (6, 9, 3)


def test_damaged_exif_does_not_cost_the_image():
    content = bytearray(encoded("JPEG", exif=b"Exif\0\0MM\0*\0\0\0\x08\xff\xff" + bytes(4)))
    assert decoded(bytes(content)).shape == (6, 9, 3)


def test_turned_images_in_a_folder_and_in_coco(tmp_path):
    exif = Image.Exif()
    exif[images.ORIENTATION] = 6
    for split in ("train", "test"):
        for name in ("a", "b"):
            (tmp_path / split / name).mkdir(parents=True)
            (tmp_path / split / name / "1.jpg").write_bytes(encoded("JPEG", exif=exif))
    source = open_source("folder", data_dir=tmp_path)
    assert source.info.image_shape == source.train[0]["image"].shape == (9, 6, 3)
    for split in ("train", "val"):
        (tmp_path / f"{split}.json").write_text(annotations(width=6, height=9))
    source = open_source("coco", data_dir=tmp_path, train_images="train/a", eval_images="test/a")
    assert source.train[0]["image"].shape == (9, 6, 3)
    np.testing.assert_array_equal(source.train[0]["image"], decoded(encoded("JPEG", exif=exif)))


def annotations(*, width, height):
    entries = {
        "images": [{"id": 1, "file_name": "1.jpg", "width": width, "height": height}],
        "annotations": [{"id": 1, "image_id": 1, "category_id": 1, "bbox": [1, 2, 3, 4]}],
        "categories": [{"id": 1, "name": "x"}],
    }
    return json.dumps(entries)


@pytest.mark.parametrize("orientation", [1, 3, 5, 6, 7, 8])
def test_annotations_of_the_pixels_as_they_are_stored_are_told_from_a_resized_image(orientation, tmp_path):
    exif = Image.Exif()
    exif[images.ORIENTATION] = orientation
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "1.jpg").write_bytes(encoded("JPEG", exif=exif))

    def refusal(width, height):
        for split in ("train", "val"):
            (tmp_path / f"{split}.json").write_text(annotations(width=width, height=height))
        with pytest.raises(ValueError, match=rf"1\.jpg is . wide .* are for {width} by {height}; ") as raised:
            open_source("coco", data_dir=tmp_path).train[0]
        return str(raised.value)

    turned = orientation >= 5
    said = refusal(9, 6) if turned else refusal(6, 9)
    assert ("its EXIF orientation is applied" in said) == turned
    assert ("annotate it upright, as viewers show it, or remove the orientation" in said) == turned
    assert ("not turned and not resized" in said) != turned
    assert refusal(9, 7).endswith("use the image that was annotated, not turned and not resized")


# -- what is refused
# ---


def png(width, height, *chunks):
    """A PNG file of this header and these chunks."""

    def chunk(kind, content):
        return (
            struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))
        )

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + b"".join(chunk(*c) for c in chunks) + chunk(b"IEND", b"")


POSTSCRIPT = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n%%EOF\n"
GIF = b"GIF89a\xff\xff\xff\xff\x80\0\0\0\0\0\xff\xff\xff,\0\0\0\0\xff\xff\xff\xff\0\x02\x02D\x01\0;"
TIFF = encoded("TIFF")


def webp(width, height):
    """A WebP of one pixel, on a canvas of this size."""

    def chunk(kind, content):
        return kind + struct.pack("<I", len(content)) + content + bytes(len(content) % 2)

    def sizes(*numbers):
        return b"".join(struct.pack("<I", n)[:3] for n in numbers)

    canvas = chunk(b"VP8X", b"\2\0\0\0" + sizes(width - 1, height - 1))
    frame = chunk(b"ANMF", sizes(0, 0, 0, 0, 100) + b"\0" + encoded("WebP", PIXELS[:1, :1])[12:])
    body = b"WEBP" + canvas + chunk(b"ANIM", b"\xff\xff\xff\xff\0\0") + frame
    return b"RIFF" + struct.pack("<I", len(body)) + body


WEBP = webp(5_000, 5_000)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (POSTSCRIPT, "not an image in a known format, PNG, JPEG, WebP or BMP"),
        (GIF, "not an image in a known format"),
        (TIFF, "not an image in a known format"),
        (b"", "not an image in a known format"),
        (png(60_000, 60_000), r"60000 x 60000 = 3,600,000,000 pixels in \d+ bytes, more than 33,554,432 pix"),
        (png(5_000, 5_000), r"5000 x 5000 = 25,000,000 pixels in \d\d bytes, more than 1000 for each byte"),
        (WEBP, "5000 x 5000 = 25,000,000 pixels in .* bytes, more than 1000 for each byte"),
        (
            b"BM" + struct.pack("<IIIIiiHHIIiiII", 54, 0, 54, 40, 2**20, 2**20, 1, 24, 0, 0, 0, 0, 0, 0),
            "pixels in 54 bytes, more",
        ),
        (png(8, 8, (b"IDAT", zlib.compress(bytes(10)))), "truncated|broken|damaged|not enough"),
    ],
    ids=[
        "postscript",
        "gif",
        "tiff",
        "empty",
        "png of 3.6e9 pixels",
        "png of 2.5e7 pixels",
        "webp of 2.5e7 pixels",
        "bmp of 1e12 pixels",
        "png without pixels",
    ],
)
def test_what_is_refused_takes_no_memory(content, reason, tmp_path, monkeypatch):
    """Neither a program nor gigabytes: a GIF of 35 bytes would take 1.6 GB, a PostScript file starts one."""
    monkeypatch.setattr("subprocess.Popen", None)
    path = tmp_path / "image.png"
    path.write_bytes(content)
    tracemalloc.start()
    try:
        for read in (lambda: decoded(content), lambda: image_header(str(path)) and decoded(content)):
            with pytest.raises(ValueError, match=reason) as raised:
                read()
            assert "\n" not in str(raised.value)
        assert (quick_problem(str(path)) is None) == ("damaged" in reason)  # which is in the middle
        assert tracemalloc.get_traced_memory()[1] < 10e6
    finally:
        tracemalloc.stop()


def test_more_pixels_are_decoded_where_they_are_asked_for(tmp_path):
    assert decoded(webp(300, 200)).shape == (200, 300, 3)  # what is refused above, smaller
    for split, name in itertools.product(("train", "test"), ("a", "b")):
        (tmp_path / split / name).mkdir(parents=True)
        (tmp_path / split / name / "1.png").write_bytes(encoded("PNG"))
    for split in ("train", "val"):
        (tmp_path / f"{split}.json").write_text(annotations(width=9, height=6).replace(".jpg", ".png"))
    of_coco = {"train_images": "train/a", "eval_images": "test/a"}
    for name, options in (("folder", {}), ("coco", of_coco)):
        source = open_source(name, data_dir=tmp_path, max_pixels=54, **options)
        assert source.train[0]["image"].shape == (6, 9, 3)
        assert check_quickly(source) == check_images(source) == []
        source = hold_out(source, 1) if name == "folder" else source
        source.train.max_pixels = 53
        assert [one.split for one in check_quickly(source)] == ["train"]
        with pytest.raises(ValueError, match=r"54 pixels in .* bytes, more than 53 pixels") as raised:
            open_source(name, data_dir=tmp_path, max_pixels=53, **options).train[0]
        assert "1.png" in str(raised.value)
        remedy = "; make it smaller, remove it, or allow more with `max_pixels` (--config.data.max_pixels)"
        assert str(raised.value).endswith(remedy)


MEASURE = """
import sys
from repopt_jax.data.images import decode_image, read_encoded

def peak():
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith("VmHWM")) * 1024

before = peak()
image = decode_image(read_encoded(sys.argv[1]), channels=int(sys.argv[2]), name="large")
assert image.shape == (4096, 8192, int(sys.argv[2])), image.shape
print((peak() - before) / (4096 * 8192))
"""


@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="reads the peak memory from Linux")
@pytest.mark.parametrize(("kind", "most"), MEMORY.items())
def test_the_largest_image_takes_a_bounded_amount_of_memory(kind, most, tmp_path):
    path = tmp_path / "image"
    Image.new("RGB", (8192, 4096), (200, 100, 50)).save(path, kind)
    done = subprocess.run([sys.executable, "-c", MEASURE, path, "3"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert 6 < float(done.stdout) < most


@pytest.mark.parametrize("kind", FORMATS)
def test_every_truncated_image_is_refused(kind, tmp_path):
    content = encoded(kind, np.random.default_rng(1).integers(0, 256, (20, 30, 3), dtype=np.uint8))
    path = tmp_path / "image"
    for end in [*range(0, len(content), 37), *range(len(content) - 60, len(content), 4)]:
        path.write_bytes(content[:end])
        assert quick_problem(str(path)) is not None, end
        with pytest.raises(ValueError, match="cannot read image"):
            decoded(content[:end])


def test_more_after_the_end_of_an_image_does_no_harm(tmp_path):
    """Cameras write it; the file looks cut, and is decoded to see that it is not."""
    path = tmp_path / "image.jpg"
    path.write_bytes(encoded("JPEG") + bytes(100))
    assert quick_problem(str(path)) is None


def test_pipes_devices_and_folders_are_refused(tmp_path):
    """A pipe would be waited for, and a device never ends."""
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "device.png").symlink_to("/dev/zero")
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "loop.png").symlink_to("loop.png")
    for name in ("pipe.png", "device.png", "folder.png", "loop.png", "gone.png", "null\0.png"):
        for read in (read_encoded, image_header):
            with pytest.raises(ValueError, match="cannot read image"):
                read(str(tmp_path / name))
        assert quick_problem(str(tmp_path / name)) is not None


def test_a_file_that_is_too_large_is_refused(tmp_path):
    path = tmp_path / "large.png"
    with path.open("wb") as file:
        file.truncate(images.MAX_BYTES + 1)
    with pytest.raises(ValueError, match=r"268,435,457 bytes, more than 268,435,456"):
        read_encoded(str(path))


@pytest.mark.parametrize("orientation", [None, 6])
def test_damage_in_the_middle_is_found(orientation):
    """Whether or not the image has notes of a camera."""
    exif = Image.Exif()
    if orientation:
        exif[images.ORIENTATION] = orientation
    content = bytearray(encoded("PNG", exif=exif))
    start = content.index(b"IDAT") + 4
    content[start : start + 30] = bytes(30)
    with pytest.raises(ValueError, match="broken data stream"):
        decoded(bytes(content))


@given(data=st.data(), kind=st.sampled_from(FORMATS))
@settings(max_examples=300, deadline=None)
def test_changed_bytes_give_an_image_or_a_sentence(data, kind):
    content = bytearray(encoded(kind))
    for _ in range(data.draw(st.integers(1, 6))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    try:
        found = decoded(bytes(content))
    except ValueError as error:
        if not str(error).startswith("cannot read image some/file ("):
            raise
        return
    assert found.dtype == np.uint8
    assert found.ndim == 3
