"""Boxes (..., 4) as x1, y1, x2, y2: areas, overlaps, and the suppression of duplicates under jit.

A box with x2 <= x1 or y2 <= y1 has area 0 and overlaps nothing, itself included.
"""

import jax
import jax.numpy as jnp


def area(boxes: jax.Array) -> jax.Array:
    """(..., 4) -> (...): width times height, 0 for an empty or inverted box."""
    sides = jnp.maximum(boxes[..., 2:] - boxes[..., :2], 0)
    return sides[..., 0] * sides[..., 1]


def iou(a: jax.Array, b: jax.Array) -> jax.Array:
    """Intersection over union, element by element, of two arrays of boxes that broadcast; 0 if empty."""
    overlap, union = _overlap_and_union(a, b)
    return _ratio(overlap, union)


def pairwise_iou(a: jax.Array, b: jax.Array) -> jax.Array:
    """(..., n, 4), (..., m, 4) -> (..., n, m): `iou` of each box of one array with each of the other."""
    return iou(a[..., :, None, :], b[..., None, :, :])


def giou(a: jax.Array, b: jax.Array) -> jax.Array:
    """Generalized IoU, in [-1, 1], element by element, of two arrays of boxes that broadcast.

    iou - (hull - union) / hull, hull being the area of the smallest box around both (arXiv 1902.09630).
    """
    overlap, union = _overlap_and_union(a, b)
    low, high = jnp.minimum(a[..., :2], b[..., :2]), jnp.maximum(a[..., 2:], b[..., 2:])
    hull = area(jnp.concatenate([low, high], axis=-1))
    return _ratio(overlap, union) - _ratio(hull - union, hull)


def nms(boxes: jax.Array, scores: jax.Array, classes: jax.Array, iou_threshold: float) -> jax.Array:
    """Greedy suppression of duplicates within each class; fixed shapes, so it runs under jit.

    Boxes are visited from the highest score to the lowest, equal scores in the order of the input; a box that
    overlaps a kept box of its class by more than `iou_threshold` is dropped.

    Args:
      boxes: (..., D, 4).
      scores: (..., D).
      classes: (..., D) integers; boxes of a negative class are padding, which is not kept and suppresses
        nothing.
      iou_threshold: in [0, 1].

    Returns:
      (..., D) bool: whether each box is kept, in the order of the input.
    """
    order = jnp.argsort(-scores, axis=-1, stable=True)
    boxes = jnp.take_along_axis(boxes, order[..., None], axis=-2)
    classes = jnp.take_along_axis(classes, order, axis=-1)
    same = (classes[..., :, None] == classes[..., None, :]) & (classes >= 0)[..., None]
    better = jnp.tri(boxes.shape[-2], k=-1, dtype=bool)  # [i, j]: j comes before i
    drops = same & better[(None,) * (same.ndim - 2)] & (pairwise_iou(boxes, boxes) > iou_threshold)

    # "A box is kept unless a kept box before it drops it" has one solution, which is the fixed point of this
    # iteration: once the first n boxes are right they stay right, and make the next one right. The number of
    # iterations is the length of the longest chain of boxes that drop one another, a few, where a loop over
    # the boxes would take D.
    def iterate(state):
        kept, _ = state
        new = (classes >= 0) & ~jnp.any(drops & kept[..., None, :], axis=-1)
        return new, jnp.any(new != kept)

    kept, _ = jax.lax.while_loop(lambda state: state[1], iterate, (classes >= 0, jnp.array(True)))
    return jnp.take_along_axis(kept, jnp.argsort(order, axis=-1), axis=-1)


def _overlap_and_union(a: jax.Array, b: jax.Array) -> tuple[jax.Array, jax.Array]:
    low, high = jnp.maximum(a[..., :2], b[..., :2]), jnp.minimum(a[..., 2:], b[..., 2:])
    overlap = area(jnp.concatenate([low, high], axis=-1))
    return overlap, area(a) + area(b) - overlap


def _ratio(part: jax.Array, whole: jax.Array) -> jax.Array:
    """part / whole; 0, with gradients of 0, where the whole is not positive."""
    positive = whole > 0
    return jnp.where(positive, part / jnp.where(positive, whole, 1), 0)
