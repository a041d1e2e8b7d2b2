"""The published blocks as structures: a description of a few lines for each, and their table.

`normed`, `scaled` and `starting` make the chains that most of them have; `STRUCTURES` names them for
`to_structure`, `prepare` and the trainer.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping, Sequence

from repopt_jax.arguments import check_kind
from repopt_jax.core.branches import (
    Average,
    Branch,
    BranchSet,
    Frequency,
    Identity,
    Kernel,
    Local,
    Pool,
    canonical_shape,
    check_layout,
)
from repopt_jax.core.structure import Chain, Description, Follower, Geometry, Stage, Structure


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


def slak(layer: Geometry, *, small: int = 5) -> Structure:
    """SLaK (arXiv 2207.03620, section 3): K x N and N x K in place of K x K, and N x N; a batch norm each.

    For each axis a kernel that is as long as the window along it and `small` along the others. There is no
    kernel of the whole window: the merged one has zeros where none of these reaches, and stays so.

    Raises:
      ValueError: a small kernel that cannot be centred in the window.
    """
    short = [min(small, n) for n in layer.window]
    long = [
        Kernel(tuple(layer.window[i] if i == axis else n for i, n in enumerate(short)))
        for axis in range(layer.axes)
    ]
    return Structure(layer, normed(*long, Kernel(tuple(short))))


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
        if not layer.window:
            raise ValueError("it is a dense layer, which has no window for large kernels")
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
    "slak": slak,
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

    Raises:
      TypeError: `kernel` is no shape.
      ValueError: `layout` does not order the axes of the kernel; or as `Geometry` and `BranchSet`.
    """
    check_kind("kernel", kernel, (tuple, list), "the shape of a kernel")
    check_layout(layout)
    shape = tuple(kernel)[stacked:]
    *window, inputs, out = canonical_shape(shape, layout)
    layer = Geometry(tuple(window), inputs * groups, out, groups, strides=stride)
    return BranchSet(tuple(kernel), repopt(layer).branch_set().branches, groups, layout, stacked)
