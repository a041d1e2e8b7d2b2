"""The scenes: what they are a function of, and that boxes and keypoints are where the strokes are."""

import dataclasses
import itertools
import json

import numpy as np
import pytest

from repopt_jax.data import digits, open_scenes, scenes

# A "T" in the 8x8 image: a bar of four pixels in row 1, a stem below its second pixel down to row 6.
T = np.zeros((8, 8), np.uint8)
T[1, 2:6] = T[1:7, 3] = 255
T_BOX = np.array([2, 1, 6, 7])
T_KEYPOINTS = np.array(
    [
        [4.0, 1.5],  # the mean of the bar
        [3.5, 6.5],
        [2.5, 1.5],
        [5.5, 1.5],
        [(2.5 + 3.5 + 4.5 + 5.5 + 5 * 3.5) / 9, (4 * 1.5 + 2.5 + 3.5 + 4.5 + 5.5 + 6.5) / 9],
    ]
)
BLOCK = np.full((8, 8), 255, np.uint8)


@pytest.fixture(scope="module")
def source():
    return open_scenes(3, num_train=150, num_eval=60)


def show_only(monkeypatch, *shapes):
    """Scenes composed of these 8x8 images, whose classes are their numbers, in both splits."""
    images = np.stack([*shapes, *shapes])
    labels = np.tile(np.arange(len(shapes)), 2)
    is_test = np.repeat([False, True], len(shapes))
    monkeypatch.setattr(digits, "load", lambda: (images, labels, is_test))


def light(monkeypatch):
    """Full ink on a black background without noise."""
    for name, value in {"BACKGROUND": (0, 0), "RISE": 0, "INK": (1, 1), "NOISE": (0, 0)}.items():
        monkeypatch.setattr(scenes, name, value)


def same(one, other):
    return all(np.array_equal(one[name], other[name]) for name in one)


# -- what a scene is ---------------------------------------------------------------------------------


def test_shapes_and_types(source):
    for example in itertools.chain(source.train, source.eval):
        n = len(example["classes"])
        assert 1 <= n <= source.info.max_objects == 5
        assert {name: (array.shape, array.dtype) for name, array in example.items()} == {
            "image": ((64, 64, 1), np.uint8),
            "boxes": ((n, 4), np.float32),
            "classes": ((n,), np.int32),
            "keypoints": ((n, 5, 3), np.float32),
            "crowd": ((n,), bool),
            "area": ((n,), np.float32),
        }
        assert not example["crowd"].any()


def test_every_number_of_objects_and_every_class_is_found(source):
    counts = np.bincount([len(source.train.objects(i)["classes"]) for i in range(150)])
    assert counts[1:].min() >= 10  # 30 each on average
    classes = np.concatenate([source.train.objects(i)["classes"] for i in range(150)])
    assert set(classes) == set(range(10))


def test_a_scene_depends_on_seed_split_and_index_alone(source):
    other = open_scenes(3, num_train=20, num_eval=9)
    for split in ("train", "eval"):
        whole, part = getattr(source, split), getattr(other, split)
        assert all(same(whole[i], part[i]) for i in reversed(range(len(part))))
        assert same(part[-1], part[len(part) - 1])
    assert not same(source.train[0], source.eval[0])
    assert not same(source.train[0], source.train[1])
    assert not same(source.train[0], open_scenes(4).train[0])


def test_objects_and_image_are_those_of_the_example(source):
    example = source.train[7]
    assert same(source.train.objects(7), {name: example[name] for name in source.train.objects(7)})
    np.testing.assert_array_equal(source.train.image(7), example["image"])
    with pytest.raises(IndexError, match="`index` 150 is outside a split of 150 images"):
        source.train[150]


def test_a_split_shows_its_own_digits_only(monkeypatch):
    images = np.stack([T, T, BLOCK, BLOCK])
    monkeypatch.setattr(
        digits, "load", lambda: (images, np.array([1, 2, 3, 4]), np.array([False, False, True, True]))
    )
    made = open_scenes(num_train=30, num_eval=30)
    found = [{int(c) for e in split for c in e["classes"]} for split in (made.train, made.eval)]
    assert found == [{1, 2}, {3, 4}]


def test_info_is_plain(source):
    info = source.info
    assert (info.num_classes, info.num_keypoints, info.num_train, info.num_eval) == (10, 5, 150, 60)
    assert [info.keypoint_names[k] for k in info.flip_pairs[0]] == ["left", "right"]
    assert json.loads(json.dumps(dataclasses.asdict(info)))["name"] == "scenes64"


# -- boxes and keypoints -----------------------------------------------------------------------------


def test_boxes_lie_in_the_scene_and_overlap_little(source):
    for i in range(150):
        objects = source.train.objects(i)
        boxes = objects["boxes"].astype(float)
        assert boxes.min() >= 0
        assert boxes.max() <= 64
        sides = boxes[:, 2:] - boxes[:, :2]
        np.testing.assert_array_equal(objects["area"], sides.prod(1))
        assert sides.min() >= 3
        for a, b in itertools.combinations(range(len(boxes)), 2):
            common = np.minimum(boxes[a, 2:], boxes[b, 2:]) - np.maximum(boxes[a, :2], boxes[b, :2])
            share = np.maximum(common, 0).prod() / min(sides[a].prod(), sides[b].prod())
            assert share <= scenes.OVERLAP
        keypoints = objects["keypoints"]
        assert (keypoints[..., :2] >= boxes[:, None, :2] - 1e-4).all()
        assert (keypoints[..., :2] <= boxes[:, None, 2:] + 1e-4).all()


def test_a_box_is_tight_around_the_stroke(monkeypatch):
    light(monkeypatch)
    made = open_scenes(5, num_train=40, max_objects=1)
    for example in made.train:
        y, x = np.nonzero(example["image"][..., 0] >= scenes.STROKE * 255)
        tight = [x.min(), y.min(), x.max() + 1, y.max() + 1]
        np.testing.assert_array_equal(example["boxes"], [tight])


def test_keypoints_are_those_of_the_8x8_stroke(monkeypatch):
    show_only(monkeypatch, T)
    made = open_scenes(0, num_train=60)
    worst = np.zeros(2)
    for objects in made.train:
        for box, keypoints in zip(objects["boxes"], objects["keypoints"], strict=True):
            scale = (box[2:] - box[:2]) / (T_BOX[2:] - T_BOX[:2])
            expected = (T_KEYPOINTS - T_BOX[:2]) * scale + box[:2]
            mirrored = expected[[1, 0, 3, 2, 4]]
            for case, points in enumerate((expected, mirrored)):
                worst[case] = max(worst[case], abs(keypoints[:, :2] - points).max())
    assert worst[0] <= 0.8  # a box has whole pixels
    assert worst[1] > 5


def test_the_mean_of_an_extreme_row_is_weighted_by_ink(monkeypatch):
    uneven = T.copy()
    uneven[1, 2:6] = [51, 255, 204, 102]  # 51 is less than STROKE of full ink, and no part of it
    show_only(monkeypatch, uneven)
    monkeypatch.setattr(scenes, "STRETCH", (1, 1))
    (objects,) = open_scenes(0, num_train=1, max_objects=1).train
    scale = (
        objects["keypoints"][0, 1, 1] - objects["keypoints"][0, 0, 1]
    ) / 5  # five rows from top to bottom
    top_from_bottom = (objects["keypoints"][0, 0, 0] - objects["keypoints"][0, 1, 0]) / scale
    middle = (255 * 3.5 + 204 * 4.5 + 102 * 5.5) / (255 + 204 + 102)
    np.testing.assert_allclose(top_from_bottom, middle - 3.5, atol=0.05)  # the plain mean: 0.27 more


def test_keypoints_under_a_later_digit_are_hidden(monkeypatch):
    show_only(monkeypatch, BLOCK)
    monkeypatch.setattr(scenes, "OVERLAP", 1)
    corner = 2  # pixels: the corners of a scaled block are round
    hidden = 0
    for objects in open_scenes(1, num_train=40).train:
        boxes, keypoints = objects["boxes"], objects["keypoints"]
        for i, (points, flags) in enumerate(zip(keypoints[..., :2], keypoints[..., 2], strict=True)):
            later = boxes[i + 1 :, None]
            under, near = (
                ((points >= later[..., :2] + rim) & (points < later[..., 2:] - rim)).all(-1).any(0)
                for rim in (corner, -corner)
            )
            assert (flags[under] == 1).all()
            assert (flags[~near] == 2).all()
            hidden += under.sum()
    assert hidden > 60


def test_a_later_digit_covers_an_earlier_one(monkeypatch):
    show_only(monkeypatch, BLOCK)
    light(monkeypatch)
    monkeypatch.setattr(scenes, "OVERLAP", 1)
    monkeypatch.setattr(scenes, "INK", (0.2, 0.9))
    for example in open_scenes(2, num_train=20).train:
        box = example["boxes"][-1].astype(int)
        inner = example["image"][box[1] + 3 : box[3] - 3, box[0] + 3 : box[2] - 3]
        assert np.ptp(inner) == 0


def test_a_size_scales_everything():
    example = open_scenes(0, num_train=1, size=128).train[0]
    assert example["image"].shape == (128, 128, 1)
    assert (example["boxes"][:, 3] - example["boxes"][:, 1] >= 0.2 * 128).all()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"seed": -1}, "`seed` is -1; it must be at least 0"),
        ({"num_train": 0}, "`num_train` is 0"),
        ({"num_eval": 0}, "`num_eval` is 0"),
        ({"size": 31}, "`size` is 31; it must be at least 32"),
        ({"max_objects": 0}, "`max_objects` is 0"),
    ],
)
def test_arguments_out_of_range(arguments, message):
    with pytest.raises(ValueError, match=message):
        open_scenes(**arguments)
