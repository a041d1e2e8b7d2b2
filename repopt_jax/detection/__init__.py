"""All of detection but the networks: boxes, targets, losses, decoding, evaluation and drawing."""

from repopt_jax import extras

extras.require("PIL", by=__name__)

from repopt_jax.detection.boxes import area, giou, iou, nms, pairwise_iou
from repopt_jax.detection.decode import decode
from repopt_jax.detection.drawing import contact_sheet, draw_detections
from repopt_jax.detection.evaluate import evaluate_detections, to_predictions
from repopt_jax.detection.losses import LossWeights, detection_loss, smooth_l1
from repopt_jax.detection.outputs import Detections, Locations, Outputs
from repopt_jax.detection.targets import Targets, assign

__all__ = [
    "Detections",
    "Locations",
    "LossWeights",
    "Outputs",
    "Targets",
    "area",
    "assign",
    "contact_sheet",
    "decode",
    "detection_loss",
    "draw_detections",
    "evaluate_detections",
    "giou",
    "iou",
    "nms",
    "pairwise_iou",
    "smooth_l1",
    "to_predictions",
]
