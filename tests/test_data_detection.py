"""From annotated images to batches: what moves with the image, padding, order, the truth in COCO's format."""

import itertools

import numpy as np
import pytest

from repopt_jax.data import (
    AnnotatedSource,
    AnnotatedSplit,
    DetectionInfo,
    DetectionTransform,
    eval_annotations,
    eval_detection_batches,
    eval_steps,
    letterbox,
    pipeline,
    steps_per_epoch,
    train_detection_batches,
)
from repopt_jax.data.detection import MIN_SIDE, objects_in_square

SIZE = 32
PLAIN = DetectionTransform(image_size=SIZE)
FLIPPED = DetectionTransform(image_size=SIZE, flip=True)
ZOOMED = DetectionTransform(image_size=SIZE, flip=True, zoom=(0.4, 2.5))
# A place in a resized image is exact to about a pixel.
NEAR = 1.0


class Made(AnnotatedSplit):
    """Examples in memory, which notes what is read."""

    def __init__(self, examples):
        self.examples, self.read = examples, []

    def __len__(self):
        return len(self.examples)

    def objects(self, index):
        return {name: array for name, array in self.examples[index].items() if name != "image"}

    def image(self, index):
        self.read.append(index)
        return self.examples[index]["image"]


def make_example(boxes, *, shape=(40, 60), crowd=(), classes=None, flags=2):
    """A black image, in which the pixels of box i have the value 255 - i; keypoints: the box's upper left and
    right corner and its middle."""
    boxes = np.array(boxes, np.float32).reshape(-1, 4)
    image = np.zeros((*shape, 1), np.uint8)
    for i, (x1, y1, x2, y2) in enumerate(boxes.astype(int)):
        image[max(0, y1) : y2, max(0, x1) : x2] = 255 - i
    x1, y1, x2, y2 = boxes.T
    points = np.stack([x1, y1, x2, y1, (x1 + x2) / 2, (y1 + y2) / 2], -1).reshape(-1, 3, 2)
    keypoints = np.concatenate([points, np.full_like(points[..., :1], flags)], -1)
    return {
        "image": image,
        "boxes": boxes,
        "classes": np.arange(len(boxes), dtype=np.int32) if classes is None else np.array(classes, np.int32),
        "keypoints": keypoints,
        "crowd": np.isin(np.arange(len(boxes)), crowd),
        "area": (x2 - x1) * (y2 - y1) * np.float32(0.5),
    }


def make_source(train, evaluation=None, max_objects=3):
    evaluation = train if evaluation is None else evaluation
    info = DetectionInfo(
        name="made",
        class_names=tuple("abcdefgh"),
        keypoint_names=("left_top", "right_top", "middle"),
        channels=1,
        max_objects=max_objects,
        num_train=len(train),
        num_eval=len(evaluation),
        flip_pairs=((0, 1),),
        sigmas=(0.1, 0.1, 0.1),
    )
    return AnnotatedSource(info, Made(train), Made(evaluation))


def many(count=20):
    """Images of several sizes with a box each, whose class is the number of the image modulo 8."""
    rng = np.random.default_rng(0)
    examples = []
    for i in range(count):
        height, width = rng.integers(24, 80, 2)
        x, y = rng.integers(0, [width - 16, height - 16])
        examples.append(make_example([[x, y, x + 14, y + 12]], shape=(height, width), classes=[i % 8]))
    return make_source(examples)


def take(batches, count):
    iterator = iter(batches)
    found = list(itertools.islice(iterator, count))
    iterator.close()
    return found


def assert_equal(left, right):
    assert len(left) == len(right)
    for a, b in zip(left, right, strict=True):
        assert a.keys() == b.keys()
        for name in a:
            np.testing.assert_array_equal(a[name], b[name], err_msg=name)


def seen_box(image):
    """x1, y1, x2, y2 of the bright part of a batch's image."""
    y, x = np.nonzero(image[..., 0] > 0.5)
    return np.array([x.min(), y.min(), x.max() + 1, y.max() + 1])


# -- what moves with the image -----------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(40, 60), (60, 40), (16, 9), (32, 32), (100, 30)])
@pytest.mark.parametrize("transform", [PLAIN, FLIPPED, ZOOMED])
def test_boxes_are_where_the_bright_pixels_are(shape, transform):
    y, x = shape[0] // 8, shape[1] // 8
    source = make_source([make_example([[x, y, 5 * x, 6 * y]], shape=shape)])
    mirrored, off = 0, 0.0
    for batch in take(train_detection_batches(source, transform, batch_size=1, seed=0), 30):
        if batch["classes"][0, 0] < 0:  # zoomed out of sight
            continue
        box, seen = batch["boxes"][0, 0], seen_box(batch["image"][0])
        near = NEAR * max(1, SIZE / max(shape))  # a pixel of the smaller of the two images
        np.testing.assert_allclose(box, seen, atol=near)
        off = max(off, abs(SIZE - box[[2, 0]] - seen[[0, 2]]).max())
        keypoints = batch["keypoints"][0, 0]
        if (keypoints[:, 2] > 0).all() and box[3] < SIZE:  # nothing is cut off
            np.testing.assert_allclose(keypoints[0, :2], box[:2], atol=1e-4)  # the left one stays left
            np.testing.assert_allclose(keypoints[1, :2], box[[2, 1]], atol=1e-4)
            np.testing.assert_allclose(keypoints[2, :2], (box[:2] + box[2:]) / 2, atol=1e-4)
        mirrored += box[0] + box[2] > SIZE * min(1, shape[1] / shape[0])
    assert off > 4  # the boxes of the mirrored image would not do
    if transform is FLIPPED:
        assert 5 <= mirrored <= 25


def test_the_letterbox_is_anchored_at_the_upper_left():
    image = np.full((30, 60, 3), 200, np.uint8)
    fitted, ratio = letterbox(image, 20)
    assert ratio == pytest.approx(1 / 3)
    assert (fitted[:10] == 200).all()
    assert not fitted[10:].any()
    same, ratio = letterbox(image[:20, :20], 20)
    assert ratio == 1
    np.testing.assert_array_equal(same, image[:20, :20])
    thin, _ = letterbox(np.full((1, 500, 1), 9, np.uint8), 20)
    assert (thin[0] == 9).all()


def test_an_evaluated_place_divided_by_the_ratio_is_the_place_in_the_image():
    source = many()
    for batch in eval_detection_batches(source, ZOOMED, batch_size=4):
        for row in np.flatnonzero(batch["mask"]):
            expected = source.eval.objects(int(batch["index"][row]))
            found = batch["boxes"][row, 0] / batch["ratio"][row]
            np.testing.assert_allclose(found, expected["boxes"][0], atol=1e-4)
            points = batch["keypoints"][row, 0, :, :2] / batch["ratio"][row]
            np.testing.assert_allclose(points, expected["keypoints"][0, :, :2], atol=1e-4)


def test_unlabelled_and_hidden_keypoints_keep_their_flag():
    hidden = make_example([[2, 2, 12, 12]], shape=(32, 32), flags=1)
    unlabelled = make_example([[2, 2, 12, 12]], shape=(32, 32), flags=0)
    for transform in (PLAIN, FLIPPED):
        (batch,) = take(
            train_detection_batches(make_source([hidden, unlabelled]), transform, batch_size=2, seed=0), 1
        )
        flags = batch["keypoints"][:, 0, :, 2]
        assert sorted(flags.tolist()) == [[0, 0, 0], [1, 1, 1]]
        assert not batch["keypoints"][flags[:, 0] == 0].any()


def test_what_reaches_over_the_border_is_clipped():
    source = make_source([make_example([[-8, -6, 16, 16]], shape=(20, 32))])
    (batch,) = take(train_detection_batches(source, PLAIN, batch_size=1, seed=0), 1)
    np.testing.assert_array_equal(batch["boxes"][0, 0], [0, 0, 16, 16])
    # Only the middle is inside.
    np.testing.assert_array_equal(batch["keypoints"][0, 0], [[0, 0, 0], [0, 0, 0], [4, 5, 2]])


def test_an_object_is_dropped_where_less_than_a_quarter_is_left():
    source = make_source([make_example([[0, 0, 16, 16]], shape=(32, 32))])
    transform = DetectionTransform(image_size=SIZE, zoom=(2.0, 2.0))  # a random half of each side is seen
    kept = dropped = 0
    for batch in take(train_detection_batches(source, transform, batch_size=1, seed=0), 60):
        area = (batch["image"] > 0.5).sum()
        if batch["classes"][0, 0] >= 0:
            kept += 1
            assert area >= 0.25 * 32**2
        else:
            dropped += 1
            assert area < 0.25 * 32**2 + 2 * 32 * NEAR
            assert not batch["boxes"].any()
            assert not batch["keypoints"].any()
    assert min(kept, dropped) > 10


@pytest.mark.parametrize("zoom", [None, (0.5, 0.5)])
def test_what_is_small_because_the_image_was_shrunk_is_kept(zoom):
    boxes = [[100, 100, 104, 103], [0, 0, 4, 4], [396, 300, 400, 304]]  # the last two touch the border
    source = make_source([make_example(boxes, shape=(304, 400))])
    transform = DetectionTransform(image_size=SIZE, zoom=zoom)
    ratio = SIZE / 400 * (zoom[0] if zoom else 1)
    near = 0.05 if zoom else 1e-4  # a zoomed image has whole pixels: 12 high instead of 12.16
    for batch in take(train_detection_batches(source, transform, batch_size=1, seed=0), 8):
        assert batch["classes"].tolist() == [[0, 1, 2]]
        found = batch["boxes"][0, 0]
        np.testing.assert_allclose(found[2:] - found[:2], np.array([4, 3]) * ratio, atol=near)
        assert (found[2:] - found[:2]).max() < MIN_SIDE


def test_what_the_border_cuts_to_less_than_a_pixel_is_dropped():
    objects = make_example([[10, 4, 13, 6], [20, 4, 20.7, 6], [4, 4, 4, 9]], shape=(32, 32))
    extent, classes = np.array([32, 32]), []
    for left in (-10, -11.6, -12.1, -13, -20.1):  # 3, 1.4, 0.9 and 0 pixels are left; then 0.6 of the second
        corner = np.array([left, 0])
        found = objects_in_square(objects, np.ones(2), extent, corner, 32, 3)  # pyright: ignore[reportArgumentType]
        classes.append(found[1].tolist())
    assert classes == [[0, 1], [0, 1], [1], [1], []]  # the third has no size at all


def test_crowds_are_left_out_and_of_too_many_the_smallest():
    boxes = [[0, 0, 4, 4], [5, 5, 20, 20], [20, 0, 23, 3], [0, 20, 30, 30], [24, 0, 31, 8]]
    source = make_source([make_example(boxes, shape=(32, 32), crowd=[3])])
    (batch,) = take(train_detection_batches(source, PLAIN, batch_size=1, seed=0), 1)
    assert batch["classes"].tolist() == [[0, 1, 4]]
    np.testing.assert_array_equal(batch["boxes"][0], np.array(boxes)[[0, 1, 4]])


def test_an_image_without_objects():
    source = make_source([make_example([]), make_example([[2, 2, 20, 20]])])
    (batch,) = take(train_detection_batches(source, ZOOMED, batch_size=2, seed=0), 1)
    assert batch["classes"].max(1).tolist().count(-1) >= 1


# -- order, sharing, resuming ------------------------------------------------------------------------


def test_shapes_types_and_padding():
    (batch,) = take(train_detection_batches(many(), PLAIN, batch_size=5, seed=0), 1)
    assert {name: (array.shape, array.dtype) for name, array in batch.items()} == {
        "image": ((5, SIZE, SIZE, 1), np.float32),
        "boxes": ((5, 3, 4), np.float32),
        "classes": ((5, 3), np.int32),
        "keypoints": ((5, 3, 3, 3), np.float32),
    }
    assert (batch["classes"][:, 0] >= 0).all()
    assert (batch["classes"][:, 1:] == -1).all()
    assert not batch["boxes"][:, 1:].any()


def test_normalisation():
    transform = DetectionTransform(image_size=SIZE, mean=(0.5,), std=(0.25,))
    (plain,) = take(train_detection_batches(many(), PLAIN, batch_size=5, seed=0), 1)
    (batch,) = take(train_detection_batches(many(), transform, batch_size=5, seed=0), 1)
    np.testing.assert_allclose(batch["image"], (plain["image"] - 0.5) / 0.25, atol=1e-5)


def test_the_seed_decides():
    first, again, other = (
        take(train_detection_batches(many(), ZOOMED, batch_size=5, seed=seed), 6) for seed in (1, 1, 2)
    )
    assert_equal(first, again)
    assert any((a["image"] != b["image"]).any() for a, b in zip(first, other, strict=True))


@pytest.mark.parametrize("transform", [FLIPPED, ZOOMED])
def test_processes_share_each_batch(transform):
    whole = take(train_detection_batches(many(), transform, batch_size=6, seed=3), 5)
    shares = [
        take(
            train_detection_batches(
                many(), transform, batch_size=6, seed=3, process_index=i, process_count=2
            ),
            5,
        )
        for i in range(2)
    ]
    joined = [{name: np.concatenate([a[name], b[name]]) for name in a} for a, b in zip(*shares, strict=True)]
    assert_equal(joined, whole)


@pytest.mark.parametrize("options", [{"prefetch": 0}, {"cache": False}, {"workers": 1}])
def test_how_batches_are_made_changes_nothing(options):
    expected = take(train_detection_batches(many(), FLIPPED, batch_size=6, seed=0), 6)
    assert_equal(take(train_detection_batches(many(), FLIPPED, batch_size=6, seed=0, **options), 6), expected)


def test_an_iterator_continues_where_its_state_was_taken():
    unbroken = take(train_detection_batches(many(), ZOOMED, batch_size=6, seed=0), 8)
    first = iter(train_detection_batches(many(), ZOOMED, batch_size=6, seed=0))
    for _ in range(4):
        next(first)
    state = first.get_state()
    first.close()
    second = iter(train_detection_batches(many(), ZOOMED, batch_size=6, seed=0))
    second.set_state(state)
    assert_equal(list(itertools.islice(second, 4)), unbroken[4:])
    second.close()


def test_images_are_cached_unless_they_are_zoomed_or_too_large(monkeypatch):
    source = many()
    take(train_detection_batches(source, FLIPPED, batch_size=5, seed=0, prefetch=0), 12)
    assert sorted(source.train.read) == list(range(20))
    source = many()
    take(train_detection_batches(source, ZOOMED, batch_size=5, seed=0, prefetch=0), 12)
    assert len(source.train.read) == 60
    monkeypatch.setattr(pipeline, "CACHE_BYTES", 20 * SIZE**2 - 1)
    take(train_detection_batches(source, PLAIN, batch_size=5, seed=0), 2)
    assert not source.cache


@pytest.mark.parametrize("batch_size", [1, 6, 20, 24])
@pytest.mark.parametrize("count", [1, 2])
def test_every_image_is_evaluated_once(batch_size, count):
    source = many()
    batch_size *= count
    shares = [
        list(
            eval_detection_batches(
                source, ZOOMED, batch_size=batch_size, process_index=i, process_count=count
            )
        )
        for i in range(count)
    ]
    assert {len(share) for share in shares} == {eval_steps(source, batch_size)}
    index, mask, classes, images = (
        np.concatenate([batch[name] for batch in itertools.chain(*shares)])
        for name in ("index", "mask", "classes", "image")
    )
    assert (index.dtype, mask.dtype) == (np.int32, np.float32)
    assert sorted(index[mask == 1]) == list(range(20))
    np.testing.assert_array_equal(classes[mask == 1, 0], index[mask == 1] % 8)
    assert (classes[mask == 0] == -1).all()
    assert not images[mask == 0].any()


# -- the truth ---------------------------------------------------------------------------------------


def test_the_truth_in_coco_format_decodes_nothing():
    objects = make_example([[2, 4, 12, 20], [0, 0, 30, 30]], crowd=[1], classes=[5, 2])
    source = make_source([make_example([]), objects])
    truth = eval_annotations(source)
    assert source.eval.read == []
    assert [image["id"] for image in truth["images"]] == [1, 2]
    one, other = truth["annotations"]
    assert one == {
        "id": 1,
        "image_id": 2,
        "category_id": 6,
        "bbox": [2, 4, 10, 16],
        "area": 80,  # as the data set has it, not the box's
        "iscrowd": 0,
        "keypoints": [2, 4, 2, 12, 4, 2, 7, 12, 2],
        "num_keypoints": 3,
    }
    assert (other["id"], other["iscrowd"]) == (2, 1)
    assert truth["categories"][5] == {
        "id": 6,
        "name": "f",
        "keypoints": ["left_top", "right_top", "middle"],
        "skeleton": [],
    }


def test_the_truth_of_some_images():
    source = many()
    used = [
        batch["index"][batch["mask"] == 1]
        for batch in eval_detection_batches(source, PLAIN, batch_size=4, limit=6)
    ]
    used = np.concatenate(used)
    truth = eval_annotations(source, used)
    assert [image["id"] for image in truth["images"]] == [i + 1 for i in used]
    assert [a["image_id"] for a in truth["annotations"]] == [i + 1 for i in used]


# -- refusals ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"image_size": 0}, "`image_size` is 0; it must be at least 1"),
        ({"zoom": (0.5,)}, "`zoom` is .*0 < low <= high"),
        ({"zoom": (2, 1)}, "`zoom` is"),
        ({"zoom": (0, 1)}, "`zoom` is"),
        ({"std": (0.0,)}, "`std` is .* must be positive"),
    ],
)
def test_transforms_that_make_no_sense(values, message):
    with pytest.raises(ValueError, match=message):
        DetectionTransform(**{"image_size": 8, **values})


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"batch_size": 21}, r"`batch_size` is 21; it must be in \[1, 20\]"),
        ({"seed": -1}, "`seed` is -1"),
        ({"limit": 30}, "`limit` is 30, but the train split has 20"),
        ({"process_count": 3}, "`batch_size` 4 is not divisible by 3"),
        ({"cache": True, "transform": ZOOMED}, "`cache` is True, but .*`zoom`, which needs whole images"),
        (
            {"transform": DetectionTransform(image_size=8, mean=(0.1, 0.2, 0.3))},
            "`mean` has 3 numbers, but the images have 1",
        ),
    ],
)
def test_arguments_that_do_not_fit(arguments, message):
    arguments = {"transform": PLAIN, "batch_size": 4, "seed": 0, **arguments}
    with pytest.raises(ValueError, match=message):
        train_detection_batches(many(), **arguments)


def test_steps_of_an_epoch():
    assert steps_per_epoch(many(), 6) == 3


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"channels": 2}, "`channels` is 2"),
        ({"max_objects": 0}, "`max_objects` is 0"),
        ({"sigmas": (0.1,)}, "`sigmas` has 1 numbers, but there are 2 keypoints"),
        ({"sigmas": (0.1, 0.0)}, "`sigmas` is .* must be positive"),
        ({"flip_pairs": ((0, 2),)}, "`flip_pairs` is"),
        ({"flip_pairs": ((0, 0),)}, "`flip_pairs` is"),
        ({"flip_pairs": ((0,), (1,))}, "`flip_pairs` is"),
    ],
)
def test_infos_that_make_no_sense(values, message):
    good = {
        "name": "x",
        "class_names": ("a",),
        "keypoint_names": ("p", "q"),
        "channels": 1,
        "max_objects": 1,
        "num_train": 1,
        "num_eval": 1,
        "flip_pairs": ((0, 1),),
        "sigmas": (0.1, 0.1),
    }
    DetectionInfo(**good)
    with pytest.raises(ValueError, match=message):
        DetectionInfo(**{**good, **values})
