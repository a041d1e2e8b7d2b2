"""Between a plain network and its search network: extract scales, re-initialise, and the CSLA twin.

Source: "Re-parameterizing Your Optimizers rather than Architectures" (ICLR 2023), section 3.2.
"""

import zlib
from collections.abc import Mapping
from typing import Any, Literal, TypeVar, overload

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from repopt_jax import paths
from repopt_jax.nn.csla import CSLAConv, Form, per_axis, plain_convolution
from repopt_jax.nn.modules import join, named_modules, replace_modules
from repopt_jax.scales import LayerScales, Scales, ScalesMetadata, check_finite, check_fit, is_concrete

M = TypeVar("M")
Weights = dict[str, dict[str, jax.Array]]


def extract_scales(search_model: nnx.Module, *, metadata: ScalesMetadata | None = None) -> Scales:
    """The scales of every CSLA layer of a search model, by the path that its merged kernel has in the plain
    network.

    Raises:
      ValueError: the model has no CSLA layer.
    """
    entries = {
        join(path, "kernel"): LayerScales(module.branches, module.scale_vectors())
        for path, module in named_modules(search_model)
        if isinstance(module, CSLAConv)
    }
    if not entries:
        raise ValueError(
            "`search_model` has no CSLA layer: give the model of the hyper-search, of kind 'search'"
        )
    return Scales(entries, metadata or ScalesMetadata())


@overload
def reinitialize(
    model: M,
    scales: Scales,
    *,
    rngs: nnx.Rngs,
    allow_trained: bool = False,
    return_weights: Literal[False] = False,
) -> M: ...


@overload
def reinitialize(
    model: M, scales: Scales, *, rngs: nnx.Rngs, allow_trained: bool = False, return_weights: Literal[True]
) -> tuple[M, Weights]: ...


def reinitialize(
    model: Any,
    scales: Scales,
    *,
    rngs: nnx.Rngs,
    allow_trained: bool = False,
    return_weights: bool = False,
) -> Any:
    """Rule of initialization: every kernel that `scales` name becomes K = sum_b s_b * E_b(w_b), w_b freshly
    drawn.

    Each w_b is drawn as its branch's own layer would be; the identity's weight is the searched u.

    Args:
      model: an NNX model, or any pytree of parameters (Linen, Equinox, plain dicts).
      scales: the scales; every one of their paths must be in the model, and, where the model declares its
        `branch_sets()`, every one of those in the scales.
      rngs: source of the draws (stream `params`). One key for each path: adding a layer changes no other's
        draw.
      allow_trained: do it even if the model's batch statistics show that it has been trained.
      return_weights: also returns the branch tensors w_b, path -> branch -> array, which `reparameterize`
        keeps.

    Returns:
      A new model (or tree), the given one being untouched; or that and the branch tensors.

    Raises:
      ValueError: the scales do not fit (every missing, extra or misshapen path); NaN or infinite scales; or
        the model has been trained.
    """
    check_finite(scales)
    check_fit(scales, model)
    if isinstance(model, nnx.Module) and not allow_trained:
        _check_fresh(model)
    weights = sample_weights(scales, rngs.params())
    fresh = with_kernels(model, merge_weights(scales, weights))
    return (fresh, weights) if return_weights else fresh


def sample_weights(scales: Scales, key: jax.Array, *, dtype: Any = jnp.float32) -> Weights:
    """Branch tensors w_b for every layer of `scales`: path -> branch -> array."""
    weights = {}
    for path, entry in scales.entries.items():
        layer_key = jax.random.fold_in(key, zlib.crc32(path.encode()))
        drawn = entry.branches.sample(layer_key, dtype=dtype)
        searched = {b.name: entry.vectors[b.name] for b in entry.branches.branches if not b.has_scale}
        weights[path] = drawn | {name: u.astype(dtype) for name, u in searched.items()}
    return weights


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
            f"the model has no kernels at {', '.join(missing)}: only a plain network, of kind 'target', has "
            "merged kernels"
        )
    tree = paths.map_named(
        lambda path, leaf: kernels[path].astype(leaf.dtype) if path in kernels else leaf, tree
    )
    return tree if graph is None else nnx.merge(graph, tree, copy=True)


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
      ValueError: the scales do not fit.
      TypeError: a path of `scales` is not the kernel of an `nnx.Conv` or `nnx.Linear`.
    """
    check_fit(scales, model)
    replaced = set()

    def replace(path, module):
        kernel = join(path, "kernel")
        entry = scales.entries.get(kernel)
        if entry is None or not isinstance(module, (nnx.Conv, nnx.Linear)):
            return None
        replaced.add(kernel)
        layer = _as_csla(module, entry, trainable_scales=trainable_scales, form=form)
        for name, w in weights[kernel].items():
            layer.weights[name][...] = w
        return layer

    twin = replace_modules(model, replace)
    if wrong := sorted(set(scales.entries) - replaced):
        raise TypeError(
            f"only kernels of nnx.Conv and nnx.Linear can become CSLA layers, not {', '.join(wrong)}"
        )
    return twin


def _as_csla(layer: nnx.Conv | nnx.Linear, entry: LayerScales, **options: Any) -> CSLAConv:
    spatial = {}
    if isinstance(layer, nnx.Conv):
        plain_convolution(layer)
        if layer.feature_group_count != entry.branches.groups:
            raise ValueError(
                f"a layer has {layer.feature_group_count} groups and its branch set "
                f"{entry.branches.groups}: give `default_branches` the layer's groups"
            )
        spatial = {
            "strides": layer.strides if layer.strides is not None else 1,
            "padding": explicit_padding(layer),
            "dilation": layer.kernel_dilation if layer.kernel_dilation is not None else 1,
        }
    return CSLAConv(
        entry.branches,
        **spatial,
        scales=entry.vectors,
        bias=None if layer.bias is None else layer.bias[...],
        dtype=layer.dtype,
        param_dtype=layer.kernel.dtype,
        rngs=nnx.Rngs(0),
        **options,
    )


def explicit_padding(layer: nnx.Conv) -> tuple[tuple[int, int], ...]:
    """The padding of a convolution as pairs.

    Raises:
      ValueError: a padding that is not the same numbers for every input (`SAME` at a stride above 1,
        `CIRCULAR` ...).
    """
    axes = len(layer.kernel_size)
    padding = layer.padding
    strides, dilation = per_axis(layer.strides or 1, axes), per_axis(layer.kernel_dilation or 1, axes)
    if isinstance(padding, str):
        reach = [(k - 1) * d for k, d in zip(layer.kernel_size, dilation)]
        if padding == "VALID":
            return ((0, 0),) * axes
        if padding == "SAME" and set(strides) == {1}:
            return tuple((r // 2, r - r // 2) for r in reach)
        raise ValueError(
            f"padding {padding!r} with strides {strides} depends on the input's size; give the layer "
            f"explicit pairs, such as {tuple((r // 2, r - r // 2) for r in reach)}"
        )
    if isinstance(padding, int):
        return ((padding, padding),) * axes
    return tuple((p, p) if isinstance(p, int) else (int(p[0]), int(p[1])) for p in padding)


def _check_fresh(model: nnx.Module) -> None:
    """Batch statistics move at the first training step, so they tell a trained model from a fresh one."""
    statistics, _ = paths.named_leaves(nnx.state(model, nnx.BatchStat))
    trained = [
        path
        for path, value in statistics.items()
        if is_concrete(value)
        and not np.array_equal(value, np.full(value.shape, 1.0 if path.endswith("/var") else 0.0))
    ]
    if trained:
        more = " ..." if len(trained) > 3 else ""
        raise ValueError(
            f"the model has been trained (batch statistics {', '.join(trained[:3])}{more} have moved) and "
            "re-initialising would discard its kernels: give a fresh model, or allow_trained=True"
        )
