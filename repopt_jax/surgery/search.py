"""Between a plain network and its search network: make one of any network, extract scales, re-initialise, and
the CSLA twin.

Source: "Re-parameterizing Your Optimizers rather than Architectures" (ICLR 2023), section 3.2.
"""

import math
import zlib
from collections import Counter
from collections.abc import Mapping
from typing import Any, Literal, TypeVar, overload

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from repopt_jax.core import paths
from repopt_jax.core.branches import BranchSet
from repopt_jax.core.scales import LayerScales, Scales, ScalesMetadata, check_finite, check_fit, is_concrete
from repopt_jax.nn.blocks import ConvNorm
from repopt_jax.nn.csla import CSLAConv, Form
from repopt_jax.nn.normed import NormedBranches
from repopt_jax.surgery.layers import (
    Branches,
    Layer,
    Select,
    check_aliases,
    find_branches,
    find_layers,
    layers_at,
)
from repopt_jax.surgery.modules import aliases, join, named_modules, own, replace_modules

M = TypeVar("M")
Weights = dict[str, dict[str, jax.Array]]


def to_search(
    model: nnx.Module,
    select: Select = None,
    branches: Branches = None,
    *,
    scales: Literal["depth", "ones"] | Scales = "depth",
    form: Form = "merged",
    rngs: nnx.Rngs,
) -> nnx.Module:
    """A copy of any NNX model in which the selected convolutions and dense layers are CSLA layers with
    trainable scales: the network of a hyper-search.

        search_model = to_search(model, r"(stem|stages/.*)", rngs=nnx.Rngs(0))

    Train it as you would train `model`, then `extract_scales`. Biases, batch norms and everything else are
    copied; only the selected layers' kernels give way to branch tensors, freshly drawn. A layer that is used
    in several places stays one layer; layers stacked for `nnx.scan` or `nnx.vmap` stay so, each with scales
    of its own. A layer's `dtype`, `precision` and its kernel's dtype are kept; metadata of its variables
    (sharding names) are not.

    Args:
      model: the network, untouched.
      select: which layers, as in `find_layers`; by default all of them.
      branches: of which branches they are made, as in `find_branches`.
      scales: where the scales start: "depth", `depth_scales`; "ones"; or given ones, for exactly these layers
        and branches.
      form: how the layers compute, "merged" or "branches"; see `nn.CSLAConv`.
      rngs: source of the draws (stream `params`). One key for each path: adding a layer changes no other's
        draw.

    Raises:
      ValueError: as `find_layers` and `find_branches`; scales that do not fit, with every path; an unknown
        word.
    """
    if isinstance(scales, Scales):
        check_aliases(model, scales.entries)
        check_fit(scales, find_branches(model, select, branches))
    elif scales == "depth":
        scales = depth_scales(model, select, branches)
    elif scales == "ones":
        scales = Scales.ones(find_branches(model, select, branches))
    else:
        raise ValueError(f"`scales` is {scales!r}: it must be 'depth', 'ones' or a `Scales`")
    weights = sample_weights(scales, rngs.params())
    return _with_csla(model, scales, weights, trainable_scales=True, form=form)


def depth_scales(model: nnx.Module, select: Select = None, branches: Branches = None) -> Scales:
    """Scales without a search for any network: sqrt(2 / l) for the l-th layer of a row of equal ones, 1 for
    the first (l = 0); u = 1.

    A row begins at a layer that changes the width, has a stride above 1, or comes after a layer of another
    width. What comes after what is told by the order of the paths, with numbers in them as numbers: a model
    does not say in which order it calls its layers. Layers that are stacked count on along the stack. For
    another count give your own to `Scales.depth_rule(find_branches(model, ...), depths)`. Source:
    RepOptimizer paper, appendix B, where l counts the blocks of a stage.

    Args:
      model: any NNX model.
      select: which layers, as in `find_layers`.
      branches: of which branches they are made, as in `find_branches`.

    Raises:
      ValueError: as `find_layers` and `find_branches`.
    """
    depths: dict[str, np.ndarray] = {}
    width, following = 0, 0  # of the layer before; l of the next layer of the same row
    for path, layer in find_layers(model, select).items():
        stack = layer.kernel[: layer.stacked]
        continues = layer.inputs == layer.outputs == width and set(layer.strides) <= {1}
        repeats = layer.inputs == layer.outputs and set(layer.strides) <= {1}
        first = following if continues else 0
        along = np.arange(math.prod(stack)).reshape(stack)
        depths[path] = first + along if repeats else np.zeros(stack, int)
        width, following = layer.outputs, int(depths[path].max()) + 1
    return Scales.depth_rule(find_branches(model, select, branches), depths)


def extract_scales(search_model: nnx.Module, *, metadata: ScalesMetadata | None = None) -> Scales:
    """The scales of every CSLA layer of a search model, by the path that its merged kernel has in the plain
    network.

    Raises:
      ValueError: the model has no CSLA layer.
    """
    entries = {
        join(path, "kernel"): LayerScales(module.stacked_branches(), module.scale_vectors())
        for path, module in named_modules(search_model)
        if isinstance(module, CSLAConv)
    }
    if not entries:
        raise ValueError(
            "`search_model` has no CSLA layer: give the model of the hyper-search, of kind 'search' or made "
            "by `to_search`"
        )
    return Scales(entries, metadata or ScalesMetadata())


@overload
def reinitialize(
    model: M,
    scales: Scales,
    *,
    rngs: nnx.Rngs,
    branch_sets: Mapping[str, BranchSet] | None = None,
    allow_trained: bool = False,
    return_weights: Literal[False] = False,
) -> M: ...


@overload
def reinitialize(
    model: M,
    scales: Scales,
    *,
    rngs: nnx.Rngs,
    branch_sets: Mapping[str, BranchSet] | None = None,
    allow_trained: bool = False,
    return_weights: Literal[True],
) -> tuple[M, Weights]: ...


def reinitialize(
    model: Any,
    scales: Scales,
    *,
    rngs: nnx.Rngs,
    branch_sets: Mapping[str, BranchSet] | None = None,
    allow_trained: bool = False,
    return_weights: bool = False,
) -> Any:
    """Rule of initialization: every kernel that `scales` name becomes K = sum_b s_b * E_b(w_b), w_b freshly
    drawn.

    Each w_b is drawn as its branch's own layer would be; the identity's weight is the searched u.

    Args:
      model: an NNX model, or any pytree of parameters (Linen, Equinox, plain dicts).
      scales: the scales; every one of their paths must be in the model.
      branch_sets: what the scales must be of, no more and no less, as `find_branches` gives it; by default
        what the model declares in its `branch_sets()`, and of a model that declares nothing any part.
      rngs: source of the draws (stream `params`). One key for each path: adding a layer changes no other's
        draw.
      allow_trained: do it even if the running statistics of a batch norm show that the model has been
        trained. (Of a model without batch norm that cannot be told.)
      return_weights: also returns the branch tensors w_b, path -> branch -> array, which `reparameterize`
        keeps.

    Returns:
      A new model (or tree), the given one being untouched; or that and the branch tensors.

    Raises:
      ValueError: the scales do not fit (every missing, extra or misshapen path); they name a shared layer by
        another path than its own; NaN or infinite scales; or the model has been trained.
    """
    check_finite(scales)
    if isinstance(model, nnx.Module):
        check_aliases(model, scales.entries)
    if branch_sets is None:
        check_fit(scales, model)
    else:
        check_fit(scales, branch_sets)
        check_fit(scales, _arrays(model))
    if isinstance(model, nnx.Module) and not allow_trained:
        _check_fresh(model)
    weights = sample_weights(scales, rngs.params())
    fresh = with_kernels(model, merge_weights(scales, weights))
    return (fresh, weights) if return_weights else fresh


def sample_weights(scales: Scales, key: jax.Array, *, dtype: Any = jnp.float32) -> Weights:
    """Branch tensors w_b for every layer of `scales`: path -> branch -> array."""
    weights = {}
    for path, entry in scales.entries.items():
        drawn = entry.branches.sample(_key_of(path, key), dtype=dtype)
        searched = {b.name: entry.vectors[b.name] for b in entry.branches.branches if not b.has_scale}
        weights[path] = drawn | {name: u.astype(dtype) for name, u in searched.items()}
    return weights


def _key_of(path: str, key: jax.Array) -> jax.Array:
    return jax.random.fold_in(key, zlib.crc32(path.encode()))


def merge_weights(scales: Scales, weights: Mapping[str, Mapping[str, jax.Array]]) -> dict[str, jax.Array]:
    """K = sum_b s_b * E_b(w_b) for every layer: path -> merged kernel."""
    return {
        path: entry.branches.merge(weights[path], entry.vectors) for path, entry in scales.entries.items()
    }


def with_kernels(model: Any, kernels: Mapping[str, jax.Array]) -> Any:
    """A copy of an NNX model or a pytree in which the leaves named in `kernels` have these values, in their
    own dtype.

    Raises:
      ValueError: names that the model lacks. (A search or RepVGG model has branches where a plain one has
        kernels.)
    """
    graph, tree = nnx.split(model) if isinstance(model, nnx.Module) else (None, model)
    names, _ = paths.named_leaves(tree)
    if missing := [path for path in kernels if path not in names]:
        raise ValueError(
            f"the model has no kernels at {', '.join(missing)}: only a plain network (of kind 'target', not "
            "one that was made by `to_search` or `to_repvgg`) has merged kernels"
        )
    tree = paths.map_named(
        lambda path, leaf: kernels[path].astype(leaf.dtype) if path in kernels else own(leaf), tree
    )
    return tree if graph is None else nnx.merge(graph, tree, copy=True)


def to_repvgg(
    model: nnx.Module, select: Select = None, branches: Branches = None, *, rngs: nnx.Rngs
) -> nnx.Module:
    """A copy of any NNX model in which each selected layer is an `nn.NormedBranches`: RepVGG's training form,
    to compare with. `fuse` merges them again.

    Where the layer is the convolution of an `nn.ConvNorm`, the whole of that gives way, because RepVGG has no
    batch norm after the sum. In other networks the network's own batch norm after the layer stays, a second
    one. Weights are freshly drawn, one key for each path; biases and everything else are copied.

    Args:
      model: the network, untouched.
      select: which layers, as in `find_layers`.
      branches: of which branches they are made, as in `find_branches`.
      rngs: source of the draws (stream `params`).

    Raises:
      ValueError: as `find_layers` and `find_branches`; or stacked layers: `nnx.scan` and `nnx.vmap` hand on
        the batch statistics of modules that they have made, and would not know those of new ones.
    """
    layers = find_layers(model, select)
    if stacked := [layer.name for layer in layers.values() if layer.stacked]:
        raise ValueError(
            f"{', '.join(stacked)} are stacked layers, whose branches would need batch norms made by the "
            "same nnx.vmap: leave them out with `select`, or build the network of `nn.NormedBranches`"
        )
    sets = find_branches(model, select, branches)
    key = rngs.params()
    uses = Counter(aliases(model).values())

    def replace(path, module):
        # A convolution that is also used without this batch norm keeps its own place.
        if type(module) is ConvNorm and uses[path] == uses[join(path, "conv")]:
            path, module = join(path, "conv"), module.conv
        layer = layers.get(join(path, "kernel"))
        if layer is None or not isinstance(module, (nnx.Conv, nnx.Linear)):
            return None
        return NormedBranches(
            sets[layer.path],
            **layer.geometry,
            bias=None if module.bias is None else module.bias[...],
            dtype=module.dtype,
            precision=module.precision,
            param_dtype=module.kernel.dtype,
            rngs=nnx.Rngs(params=_key_of(layer.path, key)),
        )

    return replace_modules(model, replace)


def csla_twin(
    model: nnx.Module,
    scales: Scales,
    weights: Mapping[str, Mapping[str, jax.Array]],
    *,
    trainable_scales: bool = False,
    form: Form = "merged",
) -> nnx.Module:
    """A copy of `model` in which every layer that `scales` name is a CSLA layer with these scales and branch
    tensors.

    With constant scales it is the network that `repopt_mask` imitates: if `model` holds
    `merge_weights(scales, weights)`, both compute the same function, and keep doing so under training.

    Raises:
      ValueError: the scales do not fit, name a shared layer by another path than its own, or name layers that
        cannot be made of branches (all, with the reasons).
      TypeError: a path of `scales` is not the kernel of an `nnx.Conv` or `nnx.Linear`.
    """
    check_aliases(model, scales.entries)
    check_fit(scales, _arrays(model))
    return _with_csla(model, scales, weights, trainable_scales=trainable_scales, form=form)


def _with_csla(
    model: nnx.Module, scales: Scales, weights: Mapping[str, Mapping[str, jax.Array]], **options: Any
) -> nnx.Module:
    """What `csla_twin` gives, of scales that may cover any part of the model."""
    layers = layers_at(model, scales.entries)
    wrong = []
    for path, layer in layers.items():
        try:
            layer.branch_set(scales.entries[path].branches)
        except ValueError as error:
            wrong.append(f"{path}: {error}")
    if wrong:
        raise ValueError(f"the scales do not fit the model: {'; '.join(wrong)}")

    def replace(path, module):
        layer = layers.get(join(path, "kernel"))
        if layer is None or not isinstance(module, (nnx.Conv, nnx.Linear)):
            return None
        return _as_csla(module, layer, scales.entries[layer.path], weights[layer.path], **options)

    return replace_modules(model, replace)


def _as_csla(
    module: nnx.Conv | nnx.Linear,
    layer: Layer,
    entry: LayerScales,
    weights: Mapping[str, jax.Array],
    **options: Any,
) -> CSLAConv:
    """The CSLA layer in place of `module`, with these branch tensors: those that it would draw are left
    out."""
    branches, dtype = entry.branches, module.kernel.dtype
    bias = None if module.bias is None else module.bias[...]
    new = nnx.eval_shape(
        lambda: CSLAConv(
            branches.layer,
            stack=branches.stack,
            **layer.geometry,
            bias=bias,
            dtype=module.dtype,
            precision=module.precision,
            param_dtype=dtype,
            rngs=nnx.Rngs(0),
            **options,
        )
    )
    for variables, values in ((new.weights, weights), (new.scales, entry.vectors)):
        for name, variable in variables.items():
            variable.set_value(jnp.asarray(values[name], dtype))
    if bias is not None and new.bias is not None:
        new.bias.set_value(bias)
    return new


def _check_fresh(model: nnx.Module) -> None:
    """Batch norm's running statistics move at the first training step, so they tell a trained model from a
    fresh one."""
    trained = []
    for path, module in named_modules(model):
        if isinstance(module, nnx.BatchNorm):
            for name, start in (("mean", 0.0), ("var", 1.0)):
                value = getattr(module, name)[...]
                if is_concrete(value) and not np.all(np.asarray(value) == start):
                    trained.append(join(path, name))
    if trained:
        raise ValueError(
            f"the model has been trained (batch statistics {paths.listed(trained)} have moved) and "
            "re-initialising would discard its kernels: give a fresh model, or allow_trained=True"
        )


def _arrays(model: Any) -> Any:
    """The arrays of a model, of which scales may cover a part; or the tree that was given."""
    return nnx.state(model) if isinstance(model, nnx.Module) else model
