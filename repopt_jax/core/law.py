"""The law of a search: what becomes of the sum of a channel's squared scales, and how long a search must be.

In a search layer K = sum_b s_b * E_b(w_b), with trainable s_b; for branches without a scale (the identity)
the trainable vector u_b takes its place: K has the part E_b(u_b). Let one batch norm follow the sum. It makes
the loss independent of the length of each output channel of K, so with g = dL/dK

    <g, K>_o = 0        the sum over the entries of K in output channel o.

SGD with a small learning rate follows the gradient flow. In its time t, the sum of the learning rates over 1
- momentum, with lambda the weight decay of u (the s_b are not decayed),

    d s_b / dt = -<g, E_b(w_b)>_o,        d u_b / dt = -<g, E_b(1)>_o - lambda u_b,

    d/dt N = -2 <g, K>_o - 2 lambda sum_b u_b^2 = -2 lambda sum_b u_b^2,        N = sum_b s_b^2 + sum_b u_b^2.

So **N is conserved, but for the decay of u**, whatever the data and the weights w_b do, and whether or not
they are decayed. With Lambda = lambda * t at the end of the search (`search_lambda`)

    N(end) = N(start) - 2 Lambda sum_b mean over the search of u_b^2.

If u goes from u0 to u1 at a constant relative rate, as decay alone makes it go, that mean is (u0^2 - u1^2) /
(2 ln(u0 / u1)) (`mean_square`); for a start from the depth rule, s = t = sqrt(2 / i), u = 1,

    s^2 + t^2 + u^2 = 4 / i + 1 - Lambda (1 - u^2) / ln(1 / u),        s^2 + t^2 = 2 without identity.

Decay alone takes u to exp(-Lambda) (`identity_by_decay`), and leaves the s_b. So a search is as long as its
Lambda, and not as its epochs: with Lambda = 0.03 the scales are where they began, for whatever the gradients
do, they only share out N among the branches.

What breaks the law: weight decay of the scales, which takes 2 lambda sum_b s_b^2 as well; Adam and sign
rules, which follow another flow; clipping of single entries; layers without a batch norm behind the sum; and
learning rates too high for a flow, since every step adds its own square to N, sum_b (ds_b)^2 + sum_b
(du_b)^2. Clipping by the global norm multiplies all of g by one number and leaves <g, K> = 0 as it is: it
slows the flow of the gradients, and Lambda, the decay, goes on.
"""

import numbers
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from repopt_jax.arguments import HasShape, check_kind, check_number
from repopt_jax.core.branches import BranchSet

if TYPE_CHECKING:
    from repopt_jax.core.scales import Scales


class LayerLaw(NamedTuple):
    """N of one layer, the mean over its channels: what it is, and what it should be by the law."""

    found: float
    expected: float

    @property
    def residual(self) -> float:
        """The relative error, found / expected - 1: positive if the scales are larger than they should be."""
        return self.found / self.expected - 1


def search_lambda(weight_decay: float, rates: ArrayLike, momentum: float | None = None) -> float:
    """Lambda = weight_decay * sum of `rates` / (1 - momentum): the decay of a search of SGD.

    Args:
      weight_decay: coefficient of the L2 term.
      rates: the learning rates of all steps, or their sum.
      momentum: None for none; Nesterov's counts the same.

    Raises:
      ValueError: a momentum of 1 or more, whose steps have no sum.
    """
    check_number("weight_decay", weight_decay, at_least=0)
    check_kind("rates", rates, (list, tuple, HasShape, numbers.Real), "the learning rates of the steps")
    momentum = momentum or 0.0
    if not 0 <= momentum < 1:
        raise ValueError(f"`momentum` is {momentum}: it must be at least 0 and below 1")
    return weight_decay * float(np.sum(rates, dtype=np.float64)) / (1 - momentum)


def identity_by_decay(Lambda: float, start: float = 1.0) -> float:
    """The u that decay alone makes of `start`: start * exp(-Lambda)."""
    return start * float(np.exp(-Lambda))


def mean_square(start: ArrayLike, end: ArrayLike) -> np.ndarray:
    """The mean of u^2 over a search in which u goes from `start` to `end` at a constant relative rate.

    It is (start^2 - end^2) / (2 ln(start / end)), and start^2 where both are equal. Where the signs differ
    there is no such way, and u goes at a constant rate: (start^2 + start * end + end^2) / 3.
    """
    a, b = np.broadcast_arrays(np.asarray(start, np.float64), np.asarray(end, np.float64))
    linear = (a**2 + a * b + b**2) / 3
    ratio = np.divide(a, b, out=np.ones_like(a), where=a * b > 0)
    # Near 1 the quotient is 0 / 0; there both means differ by less than 1e-6 of themselves.
    apart = np.abs(ratio - 1) > 1e-3
    logarithm = np.log(np.where(apart, ratio, 2.0))
    return np.where(apart, (a**2 - b**2) / (2 * logarithm), linear)


def sum_of_squares(vectors: Mapping[str, Any]) -> np.ndarray:
    """N of every channel, (*stack, out) float64, from the vectors of a layer's branches."""
    return sum((np.asarray(v, np.float64) ** 2 for v in vectors.values()), start=np.zeros(()))


def decay_loss(
    branches: BranchSet, start: Mapping[str, Any], end: Mapping[str, Any], Lambda: float
) -> np.ndarray:
    """What decay takes from N between two moments of a search: 2 Lambda * sum of the `mean_square` of u_b.

    Args:
      branches: of the layer; those without a scale are the ones that are decayed.
      start, end: the vectors of its branches, (*stack, out), at the two moments.
      Lambda: of the part of the search between them.
    """
    unscaled = [b.name for b in branches.branches if not b.has_scale]
    squares = (mean_square(start[name], end[name]) for name in unscaled)
    return 2 * Lambda * sum(squares, start=np.zeros(branches.vector_shape))


def compare_with_law(scales: "Scales", start: "Scales", Lambda: float) -> dict[str, LayerLaw]:
    """Compares the result of a search with the law, layer by layer.

    Only the two ends are known, so u is taken to go from one to the other at a constant relative rate. (The
    log of a search has the law with u as it went, see `train.searchlaw`.)

    Args:
      scales: what the search found.
      start: the scales that it began with, of the same layers: `Scales.depth_rule` of the published searches.
      Lambda: `search_lambda` of the search; 0.936 of the published ones.

    Returns:
      Path -> N as found and as expected, means over the channels.

    Raises:
      ValueError: the layers or branches differ.
    """
    from repopt_jax.core.scales import check_fit, check_scales

    check_scales(scales)
    check_scales(start, "start")
    check_number("Lambda", Lambda)
    check_fit(start, scales.branch_sets, where=" of `start`")
    found = {}
    for path, entry in scales.entries.items():
        first = start.entries[path].vectors
        loss = decay_loss(entry.branches, first, entry.vectors, Lambda)
        expected = sum_of_squares(first) - loss
        found[path] = LayerLaw(float(sum_of_squares(entry.vectors).mean()), float(expected.mean()))
    return found
