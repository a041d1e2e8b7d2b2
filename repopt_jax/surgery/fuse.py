"""Deployment: folds batch norms and branches into plain convolutions, in a new model.

Batch norm with fixed statistics is y = s * x + b (`algebra.bn_affine`), so folding it is the merge of a
structure (`core.structure`) with a = gamma / sqrt(var + eps). Each class of blocks has a function that folds
it; register one with `fuse_block.register` for a block of your own, or name in `pairs` which batch norm
follows which layer.

Source: RepVGG (arXiv 2101.03697), section 3.3.
"""

import contextlib
import dataclasses
import functools
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from repopt_jax.arguments import check_array, check_count, check_kind
from repopt_jax.core import algebra, paths
from repopt_jax.core.branches import Shape
from repopt_jax.nn.block import Block, ChannelAffine, PreNorm
from repopt_jax.nn.branched import Branched, StructuredLayer, affine_of
from repopt_jax.nn.compactor import Compactor
from repopt_jax.nn.geometry import (
    ChangedOperands,
    check_plain,
    check_transposed,
    pads_with_zeros,
    plain_layer,
)
from repopt_jax.nn.merged import Merged, MergedGeneral
from repopt_jax.surgery.flow import Example, Neighbours, norms_of_layers
from repopt_jax.surgery.modules import aliases, check_model, named_modules, replace_modules

Foldable = nnx.Conv | nnx.Linear | nnx.ConvTranspose | StructuredLayer
_FOLDABLE = (nnx.Conv, nnx.Linear, nnx.ConvTranspose, StructuredLayer)


class FoldedNorm(nnx.Module):
    """Returns its first argument: takes the place of a batch norm that the layer before it has taken in."""

    def __call__(self, x: jax.Array, *args: Any, **options: Any) -> jax.Array:
        return x


def fuse(
    model: nnx.Module,
    *,
    only: tuple[type[nnx.Module], ...] = (),
    pairs: Mapping[str, str] | None = None,
    example: Example = None,
) -> nnx.Module:
    r"""Returns a plain model that equals `model` in evaluation mode; `model` itself is unchanged.

    Blocks of this package, blocks of classes for which `fuse_block` is registered, and layers of branches
    (`nn.Branched`, `nn.Merged`) are found and folded. Batch norms in classes of your own are found by the
    flow of data, if an example of the inputs is given, or by path:

        fuse(model, example=(images[:1],))
        fuse(model, pairs={r"(.*/)?conv(\d*)": r"\1bn\2", r"(.*/)?downsample/0": r"\1downsample/1"})

    Args:
      model: the model, in evaluation mode.
      only: block classes; if given, blocks of other classes are kept, as are batch norms that nothing folds.
        `only=(nn.Branched,)` merges branches and keeps the batch norms elsewhere, which is the deployed form
        of RepGhost that its authors publish.
      pairs: regular expression for the whole path of a convolution or dense layer -> path of the batch norm
        that follows it, which may refer to groups of the expression; the first expression that matches
        counts. The batch norm is folded into the layer and replaced by a `FoldedNorm`. You must know that
        only this batch norm reads the layer's output, without anything in between; `output_difference` checks
        it.
      example: what the model is called with, a tuple of arrays or `jax.ShapeDtypeStruct`s, or a function that
        calls a model, such as `lambda model: model(x, train=False)`. The model is traced with it, and every
        batch norm is folded that alone reads the output of a layer; then every other one whose output one
        layer alone reads, if that layer pads no zeros (a dense or 1x1 layer, "VALID"). The others (after a
        sum and before an activation, as in pre-activation networks) are kept.

    Raises:
      ValueError: the model is in training mode (batch norms use batch statistics): call `model.eval()` first;
        or `pairs` that cannot be folded, all with the reasons.
      TypeError: no NNX model; a model with compactors (`shrink` merges them); without `example`, a batch norm
        that belongs to no block for which `fuse_block` is registered and to no pair; a layer that has no
        plain form, or a class in `only` that is not registered; or an `example` that is neither.
    """
    check_model(model)
    default = fuse_block.dispatch(object)
    if unknown := [cls.__name__ for cls in only if fuse_block.dispatch(cls) is default]:
        raise TypeError(f"`only` names {', '.join(unknown)}, for which no deployed form is registered")
    norms = {p: m for p, m in named_modules(model) if isinstance(m, nnx.BatchNorm)}
    if training := [p for p, m in norms.items() if not m.use_running_average]:
        raise ValueError(
            f"the model is in training mode (batch norms {paths.listed(training)} use batch statistics), so "
            "a fused copy would compute something else: call `model.eval()` first"
        )
    if compactors := [p for p, m in named_modules(model) if isinstance(m, Compactor)]:
        raise TypeError(f"{paths.listed(compactors)} are compactors: merge them with `shrink` first")

    def wanted(module: nnx.Module) -> bool:
        if isinstance(module, Block) and not isinstance(module.conv, _FOLDABLE):
            return False  # its layers are folded on their own, or reported below
        return isinstance(module, only) if only else fuse_block.dispatch(type(module)) is not default

    after, before = pair_up(model, pairs or {}, wanted, example)
    taken_in = {*after.values(), *before.values()}

    def replace(path: str, module: Any) -> nnx.Module | None:
        if path in before:
            module = fold_input_norm(module, norms[before[path]])
        if path in after:
            module = fold_batch_norm(module, norms[after[path]])
        if path in after or path in before:
            return module
        if path in taken_in:
            return FoldedNorm()
        return fuse_block(module) if wanted(module) else None

    fused = replace_modules(model, replace)
    left = [p for p, m in named_modules(fused) if isinstance(m, nnx.BatchNorm)]
    if left and not only and example is None:
        raise TypeError(
            f"{paths.listed(left)} cannot be folded: they are in no block that `fuse_block` knows; register "
            "one for the class that holds them, name the layers before them in `pairs`, give an `example` of "
            "the inputs by which these are found, or fold other things alone with `only`"
        )
    return fused


@dataclasses.dataclass(frozen=True)
class OutputDifference:
    """The difference between the outputs of a deployed model and of the original.

    Attributes:
      max_abs: largest absolute difference of an output.
      max_rel: the same, divided by the largest absolute output of the original; of several outputs, the
        largest.
      agreement: fraction of the inputs (for a detector, of their locations) with the same largest logit.
      count: number of inputs.
    """

    max_abs: float
    max_rel: float
    agreement: float
    count: int


def output_difference(
    model: Callable[..., Any],
    deployed: Callable[..., Any],
    images: jax.Array,
    *,
    batch_size: int = 256,
    **options: Any,
) -> OutputDifference:
    """Runs both models on `images` (count, ...) and compares their outputs.

    Outputs are logits (count, classes), or a tree of arrays (count, ...) of which the first are logits
    (count, ..., classes).

    Args:
      model, deployed: NNX models, or any functions of a batch of images.
      images: the inputs, (count, ...).
      batch_size: how many are run at a time.
      options: further arguments of both, by name, the same for every batch: `train=False`. `nnx.Rngs` are
        copied for each call, so that both models draw the same numbers.

    Raises:
      TypeError: an argument of another type.
      ValueError: no image, or a batch of none.
    """
    check_kind("model", model, Callable, "a network")
    check_kind("deployed", deployed, Callable, "a network")
    check_array("images", images)
    check_count("batch_size", batch_size)
    if not len(images):
        raise ValueError(f"`images` are of shape {images.shape}: give one image at least")
    run, run_deployed = _runner(model, options), _runner(deployed, options)
    batches = [jnp.asarray(images[i : i + batch_size]) for i in range(0, len(images), batch_size)]
    pairs = [(jax.tree.leaves(run(batch)), jax.tree.leaves(run_deployed(batch))) for batch in batches]
    outputs, others = ([np.concatenate(parts) for parts in zip(*side)] for side in zip(*pairs))
    return difference_of(outputs, others)


def difference_of(outputs: Sequence[np.ndarray], others: Sequence[np.ndarray]) -> OutputDifference:
    """The difference of outputs that are there already, (count, ...); the first of them are logits."""
    compared = [(a, b) for a, b in zip(outputs, others, strict=True) if a.size]
    differences = [float(np.abs(a - b).max()) for a, b in compared]
    sizes = [float(np.abs(a).max()) for a, _ in compared]
    logits, deployed_logits = compared[0]
    return OutputDifference(
        max_abs=max(differences),
        max_rel=max(d / size if size else d for d, size in zip(differences, sizes)),
        agreement=float(np.mean(logits.argmax(-1) == deployed_logits.argmax(-1))),
        count=len(logits),
    )


def _runner(model: Callable[..., Any], options: Mapping[str, Any]) -> Callable[[jax.Array], Any]:
    """Returns a compiled function of a batch. An NNX model is an argument, so that it is no constant."""

    def call(one: Callable[..., Any], x: jax.Array) -> Any:
        own = {k: nnx.clone(v) if isinstance(v, nnx.Rngs) else v for k, v in options.items()}
        return one(x, **own)

    if isinstance(model, nnx.Module):
        return functools.partial(nnx.jit(call), model)
    return jax.jit(functools.partial(call, model))


@functools.singledispatch
def fuse_block(block: nnx.Module) -> nnx.Module:
    """Returns the deployed form of one block; dispatches on its class."""
    raise TypeError(f"no deployed form is registered for {type(block).__name__}")


@fuse_block.register
def _(block: Block) -> Block:
    layer = _plain(block.conv) if block.bn is None else fold_batch_norm(block.conv, block.bn)
    if not isinstance(block.pre, nnx.BatchNorm):
        return block.replaced(layer, None)
    if _pads_zeros(layer):  # pads with zeros what the norm has shifted, which no bias expresses
        return block.replaced(layer, None, pre=fuse_block(block.pre))
    return block.replaced(fold_input_norm(layer, block.pre), None, pre=None)


@fuse_block.register
def _(block: PreNorm) -> ChannelAffine:
    return ChannelAffine(*affine_of(block), dtype=block.dtype)


@fuse_block.register
def _(block: MergedGeneral) -> nnx.LinearGeneral:
    kernel, bias = block.merged_kernel(), None if block.bias is None else block.bias[...]
    axis = tuple(range(-len(block.inputs), 0))
    options: dict[str, Any] = {
        "dtype": block.dtype,
        "precision": block.precision,
        "param_dtype": kernel.dtype,
    }
    options |= {"axis": axis, "use_bias": bias is not None}
    plain = nnx.eval_shape(
        lambda: nnx.LinearGeneral(block.inputs, block.outputs, rngs=nnx.Rngs(0), **options)
    )
    plain.kernel.set_value(kernel)
    if plain.bias is not None and bias is not None:
        plain.bias.set_value(bias)
    return plain


@fuse_block.register(Branched)
@fuse_block.register(Merged)
def _(block: StructuredLayer) -> nnx.Conv | nnx.Linear:
    return _plain(block)


def fold_batch_norm(layer: Foldable, bn: nnx.BatchNorm) -> Any:
    """Returns one plain layer that computes bn(layer(x)): kernel K * s, bias (bias * s) + b.

    (s, b) are those of the batch norm. Stacked layers are folded with a batch norm that is stacked likewise.

    Raises:
      ValueError: the layer's kernel is quantized with one scale for all of its channels, or rounded ones.
    """
    changed = changed_operands(layer)
    if changed is not None and not changed.by_channel:
        raise ValueError(
            "the kernel is quantized with one scale for the whole tensor, or with rounded scales, which does "
            "not commute with the batch norm's factors: quantize per channel without `scale_bits`, or fuse "
            "before quantizing"
        )
    s, b = affine_of(bn)
    kernel, bias = _kernel_and_bias(layer)
    scale_output = algebra.scale_output
    for _ in s.shape[:-1]:  # the axes of a stack
        scale_output = jax.vmap(scale_output)
    return plain_like(layer, scale_output(kernel, s), b if bias is None else b + bias * s)


def _pads_zeros(layer: Foldable) -> bool:
    """Whether there may be zeros in the layer's input that a batch norm before it does not shift."""
    if isinstance(layer, StructuredLayer):
        geometry = layer.structure.layer
        padded = geometry.pad_mode == "constant" and any(map(any, geometry.padding))
        return padded or geometry.pad_mode == "same"
    return isinstance(layer, nnx.ConvTranspose) or pads_with_zeros(layer)


def fold_input_norm(layer: nnx.Conv | nnx.Linear | StructuredLayer, bn: nnx.BatchNorm) -> Any:
    """Returns one plain layer that computes layer(bn(x)): the kernel times s, and its response to b.

    (s, b) are those of the batch norm. It is exact if the layer pads its input with no zeros.

    Raises:
      ValueError: the layer's input is quantized, which does not commute with the batch norm.
    """
    if changed_operands(layer) is not None:
        raise ValueError(
            "the layer's input is quantized, and the batch norm before it would change that input: fuse "
            "before quantizing"
        )
    s, b = affine_of(bn)
    kernel, bias = _kernel_and_bias(layer)
    scale_input, response = algebra.scale_input, algebra.constant_response
    for _ in s.shape[:-1]:  # the axes of a stack
        scale_input, response = jax.vmap(scale_input), jax.vmap(response)
    shift = response(kernel, b)
    return plain_like(layer, scale_input(kernel, s), shift if bias is None else shift + bias)


def _plain(layer: Foldable) -> nnx.Conv | nnx.Linear:
    """Returns the plain layer that equals `layer` in evaluation mode."""
    return plain_like(layer, *_kernel_and_bias(layer))


def _kernel_and_bias(layer: Foldable) -> tuple[jax.Array, jax.Array | None]:
    if isinstance(layer, StructuredLayer):
        return layer.kernel_and_bias()
    return layer.kernel[...], None if layer.bias is None else layer.bias[...]


def plain_like(layer: Foldable, kernel: jax.Array, bias: jax.Array | None) -> Any:
    """Returns a plain layer with the geometry of `layer` and this kernel and bias."""
    if isinstance(layer, StructuredLayer):
        geometry = layer.structure.layer
        return plain_layer(geometry, kernel, bias, dtype=layer.dtype, precision=layer.precision)
    if isinstance(layer, nnx.ConvTranspose):
        check_transposed(layer)
    else:
        check_plain(layer, changed=True)
    plain = nnx.clone(layer)  # keeps its other attributes: padding by name, precision, fake quantization
    plain.kernel.set_value(kernel)
    plain.bias = nnx.data(None if bias is None else nnx.Param(bias.astype(kernel.dtype)))
    plain.use_bias = bias is not None
    plain.param_dtype = kernel.dtype
    return plain


def changed_operands(layer: nnx.Module) -> ChangedOperands | None:
    """Returns what changes the layer's operands, such as a quantizer, or None."""
    names = ("conv_general_dilated", "dot_general")
    found = (getattr(layer, name, None) for name in names)
    return next((function for function in found if isinstance(function, ChangedOperands)), None)


def pair_up(
    model: nnx.Module,
    pairs: Mapping[str, str],
    is_block: Callable[[nnx.Module], bool],
    example: Example = None,
) -> Neighbours:
    """Returns the batch norms after layers that `pairs` name, or that `example` shows, and those before.

    `example` alone shows those before, of layers that can take them in (`fold_input_norm`), where they are
    after no layer. Layers and batch norms inside modules for which `is_block` is true are left out.

    Raises:
      ValueError: rules that match no layer, or batch norms that do not belong to one layer alone, all listed.
    """
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
        # A norm that was folded or removed before has nothing left to fold.
        targets = [
            None if t and isinstance(modules.get(others.get(t, t)), FoldedNorm) else t for t in targets
        ]
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
    if example is None:
        return Neighbours(found, {})
    norms = [p for p, m in outside.items() if isinstance(m, nnx.BatchNorm) and p not in takers]
    seen, before = norms_of_layers(model, example, list(layers), norms), {}
    for path, norm in seen.after.items():
        with contextlib.suppress(ValueError):  # a norm of another kind is kept
            _check_pair(layers[path], outside[norm], norm)
            found.setdefault(path, norm)
    for path, norm in seen.before.items():
        with contextlib.suppress(ValueError):
            if norm not in found.values():
                _check_before(layers[path], outside[norm], norm)
                before[path] = norm
    return Neighbours(found, before)


def _norm_of(
    path: str,
    layer: Foldable,
    targets: Sequence[str | None],
    modules: Mapping[str, nnx.Module],
    every: Mapping[str, Sequence[str]],
) -> str:
    """Returns the canonical path of the batch norm that follows `layer` wherever the layer is used.

    `targets` are the paths that the rules give for each path of the layer.
    """
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
    _check_pair(layer, bn, norms[0])
    return norms[0]


def _check_pair(layer: Foldable, bn: Any, norm: str) -> None:
    """Raises ValueError if this batch norm, at the path `norm`, cannot be folded into the layer before it."""
    _check_norm(bn, norm)
    if isinstance(layer, nnx.ConvTranspose):
        check_transposed(layer)
    elif isinstance(layer, (nnx.Conv, nnx.Linear)):
        check_plain(layer, changed=True)
    channels = _channels(layer)
    if bn.var.shape != channels:
        raise ValueError(f"it has {channels} channels, and the batch norm at {norm} {bn.var.shape}")


def _check_before(layer: Foldable, bn: Any, norm: str) -> None:
    """Raises ValueError if this batch norm, at the path `norm`, cannot be folded into the layer after it."""
    _check_norm(bn, norm)
    if _pads_zeros(layer):
        raise ValueError("it pads with zeros what the batch norm has shifted")
    if not isinstance(layer, StructuredLayer):
        check_plain(layer)
    inputs = (*_stack(layer), layer.in_features)
    if bn.var.shape != inputs:
        raise ValueError(f"it has inputs of {inputs} channels, and the batch norm at {norm} {bn.var.shape}")


def _check_norm(bn: Any, norm: str) -> None:
    """Raises ValueError if it is no batch norm over the last axis as Flax computes it."""
    if type(bn).__call__ is not nnx.BatchNorm.__call__ or bn.axis != -1:
        raise ValueError(f"the batch norm at {norm} is not along the last axis, or of a class of its own")


def _channels(layer: Foldable) -> Shape:
    """Returns the shape of vectors over the output channels, with the axes of a stack in front."""
    return (*_stack(layer), layer.out_features)


def _stack(layer: Foldable) -> Shape:
    """Returns the axes along which equal layers are stacked."""
    if isinstance(layer, StructuredLayer):
        return layer.stack
    axes = 0 if isinstance(layer, nnx.Linear) else len(layer.kernel_size)
    return layer.kernel.shape[: -2 - axes]


def _first_match(rules: Sequence[tuple[re.Pattern[str], str]], path: str) -> str | None:
    matches = ((pattern.fullmatch(path), target) for pattern, target in rules)
    return next((paths.expanded(match, target, "pairs") for match, target in matches if match), None)
