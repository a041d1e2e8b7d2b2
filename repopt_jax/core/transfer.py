"""Scales for one network from those of another: layers by their place, channels by whole trajectories.

A *stage* is a run of layers of one width and resolution; layer i of it is the i-th after the one that opens
it (l of the depth rule). In the published files the mean of a layer's scales depends on the absolute i, and
hardly on the width: those of RepOpt-VGG-B1 predict B2, which is 1.25 times as wide.

Permuting the channels of all layers of a stage in the same way changes nothing about the training of an
ungrouped or depthwise network, so a channel of the source may become any channel of the target, if it does so
in all layers of the stage. Within a stage the scales of a channel are strongly correlated from layer to layer
and from branch to branch. So whole channels are resampled, with all their vectors along the stage.
"""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from repopt_jax.core import paths
from repopt_jax.core.branches import BranchSet

Depths = Mapping[str, int | Sequence[Any] | np.ndarray]
Vectors = Mapping[str, Mapping[str, Any]]


class Place(NamedTuple):
    """One layer: its kernel's path, its index in the stack at that path, and where it stands in the network.

    Attributes:
      path, at: which layer.
      stage: number of the stage, from 0.
      index: i, from 0 at the layer that opens the stage.
      turn: how many layers of the stage before it have the same i.
      width: output channels.
    """

    path: str
    at: tuple[int, ...]
    stage: int
    index: int
    turn: int
    width: int


def places(branch_sets: Mapping[str, BranchSet], depths: Depths) -> list[Place]:
    """Returns the layers in the order of their paths, numbers in paths as numbers, with their stages.

    A stage begins at a layer with l = 0, and where l falls.
    """
    found: list[Place] = []
    stage, before, turns = -1, 0, {}
    for path in sorted(branch_sets, key=paths.natural_order):
        branches = branch_sets[path]
        along = np.broadcast_to(np.asarray(depths[path]), branches.stack)
        for at in np.ndindex(*branches.stack):
            index = int(along[at])
            if stage < 0 or index == 0 or index < before:
                stage, turns = stage + 1, {}
            turns[index] = turns.get(index, -1) + 1
            found.append(Place(path, at, stage, index, turns[index], branches.out))
            before = index
    return found


def counted_depths(branch_sets: Mapping[str, BranchSet]) -> dict[str, np.ndarray]:
    """Returns l of every layer as far as branches tell it, by path, of the stack's shape.

    l is 0 where a stage begins: at a layer that changes the width, that has another width than the layer
    before it, or that lacks the identity where others have it, as one with a stride does. From there it
    counts.
    """
    some_have_it = any(_with_identity(bs) for bs in branch_sets.values())

    def repeats(branches: BranchSet) -> bool:
        keeps_width = branches.canonical[-2] * branches.groups == branches.out
        return keeps_width and (_with_identity(branches) or not some_have_it)

    ordered = ((path, branch_sets[path]) for path in sorted(branch_sets, key=paths.natural_order))
    return count_depths((path, bs.out, bs.stack, repeats(bs)) for path, bs in ordered)


def count_depths(layers: Iterable[tuple[str, int, tuple[int, ...], bool]]) -> dict[str, np.ndarray]:
    """Returns l of layers that follow each other, by path, of the stack's shape.

    Args:
      layers: (path, outputs, stack, whether the layer can continue a row of equal ones) of each, in order.
        l counts from 0 through layers that continue a row of the same width, along their stacks too, and is 0
        in all others.
    """
    depths: dict[str, np.ndarray] = {}
    width, following = 0, 0  # of the layer before; l of the next layer of the same row
    for path, outputs, stack, repeats in layers:
        first = following if repeats and outputs == width else 0
        along = np.arange(math.prod(stack)).reshape(stack)
        depths[path] = first + along if repeats else np.zeros(stack, int)
        width, following = outputs, int(depths[path].max()) + 1
    return depths


def transferred(
    source: Mapping[str, BranchSet],
    vectors: Vectors,
    source_depths: Depths,
    branch_sets: Mapping[str, BranchSet],
    depths: Depths,
) -> dict[str, dict[str, np.ndarray]]:
    """Returns vectors for `branch_sets` from those of the source, as `Scales.transfer` says.

    Raises:
      ValueError: branches that no layer of the source has, with all their layers.
    """
    origin = _Source(source, vectors, source_depths)
    made = {
        path: {name: np.zeros(bs.vector_shape, np.float32) for name in bs.names}
        for path, bs in branch_sets.items()
    }
    missing: dict[str, list[str]] = {}
    ranks: dict[tuple[int, int], np.ndarray] = {}  # (stage, width) of the target -> rank in [0, 1) by channel
    for place in places(branch_sets, depths):
        first = origin.nearest(place)
        if (place.stage, place.width) not in ranks:
            ranks[place.stage, place.width] = origin.spread(first, place.width)
        rank = ranks[place.stage, place.width]
        for name in branch_sets[place.path].names:
            layer = origin.with_branch(first, name)
            if layer is None:
                missing.setdefault(name, []).append(place.path)
            else:
                made[place.path][name][place.at] = origin.vector(layer, name)[origin.channels(layer, rank)]
    if missing:
        listed = "; ".join(
            f"{name} of {paths.listed(list(dict.fromkeys(at)))}" for name, at in missing.items()
        )
        raise ValueError(
            f"`source` has no layer with these branches: {listed}. It has "
            f"{', '.join(dict.fromkeys(n for bs in source.values() for n in bs.names))}: transfer to layers "
            "of the same branches, or search"
        )
    return made


class _Source:
    """The layers that scales are taken from."""

    def __init__(self, branch_sets: Mapping[str, BranchSet], vectors: Vectors, depths: Depths):
        self.branch_sets = branch_sets
        self.arrays = {p: {n: np.asarray(v) for n, v in of.items()} for p, of in vectors.items()}
        self.places = places(branch_sets, depths)
        self.stages: dict[int, list[Place]] = {}
        for place in self.places:
            self.stages.setdefault(place.stage, []).append(place)
        self.longest = max(self.stages, key=lambda stage: len(self.stages[stage]))  # the first of several
        self.orders: dict[tuple[int, int], np.ndarray] = {}

    def nearest(self, place: Place) -> Place:
        """Returns the layer of the same stage and i; where the source has none, of its longest stage and the
        same i; beyond its end the last layer there."""
        for stage in (place.stage, self.longest):
            if same := [p for p in self.stages.get(stage, ()) if p.index == place.index]:
                return same[min(place.turn, len(same) - 1)]
        return self.stages[self.longest][-1]

    def with_branch(self, place: Place, name: str) -> Place | None:
        """Returns the layer, or the nearest one in i that has a branch of this name: of its stage, else of
        the longest, else of any."""
        for among in (self.stages[place.stage], self.stages[self.longest], self.places):
            if having := [p for p in among if name in self.branch_sets[p.path].names]:
                return min(having, key=lambda p: (p != place, abs(p.index - place.index)))
        return None

    def vector(self, place: Place, name: str) -> np.ndarray:
        return self.arrays[place.path][name][place.at]

    def spread(self, place: Place, width: int) -> np.ndarray:
        """Returns, for each of `width` channels, the rank in [0, 1) of the channel that it takes.

        The ranks are spread evenly, and ordered as the source's channels are: as many channels as there are
        give each its own.
        """
        ranks = (np.arange(width) + 0.5) / width
        return ranks[np.argsort(self.channels(place, ranks), kind="stable")]

    def channels(self, place: Place, ranks: np.ndarray) -> np.ndarray:
        """Returns the layer's channels of these ranks, along the first principal component of its stage."""
        order = self._order(place.stage, place.width)
        return order[np.minimum((ranks * order.size).astype(int), order.size - 1)]

    def _order(self, stage: int, width: int) -> np.ndarray:
        """Returns the channels of the layers of one width in a stage, by the first principal component of
        their trajectories: in all layers and branches, each less its mean."""
        if (stage, width) not in self.orders:
            of_width = [p for p in self.stages[stage] if p.width == width]
            columns = np.stack(list(self._columns(of_width)), axis=1).astype(np.float64)
            columns -= columns.mean(axis=0)
            u, s, vt = np.linalg.svd(columns, full_matrices=False)
            scores = u[:, 0] * s[0]
            # The sign of a component is arbitrary; the first branch of the first layer settles it.
            if scores @ columns[:, 0] < 0 or (not scores @ columns[:, 0] and vt[0].sum() < 0):
                scores = -scores
            self.orders[stage, width] = np.argsort(scores, kind="stable")
        return self.orders[stage, width]

    def _columns(self, places: Sequence[Place]) -> Iterator[np.ndarray]:
        for place in places:
            for name in self.branch_sets[place.path].names:
                yield self.vector(place, name)


def _with_identity(branches: BranchSet) -> bool:
    return "identity" in branches.names
