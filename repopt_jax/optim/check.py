"""Checks a user's whole optimizer by running it on synthetic gradients.

A plain network trains as its multi-branch counterpart if its optimizer moves every merged kernel as K = A(w)
moves when some ordinary optimizer T is given the gradients of the branches: dK = A(T(A^T g)). T is unknown,
but it treats equal gradients equally. The check initialises the optimizer as for training, replaces the scale
vectors in its state by s_b = c_o for all branches b, with one number c_o for each output channel o, and gives
two channels with very different c_o the gradients x / c_o. The branches of both channels then have the same
gradient x, and an exact optimizer moves the channels by u * c_o with the same u. An optimizer with Adam after
the mask, clipping, or a missing or repeated multiplier does not. A second run swaps the two channels, which
changes the norm of the plain gradient but not that of the branches: this shows clipping by the plain norm
under any rule. Weight decay is the update that remains if all gradients are zero. It must be a multiple of K;
if it comes before the multiplier, it is a multiple of P(K).

The two channels are 0 and the next one that shares no entry of a branch's tensor with it: 1, or in a layer
whose outputs are positions of maps the same position of the next map.

All c_o are powers of two, so an exact optimizer passes without rounding errors. The inner optimizer of
`reparameterize` is skipped, because `reparameterize` is exact for any inner optimizer.

Layers are not compared with each other: an optimizer may give each a learning rate of its own. That is what
`repopt_mask(scales, normalise=True)` does: it is SGD on branches with the learning rate over the mean of the
layer's multiplier, and passes.
"""

import enum
import functools
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from repopt_jax.arguments import check_transformation
from repopt_jax.core import paths
from repopt_jax.core.branches import BranchSet
from repopt_jax.core.parametrization import Parametrization
from repopt_jax.core.paths import listed
from repopt_jax.core.scales import Scales, check_fit, check_scales, is_concrete
from repopt_jax.optim.adaptive import RepOptSignMaskState, ScaleByRepOptAdamState
from repopt_jax.optim.reparameterize import NoInner, ReparameterizeState, TrainedStructureState
from repopt_jax.optim.sgd import RepOptClipState, RepOptMaskState

# States of the transformations that multiply by the scales, and of all that hold scales.
RULES = (RepOptMaskState, RepOptSignMaskState, ScaleByRepOptAdamState, ReparameterizeState)
WITH_SCALES = (*RULES, RepOptClipState)

# Relative difference of two channels: 0 for exact optimizers, or rounding in float32.
TOLERANCE = 1e-3
# Relative distance from a multiple: 0.4 % for momentum in bfloat16, a half for misplaced decay.
LOOSE_TOLERANCE = 5e-2
# The check ends if the optimizer has moved nothing in this many steps. MultiSteps and schedules that start at
# 0 need several.
MAX_STEPS = 64


class Reason(enum.Enum):
    """What is wrong with an optimizer."""

    NO_RULE = "no rule"
    OTHER_SCALES = "other scales"
    DECAY_BEFORE_RULE = "decay before the rule"
    CLIPPING = "clipping"
    NONLINEAR = "nonlinear"
    WRONG_MULTIPLE = "wrong multiple"
    TRAINED_SCALES = "trained scales"


class Fault(NamedTuple):
    """One reason, the kernels that it concerns, and a sentence that says what to do."""

    reason: Reason
    paths: tuple[str, ...]
    message: str


class OptimizerError(ValueError):
    """Raised by `check_optimizer`.

    Attributes:
      faults: everything that was found, one `Fault` for each reason.
    """

    def __init__(self, faults: tuple[Fault, ...]):
        super().__init__("; ".join(fault.message for fault in faults))
        self.faults = faults

    @property
    def reasons(self) -> tuple[Reason, ...]:
        """The reason of each fault, in the order of `faults`."""
        return tuple(fault.reason for fault in self.faults)


def check_optimizer(tx: optax.GradientTransformation, scales: Scales, params: Any, **extra_args: Any) -> None:
    """Raises if `tx` does not train a plain network with `scales` as its multi-branch counterpart.

    Call it once, before training::

        tx = optax.chain(repopt_mask(scales), optax.add_decayed_weights(4e-5), optax.sgd(0.1, 0.9))
        check_optimizer(tx, scales, params)

    It runs `tx` on synthetic gradients, from a new state, for about nine steps (nine times as many as it
    takes to move a kernel). The optimizer may consist of any transformations and wrappers, Optax's or your
    own. The check does not find faults that begin only after several updates, faults of an optimizer that
    moves nothing in its first 64 steps, an inner optimizer of `reparameterize` that looks at the weights
    (LAMB) and was not given those of `reinitialize`, and kernels that `optax.masked` or `optax.partition`
    hide if other kernels have a rule.

    Args:
      tx: the whole optimizer.
      scales: the scales that it was made with.
      params: the plain network's parameters: a plain dict, an `nnx.State`, or any other pytree of arrays.
      **extra_args: passed on to `tx.update`.

    Raises:
      OptimizerError: a ValueError with all `faults`, each with its `Reason`: no rule for these scales (or one
        from which `optax.masked` or `optax.partition` hides all kernels); a state with other scales; weight
        decay before the rule; clipping by the plain gradient; Adam, a sign rule or another nonlinear
        transformation after `repopt_mask`; a wrong multiple, as of a repeated mask; scales that are trained,
        for which constant scales are no counterpart.
      ValueError: the scales do not fit the parameters.
      TypeError: `scales` are no `Scales`; for structures that are trained in the optimizer
        (`find_parametrizations`) there is no such check.
    """
    check_transformation("tx", tx)
    if (
        isinstance(scales, Mapping)
        and scales
        and all(isinstance(s, Parametrization) for s in scales.values())
    ):
        raise TypeError(
            "`scales` are structures that the optimizer trains, for which there is no such check: "
            "`reparameterize(inner, structures, trainable_scales=True)` is exact for any `inner` if nothing "
            "else in the chain looks at the kernels' gradients or values, so put decay and clipping inside. "
            "Compare a few steps with those of the network that `to_structure` makes, under `inner`"
        )
    if faults := find_faults(tx, scales, params, **extra_args):
        raise OptimizerError(tuple(faults))


def find_faults(
    tx: optax.GradientTransformation, scales: Scales, params: Any, **extra_args: Any
) -> list[Fault]:
    """Returns the faults with which `check_optimizer` raises; empty if nothing is wrong."""
    check_scales(scales)
    check_fit(scales, params)
    params = jax.tree.map(_at_least_float32, params)
    state = tx.init(params)
    if trained := _trained_scales(state):
        return [trained]
    faults = _other_scales(state, scales)
    probe = _Probe(tx, scales, params, state, extra_args)
    if not scales.entries or not probe.find_period():
        return faults
    at_rest = probe.run(LARGE, None, params)
    zeros = jax.tree.map(_zeros, params)  # of which there is no weight decay
    without = probe.run(LARGE, None, zeros)
    decay = jax.tree.map(jnp.subtract, at_rest, without)
    if not probe.with_rule:
        moves = jax.tree.map(jnp.subtract, probe.run(LARGE, False, params), at_rest)
        return faults + _own_rule(probe, moves, decay)
    wrong, drowned = probe.unequal_channels(LARGE, params, at_rest)
    # A decay that Adam normalises makes the moves unequal as well.
    nonlinear, _ = probe.unequal_channels(LARGE, zeros, without) if wrong or drowned else ([], [])
    early = _early_decay(probe, decay, nonlinear)
    decayed = {path for fault in early for path in fault.paths}
    # Where rounding in the decay is as large as the moves, only those without decay tell.
    wrong = [p for p in probe.free if p in nonlinear or (p in wrong and p not in {*decayed, *drowned})]
    return faults + early + _gradient_faults(probe, wrong)


# --- Running the optimizer


class Size(NamedTuple):
    """Magnitudes of the synthetic numbers; powers of two.

    Attributes:
      gradient: largest entry of the branches' gradients or, with `is_norm`, about their global norm.
      scale: magnitude of the scales.
      is_norm: whether `gradient` is a norm over all kernels.
    """

    gradient: float
    scale: float
    is_norm: bool = False


# Above every clipping threshold, before or after the learning rate; and below.
LARGE = Size(2.0**27, 2.0**13)
SMALL = Size(2.0**-13, 1.0, is_norm=True)
# Factors of the two channels' scales, of which one is negative.
LOW, HIGH = -0.25, 4.0


class _Probe:
    """Runs an optimizer from its first state, with synthetic scales in it, on synthetic gradients."""

    def __init__(self, tx: Any, scales: Scales, params: Any, state: Any, extra_args: Mapping[str, Any]):
        self.params, self.state = params, state
        self.start, self.treedef = paths.named_leaves(params)
        ruled = {path for holder in _states(state, RULES) for path in holder.scales}
        self.with_rule = {p: e.branches for p, e in scales.entries.items() if p in ruled}
        self.without_rule = {p: e for p, e in scales.entries.items() if p not in ruled}
        free = {path: _free_entries(branches.plain.layer) for path, branches in self.with_rule.items()}
        self.free = {path: entries for path, entries in free.items() if entries is not None}
        self.period = 1
        # This is compiled for the whole tree; everything else is compiled once for all layers of one kind.
        self.step = jax.jit(functools.partial(self._step, tx, tuple(scales.entries), dict(extra_args)))

    def find_period(self) -> bool:
        """Finds how many steps it takes to move a kernel; returns False if nothing moves in `MAX_STEPS`.

        MultiSteps accumulates gradients, and a schedule may start at 0.
        """
        gradients, state = self.gradients(LARGE, 0, False), self.with_scales(LARGE)
        for self.period in range(1, MAX_STEPS + 1):
            _, state, moved = self.step(gradients, state, self.params)
            if moved:
                return True
        return False

    def run(self, size: Size, swapped: bool | None, params: Any) -> dict[str, jax.Array]:
        """Returns the sum of the kernels' updates in two phases of `period` steps each, at these parameters.

        If `swapped` is None, all gradients are zero.
        """
        state, total = self.with_scales(size), None
        for phase in (0, 1):
            if swapped is None:
                gradients = jax.tree.map(_zeros, self.params)
            else:
                gradients = self.gradients(size, phase, swapped)
            for _ in range(self.period):
                moves, state, _ = self.step(gradients, state, params)
                total = moves if total is None else jax.tree.map(jnp.add, total, moves)
        assert total is not None
        return total

    def unequal_channels(
        self, size: Size, params: Any, at_rest: dict[str, jax.Array]
    ) -> tuple[list[str], list[str]]:
        """Returns kernels of which two channels move differently under equal gradients of their branches; and
        those of which that cannot be told, because `at_rest` is so much larger than the moves."""
        if not self.free:
            return [], []
        run, swapped = (self.run(size, swapped, params) for swapped in (False, True))
        found = {
            p: _inequality(self.with_rule[p], run[p] - at_rest[p], swapped[p] - at_rest[p], at_rest[p])
            for p in self.free
        }
        unequal, noise = ({p: pair[i] for p, pair in found.items()} for i in (0, 1))
        return _above(TOLERANCE, unequal), _above(TOLERANCE, noise)

    def with_scales(self, size: Size) -> Any:
        """Returns the first state with synthetic scales, and without inner optimizers of `reparameterize`."""

        def synthetic(path: str, vectors: Mapping[str, Any]) -> dict[str, jax.Array]:
            second = _second(self.with_rule[path].layer) if path in self.with_rule else 1
            return {name: _synthetic_vector(v, size.scale, second) for name, v in vectors.items()}

        def replaced(node):
            if not isinstance(node, WITH_SCALES):
                return node
            vectors = {path: synthetic(path, of_layer) for path, of_layer in node.scales.items()}
            if isinstance(node, ReparameterizeState):
                return ReparameterizeState(vectors, {}, NoInner())
            return node._replace(scales=vectors)

        return jax.tree.map(replaced, self.state, is_leaf=lambda node: isinstance(node, WITH_SCALES))

    def gradients(self, size: Size, phase: int, swapped: bool) -> Any:
        """Returns the synthetic gradients of one phase."""
        amplitude = size.gradient
        if size.is_norm:
            entries = max(1, sum(int(free.sum()) for free in self.free.values()))
            amplitude /= 2.0 ** np.ceil(np.log2(entries) / 2)
        largest = amplitude / size.scale
        small = 1e-3 * largest  # otherwise the other leaves would make up most of the norm
        made, seen = [], 0
        for path, p in self.start.items():
            if path in self.free:
                g = _kernel_gradient(self.with_rule[path], p.dtype, seen, largest, phase, swapped)
                seen += self.free[path].size
            elif path in self.without_rule:
                g = _ratio(p, jnp.linalg.norm(p.ravel())) * small
            elif jnp.issubdtype(p.dtype, jnp.floating):
                g = jnp.full(p.shape, small / max(1, p.size) ** 0.5, p.dtype)
            else:
                g = _zeros(p)
            made.append(_placed_like(p, g))
        return self.treedef.unflatten(made)

    @staticmethod
    def _step(tx, kernels, extra_args, gradients, state, params):
        updates, state = tx.update(gradients, state, params, **extra_args)
        leaves, _ = paths.named_leaves(updates)
        moves = {path: leaves[path] for path in kernels}
        return moves, state, jnp.any(jnp.stack([jnp.any(move) for move in moves.values()]))


@functools.partial(jax.jit, static_argnums=(0, 1))
def _kernel_gradient(branches: BranchSet, dtype: Any, seen: Any, amplitude: Any, phase: Any, swapped: Any):
    """Returns a gradient that is zero except in the two channels.

    There the branches' gradients in the two phases are size * (1, -a) in one channel and size * (0.1, 1) in
    the other; `swapped` swaps the channels. Over the entries, a and size cover several orders of magnitude,
    because Lion responds to a only where a sign changes, and Adam after clipping by value only near the
    threshold.
    """
    if branches.layout != "...io":
        made = _kernel_gradient(branches.plain, dtype, seen, amplitude, phase, swapped)
        return branches.from_plain(made)
    free = _free_entries(branches.layer)
    assert free is not None
    index = (seen + jnp.arange(free.size, dtype=jnp.uint32)).reshape(free.shape)
    a = 10.0 ** (-2.5 * _spread(index, 2654435769))
    size = 2.0 ** -jnp.floor(24 * _spread(index, 3242174889)) * free
    first, second = size * jnp.where(phase == 0, 1, -a), size * jnp.where(phase == 0, 0.1, 1)
    low, high = jnp.where(swapped, second, first), jnp.where(swapped, first, second)
    axis = len(branches.kernel) - 1
    channel = jax.lax.broadcasted_iota(jnp.int32, branches.kernel, axis)
    made = jnp.zeros(branches.kernel, dtype)
    for number, values in enumerate((low / LOW, high / HIGH)):
        values = jnp.broadcast_to(values * amplitude, (*branches.stack, *free.shape)).astype(dtype)
        made = jnp.where(channel == number * _second(branches.layer), jnp.expand_dims(values, axis), made)
    return made


@functools.partial(jax.jit, static_argnums=0)
def _inequality(
    branches: BranchSet, run: jax.Array, swapped: jax.Array, at_rest: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Returns the difference of two channels' moves under the same gradients, relative to the moves, and how
    large it may be by rounding, since the moves are what is left beside the update at rest."""
    run, swapped, branches = branches.to_plain(run), branches.to_plain(swapped), branches.plain
    axis, free = len(branches.kernel) - 1, jnp.asarray(_free_entries(branches.layer))
    factors = {0: LOW, _second(branches.layer): HIGH}
    (low, high), (other_low, other_high) = (
        [jax.lax.index_in_dim(move, i, axis, keepdims=False) / factor for i, factor in factors.items()]
        for move in (run, swapped)
    )
    moves = jnp.stack([low, high, other_high, other_low])
    moves = jnp.where(jnp.broadcast_to(free, moves.shape), moves, 0)
    largest = jnp.max(jnp.abs(moves))
    rounding = 4 * jnp.finfo(run.dtype).eps * jnp.max(jnp.abs(at_rest)) / min(map(abs, factors.values()))
    return _ratio(jnp.max(jnp.abs(moves[:2] - moves[2:])), largest), _ratio(rounding, largest)


# --- Interpreting the moves


def _gradient_faults(probe: _Probe, wrong: list[str]) -> list[Fault]:
    """Finds out why these kernels fail with large gradients."""
    if not wrong:
        return []
    at_rest = probe.run(SMALL, None, probe.params)
    small, _ = probe.unequal_channels(SMALL, probe.params, at_rest)
    once = probe.run(SMALL, False, probe.params)
    twice = probe.run(SMALL._replace(gradient=2 * SMALL.gradient), False, probe.params)

    not_linear = _above(
        TOLERANCE, {p: _nonlinearity(once[p] - at_rest[p], twice[p] - at_rest[p]) for p in wrong}
    )
    clipped = [path for path in wrong if path not in small]
    nonlinear = [path for path in small if path in not_linear]
    multiple = [path for path in small if path in wrong and path not in not_linear]
    if nonlinear:  # with a large eps Adam follows small gradients
        nonlinear, clipped = nonlinear + clipped, []
    return _faults({Reason.CLIPPING: clipped, Reason.NONLINEAR: nonlinear, Reason.WRONG_MULTIPLE: multiple})


def _faults(found: Mapping[Reason, Iterable[str]]) -> list[Fault]:
    named = {reason: tuple(names) for reason, names in found.items()}
    return [Fault(r, names, MESSAGES[r].format(listed(names))) for r, names in named.items() if names]


MESSAGES = {
    Reason.NO_RULE: (
        "no rule with these scales moves the kernels at {}: repopt_mask(scales) is missing (or repopt_sgd, "
        "repopt_adamw, repopt_lion, reparameterize), or optax.masked or optax.partition hides the kernels"
    ),
    Reason.OTHER_SCALES: (
        "the optimizer was made with other scales than those given, at {}: make it with the same scales"
    ),
    Reason.DECAY_BEFORE_RULE: (
        "weight decay comes before the multiplier, which multiplies it too, at {}: put add_decayed_weights "
        "after repopt_mask (or after the other rule that has the scales)"
    ),
    Reason.CLIPPING: (
        "ordinary clipping: the kernels at {} follow small gradients as their branches would, but not large "
        "ones, because the plain network's gradient or update is clipped by its own size and not by that of "
        "the branches; clip with clip_by_repopt_global_norm(max_norm, scales) at the head of the chain (Adam "
        "with a large eps after repopt_mask looks the same: use repopt_adamw)"
    ),
    Reason.NONLINEAR: (
        "the kernels at {} are moved by a rule that is not linear in the gradient (Adam, a sign rule, a "
        "normalised update), which undoes the multiplier: use repopt_adamw, repopt_lion, repopt_sign_mask "
        "after a sign rule, or reparameterize(inner, scales) in place of repopt_mask"
    ),
    Reason.WRONG_MULTIPLE: (
        "the kernels at {} are moved by another multiple of their gradient than the scales give: repopt_mask "
        "must be in the chain once, repopt_sign_mask only after a sign rule, and no other multiplier"
    ),
}


def _early_decay(probe: _Probe, decay: dict[str, jax.Array], nonlinear: list[str]) -> list[Fault]:
    """Checks that weight decay, the update that remains without gradients, is a multiple of K."""
    early = _above(
        LOOSE_TOLERANCE, {path: _residual(decay[path], probe.start[path]) for path in probe.with_rule}
    )
    # With a nonlinear rule the decay may be anything, whether it comes before the rule or after it.
    early = [
        path
        for path in early
        if path not in nonlinear or _transformed_decay(probe, path, decay[path]) <= LOOSE_TOLERANCE
    ]
    return _faults({Reason.DECAY_BEFORE_RULE: early})


def _transformed_decay(probe: _Probe, path: str, decay: jax.Array) -> jax.Array:
    """Returns the relative distance of a decay from the nearest multiple of P(K)."""
    branches = probe.with_rule[path]
    zeros = np.zeros(branches.vector_shape, np.float32)
    second = _second(branches.layer)
    vectors = {name: _synthetic_vector(zeros, LARGE.scale, second) for name in branches.names}
    return _residual(decay, _precondition(branches, probe.start[path], vectors))


def _own_rule(probe: _Probe, moves: dict[str, jax.Array], decay: dict[str, jax.Array]) -> list[Fault]:
    """Checks an optimizer without any of our rules: one of the user's own is exact if it moves K by P(g)."""
    transformed = {
        path: _precondition(entry.branches, probe.start[path], entry.vectors)
        for path, entry in probe.without_rule.items()
    }
    if plain := _above(LOOSE_TOLERANCE, {path: _residual(moves[path], p) for path, p in transformed.items()}):
        return _faults({Reason.NO_RULE: plain})
    early = _above(
        LOOSE_TOLERANCE, {path: _residual(decay[path], probe.start[path]) for path in probe.without_rule}
    )
    return _faults({Reason.DECAY_BEFORE_RULE: early})


def _trained_scales(state: Any) -> Fault | None:
    nodes = jax.tree.leaves(state, is_leaf=lambda node: isinstance(node, TrainedStructureState))
    kernels = [path for node in nodes if isinstance(node, TrainedStructureState) for path in node.theta]
    if not kernels:
        return None
    message = (
        f"the optimizer trains the scales of {paths.listed(kernels)} (`reparameterize` with "
        "trainable_scales=True), and is not to be compared with branches of constant scales: its counterpart "
        "is the network that `prepare` makes in mode online, under the optimizer inside"
    )
    return Fault(Reason.TRAINED_SCALES, tuple(kernels), message)


def _other_scales(state: Any, scales: Scales) -> list[Fault]:
    """Finds scales in the optimizer's state that differ from those given."""
    wrong = set()
    for holder in _states(state, WITH_SCALES):
        for path, vectors in holder.scales.items():
            given = scales.entries[path].vectors if path in scales.entries else {}
            same = vectors.keys() == given.keys() and all(
                np.shape(v) == np.shape(given[name]) and np.allclose(v, given[name], rtol=TOLERANCE)
                for name, v in vectors.items()
            )
            if not same:
                wrong.add(path)
    return _faults({Reason.OTHER_SCALES: sorted(wrong)})


def _states(state: Any, kinds: tuple[type, ...]) -> list[Any]:
    """Returns the states of these types anywhere inside an optimizer's state."""
    nodes = jax.tree.leaves(state, is_leaf=lambda node: isinstance(node, kinds))
    return [node for node in nodes if isinstance(node, kinds)]


@functools.lru_cache(maxsize=512)
def _free_entries(layer: BranchSet) -> np.ndarray | None:
    """Returns a mask of the entries of the two channels that only scaled branches reach.

    The layout of `layer` is "...io". The mask is a boolean array of the kernel's shape without its output
    axis; None if there are no such entries, or if the two channels are not equivalent.
    """
    second = _second(layer)
    in_other_groups = second >= layer.out // layer.groups
    if layer.out <= second or (
        # Where a branch mixes channels, it may do so differently in each group.
        in_other_groups and any(not b.places and b.tied(layer.canonical) == 1 for b in layer.branches)
    ):
        return None

    @jax.jit  # one program instead of one for each operation
    def reached_by_unscaled():
        weights = {b.name: jnp.full(b.shape(layer.canonical), float(not b.has_scale)) for b in layer.branches}
        return layer.merge(weights, {name: jnp.ones(layer.out) for name in layer.names}) != 0

    reached = np.asarray(reached_by_unscaled())
    reached = np.moveaxis(reached, -1, 0)
    free = ~(reached[0] | reached[second])
    return free if free.any() else None


def _second(layer: BranchSet) -> int:
    """Returns the channel that is compared with channel 0."""
    return max(branch.tied(layer.canonical) for branch in layer.branches)


def _synthetic_vector(v: Any, scale: float, second: int) -> jax.Array:
    """Returns synthetic scales like v, with different ones for channels 0, `second` and all others."""
    made = np.full(v.shape, scale)
    made[..., 0] *= LOW
    made[..., second : second + 1] *= HIGH
    return _placed_like(v, jnp.asarray(made, v.dtype))


def _zeros(p: Any) -> jax.Array:
    return _placed_like(p, jnp.zeros(p.shape, p.dtype))


def _placed_like(p: Any, x: jax.Array) -> jax.Array:
    """Shards x as p is sharded."""
    sharding = getattr(p, "sharding", None) if is_concrete(p) else None
    return jax.device_put(x, sharding) if isinstance(sharding, jax.NamedSharding) else x


def _spread(index: jax.Array, factor: int) -> jax.Array:
    """Returns evenly spread numbers in [0, 1): the fractional parts of multiples of factor / 2^32."""
    return (index * jnp.uint32(factor)).astype(jnp.float32) / 2.0**32


def _at_least_float32(p: Any) -> Any:
    """Widens half precision, which would overflow."""
    if jnp.issubdtype(p.dtype, jnp.floating) and jnp.finfo(p.dtype).bits < 32:
        return p.astype(jnp.float32)
    return p


@functools.partial(jax.jit, static_argnums=0)
def _precondition(branches: BranchSet, g: jax.Array, vectors: Mapping[str, jax.Array]) -> jax.Array:
    return branches.precondition(g, vectors)


@jax.jit
def _nonlinearity(once: jax.Array, twice: jax.Array) -> jax.Array:
    """Returns the relative distance of the second update from twice the first."""
    return _ratio(jnp.max(jnp.abs(twice - 2 * once)), jnp.max(jnp.abs(twice)))


@jax.jit
def _residual(x: jax.Array, y: jax.Array) -> jax.Array:
    """Returns the relative distance of x from the nearest multiple of y."""
    x, y = (_ratio(a, jnp.max(jnp.abs(a))) for a in (x, y))
    multiple = _ratio(jnp.vdot(x, y), jnp.vdot(y, y))
    return _ratio(jnp.linalg.norm((x - multiple * y).ravel()), jnp.linalg.norm(x.ravel()))


def _ratio(x: jax.Array, y: jax.Array) -> jax.Array:
    """Returns x / y, or 0 where y is 0 or one of them is not finite."""
    known = jnp.isfinite(jnp.max(jnp.abs(x))) & jnp.isfinite(y) & (y != 0)
    return jnp.where(known, x / jnp.where(known, y, 1), 0)


def _above(tolerance: float, differences: Mapping[str, jax.Array]) -> list[str]:
    return [path for path, difference in differences.items() if difference > tolerance]
