"""Deploying: batch norm and branches folded into plain convolutions, as a new model.

Batch norm with fixed statistics is y = s * x + b (`algebra.bn_affine`), so folding it is the merge of
`branches` with s_b = gamma / sqrt(var + eps). What a block folds into is a function of its class; register
one with `fuse_block.register` to make `fuse` work for a block of your own, or tell `fuse` in `pairs` which
batch norm comes after which layer.
Source: RepVGG (arXiv 2101.03697), section 3.3.
"""

import dataclasses
import functools
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from repopt_jax.core import algebra, paths
from repopt_jax.core.branches import BranchSet
from repopt_jax.nn.blocks import ConvNorm, FusedBlock, PlainBlock, RepVGGBlock
from repopt_jax.nn.csla import CSLAConv, plain_convolution
from repopt_jax.nn.ghost import RepGhostConv
from repopt_jax.nn.mobileone import MobileOneBlock
from repopt_jax.nn.normed import NormedBranches, PassThrough
from repopt_jax.surgery.layers import PAD_MODES, check_plain, explicit_padding
from repopt_jax.surgery.modules import aliases, named_modules, replace_modules

Foldable = nnx.Conv | nnx.Linear | CSLAConv | NormedBranches
_FOLDABLE = (nnx.Conv, nnx.Linear, CSLAConv, NormedBranches)


def fuse(
    model: nnx.Module, *, only: tuple[type[nnx.Module], ...] = (), pairs: Mapping[str, str] | None = None
) -> nnx.Module:
    r"""A plain model that computes what `model` computes in evaluation mode; `model` is untouched.

    Blocks of this package, and of classes for which `fuse_block` is registered, fold by themselves, and so do
    layers made of branches (`nn.CSLAConv`, `nn.NormedBranches`) anywhere. Batch norms in classes of your own
    fold by their paths:

        fuse(model, pairs={r"(.*/)?conv(\d*)": r"\1bn\2", r"(.*/)?downsample/0": r"\1downsample/1"})

    Args:
      model: the model, in evaluation mode.
      only: block classes; if given, blocks of other classes stay as they are, and so do batch norms that
        nothing folds. `only=(nn.RepGhostConv,)` merges RepGhost's branches and keeps the batch norms
        elsewhere: the deployed form that its authors publish.
      pairs: regular expression for the whole path of a convolution or dense layer -> path of the batch norm
        that reads its output, and nothing else does, with the groups of the expression; the first that
        matches counts. The layer takes in the batch norm, in whose place stands `nn.PassThrough`. That
        nothing else reads the output, and nothing is between the two, is yours to know: `output_difference`
        tells.

    Raises:
      ValueError: the model is in training mode (batch norms use batch statistics): call `model.eval()` first;
        or `pairs` that cannot be folded, all of them with the reasons.
      TypeError: a batch norm that belongs to no block for which `fuse_block` is registered and to no pair, a
        layer that has no plain form, or a class in `only` that is not registered.
    """
    default = fuse_block.dispatch(object)
    if unknown := [cls.__name__ for cls in only if fuse_block.dispatch(cls) is default]:
        raise TypeError(f"`only` names {', '.join(unknown)}, for which no deployed form is registered")
    norms = {p: m for p, m in named_modules(model) if isinstance(m, nnx.BatchNorm)}
    if training := [p for p, m in norms.items() if not m.use_running_average]:
        raise ValueError(
            f"the model is in training mode (batch norms {paths.listed(training)} use batch statistics), so "
            "a fused copy would compute something else: call `model.eval()` first"
        )

    def wanted(module: nnx.Module) -> bool:
        return isinstance(module, only) if only else fuse_block.dispatch(type(module)) is not default

    norm_of = _pair_up(model, pairs or {}, wanted)
    taken_in = set(norm_of.values())

    def replace(path: str, module: Any) -> nnx.Module | None:
        if path in norm_of:
            return fold_batch_norm(module, norms[norm_of[path]])
        if path in taken_in:
            return PassThrough()
        return fuse_block(module) if wanted(module) else None

    fused = replace_modules(model, replace)
    left = [p for p, m in named_modules(fused) if isinstance(m, nnx.BatchNorm)]
    if left and not only:
        raise TypeError(
            f"{paths.listed(left)} cannot be folded: they are in no block that `fuse_block` knows; register "
            "one for the class that holds them, name the layers before them in `pairs`, or fold other things "
            "alone with `only`"
        )
    return fused


@dataclasses.dataclass(frozen=True)
class OutputDifference:
    """How far a deployed model's outputs are from the original's.

    Attributes:
      max_abs: largest absolute difference of an output.
      max_rel: the same, divided by the largest absolute output of the original; of several outputs, the
        largest.
      agreement: share of the inputs (of a detector: of their locations) for which both have the same largest
        logit.
      count: number of inputs.
    """

    max_abs: float
    max_rel: float
    agreement: float
    count: int


def output_difference(
    model: Callable[[jax.Array], Any],
    deployed: Callable[[jax.Array], Any],
    images: jax.Array,
    *,
    batch_size: int = 256,
) -> OutputDifference:
    """Runs both models on `images` (count, height, width, channels) and compares their outputs: logits
    (count, classes), or a tree of arrays (count, ...) of which the first are logits (count, ..., classes)."""
    run, run_deployed = nnx.jit(lambda m, x: m(x)), nnx.jit(lambda m, x: m(x))
    batches = [jnp.asarray(images[i : i + batch_size]) for i in range(0, len(images), batch_size)]
    pairs = [
        (jax.tree.leaves(run(model, batch)), jax.tree.leaves(run_deployed(deployed, batch)))
        for batch in batches
    ]
    outputs = [[np.concatenate(parts) for parts in zip(*side)] for side in zip(*pairs)]
    compared = [(a, b) for a, b in zip(*outputs) if a.size]
    differences = [float(np.abs(a - b).max()) for a, b in compared]
    sizes = [float(np.abs(a).max()) for a, _ in compared]
    logits, deployed_logits = compared[0]
    return OutputDifference(
        max_abs=max(differences),
        max_rel=max(d / size if size else d for d, size in zip(differences, sizes)),
        agreement=float(np.mean(logits.argmax(-1) == deployed_logits.argmax(-1))),
        count=len(images),
    )


@functools.singledispatch
def fuse_block(block: nnx.Module) -> nnx.Module:
    """The deployed form of one block, by its class."""
    raise TypeError(f"no deployed form is registered for {type(block).__name__}")


@fuse_block.register
def _(block: ConvNorm) -> nnx.Conv:
    return fold_batch_norm(block.conv, block.bn)


@fuse_block.register
def _(block: PlainBlock) -> FusedBlock:
    return FusedBlock(fold_batch_norm(block.conv, block.bn), block.se, se_first=block.se_first)


@fuse_block.register
def _(block: RepVGGBlock) -> FusedBlock:
    convs = {"3x3": [(block.conv_3x3, block.bn_3x3)], "1x1": [(block.conv_1x1, block.bn_1x1)]}
    merged = merge_normalised(block.branches, convs, block.bn_identity)
    return FusedBlock(merged, block.se, se_first=block.se_first)


@fuse_block.register
def _(block: RepGhostConv) -> nnx.Conv:
    return merge_normalised(block.branches, {"3x3": [(block.conv, block.bn)]}, block.bn_identity)


@fuse_block.register
def _(block: MobileOneBlock) -> FusedBlock:
    kxk, *_ = block.branches.names
    convs = {kxk: [(layer.conv, layer.bn) for layer in block.conv_kxk]}
    if block.conv_1x1 is not None:
        convs["1x1"] = [(block.conv_1x1.conv, block.conv_1x1.bn)]
    merged = merge_normalised(block.branches, convs, block.bn_identity)
    return FusedBlock(merged, block.se, se_first=True)


@fuse_block.register(CSLAConv)
@fuse_block.register(NormedBranches)
def _(block: CSLAConv | NormedBranches) -> nnx.Conv | nnx.Linear:
    return _plain_like(block, *kernel_and_bias(block))


def fold_batch_norm(layer: Foldable, bn: nnx.BatchNorm) -> Any:
    """One plain layer with a bias that computes bn(layer(x)): K * s and (bias * s) + b, with (s, b) of the
    batch norm. Of stacked layers, each with its own part of a stacked batch norm."""
    return _plain_like(layer, *_folded(layer, bn))


def merge_normalised(
    branches: BranchSet,
    convs: Mapping[str, Sequence[tuple[Foldable, nnx.BatchNorm]]],
    bn_identity: nnx.BatchNorm | None = None,
) -> Any:
    """One layer with a bias that computes sum_bj bn_bj(conv_bj(x)) + bn_identity(x).

    K = sum_b E_b(sum_j s_bj * w_bj), bias = sum b_bj, with (s, b) of each batch norm.

    Args:
      branches: how the branches' kernels enter the merged one.
      convs: name of each branch with a kernel -> its convolutions with their batch norms. The first one of
        all has the merged convolution's strides and padding.
      bn_identity: of the branch "identity", where `branches` has it.
    """
    folded = {name: [_folded(conv, bn) for conv, bn in pairs] for name, pairs in convs.items()}
    weights = {name: functools.reduce(jnp.add, [kernel for kernel, _ in f]) for name, f in folded.items()}
    biases = [bias for f in folded.values() for _, bias in f]
    if bn_identity is not None:
        weights["identity"], bias = _affine(bn_identity)
        biases.append(bias)
    first, _ = next(iter(convs.values()))[0]
    return _plain_like(first, *_merged(branches, weights, biases))


def kernel_and_bias(layer: Foldable) -> tuple[jax.Array, jax.Array | None]:
    """Kernel and bias, or None, of the plain layer that computes what `layer` does in evaluation mode."""
    bias = None if layer.bias is None else layer.bias[...]
    if isinstance(layer, CSLAConv):
        return layer.merged_kernel(), bias
    if not isinstance(layer, NormedBranches):
        return layer.kernel[...], bias
    weights, biases = {}, [] if bias is None else [bias]
    for b in layer.branches.branches:
        s, shift = _affine(layer.norms[b.name])
        weights[b.name] = algebra.scale_output(layer.weights[b.name][...], s) if b.has_scale else s
        biases.append(shift)
    return _merged(layer.branches, weights, biases)


def _merged(
    branches: BranchSet, weights: Mapping[str, jax.Array], biases: Sequence[jax.Array]
) -> tuple[jax.Array, jax.Array]:
    """Kernel and bias of a sum of branches into whose weights their batch norms have been multiplied."""
    scales = {name: jnp.ones((branches.out,), w.dtype) for name, w in weights.items()}
    return branches.merge(weights, scales), functools.reduce(jnp.add, biases)


def _folded(layer: Foldable, bn: nnx.BatchNorm) -> tuple[jax.Array, jax.Array]:
    """Kernel and bias of bn(layer(x))."""
    s, b = _affine(bn)
    kernel, bias = kernel_and_bias(layer)
    scale_output = algebra.scale_output
    for _ in s.shape[:-1]:  # the axes of a stack
        scale_output = jax.vmap(scale_output)
    return scale_output(kernel, s), b if bias is None else b + bias * s


def _affine(bn: nnx.BatchNorm) -> tuple[jax.Array, jax.Array]:
    mean, var = bn.mean[...], bn.var[...]
    gamma = jnp.ones_like(var) if bn.scale is None else bn.scale[...]
    beta = jnp.zeros_like(var) if bn.bias is None else bn.bias[...]
    return algebra.bn_affine(gamma, beta, mean, var, eps=bn.epsilon)


def _plain_like(layer: Foldable, kernel: jax.Array, bias: jax.Array | None) -> Any:
    """A plain layer with the geometry of `layer` and this kernel and bias."""
    if isinstance(layer, (CSLAConv, NormedBranches)):
        plain = _plain_layer(layer)
    else:
        if isinstance(layer, nnx.Conv):
            plain_convolution(layer)
        plain = nnx.clone(layer)
    plain.kernel.set_value(kernel)
    plain.bias = nnx.data(None if bias is None else nnx.Param(bias.astype(kernel.dtype)))
    plain.use_bias = bias is not None
    plain.param_dtype = kernel.dtype
    return plain


def _plain_layer(layer: CSLAConv | NormedBranches) -> nnx.Conv | nnx.Linear:
    """A plain layer that samples what `layer` does, of any kernel."""
    *window, inputs, outputs = layer.branches.kernel
    zeros = {"kernel_init": nnx.initializers.zeros_init(), "use_bias": False, "rngs": nnx.Rngs(0)}
    inputs *= layer.branches.groups
    if not window:
        return nnx.Linear(inputs, outputs, dtype=layer.dtype, **zeros)
    options = {
        "strides": layer.strides,
        "padding": layer.padding,
        "kernel_dilation": layer.dilation,
        "feature_group_count": layer.branches.groups,
        "dtype": layer.dtype,
    }
    if layer.pad_mode != "constant":
        (options["padding"],) = (name for name, mode in PAD_MODES.items() if mode == layer.pad_mode)
    plain = nnx.Conv(inputs, outputs, window, **options, **zeros)
    if layer.pad_mode != "constant" and explicit_padding(plain) != layer.padding:
        raise TypeError(
            f"a layer with padding {layer.padding} in mode {layer.pad_mode!r} has no plain form: nnx.Conv "
            f"pads by {explicit_padding(plain)} in that mode"
        )
    return plain


def _pair_up(
    model: nnx.Module, pairs: Mapping[str, str], is_block: Callable[[nnx.Module], bool]
) -> dict[str, str]:
    """Path of each layer that `pairs` name -> path of its batch norm."""
    modules, others = dict(named_modules(model)), aliases(model)
    blocks = [p for p, m in modules.items() if is_block(m) and not isinstance(m, _FOLDABLE)]
    inside = tuple(f"{path}/" if path else "" for path in blocks)
    outside = {p: m for p, m in modules.items() if not p.startswith(inside)}
    layers = {p: m for p, m in outside.items() if isinstance(m, _FOLDABLE)}
    rules = [(paths.compiled(pattern, "pairs"), target) for pattern, target in pairs.items()]
    every: dict[str, list[str]] = {path: [path] for path in modules}
    for other, own in others.items():
        every[own].append(other)
    idle = [
        pattern.pattern
        for pattern, _ in rules
        if not any(pattern.fullmatch(use) for path in layers for use in every[path])
    ]
    found, problems = {}, []
    if idle:
        problems.append(
            f"the rules {', '.join(map(repr, idle))} match none of the layers {paths.listed(list(layers), 8)}"
        )
    for path, layer in layers.items():
        targets = [_first_match(rules, use) for use in every[path]]
        if any(target is not None for target in targets):
            try:
                found[path] = _norm_of(path, layer, targets, outside, every)
            except ValueError as error:
                problems.append(f"{path}: {error}")
    takers: dict[str, list[str]] = {}
    for path, norm in found.items():
        takers.setdefault(norm, []).append(path)
    problems += [f"{', '.join(p)} cannot all take in {norm}" for norm, p in takers.items() if len(p) > 1]
    if problems:
        raise ValueError(f"`pairs` cannot be folded: {'; '.join(problems)}")
    return found


def _norm_of(
    path: str,
    layer: Foldable,
    targets: Sequence[str | None],
    modules: Mapping[str, nnx.Module],
    every: Mapping[str, Sequence[str]],
) -> str:
    """The own path of the batch norm that comes after `layer`, wherever that is used: `targets` are the paths
    that the rules give for each of its paths."""
    own = {use: path for path, uses in every.items() for use in uses}
    norms = [own.get(target, target) for target in targets if target is not None]
    bn = modules.get(norms[0])
    if not isinstance(bn, nnx.BatchNorm):
        raise ValueError(f"there is no batch norm at {norms[0]} (in a block that does not fold by itself)")
    if len(set(norms)) > 1 or set(every[norms[0]]) != set(targets):
        uses = ", ".join(f"{use} -> {target}" for use, target in zip(every[path], targets))
        raise ValueError(
            f"layer or batch norm is used in several places ({uses}; {norms[0]} is "
            f"{', '.join(every[norms[0]])}), and one can be folded into the other only where they always "
            "come together"
        )
    if type(bn).__call__ is not nnx.BatchNorm.__call__ or bn.axis != -1:
        raise ValueError(f"the batch norm at {norms[0]} is not along the last axis, or of a class of its own")
    if isinstance(layer, (nnx.Conv, nnx.Linear)):
        check_plain(layer)
    channels = _channels(layer)
    if bn.var.shape != channels:
        raise ValueError(f"it has {channels} channels, and the batch norm at {norms[0]} {bn.var.shape}")
    return norms[0]


def _channels(layer: Foldable) -> tuple[int, ...]:
    """Shape of what belongs to the output channels, with the axes of a stack in front."""
    if isinstance(layer, CSLAConv):
        return layer.stacked_branches().vector_shape
    if isinstance(layer, NormedBranches):
        return (layer.branches.out,)
    axes = len(layer.kernel_size) if isinstance(layer, nnx.Conv) else 0
    return (*layer.kernel.shape[: -2 - axes], layer.out_features)


def _first_match(rules: Sequence[tuple[re.Pattern[str], str]], path: str) -> str | None:
    matches = ((pattern.fullmatch(path), target) for pattern, target in rules)
    return next((paths.expanded(match, target, "pairs") for match, target in matches if match), None)
