"""RandAugment, colour jitter, erasing, mixup and CutMix, against numpy and pixel-by-pixel references."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageEnhance

from repopt_jax.data import randaugment
from repopt_jax.data.augment import color_jitter, distort, erase, mix, random_box
from repopt_jax.data.images import from_pillow, to_pillow
from repopt_jax.data.randaugment import NAMES, OPERATIONS, apply
from repopt_jax.data.rng import CROP, ERASING, JITTER, MIXING, RANDAUGMENT, batch_rng, stream

# Pillow blends images in float32 and cuts off the fraction: one grey value from the exact result at most.
BLENDED = 1
# Pillow's affine transform keeps places in float and fixed point numbers: measured 1 from a reference in
# float64 at bilinear interpolation.
MOVED = 1


def noise(shape=(9, 11, 3), seed=0):
    return np.random.default_rng(seed).integers(0, 256, shape, np.uint8)


def change(name, array, amount, seed=0):
    rng = np.random.default_rng(seed)
    return from_pillow(OPERATIONS[name].change(to_pillow(array), amount, rng))


# -- operations ------------------------------------------------------------------------------------

EXACT = {
    "invert": lambda x, _: 255 - x,
    "posterize": lambda x, bits: x // 2 ** (8 - bits) * 2 ** (8 - bits),
    "solarize": lambda x, threshold: np.where(x < threshold, x, 255 - x),
    "solarize_add": lambda x, add: np.where(x < 128, np.minimum(255, x + add), x),
}


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize(
    ("name", "amount"),
    [
        ("invert", 0.0),
        *(("posterize", bits) for bits in (0, 1, 5, 8)),
        *(("solarize", threshold) for threshold in (0, 100, 256, 358)),
        *(("solarize_add", add) for add in (0, 60, 154)),
    ],
)
def test_operations_on_values(name, amount, channels):
    array = np.arange(256, dtype=np.uint8).reshape(16, 16, 1).repeat(channels, -1)
    expected = EXACT[name](array.astype(int), amount)
    np.testing.assert_array_equal(change(name, array, amount), expected)


def grey_of(array):
    """Luminance (ITU-R 601) as Pillow rounds it."""
    if array.shape[-1] == 1:
        return array.astype(float)
    return np.floor(array @ np.array([0.299, 0.587, 0.114]) + 0.5)[..., None]


def blend(degenerate, array, factor):
    return np.clip(degenerate + factor * (array - degenerate), 0, 255)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("factor", [0.1, 0.7, 1.0, 1.9, 2.62])
def test_brightness_contrast_and_color_blend_with_black_the_mean_and_grey(factor, channels):
    array = noise((9, 11, channels))
    plain = array.astype(float)
    mean = math.floor(grey_of(array).mean() + 0.5)
    for name, degenerate in (("brightness", 0.0), ("contrast", mean), ("color", grey_of(array))):
        found = change(name, array, factor).astype(float)
        # The grey value itself may be rounded the other way, which the factor enlarges.
        least = BLENDED + abs(1 - factor)
        assert abs(found - blend(degenerate, plain, factor)).max() <= least, name
        if factor != 1 and not (name == "color" and channels == 1):
            assert abs(found - plain).max() > 5 * least, name
        else:
            np.testing.assert_array_equal(found, plain)


def test_sharpness_blends_with_a_smoothed_image():
    array = noise()
    smooth = array.astype(float)
    kernel = np.array([[1, 1, 1], [1, 5, 1], [1, 1, 1]]) / 13
    for y, x in itertools.product(range(1, 8), range(1, 10)):
        window = array[y - 1 : y + 2, x - 1 : x + 2].astype(float)
        smooth[y, x] = np.tensordot(kernel, window, ([0, 1], [0, 1]))
    for factor in (0.1, 1.0, 1.9):
        found = change("sharpness", array, factor).astype(float)
        assert abs(found - blend(smooth, array, factor)).max() <= BLENDED + abs(1 - factor)


@pytest.mark.parametrize("channels", [1, 3])
def test_autocontrast_and_equalize(channels):
    array = noise((12, 12, channels)) // 3 + 40
    found = change("autocontrast", array, 0.0)
    for c in range(channels):
        plane = array[..., c].astype(float)
        low, high = plane.min(), plane.max()
        assert abs(found[..., c] - (plane - low) * 255 / (high - low)).max() <= 1
    # Equalizing makes the cumulative histogram of each channel even.
    found = change("equalize", array, 0.0)
    for c in range(channels):
        plane = array[..., c]
        step = (plane.size - (plane == plane.max()).sum()) // 255
        assert step == 0  # fewer pixels than grey values: left as it is
        np.testing.assert_array_equal(found[..., c], plane)
    large = noise((40, 41, channels), 1) // 3 + 40
    found = change("equalize", large, 0.0).astype(int)
    for c in range(channels):
        plane = large[..., c]
        step = (plane.size - (plane == plane.max()).sum()) // 255
        below = np.array([[(plane < value).sum() for value in row] for row in plane])
        np.testing.assert_array_equal(found[..., c], np.minimum(255, (step // 2 + below) // step))
        assert found[..., c].max() > 240 > 130 > plane.max()


def slow_affine(array, matrix, fill=128):
    """Bilinear, pixel by pixel, in float64; places are the centres of pixels."""
    height, width, _ = array.shape
    a, b, c, d, e, f = matrix
    out = np.full(array.shape, float(fill))
    for y, x in itertools.product(range(height), range(width)):
        u, v = a * (x + 0.5) + b * (y + 0.5) + c, d * (x + 0.5) + e * (y + 0.5) + f
        if not (0 <= u < width and 0 <= v < height):
            continue
        u, v = u - 0.5, v - 0.5
        left, top = math.floor(u), math.floor(v)
        out[y, x] = 0
        for i, j in itertools.product((0, 1), (0, 1)):
            share = (1 - abs(v - top - i)) * (1 - abs(u - left - j))
            out[y, x] += share * array[min(max(top + i, 0), height - 1), min(max(left + j, 0), width - 1)]
    return out


def rotation(degrees, width, height):
    turn = -math.radians(degrees)
    cos, sin = math.cos(turn), math.sin(turn)
    x, y = width / 2, height / 2
    return cos, sin, x - cos * x - sin * y, -sin, cos, y + sin * x - cos * y


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize(
    ("name", "amount", "matrix"),
    [
        ("shear_x", 0.2, (1, 0.2, 0, 0, 1, 0)),
        ("shear_y", -0.3, (1, 0, 0, -0.3, 1, 0)),
        ("translate_x", 0.3, (1, 0, 0.3 * 11, 0, 1, 0)),
        ("translate_y", -0.4, (1, 0, 0, 0, 1, -0.4 * 9)),
        ("rotate", 30.0, rotation(30, 11, 9)),
        ("rotate", -41.0, rotation(-41, 11, 9)),
    ],
)
def test_operations_that_move_an_image(name, amount, matrix, channels, monkeypatch):
    monkeypatch.setattr(randaugment, "INTERPOLATIONS", (Image.Resampling.BILINEAR,))
    array = noise((9, 11, channels)) // 2  # no pixel of its own has the value 128
    found = change(name, array, amount).astype(float)
    expected = slow_affine(array, matrix)
    assert abs(found - expected).max() <= MOVED
    assert (found == 128).any()
    assert abs(found - slow_affine(array, tuple(np.negative(matrix)))).max() > 50


@pytest.mark.parametrize("name", ["rotate", "shear_x", "shear_y", "translate_x", "translate_y"])
@pytest.mark.parametrize("channels", [1, 3])
def test_at_magnitude_0_nothing_moves(name, channels):
    array = noise((9, 11, channels))
    for seed in range(6):  # both interpolations, both signs
        found = apply(to_pillow(array), name, 0, np.random.default_rng(seed))
        np.testing.assert_array_equal(from_pillow(found), array)


def test_cutout_is_a_square_that_scales_with_the_image():
    array = np.zeros((224, 224, 3), np.uint8)
    for seed in range(5):
        rng = np.random.default_rng(seed)
        x, y = rng.integers(224), rng.integers(224)
        expected = array.copy()
        expected[max(0, y - 28) : y + 28, max(0, x - 28) : x + 28] = 125, 122, 113
        np.testing.assert_array_equal(change("cutout", array, 56.0, seed), expected)
    grey = change("cutout", np.zeros((56, 56, 1), np.uint8), 56.0, 3)
    assert set(np.unique(grey)) == {0, 122}
    assert 0 < (grey > 0).sum() <= 14**2
    tiny = change("cutout", np.zeros((8, 8, 1), np.uint8), 56.0)
    assert (tiny > 0).sum() <= 4


def test_the_strengths_are_those_of_the_published_code():
    """At magnitude 7 of 10, from the ranges in `train/randaug.py`."""
    expected = {
        "rotate": 21,
        "posterize": 2,
        "solarize": 179,
        "solarize_add": 77,
        "color": 1.36,
        "contrast": 1.36,
        "brightness": 1.36,
        "sharpness": 1.36,
        "shear_x": 0.21,
        "shear_y": 0.21,
        "translate_x": 0.315,
        "translate_y": 0.315,
        "cutout": 28,
    }
    found = {n: OPERATIONS[n].amount(0.7) for n in expected}
    assert found == pytest.approx(expected, abs=1e-9)
    assert set(NAMES) - set(expected) == {"autocontrast", "equalize", "invert"}
    signed = {n for n in NAMES if OPERATIONS[n].signed}
    assert signed == {"rotate", "shear_x", "shear_y", "translate_x", "translate_y"}


def test_two_operations_of_random_magnitude_below_the_one_given(monkeypatch):
    seen = []
    monkeypatch.setattr(
        randaugment, "apply", lambda image, name, magnitude, rng: (seen.append((name, magnitude)), image)[1]
    )
    rng = np.random.default_rng(0)
    for _ in range(2000):
        randaugment.randaugment(to_pillow(noise()), 15, rng)
    assert len(seen) == 4000
    for found, kinds in ((([n for n, _ in seen]), 16), (([m for _, m in seen]), 15)):
        values, counts = np.unique(found, return_counts=True)
        assert len(values) == kinds
        assert abs(counts - 4000 / kinds).max() < 5 * math.sqrt(4000 / kinds)  # 5 standard deviations
    assert {m for _, m in seen} == set(range(15))


def test_signs_are_even():
    image = to_pillow(noise())
    turned = [np.asarray(apply(image, "rotate", 10, np.random.default_rng(s))) for s in range(400)]
    # The two signs and the two interpolations.
    _, counts = np.unique(np.reshape(turned, (400, -1)), axis=0, return_counts=True)
    assert len(counts) == 4
    assert counts.min() > 60  # 100 expected, standard deviation 8.7


# -- jitter and erasing ----------------------------------------------------------------------------


def test_jitter_applies_the_three_factors_in_the_drawn_order():
    image = to_pillow(noise())
    kinds = (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color)
    orders = set()
    for seed in range(30):
        rng = np.random.default_rng(seed)
        order = tuple(rng.permutation(3).tolist())
        orders.add(order)
        expected = image
        for i in order:
            factor = rng.uniform(0.6, 1.4)
            expected = kinds[i](expected).enhance(factor)
        found = color_jitter(image, 0.4, np.random.default_rng(seed))
        np.testing.assert_array_equal(np.asarray(found), np.asarray(expected))
    assert len(orders) == 6
    color_jitter(image, 3.0, np.random.default_rng(0))  # factors below 0 are not drawn


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("side", [8, 13])
def test_distortion_of_small_and_grey_images(side, channels):
    images = noise((24, side, side, channels))
    seeds = np.arange(24)
    before = images.copy()
    found = distort(images, seeds, 15, 0.4)
    assert (found.shape, found.dtype) == (images.shape, np.uint8)
    np.testing.assert_array_equal(images, before)
    assert (found != images).any((1, 2, 3)).sum() > 20
    # Row by row: what a row becomes depends on its own seed only.
    np.testing.assert_array_equal(distort(images[5:9], seeds[5:9], 15, 0.4), found[5:9])
    assert distort(images, seeds, None, 0.0) is images


def test_erasing_follows_timms_rule():
    count, height, width = 3000, 20, 30
    images = np.ones((count, height, width, 1), np.float32)
    erase(images, np.arange(count), 0.2)
    erased = np.flatnonzero((images == 0).any((1, 2, 3)))
    assert abs(len(erased) / count - 0.2) < 5 * math.sqrt(0.2 * 0.8 / count)
    rows, columns = set(), set()
    for i in erased:
        y, x = np.nonzero(images[i, ..., 0] == 0)
        box = y.max() - y.min() + 1, x.max() - x.min() + 1
        assert box[0] * box[1] == len(y)  # a full box
        assert box[0] < height
        assert box[1] < width
        # Rounding a side moves the area by less than half of the other side.
        assert 0.02 * 600 - max(box) <= len(y) <= 600 / 3 + max(box)
        rows |= set(y)
        columns |= set(x)
    assert rows == set(range(height))
    assert columns == set(range(width))
    untouched = np.ones_like(images)
    erase(untouched, np.arange(count), 0.0)
    assert untouched.all()
    erase(untouched, np.arange(count), 1.0)
    assert (untouched == 0).any((1, 2, 3)).mean() > 0.99


# -- mixing ----------------------------------------------------------------------------------------


def batch_of(count=8, shape=(6, 5, 2), seed=0):
    rng = np.random.default_rng(seed)
    image = rng.normal(size=(count, *shape)).astype(np.float32)
    return {"image": image, "label": rng.integers(0, 9, count).astype(np.int32)}


def slow_mix(batch, seeds, mixup, cutmix):
    """One pixel after the other, in float64."""
    images, shares = batch["image"].astype(float), np.zeros(len(seeds))
    out = images.copy()
    for i in range(len(seeds)):
        partner, first = i ^ 1, i & ~1
        rng = stream(seeds[first], MIXING)
        if mixup and not (cutmix and rng.random() < 0.5):
            shares[i] = rng.beta(mixup, mixup)
            out[i] = shares[i] * images[i] + (1 - shares[i]) * images[partner]
            continue
        ratio = math.sqrt(1 - rng.beta(cutmix, cutmix))
        height, width = images.shape[1:3]
        y = int(rng.integers(height))
        x = int(rng.integers(width))
        own = 0
        for row, column in itertools.product(range(height), range(width)):
            half = int(height * ratio) // 2, int(width * ratio) // 2
            if y - half[0] <= row < y + half[0] and x - half[1] <= column < x + half[1]:
                out[i, row, column] = images[partner, row, column]
            else:
                own += 1
        shares[i] = own / (height * width)
    return out, shares


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 2**63 - 1),
    rule=st.sampled_from([(0.2, 0.0), (0.0, 1.0), (0.4, 0.3), (5.0, 5.0)]),
    shape=st.sampled_from([(6, 5, 2), (1, 1, 1), (8, 8, 1)]),
)
def test_mixing_is_that_of_a_slow_reference(seed, rule, shape):
    batch = batch_of(8, shape, seed % 1000)
    seeds = np.random.default_rng(seed).integers(2**63, size=8)
    expected, shares = slow_mix(batch, seeds, *rule)
    labels = batch["label"].copy()
    total = batch["image"].reshape(4, 2, -1).sum(1)
    found = mix(batch, seeds, *rule)
    np.testing.assert_allclose(found["image"], expected, rtol=0, atol=1e-6)
    np.testing.assert_allclose(found["share"], shares, rtol=0, atol=1e-7)
    np.testing.assert_array_equal(found["label"], labels)
    np.testing.assert_array_equal(found["other"], labels.reshape(4, 2)[:, ::-1].ravel())
    assert (found["share"].dtype, found["other"].dtype) == (np.float32, np.int32)
    # What one image of a pair loses, the other gets.
    np.testing.assert_allclose(found["image"].reshape(4, 2, -1).sum(1), total, rtol=0, atol=2e-6)


@pytest.mark.parametrize("rule", [(0.4, 0.0), (0.0, 1.0), (0.4, 1.0)])
def test_the_share_is_what_the_image_holds_of_its_label(rule):
    """Images of their own label's value: the mean of a mixture is the mean of its labels, weighted."""
    labels = np.arange(200, dtype=np.int32) % 7
    image = np.broadcast_to(labels[:, None, None, None], (200, 8, 10, 1)).astype(np.float32)
    found = mix({"image": image.copy(), "label": labels}, np.arange(200), *rule)
    expected = found["share"] * labels + (1 - found["share"]) * found["other"]
    np.testing.assert_allclose(found["image"].mean((1, 2, 3)), expected, rtol=0, atol=1e-5)
    exchanged = found["share"] * found["other"] + (1 - found["share"]) * labels
    assert abs(found["image"].mean((1, 2, 3)) - exchanged).max() > 1
    assert 0.1 < found["share"].std() < 0.5
    flat = np.array([np.ptp(i) < 1e-6 for i in found["image"]])
    if all(rule):  # CutMix leaves both values in the image, where its box is neither empty nor everything
        assert 0.3 < flat.mean() < 0.75
    assert ((found["share"] >= 0) & (found["share"] <= 1)).all()


def test_cutmix_boxes_have_the_area_that_was_drawn():
    rng = np.random.default_rng(0)
    boxes = [random_box((200, 100), 0.75, rng) for _ in range(2000)]
    sizes = {(bottom - top, right - left) for top, bottom, left, right in boxes}
    assert max(sizes) == (100, 50)  # half of each side
    tops = [top for top, *_ in boxes]
    assert 0 in tops
    assert max(bottom for _, bottom, *_ in boxes) == 200
    top, bottom, left, right = random_box((200, 100), 1.0, rng)
    assert (bottom - top) * (right - left) == 0


# -- random numbers --------------------------------------------------------------------------------


def test_the_numbers_of_a_batch_are_decided_by_seed_number_and_size():
    rng, again = batch_rng(3, 7, 6), batch_rng(3, 7, 6)
    for values, same in zip(rng, again, strict=True):
        np.testing.assert_array_equal(values, same)
        assert len(set(values.tolist())) == 6
    uniform = np.stack([batch_rng(seed, batch, 6)[:4] for seed in (3, 4) for batch in (7, 8)])
    assert len(np.unique(uniform)) == uniform.size  # seeds, batches, kinds and rows: all differ
    assert ((uniform >= 0) & (uniform < 1)).all()
    for values, part in zip(rng, rng.rows(slice(2, 5)), strict=True):
        np.testing.assert_array_equal(part, values[2:5])


def test_uses_and_rows_have_their_own_numbers():
    streams = [stream(seed, use).random(4) for seed in (0, 1, 2**63 - 1) for use in range(5)]
    assert len(np.unique(np.round(streams, 12))) == 60
    np.testing.assert_array_equal(stream(5, CROP).random(4), stream(5, CROP).random(4))
    assert len({CROP, RANDAUGMENT, JITTER, ERASING, MIXING}) == 5
