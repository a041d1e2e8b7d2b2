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
    """The best `count` detections of each image.

    A location and a class are a candidate with score sqrt(sigmoid(class) * sigmoid(centerness)). The best
    `pre` above `score_threshold` go through `nms` within their class.

    Args:
      outputs: of the network, for N images.
      locations: where they are.
      image_size: (height, width) or one number, in pixels; boxes are cut there.
      score_threshold: candidates that do not exceed it are no detections.
      iou_threshold: of `nms`.
      pre: candidates that `nms` sees.
      count: D, detections returned; where there are fewer, the rest has class -1, score 0 and zeros.
    """
    height, width = (image_size, image_size) if isinstance(image_size, int) else image_size
    scores = jnp.sqrt(jax.nn.sigmoid(outputs.classes) * jax.nn.sigmoid(outputs.centerness)[..., None])
    images, places, num_classes = scores.shape
    scores, index = jax.lax.top_k(scores.reshape(images, -1), min(pre, places * num_classes))
    place, classes = index // num_classes, (index % num_classes).astype(jnp.int32)
    classes = jnp.where(scores > score_threshold, classes, -1)
    boxes = jnp.clip(_boxes_at(place, outputs, locations), 0, jnp.array([[[width, height, width, height]]]))

    kept = nms(boxes, scores, classes, iou_threshold)
    # Candidates come best first, and a stable sort keeps that order among those that are kept.
    order = jnp.argsort(~kept, axis=1, stable=True)[:, :count]
    place = _chosen(place, order)
    found = Detections(
        _chosen(boxes, order),
        _chosen(scores, order),
        _chosen(classes, order),
        _keypoints_at(place, outputs, locations),
    )
    return _blanked(found, ~_chosen(kept, order), count)


def _boxes_at(place: jax.Array, outputs: Outputs, locations: Locations) -> jax.Array:
    """(N, P) numbers of locations -> (N, P, 4) boxes in pixels."""
    points, strides = jnp.asarray(locations.points)[place], jnp.asarray(locations.strides)[place]
    distances = _chosen(outputs.boxes, place) * strides[..., None]
    return jnp.concatenate([points - distances[..., :2], points + distances[..., 2:]], axis=-1)


def _keypoints_at(place: jax.Array, outputs: Outputs, locations: Locations) -> jax.Array:
    """(N, P) numbers of locations -> (N, P, K, 2) keypoints in pixels."""
    points, strides = jnp.asarray(locations.points)[place], jnp.asarray(locations.strides)[place]
    return points[:, :, None] + _chosen(outputs.keypoints, place) * strides[..., None, None]


def _chosen(x: jax.Array, index: jax.Array) -> jax.Array:
    """Entries (N, P, ...) of x (N, L, ...) with these numbers (N, P)."""
    return jnp.take_along_axis(x, jnp.expand_dims(index, tuple(range(2, x.ndim))), axis=1)


def _blanked(found: Detections, missing: jax.Array, count: int) -> Detections:
    """Class -1 and zeros where a detection is missing, and `count` in all."""

    def filled(x: jax.Array, empty: int) -> jax.Array:
        x = jnp.where(jnp.expand_dims(missing, tuple(range(2, x.ndim))), jnp.asarray(empty, x.dtype), x)
        rest = [(0, 0), (0, count - x.shape[1]), *[(0, 0)] * (x.ndim - 2)]
        return jnp.pad(x, rest, constant_values=empty)

    boxes, scores, classes, keypoints = found
    return Detections(filled(boxes, 0), filled(scores, 0), filled(classes, -1), filled(keypoints, 0))
