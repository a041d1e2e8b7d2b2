"""What each location of a detector should say: FCOS's assignment of objects to locations.

Source: FCOS (arXiv 1904.01355), sections 3.1 to 3.3, with centre sampling.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from repopt_jax.detection.boxes import area
from repopt_jax.detection.outputs import Locations


class Targets(NamedTuple):
    """For N images at L locations; a location without an object has class -1 and says nothing else.

    Attributes:
      classes: (N, L) int32, -1 for none.
      boxes: (N, L, 4) distances to the left, top, right and bottom side, in strides; ones where none.
      centerness: (N, L) sqrt(min(l, r) / max(l, r) * min(t, b) / max(t, b)), 0 where none.
      keypoints: (N, L, K, 2) offsets in strides, zeros where not labelled.
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
    """Gives each location the smallest of the objects that it may see, of equal ones the first.

    It may see an object if it is inside its box, nearer than `radius` strides to the box's centre in x and in
    y, and if the largest of its four distances is in (level_range / 2, level_range] strides: from 0 at the
    finest level, without end at the coarsest.

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
    places, low, high = points[:, None], boxes[None, :, :2], boxes[None, :, 2:]
    distances = jnp.concatenate([places - low, high - places], axis=-1)
    near = jnp.max(jnp.abs(places - (low + high) / 2), axis=-1) < radius * strides
    inside = jnp.min(distances, axis=-1) > 0
    smallest, largest = _level_bounds(locations, level_range)
    reach = jnp.max(distances, axis=-1)
    fits = (reach > smallest[:, None]) & (reach <= largest[:, None])
    sees = near & inside & fits & (classes >= 0)[None]

    best = jnp.argmin(jnp.where(sees, area(boxes)[None], jnp.inf), axis=1)
    found = jnp.any(sees, axis=1)
    distances = jnp.take_along_axis(distances, best[:, None, None], axis=1)[:, 0]
    distances = jnp.where(found[:, None], distances / strides, 1)
    x, y = distances[:, 0::2], distances[:, 1::2]
    ratio = (x.min(1) / x.max(1)) * (y.min(1) / y.max(1))
    chosen = keypoints[best]
    labelled = found[:, None] & (chosen[..., 2] > 0)
    offsets = (chosen[..., :2] - points[:, None]) / strides[..., None]
    return Targets(
        jnp.where(found, classes[best], -1).astype(jnp.int32),
        distances,
        jnp.where(found, jnp.sqrt(ratio), 0),
        jnp.where(labelled[..., None], offsets, 0),
        labelled,
    )


def _level_bounds(locations: Locations, level_range: float) -> tuple[jax.Array, jax.Array]:
    """(L,), (L,): between which pixels the largest distance of an object at each location must be."""
    levels, strides = locations.levels, jnp.asarray(locations.strides)
    smallest = jnp.where(levels == levels.min(), 0, level_range / 2 * strides)
    return smallest, jnp.where(levels == levels.max(), jnp.inf, level_range * strides)
