"""Structures: a linear layer described as a sum of chains of linear maps.

A *description* is a function of a few lines from a layer's geometry to a `Structure`; every published block
is one of these functions (`STRUCTURES`). A structure is data. It can be run branch by branch (`nn.Branched`),
merged into one kernel before each use (`nn.Merged`), merged permanently (`surgery.fuse`), or kept in the
optimizer (`Structure.branch_set`).

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
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp

from repopt_jax.core import algebra
from repopt_jax.core.branches import (
    Average,
    Branch,
    BranchSet,
    Frequency,
    Identity,
    Kernel,
    Local,
    Pool,
    Shape,
)

Pads = tuple[tuple[int, int], ...]
PadMode = Literal["constant", "wrap", "reflect"]
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
        (`padding="CIRCULAR"` of `nnx.Conv`); "reflect", its mirror image (`"REFLECT"`).

    Args:
      strides, dilation: one number for all spatial axes or one for each.
      padding: None for half of (window - 1) * dilation on each side, which keeps the resolution at stride 1
        and is the padding that PyTorch networks use at any stride.

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
            padding = [(r // 2, r - r // 2) for r in reach]
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
        if pad_mode != "constant" and any(n < 0 for pair in pads for n in pair):
            raise ValueError(
                f"`padding` is {pads}: with `pad_mode` {pad_mode!r} nothing can be cut off (n >= 0)"
            )

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
        return math.prod(self.window)

    @property
    def tiles(self) -> bool:
        """Whether windows of several taps lie side by side: no overlap, gap, padding or dilation."""
        padded = any(map(any, self.padding)) or set(self.dilation) - {1}
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
    """

    layer: Geometry
    chains: Any
    norm: bool = False
    sums: Any = ()

    def __post_init__(self):
        for field in ("chains", "sums"):
            given = getattr(self, field)
            pairs = given.items() if isinstance(given, Mapping) else given
            object.__setattr__(self, field, tuple((name, tuple(entries)) for name, entries in pairs))
        chains = self.chains
        names = [name for name, _ in chains]
        if not names or len(set(names)) != len(names) or any("/" in name for name in names):
            raise ValueError(f"`chains` are named {names}: at least one, each name once and without `/`")
        if problems := [f"{name}: {why}" for name, chain in chains for why in _problems(self.layer, chain)]:
            raise ValueError(f"chains that are not defined for {self.layer}: {'; '.join(problems)}")
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


# --- Descriptions of published blocks


def normed(*maps: Branch, decay_identity: bool = True, shared: int = 1) -> dict[str, Chain]:
    """Returns chains of one map and its batch norm, by the map's name.

    The vectors of identities and poolings are not trained, because the norm's scale is their weight. It is
    decayed with the kernels unless `decay_identity` is False. `shared` is that of every `Stage`.
    """

    def stage(m: Branch) -> Stage:
        gain = decay_identity and not m.has_scale
        return Stage(m, "norm", trained=m.has_scale, decay_gain=gain, shared=shared)

    return {m.name: (stage(m),) for m in maps}


def starting(chains: Mapping[str, Chain], first: float, others: float) -> dict[str, Chain]:
    """Returns chains whose last batch norms start at these scales: of the first chain, and of the others."""
    return {
        name: (*chain[:-1], dataclasses.replace(chain[-1], start=others if j else first))
        for j, (name, chain) in enumerate(chains.items())
    }


def scaled(*maps: Branch) -> dict[str, Chain]:
    """Returns chains of one map with a trainable scale, by the map's name (of an identity, the vector)."""
    return {m.name: (Stage(m, "scale" if m.has_scale else ""),) for m in maps}


def default_maps(layer: Geometry) -> list[Branch]:
    """Returns a layer's own kernel, a 1x1 kernel if that is smaller, and the identity if it is defined."""
    maps: list[Branch] = [Kernel(layer.window)]
    maps += [Kernel((1,) * layer.axes)] if layer.has_pointwise else []
    return [*maps, Identity()] if layer.has_identity else maps


def of_branches(
    branches: BranchSet | Sequence[Branch], layer: Geometry, *, then: Follower = "scale"
) -> Structure:
    """Returns the structure of these branches, each followed by a batch norm (`then` "norm") or a scale."""
    maps = branches.branches if isinstance(branches, BranchSet) else tuple(branches)
    if then == "norm":
        return Structure(layer, normed(*maps))
    structure = Structure(layer, scaled(*maps), norm=True)
    return structure.with_constants() if then == "constant" else structure


def repopt(layer: Geometry) -> Structure:
    """RepOptimizer's search (arXiv 2205.15242, section 3.1): k x k + 1x1 + identity, a scale each.

    A depthwise layer gets no identity: its 1x1 branch, one factor for each channel, is the same map, which
    would otherwise count twice.
    """
    maps = [m for m in default_maps(layer) if not (layer.is_depthwise and isinstance(m, Identity))]
    return Structure(layer, scaled(*maps), norm=True)


def repopt_ghost(layer: Geometry) -> Structure:
    """RepOpt-GhostNet's search (arXiv 2205.15242, appendix D): the kernel and the identity, without a 1x1."""
    return Structure(
        layer, scaled(Kernel(layer.window), *([Identity()] if layer.has_identity else [])), norm=True
    )


def repvgg(layer: Geometry) -> Structure:
    """RepVGG (arXiv 2101.03697, section 3.2): k x k + 1x1 + identity, a batch norm each."""
    return Structure(layer, normed(*default_maps(layer)))


def mobileone(layer: Geometry, *, copies: int = 1) -> Structure:
    """MobileOne (arXiv 2206.04040, section 3.3): RepVGG's branches, the first of them `copies` times."""
    if copies < 1:
        raise ValueError(f"`copies` is {copies}: a block has at least one convolution")
    own, *others = default_maps(layer)
    return Structure(
        layer, {f"{own.name}_{j}": normed(own)[own.name] for j in range(copies)} | normed(*others)
    )


def repghost(layer: Geometry, *, raw_identity: bool = False) -> Structure:
    """RepGhost (arXiv 2211.06088, section 3): the kernel and the identity, a batch norm each.

    As published, no batch norm is decayed, that of the identity included. With `raw_identity`, one of the
    paper's other forms, the identity has no batch norm.
    """
    maps = [Kernel(layer.window), *([Identity()] if layer.has_identity else [])]
    chains = normed(*maps, decay_identity=False)
    if raw_identity and "identity" in chains:
        chains["identity"] = (Stage(Identity(), "", trained=False),)
    return Structure(layer, chains)


def acnet(layer: Geometry, *, gamma: float = 1.0, single_init: bool = False) -> Structure:
    """ACNet (arXiv 1908.03930, section 3): the square kernel and, for each axis, one of size 1 along it.

    The centre taps of all kernels coincide, also where the layer pads less than half of its window: the thin
    kernels then cut the border off. A dilated layer dilates them too.

    Args:
      layer: the layer.
      gamma: where the scale of every batch norm starts. The published networks use 1 for ImageNet and, for
        CIFAR, 1/3, with which the sum starts about as large as one branch.
      single_init: whether the square kernel alone counts at the start: its scale is 1 and the others 0.

    Raises:
      ValueError: both; or a `gamma` that is no finite number.
    """
    if single_init and gamma != 1:
        raise ValueError(f"`gamma` is {gamma} with `single_init`, which starts at 1 and 0: give one of them")
    if not math.isfinite(gamma):
        raise ValueError(f"`gamma` is {gamma}: it must be a finite number")
    thin = [
        Kernel(tuple(1 if i == axis else n for i, n in enumerate(layer.window))) for axis in range(layer.axes)
    ]
    chains = normed(Kernel(layer.window), *reversed(thin))
    return Structure(layer, starting(chains, gamma, 0.0 if single_init else gamma))


def dbb(layer: Geometry, *, middle: int | None = None, single_init: bool = False) -> Structure:
    """Diverse Branch Block (arXiv 2103.13425, section 3.3): kernel, 1x1, 1x1 -> average, 1x1 -> kernel.

    A depthwise layer has no 1x1 branch, and averages its input without a 1x1. The average is over the taps of
    the layer's own window, of a dilated layer over the dilated ones, where the published code averages over a
    dense window, which is no kernel of this layer. The stage before the last pads with what it makes of
    zeros, by whatever padding the layer has.

    Args:
      layer: the layer.
      middle: channels between the two stages of the last chain, by default as many as inputs, or twice as
        many in a depthwise layer. With as many as inputs, that chain's 1x1 kernel starts at the identity.
      single_init: whether the layer's own kernel alone counts at the start: the scale of its batch norm is
        1, those of the last norms of the other chains are 0.

    Raises:
      ValueError: a `middle` that is not positive, or that the groups do not divide.
    """
    if middle is not None and middle < 1:
        raise ValueError(
            f"`middle` is {middle}: a chain of two stages needs at least one channel between them"
        )
    own, point, average = Kernel(layer.window), Kernel((1,) * layer.axes), Stage(Pool(), trained=False)
    # A layer with several outputs for each input is a grouped one here, as in the published code: an average
    # alone would give it too few channels.
    depthwise = layer.is_depthwise and layer.outputs == layer.inputs
    middle = middle or (2 * layer.inputs if depthwise else layer.inputs)
    widen = Stage(point, channels=middle, residual=middle == layer.inputs)
    chains = normed(own)
    if depthwise:
        chains["average"] = (average,)
    else:
        chains |= normed(point) | {"average": (Stage(point, channels=layer.outputs), average)}
    chains |= {f"{point.name}_{own.name}": (widen, Stage(own))}
    return Structure(layer, starting(chains, 1.0, 0.0) if single_init else chains)


def replknet(layer: Geometry, *, small: int = 5) -> Structure:
    """RepLKNet (arXiv 2203.06717, section 3.2): a large and a small kernel, a batch norm each.

    `small` is the side of the small kernel, which is no larger than the layer's window along any axis: a
    layer of 5x5 has the one kernel only.

    Raises:
      ValueError: a small kernel that cannot be centred in the window.
    """
    return Structure(layer, normed(Kernel(layer.window), Kernel(tuple(min(small, n) for n in layer.window))))


# UniRepLKNet's dilated kernels, (size, dilation), by the size of the large kernel.
DILATED_KERNELS: dict[int, tuple[tuple[int, int], ...]] = {
    17: ((5, 1), (9, 2), (3, 4), (3, 5), (3, 7)),
    15: ((5, 1), (7, 2), (3, 3), (3, 5), (3, 7)),
    13: ((5, 1), (7, 2), (3, 3), (3, 4), (3, 5)),
    11: ((5, 1), (5, 2), (3, 3), (3, 4), (3, 5)),
    9: ((5, 1), (5, 2), (3, 3), (3, 4)),
    7: ((5, 1), (3, 2), (3, 3)),
    5: ((3, 1), (3, 2)),
}


def unireplknet(layer: Geometry) -> Structure:
    """UniRepLKNet (arXiv 2311.15599, section 3.1): a large kernel and smaller dilated ones, a norm each.

    Raises:
      ValueError: a window whose sides differ, or of a size for which no set of kernels is published.
    """
    size = layer.window[0] if layer.window else 0
    if set(layer.window) != {size} or size not in DILATED_KERNELS:
        sizes = ", ".join(map(str, sorted(DILATED_KERNELS)))
        raise ValueError(f"the window is {layer.window}: all sides must be the same, one of {sizes}")
    axes = layer.axes
    return Structure(
        layer,
        normed(Kernel(layer.window), *(Kernel((k,) * axes, (d,) * axes) for k, d in DILATED_KERNELS[size])),
    )


def qarepvgg(layer: Geometry, *, pool: bool = False) -> Structure:
    """QARepVGG (arXiv 2212.01593, section 4): RepVGG with norms only in the first branch and after the sum.

    With `pool`, the second version of the paper: average pooling as a further branch.
    """
    own, *others = default_maps(layer)
    others = [*others, Pool()] if pool and layer.has_identity else others
    plain = {m.name: (Stage(m, "", trained=m.has_scale),) for m in others}
    return Structure(layer, normed(own) | plain, norm=True)


def orepa(layer: Geometry) -> Structure:
    """OREPA (arXiv 2204.00826, section 3.2): six linear branches with a trainable scale each, then a norm.

    The kernel, a 1x1 spread over the window, a 1x1 times a table of cosines, a 1x1 followed by a kernel, a
    1x1, and a depthwise kernel of eight outputs a channel followed by a 1x1. There is no norm inside the
    sum, so that the branches are merged before each convolution. The tensors are drawn from Kaiming's
    uniform distribution, +-sqrt(6 / fan_in), but the 1x1 before the kernel starts at the identity. It has as
    many outputs as inputs, or with more than four groups twice as many. The scales are decayed with the
    tensors, as in the published training.

    Raises:
      ValueError: a layer without a window of several taps, for which the branches are one and the same map.
    """
    chains = _orepa_chains(layer, math.sqrt(6), 2 * layer.inputs if layer.groups > 4 else layer.inputs)
    if layer.has_pointwise:
        point = Kernel((1,) * layer.axes)
        chains[point.name] = (Stage(point, "scale", gain=math.sqrt(6), decay_gain=True),)
    return Structure(layer, chains, norm=True)


def orepa_repvgg(layer: Geometry) -> Structure:
    """RepVGG with OREPA's branches in place of its kernel (arXiv 2204.00826, `RepVGGBlock_OREPA`).

    The branches of `orepa` but the 1x1, with their scales, have a norm after their sum, and are one kernel
    when they run. The 1x1 and the identity are branches with norms as in `repvgg`. As published, the tensors
    are drawn from +-sqrt(3 / fan_in), and the 1x1 before the kernel has as many outputs as inputs.

    Raises:
      ValueError: as `orepa`.
    """
    _, *others = default_maps(layer)
    chains = _orepa_chains(layer, math.sqrt(3), layer.inputs)
    return Structure(layer, chains | normed(*others), sums={"squeezed": tuple(chains)})


def _orepa_chains(layer: Geometry, gain: float, middle: int) -> dict[str, Chain]:
    """Returns OREPA's branches but the 1x1 alone.

    Args:
      layer: the layer.
      gain: that of every tensor, as in `Stage`.
      middle: channels between the 1x1 and the kernel that make one branch.

    Raises:
      ValueError: a window of one tap.
    """
    if layer.taps == 1:
        raise ValueError(f"the window is {layer.window}: with one tap all branches would be the same map")
    own, point = Kernel(layer.window), Kernel((1,) * layer.axes)
    inner = functools.partial(Stage, then="", gain=gain)

    def last(m: Branch, start: float) -> Stage:
        return Stage(m, "scale", start=start, gain=gain, decay_gain=True)

    return {
        own.name: (last(own, 0.25),),
        "average": (last(Average(), 0.25),),
        "frequency": (last(Frequency(), 0.0),),
        f"{point.name}_{own.name}": (inner(point, channels=middle, residual=True), last(own, 0.5)),
        f"depthwise_{point.name}": (inner(own, expansion=8), last(point, 0.5)),
    }


def repmlp(layer: Geometry) -> Structure:
    """RepMLPNet (arXiv 2112.11081, locality injection): a dense layer over a map, and 1x1 and 3x3 in it.

    The layer's window is the map, and each of its positions an output of each group (see `Local`). Every
    branch has a batch norm whose channels are maps: all positions of a map share its statistics.
    """
    return Structure(layer, normed(*_dense_and_local(layer), shared=layer.taps))


def repopt_mlp(layer: Geometry) -> Structure:
    """The branches of `repmlp` for a search: a scale for each output of each branch, a norm after the sum."""
    return Structure(layer, scaled(*_dense_and_local(layer)), norm=True)


def _dense_and_local(layer: Geometry) -> list[Branch]:
    return [Kernel(layer.window), *(Local((k,) * layer.axes) for k in (1, 3))]


# Name of a structure -> its description.
STRUCTURES: dict[str, Description] = {
    "repvgg": repvgg,
    "mobileone": mobileone,
    "repghost": repghost,
    "acnet": acnet,
    "dbb": dbb,
    "replknet": replknet,
    "unireplknet": unireplknet,
    "qarepvgg": qarepvgg,
    "qarepvgg2": functools.partial(qarepvgg, pool=True),
    "orepa": orepa,
    "orepa_repvgg": orepa_repvgg,
    "repmlp": repmlp,
}


def _is_ordinary(layer: Geometry) -> bool:
    """Whether the window has more than one tap and no side of seven or more."""
    return layer.taps > 1 and max(layer.window) < 7


# Description -> whether its authors give a layer the structure. The others stay a plain convolution with its
# batch norm in their networks, though the structure is defined for them.
PUBLISHED_FOR: dict[Description, Callable[[Geometry], bool]] = {acnet: _is_ordinary, dbb: _is_ordinary}


def default_branches(
    kernel: Sequence[int],
    *,
    groups: int = 1,
    stride: Sequence[int] | int = 1,
    layout: str = "...io",
    stacked: int = 0,
) -> BranchSet:
    """Returns the branches of `repopt` for a layer of which only the kernel is known, as a `BranchSet`.

    k x k -> kxk + 1x1 + identity; depthwise k x k -> kxk + 1x1; a 1x1 or dense layer -> full + identity. The
    1x1 branch and the identity need odd sides; the identity also stride 1 and as many input as output
    channels.

    Args:
      kernel: its shape, (*stack, *spatial, in/groups, out), or ordered as `layout` says.
      groups, layout, stacked: as in `BranchSet`.
      stride: the layer's stride, one number or one for each spatial axis.
    """
    shape = tuple(kernel)[stacked:]
    *window, inputs, out = shape if layout == "...io" else (*shape[2:], shape[1], shape[0])
    layer = Geometry(tuple(window), inputs * groups, out, groups, strides=stride)
    return BranchSet(tuple(kernel), repopt(layer).branch_set().branches, groups, layout, stacked)
