"""Search networks: makes one of any network, extracts its scales, and makes its twin with constant scales.

Source: "Re-parameterizing Your Optimizers rather than Architectures" (ICLR 2023), section 3.1.
"""

import logging
from collections.abc import Container, Mapping
from typing import Any, Literal

import jax
import numpy as np
from flax import nnx

from repopt_jax.arguments import check_kind, check_number
from repopt_jax.core.paths import listed
from repopt_jax.core.published import of_branches
from repopt_jax.core.scales import (
    DeclaresBranches,
    LayerScales,
    Scales,
    ScalesMetadata,
    check_fit,
    check_scales,
)
from repopt_jax.core.transfer import Depths, count_depths
from repopt_jax.models.network import Network
from repopt_jax.nn.merged import Merged
from repopt_jax.nn.rngs import check_rngs
from repopt_jax.surgery.choose import find_structures
from repopt_jax.surgery.flow import Example, order_of_calls
from repopt_jax.surgery.layers import (
    Branches,
    Layer,
    Select,
    check_aliases,
    find_branches,
    find_layers,
    layers_at,
)
from repopt_jax.surgery.modules import check_model, is_abstract, join, named_modules
from repopt_jax.surgery.reinitialize import arrays_of, sample_weights
from repopt_jax.surgery.structures import merged_layer, replace_layers
from repopt_jax.surgery.trained import Keep, branches_of, check_keep, require_untrained

_log = logging.getLogger(__name__)


def to_search(
    model: nnx.Module,
    select: Select = None,
    branches: Branches = None,
    *,
    scales: Literal["depth", "ones"] | Scales = "depth",
    trained: bool | None = None,
    allow_trained: bool = False,
    keep: Keep = None,
    rngs: nnx.Rngs,
) -> nnx.Module:
    """Returns the hyper-search network of any NNX model: selected layers are sums of branches (`nn.Merged`).

        search_model = to_search(model, r"(stem|stages/.*)", rngs=nnx.Rngs(0))

    The sums have trainable scales. Train the network as you would train `model`, then call `extract_scales`.
    Biases, batch norms and everything else are copied; only the selected layers' kernels are replaced, by
    newly drawn branch tensors. A layer that is used in several places remains one layer; layers stacked for
    `nnx.scan` or `nnx.vmap` remain stacked, with separate scales. A layer's `dtype`, `precision` and its
    kernel's dtype are kept; metadata of its variables (sharding names) are not.

    Args:
      model: the network, which is not changed. Of an abstract one (`nnx.eval_shape`) the search network is
        abstract.
      select: which layers, as in `find_branches`; by default all that have several branches.
      branches: their branches, as in `find_branches`.
      scales: initial scales: "depth" for `depth_scales`, "ones", or `Scales` for exactly these layers and
        branches.
      trained, allow_trained: as in `reinitialize`.
      keep: "split" keeps the kernels of a trained network: the branch tensors are those of least norm that
        merge into them (`branches_of`).
      rngs: `nnx.Rngs` with the stream `params`. Each path has its own key, so adding a layer does not change
        how others are drawn.

    Raises:
      ValueError: as `find_layers` and `find_branches`; scales that do not fit, with every path; an unknown
        name of scales; or the model has been trained, or may have been; or its kernels are to be kept and
        the branches cannot express them, with every path.
    """
    check_rngs(rngs)
    check_keep(keep, allow_trained)
    if is_abstract(model):
        given: dict[str, Any] = {"scales": scales, "trained": False}
        return nnx.eval_shape(lambda m: to_search(m, select, branches, **given, rngs=nnx.Rngs(0)), model)
    if isinstance(scales, Scales):
        check_aliases(model, scales.entries)
        check_fit(scales, find_branches(model, select, branches))
    elif scales == "depth":
        scales = depth_scales(model, select, branches)
    elif scales == "ones":
        scales = Scales.ones(find_branches(model, select, branches))
    else:
        raise ValueError(f"`scales` is {scales!r}: it must be 'depth', 'ones' or a `Scales`")
    if select is None and branches is None and not isinstance(model, DeclaresBranches):
        _log.info("the search network of %s: %s", type(model).__name__, find_structures(model))
    lost = "a search network would have other kernels"
    require_untrained(model, trained=trained, allow_trained=allow_trained, keep=keep, lost=lost)
    weights = branches_of(model, scales) if keep else sample_weights(scales, rngs.params())
    return _with_scales(model, scales, weights)


def extract_scales(search_model: nnx.Module, *, metadata: ScalesMetadata | None = None) -> Scales:
    """Returns the scales of a search model's `nn.Merged` layers, by the kernels' paths in the plain network.

    Raises:
      ValueError: the model has none; or structures of which scales are not all that is trained, such as
        OREPA, with every path.
    """
    entries, problems = {}, []
    for path, module in named_modules(search_model):
        if isinstance(module, Merged):
            try:
                entries[join(path, "kernel")] = LayerScales(module.branch_set(), module.vectors())
            except ValueError as error:
                problems.append(f"{path}: {error}")
    if problems:
        raise ValueError(f"layers of `search_model` have no scales for an optimizer: {'; '.join(problems)}")
    if not entries:
        raise ValueError(
            "`search_model` has no layer with scales: give the model of the hyper-search, made by `to_search`"
        )
    return Scales(entries, metadata or ScalesMetadata())


def depth_scales(
    model: nnx.Module, select: Select = None, branches: Branches = None, *, example: Example = None
) -> Scales:
    """Returns the depth rule's scales of any network, without a search: sqrt(2 / l), or 1 at l = 0; u = 1.

    A network may declare its l (`models.Network.depths`). Otherwise l is the index of the layer in a row of
    equal ones, counting those that are taken. A row begins at a layer that changes the width, has a stride
    above 1, or comes after a layer of another width. Without an `example` the order is that of the paths,
    `stages/2` before `stages/10` and `fourth` before `second`: a model does not declare the order in which it
    calls its layers. Where its names are not in that order, give an example, in which they are called:

        depth_scales(model, example=(images[:1],))

    Stacked layers continue the count along the stack. For other l use
    `Scales.depth_rule(find_branches(model, ...), depths)`. Source: RepOptimizer paper, appendix B, where l
    counts the blocks of a stage.

    Args:
      model: any NNX model.
      select: which layers, as in `find_layers`.
      branches: their branches, as in `find_branches`.
      example: what the model is called with, as in `fuse`: a tuple of arrays or `jax.ShapeDtypeStruct`s, or a
        function that calls a model. The layers are then counted in the order of their first calls.

    Raises:
      ValueError: as `find_layers` and `find_branches`; or layers that the model does not call in the example.
      TypeError: `model` is no NNX model, or `example` is neither.
    """
    _check_has_order(model)
    branch_sets = find_branches(model, select, branches)
    scales = Scales.depth_rule(branch_sets, _depths(model, select, branch_sets, example))
    return scales.with_metadata(architecture=_architecture(model))


def law_scales(
    model: nnx.Module,
    Lambda: float,
    select: Select = None,
    branches: Branches = None,
    *,
    example: Example = None,
) -> Scales:
    """Returns the depth rule's scales of any network after a search of decay Lambda in which only decay acts.

    They are those of `Scales.from_law`, with l as in `depth_scales`: u is exp(-Lambda), the others are the
    depth rule's.

    Args:
      model, select, branches, example: as in `depth_scales`.
      Lambda: weight decay * sum of the learning rates / (1 - momentum); 0.94 of the published searches.

    Raises:
      ValueError: as `depth_scales`; or a Lambda that is negative or not finite.
      TypeError: as `depth_scales`.
    """
    check_number("Lambda", Lambda)
    _check_has_order(model)
    branch_sets = find_branches(model, select, branches)
    scales = Scales.from_law(branch_sets, _depths(model, select, branch_sets, example), Lambda)
    return scales.with_metadata(architecture=_architecture(model))


def transfer_scales(
    model: nnx.Module,
    source: Scales,
    select: Select = None,
    branches: Branches = None,
    *,
    source_depths: Depths | None = None,
) -> Scales:
    """Returns scales of any network from those that were searched on another, wider, narrower, deeper or
    shallower: `Scales.transfer`, with l as in `depth_scales`.

    Args:
      model, select, branches: as in `depth_scales`.
      source: searched scales.
      source_depths: l of the source's layers; by default as `Scales.transfer` finds them.

    Raises:
      ValueError: as `depth_scales` and `Scales.transfer`.
      TypeError: as `depth_scales`.
    """
    _check_has_order(model)
    check_scales(source, "source")
    branch_sets = find_branches(model, select, branches)
    depths = _depths(model, select, branch_sets)
    scales = Scales.transfer(source, branch_sets, depths, source_depths=source_depths)
    return scales.with_metadata(architecture=_architecture(model))


def csla_twin(
    model: nnx.Module,
    scales: Scales,
    weights: Mapping[str, Mapping[str, jax.Array]],
    *,
    trainable_scales: bool = False,
) -> nnx.Module:
    """Returns a copy of `model` whose layers in `scales` are CSLA layers of these scales and tensors.

    With constant scales it is the network that `repopt_mask` reproduces: if `model` holds
    `merge_weights(scales, weights)`, both compute the same function, before and during training.

    Raises:
      ValueError: the scales do not fit, name a shared layer by another path than its own, or name layers that
        cannot be made of branches (all, with the reasons).
      TypeError: a path of `scales` is not the kernel of a layer (`surgery.layers.LAYERS`).
    """
    check_model(model)
    check_scales(scales)
    check_kind("weights", weights, Mapping, "the branch tensors by path")
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
    """Does the work of `csla_twin`, without a check that the scales fit the whole model."""
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
        return merged_layer(layer, structure, weights[layer.path], entry.vectors, **options)

    return replace_layers(model, layers, make)


def _architecture(model: nnx.Module) -> str:
    return model.architecture if isinstance(model, Network) else ""


def _check_has_order(model: Any) -> None:
    """Raises TypeError if `model` is no NNX model: the layers of a function have no order to count l in."""
    if not isinstance(model, nnx.Module):
        raise TypeError(
            f"`model` is of type {type(model).__name__}: it must be an NNX model; for a function give l "
            "yourself, with its find_branches(apply, params, x), to Scales.depth_rule, Scales.from_law or "
            "Scales.transfer"
        )


def _depths(
    model: nnx.Module, select: Select, taken: Container[str], example: Example = None
) -> dict[str, np.ndarray]:
    """Returns l of every selected layer that is taken, as `depth_scales` says."""
    selected = find_layers(model, select)
    layers = {path: (layer.geometry, layer.stack) for path, layer in selected.items() if path in taken}
    if example is not None:
        names = {selected[path].name: path for path in layers}
        called = [names[name] for name in order_of_calls(model, example, list(names))]
        if idle := [path for path in layers if path not in called]:
            raise ValueError(
                f"the model does not call {listed(idle)} in the `example`, so that their place is not known: "
                "leave them out with `select`, or give l of all layers to Scales.depth_rule"
            )
        layers = {path: layers[path] for path in called}
    counted = count_depths(
        (path, g.outputs, stack, g.inputs == g.outputs and set(g.strides) <= {1})
        for path, (g, stack) in layers.items()
    )
    published = model.depths() if isinstance(model, Network) else {}
    return {path: np.asarray(published.get(path, depth)) for path, depth in counted.items()}
