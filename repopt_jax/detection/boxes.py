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
    """Intersection over union of boxes that stand at the same place of two arrays, which may broadcast; 0
    where the union is empty."""
    overlap, union = _overlap_and_union(a, b)
    return _ratio(overlap, union)


def pairwise_iou(a: jax.Array, b: jax.Array) -> jax.Array:
    """(..., n, 4), (..., m, 4) -> (..., n, m): `iou` of each with each."""
    return iou(a[..., :, None, :], b[..., None, :, :])


def giou(a: jax.Array, b: jax.Array) -> jax.Array:
    """Generalized IoU, in [-1, 1], of boxes at the same place of two arrays, which may broadcast.

    iou - (hull - union) / hull, hull being the area of the smallest box around both (arXiv 1902.09630).
    """
    overlap, union = _overlap_and_union(a, b)
    low, high = jnp.minimum(a[..., :2], b[..., :2]), jnp.maximum(a[..., 2:], b[..., 2:])
    hull = area(jnp.concatenate([low, high], axis=-1))
    return _ratio(overlap, union) - _ratio(hull - union, hull)


def nms(boxes: jax.Array, scores: jax.Array, classes: jax.Array, iou_threshold: float) -> jax.Array:
    """Greedy suppression of duplicates within each class; fixed shapes, so it runs under jit.

    Boxes are visited from the best score to the worst, of equal ones the first one first; one that overlaps a
    kept box of its class by more than `iou_threshold` is dropped.

    Args:
      boxes: (..., D, 4).
      scores: (..., D).
      classes: (..., D) integers; a negative class is padding, never kept and never in the way.
      iou_threshold: in [0, 1].

    Returns:
      (..., D) bool: which are kept, in the order of the input.
    """
    order = jnp.argsort(-scores, axis=-1, stable=True)
    boxes = jnp.take_along_axis(boxes, order[..., None], axis=-2)
    classes = jnp.take_along_axis(classes, order, axis=-1)
    same = (classes[..., :, None] == classes[..., None, :]) & (classes >= 0)[..., None]
    better = jnp.tri(boxes.shape[-2], k=-1, dtype=bool)  # [i, j]: j comes before i
    drops = same & better[(None,) * (same.ndim - 2)] & (pairwise_iou(boxes, boxes) > iou_threshold)

    # "Kept unless a kept one before drops it" has one solution, and repeating it finds it: what is right for
    # the first n boxes stays right, and makes the next one right. It settles after as many rounds as the
    # longest chain of boxes that drop one another has members, a few, where a loop over boxes would take D.
    def again(state):
        kept, _ = state
        new = (classes >= 0) & ~jnp.any(drops & kept[..., None, :], axis=-1)
        return new, jnp.any(new != kept)

    kept, _ = jax.lax.while_loop(lambda state: state[1], again, (classes >= 0, jnp.array(True)))
    return jnp.take_along_axis(kept, jnp.argsort(order, axis=-1), axis=-1)


def _overlap_and_union(a: jax.Array, b: jax.Array) -> tuple[jax.Array, jax.Array]:
    low, high = jnp.maximum(a[..., :2], b[..., :2]), jnp.minimum(a[..., 2:], b[..., 2:])
    overlap = area(jnp.concatenate([low, high], axis=-1))
    return overlap, area(a) + area(b) - overlap


def _ratio(part: jax.Array, whole: jax.Array) -> jax.Array:
    """part / whole, 0 where the whole is not positive, also in gradients."""
    positive = whole > 0
    return jnp.where(positive, part / jnp.where(positive, whole, 1), 0)
