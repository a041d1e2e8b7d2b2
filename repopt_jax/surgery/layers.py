"""Finds the layers of any NNX network that can be re-parameterized, and makes a branch set for each.

A layer is found by its path in the model and read here only: its geometry (strides, padding, dilation,
groups), whether its arrays are stacked for `nnx.scan`, and whether a layer made of branches can replace it.
"""

import math
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeAlias, overload

import jax.numpy as jnp
from flax import nnx
from jax import lax

from repopt_jax.core import paths, tracing
from repopt_jax.core.branches import BranchSet
from repopt_jax.core.layer import Layer
from repopt_jax.core.scales import DeclaresBranches
from repopt_jax.core.structure import Geometry
from repopt_jax.core.tracing import Branches, chooser
from repopt_jax.nn.geometry import check_promotion, geometry_of
from repopt_jax.nn.merged import layout_of
from repopt_jax.surgery.modules import aliases, join, named_modules

Select: TypeAlias = str | re.Pattern[str] | type | tuple[type, ...] | Callable[[str, nnx.Module], bool] | None


def find_layers(model: nnx.Module, select: Select = None) -> dict[str, Layer]:
    """Returns the convolutions and dense layers of `model` that `select` chooses, by their kernels' paths.

    They are sorted by path, with numbers in paths as numbers. A layer that is used in several places occurs
    once, under its path in `nnx.state(model)`.

    Args:
      model: any NNX model.
      select: which layers. None selects every layer of `LAYERS` that branches can replace or, if the model
        declares its `branch_sets()`, the layers of these. A regular expression for the whole path
        of a layer (`encoder/.*`) or a function (path, module) -> bool selects among all modules that have a
        kernel, a type or a tuple of types among all modules.

    Raises:
      ValueError: nothing is selected; a regular expression that names a shared layer by another path than its
        own; or layers that `select` chooses and branches cannot replace, all with the reasons.
      TypeError: `select` is none of these.
    """
    found, problems = survey_layers(model, select)
    return _all_of(found, {} if select is None and found else problems)


def survey_layers(model: nnx.Module, select: Select = None) -> tuple[dict[str, Layer], dict[str, str]]:
    """Returns `find_layers`, and those that branches cannot replace: path -> "(class): reason".

    Raises:
      ValueError, TypeError: as `find_layers`, but for what is in the second mapping.
    """
    chosen = _selected(model, select)
    if not chosen:
        known = [path or "the model itself" for path, m in named_modules(model) if _is_plain(m)]
        there = f"its layers are {paths.listed(known, 8)}" if known else "it has no nnx.Conv or nnx.Linear"
        what = "" if select is None else f" that `select` = {select!r} chooses"
        raise ValueError(f"`model` has no layer{what}: {there}")
    return _read(model, chosen)


@overload
def find_branches(
    model: nnx.Module, select: Select = None, branches: Branches = None
) -> dict[str, BranchSet]: ...


@overload
def find_branches(
    model: Callable[..., Any],
    params: Any,
    /,
    *example: Any,
    select: tracing.Select = None,
    branches: Branches = None,
) -> dict[str, BranchSet]: ...


def find_branches(model: Any, *args: Any, **options: Any) -> dict[str, BranchSet]:
    """Returns a branch set for every layer that `select` chooses, by the path of its kernel.

        find_branches(model, r"encoder/.*", {r".*/conv2": [Kernel((3, 3)), Kernel((1, 3)), Kernel((3, 1))]})
        find_branches(apply, params, images[:1])

    The layers of an NNX model are found by their classes. Those of a function of any framework are found by
    tracing it (`core.tracing.find_branches`): `apply(params, *example)`.

    Without `select`, layers of which the default has one branch only are left out: a 1x1 or dense layer with
    other numbers of inputs than of outputs, a window without a centre. `print(find_structures(model))` lists
    what is taken and what is left out, with the reasons; of a function, `print(trace_layers(apply, ...))`.

    Args:
      model: any NNX model; or a function.
      params, example: of a function, its parameters and other arguments, arrays or `jax.ShapeDtypeStruct`s.
      select: which layers, as in `find_layers`; of a function, as in `core.tracing.find_branches`.
      branches: None for those that the model declares in `branch_sets()`, else those of `repopt`; a sequence
        for every layer; or a function of the `Layer`, or a mapping from regular expressions for a layer's
        whole path (the first that matches counts), to a sequence, a `BranchSet`, or None for the default. The
        default also applies to layers that no expression matches.

    Raises:
      ValueError: as `find_layers`; no layer of several branches; a rule that matches no layer, or a shared
        layer by another path; or branches that are not defined for their layer, all with the reasons.
      TypeError: `branches` is none of these; or `model` is neither a model nor a function.
    """
    if isinstance(model, nnx.Module):
        return _branches_of_model(model, *args, **options)
    if not callable(model):
        raise TypeError(
            f"`model` is a {type(model).__name__}: it must be an NNX model, or a function of parameters"
        )
    return tracing.find_branches(model, *args, **options)


def _branches_of_model(
    model: nnx.Module, select: Select = None, branches: Branches = None
) -> dict[str, BranchSet]:
    layers = find_layers(model, select)
    declared = model.branch_sets() if isinstance(model, DeclaresBranches) else {}
    _check_rules(model, layers, branches)
    choose = chooser(layers, branches)
    found, problems = {}, []
    for path, layer in layers.items():
        chosen = choose(layer)
        try:
            own = declared.get(path) if chosen is None else chosen
            branch_set = layer.branch_set(own)
            if own is not None or select is not None or len(branch_set.branches) > 1:
                found[path] = branch_set
        except ValueError as error:
            problems.append(f"{layer.name}: {error}")
    if problems:
        raise ValueError(f"`branches` do not fit: {'; '.join(problems)}")
    if not found:
        raise ValueError(
            f"none of the layers {paths.listed([layer.name for layer in layers.values()], 8)} has several "
            "branches by default: choose layers with `select`, or give their `branches`"
        )
    return found


# The classes whose kernels branches can make up.
LAYERS = (nnx.Conv, nnx.ConvTranspose, nnx.Linear, nnx.LinearGeneral, nnx.Einsum)

_KINDS = "nnx.Conv, nnx.ConvTranspose (stride 1), nnx.Linear, nnx.LinearGeneral and nnx.Einsum"


def read_layer(path: str, module: nnx.Module) -> Layer:
    """Describes `module` at `path` as a `Layer`.

    Raises:
      ValueError: branches cannot replace it, with the reason.
    """
    if not isinstance(module, LAYERS):
        raise ValueError(f"only {_KINDS} can be made of branches")
    if isinstance(module, (nnx.LinearGeneral, nnx.Einsum)):
        return _read_general(path, module)
    geometry = geometry_of(module)
    shape, one = tuple(module.kernel.shape), geometry.kernel
    stack = shape[: max(len(shape) - len(one), 0)]
    out = (*stack, geometry.outputs)
    bias_shape = out if module.bias is None else tuple(module.bias.shape)
    if (shape, bias_shape) != ((*stack, *one), out):
        bias = f" and its bias {bias_shape}" if module.bias is not None else ""
        raise ValueError(
            f"its kernel has the shape {shape}{bias}, where {one} was expected, after the axes of a stack if "
            "there is one: layers must be stacked along the first axis"
        )
    return Layer(join(path, "kernel"), geometry, stack, module.bias is not None)


def _read_general(path: str, module: nnx.LinearGeneral | nnx.Einsum) -> Layer:
    """Describes a dense layer over several axes; its kernel is (*stack, *inputs, *outputs)."""
    base = nnx.LinearGeneral if isinstance(module, nnx.LinearGeneral) else nnx.Einsum
    if type(module).__call__ is not base.__call__:
        raise ValueError(f"its class has a __call__ of its own, in place of that of nnx.{base.__name__}")
    check_promotion(module)
    shape = tuple(module.kernel.shape)
    if isinstance(module, nnx.LinearGeneral):
        trailing = tuple(range(-len(module.axis), 0))
        if module.batch_axis or tuple(module.axis) != trailing:
            raise ValueError("it takes other axes of its input than the last ones in their order")
        if module.dot_general_cls is not None or module.dot_general not in (None, lax.dot_general):
            raise ValueError("it computes with a `dot_general` of its own")
        into, out = tuple(module.in_features), tuple(module.out_features)
    else:
        if module.einsum_op is not jnp.einsum:
            raise ValueError("it computes with an `einsum_op` of its own")
        count = _inputs_of_einsum(module.einsum_str)
        stacked = len(shape) - len(module.kernel_shape)
        into, out = shape[stacked : stacked + count], shape[stacked + count :]
    one, bias = (*into, *out), None if module.bias is None else tuple(module.bias.shape)
    stack = shape[: max(len(shape) - len(one), 0)]
    if shape != (*stack, *one) or bias not in (None, (*stack, *out)):
        raise ValueError(
            f"its kernel has the shape {shape} and its bias {bias}, where {one} and {out} were expected, "
            "after the axes of a stack if there is one: layers must be stacked along the first axis"
        )
    geometry = Geometry((), math.prod(into), math.prod(out))
    return Layer(join(path, "kernel"), geometry, stack, bias is not None, layout_of(into, out), shape)


def _inputs_of_einsum(equation: str) -> int:
    """Returns how many axes of the kernel are contracted in an einsum that is a dense layer.

    Raises:
      ValueError: it is none: the last axes of the input, in their order, must be the kernel's first ones, and
        the kernel's other axes the output's last ones.
    """
    taken, _, made = equation.replace(" ", "").replace("...", "").partition("->")
    x, _, kernel = taken.partition(",")
    into = "".join(c for c in kernel if c in x)
    out, batch = kernel[len(into) :], x[: len(x) - len(into)]
    if not into or not out or (x, kernel, made) != (batch + into, into + out, batch + out):
        raise ValueError(
            f"its equation {equation!r} is no dense layer of the last axes, such as '...i,io->...o'"
        )
    return len(into)


def layers_at(model: nnx.Module, kernels: Iterable[str]) -> dict[str, Layer]:
    """Returns the layers whose kernels have these paths in `model`.

    Raises:
      TypeError: a path that is not the kernel of one of `LAYERS`.
      ValueError: layers that cannot be made of branches, all with the reasons; or a shared layer by another
        path than its own.
    """
    check_aliases(model, kernels)
    modules = {join(path, "kernel"): (path, m) for path, m in named_modules(model) if _is_plain(m)}
    if wrong := [kernel for kernel in kernels if kernel not in modules]:
        raise TypeError(f"only kernels of {_KINDS} can become CSLA layers, not {', '.join(sorted(wrong))}")
    return _described(model, dict(modules[kernel] for kernel in kernels))


def check_aliases(model: nnx.Module, kernels: Iterable[str]) -> None:
    """Raises ValueError, with every path, if `kernels` name shared layers by other paths than their own."""
    others = aliases(model)
    pairs = {}
    for kernel in kernels:
        layer, _, last = kernel.rpartition("/")
        if layer in others:
            pairs[kernel] = join(others[layer], last)
    _refuse_aliases(pairs)


# Flax modules around a layer -> what they do with its kernel.
WRAPPERS: dict[type[nnx.Module], str] = {
    nnx.WeightNorm: "normalises its kernel before each use",
    nnx.SpectralNorm: "normalises its kernel before each use",
    nnx.LoRA: "keeps its kernel and trains what it adds to it",
}


def _refuse_aliases(pairs: Mapping[str, str]) -> None:
    if pairs:
        raise ValueError(
            "; ".join(
                f"{other} is the same layer as {own}: give it once, as {own}" for other, own in pairs.items()
            )
        )


def _is_plain(module: nnx.Module) -> bool:
    return isinstance(module, LAYERS)


def _has_kernel(module: nnx.Module) -> bool:
    return isinstance(getattr(module, "kernel", None), nnx.Variable)


def _selected(model: nnx.Module, select: Select) -> dict[str, nnx.Module]:
    modules = dict(named_modules(model))
    with_kernel = {path: m for path, m in modules.items() if _has_kernel(m)}
    match select:
        case None:
            declared = model.branch_sets() if isinstance(model, DeclaresBranches) else None
            wanted = {p: m for p, m in with_kernel.items() if _is_plain(m)}
            return {p: m for p, m in wanted.items() if declared is None or join(p, "kernel") in declared}
        case str() | re.Pattern():
            pattern = paths.compiled(select, "select")
            found = {p: m for p, m in with_kernel.items() if pattern.fullmatch(p)}
            _refuse_aliases(_only_by_alias(pattern, found, aliases(model), with_kernel))
            return found
        case type() | tuple() if isinstance(select, type) or all(isinstance(t, type) for t in select):
            return {p: m for p, m in modules.items() if isinstance(m, select)}
        case _ if callable(select):
            return {p: m for p, m in with_kernel.items() if select(p, m)}
    raise TypeError(
        f"`select` is {select!r}: it must be a regular expression, a function (path, module) -> bool, a "
        "type, a tuple of types, or None"
    )


def _only_by_alias(
    pattern: re.Pattern[str], found: Iterable[str], others: Mapping[str, str], layers: Iterable[str]
) -> dict[str, str]:
    """Returns aliases of layers that `pattern` matches although it does not match the layer's own path."""
    return {
        o: own for o, own in others.items() if own in layers and pattern.fullmatch(o) and own not in found
    }


def _described(model: nnx.Module, modules: Mapping[str, nnx.Module]) -> dict[str, Layer]:
    """Returns `read_layer` of all modules; raises one ValueError with the reasons of all that fail."""
    return _all_of(*_read(model, modules))


def _all_of(found: dict[str, Layer], problems: Mapping[str, str]) -> dict[str, Layer]:
    if problems:
        listed = "; ".join(f"{path} {why}" for path, why in problems.items())
        raise ValueError(f"layers that cannot be made of branches: {listed}")
    return found


def _read(model: nnx.Module, modules: Mapping[str, nnx.Module]) -> tuple[dict[str, Layer], dict[str, str]]:
    """Returns `read_layer` of the modules by path, and "(class): reason" of those that fail."""
    owners: dict[int, list[str]] = {}
    wrapped: dict[int, str] = {}
    for path, module in named_modules(model):
        for value in vars(module).values():
            if isinstance(value, nnx.Variable):
                owners.setdefault(id(value), []).append(path)
            does = next((text for kind, text in WRAPPERS.items() if isinstance(module, kind)), "")
            if does and isinstance(value, nnx.Module):
                wrapped[id(value)] = f"{path} ({type(module).__name__}) {does}"
    found, problems = {}, {}
    for path, module in modules.items():
        try:
            layer = read_layer(path, module)
            for name, value in vars(module).items():
                others = [other for other in owners.get(id(value), []) if other != path]
                if others:
                    raise ValueError(f"its {name} alone, not the layer, is shared with {', '.join(others)}")
            if id(module) in wrapped:
                raise ValueError(wrapped[id(module)])
            found[layer.path] = layer
        except ValueError as error:
            problems[path] = f"({type(module).__name__}): {error}"
    return dict(sorted(found.items(), key=lambda item: paths.natural_order(item[0]))), problems


def _check_rules(model: nnx.Module, layers: Mapping[str, Layer], branches: Branches) -> None:
    """Raises ValueError if a rule of `branches` names a shared layer by another path than its own."""
    if not isinstance(branches, Mapping):
        return
    names, others = [layer.name for layer in layers.values()], aliases(model)
    for pattern in branches:
        compiled = paths.compiled(pattern, "branches")
        matched = [name for name in names if compiled.fullmatch(name)]
        _refuse_aliases(_only_by_alias(compiled, matched, others, names))
