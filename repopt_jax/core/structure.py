"""Structures: a linear layer described as a sum of chains of linear maps.

A *description* is a function of a few lines from a layer's geometry to a `Structure`; every published block
is one of these functions (`core.published`). A structure is data. It can be run branch by branch
(`nn.Branched`), merged into one kernel before each use (`nn.Merged`), merged permanently (`surgery.fuse`),
or kept in the optimizer (`Structure.branch_set`).

A chain consists of any number of 1x1 stages and then one stage over the layer's window; or of a depthwise
stage over the window and then one 1x1 stage. Stage j has a kernel k_j, followed by a batch norm, a scale or
nothing, which is y = a_j * x + b_j for each channel. The chain is then one convolution

    K = a_n * k_n o (a_{n-1} * k_{n-1} o ... (a_1 * k_1))
    b = c_n,   c_j = a_j * (k_j applied to c_{j-1}) + b_j,   c_0 = 0

where o is `algebra.after_pointwise` (after a depthwise stage `algebra.depthwise_before_pointwise`), and c_j
is the output of the first j stages for an input of zeros (`algebra.constant_response`). The layer is the sum
of its chains. At the border this is exact only if the input of a stage over the window is padded with c_{j-1}
instead of zeros, as in DBB (arXiv 2103.13425, `BNAndPad`) and, for every chain, in `nn.Branched`.

Some of the chains may have a batch norm after their own sum, y = a * x + b, before the others are added:

    K = sum of the other K + a * (sum of these K),    b = sum of the other b + b
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp

from repopt_jax.arguments import check_kind
from repopt_jax.core import algebra
from repopt_jax.core.branches import (
    Branch,
    BranchSet,
    Kernel,
    Shape,
)

Pads = tuple[tuple[int, int], ...]
PadMode = Literal["constant", "wrap", "reflect", "same"]
PAD_MODES: tuple[str, ...] = get_args(PadMode)
Follower = Literal["norm", "scale", "constant", ""]
FOLLOWERS: tuple[str, ...] = get_args(Follower)
Affine = tuple[jax.Array, jax.Array | None]


@dataclasses.dataclass(frozen=True, init=False)
class Geometry:
    """The geometry of a convolution or, without spatial axes, of a dense layer: a layer without its arrays.

    Attributes:
      window: spatial shape of the kernel; () for a dense layer.
      inputs, outputs: channels.
      groups: feature groups.
      strides, dilation: a number for each spatial axis.
      padding: (before, after) for each spatial axis.
      pad_mode: the values of the padding: "constant", zeros; "wrap", the other end of the input
        (`padding="CIRCULAR"` of `nnx.Conv`); "reflect", its mirror image (`"REFLECT"`); "same", as many zeros
        as there have to be for ceil(size / stride) outputs, which depends on the input's size (`"SAME"` at a
        stride above 1): `for_input` gives the layer on one. `padding` is then all zeros and says nothing.

    Args:
      strides, dilation: one number for all spatial axes or one for each.
      padding: None for half of (window - 1) * dilation on each side, which keeps the resolution at stride 1
        and is the padding that PyTorch networks use at any stride. None for `pad_mode` "same".

    Raises:
      ValueError: sizes, channels, groups, strides or padding that no layer can have, or that do not fit the
        number of spatial axes.
    """

    window: Shape
    inputs: int
    outputs: int
    groups: int
    strides: Shape
    dilation: Shape
    padding: Pads
    pad_mode: PadMode

    def __init__(
        self,
        window: Sequence[int],
        inputs: int,
        outputs: int,
        groups: int = 1,
        *,
        strides: int | Sequence[int] = 1,
        dilation: int | Sequence[int] = 1,
        padding: Sequence[Sequence[int]] | None = None,
        pad_mode: PadMode = "constant",
    ):
        window = tuple(int(n) for n in window)
        strides = per_axis(strides, len(window), "strides")
        dilation = per_axis(dilation, len(window), "dilation")
        reach = [(n - 1) * d for n, d in zip(window, dilation)]
        if padding is None:
            padding = [(0, 0) if pad_mode == "same" else (r // 2, r - r // 2) for r in reach]
        pads = tuple((int(before), int(after)) for before, after in padding)
        values = (window, int(inputs), int(outputs), int(groups), strides, dilation, pads, pad_mode)
        for field, value in zip(dataclasses.fields(self), values):
            object.__setattr__(self, field.name, value)
        if min((*window, inputs, outputs, groups, *strides, *dilation)) < 1:
            raise ValueError(f"{self}: sizes, channels, groups, strides and dilation must be at least 1")
        if inputs % groups or outputs % groups:
            raise ValueError(
                f"`groups` is {groups}: it must divide the {inputs} inputs and the {outputs} outputs"
            )
        if len(pads) != len(window):
            raise ValueError(
                f"`padding` is {pads}: it needs a pair for each of the {len(window)} spatial axes"
            )
        if pad_mode not in PAD_MODES:
            raise ValueError(f"`pad_mode` is {pad_mode!r}: it must be one of {', '.join(PAD_MODES)}")
        if pad_mode == "same" and any(map(any, pads)):
            raise ValueError(
                f"`padding` is {pads}, and `pad_mode` 'same' finds it itself: leave `padding` out"
            )
        if pad_mode != "constant" and any(n < 0 for pair in pads for n in pair):
            raise ValueError(
                f"`padding` is {pads}: with `pad_mode` {pad_mode!r} nothing can be cut off (n >= 0)"
            )

    @property
    def title(self) -> str:
        """What messages call it: "2x2 layer of 16 inputs and 8 outputs"."""
        groups = f" in {self.groups} groups" if self.groups > 1 else ""
        window = "x".join(map(str, self.window)) or "dense"
        return f"{window} layer of {self.inputs} inputs and {self.outputs} outputs{groups}"

    @property
    def axes(self) -> int:
        """Number of spatial axes."""
        return len(self.window)

    @property
    def kernel(self) -> Shape:
        """Shape of the merged kernel, (*window, inputs/groups, outputs)."""
        return (*self.window, self.inputs // self.groups, self.outputs)

    @property
    def taps(self) -> int:
        """Number of taps of the window, 1 for a dense layer."""
        return math.prod(self.window)

    @property
    def tiles(self) -> bool:
        """Whether windows of several taps lie side by side: no overlap, gap, padding or dilation."""
        padded = any(map(any, self.padding)) or self.pad_mode == "same" or set(self.dilation) - {1}
        return self.taps > 1 and self.strides == self.window and not padded

    @property
    def is_odd(self) -> bool:
        """Whether the window has a centre tap."""
        return all(n % 2 for n in self.window)

    @property
    def is_depthwise(self) -> bool:
        """Whether each group has one input channel, with several groups and a window of several taps."""
        return self.inputs == self.groups > 1 and self.taps > 1

    @property
    def has_identity(self) -> bool:
        """Whether the layer can be the identity: as many outputs as inputs, stride 1, a centre tap."""
        return self.inputs == self.outputs and set(self.strides) <= {1} and self.is_odd

    @property
    def has_pointwise(self) -> bool:
        """Whether a 1x1 kernel is smaller than the window and can be centred in it."""
        return self.taps > 1 and self.is_odd

    def for_input(self, size: Sequence[int]) -> "Geometry":
        """Returns the layer as it is on an input of this spatial shape: with "same" padding as pairs.

        On n pixels, windows of r + 1 = (window - 1) * dilation + 1 pixels at stride s are padded with
        p = max((ceil(n / s) - 1) * s + r + 1 - n, 0) zeros, floor(p / 2) of them in front.
        """
        if self.pad_mode != "same":
            return self
        pads = []
        for n, k, s, d in zip(size, self.window, self.strides, self.dilation, strict=True):
            p = max((math.ceil(n / s) - 1) * s + (k - 1) * d + 1 - n, 0)
            pads.append((p // 2, p - p // 2))
        return dataclasses.replace(self, padding=tuple(pads), pad_mode="constant")

    def pointwise(self, outputs: int) -> "Geometry":
        """Returns a 1x1 layer on the same input, with `outputs` channels."""
        return Geometry((1,) * self.axes, self.inputs, outputs, self.groups)


def per_axis(value: int | Sequence[int], axes: int, argument: str) -> Shape:
    """Expands one number or a sequence to one number for each spatial axis.

    Raises:
      ValueError: a sequence of another length.
    """
    values = (value,) * axes if isinstance(value, int) else tuple(int(v) for v in value)
    if len(values) != axes:
        raise ValueError(
            f"`{argument}` is {value}: it must be one number or {axes}, one for each spatial axis"
        )
    return values


@dataclasses.dataclass(frozen=True)
class Stage:
    """One linear map of a chain and what follows it.

    Attributes:
      map: the map; its tensor is trained unless `trained` is False.
      then: "norm", a batch norm; "scale", a trainable factor for each channel; "constant", a non-trainable
        one; "", nothing.
      channels: output channels of a stage before the last; the last stage has those of the layer.
      trained: False for an identity or a pooling whose vector is fixed at ones.
      residual: for a 1x1 stage with as many outputs as inputs, or a multiple: its kernel is the tensor plus
        the identity, repeated for the outputs of each group, and the tensor is initialised with zeros.
      expansion: the stage is depthwise, over the layer's window, with this number of output channels for
        each input channel, and the last stage is a 1x1; None for any other stage.
      start: initial value of the batch norm's scale or of the factor.
      gain: the tensor's initial values are drawn from this multiple of the usual range (`Branch.sample`).
      decay: whether weight decay applies to the tensor.
      decay_gain: whether weight decay applies to the batch norm's scale or to the factor.
      shared: number of consecutive output channels that share one channel of the batch norm (its statistics,
        scale and bias) or one factor: the positions of a map in a layer whose outputs are maps.
    """

    map: Branch
    then: Follower = "norm"
    channels: int | None = None
    trained: bool = True
    residual: bool = False
    expansion: int | None = None
    start: float = 1.0
    gain: float = 1.0
    decay: bool = True
    decay_gain: bool = False
    shared: int = 1


Chain = tuple[Stage, ...]


class Part(NamedTuple):
    """A stage of a particular chain in a particular layer.

    Attributes:
      key: the name of its arrays: that of the chain, or `{chain}_{j}` for stage j of several.
      stage: the stage.
      layer: the geometry of this stage alone.
    """

    key: str
    stage: Stage
    layer: Geometry

    @property
    def shape(self) -> Shape:
        """Shape of the stage's tensor."""
        return self.stage.map.shape(self.layer.kernel)

    @property
    def channels(self) -> int:
        """Number of channels of the norm, or of factors, after the stage."""
        return self.layer.outputs // self.stage.shared

    def spread(self, v: jax.Array) -> jax.Array:
        """Repeats v, (*stack, channels), for the outputs that share a channel, unless it has all of them."""
        return v if v.shape[-1] == self.layer.outputs else jnp.repeat(v, self.stage.shared, axis=-1)

    def kernel(self, tensors: Mapping[str, jax.Array], dtype: Any) -> jax.Array:
        """Returns k_j, of the shape `layer.kernel`."""
        w = tensors[self.key] if self.stage.trained else jnp.ones(self.shape, dtype)
        k = self.stage.map.embed(w, self.layer.kernel)
        return k + algebra.diagonal(self.layer.kernel).astype(k.dtype) if self.stage.residual else k

    def sample(self, key: jax.Array, dtype: Any) -> jax.Array:
        """Draws the stage's tensor as its own layer would be initialised, times the stage's gain."""
        if self.stage.residual:
            return jnp.zeros(self.shape, dtype)
        drawn = self.stage.map.sample(key, self.layer.kernel, dtype)
        return drawn if self.stage.gain == 1 else self.stage.gain * drawn


@dataclasses.dataclass(frozen=True)
class Structure:
    """A layer as a sum of chains. It is static and hashable; arrays are passed to its methods.

    Attributes:
      layer: the geometry of the whole.
      chains: name -> stages, at least one; names are part of parameter paths. Given as a mapping, kept as
        pairs.
      norm: whether the structure has a batch norm after the sum. Its arrays do not belong to the structure:
        the network already has that batch norm (`nn.Block.bn`), which surgery keeps if this is True and
        removes if it is False.
      sums: name -> names of chains whose sum has a batch norm of this name, before the others are added. The
        chains have no norm inside: even where the other chains are run one by one, these are merged before
        each use. Given as a mapping, kept as pairs.

    Raises:
      ValueError: no chain, a name that contains `/` or occurs twice, stages that are not defined for this
        layer, or sums of unknown chains, of chains with norms, or of chains of other sums, all listed with
        the reasons.
      TypeError: `layer` is no `Geometry`, a chain no sequence of `Stage`s, or a sum none of names.
    """

    layer: Geometry
    chains: Any
    norm: bool = False
    sums: Any = ()

    def __post_init__(self) -> None:
        check_kind("layer", self.layer, Geometry, "a `Geometry`, which a description is given")
        object.__setattr__(self, "chains", _pairs("chains", self.chains, Stage, "(Stage(Kernel((3, 3))),)"))
        object.__setattr__(self, "sums", _pairs("sums", self.sums, str, '("3x3", "1x1")'))
        chains = self.chains
        names = [name for name, _ in chains]
        if not names or len(set(names)) != len(names) or any("/" in name for name in names):
            raise ValueError(f"`chains` are named {names}: at least one, each name once and without `/`")
        if problems := [f"{name}: {why}" for name, chain in chains for why in _problems(self.layer, chain)]:
            raise ValueError(f"chains that are not defined for a {self.layer.title}: {'; '.join(problems)}")
        keys = [part.key for part in self.parts]
        if len(set(keys)) != len(keys):
            raise ValueError(f"`chains` give several stages the name of one: {keys}")
        if problems := list(_problems_of_sums(self.sums, self.placed, {*names, *keys})):
            raise ValueError(f"`sums` that are not defined for these chains: {'; '.join(problems)}")

    @functools.cached_property
    def placed(self) -> dict[str, tuple[Part, ...]]:
        """The parts of each chain, by its name."""
        return {name: tuple(_parts(self.layer, name, chain)) for name, chain in self.chains}

    @property
    def parts(self) -> Iterator[Part]:
        """All parts, chain after chain."""
        for chain in self.placed.values():
            yield from chain

    @property
    def alone(self) -> dict[str, tuple[Part, ...]]:
        """The parts of each chain that is in none of the `sums`, by its name."""
        summed = {name for _, members in self.sums for name in members}
        return {name: chain for name, chain in self.placed.items() if name not in summed}

    def shapes(self) -> dict[str, Shape]:
        """Shape of each trained tensor, by key."""
        return {part.key: part.shape for part in self.parts if part.stage.trained}

    def decayed(self) -> dict[str, bool]:
        """Whether weight decay applies to a parameter, by its path in the layer: `weights/3x3`,
        `norms/3x3/scale`."""
        found = {}
        for part in self.parts:
            found |= {f"weights/{part.key}": part.stage.decay, f"scales/{part.key}": part.stage.decay_gain}
        for key, part in self.followers("norm").items():
            found |= {f"norms/{key}/scale": part.stage.decay_gain, f"norms/{key}/bias": False}
        return found

    def followers(self, *kinds: Follower) -> dict[str, Part]:
        """Returns the parts that are followed by one of `kinds`, by key.

        A sum that has a batch norm counts as a part of its name: a kernel over the layer's window, whose
        tensor is not among those of the structure.
        """
        sums = (Part(name, Stage(Kernel(self.layer.window)), self.layer) for name, _ in self.sums)
        return {part.key: part for part in (*self.parts, *sums) if part.stage.then in kinds}

    def merge(
        self,
        tensors: Mapping[str, jax.Array],
        affines: Mapping[str, Affine],
        *,
        dtype: Any = jnp.float32,
    ) -> tuple[jax.Array, jax.Array | None]:
        """Merges the chains into one convolution: its kernel K, and its shift b, (out,), or None.

        Args:
          tensors: key -> tensor of each trained stage.
          affines: key -> (a, b) of each stage that is followed by a norm or a scale, (channels,) each, of the
            stage or, where several share one, of the norm or scale; b is None for a scale.
          dtype: dtype of the non-trainable tensors.
        """
        merged = [_merged(chain, tensors, affines, dtype) for chain in self.alone.values()]
        for name, _ in self.sums:
            a, b = affines[name]
            kernel = self.merge_sum(name, tensors, affines, dtype=dtype)
            merged.append((algebra.scale_output(kernel, a), b))
        kernels, shifts = zip(*merged)
        known = [shift for shift in shifts if shift is not None]
        return functools.reduce(jnp.add, kernels), functools.reduce(jnp.add, known) if known else None

    def merge_sum(
        self,
        name: str,
        tensors: Mapping[str, jax.Array],
        affines: Mapping[str, Affine],
        *,
        dtype: Any = jnp.float32,
    ) -> jax.Array:
        """Merges the chains of one of the `sums` into the kernel before its batch norm; as `merge`."""
        chains = (self.placed[member] for member in dict(self.sums)[name])
        return functools.reduce(jnp.add, (_merged(chain, tensors, affines, dtype)[0] for chain in chains))

    def sample(self, key: jax.Array, *, dtype: Any = jnp.float32) -> dict[str, jax.Array]:
        """Draws each trained tensor as its stage's own layer would be initialised."""
        parts = [part for part in self.parts if part.stage.trained]
        return {part.key: part.sample(k, dtype) for part, k in zip(parts, jax.random.split(key, len(parts)))}

    def branch_set(self, *, stack: Shape = ()) -> BranchSet:
        """Returns the structure with constant scales as a `BranchSet`, which scales and optimizers use.

        Args:
          stack: leading axes of the arrays of stacked layers.

        Raises:
          ValueError: chains without a constant rule: with several stages, a batch norm, a fixed tensor, or a
            scale that outputs share; or chains of other names than their maps, by which scales are found.
        """
        wrong = [
            name
            for name, chain in self.chains
            if len(chain) > 1
            or name != chain[0].map.name
            or not chain[0].trained
            or chain[0].residual
            or chain[0].shared != 1
            or (chain[0].then in ("scale", "constant")) != chain[0].map.has_scale
        ] + [name for name, _ in self.sums]
        if wrong:
            raise ValueError(
                f"the chains {', '.join(wrong)} are not one trained map, of its name, with a constant scale "
                "for each output: no scales describe them"
            )
        maps = tuple(chain[0].map for _, chain in self.chains)
        return BranchSet((*stack, *self.layer.kernel), maps, self.layer.groups, stacked=len(stack))

    def with_constants(self) -> "Structure":
        """Returns the structure with constant scales in place of trainable ones."""

        def frozen(stage: Stage) -> Stage:
            return dataclasses.replace(stage, then="constant") if stage.then == "scale" else stage

        return dataclasses.replace(self, chains={n: tuple(map(frozen, chain)) for n, chain in self.chains})


Description = Callable[[Geometry], Structure]


def _pairs(argument: str, given: Any, kind: type, such_as: str) -> tuple[tuple[str, tuple[Any, ...]], ...]:
    """Returns names and what is given for them, several values of `kind` each.

    Raises:
      TypeError: no names, or other values.
    """
    check_kind(argument, given, (Mapping, tuple, list), "a mapping from names")
    pairs = []
    for name, value in given.items() if isinstance(given, Mapping) else given:
        entries = tuple(value) if isinstance(value, Iterable) and not isinstance(value, str) else (None,)
        if not isinstance(name, str) or not all(isinstance(entry, kind) for entry in entries):
            raise TypeError(f"`{argument}` has {name!r}: {value!r}: it must be from a name to {such_as}")
        pairs.append((name, entries))
    return tuple(pairs)


def _parts(layer: Geometry, name: str, chain: Chain) -> Iterator[Part]:
    rest = layer  # the geometry of the stages that are left
    for j, stage in enumerate(chain):
        key = name if len(chain) == 1 else f"{name}_{j}"
        if stage.expansion is not None:
            middle = layer.inputs * stage.expansion
            own = dataclasses.replace(layer, outputs=middle, groups=layer.inputs)
            rest = dataclasses.replace(layer, inputs=middle).pointwise(layer.outputs)
        elif j + 1 < len(chain):
            own = rest.pointwise(stage.channels or rest.inputs)
            rest = dataclasses.replace(rest, inputs=own.outputs)
        else:
            own = rest
        yield Part(key, stage, own)


def _problems(layer: Geometry, chain: Chain) -> Iterator[str]:
    """Yields the reasons why this chain is not defined for this layer."""
    if not chain:
        yield "it has no stage"
        return
    expansion = chain[0].expansion
    depthwise = expansion is not None
    for stage in chain[1:] if depthwise else chain[:-1]:
        if not _is_pointwise(stage, layer):
            side = "after a depthwise stage" if depthwise else "before another stage"
            yield f"{stage.map.name} stands {side}, where only a 1x1 kernel can"
            return
    if any(stage.expansion is not None for stage in chain[1:]) or (depthwise and len(chain) != 2):
        yield "`expansion` is for the first of two stages, of which the second is a 1x1 kernel"
        return
    if expansion is not None and (not isinstance(chain[0].map, Kernel) or expansion < 1 or layer.taps == 1):
        yield (
            f"a depthwise stage is a kernel over a window of several taps with an `expansion` of at least 1, "
            f"not {chain[0].map.name} over {layer.window} with {expansion}"
        )
        return
    if chain[-1].channels not in (None, layer.outputs):
        yield f"its last stage gives {chain[-1].channels} channels, the layer {layer.outputs}"
    for stage in chain:
        if stage.then not in FOLLOWERS:
            yield f"`then` is {stage.then!r}: it must be one of {', '.join(map(repr, FOLLOWERS))}"
        if not stage.trained and stage.map.has_scale:
            yield f"{stage.map.name} is not trained, and only an identity or a pooling has a fixed tensor"
    try:
        for part in _parts(layer, "", chain):
            part.stage.map.check(part.layer.kernel, layer.groups)
            if part.stage.residual and (part.layer.taps > 1 or part.layer.outputs % part.layer.inputs):
                yield "`residual` needs a 1x1 stage with as many outputs as inputs, or a multiple of them"
            shared, outputs = part.stage.shared, part.layer.outputs
            if shared != 1 and (part.stage.then == "" or shared < 1 or outputs % shared):
                yield f"`shared` is {shared}: it must divide the {outputs} channels of a norm or a scale"
    except ValueError as error:
        yield str(error)


def _problems_of_sums(
    sums: Sequence[tuple[str, Sequence[str]]], placed: Mapping[str, Sequence[Part]], taken: set[str]
) -> Iterator[str]:
    """Yields the reasons why these sums are not defined; `taken` are the names of chains and stages."""
    names, members = [name for name, _ in sums], [member for _, chains in sums for member in chains]
    for name, chains in sums:
        if name in taken or "/" in name or names.count(name) > 1:
            yield f"{name}: a sum has a name of its own, without `/`"
        if not chains:
            yield f"{name}: it has no chain"
        for member in chains:
            if member not in placed:
                yield f"{name}: there is no chain {member}"
            elif any(part.stage.then == "norm" for part in placed[member]):
                yield f"{name}: {member} has a batch norm, and cannot be merged before it has been trained"
            if members.count(member) > 1:
                yield f"{name}: {member} is added twice"


def _is_pointwise(stage: Stage, layer: Geometry) -> bool:
    return isinstance(stage.map, Kernel) and stage.map.size == (1,) * layer.axes


def _merged(
    chain: Sequence[Part], tensors: Mapping[str, jax.Array], affines: Mapping[str, Affine], dtype: Any
) -> tuple[jax.Array, jax.Array | None]:
    """Returns kernel and shift of one chain: K and c_n of the module's docstring."""
    merged: jax.Array | None = None
    constant: jax.Array | None = None  # c_j; None while it is zero
    groups = chain[-1].layer.groups
    for part in chain:
        kernel = part.kernel(tensors, dtype)
        a, b = (v if v is None else part.spread(v) for v in affines.get(part.key, (None, None)))
        # Multiplying by ones where nothing follows would widen a sum in half precision to their dtype.
        kernel = kernel if a is None else algebra.scale_output(kernel, a)
        if constant is not None:
            constant = algebra.constant_response(kernel, constant)
        if b is not None:
            constant = b if constant is None else constant + b
        if merged is not None and chain[0].stage.expansion is not None:
            kernel = algebra.depthwise_before_pointwise(
                merged, kernel, chain[0].layer.inputs // groups, groups
            )
        elif merged is not None:
            kernel = algebra.after_pointwise(kernel, algebra.by_groups(merged, groups))
        merged = kernel
    assert merged is not None  # a chain has a stage
    return merged, constant
