"""The layers of any function of parameters: which equation consumes each kernel, whatever framework wrote it.

`trace_layers(apply, params, *example)` traces the function once and follows every parameter through casts,
transposes, reshapes, scans and checkpoints to the convolution or product that takes it. That equation says
what a parameter's shape alone does not: strides, padding, dilation, groups, how often the layer is used, and
what reads its output.

How the axes of the parameter lie in the kernel is found by numbers: every operation on a parameter is also
done to an array of its own indices, and what arrives at the convolution is compared with a layout
(`BranchSet.layout`), entry by entry.
"""

import dataclasses
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

import jax
import numpy as np

from repopt_jax.arguments import check_kind
from repopt_jax.core import paths
from repopt_jax.core.branches import Branch, BranchSet, Shape, to_canonical
from repopt_jax.core.jaxprs import CONVOLUTIONS, Equation, Flat, Value, bodies, flatten, scan_arguments
from repopt_jax.core.layer import Chosen, Layer
from repopt_jax.core.structure import Geometry

Select: TypeAlias = str | re.Pattern[str] | Callable[[str, Layer], bool] | None
Branches: TypeAlias = Sequence[Branch] | Callable[[Layer], Chosen] | Mapping[str, Chosen] | None


def find_branches(
    apply: Callable[..., Any],
    params: Any,
    *example: Any,
    select: Select = None,
    branches: Branches = None,
) -> dict[str, BranchSet]:
    """Returns a branch set for the layers of any function, by the paths of their kernels in `params`.

        find_branches(lambda params, x: Net().apply({"params": params}, x), params, images[:1])

    Args:
      apply: (params, *example) -> any tree of arrays. It is traced, not run.
      params: the parameters, a tree of arrays or `jax.ShapeDtypeStruct`s.
      example: the other arguments, likewise. Without any, arrays that `apply` has taken in are the data.
      select: which layers: a regular expression for the whole path of a layer, or a function (path, `Layer`)
        -> bool. By default every layer that has several branches, but not those that are kept while the
        product of two smaller kernels is trained in their place (`Traced.adapted`).
      branches: None for those of `repopt`; a sequence for every layer; or a function of the `Layer`, or a
        mapping from regular expressions for a layer's whole path (the first that matches counts), to a
        sequence, a `BranchSet`, or None for the default.

    Raises:
      ValueError: nothing is selected; kernels that `select` chooses and branches cannot make up; a rule that
        matches no layer; or branches that are not defined for their layer, all with the reasons.
      TypeError: `params` holds what is no array; `select` or `branches` is none of these.
    """
    traced = trace_layers(apply, params, *example)
    chosen = selected(traced, select)
    choose = chooser(chosen, branches)
    found, problems = {}, []
    for path, layer in chosen.items():
        own = choose(layer)
        try:
            branch_set = layer.branch_set(own)
        except ValueError as error:
            problems.append(f"{layer.name}: {error}")
            continue
        if own is not None or select is not None or len(branch_set.branches) > 1:
            found[path] = branch_set
    if problems:
        raise ValueError(f"`branches` do not fit: {'; '.join(problems)}")
    if not found:
        raise ValueError(f"`apply` has no layer of several branches among its parameters:\n{traced}")
    return found


class Traced(NamedTuple):
    """What `trace_layers` finds. As text it is a table, a line for each parameter of several axes.

    Attributes:
      layers: path of a kernel -> its layer, sorted by path, with numbers in paths as numbers.
      others: path of a parameter of several axes that is no layer's kernel -> the reason.
      refused: paths of those others that a convolution or a product takes all the same, and that no
        selection makes layers.
      adapted: path of a kernel among the others -> its layer, which a selection takes: to its output the
        product of two smaller kernels is added, which are trained while it is kept (LoRA, arXiv 2106.09685).
    """

    layers: dict[str, Layer]
    others: dict[str, str]
    refused: tuple[str, ...] = ()
    adapted: dict[str, Layer] = {}  # noqa: RUF012  (a default of a named tuple, which nothing changes)

    def __str__(self) -> str:
        taken = [f"  {path}: {' + '.join(layer.branch_set().names)}" for path, layer in self.layers.items()]
        left = [f"  {path}: {reason}" for path, reason in self.others.items()]
        parts = ((f"{len(taken)} layers", taken), (f"{len(left)} other parameters", left))
        return "\n".join(line for title, lines in parts if lines for line in (f"{title}:", *lines))


def trace_layers(apply: Callable[..., Any], params: Any, *example: Any) -> Traced:
    """Returns the convolutions and dense layers of a function, and why other parameters are none.

    A kernel is a parameter that a convolution or a product with data takes as it is, up to casts and the
    order of its axes. Parameters that are changed before each use (a normalised kernel), of which only a part
    is used, that are also read otherwise (an embedding that makes the logits), or that enter a transposed
    convolution are none. A kernel W whose output is added to that of B after A, of the same input and with
    fewer channels between them than W takes or gives, is one of `Traced.adapted`: x W + (x A) B.

    Args:
      apply, params, example: as in `find_branches`.

    Raises:
      TypeError: `params` holds what is no array, all listed.
    """
    check_kind("apply", apply, Callable, "a function of parameters")
    leaves, _ = paths.named_leaves(params)
    if wrong := [f"{p} ({type(leaf).__name__})" for p, leaf in leaves.items() if not hasattr(leaf, "dtype")]:
        raise TypeError(
            f"`params` must hold arrays only, not {', '.join(wrong)}: give the arrays and keep the other "
            "leaves separate (Equinox: `eqx.partition(model, eqx.is_inexact_array)`)"
        )
    trace = trace_uses(apply, params, *example)
    found, adapted, others = {}, {}, {}
    biases = {path for uses in trace.uses.values() for use in uses for path in use.biases}
    for path, leaf in leaves.items():
        uses, shape = trace.uses.get(path, []), tuple(leaf.shape)
        if not uses and (len(shape) < 2 or path in biases):
            continue
        why = trace.problems.get(path, set()) | {f"{p} reads it" for p in trace.others.get(path, ())}
        if not uses and not why:
            why = {"no equation reads it"}
        if why:
            others[path] = "; ".join(sorted(why))
            continue
        first = uses[0]
        if any(use.same_layer != first.same_layer for use in uses):
            others[path] = "it is used as several different layers"
            continue
        readers = tuple(dict.fromkeys(str(r) for use in uses for r in use.readers))
        has_bias = all(use.biases for use in uses)
        count = sum(use.times for use in uses)
        layer = Layer(path, first.geometry, first.stack, has_bias, first.layout, shape, count, readers)
        if any(use.adapted for use in uses):
            adapted[path] = layer
            others[path] = "the product of two smaller kernels is added to its output (LoRA)"
        else:
            found[path] = layer

    def ordered(mapping: dict[str, Any]) -> dict[str, Any]:
        return dict(sorted(mapping.items(), key=_by_path))

    taken = trace.uses.keys() | trace.problems.keys()
    refused = tuple(path for path in others if path in taken and path not in adapted)
    return Traced(ordered(found), ordered(others), refused, ordered(adapted))


def _by_path(item: tuple[str, Any]) -> Any:
    return paths.natural_order(item[0])


# --- Following values


class Reader(NamedTuple):
    """An equation that reads a layer's output: its primitive, and the parameters that it also takes."""

    primitive: str
    params: tuple[str, ...] = ()

    def __str__(self) -> str:
        return " ".join((self.primitive, *self.params))


@dataclasses.dataclass(eq=False)
class Use:
    """One use of a kernel by an equation.

    Attributes:
      path, geometry, stack, layout: as in `Layer`.
      times: how often the equation runs, in scans.
      biases: parameters that are added to the output.
      readers: what reads the sum.
      source: the array that it takes, up to casts and its shape.
      after: the use of which that array is the output, up to a factor.
      adapted: whether the output of two other uses, one after the other, is added to its own (LoRA).
    """

    path: str
    geometry: Geometry
    stack: Shape
    layout: str
    times: int
    biases: list[str] = dataclasses.field(default_factory=list)
    readers: list[Reader] = dataclasses.field(default_factory=list)
    source: Any = None
    after: "Use | None" = None
    adapted: bool = False

    @property
    def same_layer(self) -> Any:
        """What all uses of a layer have in common; the padding may follow the input's size."""
        return dataclasses.replace(self.geometry, padding=None), self.stack, self.layout


@dataclasses.dataclass
class Uses:
    """All that a traced function does with its parameters.

    Attributes:
      uses: path of a kernel -> its uses, in order.
      others: path of a parameter -> the primitives that read it otherwise.
      problems: path of a parameter -> why it is no kernel although a convolution or product takes it.
    """

    uses: dict[str, list[Use]] = dataclasses.field(default_factory=dict)
    others: dict[str, list[str]] = dataclasses.field(default_factory=dict)
    problems: dict[str, set[str]] = dataclasses.field(default_factory=dict)


class _View(NamedTuple):
    """A parameter as it is, up to the order of its axes.

    Attributes:
      path: of the parameter.
      index: for every entry of the value, its place in one layer's flattened parameter.
      stack: leading axes of the parameter that scans or products have taken away.
      shape: shape of one layer's parameter.
      gathered: whether axes have been moved and joined in one step, as `vmap` does to make one convolution of
        a stack of them.
    """

    path: str
    index: np.ndarray
    stack: Shape
    shape: Shape
    gathered: bool = False

    @property
    def is_plain(self) -> bool:
        """Whether nothing has been moved so far."""
        return self.index.shape == self.shape and bool(
            (self.index.ravel() == np.arange(self.index.size)).all()
        )

    def unstacked(self, count: int) -> "_View | None":
        """Returns the view of one layer of a stack of this many leading axes, if that is what it is."""
        if not self.is_plain or len(self.shape) < count:
            return None
        rest = self.shape[count:]
        return _View(self.path, _places(rest), (*self.stack, *self.shape[:count]), rest)

    def ungathered(self, axes: list[int]) -> "_View | None":
        """Returns the view of one layer of a stack that `vmap` runs as one convolution, if it is one.

        `axes` are (*spatial, input, output) of the one kernel, whose outputs are in order of the layers; the
        view that is returned has its axes in this order.
        """
        count = len(self.shape) - len(axes)
        number = math.prod(self.shape[:count])
        if not self.gathered or count < 1 or not self.index.size or self.index.shape[axes[-1]] % number:
            return None
        index = self.index.transpose(axes)
        index = np.moveaxis(index.reshape(*index.shape[:-1], number, -1), -2, 0)
        rest = self.shape[count:]
        offsets = np.arange(number).reshape(number, *(1,) * len(axes)) * math.prod(rest)
        if index[0].size != math.prod(rest) or (index != index[0] + offsets).any():
            return None
        return _View(self.path, index[0], (*self.stack, *self.shape[:count]), rest)


class _Info(NamedTuple):
    """What is known of a value: whether it depends on data, on which parameters, and what it is."""

    data: bool = False
    params: frozenset[str] = frozenset()
    view: _View | None = None
    size: int = 0  # number of entries of the one parameter that it is, perhaps repeated
    made_by: Use | None = None  # the layer whose output it is, up to casts and the bias
    term: Use | None = None  # the same, also up to a factor and the shape
    changed: str = ""  # why it is no view of the parameter any more, where more is known than that


# Equations of one argument that change neither its values nor their order.
PASSED = (
    *("convert_element_type", "copy", "copy_p", "optimization_barrier", "reduce_precision", "name"),
    *("sharding_constraint", "mesh_cast", "reshard", "pvary"),
)


# Why an array without entries is no kernel: there is no geometry without inputs or outputs.
EMPTY = "it is empty"


def trace_uses(apply: Callable[..., Any], params: Any, *example: Any) -> Uses:
    """Returns what a function does with each of its parameters: `trace_layers` without a judgement."""
    flat = flatten(jax.make_jaxpr(apply)(params, *example))
    leaves, _ = paths.named_leaves(params)
    infos = []
    for path, leaf in leaves.items():
        view = _View(path, _places(leaf.shape), (), tuple(leaf.shape)) if leaf.size else None
        infos.append(_Info(False, frozenset((path,)), view, leaf.size, changed="" if leaf.size else EMPTY))
    infos += [_Info(data=True)] * (len(flat.inputs) - len(infos))
    walk = _Walk(closed_over=len(flat.inputs) == len(leaves))
    for info in walk.run(flat, infos, 1):
        walk.read("output", info._replace(made_by=info.made_by or info.term))
    return walk.found


class _Walk:
    def __init__(self, *, closed_over: bool):
        self.found = Uses()
        self.closed_over = closed_over  # whether the data are constants of the function
        self.sources: dict[Value, Any] = {}  # array -> the one that it is up to casts and its shape

    def run(self, flat: Flat, inputs: Sequence[_Info], times: int) -> list[_Info]:
        """Follows the values of a function; `times` is how often it runs."""
        known: dict[Value, _Info] = dict(zip(flat.inputs, inputs, strict=True))
        for equation in flat.equations:
            taken = [known.get(value) or self.constant(value) for value in equation.inputs]
            known |= zip(equation.outputs, self.equation(equation, taken, times), strict=True)
        return [known.get(value) or self.constant(value) for value in flat.outputs]

    def constant(self, value: Value) -> _Info:
        return _Info(data=self.closed_over and len(value.shape) > 0)

    def equation(self, equation: Equation, taken: list[_Info], times: int) -> list[_Info]:
        """Returns what is known of an equation's outputs, and keeps what it says of the parameters."""
        params = frozenset[str]().union(*(info.params for info in taken))
        inside = list(bodies(equation))
        if inside:
            return self.control_flow(equation, taken, times)
        if not any(info.data for info in taken):
            views = [info.view for info in taken if info.view is not None]
            moved = _moved(equation, views[0]) if len(views) == len(taken) == 1 else None
            kept = moved is not None or equation.name == "broadcast_in_dim"
            size = taken[0].size if kept and len(taken) == 1 else 0
            changed = next((info.changed for info in taken if info.changed), "")
            if equation.name == "concatenate" and len(params) > 1:
                changed = "it is joined with other parameters before each use"
            info = _Info(params=params, view=moved, size=size, changed=changed)
            return [info] * len(equation.outputs)
        if equation.name in (*PASSED, "reshape") and len(taken) == 1:
            self.sources[equation.outputs[0]] = self.source(equation.inputs[0])
        if equation.name in PASSED and len(taken) == 1:
            return taken
        made: Use | None = None
        layer = equation.name in (*CONVOLUTIONS, "dot_general")
        if equation.name in CONVOLUTIONS:
            made = self.convolution(equation, taken, times)
        elif equation.name == "dot_general":
            made = self.product(equation, taken, times)
        elif equation.name in ("add", "add_any") and len(taken) == 2:
            made = _with_bias(equation, taken)
        if made is None and not layer:
            self.note(params, equation.name)  # what depends on data is data, and has none
            for info in taken:
                rest = [other for other in taken if other is not info and not other.data]
                self.read(equation.name, info, frozenset[str]().union(*(other.params for other in rest)))
        if made is not None and layer:
            (x,) = (n for n, info in enumerate(taken) if info.data)
            made.source, made.after = self.source(equation.inputs[x]), taken[x].term
        term = made or _term(equation, taken)
        # What has been computed from data is data, whatever parameters were used.
        return [_Info(data=True, made_by=made, term=term)] * len(equation.outputs)

    def source(self, value: Value) -> Any:
        """Returns what stands for an array and its casts; of a constant, which many values hold, itself."""
        return self.sources.get(value, value if value.constant is None else id(value.constant))

    def note(self, params: frozenset[str], primitive: str) -> None:
        for path in params:
            self.found.others.setdefault(path, [])
            if primitive not in self.found.others[path]:
                self.found.others[path].append(primitive)

    def read(self, primitive: str, info: _Info, params: frozenset[str] = frozenset()) -> None:
        if info.made_by is not None:
            info.made_by.readers.append(Reader(primitive, tuple(sorted(params))))

    def refuse(self, info: _Info, reason: str) -> None:
        for path in info.params:
            self.found.problems.setdefault(path, set()).add(reason)

    def convolution(self, equation: Equation, taken: list[_Info], times: int) -> Use | None:
        x, kernel = taken
        self.read("conv_general_dilated", x)
        if kernel.data:
            self.refuse(x, "a convolution takes it as its input")
            return None
        p, shape = equation.params, equation.inputs[1].shape
        numbers = p["dimension_numbers"]
        out, into, *spatial = numbers.rhs_spec
        inputs = equation.inputs[0].shape[numbers.lhs_spec[1]]
        if 0 in shape:
            self.refuse(kernel, EMPTY)
        elif set(p["lhs_dilation"]) - {1}:
            self.refuse(kernel, "a transposed convolution, whose 1x1 branch would reach some outputs alone")
        elif p["batch_group_count"] != 1:
            self.refuse(kernel, "a convolution in groups of the batch")
        else:
            outputs, groups = shape[out], p["feature_group_count"]
            one = kernel.view.ungathered([*spatial, into, out]) if kernel.view else None
            if one is not None:
                kernel, count = kernel._replace(view=one), math.prod(one.stack)
                outputs //= count
                spatial, into, out = list(range(len(spatial))), len(spatial), len(spatial) + 1
                if groups % count == 0:  # else all of them take the same input
                    inputs, groups = inputs // count, groups // count
            geometry = Geometry(
                [shape[axis] for axis in numbers.rhs_spec[2:]],
                inputs,
                outputs,
                groups,
                strides=p["window_strides"],
                dilation=p["rhs_dilation"],
                padding=p["padding"],
            )
            return self.use(kernel, [spatial, [into], [out]], geometry, times)
        return None

    def product(self, equation: Equation, taken: list[_Info], times: int) -> Use | None:
        if all(info.data for info in taken):
            for info in taken:
                self.read("dot_general", info)
            return None
        (contracted, batch) = equation.params["dimension_numbers"]
        side = 0 if taken[1].data else 1
        kernel, x = taken[side], taken[1 - side]
        self.read("dot_general", x)
        shape = equation.inputs[side].shape
        pairs = sorted(zip(contracted[1 - side], contracted[side], strict=True))  # in the data's order
        into, stacked = [axis for _, axis in pairs], list(batch[side])
        out = [axis for axis in range(len(shape)) if axis not in into and axis not in stacked]
        if not kernel.params:
            return None
        if not into or not out:
            self.note(kernel.params, "dot_general")
            return None
        if 0 in shape:
            self.refuse(kernel, EMPTY)
            return None
        if stacked:
            one = kernel.view.unstacked(len(stacked)) if kernel.view else None
            if one is None or stacked != list(range(len(stacked))):
                self.refuse(kernel, "a product in groups that are not along its first axes")
                return None
            kernel = kernel._replace(view=one)
            into, out = ([axis - len(stacked) for axis in axes] for axes in (into, out))
        inputs, outputs = (math.prod(shape[axis + len(stacked)] for axis in axes) for axes in (into, out))
        return self.use(kernel, [[], into, out], Geometry((), inputs, outputs), times)

    def use(self, kernel: _Info, axes: list[list[int]], geometry: Geometry, times: int) -> Use | None:
        """Keeps a use of a kernel whose (spatial, input, output) axes are these."""
        if kernel.view is None:
            if kernel.params:
                self.refuse(kernel, kernel.changed or "it is changed before each use")
            return None
        path, index, stack, shape, _ = kernel.view
        if index.size != math.prod(shape):
            self.refuse(kernel, "only a part of it is one kernel")
            return None
        index = index.transpose([axis for group in axes for axis in group]).reshape(geometry.kernel)
        layout = _layout(index, shape)
        if layout is None:
            turned = np.flip(index, tuple(range(len(axes[0]))))
            order = "axes are mixed"
            if axes[0] and _layout(turned, shape) is not None:
                order = "taps are reversed"
            elif kernel.view.gathered:  # `vmap` over grouped convolutions of one input
                order = "stack is mixed with its groups"
            self.refuse(kernel, f"its {order} before its use")
            return None
        # A stack is run layer by layer: once each.
        use = Use(path, geometry, stack, layout, 1 if stack else times)
        self.found.uses.setdefault(path, []).append(use)
        return use

    def control_flow(self, equation: Equation, taken: list[_Info], times: int) -> list[_Info]:
        """Follows the values into the bodies of a scan, a loop or a condition."""
        inside, p = list(bodies(equation)), equation.params
        made: list[_Info] = []
        if equation.name == "scan":
            consts, carried, _ = scan_arguments(equation)
            inputs = taken[:consts] + [
                self.carried(info, "scan") for info in taken[consts : consts + carried]
            ]
            inputs += [self.scanned(info) for info in taken[consts + carried :]]
            made = self.run(flatten(inside[0]), inputs, times * p["length"])
        elif equation.name == "cond":
            for body in inside:
                made += self.run(flatten(body), taken[1:], times)
        elif equation.name == "while":
            first, second = p["cond_nconsts"], p["body_nconsts"]
            state = [self.carried(info, "while") for info in taken[first + second :]]
            made = self.run(flatten(p["body_jaxpr"]), taken[first : first + second] + state, times)
        else:
            for info in taken:
                self.note(info.params if not info.data else frozenset(), equation.name)
        for info in (*taken, *made):
            self.read(equation.name, info)
            if info.view is not None and info in made:
                self.note(info.params, equation.name)
        return [_Info(data=True)] * len(equation.outputs)

    def carried(self, info: _Info, primitive: str) -> _Info:
        """Returns data for a value that a loop changes, also if it starts as a parameter."""
        self.note(info.params, primitive)
        return _Info(data=True)

    def scanned(self, info: _Info) -> _Info:
        """Returns what is known of one element of the first axis."""
        if info.data:
            return _Info(data=True)
        one = info.view.unstacked(1) if info.view else None
        if info.view and not one:
            info = info._replace(changed="its stack is not along its first axis")
        return info._replace(view=one)  # of the whole size


def _term(equation: Equation, taken: list[_Info]) -> Use | None:
    """Returns the layer whose output this is up to a factor, an addend that is no data, and its shape.

    Of a sum of two such outputs it keeps whether one adapts the other, and returns None.
    """
    data = [info for info in taken if info.data]
    if equation.name in ("add", "add_any") and len(data) == 2:
        for one, other in ((data[0].term, data[1].term), (data[1].term, data[0].term)):
            if one is not None and other is not None:
                one.adapted |= _adapts(other, one)
        return None
    kept = equation.name in ("mul", "add", "add_any", "reshape", "transpose")
    kept |= equation.name == "div" and taken[0].data
    return data[0].term if len(data) == 1 and kept else None


def _adapts(last: Use, whole: Use) -> bool:
    """Whether `last` is the second of two layers that take what `whole` takes, through fewer channels."""
    first, layer = last.after, whole.geometry
    if first is None or first.source != whole.source:
        return False
    return first.geometry.outputs < min(layer.inputs, layer.outputs)


def _with_bias(equation: Equation, taken: list[_Info]) -> Use | None:
    """Returns the layer whose output this is with a parameter added to it: its bias."""
    for info, other in (taken, taken[::-1]):
        made = info.made_by
        if made is None or made.readers or made.biases:
            continue
        if other.size == made.geometry.outputs * math.prod(made.stack) and not other.data:
            made.biases.extend(other.params)
            return made
    return None


def _moved(equation: Equation, view: _View) -> _View | None:
    """Returns the view after an equation that only moves entries; None after any other."""
    p, index = equation.params, view.index
    match equation.name:
        case "transpose":
            index = index.transpose(p["permutation"])
        case "reshape":
            if p.get("dimensions") is not None:
                index, view = index.transpose(p["dimensions"]), view._replace(gathered=True)
            index = index.reshape(p["new_sizes"])
        case "squeeze":
            index = index.squeeze(tuple(p["dimensions"]))
        case "broadcast_in_dim" if math.prod(p["shape"]) == index.size:
            index = index.reshape(p["shape"])
        case "rev":
            index = np.flip(index, p["dimensions"])
        case "slice":
            strides = p["strides"] or (1,) * index.ndim
            index = index[tuple(map(slice, p["start_indices"], p["limit_indices"], strides))]
        case name if name in PASSED:
            pass
        case _:
            return None
    return view._replace(index=index)


def _layout(index: np.ndarray, shape: Shape) -> str | None:
    """Returns the layout in which a parameter of this shape is the kernel with these places; None if none.

    `index` has the axes (*spatial, in/groups, out).
    """
    own = _places(shape)
    for layout in ("...io", "oi...", *_candidates(index, shape)):
        try:
            if np.array_equal(to_canonical(own, layout), index):
                return layout
        except ValueError:
            continue
    return None


def _candidates(index: np.ndarray, shape: Shape) -> Iterator[str]:
    """Yields the layout that the axes suggest: which of them change along which axis of the kernel."""
    if not index.size:
        return
    spatial = index.ndim - 2
    letters = {}
    for axis, n in enumerate(shape):
        for along, size in enumerate(index.shape):
            line = index[tuple(slice(None) if a == along else 0 for a in range(index.ndim))]
            if n > 1 and size > 1 and len(set(np.unravel_index(line, shape)[axis].tolist())) > 1:
                letters[axis] = "s" if along < spatial else "io"[along - spatial]
    free = [axis for axis in range(len(shape)) if axis not in letters]
    missing = spatial - sum(letter == "s" for letter in letters.values())
    for number, axis in enumerate(free):
        letters[axis] = "s" if number < missing else "i"
    found = "".join(letters[axis] for axis in range(len(shape)))
    if {"i", "o"} <= set(found):
        yield found


def _places(shape: Sequence[int]) -> np.ndarray:
    return np.arange(math.prod(shape)).reshape(tuple(shape))


# --- Choosing


def selected(traced: Traced, select: Select) -> dict[str, Layer]:
    """Returns the layers that `select` chooses, by their kernels' paths, as in `find_branches`.

    Raises:
      ValueError: it chooses none, or parameters that cannot be made of branches, with the reasons.
      TypeError: it is none of what it can be.
    """
    wrong: dict[str, str] = {}
    every = dict(sorted((traced.layers | traced.adapted).items(), key=_by_path))
    match select:
        case None:
            return traced.layers
        case str() | re.Pattern():
            pattern = paths.compiled(select, "select")
            found = {p: one for p, one in every.items() if pattern.fullmatch(one.name)}
            wrong = {p: traced.others[p] for p in traced.refused if pattern.fullmatch(p.rpartition("/")[0])}
        case _ if callable(select):
            found = {p: one for p, one in every.items() if select(one.name, one)}
        case _:
            raise TypeError(
                f"`select` is {select!r}: it must be a regular expression, a function (path, layer) -> bool, "
                "or None"
            )
    if wrong:
        raise ValueError(
            "parameters that cannot be made of branches: "
            + "; ".join(f"{path}: {why}" for path, why in wrong.items())
        )
    if not found:
        names = [one.name for one in every.values()]
        raise ValueError(
            f"`apply` has no layer that `select` = {select!r} chooses: its layers are "
            f"{paths.listed(names, 8)}"
        )
    return found


def chooser(layers: Mapping[str, Layer], branches: Branches) -> Callable[[Layer], Chosen]:
    """Returns the function from a layer to its branches that `branches` stands for, as in `find_branches`."""
    match branches:
        case Mapping():
            rules = [(paths.compiled(pattern, "branches"), chosen) for pattern, chosen in branches.items()]
            names = [layer.name for layer in layers.values()]
            if idle := [p.pattern for p, _ in rules if not any(map(p.fullmatch, names))]:
                raise ValueError(
                    f"the rules {', '.join(map(repr, idle))} of `branches` match none of the layers "
                    f"{paths.listed(names, 8)}"
                )
            return lambda layer: next((c for p, c in rules if p.fullmatch(layer.name)), None)
        case None:
            return lambda layer: None
        case Sequence() if all(isinstance(b, Branch) for b in branches):
            return lambda layer: branches
        case _ if callable(branches):
            return branches
    raise TypeError(
        f"`branches` is {branches!r}: it must be a sequence of branches, a function of the layer, a mapping "
        "of regular expressions to sequences, or None"
    )
