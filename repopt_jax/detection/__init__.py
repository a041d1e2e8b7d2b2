"""All of detection but the networks: boxes, targets, losses, decoding, evaluation and drawing."""

from repopt_jax.detection.boxes import area as area
from repopt_jax.detection.boxes import giou as giou
from repopt_jax.detection.boxes import iou as iou
from repopt_jax.detection.boxes import nms as nms
from repopt_jax.detection.boxes import pairwise_iou as pairwise_iou
from repopt_jax.detection.decode import decode as decode
from repopt_jax.detection.drawing import contact_sheet as contact_sheet
from repopt_jax.detection.drawing import draw_detections as draw_detections
from repopt_jax.detection.evaluate import evaluate_detections as evaluate_detections
from repopt_jax.detection.evaluate import to_predictions as to_predictions
from repopt_jax.detection.losses import LossWeights as LossWeights
from repopt_jax.detection.losses import detection_loss as detection_loss
from repopt_jax.detection.losses import smooth_l1 as smooth_l1
from repopt_jax.detection.outputs import Detections as Detections
from repopt_jax.detection.outputs import Locations as Locations
from repopt_jax.detection.outputs import Outputs as Outputs
from repopt_jax.detection.targets import Targets as Targets
from repopt_jax.detection.targets import assign as assign
