"""Replaces layers by structures in a copy of any NNX model."""

import functools
import logging
import re
from collections import Counter
from collections.abc import Callable, Collection, Mapping
from typing import Any, overload

import jax
import jax.numpy as jnp
from flax import nnx

from repopt_jax.core import paths, tracing
from repopt_jax.core.branches import Shape
from repopt_jax.core.layer import Layer
from repopt_jax.core.parametrization import Parametrization
from repopt_jax.core.published import of_branches, repopt
from repopt_jax.core.scales import DeclaresBranches
from repopt_jax.core.structure import Structure
from repopt_jax.nn.block import Block
from repopt_jax.nn.branched import Branched, StructuredLayer
from repopt_jax.nn.merged import Merged, MergedGeneral
from repopt_jax.nn.rngs import check_rngs, counted_in_python
from repopt_jax.surgery.choose import Choices, Described, Options, find_classifier, find_structures
from repopt_jax.surgery.flow import Example
from repopt_jax.surgery.fuse import FoldedNorm, pair_up
from repopt_jax.surgery.layers import LAYERS, Branches, Select, find_branches
from repopt_jax.surgery.modules import (
    Removed,
    aliases,
    is_abstract,
    join,
    key_of,
    named_modules,
    replace_modules,
)
from repopt_jax.surgery.trained import Keep, check_keep, kept_branches, require_untrained

_log = logging.getLogger(__name__)


def to_structure(
    model: nnx.Module,
    structure: Described,
    select: Select = None,
    *,
    options: Options = None,
    pairs: Mapping[str, str] | None = None,
    example: Example = None,
    trained: bool | None = None,
    allow_trained: bool = False,
    keep: Keep = None,
    rngs: nnx.Rngs,
) -> nnx.Module:
    r"""Returns a copy of any NNX model with this structure in each selected layer; `fuse` merges them again.

        to_structure(model, "acnet", r"stages/.*", options={"gamma": 1 / 3}, rngs=nnx.Rngs(0))
        to_structure(model, "dbb", example=(images[:1],), rngs=nnx.Rngs(0))

    A structure with batch norms inside becomes an `nn.Branched`, any other an `nn.Merged`. If the layer is
    the convolution of an `nn.Block`, the block's batch norm is removed, unless the structure has one after
    its sum: then it is kept as that one. In other networks the batch norm after the layer is kept, unless
    `example` shows it or `pairs` name it. Weights are newly drawn, with a key for each path; biases and all
    else are copied.

    Args:
      model: the network, which is not changed. Of an abstract one (`nnx.eval_shape`) the result is abstract.
      structure: a name in `STRUCTURES`; a description; or a mapping of regular expressions for a layer's
        whole path to names or descriptions, of which the first that matches counts. A network may have
        particular descriptions for a name (`models.Network.descriptions`).
      select: which layers, as in `find_layers`. Without it, layers to which the structure adds nothing, the
        dense layer that makes the logits, and layers for which it is not defined are left as they are;
        `find_structures` lists them with the reasons.
      options: arguments of the descriptions, as in `find_structures`.
      pairs: which batch norm follows which layer, as in `fuse`. It is removed where the layer becomes a
        structure without a norm after its sum, because published blocks have those of the branches in its
        place. `fuse` takes the same pairs, for the layers that are left.
      example: in place of `pairs`, what the model is called with, as in `fuse`: the batch norms are found by
        the flow of data.
      trained, allow_trained: as in `reinitialize`.
      keep: "split" keeps the function of a trained network, for structures without batch norms inside: the
        tensors of the branches merge into its kernels (`Parametrization.split`). With a norm inside there
        are no tensors that compute the same in training.
      rngs: `nnx.Rngs` with the stream `params`.

    Raises:
      ValueError: as `find_layers`; an unknown name or option; a rule that matches no selected layer; `pairs`
        that do not belong together, as in `fuse`; no layer that becomes the structure; or layers that
        `select` chooses and no rule matches, or for which the structure is not defined, all with the reasons.
        The latter are also stacked layers with batch norms, because `nnx.scan` and `nnx.vmap` would not carry
        the batch statistics of new modules. Or the model has been trained, or may have been; or its kernels
        are to be kept and the branches cannot express them, with every path.
      TypeError: `select` or `structure` is none of the above, such as a `Structure`, which fits one layer.
    """
    check_rngs(rngs)
    check_keep(keep, allow_trained)
    if is_abstract(model):
        given: dict[str, Any] = {"options": options, "pairs": pairs, "example": example, "trained": False}
        return nnx.eval_shape(lambda m: to_structure(m, structure, select, **given, rngs=nnx.Rngs(0)), model)
    lost = "a network of new branches would have other kernels"
    require_untrained(model, trained=trained, allow_trained=allow_trained, keep=keep, lost=lost)
    taken = _taken(model, find_structures(model, structure, select, options=options))
    made = {layer.path: one for layer, one in taken}
    normed = [path.rpartition("/")[0] for path, one in made.items() if one.followers("norm")]
    if keep and normed:
        raise ValueError(
            f"the structures of {paths.listed(normed)} have batch norms, which rescale whatever the kernels "
            "are: leave `keep` out and give allow_trained=True to start anew"
        )
    layers = {layer.path: layer for layer, _ in taken}
    kept = {}
    if keep:
        structures = {path: layer.parametrization(made[path]) for path, layer in layers.items()}
        kept = kept_branches(model, structures, rngs=rngs)
    key = rngs.params()

    def make(layer: Layer, **options: Any) -> StructuredLayer:
        kind = Branched if made[layer.path].followers("norm") else Merged
        if keep:
            theta = kept[layer.path]
            return merged_layer(layer, made[layer.path], theta["weights"], theta["scales"], **options)
        with counted_in_python(nnx.Rngs(params=key_of(layer.path, key))) as own:
            if axes := _axes(layer):
                return MergedGeneral(made[layer.path], **axes, rngs=own, **options)
            return kind(made[layer.path], rngs=own, **options)

    without_norm = {path for path, s in made.items() if not s.norm}
    after = pair_up(model, pairs or {}, lambda module: isinstance(module, Block), example).after
    removed = {
        after[layer.name] for path, layer in layers.items() if path in without_norm and layer.name in after
    }
    twice = any(made[path].followers("norm") for path in without_norm)
    if twice and not pairs and example is None and not isinstance(model, DeclaresBranches):
        _report_norms(model)
    return replace_layers(model, layers, make, without_norm=without_norm, removed=removed)


def _report_norms(model: nnx.Module) -> None:
    """Warns of the batch norms that stay because nothing says which layers they follow."""
    blocks = tuple(f"{path}/" if path else "" for path, m in named_modules(model) if isinstance(m, Block))
    norms = [path for path, m in named_modules(model) if isinstance(m, nnx.BatchNorm)]
    if left := [path for path in norms if not path.startswith(blocks)]:
        _log.warning(
            "the batch norms %s stay, also where they follow a layer whose branches have norms of their own: "
            "give an `example` of the inputs, or `pairs`",
            paths.listed(left),
        )


@overload
def find_parametrizations(
    model: nnx.Module, structure: Described = repopt, select: Select = None, *, options: Options = None
) -> dict[str, Parametrization]: ...


@overload
def find_parametrizations(
    model: Callable[..., Any],
    params: Any,
    /,
    *example: Any,
    structure: Described = repopt,
    select: tracing.Select = None,
    options: Options = None,
) -> dict[str, Parametrization]: ...


def find_parametrizations(model: Any, *args: Any, **given: Any) -> dict[str, Parametrization]:
    """Returns a structure for each layer that becomes one, by its kernel's path, to be kept in the optimizer.

        structures = find_parametrizations(model, "orepa", r"stages/.*")
        structures = find_parametrizations(apply, params, images[:1], structure="orepa")
        model, theta = reinitialize(model, structures, rngs=rngs, return_weights=True)
        tx = reparameterize(inner, structures, weights=theta, trainable_scales=True)

    The layers of an NNX model are found by their classes, those of a function of any framework by tracing it,
    as in `find_branches`. `reinitialize` is given the model, or the parameters of the function.

    Args:
      model: the plain network; or a function, with `structure`, `select` and `options` by keyword.
      params, example: of a function, its parameters and other arguments, arrays or `jax.ShapeDtypeStruct`s.
      structure: as in `to_structure`, without batch norms inside; by default RepOptimizer's branches, k x k +
        1x1 + identity, with a scale each.
      select, options: as in `find_structures`.

    Raises:
      ValueError: as `to_structure`; or structures with batch norms inside.
      TypeError: `model` is neither a model nor a function; or as `to_structure`.
    """
    found, problems = {}, []
    for layer, one in _taken(model, find_structures(model, *args, **given)):
        try:
            found[layer.path] = layer.parametrization(one)
        except ValueError as error:
            problems.append(f"{layer.name}: {error}")
    if problems:
        raise ValueError(f"`structure` cannot be kept in the optimizer: {'; '.join(problems)}")
    return found


def _taken(model: Any, choices: Choices) -> list[tuple[Layer, Structure]]:
    """Returns the layers that become a structure, after `find_structures`."""
    left = {path.rpartition("/")[0]: choice for path, choice in choices.items() if choice.structure is None}
    undefined = [f"{name}: {choice.reason}" for name, choice in left.items() if choice.undefined]
    if undefined and choices.selected:
        raise ValueError(f"`structure` is not defined for all selected layers: {'; '.join(undefined)}")
    reasons = "; ".join(f"{name}: {choice.reason}" for name, choice in left.items())
    taken = [(c.layer, c.structure) for c in choices.values() if c.layer and c.structure is not None]
    if not taken:
        raise ValueError(f"no layer of `model` becomes `structure`: {'; '.join(undefined) or reasons}")
    # Of a network that declares its layers this is no news, and it is built again for every deployment.
    level = logging.DEBUG if isinstance(model, DeclaresBranches) else logging.INFO
    _log.log(level, "%d layers become a structure; left as they are: %s", len(taken), reasons or "none")
    unreadable = [f"{name}: {c.reason}" for name, c in left.items() if c.undefined and not c.layer]
    if unreadable:  # often a mistake
        _log.warning("layers that no branches can replace are left as they are: %s", "; ".join(unreadable))
    return taken


def to_repvgg(
    model: nnx.Module,
    select: Select = None,
    branches: Branches = None,
    *,
    trained: bool | None = None,
    allow_trained: bool = False,
    keep: Keep = None,
    rngs: nnx.Rngs,
) -> nnx.Module:
    """`to_structure(model, "repvgg", ...)`, or with `branches` (as in `find_branches`) these, a norm each.

    With `branches`, too, the dense layer that makes the logits is left as it is unless `select` chooses it.

    Raises:
      ValueError: as `to_structure` and `find_branches`; or no layer but the one that makes the logits.
    """
    kernels: dict[str, Any] = {"trained": trained, "allow_trained": allow_trained, "keep": keep}
    if branches is None:
        return to_structure(model, "repvgg", select, rngs=rngs, **kernels)
    sets = {path.rpartition("/")[0]: bs for path, bs in find_branches(model, select, branches).items()}
    if select is None and not isinstance(model, DeclaresBranches):
        classifier = find_classifier(model)
        if sets.keys() == {classifier}:
            raise ValueError(
                f"the one layer of `model`, {classifier or 'the model itself'}, is the dense layer that "
                "makes the logits: choose it with `select` if it is not"
            )
        sets = {name: branch_set for name, branch_set in sets.items() if name != classifier}
    described: Described = {
        re.escape(name): functools.partial(of_branches, branch_set, then="norm")
        for name, branch_set in sets.items()
    }
    return to_structure(model, described, lambda path, _: path in sets, rngs=rngs, **kernels)


def replace_layers(
    model: nnx.Module,
    layers: Mapping[str, Layer],
    make: Callable[..., StructuredLayer],
    *,
    without_norm: Collection[str] = (),
    removed: Collection[str] = (),
) -> nnx.Module:
    """Returns a copy of `model` with `make(layer, **options)` in place of each of `layers`.

    The options are the bias and the dtypes of the replaced layer. `without_norm` are the paths of layers with
    which the batch norm of their `nn.Block` is removed, unless the layer is also used without this block.
    `removed` are the paths of other batch norms, which a `FoldedNorm` replaces.
    """
    modules, uses = dict(named_modules(model)), Counter(aliases(model).values())
    norms = {
        join(path, "bn")
        for path, module in modules.items()
        if isinstance(module, Block)
        and join(path, "conv/kernel") in without_norm
        and uses[path] == uses[join(path, "conv")]
    }

    def replace(path: str, module: Any) -> nnx.Module | None:
        if path in norms:
            return Removed()
        if path in removed:
            return FoldedNorm()
        layer = layers.get(join(path, "kernel"))
        if layer is None or not isinstance(module, LAYERS):
            return None
        return make(
            layer,
            bias=None if module.bias is None else module.bias.get_value(),
            dtype=module.dtype,
            precision=module.precision,
            param_dtype=module.kernel.dtype,
        )

    return replace_modules(model, replace)


def merged_layer(
    layer: Layer,
    structure: Structure,
    weights: Mapping[str, jax.Array],
    vectors: Mapping[str, jax.Array],
    **options: Any,
) -> Merged:
    """Makes an `nn.Merged` in place of a layer with these tensors and scales, without drawing others."""
    axes, bias = _axes(layer), options.pop("bias")

    def make(bias: Any) -> Merged:
        kind = functools.partial(MergedGeneral, **axes) if axes else Merged
        return kind(structure, stack=layer.stack, bias=bias, rngs=nnx.Rngs(0), **options)

    new = nnx.eval_shape(make, bias)
    for variables, values in ((new.weights, weights), (new.scales, vectors)):
        for name, variable in variables.items():
            variable.set_value(jnp.asarray(values[name], variable.dtype))
    if new.bias is not None:
        new.bias.set_value(bias)
    return new


def _axes(layer: Layer) -> dict[str, Shape]:
    """Returns the axes of a layer over several as arguments of `nn.MergedGeneral`; {} of any other."""
    if layer.layout == "...io":
        return {}
    shape, count = layer.kernel[len(layer.stack) :], layer.layout.count("i")
    return {"inputs": shape[:count], "outputs": shape[count:]}
