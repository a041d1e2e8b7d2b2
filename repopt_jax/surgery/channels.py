"""Which layers read the channels that a layer makes: found by marking channels and running the network.

A mark is NaN. It goes through whatever keeps channels apart (activations, pooling, sums, concatenation,
flattening, depthwise layers, batch norms) and is taken out, and noted, at the input of every convolution and
dense layer. So for each input of a layer it is known whose channel it is, in whatever order they arrive. No
rule for single operations is needed, and a network that mixes channels in another way is found out: its marks
meet, or reach the outputs.

The same runs show what an input is when its channel is zero, for numbers drawn at random: it must be a
constant, or the channel cannot be taken out.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from flax import nnx

from repopt_jax.core import paths
from repopt_jax.core.paths import natural_order
from repopt_jax.nn.geometry import check_plain, pads_with_zeros
from repopt_jax.surgery.layers import WRAPPERS
from repopt_jax.surgery.marks import Probe
from repopt_jax.surgery.modules import named_modules, replace_modules

# Spread of an input, over its size, up to which it counts as a constant: rounding.
CONSTANT = 1e-5
NONE = -1  # channel of an input that is not of the group


@dataclasses.dataclass(frozen=True, eq=False)
class ChannelGroup:
    """Channels that are removed together, by one compactor.

    All maps are from the path of a module to (features,) int: the channel of each feature, -1 for others.

    Attributes:
      size: number of channels.
      producers: path of a layer that makes them -> path of the batch norm directly after it, or None. Of
        several, whose outputs are added, the first is the pacesetter.
      inputs: convolutions and dense layers that read them.
      channels: depthwise layers and batch norms between, whose features they are.
      outputs: other layers that make a factor of each channel, as in squeeze-and-excitation.
      shifted: layers of `inputs` to which a removed channel need not be zero, but may be another constant.
    """

    size: int
    producers: Mapping[str, str | None]
    inputs: Mapping[str, np.ndarray]
    channels: Mapping[str, np.ndarray]
    outputs: Mapping[str, np.ndarray]
    shifted: frozenset[str]


@dataclasses.dataclass(frozen=True)
class LayerUse:
    """A convolution or dense layer as one run of the network uses it.

    Attributes:
      inputs, outputs: features.
      groups: feature groups.
      taps: size of the window.
      positions: number of outputs of each channel, over all calls.
    """

    inputs: int
    outputs: int
    groups: int
    taps: int
    positions: int

    @property
    def depthwise(self) -> bool:
        """Whether each output is made of the input of the same number alone."""
        return self.groups == self.inputs == self.outputs > 1

    def macs(self, inputs: int, outputs: int) -> int:
        """Multiply-accumulates with so many inputs and outputs."""
        each = 1 if self.depthwise else inputs // self.groups
        return self.positions * self.taps * each * outputs


class Channels:
    """The channels of one network.

    Attributes:
      uses: path -> how the layer is used, for all convolutions and dense layers that are looked into, in the
        order of their calls.
      norm_of: path of a layer -> path of the batch norm that takes its output directly, and always does.

    Args:
      model: any NNX model, also an abstract one. Its numbers are not used.
      inputs: what it is called with: arrays or `jax.ShapeDtypeStruct`s.

    Raises:
      ValueError: no input, or a network that gives NaN for random numbers.
    """

    def __init__(self, model: nnx.Module, inputs: Sequence[Any]):
        if not inputs:
            raise ValueError("`inputs` is empty: give an example of what the model is called with")
        self._modules = dict(named_modules(model))
        self._kinds = _looked_into(model)
        calls = _calls(model, self._kinds, inputs)
        self.uses: dict[str, LayerUse] = _uses(calls, self._kinds, self._modules)
        self.norm_of: dict[str, str] = _norms_of(calls, self._kinds)
        self._probe = Probe(model, self._kinds, self._points(), inputs)
        self._reach: dict[str, tuple[dict[str, np.ndarray], bool]] = {}
        self._met: dict[str, set[str]] = {}
        self._raw: dict[str, str] | None = None
        self._map: tuple[dict[str, np.ndarray], dict[str, np.ndarray]] | None = None
        marked, out = self._probe.marks({})
        if out or any(marks.any() for marks in marked.values()):
            raise ValueError(
                "with random numbers for parameters and inputs the network gives NaN, so that its channels "
                "cannot be followed"
            )

    @property
    def producers(self) -> list[str]:
        """Layers whose outputs are channels of their own: all but depthwise ones."""
        return [path for path, use in self.uses.items() if not use.depthwise]

    def default(self) -> list[str]:
        """Convolutions that have a batch norm directly after them and can be pruned by themselves."""
        found: list[str] = []
        for path in self.producers:
            if path in self.norm_of and isinstance(self._modules[path], nnx.Conv) and not self._why_not(path):
                found.append(path)
        alone = [path for path in found if not self._partners(path)]
        problems = self._problems_together([[path] for path in alone])
        taken = {path for path in alone if not problems[path]}
        for path in found:
            others = self._partners(path)
            if others and not others & taken and not self._problems_together([[path]])[path]:
                taken.add(path)
        return [path for path in found if path in taken]

    def groups(self, selected: Sequence[str]) -> list[ChannelGroup]:
        """Groups of the selected layers' channels; layers whose outputs are added share one.

        Raises:
          ValueError: layers whose channels cannot be removed, all with the reasons.
        """
        problems = {path: why for path in selected if (why := self._why_not(path))}
        sets = [s for s in self._tied(selected) if not problems.keys() & set(s)]
        problems |= {path: why for path, why in self._problems_together(sets).items() if why}
        if problems:
            raise ValueError(refusal(problems))
        _, shifted = self._check_constant(sets, [self._group(s).inputs for s in sets])
        return [self._group(s, frozenset(shifted)) for s in sets]

    def declared(
        self, successors: Mapping[str, Sequence[str]], followers: Mapping[str, str]
    ) -> list[ChannelGroup]:
        """Groups as the caller describes them: see `plan_pruning`.

        Raises:
          ValueError: paths that are no such layers, or channels that do not fit or would not be constant when
            they are removed; all with the reasons.
        """
        groups, problems = [], {}
        pacesetters = [path for path in successors if path not in followers]
        for path in pacesetters:
            own = [path, *(f for f, leader in followers.items() if leader == path)]
            try:
                read = dict.fromkeys(reader for p in own for reader in successors.get(p, ()))
                groups.append(self._declared_group(own, list(read)))
            except ValueError as error:
                problems[path] = str(error)
        for follower, leader in followers.items():
            if leader not in pacesetters:
                problems[follower] = f"it follows {leader}, which is no pacesetter of `successors`"
        if not problems:
            producers = [list(group.producers) for group in groups]
            problems, shifted = self._check_constant(producers, [group.inputs for group in groups])
            groups = [dataclasses.replace(g, shifted=frozenset(shifted) & g.inputs.keys()) for g in groups]
        if problems := {path: why for path, why in problems.items() if why}:
            raise ValueError(refusal(problems))
        return groups

    # -- what marks show

    def _points(self) -> dict[str, str]:
        """Layer -> where its channels begin: at its batch norm, or at itself."""
        return {path: self.norm_of.get(path, path) for path in self.producers}

    def _reached(self, path: str) -> tuple[dict[str, np.ndarray], bool]:
        """Features that the channels of a layer reach, by module, and whether they reach the outputs."""
        if path not in self._reach:
            point = self._points()[path]
            self._reach[path] = self._probe.marks({point: np.ones(self.uses[path].outputs, bool)})
        return self._reach[path]

    def _channel_map(self) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
        """Number of the channel at each feature that is reached, and where different numbers meet."""
        if self._map is None:
            sizes = {point: self.uses[path].outputs for path, point in self._points().items()}
            channel: dict[str, np.ndarray] = {}
            mixed: dict[str, np.ndarray] = {}
            for bit in range(max(1, (max(sizes.values()) - 1).bit_length())):
                sets = {point: np.arange(size) >> bit & 1 == 1 for point, size in sizes.items()}
                ones, _ = self._probe.marks(sets)
                zeros, _ = self._probe.marks({point: ~marks for point, marks in sets.items()})
                for name, marks in ones.items():
                    channel[name] = channel.get(name, 0) + (marks.astype(int) << bit)
                    mixed[name] = mixed.get(name, False) | (marks & zeros[name])
            self._map = channel, mixed
        return self._map

    def _partners(self, path: str) -> set[str]:
        """Other layers whose channels meet those of `path` somewhere."""
        if path not in self._met:
            mine = {name: marks for name, marks in self._reached(path)[0].items() if marks.any()}
            self._met[path] = {
                other
                for other in self.producers
                if other != path
                and any((marks & self._reached(other)[0][name]).any() for name, marks in mine.items())
            }
        return self._met[path]

    def _tied(self, selected: Sequence[str]) -> list[list[str]]:
        """The selected layers in sets whose channels meet, each in the order of the calls."""
        left = [path for path in self.producers if path in selected]
        sets = []
        while left:
            tied, new = [left[0]], [left[0]]
            while new:
                meet = self._partners(new.pop()) & set(left) - set(tied)
                tied += meet
                new += meet
            sets.append([path for path in left if path in tied])
            left = [path for path in left if path not in tied]
        return sets

    def _why_not(self, path: str) -> str:
        """Why the channels of one layer cannot be removed, from where its marks arrive; "" if they can."""
        if path not in self.uses or self.uses[path].depthwise:
            return "it is no convolution or dense layer that makes channels of its own"
        if self.uses[path].groups > 1:
            return f"it has {self.uses[path].groups} feature groups, which a compactor would mix"
        if used := self._used_before_norm().get(path):
            return f"its output is used also without its batch norm {self.norm_of[path]}, by {used}"
        reached, out = self._reached(path)
        if out:
            return (
                "its channels reach the outputs of the network, or are mixed by something that is neither a "
                "convolution nor a dense layer"
            )
        names = [name for name, marks in reached.items() if marks.any()]
        if not any(name in self.uses and not self.uses[name].depthwise for name in names):
            return "no layer reads its channels"
        grouped = [
            n for n in names if n in self.uses and self.uses[n].groups > 1 and not self.uses[n].depthwise
        ]
        if grouped:
            return (
                f"{paths.listed(grouped)} read its channels in feature groups, which must stay equally wide"
            )
        _, mixed = self._channel_map()
        if where := [name for name in names if (mixed[name] & reached[name]).any()]:
            meet = "different channels are mixed, or added to one another, before they reach"
            return f"{meet} {paths.listed(where)}"
        return ""

    def _used_before_norm(self) -> dict[str, str]:
        """Layers whose outputs go elsewhere than to their batch norms -> where to."""
        if self._raw is None:
            every = {path: np.ones(self.uses[path].outputs, bool) for path in self.norm_of}
            used = self._where(every)
            alone = {path: self._where({path: marks}) for path, marks in every.items()} if used else {}
            self._raw = {path: where for path, where in alone.items() if where}
        return self._raw

    def _where(self, marked: Mapping[str, np.ndarray]) -> str:
        """Where marks of layers arrive, the batch norms directly after these excepted; "" for nowhere."""
        reached, out = self._probe.marks(marked)
        norms = {self.norm_of[path] for path in marked}
        names = [name for name, marks in reached.items() if marks.any() and name not in norms]
        return ", ".join(
            [*([paths.listed(names)] if names else []), *(["the network's outputs"] if out else [])]
        )

    def _group(self, producers: Sequence[str], shifted: frozenset[str] = frozenset()) -> ChannelGroup:
        channel, _ = self._channel_map()
        maps: dict[str, np.ndarray] = {}
        for path in producers:
            for name, marks in self._reached(path)[0].items():
                if marks.any():
                    found = maps.get(name, np.full(marks.shape, NONE))
                    maps[name] = np.where(marks, channel[name], found)
        inputs = {n: m for n, m in maps.items() if n in self.uses and not self.uses[n].depthwise}
        size = self.uses[producers[0]].outputs
        outputs = {other: np.arange(size) for other in self._companions(producers)}
        between = {n: m for n, m in maps.items() if n not in inputs}
        between |= {self.norm_of[n]: m for n, m in outputs.items() if n in self.norm_of}
        return ChannelGroup(
            size,
            {p: self.norm_of.get(p) for p in producers},
            inputs,
            between,
            outputs,
            shifted & inputs.keys(),
        )

    def _companions(self, producers: Sequence[str]) -> list[str]:
        """Layers that are not in the group although their channels meet its own."""
        met = set().union(*map(self._partners, producers)) - set(producers)
        return [path for path in self.producers if path in met]

    def _problems_together(self, sets: Sequence[Sequence[str]]) -> dict[str, str]:
        """Why the channels of each of these sets cannot be removed, by its first layer."""
        problems, good = {}, []
        for producers in sets:
            problems[producers[0]] = why = self._problem_of_sizes(producers)
            if not why:
                good.append(list(producers))
        found, _ = self._check_constant(good, [self._group(p).inputs for p in good])
        return problems | found

    def _problem_of_sizes(self, producers: Sequence[str]) -> str:
        size = self.uses[producers[0]].outputs
        others = self._companions(producers)
        if wrong := [p for p in (*producers, *others) if self.uses[p].outputs != size]:
            return f"the channels of {paths.listed(wrong)} meet its own, and are not as many"
        group = self._group(producers)
        maps = {**group.inputs, **group.channels}
        for other in others:
            reached, out = self._reached(other)
            more = [n for n, marks in reached.items() if (marks & (maps.get(n, np.array(NONE)) < 0)).any()]
            if more or out:
                users = paths.listed(more) or "the outputs of the network"
                return f"{other}, whose channels meet its own, is also used by {users}"
        return ""

    def _check_constant(
        self, sets: Sequence[Sequence[str]], maps: Sequence[Mapping[str, np.ndarray]]
    ) -> tuple[dict[str, str], set[str]]:
        """Sets half of the channels of every set of layers to zero, then the other half.

        Returns:
          Why channels cannot be removed, "" if they can, by the set's first layer; and the layers to which a
          channel that is zero is another constant.
        """
        problems, shifted = {producers[0]: "" for producers in sets}, set()
        for half in (0, 1) if sets else ():
            zeros = {}
            for producers in sets:
                for path in producers:
                    zeros[self._points()[path]] = np.arange(self.uses[path].outputs) % 2 == half
            low, high = self._probe.ranges(zeros)
            for producers, read in zip(sets, maps):
                for name, channel in read.items():
                    gone = (channel >= 0) & (channel % 2 == half)
                    a, b = low[name][gone], high[name][gone]
                    if (b - a > CONSTANT * np.maximum(np.abs(a), np.abs(b))).any():
                        problems[producers[0]] = self._not_constant(producers, name)
                    elif a.any() or b.any():
                        shifted.add(name)
                        if pads_with_zeros(self._modules[name]):
                            problems[producers[0]] = (
                                f"a removed channel would be a constant other than zero to {name}, which "
                                "pads it with zeros"
                            )
        return problems, shifted

    def _not_constant(self, producers: Sequence[str], name: str) -> str:
        others = self._companions(producers)
        if others:
            return (
                f"its channels are added to those of {paths.listed(others)}: select all of them, which then "
                "share one compactor, or none"
            )
        return f"the inputs of {name} depend on more than the channels that it is said to read"

    # -- what a caller declares

    def _declared_group(self, producers: Sequence[str], read: Sequence[str]) -> ChannelGroup:
        unknown = [p for p in (*producers, *read) if p not in self.uses and self._kinds.get(p) != "norm"]
        if unknown:
            raise ValueError(f"{', '.join(unknown)} are no convolutions, dense layers or batch norms")
        for path in producers:
            if path not in self.uses or self.uses[path].groups > 1:
                raise ValueError(f"{path} has feature groups, or is no layer")
        size = self.uses[producers[0]].outputs
        if wrong := [p for p in producers if self.uses[p].outputs != size]:
            raise ValueError(f"its followers {', '.join(wrong)} have another number of channels than {size}")
        inputs, between = {}, {}
        for path in read:
            use = self.uses.get(path)
            if use is None or use.depthwise:
                between[path] = np.arange(size)
                if path in self.norm_of:
                    between[self.norm_of[path]] = np.arange(size)
                features = self._features(path)
            else:
                if use.groups > 1:
                    raise ValueError(f"{path} reads its channels in {use.groups} feature groups")
                features = use.inputs
                inputs[path] = np.arange(features) % size  # flattened maps: the channel is the fastest index
            dense = path in inputs and isinstance(self._modules[path], nnx.Linear)
            if features != size and not (dense and features % size == 0):
                raise ValueError(f"it has {size} channels and {path} reads {features}")
        if not inputs:
            raise ValueError("no convolution or dense layer reads its channels")
        own = {path: self.norm_of.get(path) for path in producers}
        return ChannelGroup(size, own, inputs, between, {}, frozenset())

    def _features(self, path: str) -> int:
        module = self._modules[path]
        return module.num_features if isinstance(module, nnx.BatchNorm) else self.uses[path].inputs


def refusal(problems: Mapping[str, str]) -> str:
    """One sentence of all layers that cannot be pruned, with the reasons."""
    reasons = "; ".join(f"{path}: {why}" for path, why in problems.items())
    return f"layers whose channels cannot be removed: {reasons}"


# -- modules that are looked into, and their calls


def _looked_into(model: nnx.Module) -> dict[str, str]:
    """Path -> "layer" or "norm", for modules that their own arrays determine, not stacked and not shared in
    part. Marks go through the others as through any operation."""
    owners: dict[int, int] = {}
    inside: set[int] = set()
    for _, module in named_modules(model):
        for value in vars(module).values():
            if isinstance(value, nnx.Variable):
                owners[id(value)] = owners.get(id(value), 0) + 1
            if isinstance(module, tuple(WRAPPERS)) and isinstance(value, nnx.Module):
                inside.add(id(value))
    found = {}
    for path, module in named_modules(model):
        shared = any(owners.get(id(value), 0) > 1 for value in vars(module).values())
        if not shared and id(module) not in inside and path and (kind := _kind(module)):
            found[path] = kind
    return dict(sorted(found.items(), key=lambda item: natural_order(item[0])))


def _kind(module: nnx.Module) -> str | None:
    if isinstance(module, nnx.BatchNorm):
        own = type(module).__call__ is nnx.BatchNorm.__call__ and module.axis == -1
        return "norm" if own and len(module.var.shape) == 1 else None
    if isinstance(module, (nnx.Conv, nnx.Linear)):
        try:
            check_plain(module)
        except ValueError:
            return None
        axes = len(module.kernel_size) if isinstance(module, nnx.Conv) else 0
        return "layer" if len(module.kernel.shape) == axes + 2 else None
    return None


class _Log:
    """Calls while a network is traced. It is compared by identity, so that NNX takes it as static."""

    def __init__(self):
        self.calls: list[tuple[str, jax.Array, jax.Array]] = []


class _Logged(nnx.Module):
    def __init__(self, module: nnx.Module, path: str, log: _Log):
        self.module: Any = module
        self.path = path
        self.log = log

    def __call__(self, x: jax.Array, *args: Any, **options: Any) -> jax.Array:
        y = self.module(x, *args, **options)
        self.log.calls.append((self.path, x, y))
        return y


def _calls(
    model: nnx.Module, kinds: Mapping[str, str], inputs: Sequence[Any]
) -> list[tuple[str, jax.Array, jax.Array]]:
    """Returns (path, input, output) of each call of a module, in their order; the arrays are traced ones."""
    log = _Log()
    logged = replace_modules(model, lambda path, m: _Logged(m, path, log) if path in kinds else None)
    logged.eval()
    graphdef, state = nnx.split(logged)
    jax.eval_shape(lambda state, inputs: nnx.merge(graphdef, state, copy=True)(*inputs), state, list(inputs))
    return log.calls


def _uses(
    calls: Sequence[tuple[str, Any, Any]], kinds: Mapping[str, str], modules: Mapping[str, Any]
) -> dict[str, LayerUse]:
    positions: dict[str, int] = {}
    for path, _, y in calls:
        if kinds[path] == "layer":
            positions[path] = positions.get(path, 0) + math.prod(y.shape[:-1])
    return {
        path: LayerUse(
            modules[path].in_features,
            modules[path].out_features,
            getattr(modules[path], "feature_group_count", 1),
            math.prod(modules[path].kernel.shape[:-2]),
            count,
        )
        for path, count in positions.items()
    }


def _norms_of(calls: Sequence[tuple[str, Any, Any]], kinds: Mapping[str, str]) -> dict[str, str]:
    """Layer -> the batch norm that is called with its very output, whenever either is called."""
    maker = {id(y): path for path, _, y in calls if kinds[path] == "layer"}
    count: dict[str, int] = {}
    pairs: dict[str, list[str | None]] = {}
    for path, x, _ in calls:
        count[path] = count.get(path, 0) + 1
        if kinds[path] == "norm":
            pairs.setdefault(path, []).append(maker.get(id(x)))
    found = {}
    for norm, layers in pairs.items():
        layer = layers[0]
        if layer is not None and set(layers) == {layer} and count[layer] == len(layers):
            found[layer] = norm
    return found
