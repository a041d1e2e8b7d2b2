"""Average precision against a slow one written here, and detections as COCO's results."""

import copy

import numpy as np
import pytest

from repopt_jax.data import DetectionTransform, eval_annotations, eval_detection_batches, open_scenes
from repopt_jax.detection.evaluate import evaluate_detections, to_predictions
from repopt_jax.detection.outputs import Detections

THRESHOLDS = np.arange(50, 100, 5) / 100
SIGMAS = (0.1, 0.05)
EXACT = 1e-9


# -- a slow reference ----------------------------------------------------------------------------------


def iou(a, b):
    width = max(0, min(a[0] + a[2], b[0] + b[2]) - max(a[0], b[0]))
    height = max(0, min(a[1] + a[3], b[1] + b[3]) - max(a[1], b[1]))
    return width * height / (a[2] * a[3] + b[2] * b[3] - width * height)


def oks(truth, prediction):
    total = []
    for (x, y, flag), (u, v, _), sigma in zip(
        np.reshape(truth["keypoints"], (-1, 3)), np.reshape(prediction["keypoints"], (-1, 3)), SIGMAS
    ):
        if flag > 0:
            total.append(np.exp(-((x - u) ** 2 + (y - v) ** 2) / (8 * truth["area"] * sigma**2)))
    return np.mean(total)


def slow_precision(found, total):
    """Mean over 101 recalls of the best precision at that recall or more; `found`: hits, best score first."""
    hits = np.cumsum(found)
    precision = hits / np.arange(1, len(hits) + 1)
    recall = hits / total
    at = [precision[recall >= r - 1e-12] for r in np.arange(101) / 100]
    return np.mean([p.max() if len(p) else 0 for p in at])


def slow_ap(truth, predictions, similarity, threshold):
    """Without crowds, and without objects that have no labelled keypoints."""
    values = []
    for category in {a["category_id"] for a in truth["annotations"]}:
        wanted = [a for a in truth["annotations"] if a["category_id"] == category]
        given = [p for p in predictions if p["category_id"] == category]
        taken, found = set(), []
        for p in sorted(given, key=lambda p: -p["score"]):
            best = None
            for a in wanted:
                if a["image_id"] == p["image_id"] and a["id"] not in taken:
                    likeness = similarity(a, p)
                    if likeness >= threshold and (best is None or likeness > best[0]):
                        best = likeness, a["id"]
            found.append(best is not None)
            if best:
                taken.add(best[1])
        values.append(slow_precision(found, len(wanted)) if found else 0.0)
    return np.mean(values)


def slow_metrics(truth, predictions):
    def boxes(a, p):
        return iou(a["bbox"], p["bbox"])

    return {
        "ap": np.mean([slow_ap(truth, predictions, boxes, t) for t in THRESHOLDS]),
        "ap50": slow_ap(truth, predictions, boxes, 0.5),
        "ap75": slow_ap(truth, predictions, boxes, 0.75),
        "keypoint_ap": np.mean([slow_ap(truth, predictions, oks, t) for t in THRESHOLDS]),
        "keypoint_ap50": slow_ap(truth, predictions, oks, 0.5),
    }


# -- cases ---------------------------------------------------------------------------------------------


def make_truth(objects, images=2):
    """Objects: (image, class, box x, y, w, h)."""
    annotations = [
        {
            "id": i + 1,
            "image_id": image,
            "category_id": category,
            "bbox": list(map(float, box)),
            "area": float(box[2] * box[3]),
            "iscrowd": 0,
            "keypoints": [box[0], box[1], 2.0, box[0] + box[2], box[1] + box[3], 1.0],
            "num_keypoints": 2,
        }
        for i, (image, category, *box) in enumerate(objects)
    ]
    return {
        "images": [{"id": i + 1} for i in range(images)],
        "annotations": annotations,
        "categories": [{"id": c, "name": str(c), "keypoints": ["p", "q"], "skeleton": []} for c in (1, 2)],
    }


def predict(annotation, score, *, category=None, shift=0.0):
    x, y, w, h = annotation["bbox"]
    points = np.reshape(annotation["keypoints"], (2, 3)) + np.array([shift, 0, 0])
    points[:, 2] = 1
    return {
        "image_id": annotation["image_id"],
        "category_id": category or annotation["category_id"],
        "bbox": [x + shift, y, w, h],
        "score": score,
        "keypoints": points.ravel().tolist(),
    }


FOUR = make_truth([(1, 1, 0, 0, 20, 20), (1, 1, 30, 5, 10, 30), (2, 1, 3, 3, 12, 12), (2, 1, 20, 20, 9, 9)])
ONE, TWO, THREE, LAST = FOUR["annotations"]
TWO_CLASSES = make_truth([(1, 1, 0, 0, 20, 20), (2, 2, 5, 5, 10, 10)])
ALL = [predict(a, 0.9 - 0.1 * i) for i, a in enumerate(FOUR["annotations"])]
# A prefix of 51 of the 101 recalls lies at or below one half.
HALF = 51 / 101

CASES = {
    "all": (FOUR, ALL, 1.0),
    "half": (FOUR, ALL[:2], HALF),
    "a duplicate after all": (FOUR, [*ALL, predict(ONE, 0.1)], 1.0),
    # Hits at ranks 1, 3, 4, 5: precision 1 up to recall 1/4 (26 points), then 4/5.
    "a duplicate before the rest": (FOUR, [*ALL, predict(ONE, 0.85)], (26 + 75 * 0.8) / 101),
    "another class": (TWO_CLASSES, [predict(a, 0.9, category=1) for a in TWO_CLASSES["annotations"]], 0.5),
    "one class of two": (TWO_CLASSES, [predict(TWO_CLASSES["annotations"][0], 0.9)], 0.5),
    "beside": (FOUR, [predict(a, 0.9, shift=100) for a in FOUR["annotations"]], 0.0),
}


@pytest.mark.parametrize("name", CASES)
def test_ap_of_plain_cases(name):
    truth, predictions, expected = CASES[name]
    measured = evaluate_detections(truth, predictions, sigmas=SIGMAS)
    assert measured["ap50"] == pytest.approx(expected, abs=EXACT)
    assert measured["keypoint_ap50"] == pytest.approx(expected, abs=EXACT)
    for metric, value in slow_metrics(truth, predictions).items():
        assert measured[metric] == pytest.approx(value, abs=EXACT), metric


@pytest.mark.parametrize("seed", range(6))
def test_ap_of_noisy_detections_is_that_of_the_slow_reference(seed):
    rng = np.random.default_rng(seed)
    # Of 7 and of 9 no part but the whole is a number of hundredths, where the last bit of a quotient decides.
    objects = [
        (rng.integers(1, 5), category, *rng.uniform(0, 60, 2), *rng.uniform(8, 30, 2))
        for category in np.repeat([1, 2], [7, 9])
    ]
    truth = make_truth(objects, images=4)
    predictions = []
    for annotation in [*truth["annotations"], *truth["annotations"][:6]]:
        prediction = predict(annotation, float(rng.random()))
        prediction["bbox"] = (np.array(prediction["bbox"]) + rng.normal(0, 1.5, 4)).tolist()
        prediction["keypoints"] = (np.array(prediction["keypoints"]) + rng.normal(0, 1.5, 6)).tolist()
        predictions.append(prediction)
    measured = evaluate_detections(truth, predictions, sigmas=SIGMAS)
    expected = slow_metrics(truth, predictions)
    for metric, value in expected.items():
        assert measured[metric] == pytest.approx(value, abs=EXACT), metric
    # Other constants are another measure, and the order of the scores counts.
    others = evaluate_detections(truth, predictions, sigmas=[3 * s for s in SIGMAS])
    assert others["keypoint_ap"] > expected["keypoint_ap"] + 0.05
    assert others["ap"] == measured["ap"]
    turned = [{**p, "score": 1 - p["score"]} for p in predictions]
    assert abs(evaluate_detections(truth, turned, sigmas=SIGMAS)["ap"] - expected["ap"]) > 1e-3


def test_a_crowd_is_neither_missed_nor_a_mistake():
    truth = copy.deepcopy(FOUR)
    truth["annotations"][0]["iscrowd"] = 1
    measured = evaluate_detections(truth, ALL[1:], sigmas=())
    assert measured["ap"] == pytest.approx(1, abs=EXACT)
    inside = {**predict(ONE, 0.99), "bbox": [2, 2, 5, 5]}
    assert evaluate_detections(truth, [*ALL[1:], inside], sigmas=())["ap"] == pytest.approx(1, abs=EXACT)
    assert evaluate_detections(FOUR, [*ALL[1:], inside], sigmas=())["ap50"] < 0.8


def test_objects_without_labelled_keypoints_do_not_count_for_keypoints():
    truth = copy.deepcopy(FOUR)
    truth["annotations"][0].update(keypoints=[0] * 6, num_keypoints=0)
    measured = evaluate_detections(truth, ALL[1:], sigmas=SIGMAS)
    assert measured["keypoint_ap50"] == pytest.approx(1, abs=EXACT)
    assert measured["ap50"] < 0.8


def test_nothing_predicted_is_zero_and_nothing_to_find_is_none():
    assert evaluate_detections(FOUR, [], sigmas=SIGMAS) == dict.fromkeys(
        ("ap", "ap50", "ap75", "keypoint_ap", "keypoint_ap50"), 0.0
    )
    measured = evaluate_detections(FOUR, ALL, sigmas=())
    assert measured["ap"] == 1
    assert measured["keypoint_ap"] is None
    assert measured["keypoint_ap50"] is None
    assert set(evaluate_detections(make_truth([]), ALL[:1], sigmas=SIGMAS).values()) == {None}


def test_nothing_is_printed_or_changed(capsys):
    truth, predictions = copy.deepcopy(FOUR), copy.deepcopy(ALL)
    evaluate_detections(truth, predictions, sigmas=SIGMAS)
    assert capsys.readouterr() == ("", "")
    assert truth == FOUR
    assert predictions == ALL


def test_refusals():
    with pytest.raises(ValueError, match=r"images that `ground_truth` does not have: ids \[7\]"):
        evaluate_detections(FOUR, [{**ALL[0], "image_id": 7}], sigmas=SIGMAS)
    with pytest.raises(ValueError, match="`sigmas` has 3 numbers, but `ground_truth` has objects of 2"):
        evaluate_detections(FOUR, ALL, sigmas=(0.1,) * 3)
    with pytest.raises(ValueError, match="`predictions` has objects of 1 keypoints"):
        evaluate_detections(FOUR, [{**ALL[0], "keypoints": [1, 2, 1]}], sigmas=SIGMAS)


# -- detections as results -----------------------------------------------------------------------------


def detections(num_keypoints=2):
    return Detections(
        boxes=np.array([[[2, 4, 12, 8], [0, 0, 0, 0]], [[1, 1, 3, 3], [6, 0, 8, 4]]], np.float32),
        scores=np.array([[0.5, 0], [0.75, 0.25]], np.float32),
        classes=np.array([[3, -1], [0, 1]], np.int32),
        keypoints=np.arange(2 * 2 * num_keypoints * 2, dtype=np.float32).reshape(2, 2, num_keypoints, 2),
    )


def test_detections_become_results_in_pixels_of_the_stored_image():
    found = to_predictions(detections(), np.array([4, 0], np.int32), np.array([2.0, 0.5], np.float32))
    assert found == [
        {
            "image_id": 5,
            "category_id": 4,
            "bbox": [1, 2, 5, 2],
            "score": 0.5,
            "keypoints": [0, 0.5, 1, 1, 1.5, 1],
        },
        {
            "image_id": 1,
            "category_id": 1,
            "bbox": [2, 2, 4, 4],
            "score": 0.75,
            "keypoints": [16, 18, 1, 20, 22, 1],
        },
        {
            "image_id": 1,
            "category_id": 2,
            "bbox": [12, 0, 4, 8],
            "score": 0.25,
            "keypoints": [24, 26, 1, 28, 30, 1],
        },
    ]


def test_detections_without_keypoints():
    found = to_predictions(detections(0), np.array([0, 1]), np.array([1.0, 1.0]))
    assert len(found) == 3
    assert not any("keypoints" in prediction for prediction in found)


def test_the_truth_of_a_data_set_found_in_its_batches_is_perfect():
    source = open_scenes(0, num_train=1, num_eval=10)
    predictions, unscaled, seen = [], [], []
    transform = DetectionTransform(image_size=96)
    for batch in eval_detection_batches(source, transform, batch_size=4, limit=7):
        real = batch["mask"] == 1
        scores = np.ones(batch["classes"].shape, np.float32)
        found = Detections(batch["boxes"], scores, batch["classes"], batch["keypoints"][..., :2])
        found = Detections(*(part[real] for part in found))
        predictions += to_predictions(found, batch["index"][real], batch["ratio"][real])
        unscaled += to_predictions(found, batch["index"][real], np.ones(real.sum()))
        seen += batch["index"][real].tolist()
    truth = eval_annotations(source, seen)
    measured = evaluate_detections(truth, predictions, sigmas=source.info.sigmas)
    assert measured == dict.fromkeys(measured, pytest.approx(1, abs=EXACT))
    wrong = evaluate_detections(truth, unscaled, sigmas=source.info.sigmas)
    assert max(value for value in wrong.values() if value is not None) < 0.3
