"""Between a plain network and its search network: make one of any network, extract its scales, and the same
network with constant scales.

Source: "Re-parameterizing Your Optimizers rather than Architectures" (ICLR 2023), section 3.1.
"""

import math
from collections.abc import Mapping
from typing import Any, Literal

import jax
import numpy as np
from flax import nnx

from repopt_jax.core.scales import LayerScales, Scales, ScalesMetadata, check_fit
from repopt_jax.core.structure import of_branches
from repopt_jax.models.network import Network
from repopt_jax.nn.merged import Merged
from repopt_jax.surgery.layers import (
    Branches,
    Layer,
    Select,
    check_aliases,
    find_branches,
    find_layers,
    layers_at,
)
from repopt_jax.surgery.modules import join, named_modules
from repopt_jax.surgery.reinitialize import arrays_of, sample_weights
from repopt_jax.surgery.structures import merged_layer, replace_layers


def to_search(
    model: nnx.Module,
    select: Select = None,
    branches: Branches = None,
    *,
    scales: Literal["depth", "ones"] | Scales = "depth",
    rngs: nnx.Rngs,
) -> nnx.Module:
    """A copy of any NNX model in which the selected convolutions and dense layers are sums of branches with
    trainable scales (`nn.Merged`): the network of a hyper-search.

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
    return _with_scales(model, scales, weights)


def extract_scales(search_model: nnx.Module, *, metadata: ScalesMetadata | None = None) -> Scales:
    """The scales of every `nn.Merged` layer of a search model, by the path that its merged kernel has in
    the plain network.

    Raises:
      ValueError: the model has none.
    """
    entries = {
        join(path, "kernel"): LayerScales(module.branch_set(), module.vectors())
        for path, module in named_modules(search_model)
        if isinstance(module, Merged)
    }
    if not entries:
        raise ValueError(
            "`search_model` has no layer with scales: give the model of the hyper-search, made by `to_search`"
        )
    return Scales(entries, metadata or ScalesMetadata())


def depth_scales(model: nnx.Module, select: Select = None, branches: Branches = None) -> Scales:
    """Scales without a search for any network: sqrt(2 / l) for the l-th layer of a row of equal ones, 1 for
    the first (l = 0); u = 1.

    Of a network that declares its numbers (`models.Network.depths`), those. Elsewhere a row begins at a
    layer that changes the width, has a stride above 1, or comes after a layer of another width. What comes
    after what is told by the order of the paths, with numbers in them as numbers: a model does not say in
    which order it calls its layers. Layers that are stacked count on along the stack. For another count
    give your own to `Scales.depth_rule(find_branches(model, ...), depths)`. Source: RepOptimizer paper,
    appendix B, where l counts the blocks of a stage.

    Args:
      model: any NNX model.
      select: which layers, as in `find_layers`.
      branches: of which branches they are made, as in `find_branches`.

    Raises:
      ValueError: as `find_layers` and `find_branches`.
    """
    depths: dict[str, np.ndarray] = {}
    published = model.depths() if isinstance(model, Network) else {}
    width, following = 0, 0  # of the layer before; l of the next layer of the same row
    for path, layer in find_layers(model, select).items():
        g = layer.geometry
        repeats = g.inputs == g.outputs and set(g.strides) <= {1}
        first = following if repeats and g.outputs == width else 0
        along = np.arange(math.prod(layer.stack)).reshape(layer.stack)
        counted = first + along if repeats else np.zeros(layer.stack, int)
        depths[path] = np.asarray(published[path]) if path in published else counted
        width, following = g.outputs, int(counted.max()) + 1
    scales = Scales.depth_rule(find_branches(model, select, branches), depths)
    return scales.with_metadata(architecture=model.architecture if isinstance(model, Network) else "")


def csla_twin(
    model: nnx.Module,
    scales: Scales,
    weights: Mapping[str, Mapping[str, jax.Array]],
    *,
    trainable_scales: bool = False,
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
    check_fit(scales, arrays_of(model))
    return _with_scales(model, scales, weights, trainable_scales=trainable_scales)


def _with_scales(
    model: nnx.Module,
    scales: Scales,
    weights: Mapping[str, Mapping[str, jax.Array]],
    *,
    trainable_scales: bool = True,
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

    def make(layer: Layer, **options: Any) -> Merged:
        entry = scales.entries[layer.path]
        structure = of_branches(
            entry.branches, layer.geometry, then="scale" if trainable_scales else "constant"
        )
        return merged_layer(structure, weights[layer.path], entry.vectors, stack=layer.stack, **options)

    return replace_layers(model, layers, make)
