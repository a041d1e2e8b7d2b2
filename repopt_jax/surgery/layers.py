"""Finds the layers of any NNX network that can be re-parameterized, and makes a branch set for each.

A layer is found by its path in the model and read here only: its geometry (strides, padding, dilation,
groups), whether its arrays are stacked for `nnx.scan`, and whether a layer made of branches can replace it.
"""

import dataclasses
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TypeAlias

from flax import nnx

from repopt_jax.core import paths
from repopt_jax.core.branches import Branch, BranchSet, Shape
from repopt_jax.core.published import repopt
from repopt_jax.core.scales import DeclaresBranches
from repopt_jax.core.structure import Geometry
from repopt_jax.nn.geometry import geometry_of
from repopt_jax.surgery.modules import aliases, join, named_modules

Select: TypeAlias = str | re.Pattern[str] | type | tuple[type, ...] | Callable[[str, nnx.Module], bool] | None
Chosen: TypeAlias = Sequence[Branch] | BranchSet | None
Branches: TypeAlias = Sequence[Branch] | Callable[["Layer"], Chosen] | Mapping[str, Chosen] | None


def find_layers(model: nnx.Module, select: Select = None) -> dict[str, "Layer"]:
    """Returns the convolutions and dense layers of `model` that `select` chooses, by their kernels' paths.

    They are sorted by path, with numbers in paths as numbers. A layer that is used in several places occurs
    once, under its path in `nnx.state(model)`.

    Args:
      model: any NNX model.
      select: which layers. None selects every `nnx.Conv` and `nnx.Linear` or, if the model declares its
        `branch_sets()`, the layers of these. A regular expression for the whole path of a layer
        (`encoder/.*`) or a function (path, module) -> bool selects among all modules that have a kernel, a
        type or a tuple of types among all modules.

    Raises:
      ValueError: nothing is selected; a regular expression that names a shared layer by another path than its
        own; or layers that branches cannot replace, all with the reasons.
      TypeError: `select` is none of these.
    """
    return _all_of(*survey_layers(model, select))


def survey_layers(model: nnx.Module, select: Select = None) -> tuple[dict[str, "Layer"], dict[str, str]]:
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


def find_branches(
    model: nnx.Module, select: Select = None, branches: Branches = None
) -> dict[str, BranchSet]:
    """Returns a branch set for every layer that `select` chooses, by the path of its kernel.

        find_branches(model, r"encoder/.*", {r".*/conv2": [Kernel((3, 3)), Kernel((1, 3)), Kernel((3, 1))]})

    Args:
      model: any NNX model.
      select: which layers, as in `find_layers`.
      branches: None for those that the model declares in `branch_sets()`, else those of `repopt`; a sequence
        for every layer; or a function of the `Layer`, or a mapping from regular expressions for a layer's
        whole path (the first that matches counts), to a sequence, a `BranchSet`, or None for the default. The
        default also applies to layers that no expression matches.

    Raises:
      ValueError: as `find_layers`; a rule that matches no layer, or a shared layer by another path; or
        branches that are not defined for their layer, all with the reasons.
      TypeError: `branches` is none of these.
    """
    layers = find_layers(model, select)
    declared = model.branch_sets() if isinstance(model, DeclaresBranches) else {}
    choose = _chooser(model, layers, branches)
    found, problems = {}, []
    for path, layer in layers.items():
        chosen = choose(layer)
        try:
            found[path] = layer.branch_set(declared.get(path) if chosen is None else chosen)
        except ValueError as error:
            problems.append(f"{layer.name}: {error}")
    if problems:
        raise ValueError(f"`branches` do not fit: {'; '.join(problems)}")
    return found


@dataclasses.dataclass(frozen=True)
class Layer:
    """A convolution or a dense layer that can be re-parameterized.

    Attributes:
      path: path of its kernel in the model, `encoder/0/conv/kernel`.
      geometry: its geometry.
      stack: leading axes of its arrays, along which equal layers are stacked; () for a single layer.
      has_bias: whether it has a bias.
    """

    path: str
    geometry: Geometry
    stack: Shape = ()
    has_bias: bool = False

    @property
    def name(self) -> str:
        """The path of the layer itself, `encoder/0/conv`."""
        return self.path.rpartition("/")[0]

    @property
    def kernel(self) -> Shape:
        """Shape of the kernel, (*stack, *window, in/groups, out)."""
        return (*self.stack, *self.geometry.kernel)

    def branch_set(self, branches: Chosen = None) -> BranchSet:
        """Returns these branches as a set for this layer; those of `repopt` for None.

        Raises:
          ValueError: a branch that is not defined for this layer, or a `BranchSet` of another kernel.
        """
        if branches is None:
            return repopt(self.geometry).branch_set(stack=self.stack)
        if not isinstance(branches, BranchSet):
            if not isinstance(branches, Sequence) or not all(isinstance(b, Branch) for b in branches):
                raise ValueError(f"{branches!r} is neither a sequence of branches nor a `BranchSet`")
            return BranchSet(
                self.kernel, tuple(branches), groups=self.geometry.groups, stacked=len(self.stack)
            )
        expected = {
            "kernel": self.kernel,
            "groups": self.geometry.groups,
            "layout": "...io",
            "stacked": len(self.stack),
        }
        found = {name: getattr(branches, name) for name in expected}
        if difference := paths.describe_difference(expected, found, noun="attributes"):
            raise ValueError(f"the branch set is of another layer: {difference}")
        return branches


def read_layer(path: str, module: nnx.Module) -> Layer:
    """Describes `module` at `path` as a `Layer`.

    Raises:
      ValueError: branches cannot replace it, with the reason.
    """
    geometry = geometry_of(module)  # pyright: ignore[reportArgumentType]  (refuses what it is not)
    assert isinstance(module, (nnx.Conv, nnx.Linear))
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


def layers_at(model: nnx.Module, kernels: Iterable[str]) -> dict[str, Layer]:
    """Returns the layers whose kernels have these paths in `model`.

    Raises:
      TypeError: a path that is not the kernel of an `nnx.Conv` or `nnx.Linear`.
      ValueError: layers that cannot be made of branches, all with the reasons; or a shared layer by another
        path than its own.
    """
    check_aliases(model, kernels)
    modules = {join(path, "kernel"): (path, m) for path, m in named_modules(model) if _is_plain(m)}
    if wrong := [kernel for kernel in kernels if kernel not in modules]:
        raise TypeError(
            f"only kernels of nnx.Conv and nnx.Linear can become CSLA layers, not {', '.join(sorted(wrong))}"
        )
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


# Flax modules that change the kernel of the layer inside them.
WRAPPERS = (nnx.WeightNorm, nnx.SpectralNorm)


def _refuse_aliases(pairs: Mapping[str, str]) -> None:
    if pairs:
        raise ValueError(
            "; ".join(
                f"{other} is the same layer as {own}: give it once, as {own}" for other, own in pairs.items()
            )
        )


def _is_plain(module: nnx.Module) -> bool:
    return isinstance(module, (nnx.Conv, nnx.Linear))


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
            if isinstance(module, WRAPPERS) and isinstance(value, nnx.Module):
                wrapped[id(value)] = f"{path} ({type(module).__name__})"
    found, problems = {}, {}
    for path, module in modules.items():
        try:
            layer = read_layer(path, module)
            for name, value in vars(module).items():
                others = [other for other in owners.get(id(value), []) if other != path]
                if others:
                    raise ValueError(f"its {name} alone, not the layer, is shared with {', '.join(others)}")
            if id(module) in wrapped:
                raise ValueError(f"{wrapped[id(module)]} normalises its kernel before each use")
            found[layer.path] = layer
        except ValueError as error:
            problems[path] = f"({type(module).__name__}): {error}"
    return dict(sorted(found.items(), key=lambda item: paths.natural_order(item[0]))), problems


def _chooser(model: nnx.Module, layers: Mapping[str, Layer], branches: Branches) -> Callable[[Layer], Chosen]:
    match branches:
        case None:
            return lambda layer: None
        case Mapping():
            return _by_rules(model, layers, branches)
        case Sequence() if all(isinstance(b, Branch) for b in branches):
            return lambda layer: branches
        case _ if callable(branches):
            return branches
    raise TypeError(
        f"`branches` is {branches!r}: it must be a sequence of branches, a function of the layer, a mapping "
        "of regular expressions to sequences, or None"
    )


def _by_rules(
    model: nnx.Module, layers: Mapping[str, Layer], rules: Mapping[str, Chosen]
) -> Callable[[Layer], Chosen]:
    compiled = [(paths.compiled(pattern, "branches"), chosen) for pattern, chosen in rules.items()]
    names = [layer.name for layer in layers.values()]
    others = aliases(model)
    idle = []
    for pattern, _ in compiled:
        matched = [name for name in names if pattern.fullmatch(name)]
        _refuse_aliases(_only_by_alias(pattern, matched, others, names))
        if not matched:
            idle.append(pattern.pattern)
    if idle:
        raise ValueError(
            f"the rules {', '.join(map(repr, idle))} of `branches` match none of the layers "
            f"{paths.listed(names, 8)}"
        )
    return lambda layer: next((c for pattern, c in compiled if pattern.fullmatch(layer.name)), None)
