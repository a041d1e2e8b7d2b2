"""Average precision of boxes and keypoints, as COCO defines it, by COCO's own evaluator (`pycocotools`)."""

import contextlib
import io
from collections.abc import Sequence
from typing import Any

import numpy as np

from repopt_jax.arguments import check_array, check_kind
from repopt_jax.detection.outputs import Detections


def evaluate_detections(
    ground_truth: dict[str, Any], predictions: Sequence[dict[str, Any]], *, sigmas: Sequence[float]
) -> dict[str, float | None]:
    """Average precision, the mean over classes, of boxes (by intersection over union) and keypoints (by OKS).

    Args:
      ground_truth: in COCO's format, from `data.eval_annotations`. Neither it nor `predictions` is changed.
      predictions: in COCO's format of results, from `to_predictions`. Of each image and class the best 100
        are considered for boxes, and the best 20 for keypoints.
      sigmas: of each keypoint, see `data.DetectionInfo`: the object keypoint similarity (OKS) is the mean
        over the labelled keypoints of exp(-d^2 / (8 area sigma^2)), d the distance. Empty: no keypoints.

    Returns:
      Numbers in [0, 1]: "ap", the mean over the thresholds 0.50, 0.55 ... 0.95; "ap50" and "ap75", at one
      threshold; "keypoint_ap" and "keypoint_ap50". None where they are not defined: without objects, or
      without labelled keypoints.

    Raises:
      ModuleNotFoundError: pycocotools is not installed; pip install 'repopt_jax[detect]'.
      ValueError: `sigmas` does not fit the keypoints, or a prediction is of an image that is not evaluated.
    """
    check_kind("ground_truth", ground_truth, dict, "a dict such as `data.eval_annotations` returns")
    if missing := sorted({"images", "annotations", "categories"} - ground_truth.keys()):
        raise ValueError(
            f"`ground_truth` has no {', '.join(missing)}: give what `data.eval_annotations` returns"
        )
    check_kind("predictions", predictions, (list, tuple), "a list such as `to_predictions` returns")
    check_kind("sigmas", sigmas, (list, tuple), "a number for each keypoint, in a list")
    _check(ground_truth, predictions, len(sigmas))
    annotations = ground_truth["annotations"]
    boxes = any(not a["iscrowd"] for a in annotations)
    keypoints = bool(sigmas) and any(a["num_keypoints"] and not a["iscrowd"] for a in annotations)
    ap, ap50, ap75 = _summary(ground_truth, predictions, "bbox") if boxes else (None,) * 3
    keypoint_ap, keypoint_ap50, _ = (
        _summary(ground_truth, predictions, "keypoints", sigmas) if keypoints else (None,) * 3
    )
    return {
        "ap": ap,
        "ap50": ap50,
        "ap75": ap75,
        "keypoint_ap": keypoint_ap,
        "keypoint_ap50": keypoint_ap50,
    }


def to_predictions(detections: Detections, index: np.ndarray, ratio: np.ndarray) -> list[dict[str, Any]]:
    """Converts the detections of a batch to COCO's format of results, in pixels of the images as stored.

    Boxes are clipped to the network's square, not to the image: a batch does not hold the sizes of its
    images, so that the part of a box in the padding of an image that is not square stays part of it.

    Args:
      detections: NumPy arrays, N images, in pixels of the network's letterboxed image. Those of class -1 are
        left out.
      index: int (N,), positions of the images in their split; ids are index + 1, as `data.eval_annotations`
        has them.
      ratio: float (N,), network pixels for one pixel of the image, as in a batch.

    Returns:
      For each detection {"image_id", "category_id" (class + 1), "bbox" (x, y, width, height), "score"} and,
      if there are keypoints, "keypoints" (x, y, 1 of each).
    """
    check_kind("detections", detections, Detections, "`Detections`, such as `decode` returns")
    check_array("index", index)
    check_array("ratio", ratio)
    boxes, scores, classes, keypoints = (np.asarray(part) for part in detections)
    boxes = boxes.astype(float) / ratio[:, None, None]
    keypoints = keypoints.astype(float) / ratio[:, None, None, None]
    boxes[..., 2:] -= boxes[..., :2]
    keypoints = np.concatenate([keypoints, np.ones_like(keypoints[..., :1])], -1)
    predictions = []
    for n, d in zip(*np.nonzero(classes >= 0), strict=True):
        prediction = {
            "image_id": int(index[n]) + 1,
            "category_id": int(classes[n, d]) + 1,
            "bbox": boxes[n, d].tolist(),
            "score": float(scores[n, d]),
        }
        if keypoints.shape[2]:
            prediction["keypoints"] = keypoints[n, d].ravel().tolist()
        predictions.append(prediction)
    return predictions


def _summary(
    ground_truth: dict[str, Any],
    predictions: Sequence[dict[str, Any]],
    kind: str,
    sigmas: Sequence[float] = (),
) -> tuple[float, float, float]:
    """(mean over thresholds, at 0.50, at 0.75) of `kind`, "bbox" or "keypoints"."""
    if not predictions:
        return 0.0, 0.0, 0.0
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    # pycocotools prints its progress, and writes into the dicts that it is given.
    with contextlib.redirect_stdout(io.StringIO()):
        truth: Any = COCO()
        truth.dataset = {**ground_truth, "annotations": [dict(a) for a in ground_truth["annotations"]]}
        truth.createIndex()
        evaluation: Any = COCOeval(truth, truth.loadRes([dict(p) for p in predictions]), kind)  # pyright: ignore[reportArgumentType]
        if kind == "keypoints":
            evaluation.params.kpt_oks_sigmas = np.asarray(sigmas, float)
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    ap, ap50, ap75 = evaluation.stats[:3]
    return float(ap), float(ap50), float(ap75)


def _check(ground_truth: dict[str, Any], predictions: Sequence[dict[str, Any]], num_keypoints: int) -> None:
    images = {image["id"] for image in ground_truth["images"]}
    unknown = sorted({p["image_id"] for p in predictions} - images)
    if unknown:
        raise ValueError(f"`predictions` are of images that `ground_truth` does not have: ids {unknown[:5]}")
    for name, entries in (("ground_truth", ground_truth["annotations"]), ("predictions", predictions)):
        counts = {len(entry.get("keypoints", ())) // 3 for entry in entries} - {num_keypoints}
        if num_keypoints and counts:
            raise ValueError(
                f"`sigmas` has {num_keypoints} numbers, but `{name}` has objects of {min(counts)} keypoints"
            )
