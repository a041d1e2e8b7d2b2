"""Training targets of each location of a detector: FCOS's assignment of objects to locations.

Source: FCOS (arXiv 1904.01355), sections 3.1 to 3.3, with centre sampling.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from repopt_jax.detection.boxes import area
from repopt_jax.detection.outputs import Locations


class Targets(NamedTuple):
    """The targets of N images at L locations; a location without an object has class -1 and no other target.

    Attributes:
      classes: (N, L) int32, -1 without an object.
      boxes: (N, L, 4) distances to the left, top, right and bottom side, in strides; 1 without an object.
      centerness: (N, L) sqrt(min(l, r) / max(l, r) * min(t, b) / max(t, b)); 0 without an object.
      keypoints: (N, L, K, 2) offsets in strides, 0 where not labelled.
      labelled: (N, L, K) bool.
    """

    classes: jax.Array
    boxes: jax.Array
    centerness: jax.Array
    keypoints: jax.Array
    labelled: jax.Array


def assign(
    boxes: jax.Array,
    classes: jax.Array,
    keypoints: jax.Array,
    locations: Locations,
    *,
    radius: float = 1.5,
    level_range: float = 8.0,
) -> Targets:
    """Assigns to each location the smallest of the objects that are eligible, the first of equal ones.

    An object is eligible if the location is inside its box, nearer than `radius` strides to the centre of the
    box in x and in y, and if the largest of the four distances to its sides is in (level_range / 2,
    level_range] strides; the range begins at 0 for the finest level and has no end for the coarsest.

    Args:
      boxes: (N, M, 4) x1, y1, x2, y2 in pixels.
      classes: (N, M) integers, -1 for padding.
      keypoints: (N, M, K, 3) x, y and v in pixels; v = 0 means not labelled.
      locations: of the network's outputs.
      radius: of centre sampling, in strides.
      level_range: the largest distance of a level, in strides.
    """

    def one_image(boxes, classes, keypoints):
        return _assign_image(boxes, classes, keypoints, locations, radius, level_range)

    return jax.vmap(one_image)(boxes, classes, keypoints)


def _assign_image(boxes, classes, keypoints, locations, radius, level_range) -> Targets:
    points, strides = jnp.asarray(locations.points), jnp.asarray(locations.strides)[:, None]
    centres, low, high = points[:, None], boxes[None, :, :2], boxes[None, :, 2:]
    distances = jnp.concatenate([centres - low, high - centres], axis=-1)
    near = jnp.max(jnp.abs(centres - (low + high) / 2), axis=-1) < radius * strides
    inside = jnp.min(distances, axis=-1) > 0
    smallest, largest = _level_bounds(locations, level_range)
    longest = jnp.max(distances, axis=-1)
    in_range = (longest > smallest[:, None]) & (longest <= largest[:, None])
    eligible = near & inside & in_range & (classes >= 0)[None]

    best = jnp.argmin(jnp.where(eligible, area(boxes)[None], jnp.inf), axis=1)
    positive = jnp.any(eligible, axis=1)
    distances = jnp.take_along_axis(distances, best[:, None, None], axis=1)[:, 0]
    distances = jnp.where(positive[:, None], distances / strides, 1)
    x, y = distances[:, 0::2], distances[:, 1::2]
    ratio = (x.min(1) / x.max(1)) * (y.min(1) / y.max(1))
    assigned = keypoints[best]
    labelled = positive[:, None] & (assigned[..., 2] > 0)
    offsets = (assigned[..., :2] - points[:, None]) / strides[..., None]
    return Targets(
        jnp.where(positive, classes[best], -1).astype(jnp.int32),
        distances,
        jnp.where(positive, jnp.sqrt(ratio), 0),
        jnp.where(labelled[..., None], offsets, 0),
        labelled,
    )


def _level_bounds(locations: Locations, level_range: float) -> tuple[jax.Array, jax.Array]:
    """(L,), (L,): the range in pixels of the largest distance of an object, for each location."""
    levels, strides = locations.levels, jnp.asarray(locations.strides)
    smallest = jnp.where(levels == levels.min(), 0, level_range / 2 * strides)
    return smallest, jnp.where(levels == levels.max(), jnp.inf, level_range * strides)
