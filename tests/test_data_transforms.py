"""Crops, flips, resizing and normalisation, against slow or independent references."""

import itertools
import math

import numpy as np
import pytest
from PIL import Image

from repopt_jax.data import Transform
from repopt_jax.data.augment import crop_and_flip, random_resized_crop
from repopt_jax.data.rng import RowRng
from repopt_jax.data.transforms import fit, normalise


def row_rng(draws):
    """Random numbers of rows, of which (rows, 3) are given: y, x and flip."""
    y, x, flip = draws.T
    return RowRng(flip=flip, y=y, x=x, zoom=np.zeros(len(y)), seeds=np.zeros(len(y), int))


def slow_crop_and_flip(image, draws, padding, flip):
    """Pixel by pixel: where output pixel (y, x) comes from in the unpadded image."""
    size, _, channels = image.shape
    top = int(draws[0] * (2 * padding + 1))
    left = int(draws[1] * (2 * padding + 1))
    out = np.zeros_like(image)
    for y, x, c in itertools.product(range(size), range(size), range(channels)):
        column = size - 1 - x if flip and draws[2] < 0.5 else x
        row, column = y + top - padding, column + left - padding
        if 0 <= row < size and 0 <= column < size:
            out[y, x, c] = image[row, column, c]
    return out


@pytest.mark.parametrize(("padding", "flip"), [(0, False), (0, True), (2, False), (2, True), (4, True)])
@pytest.mark.parametrize("channels", [1, 3])
def test_crop_and_flip_are_those_of_a_slow_reference(padding, flip, channels):
    rng = np.random.default_rng(1)
    images = rng.integers(0, 256, (40, 5, 5, channels), np.uint8)
    draws = rng.random((40, 3))
    draws[0], draws[1] = 0, np.nextafter(1, 0)  # the extremes of what is drawn
    expected = [slow_crop_and_flip(image, d, padding, flip) for image, d in zip(images, draws, strict=True)]
    before = images.copy()
    found = crop_and_flip(images, row_rng(draws), padding=padding, flip=flip)
    np.testing.assert_array_equal(found, expected)
    np.testing.assert_array_equal(images, before)


def test_crops_reach_every_place_and_flips_are_even():
    rng = row_rng(np.random.default_rng(0).random((2000, 3)))
    image = np.random.default_rng(1).integers(1, 255, (6, 6, 1), np.uint8)
    results = crop_and_flip(np.broadcast_to(image, (2000, *image.shape)), rng, padding=1, flip=True)
    _, counts = np.unique(results.reshape(2000, -1), axis=0, return_counts=True)
    assert len(counts) == 3 * 3 * 2
    assert counts.min() > 2000 / 18 * 0.6  # about 5 standard deviations
    assert counts.max() < 2000 / 18 * 1.5


def test_normalisation_by_channel():
    images = np.arange(2 * 2 * 2 * 3, dtype=np.uint8).reshape(2, 2, 2, 3) * 10
    transform = Transform(image_size=2, mean=(0.1, 0.2, 0.3), std=(0.5, 0.25, 2.0))
    out = normalise(images, transform)
    assert out.dtype == np.float32
    expected = (images / 255 - np.array([0.1, 0.2, 0.3])) / np.array([0.5, 0.25, 2.0])
    np.testing.assert_allclose(out, expected, rtol=1e-5, atol=1e-6)
    one = Transform(image_size=2, mean=(0.5,), std=(0.5,))
    np.testing.assert_allclose(normalise(images, one), images / 127.5 - 1, rtol=1e-5, atol=1e-6)
    assert normalise(np.full((1, 1, 1, 1), 255, np.uint8), Transform(image_size=1)) == 1


@pytest.mark.parametrize("channels", [1, 3])
def test_fit_resizes_the_shorter_side_and_cuts_out_the_centre(channels):
    image = np.random.default_rng(0).integers(0, 256, (20, 33, channels), np.uint8)
    np.testing.assert_array_equal(fit(image[:, :20], 20), image[:, :20])
    grey = image[..., 0] if channels == 1 else image
    whole = np.asarray(Image.fromarray(grey).resize((16, 10), Image.Resampling.BILINEAR))
    np.testing.assert_array_equal(fit(image, 10), whole[:, 3:13].reshape(10, 10, channels))
    tall = fit(np.swapaxes(image, 0, 1), 10)
    assert tall.shape == (10, 10, channels)
    flat = np.full((7, 7, channels), 9, np.uint8)
    np.testing.assert_array_equal(fit(flat, 11), np.full((11, 11, channels), 9))


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("shape", [(20, 33), (33, 20), (11, 9), (64, 15)])
def test_resizing_before_the_cut_rounds_as_torchvision_does(shape, channels):
    image = np.random.default_rng(0).integers(0, 256, (*shape, channels), np.uint8)
    size, resized = 7, 10
    # Resize: the longer side is truncated; CenterCrop: half a pixel goes to the even one.
    height, width = (
        (resized, int(resized * shape[1] / shape[0]))
        if shape[0] <= shape[1]
        else (int(resized * shape[0] / shape[1]), resized)
    )
    picture = Image.fromarray(image[..., 0] if channels == 1 else image)
    whole = np.asarray(picture.resize((width, height), Image.Resampling.BILINEAR))
    top, left = int(round((height - size) / 2.0)), int(round((width - size) / 2.0))  # noqa: RUF046
    expected = whole[top : top + size, left : left + size].reshape(size, size, channels)
    np.testing.assert_array_equal(fit(image, size, resized), expected)
    assert (fit(image, size) != expected).any()  # and without it another part is seen


class Numbers:
    """Stands for a generator: gives the numbers in [0, 1) that it was made of, one after the other."""

    def __init__(self, *numbers):
        self.numbers = iter(numbers)

    def uniform(self, low, high):
        return low + next(self.numbers) * (high - low)

    def integers(self, high):
        return np.array([math.floor(next(self.numbers) * n) for n in high])


LAST = np.nextafter(1, 0)


def coordinates(height, width):
    """An image whose pixels are their own row and column."""
    rows, columns = np.mgrid[:height, :width].astype(np.uint8)
    return np.stack([rows, columns, rows], -1)


def test_random_part_has_the_share_and_aspect_that_were_drawn():
    image = coordinates(100, 100)
    # A quarter, square: 50 x 50, at the top right.
    part = random_resized_crop(image, 50, (0.15, 0.35), Numbers(0.5, 0.5, 0, LAST))
    np.testing.assert_array_equal(part, image[:50, 50:])
    wide = random_resized_crop(image, 50, (0.25, 0.25), Numbers(0, 1, 0, 0))
    assert wide[..., 0].max() in (42, 43)  # 57.7 wide, 43.3 high
    assert wide[..., 1].max() in (56, 57)
    whole = random_resized_crop(image, 100, (1.0, 1.0), Numbers(0.5, 0.5, 0.5, 0.5))
    np.testing.assert_array_equal(whole, image)


def test_a_part_that_does_not_fit_is_drawn_again():
    image = coordinates(40, 80)
    # The whole area is never square here; a quarter of it is 28 x 28 (sqrt(800) = 28.3).
    numbers = Numbers(1, 0.5, 1, 0.5, 0, 0.5, 0, 0)
    part = random_resized_crop(image, 28, (0.25, 1.0), numbers)
    np.testing.assert_array_equal(part, image[:28, :28])


@pytest.mark.parametrize(
    ("shape", "part"),
    [
        ((30, 90), np.s_[:, 25:65]),  # 4:3 of the height 30 is 40
        ((90, 30), np.s_[25:65, :]),  # 3:4, 40 high
        ((30, 38), np.s_[:, :]),  # between the two: all of it
    ],
)
def test_after_ten_tries_the_central_part_is_taken(shape, part):
    image = coordinates(*shape)
    expected = image[part]
    # An area that only the whole image has, at an aspect that it has not.
    rejected = [1, 1 if shape[0] > shape[1] else 0]
    size = expected.shape[0]
    found = random_resized_crop(image, size, (1.0, 1.0), Numbers(*rejected * 10))
    resized = np.asarray(Image.fromarray(expected).resize((size, size), Image.Resampling.BILINEAR))
    np.testing.assert_array_equal(found, resized)


def test_random_parts_are_those_of_a_slow_reference():
    """Shares and places of torchvision's rule, written down again and drawn from the same generator."""
    for seed in range(40):
        height, width = 5 + seed, 45 - seed
        rng = np.random.default_rng(seed)
        for _ in range(10):
            target = height * width * rng.uniform(0.08, 1.0)
            aspect = math.exp(rng.uniform(math.log(3 / 4), math.log(4 / 3)))
            w, h = round(math.sqrt(target * aspect)), round(math.sqrt(target / aspect))
            if 0 < w <= width and 0 < h <= height:
                top, left = rng.integers((height - h + 1, width - w + 1))
                break
        else:
            ratio = width / height
            w = width if ratio < 3 / 4 else round(height * 4 / 3) if ratio > 4 / 3 else width
            h = round(width / (3 / 4)) if ratio < 3 / 4 else height
            top, left = (height - h) // 2, (width - w) // 2
        image = coordinates(height, width)
        part = Image.fromarray(image[top : top + h, left : left + w])
        expected = np.asarray(part.resize((9, 9), Image.Resampling.BILINEAR))
        found = random_resized_crop(image, 9, (0.08, 1.0), np.random.default_rng(seed))
        np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"image_size": 0}, "`image_size` is 0; it must be at least 1"),
        ({"crop_padding": -1}, "`crop_padding` is -1"),
        ({"area": (0.5, 0.2)}, "`area` is .*0 < low <= high <= 1"),
        ({"area": (0.5,)}, "`area` is"),
        ({"mean": (float("nan"),)}, "`mean` is .* must be finite"),
        ({"std": (1.0, 0.0, 1.0)}, "`std` is .* must be positive"),
        ({"resize": 7}, "`resize` is 7; it must be None or at least `image_size`, 8"),
        ({"randaugment": 0}, r"`randaugment` is 0; it must be None or an integer in \[1, 30\]"),
        ({"randaugment": 31}, "`randaugment` is 31"),
        ({"randaugment": 1.5}, "`randaugment` is 1.5"),
        ({"jitter": -0.1}, "`jitter` is -0.1; it must be finite and at least 0"),
        ({"jitter": float("nan")}, "`jitter` is nan"),
        ({"erasing": 1.1}, r"`erasing` is 1.1; it must be in \[0, 1\]"),
        ({"mixup": float("inf")}, "`mixup` is inf"),
        ({"cutmix": -1.0}, "`cutmix` is -1.0"),
        ({"erasing": -1, "cutmix": -1.0}, "`erasing` is -1; .*, and `cutmix` is -1.0"),
    ],
)
def test_transforms_that_make_no_sense(values, message):
    with pytest.raises(ValueError, match=message):
        Transform(**{"image_size": 8, **values})
