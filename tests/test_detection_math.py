"""Boxes, targets, losses and decoding of a detector, against loops over single numbers."""

import math
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from repopt_jax.detection import (
    Detections,
    LossWeights,
    Outputs,
    area,
    assign,
    decode,
    detection_loss,
    giou,
    iou,
    nms,
    pairwise_iou,
    smooth_l1,
)
from repopt_jax.detection.outputs import grid_locations

EXACT = 1e-12  # absolute, float64, of numbers near 1; measured: 5e-15 at most
OTHER_RULE = 0.02  # share of decisions in which another rule differs; measured: 0.04 at least
NOTHING = 1e-9  # of losses and pixels where outputs say what is so; their sigmoids are not quite 0 and 1
WRONG = 1e-3  # what a mistake in a loss exceeds; measured: 0.02 at least

# Levels of strides 4, 8 and 16 for images of 20 by 28 pixels.
PLACES = grid_locations([(5, 7), (3, 4), (2, 2)], [4, 8, 16])
IMAGE = (20, 28)
K, C = 3, 4


def random_boxes(rng, *shape, side=20.0):
    """Boxes with corners on a grid of 1 pixel, so that many are equal, touch, are empty or inverted."""
    low = rng.integers(0, side / 3, (*shape, 2))
    return np.concatenate([low, low + rng.integers(-2, side, (*shape, 2))], -1).astype(np.float64)


def area_by_hand(box):
    x1, y1, x2, y2 = box
    return (x2 - x1) * (y2 - y1) if x2 > x1 and y2 > y1 else 0.0


def iou_by_hand(a, b):
    overlap = area_by_hand([max(a[0], b[0]), max(a[1], b[1]), min(a[2], b[2]), min(a[3], b[3])])
    union = area_by_hand(a) + area_by_hand(b) - overlap
    return overlap / union if union else 0.0


def giou_by_hand(a, b):
    hull = area_by_hand([min(a[0], b[0]), min(a[1], b[1]), max(a[2], b[2]), max(a[3], b[3])])
    overlap = area_by_hand([max(a[0], b[0]), max(a[1], b[1]), min(a[2], b[2]), min(a[3], b[3])])
    union = area_by_hand(a) + area_by_hand(b) - overlap
    return iou_by_hand(a, b) - ((hull - union) / hull if hull else 0.0)


# Boxes


def test_areas_and_overlaps_of_boxes_of_every_kind(x64):
    rng = np.random.default_rng(0)
    a, b = random_boxes(rng, 40), random_boxes(rng, 40)
    assert sum(area_by_hand(box) == 0 for box in a) > 5
    np.testing.assert_allclose(area(jnp.asarray(a)), [area_by_hand(box) for box in a], atol=EXACT)
    np.testing.assert_allclose(jax.jit(iou)(a, b), [iou_by_hand(*pair) for pair in zip(a, b)], atol=EXACT)
    np.testing.assert_allclose(jax.jit(giou)(a, b), [giou_by_hand(*pair) for pair in zip(a, b)], atol=EXACT)
    expected = [[iou_by_hand(one, other) for other in b] for one in a]
    np.testing.assert_allclose(jax.jit(pairwise_iou)(a, b), expected, atol=EXACT)


coordinate = st.floats(-50, 50, width=32)
side = st.floats(0.125, 50, width=32)
boxes = st.builds(lambda x, y, w, h: np.array([x, y, x + w, y + h]), coordinate, coordinate, side, side)


giou_of, iou_of = jax.jit(giou), jax.jit(iou)
value_and_gradient = {function: jax.jit(jax.value_and_grad(function)) for function in (iou, giou)}


@settings(max_examples=30, deadline=None)
@given(a=boxes, b=boxes, move=coordinate, factor=side)
def test_giou_is_symmetric_bounded_and_independent_of_place_and_scale(a, b, move, factor):
    with jax.enable_x64(True):
        value = float(giou_of(a, b))
        assert -1 <= value <= float(iou_of(a, b)) + EXACT
        assert abs(value - float(giou_of(b, a))) < EXACT
        assert abs(value - float(giou_of((a + move) * factor, (b + move) * factor))) < 1e-9
        assert abs(float(giou_of(a, a)) - 1) < EXACT


def test_giou_tells_near_from_far_where_iou_cannot_and_its_gradient_moves_the_box_there(x64):
    target, near, far = jnp.array([[0.0, 0, 4, 4], [5, 0, 9, 4], [50, 0, 54, 4]])
    assert iou_of(near, target) == iou_of(far, target) == 0
    value, gradient = value_and_gradient[giou](far, target)
    assert giou_of(near, target) > value + 0.5
    assert gradient[0] < 0  # a smaller x1 helps


@pytest.mark.parametrize("box", [[3, 3, 3, 3], [5, 1, 2, 7], [0, 0, 0, 9]])
def test_gradients_of_degenerate_boxes_are_finite(x64, box):
    for other in ([3.0, 3, 3, 3], [0.0, 0, 9, 9], [5.0, 1, 2, 7]):
        for function in (iou, giou):
            value, gradient = value_and_gradient[function](np.array(box, float), np.array(other))
            assert np.isfinite(value)
            assert np.isfinite(gradient).all()


# Suppression


def nms_by_hand(boxes, scores, classes, threshold):
    kept = []
    for i in sorted(range(len(boxes)), key=lambda i: (-scores[i], i)):
        rivals = [j for j in kept if classes[j] == classes[i]]
        if classes[i] >= 0 and all(iou_by_hand(boxes[i], boxes[j]) <= threshold for j in rivals):
            kept.append(i)
    return np.isin(np.arange(len(boxes)), kept)


def test_nms_is_the_greedy_loop_with_ties_padding_and_degenerate_boxes(x64):
    rng = np.random.default_rng(0)
    run = jax.jit(nms)
    shape = (30, 24)
    boxes = random_boxes(rng, *shape, side=12.0)
    scores = rng.integers(0, 6, shape) / 4  # many ties
    classes = rng.integers(-1, 3, shape)
    for threshold in (0.0, 0.25, 0.5):  # overlaps of just these values are common on a grid
        expected = [nms_by_hand(*one, threshold) for one in zip(boxes, scores, classes)]
        np.testing.assert_array_equal(run(boxes, scores, classes, threshold), expected)
        blind = [nms_by_hand(b, s, np.minimum(c, 0), threshold) for b, s, c in zip(boxes, scores, classes)]
        assert np.mean(np.not_equal(expected, blind)) > OTHER_RULE


def test_a_box_that_was_dropped_drops_nothing(x64):
    # Each overlaps the next by more than the threshold and no other: every second one stays, however long
    # the chain.
    n = 41
    x = 4.0 * np.arange(n)
    chain = np.stack([x, np.zeros(n), x + 10, np.full(n, 10.0)], -1)
    scores = np.linspace(1, 0.1, n)
    assert iou_by_hand(chain[0], chain[1]) > 0.4 > iou_by_hand(chain[0], chain[2])
    run = jax.jit(nms)
    kept = run(chain, scores, np.zeros(n, int), 0.4)
    np.testing.assert_array_equal(kept, np.arange(n) % 2 == 0)
    shuffled = np.random.default_rng(0).permutation(n)
    again = run(chain[shuffled], scores[shuffled], np.zeros(n, int), 0.4)
    np.testing.assert_array_equal(again, shuffled % 2 == 0)


# Targets


def random_objects(rng, images=8, objects=6):
    centre = rng.uniform(-2, 30, (images, objects, 2))
    half = rng.uniform(0.5, 12, (images, objects, 2))
    boxes = np.concatenate([centre - half, centre + half], -1)
    boxes[:, 3] = boxes[:, 2]  # equal boxes: the first one wins
    classes = rng.integers(-1, C, (images, objects))
    keypoints = np.concatenate(
        [rng.uniform(0, 28, (images, objects, K, 2)), rng.integers(0, 3, (images, objects, K, 1))], -1
    )
    return boxes, classes, keypoints


def assign_by_hand(boxes, classes, keypoints, radius, level_range):
    """One image, location by location: a list of (class, distances, centerness, offsets, labelled)."""
    rows = []
    for (x, y), s, level in zip(PLACES.points.astype(float), PLACES.strides.astype(float), PLACES.levels):
        best = None
        for m, (x1, y1, x2, y2) in enumerate(boxes):
            sides = [x - x1, y - y1, x2 - x, y2 - y]
            near = abs(x - (x1 + x2) / 2) < radius * s and abs(y - (y1 + y2) / 2) < radius * s
            least = 0 if level == 0 else level_range / 2 * s
            most = math.inf if level == 2 else level_range * s
            if classes[m] < 0 or min(sides) <= 0 or not near or not least < max(sides) <= most:
                continue
            if best is None or area_by_hand(boxes[m]) < area_by_hand(boxes[best[0]]):
                best = m, sides
        if best is None:
            rows.append((-1, np.ones(4), 0.0, np.zeros((K, 2)), np.zeros(K, bool)))
            continue
        m, (left, top, right, bottom) = best
        ratio = min(left, right) / max(left, right) * min(top, bottom) / max(top, bottom)
        labelled = keypoints[m, :, 2] > 0
        offsets = (keypoints[m, :, :2] - [x, y]) / s * labelled[:, None]
        rows.append((classes[m], np.array(best[1]) / s, math.sqrt(ratio), offsets, labelled))
    return rows


@jax.jit
def assigned(boxes, classes, keypoints, radius, level_range):
    return assign(boxes, classes, keypoints, PLACES, radius=radius, level_range=level_range)


@pytest.mark.parametrize(("radius", "level_range"), [(1.5, 2.0), (0.8, 1.5), (10.0, 2.5)])
def test_assignment_is_that_of_a_loop(x64, radius, level_range):
    boxes, classes, keypoints = random_objects(np.random.default_rng(0))
    targets = assigned(boxes, classes, keypoints, radius, level_range)
    images = [assign_by_hand(*one, radius, level_range) for one in zip(boxes, classes, keypoints)]
    expected = [np.stack([np.stack(part) for part in parts]) for parts in zip(*(zip(*i) for i in images))]
    for got, wanted in zip(targets, expected, strict=True):
        np.testing.assert_allclose(got, wanted, atol=EXACT)
    found = np.asarray(targets.classes) >= 0
    assert all(found[:, PLACES.levels == level].any() for level in range(3))
    assert 0.02 < found.mean() < 0.8
    other = assigned(boxes, classes, keypoints, radius, level_range * 0.7)
    assert np.mean(np.asarray(other.classes) != targets.classes) > OTHER_RULE


def filled_up(*images):
    """A batch as large as that of `random_objects`: of each image (boxes, classes), the rest padding."""
    boxes, classes = np.zeros((8, 6, 4)), np.full((8, 6), -1)
    for n, (some_boxes, some_classes) in enumerate(images):
        boxes[n, : len(some_boxes)], classes[n, : len(some_classes)] = some_boxes, some_classes
    return boxes, classes


def test_the_smaller_of_two_objects_wins_and_padding_never_does(x64):
    three = [[0, 0, 28, 20], [8, 4, 20, 16], [10, 6, 18, 14]]
    boxes, classes = filled_up((three, [0, 1, -1]), (three, [-1, -1, -1]))
    targets = assigned(boxes, classes, np.zeros((8, 6, K, 3)), 9.0, 1e3)
    i = int(np.argmin(np.abs(PLACES.points - [14, 10]).sum(-1)))
    assert targets.classes[0, i] == 1
    assert (np.asarray(targets.classes[1:]) == -1).all()
    assert not targets.labelled.any()
    assert all(np.isfinite(part).all() for part in targets)


# Losses


def random_outputs(rng, images=8):
    n = len(PLACES.points)
    return Outputs(
        rng.normal(size=(images, n, C)) * 2,
        np.exp(rng.normal(size=(images, n, 4))),
        rng.normal(size=(images, n)),
        rng.normal(size=(images, n, K, 2)),
    )


def loss_by_hand(outputs, batch, gamma=2.0):
    """The parts of the loss, number by number, from definitions that are not made to be stable."""

    def sigmoid(z):
        return 1 / (1 + math.exp(-z))

    rows = [
        assign_by_hand(*one, 1.5, 2.0) for one in zip(batch["boxes"], batch["classes"], batch["keypoints"])
    ]
    sums = dict.fromkeys(("classes", "boxes", "centerness", "keypoints"), 0.0)
    positives = labels = 0
    for n, image in enumerate(rows):
        for i, (wanted, distances, centerness, offsets, labelled) in enumerate(image):
            for c in range(C):
                p = sigmoid(outputs.classes[n, i, c])
                p, alpha = (p, 0.25) if c == wanted else (1 - p, 0.75)
                sums["classes"] -= alpha * (1 - p) ** gamma * math.log(p)
            if wanted < 0:
                continue
            positives += 1
            left, top, right, bottom = outputs.boxes[n, i]
            box = [-distances[0], -distances[1], distances[2], distances[3]]
            sums["boxes"] += centerness * (1 - giou_by_hand([-left, -top, right, bottom], box))
            p = sigmoid(outputs.centerness[n, i])
            sums["centerness"] -= centerness * math.log(p) + (1 - centerness) * math.log(1 - p)
            for k in np.flatnonzero(labelled):
                labels += 1
                for d in abs(outputs.keypoints[n, i, k] - offsets[k]):
                    sums["keypoints"] += 4.5 * d * d if d < 1 / 9 else d - 1 / 18
    return {name: total / (labels if name == "keypoints" else positives) for name, total in sums.items()}


@pytest.fixture(scope="module")
def case():
    """Outputs, a batch of objects, and the loss with its gradient, compiled."""
    rng = np.random.default_rng(0)
    boxes, classes, keypoints = random_objects(rng)
    batch = {"boxes": boxes, "classes": classes, "keypoints": keypoints}

    @jax.jit
    def run(outputs, batch):
        def loss(outputs):
            return detection_loss(outputs, batch, PLACES, LossWeights(1, 2, 3, 4), level_range=2.0)

        return jax.value_and_grad(loss, has_aux=True)(outputs)

    return SimpleNamespace(outputs=random_outputs(rng), batch=batch, run=run)


def test_the_loss_is_that_of_a_loop(x64, case):
    (total, parts), _ = case.run(case.outputs, case.batch)
    expected = loss_by_hand(case.outputs, case.batch)
    assert {name: float(part) for name, part in parts.items()} == pytest.approx(expected, abs=EXACT)
    weighted = sum(w * expected[name] for w, name in zip((1, 2, 3, 4), expected))
    assert abs(float(total) - weighted) < 10 * EXACT
    wrong = loss_by_hand(case.outputs, case.batch, gamma=1.5)
    assert abs(wrong["classes"] - float(parts["classes"])) > WRONG


def test_without_objects_only_the_classes_learn_and_nothing_is_nan(x64, case):
    batch = case.batch | {"classes": np.full_like(case.batch["classes"], -1)}
    (total, parts), gradients = case.run(case.outputs, batch)
    assert float(total) == float(parts["classes"]) > 0
    assert all(float(parts[name]) == 0 for name in ("boxes", "centerness", "keypoints"))
    assert float(jnp.abs(gradients.classes).max()) > 0
    for part in gradients[1:]:
        np.testing.assert_array_equal(part, 0)


def test_gradients_of_extreme_outputs_are_finite(x64, case):
    outputs = case.outputs._replace(classes=case.outputs.classes * 500, boxes=case.outputs.boxes**8)
    (total, _), gradients = case.run(outputs, case.batch)
    assert np.isfinite(total)
    assert all(np.isfinite(part).all() for part in gradients)


def test_narrow_outputs_are_summed_in_float32(case):
    narrow = jax.tree.map(lambda x: jnp.asarray(x, jnp.bfloat16), case.outputs)
    batch = {name: jnp.asarray(x, jnp.float32) for name, x in case.batch.items()}
    total, parts = jax.eval_shape(lambda outputs: detection_loss(outputs, batch, PLACES), narrow)
    assert {part.dtype for part in (total, *parts.values())} == {jnp.dtype(jnp.float32)}


def test_detectors_without_keypoints_have_no_keypoint_loss(x64, case):
    outputs = case.outputs._replace(keypoints=case.outputs.keypoints[:, :, :0])
    batch = case.batch | {"keypoints": case.batch["keypoints"][:, :, :0]}
    _, parts = jax.jit(lambda outputs: detection_loss(outputs, batch, PLACES, level_range=2.0))(outputs)
    (_, with_keypoints), _ = case.run(case.outputs, case.batch)
    expected = {name: float(part) for name, part in with_keypoints.items()} | {"keypoints": 0.0}
    assert {name: float(part) for name, part in parts.items()} == pytest.approx(expected, abs=EXACT)


def test_smooth_l1_is_continuous_with_its_slope(x64):
    beta = 0.25
    slope = jax.grad(lambda d: smooth_l1(jnp.asarray(d), beta=beta))
    below, above = beta - 1e-9, beta + 1e-9
    values = smooth_l1(jnp.array([below, above]), beta=beta)
    assert abs(float(values[0] - values[1])) < 1e-8
    assert abs(float(slope(below) - slope(above))) < 1e-8
    assert float(slope(0.0)) == 0
    assert float(slope(-3.0)) == -1


# Decoding


def decode_by_hand(outputs, n, *, score_threshold, iou_threshold, pre, count):
    candidates = []
    for i, ((x, y), s) in enumerate(zip(PLACES.points.astype(float), PLACES.strides.astype(float))):
        left, top, right, bottom = outputs.boxes[n, i] * s
        box = np.clip([x - left, y - top, x + right, y + bottom], 0, [IMAGE[1], IMAGE[0]] * 2)
        for c in range(C):
            score = 1 / math.sqrt(
                (1 + math.exp(-outputs.classes[n, i, c])) * (1 + math.exp(-outputs.centerness[n, i]))
            )
            if score > score_threshold:
                candidates.append((box, score, c, [x, y] + outputs.keypoints[n, i] * s))
    candidates = sorted(candidates, key=lambda one: -one[1])[:pre]
    boxes, scores, classes, _ = zip(*candidates)
    kept = nms_by_hand(boxes, scores, classes, iou_threshold)
    return [one for one, keep in zip(candidates, kept) if keep][:count]


@pytest.mark.parametrize(("pre", "count"), [(60, 20), (20, 50), (10_000, 1000)])
def test_decoding_is_that_of_a_loop(x64, pre, count):
    outputs = random_outputs(np.random.default_rng(1), images=2)
    options = {"score_threshold": 0.6, "iou_threshold": 0.3, "pre": pre, "count": count}
    found = jax.jit(lambda outputs: decode(outputs, PLACES, IMAGE, **options))(outputs)
    assert found.boxes.shape == (2, count, 4)
    assert found.keypoints.shape == (2, count, K, 2)
    assert found.classes.dtype == jnp.int32
    for n in range(2):
        expected = decode_by_hand(outputs, n, **options)
        size = int((np.asarray(found.classes[n]) >= 0).sum())
        assert size == len(expected) > 5
        for got, wanted in zip(found, zip(*expected), strict=True):
            np.testing.assert_allclose(got[n, :size], np.stack(wanted), atol=EXACT * 100)
            np.testing.assert_array_equal(got[n, size:], -1 if got is found.classes else 0)


def test_of_no_image_there_are_no_detections():
    outputs = jax.tree.map(lambda x: x[:0], random_outputs(np.random.default_rng(1), images=1))
    assert decode(outputs, PLACES, IMAGE, count=4).keypoints.shape == (0, 4, K, 2)


def test_what_is_said_exactly_is_found_exactly(x64, case):
    objects = [([[2, 3, 12, 13], [14, 2, 27, 18]], [1, 3]), ([[3, 4, 25, 16]], [0])]
    boxes, classes = filled_up(*objects)
    points = np.random.default_rng(0).uniform(2, 18, (8, 6, K, 2))
    keypoints = np.concatenate([points, np.full((8, 6, K, 1), 2.0)], -1)
    targets = assigned(boxes, classes, keypoints, 1.5, 2.0)
    sure = 40 * (jax.nn.one_hot(targets.classes, C) - 0.5)
    centerness = jnp.log(targets.centerness + 1e-9) - jnp.log1p(-targets.centerness + 1e-9)
    outputs = Outputs(sure, targets.boxes, centerness, targets.keypoints)
    (_, parts), _ = case.run(outputs, {"boxes": boxes, "classes": classes, "keypoints": keypoints})
    assert max(float(parts[name]) for name in ("classes", "boxes", "keypoints")) < NOTHING
    found = jax.jit(lambda outputs: decode(outputs, PLACES, IMAGE, count=4))(outputs)
    assert isinstance(found, Detections)
    assert (np.asarray(found.classes) >= 0).sum(1).tolist() == [2, 1, *[0] * 6]
    for n, (_, wanted) in enumerate(objects):
        got = [np.asarray(part)[n, : len(wanted)] for part in found]
        order = np.argsort(got[2])
        np.testing.assert_array_equal(got[2][order], wanted)
        np.testing.assert_allclose(got[0][order], boxes[n, : len(wanted)], atol=NOTHING)
        np.testing.assert_allclose(got[3][order], points[n, : len(wanted)], atol=NOTHING)
