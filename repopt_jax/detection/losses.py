"""The loss of a detector: focal loss for classes, GIoU for boxes, and losses for centerness and keypoints.

Sources: focal loss (arXiv 1708.02002), GIoU (arXiv 1902.09630), centerness (arXiv 1904.01355).
"""

import dataclasses
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import optax

from repopt_jax.detection.boxes import giou
from repopt_jax.detection.outputs import Locations, Outputs
from repopt_jax.detection.targets import assign

# Of the focal loss, alpha_t (1 - p_t)^gamma * -log p_t: the weight of positive against negative examples, and
# the exponent by which examples that are classified well count less.
ALPHA, GAMMA = 0.25, 2.0


@dataclasses.dataclass(frozen=True)
class LossWeights:
    """Factors of the parts of the loss."""

    classes: float = 1.0
    boxes: float = 1.0
    centerness: float = 1.0
    keypoints: float = 1.0


def detection_loss(
    outputs: Outputs,
    batch: Mapping[str, jax.Array],
    locations: Locations,
    weights: LossWeights = LossWeights(),
    *,
    radius: float = 1.5,
    level_range: float = 8.0,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Computes the loss of a batch, and its parts.

    Sums over the whole batch are divided by the number of locations that have an object, or in the part of
    the keypoints by the number of labelled keypoints. Where there are none the part is 0, as are its
    gradients.

    Args:
      outputs: of the network.
      batch: `boxes` (N, M, 4), `classes` (N, M) with -1 for padding, `keypoints` (N, M, K, 3).
      locations: of the outputs.
      weights: factors of the parts.
      radius: see `assign`.
      level_range: see `assign`.

    Returns:
      The weighted sum, (), and the parts without their weights: `classes`, `boxes`, `centerness`,
      `keypoints`.
    """
    wide = jnp.promote_types(outputs.classes.dtype, jnp.float32)
    outputs = Outputs(*(jnp.asarray(x, wide) for x in outputs))
    targets = assign(
        batch["boxes"],
        batch["classes"],
        batch["keypoints"],
        locations,
        radius=radius,
        level_range=level_range,
    )
    positive = targets.classes >= 0
    count = jnp.maximum(jnp.sum(positive), 1)
    labels = jax.nn.one_hot(targets.classes, outputs.classes.shape[-1], dtype=wide)
    focal = optax.sigmoid_focal_loss(outputs.classes, labels, alpha=ALPHA, gamma=GAMMA)
    box_loss = 1 - giou(around_origin(outputs.boxes), around_origin(targets.boxes))
    centerness = optax.sigmoid_binary_cross_entropy(outputs.centerness, targets.centerness)
    offsets = smooth_l1(outputs.keypoints - targets.keypoints).sum(-1)
    parts = {
        "classes": jnp.sum(focal) / count,
        "boxes": jnp.sum(targets.centerness * box_loss) / count,
        "centerness": jnp.sum(jnp.where(positive, centerness, 0)) / count,
        "keypoints": jnp.sum(jnp.where(targets.labelled, offsets, 0))
        / jnp.maximum(jnp.sum(targets.labelled), 1),
    }
    total = sum((getattr(weights, name) * part for name, part in parts.items()), start=jnp.zeros((), wide))
    return total, parts


def smooth_l1(difference: jax.Array, *, beta: float = 1 / 9) -> jax.Array:
    """The smooth L1 loss: d^2 / (2 beta) where abs(d) < beta, else abs(d) - beta / 2.

    Differences in strides need a beta far below 1: a keypoint that is off by half a stride is often wrong.
    """
    absolute = jnp.abs(difference)
    return jnp.where(absolute < beta, difference**2 / (2 * beta), absolute - beta / 2)


def around_origin(distances: jax.Array) -> jax.Array:
    """Distances (..., 4) to the left, top, right and bottom -> the box of a location at (0, 0)."""
    return jnp.concatenate([-distances[..., :2], distances[..., 2:]], axis=-1)
