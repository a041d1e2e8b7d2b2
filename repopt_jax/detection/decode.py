"""From a detector's outputs to detections, under jit."""

import jax
import jax.numpy as jnp

from repopt_jax.detection.boxes import nms
from repopt_jax.detection.outputs import Detections, Locations, Outputs


def decode(
    outputs: Outputs,
    locations: Locations,
    image_size: int | tuple[int, int],
    *,
    score_threshold: float = 0.05,
    iou_threshold: float = 0.6,
    pre: int = 500,
    count: int = 100,
) -> Detections:
    """Decodes the best `count` detections of each image.

    Each pair of a location and a class is a candidate with score sqrt(sigmoid(class) * sigmoid(centerness)).
    The best `pre` candidates above `score_threshold` go through `nms`, which acts within each class.

    Args:
      outputs: of the network, for N images.
      locations: of the outputs.
      image_size: (height, width) or one number, in pixels; boxes are clipped to it.
      score_threshold: candidates must exceed it.
      iou_threshold: of `nms`.
      pre: number of candidates that `nms` is given.
      count: D, the number of detections returned; where there are fewer, they are padded with class -1, score
        0 and zeros.
    """
    height, width = (image_size, image_size) if isinstance(image_size, int) else image_size
    scores = jnp.sqrt(jax.nn.sigmoid(outputs.classes) * jax.nn.sigmoid(outputs.centerness)[..., None])
    images, num_locations, num_classes = scores.shape
    candidates = num_locations * num_classes
    scores, index = jax.lax.top_k(scores.reshape(images, candidates), min(pre, candidates))
    location, classes = index // num_classes, (index % num_classes).astype(jnp.int32)
    classes = jnp.where(scores > score_threshold, classes, -1)
    bounds = jnp.array([[[width, height, width, height]]])
    boxes = jnp.clip(_boxes_at(location, outputs, locations), 0, bounds)

    kept = nms(boxes, scores, classes, iou_threshold)
    # Candidates are sorted by score, and a stable sort keeps that order among those that are kept.
    order = jnp.argsort(~kept, axis=1, stable=True)[:, :count]
    detections = Detections(
        _take(boxes, order),
        _take(scores, order),
        _take(classes, order),
        _keypoints_at(_take(location, order), outputs, locations),
    )
    return _pad(detections, ~_take(kept, order), count)


def _boxes_at(index: jax.Array, outputs: Outputs, locations: Locations) -> jax.Array:
    """(N, P) indices of locations -> (N, P, 4) boxes in pixels."""
    points, strides = jnp.asarray(locations.points)[index], jnp.asarray(locations.strides)[index]
    distances = _take(outputs.boxes, index) * strides[..., None]
    return jnp.concatenate([points - distances[..., :2], points + distances[..., 2:]], axis=-1)


def _keypoints_at(index: jax.Array, outputs: Outputs, locations: Locations) -> jax.Array:
    """(N, P) indices of locations -> (N, P, K, 2) keypoints in pixels."""
    points, strides = jnp.asarray(locations.points)[index], jnp.asarray(locations.strides)[index]
    return points[:, :, None] + _take(outputs.keypoints, index) * strides[..., None, None]


def _take(x: jax.Array, index: jax.Array) -> jax.Array:
    """The entries (N, P, ...) of x (N, L, ...) at these indices (N, P)."""
    return jnp.take_along_axis(x, jnp.expand_dims(index, tuple(range(2, x.ndim))), axis=1)


def _pad(detections: Detections, missing: jax.Array, count: int) -> Detections:
    """Puts class -1 and zeros where a detection is missing, and pads to `count` detections."""

    def pad(x: jax.Array, value: int) -> jax.Array:
        x = jnp.where(jnp.expand_dims(missing, tuple(range(2, x.ndim))), jnp.asarray(value, x.dtype), x)
        widths = [(0, 0), (0, count - x.shape[1]), *[(0, 0)] * (x.ndim - 2)]
        return jnp.pad(x, widths, constant_values=value)

    boxes, scores, classes, keypoints = detections
    return Detections(pad(boxes, 0), pad(scores, 0), pad(classes, -1), pad(keypoints, 0))
