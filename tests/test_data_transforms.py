"""Crops, flips, resizing and normalisation, against slow or independent references."""

import itertools

import numpy as np
import pytest
from PIL import Image

from repopt_jax.data import Transform
from repopt_jax.data.transforms import DRAWS, augment, fit, normalise, random_part


def slow_augment(image, draws, padding, flip):
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
    draws = rng.random((40, len(DRAWS)))
    draws[0], draws[1] = 0, np.nextafter(1, 0)  # the extremes of what is drawn
    transform = Transform(image_size=5, crop_padding=padding, flip=flip)
    expected = [slow_augment(image, d, padding, flip) for image, d in zip(images, draws, strict=True)]
    before = images.copy()
    np.testing.assert_array_equal(augment(images, draws, transform), expected)
    np.testing.assert_array_equal(images, before)


def test_crops_reach_every_place_and_flips_are_even():
    transform = Transform(image_size=6, crop_padding=1, flip=True)
    draws = np.random.default_rng(0).random((2000, len(DRAWS)))
    image = np.random.default_rng(1).integers(1, 255, (6, 6, 1), np.uint8)
    results = augment(np.broadcast_to(image, (2000, *image.shape)), draws, transform)
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


def test_random_part_has_the_share_and_aspect_that_were_drawn():
    rows, columns = np.mgrid[:100, :100].astype(np.uint8)
    image = np.stack([rows, columns, rows], -1)
    draws = np.zeros(len(DRAWS))
    draws[3:] = 0.5, 0.5, 0.0, np.nextafter(1, 0)  # area, ratio, y, x
    part = random_part(image, 50, draws, (0.15, 0.35))  # a quarter, square: 50 x 50, at the top right
    np.testing.assert_array_equal(part, image[:50, 50:])
    draws[3:5] = 0, 1
    wide = random_part(image, 50, draws, (0.25, 0.25))  # 57.7 wide, 43.3 high
    assert wide[..., 0].max() in (42, 43)
    assert wide[..., 1].min() in (42, 43)
    np.testing.assert_array_equal(random_part(image, 100, np.full(len(DRAWS), 0.5), (1.0, 1.0)), image)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"image_size": 0}, "`image_size` is 0; it must be at least 1"),
        ({"crop_padding": -1}, "`crop_padding` is -1"),
        ({"area": (0.5, 0.2)}, "`area` is .*0 < low <= high <= 1"),
        ({"area": (0.5,)}, "`area` is"),
        ({"mean": (float("nan"),)}, "`mean` is .* must be finite"),
        ({"std": (1.0, 0.0, 1.0)}, "`std` is .* must be positive"),
    ],
)
def test_transforms_that_make_no_sense(values, message):
    with pytest.raises(ValueError, match=message):
        Transform(**{"image_size": 8, **values})
