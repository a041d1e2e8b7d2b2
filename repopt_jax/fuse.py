"""Deploying: batch norm and branches folded into plain convolutions, as a new model.

Batch norm with fixed statistics is y = s * x + b (`algebra.bn_affine`), so folding it is the merge of
`branches` with s_b = gamma / sqrt(var + eps). What a block folds into is a function of its class; register
one with `fuse_block.register` to make `fuse` work for a block of your own.
Source: RepVGG (arXiv 2101.03697), section 3.3.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from repopt_jax import algebra
from repopt_jax.branches import BranchSet
from repopt_jax.nn.blocks import ConvNorm, FusedBlock, PlainBlock, RepVGGBlock
from repopt_jax.nn.csla import CSLAConv, plain_convolution
from repopt_jax.nn.ghost import RepGhostConv
from repopt_jax.nn.mobileone import MobileOneBlock
from repopt_jax.nn.modules import named_modules, replace_modules


def fuse(model: nnx.Module, *, only: tuple[type[nnx.Module], ...] = ()) -> nnx.Module:
    """A plain model that computes what `model` computes in evaluation mode; `model` is untouched.

    Args:
      model: the model, in evaluation mode.
      only: block classes; if given, blocks of other classes stay as they are. `only=(nn.RepGhostConv,)`
        merges RepGhost's branches and keeps the batch norms elsewhere: the deployed form that its authors
        publish.

    Raises:
      ValueError: the model is in training mode (batch norms use batch statistics): call `model.eval()` first.
      TypeError: a batch norm or CSLA layer that belongs to no block for which `fuse_block` is registered, or
        such a class in `only`.
    """
    default = fuse_block.dispatch(object)
    if unknown := [cls.__name__ for cls in only if fuse_block.dispatch(cls) is default]:
        raise TypeError(f"`only` names {', '.join(unknown)}, for which no deployed form is registered")
    training = [p for p, m in _batch_norms(model) if not m.use_running_average]
    if training:
        raise ValueError(
            f"the model is in training mode (batch norms {_some(training)} use batch statistics), so a fused "
            "copy would compute something else: call `model.eval()` first"
        )

    def replace(_: str, module: nnx.Module) -> nnx.Module | None:
        wanted = isinstance(module, only) if only else fuse_block.dispatch(type(module)) is not default
        return fuse_block(module) if wanted else None

    fused = replace_modules(model, replace)
    left = [p for p, m in named_modules(fused) if isinstance(m, (nnx.BatchNorm, CSLAConv))]
    if left and not only:
        raise TypeError(
            f"{_some(left)} cannot be folded: they are in no block that `fuse_block` knows; register one for "
            "the class that holds them"
        )
    return fused


@dataclasses.dataclass(frozen=True)
class OutputDifference:
    """How far a deployed model's outputs are from the original's.

    Attributes:
      max_abs: largest absolute difference of an output.
      max_rel: the same, divided by the largest absolute output of the original.
      agreement: share of the inputs for which both have the same largest output.
      count: number of inputs.
    """

    max_abs: float
    max_rel: float
    agreement: float
    count: int


def output_difference(
    model: Callable[[jax.Array], jax.Array],
    deployed: Callable[[jax.Array], jax.Array],
    images: jax.Array,
    *,
    batch_size: int = 256,
) -> OutputDifference:
    """Runs both models on `images` (count, height, width, channels) and compares their outputs (count,
    classes)."""
    run, run_deployed = nnx.jit(lambda m, x: m(x)), nnx.jit(lambda m, x: m(x))
    batches = [jnp.asarray(images[i : i + batch_size]) for i in range(0, len(images), batch_size)]
    a = np.concatenate([np.asarray(run(model, batch)) for batch in batches])
    b = np.concatenate([np.asarray(run_deployed(deployed, batch)) for batch in batches])
    max_abs = float(np.abs(a - b).max())
    agreement = float(np.mean(a.argmax(-1) == b.argmax(-1)))
    return OutputDifference(max_abs, max_abs / float(np.abs(a).max()), agreement, len(images))


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


def fold_batch_norm(conv: nnx.Conv | CSLAConv, bn: nnx.BatchNorm) -> nnx.Conv:
    """One convolution with a bias that computes bn(conv(x)): K * s and (bias * s) + b, with (s, b) of the
    batch norm."""
    return _conv_like(conv, *_folded(conv, bn))


def merge_normalised(
    branches: BranchSet,
    convs: Mapping[str, Sequence[tuple[nnx.Conv | CSLAConv, nnx.BatchNorm]]],
    bn_identity: nnx.BatchNorm | None = None,
) -> nnx.Conv:
    """One convolution with a bias that computes sum_bj bn_bj(conv_bj(x)) + bn_identity(x).

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
    scales = {name: jnp.ones((branches.out,), w.dtype) for name, w in weights.items()}
    if bn_identity is not None:
        weights["identity"], bias = _affine(bn_identity)
        biases.append(bias)
    first, _ = next(iter(convs.values()))[0]
    return _conv_like(first, branches.merge(weights, scales), functools.reduce(jnp.add, biases))


def _folded(conv: nnx.Conv | CSLAConv, bn: nnx.BatchNorm) -> tuple[jax.Array, jax.Array]:
    """Kernel and bias of bn(conv(x))."""
    s, b = _affine(bn)
    kernel = conv.merged_kernel() if isinstance(conv, CSLAConv) else conv.kernel[...]
    bias = b if conv.bias is None else b + conv.bias[...] * s
    return algebra.scale_output(kernel, s), bias


def _affine(bn: nnx.BatchNorm) -> tuple[jax.Array, jax.Array]:
    mean, var = bn.mean[...], bn.var[...]
    gamma = jnp.ones_like(var) if bn.scale is None else bn.scale[...]
    beta = jnp.zeros_like(var) if bn.bias is None else bn.bias[...]
    return algebra.bn_affine(gamma, beta, mean, var, eps=bn.epsilon)


def _conv_like(conv: nnx.Conv | CSLAConv, kernel: jax.Array, bias: jax.Array) -> nnx.Conv:
    """A plain convolution with the geometry of `conv` and this kernel and bias."""
    if isinstance(conv, CSLAConv):
        groups, dilation, precision = conv.branches.groups, conv.dilation, None
    else:
        plain_convolution(conv)
        groups, dilation, precision = conv.feature_group_count, conv.kernel_dilation, conv.precision
    zeros = nnx.initializers.zeros_init()
    new = nnx.Conv(
        kernel.shape[-2] * groups,
        kernel.shape[-1],
        kernel.shape[:-2],
        strides=conv.strides,
        padding=conv.padding,
        kernel_dilation=dilation,
        feature_group_count=groups,
        dtype=conv.dtype,
        precision=precision,
        param_dtype=kernel.dtype,
        kernel_init=zeros,
        bias_init=zeros,
        rngs=nnx.Rngs(0),
    )
    new.kernel[...] = kernel
    new.bias = nnx.Param(bias.astype(kernel.dtype))
    return new


def _batch_norms(model: nnx.Module) -> list[tuple[str, nnx.BatchNorm]]:
    return [(p, m) for p, m in named_modules(model) if isinstance(m, nnx.BatchNorm)]


def _some(names: list[str], most: int = 3) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
