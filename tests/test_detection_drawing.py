"""Pictures of detections: where the lines and dots are, and in which colour."""

import numpy as np
import pytest
from PIL import Image, ImageColor

from repopt_jax.detection.drawing import COLOURS, contact_sheet, draw_detections

NAMES = ("cat", "dog", "bird")


def colour(number):
    return np.array(ImageColor.getrgb(COLOURS[number]))


def draw(image=None, boxes=((20, 40, 60, 90),), classes=(1,), scores=(0.5,), keypoints=None, **options):
    image = np.zeros((128, 96, 1), np.uint8) if image is None else image
    scores = None if scores is None else np.array(scores)
    return np.asarray(
        draw_detections(image, np.array(boxes, float), np.array(classes), scores, keypoints, NAMES, **options)
    )


def places(picture, number):
    """x1, y1, x2, y2 of all pixels that have a colour."""
    y, x = np.nonzero((picture == colour(number)).all(-1))
    return x.min(), y.min(), x.max(), y.max()


def test_a_box_has_the_colour_of_its_class_and_a_label_above():
    picture = draw()
    assert picture.shape == (128, 96, 3)
    left, top, right, bottom = places(picture, 1)
    assert (left, bottom) == (20, 90)
    assert right >= 60  # the label may be wider
    assert 20 < top < 40
    np.testing.assert_array_equal(picture[[40, 90, 60, 60], [50, 50, 20, 60]], np.tile(colour(1), (4, 1)))
    assert not picture[50:80, 30:50].any()
    np.testing.assert_array_equal(draw(classes=[2])[90, 50], colour(2))


@pytest.mark.parametrize(("box", "below"), [((10, 0, 50, 60), True), ((10, 0, 50, 127), False)])
def test_a_label_finds_room_in_the_image(box, below):
    picture = draw(boxes=[box])
    plate = (picture == colour(1)).all(-1)
    inside = plate[4 : box[3] - 4, 14:46].any()
    assert inside != below
    assert plate[box[3] + 4 :].any() == below


def test_zoom_enlarges_pixels_and_keeps_lines_thin():
    image = np.random.default_rng(0).integers(0, 100, (16, 12, 3), np.uint8)
    picture = draw(image, boxes=[(2, 9, 8, 15)], scores=None, zoom=8)
    assert picture.shape == (128, 96, 3)
    np.testing.assert_array_equal(picture[4, 91], image[0, 11])
    np.testing.assert_array_equal(picture[120, 40], colour(1))
    np.testing.assert_array_equal(picture[100, 30], image[12, 3])


def test_keypoints_have_fixed_colours_and_hidden_ones_are_rings():
    points = np.array([[[30, 50, 2], [40, 60, 1], [50, 70, 0]]], float)
    picture = draw(keypoints=points)
    np.testing.assert_array_equal(picture[50, 30], colour(0))
    assert not picture[60, 40].any()
    assert (picture[56:65, 36:45] == colour(1)).all(-1).any()
    assert not picture[65:76, 45:56].any()
    plain = draw(keypoints=points[..., :2])
    np.testing.assert_array_equal(plain[[50, 60, 70], [30, 40, 50]], [colour(k) for k in range(3)])


def test_padding_is_not_drawn_and_the_best_is_on_top():
    empty = draw(classes=[-1])
    assert not empty.any()
    assert not draw(boxes=np.zeros((0, 4)), classes=[], scores=[]).any()
    both = draw(boxes=[(20, 40, 60, 90)] * 2, classes=[0, 2], scores=[0.9, 0.1])
    np.testing.assert_array_equal(both[90, 50], colour(0))


def test_the_image_is_not_changed():
    image = np.full((64, 64, 3), 7, np.uint8)
    draw(image)
    assert (image == 7).all()


def test_a_contact_sheet_puts_images_in_cells():
    images = [Image.new("RGB", (10 + i, 20), (i, i, i)) for i in range(5)]
    sheet = np.asarray(contact_sheet(images, 3, gap=4))
    assert sheet.shape == (20 + 4 + 20, 3 * 14 + 2 * 4, 3)
    for i in range(5):
        assert (sheet[24 * (i // 3) + 10, 18 * (i % 3) + 5] == i).all()
    assert (sheet[30, -5] == 255).all()
    assert contact_sheet(images[:1], 3).size == (10, 20)


def test_refusals():
    with pytest.raises(ValueError, match=r"`image` is float64 \(4, 4, 1\); it must be uint8"):
        draw(np.zeros((4, 4, 1)))
    with pytest.raises(ValueError, match="`image` is uint8"):
        draw(np.zeros((4, 4), np.uint8))
    with pytest.raises(ValueError, match="`zoom` is 0"):
        draw(zoom=0)
    with pytest.raises(ValueError, match="`images` is empty"):
        contact_sheet([], 3)
    with pytest.raises(ValueError, match="`columns` is 0"):
        contact_sheet([Image.new("RGB", (1, 1))], 0)
