"""Pruning by ResRep: plans which channels can be removed, adds the compactors, and merges what is left.

    plan = plan_pruning(model, jax.ShapeDtypeStruct((1, 32, 32, 3), "float32"))
    model = to_resrep(model, plan)
    tx = resrep(optax.sgd(lr, 0.9), plan.compactors, lr)
    ...                                                          # train, and from time to time
    norms = row_norms(params, plan.compactors)
    state = set_masks(state, resrep_masks(norms, get_masks(state), plan.macs, target=0.5))
    ...
    slim = shrink(model, plan)                                   # the smaller network, of plain layers

`repopt prune` does all of it. Source: ResRep (arXiv 2007.03260), sections 3.2 to 3.4.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from repopt_jax.arguments import check_kind
from repopt_jax.core import algebra, paths
from repopt_jax.nn.block import Block
from repopt_jax.nn.compactor import Compacted, Compactor
from repopt_jax.optim.resrep import row_norms
from repopt_jax.surgery.channels import ChannelGroup, Channels, LayerUse, refusal
from repopt_jax.surgery.fuse import FoldedNorm, fold_batch_norm, plain_like
from repopt_jax.surgery.layers import Select, find_layers
from repopt_jax.surgery.macs import count_macs
from repopt_jax.surgery.marks import compiled, constant_inputs, drawn, random_inputs
from repopt_jax.surgery.modules import Removed, check_model, join, named_modules, replace_modules

# Largest difference between a random network before and after half of its channels are removed, relative to
# the largest output: rounding in single precision and in half precision; mistakes are of the order of 1.
SAME_OUTPUTS, SAME_OUTPUTS_HALF = 1e-2, 0.3


@dataclasses.dataclass(frozen=True, eq=False)
class PruningPlan:
    """What can be removed from a network, and what that saves: plain data without arrays of JAX.

    Attributes:
      groups: path of a compactor's kernel in the network that `to_resrep` makes -> its channels.
      uses: path of a layer in the plain network -> how it is used.
      total: multiply-accumulates of the plain network, as `count_macs`.
      inputs: shapes and dtypes of the example that it was planned with.
    """

    groups: Mapping[str, ChannelGroup]
    uses: Mapping[str, LayerUse]
    total: int
    inputs: tuple[Any, ...]

    @property
    def compactors(self) -> tuple[str, ...]:
        """Paths of the compactors' kernels, for `optim.resrep`."""
        return tuple(self.groups)

    @property
    def masks(self) -> dict[str, np.ndarray]:
        """Masks with which everything stays, {compactor: (channels,) bool}."""
        return {path: np.ones(group.size, bool) for path, group in self.groups.items()}

    def macs(self, masks: Mapping[str, Any]) -> int:
        """Multiply-accumulates of the network without the rows whose mask is False, compactors merged.

        Raises:
          ValueError: masks for other compactors, or of another shape.
        """
        widths = self.widths(masks)
        full = {path: self.uses[path] for path in widths}
        return self.total + sum(
            use.macs(*widths[path]) - use.macs(use.inputs, use.outputs) for path, use in full.items()
        )

    def widths(self, masks: Mapping[str, Any]) -> dict[str, tuple[int, int]]:
        """Inputs and outputs of every layer that the plan touches, with these masks, by its path.

        Raises:
          ValueError: as `macs`.
        """
        kept = self.checked(masks)
        left = {path: [use.inputs, use.outputs] for path, use in self.uses.items()}
        touched = set()
        for path, group in self.groups.items():
            gone = ~kept[path]
            for layer in (*group.producers, *group.outputs):
                left[layer][1] -= int(gone.sum())
                touched.add(layer)
            for layer, channel in (*group.inputs.items(), *group.channels.items()):
                if layer not in left:
                    continue  # a batch norm
                count = int(gone[channel[channel >= 0]].sum())
                left[layer][0] -= count
                left[layer][1] -= count if layer in group.channels else 0
                touched.add(layer)
        return {path: (left[path][0], left[path][1]) for path in self.uses if path in touched}

    def checked(self, masks: Mapping[str, Any]) -> dict[str, np.ndarray]:
        """The masks as arrays of bool; ValueError if they are not for exactly these compactors."""
        found = {path: np.asarray(mask).astype(bool) for path, mask in masks.items()}
        shapes = ({p: m.shape for p, m in side.items()} for side in (self.masks, found))
        if wrong := paths.describe_difference(*shapes, noun="masks"):
            raise ValueError(f"`masks` do not fit the plan: {wrong}")
        return found


def plan_pruning(
    model: nnx.Module,
    *inputs: Any,
    select: Select = None,
    successors: Mapping[str, Sequence[str]] | None = None,
    followers: Mapping[str, str] | None = None,
) -> PruningPlan:
    """Finds which channels of a network can be removed, and which layers read them.

        plan_pruning(model, jax.ShapeDtypeStruct((1, 32, 32, 3), "float32"), select=r".*/conv1")

    The layers that read a layer's channels are found by running the network, whatever its structure: chains,
    residual blocks, concatenation, depthwise layers and batch norms between, flattening in any order,
    squeeze-and-excitation. Selected layers whose outputs are added, as along the shortcuts of a ResNet, share
    one compactor. At the end half of the channels of a network with random numbers are removed, and its
    outputs compared: a plan that is returned has been tried.

    Args:
      model: the plain network, with or without batch norms; it is not changed and its numbers are not used,
        so that it may be abstract.
      inputs: what it is called with, arrays or `jax.ShapeDtypeStruct`s. Their size determines the costs: with
        a batch of one, those of one image.
      select: which layers' outputs can be removed, as in `find_layers`. By default every convolution with a
        batch norm directly after it whose channels can be removed by themselves: the inner layers of
        residual blocks, and all layers of a chain.
      successors: in place of `select` and the search, path of each layer -> paths of the layers that read its
        channels: convolutions, dense layers (also after flattening, channels last), and the depthwise layers
        and batch norms between. A batch norm directly after a layer belongs to it and need not be named.
      followers: with `successors`, path of a layer -> path of the layer whose compactor it shares because
        their outputs are added. Their successors are put together.

    Raises:
      ValueError: no input; nothing selected; layers whose channels cannot be removed, all with the reasons;
        `followers` without `successors`, or both `select` and `successors`.
      TypeError: `select` is of no kind that `find_layers` takes.
    """
    check_model(model)
    if successors is not None and select is not None:
        raise ValueError("`select` and `successors` both say which layers to prune: give one of them")
    if followers and successors is None:
        raise ValueError(
            "`followers` is given without `successors`: layers that are added are found by themselves"
        )
    channels = Channels(model, inputs)
    if successors is not None:
        if not successors:
            raise ValueError("`successors` is empty: there is nothing to prune")
        groups = channels.declared(successors, followers or {})
    elif select is not None:
        groups = channels.groups([layer.name for layer in find_layers(model, select).values()])
    elif not (selected := channels.default()):
        raise ValueError(
            "`model` has no convolution with a batch norm after it whose channels can be removed by "
            "themselves: choose layers with `select`, whose reasons are then given"
        )
    else:
        groups = channels.groups(selected)
    example = tuple(jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), each) for each in inputs)
    evaluated = nnx.clone(model)
    evaluated.eval()
    total = count_macs(evaluated, *example)
    plan = PruningPlan(dict(zip(map(str, range(len(groups))), groups)), channels.uses, total, example)
    names = _compactor_paths(nnx.eval_shape(lambda: to_resrep(drawn(model), plan)), groups)
    plan = dataclasses.replace(plan, groups=dict(zip(names, groups)))
    _try(model, plan)
    return plan


def to_resrep(model: nnx.Module, plan: PruningPlan) -> nnx.Module:
    """Returns a copy of a network with a compactor for each group of the plan: the same function at first.

    It comes after the batch norm of each producer, or after the layer if that has none (`nn.Compacted`), and
    before the activation. `fuse` refuses the network until `shrink` has merged its compactors.

    Raises:
      ValueError: the model lacks modules of the plan, all listed.
    """
    check_model(model)
    check_kind("plan", plan, PruningPlan, "a `PruningPlan`, such as `plan_pruning` returns")
    modules = dict(named_modules(model))
    points = {
        norm or layer: (number, layer)
        for number, group in plan.groups.items()
        for layer, norm in group.producers.items()
    }
    if missing := [
        path for point, (_, layer) in points.items() for path in (layer, point) if path not in modules
    ]:
        raise ValueError(
            f"`model` is not the one that was planned: it has no {', '.join(dict.fromkeys(missing))}"
        )
    compactors: dict[str, Compactor] = {}

    def replace(path: str, module: Any) -> nnx.Module | None:
        if path not in points:
            return None
        number, name = points[path]
        if number not in compactors:
            layer: Any = modules[name]
            compactors[number] = Compactor(
                plan.groups[number].size,
                dtype=module.dtype,
                param_dtype=jnp.promote_types(layer.kernel.dtype, jnp.float32),
                precision=layer.precision,
            )
        return Compacted(module, compactors[number])

    return replace_modules(model, replace)


def kept_rows(model: nnx.Module, plan: PruningPlan, threshold: float = 1e-5) -> dict[str, np.ndarray]:
    """Returns which rows of each compactor stay: those with a norm of at least `threshold`, or the largest
    one if there is none, {compactor: (channels,) bool}.

    Raises:
      ValueError: a negative threshold, or a model without these compactors.
    """
    check_model(model)
    check_kind("plan", plan, PruningPlan, "a `PruningPlan`, such as `plan_pruning` returns")
    if not threshold >= 0:
        raise ValueError(f"`threshold` is {threshold}: it must be at least 0")
    norms = {p: np.asarray(n) for p, n in row_norms(nnx.state(model, nnx.Param), plan.compactors).items()}
    return {
        p: (n >= threshold) | (~(n >= threshold).any() & (np.arange(n.size) == n.argmax()))
        for p, n in norms.items()
    }


def shrink(
    model: nnx.Module, plan: PruningPlan, *, threshold: float = 1e-5, keep: Mapping[str, Any] | None = None
) -> nnx.Module:
    """Returns the smaller network of plain layers that a network with compactors has become.

    Each producer, its batch norm and its compactor become one layer, K' = K Q' and b' = b Q', with Q' the
    rows that stay. The layers that read them lose the inputs that are gone; if such an input is a constant
    other than zero (behind a depthwise layer it is act(beta - mu * gamma / sigma)), it moves into the bias.
    In evaluation mode the network computes what it did before, as far as the rows that go are zero. Batch
    norms elsewhere stay; `fuse` folds them.

    Args:
      model: the trained network that `to_resrep` made, in evaluation mode; it is not changed.
      plan: the plan.
      threshold: as in `kept_rows`.
      keep: in its place, which rows stay, {compactor: (channels,) bool}.

    Raises:
      ValueError: the model is in training mode or has other compactors; `keep` that does not fit, or keeps no
        channel of a compactor.
    """
    check_model(model)
    check_kind("plan", plan, PruningPlan, "a `PruningPlan`, such as `plan_pruning` returns")
    kept = plan.checked(kept_rows(model, plan, threshold) if keep is None else keep)
    if empty := [path for path, mask in kept.items() if not mask.any()]:
        raise ValueError(f"`keep` leaves no channel of {', '.join(empty)}: each needs one at least")
    modules = dict(named_modules(model))
    if missing := [p for p in plan.compactors if p.rpartition("/")[0] not in modules]:
        raise ValueError(f"`model` is not the one that was planned: it has no {', '.join(missing)}")
    norms = [p for p, m in modules.items() if isinstance(m, nnx.BatchNorm) and not m.use_running_average]
    if norms:
        raise ValueError(
            f"the model is in training mode (batch norms {paths.listed(norms)} use batch statistics): call "
            "`model.eval()` first"
        )
    graphdef, state = nnx.split(model)
    graphdefs = []

    def narrow(state: Any, constants: Any) -> Any:
        whole = nnx.merge(graphdef, state, copy=True)
        graph, slim = nnx.split(_narrowed(whole, plan, _Narrowing(plan, kept, constants)))
        graphdefs.append(graph)
        return slim

    # One program: operation by operation, each shape would be compiled by itself.
    args = (state, _constants(model, plan, kept))
    slim = compiled(narrow, *args)(*args)
    return nnx.merge(graphdefs[-1], slim)


def resized(model: nnx.Module, shapes: Mapping[str, Sequence[int]]) -> nnx.Module:
    """Returns an abstract copy of a network with parameters of other shapes, to load a smaller network into.

        params, _ = paths.named_leaves(nnx.state(slim, nnx.Param))
        shapes = {path: leaf.shape for path, leaf in params.items()}
        abstract = resized(nnx.eval_shape(make_model), shapes)

    Args:
      model: the network at its full widths, concrete or abstract, with the same layers.
      shapes: path -> shape, of all parameters of the smaller one; a layer may have gained a bias.

    Raises:
      ValueError: shapes of other parameters, or with another number of axes; all are listed.
    """
    check_model(model)
    check_kind("shapes", shapes, Mapping, "shapes by path")

    def rebuild(path: str, module: Any) -> nnx.Module | None:
        if isinstance(module, nnx.BatchNorm):
            size = shapes.get(join(path, "scale"), module.var.shape)
            for name in ("mean", "var", "scale", "bias"):
                if (variable := getattr(module, name)) is not None:
                    variable.set_value(jax.ShapeDtypeStruct(tuple(size), variable.dtype))
            module.num_features = size[-1]
        elif isinstance(module, (nnx.Conv, nnx.Linear)) and join(path, "kernel") in shapes:
            kernel = jax.ShapeDtypeStruct(tuple(shapes[join(path, "kernel")]), module.kernel.dtype)
            bias = shapes.get(join(path, "bias"))
            _set_arrays(module, kernel, bias and jax.ShapeDtypeStruct(tuple(bias), kernel.dtype))
        return None

    new = replace_modules(nnx.eval_shape(lambda: model), rebuild)
    found = {
        path: tuple(leaf.shape) for path, leaf in paths.named_leaves(nnx.state(new, nnx.Param))[0].items()
    }
    expected = {path: tuple(shape) for path, shape in shapes.items()}
    if wrong := paths.describe_difference(expected, found, noun="parameters"):
        raise ValueError(f"`shapes` are not those of a smaller `model`: {wrong}")
    return new


def _narrowed(model: nnx.Module, plan: PruningPlan, narrowing: "_Narrowing") -> nnx.Module:
    modules: dict[str, Any] = dict(named_modules(model))
    points = {n or layer: layer for group in plan.groups.values() for layer, n in group.producers.items()}

    def replace(path: str, module: Any) -> nnx.Module | None:
        if path in points:
            layer = points[path]
            if layer == path:
                return narrowing.producer(layer, module.layer, None, module.compactor)
            parent = modules.get(path.rpartition("/")[0])
            return Removed() if isinstance(parent, Block) and path.endswith("bn") else FoldedNorm()
        if path in narrowing.norms:
            return narrowing.norm(path, module)
        if path not in narrowing.layers:
            return None
        if (point := narrowing.layers[path]) is None:
            return narrowing.layer(path, module)
        compacted: Any = modules[point]
        return narrowing.producer(path, module, compacted.layer, compacted.compactor)

    return replace_modules(model, replace)


class _Narrowing:
    """How each module of a network is made narrower.

    Attributes:
      layers: path of a layer that changes -> path of its batch norm with the compactor, or None.
      norms: paths of batch norms that become narrower.
    """

    def __init__(self, plan: PruningPlan, kept: Mapping[str, np.ndarray], constants: Mapping[str, Any]):
        self._constants = constants
        self._inputs: dict[str, np.ndarray] = {}  # (in,) bool: the inputs that stay
        self._outputs: dict[str, np.ndarray] = {}  # (out,) bool, without those that a compactor removes
        self._rows: dict[str, np.ndarray] = {}
        self.layers: dict[str, str | None] = {}
        self.norms: set[str] = set()
        for path, group in plan.groups.items():
            mask = kept[path]
            for layer, channel in group.inputs.items():
                self._keep(self._inputs, layer, mask, channel)
            for layer, channel in group.channels.items():
                self._keep(self._outputs, layer, mask, channel)
                if layer not in plan.uses:
                    self.norms.add(layer)
            for layer, channel in group.outputs.items():
                self._keep(self._outputs, layer, mask, channel)
            for layer, norm in group.producers.items():
                self._rows[layer] = mask
                self.layers[layer] = norm
        for layer in (self._inputs.keys() | self._outputs.keys()) - self.norms:
            self.layers.setdefault(layer, None)

    @staticmethod
    def _keep(masks: dict[str, np.ndarray], layer: str, mask: np.ndarray, channel: np.ndarray) -> None:
        stays = (channel < 0) | mask[channel]
        masks[layer] = masks[layer] & stays if layer in masks else stays

    def layer(self, path: str, layer: Any) -> nnx.Module:
        """A layer that loses inputs, or features of its own."""
        kernel, bias = layer.kernel[...], None if layer.bias is None else layer.bias[...]
        if (keep := self._inputs.get(path)) is not None:
            if path in self._constants:
                gone = jnp.where(keep, 0, self._constants[path]).astype(kernel.dtype)
                shift = algebra.constant_response(kernel, gone)
                bias = shift if bias is None else bias + shift
            kernel = kernel[..., np.flatnonzero(keep), :]
        if (keep := self._outputs.get(path)) is not None:
            index = np.flatnonzero(keep)
            kernel, bias = kernel[..., index], None if bias is None else bias[index]
        return _set_arrays(plain_like(layer, kernel, bias), kernel, bias)

    def producer(self, path: str, layer: Any, bn: Any, compactor: Compactor) -> nnx.Module:
        """A layer with its batch norm, if there is one, and its compactor."""
        layer = self.layer(path, layer)
        folded: Any = layer if bn is None else fold_batch_norm(layer, bn)
        rows = compactor.kernel[...][:, np.flatnonzero(self._rows[path])]
        kernel = algebra.before_pointwise(folded.kernel[...], rows)
        bias = None if folded.bias is None else algebra.before_pointwise(folded.bias[...], rows)
        return _set_arrays(plain_like(folded, kernel, bias), kernel, bias)

    def norm(self, path: str, norm: nnx.BatchNorm) -> nnx.Module:
        """A batch norm between producer and readers."""
        index, new = np.flatnonzero(self._outputs[path]), nnx.clone(norm)
        for name in ("mean", "var", "scale", "bias"):
            if (variable := getattr(new, name)) is not None:
                variable.set_value(variable[...][index])
        new.num_features = index.size
        return new


def _set_arrays(layer: Any, kernel: Any, bias: Any) -> Any:
    """Gives a layer these arrays and the sizes that go with them. A depthwise layer stays one."""
    if isinstance(layer, nnx.Conv):
        if 1 < layer.feature_group_count == layer.in_features:
            layer.feature_group_count = kernel.shape[-1]
        layer.in_features = kernel.shape[-2] * layer.feature_group_count
        layer.kernel_shape = tuple(kernel.shape)
    else:
        layer.in_features = kernel.shape[-2]
    layer.out_features = kernel.shape[-1]
    layer.kernel.set_value(kernel)
    if layer.bias is None or bias is None:
        layer.bias = nnx.data(None if bias is None else nnx.Param(bias))
        layer.use_bias = bias is not None
    else:
        layer.bias.set_value(bias)
    return layer


def _constants(model: nnx.Module, plan: PruningPlan, kept: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """What the inputs are whose channels are gone, for layers to which that need not be zero."""
    shifted = set().union(*(group.shifted for group in plan.groups.values()))
    if not shifted:
        return {}

    def zero(path: str, q: Any) -> Any:
        return q * jnp.asarray(kept[path], q.dtype).reshape(1, -1) if path in kept else q

    zeroed = _with_compactors(model, zero)
    modules = dict(named_modules(zeroed))
    inside = {join(p, "layer") if isinstance(modules[p], Compacted) else p: p for p in shifted}
    found = constant_inputs(zeroed, list(inside), plan.inputs)
    return {inside[path]: values for path, values in found.items()}


def _with_compactors(model: nnx.Module, change: Callable[[str, Any], Any]) -> nnx.Module:
    """Returns a copy whose compactors' kernels are changed, by their paths."""
    graphdef, params, rest = nnx.split(nnx.clone(model), nnx.Param, ...)
    return nnx.merge(graphdef, paths.map_named(change, params), rest)


def _compactor_paths(model: nnx.Module, groups: Sequence[ChannelGroup]) -> list[str]:
    """Paths of the groups' compactors' kernels in the network with compactors."""
    modules: dict[str, Any] = dict(named_modules(model))
    place = {id(module): join(path, "kernel") for path, module in modules.items()}
    first = [next(iter(group.producers.items())) for group in groups]
    return [place[id(modules[norm or layer].compactor)] for layer, norm in first]


def _try(model: nnx.Module, plan: PruningPlan) -> None:
    """Removes half of the channels of a network with random numbers and compares the outputs.

    Raises:
      ValueError: they differ, or the smaller network cannot be run.
    """
    rng = np.random.default_rng(0)
    masks = {path: np.arange(group.size) % 2 == 0 for path, group in plan.groups.items()}

    def fill(path: str, q: Any) -> Any:
        if path not in masks:
            return q
        return jnp.asarray(rng.normal(size=q.shape) / np.sqrt(q.shape[0]) * masks[path], q.dtype)

    before = _with_compactors(to_resrep(drawn(model), plan), fill)
    producers = paths.listed([path for group in plan.groups.values() for path in group.producers], 8)
    try:
        full, slim = (
            _outputs(network, plan.inputs) for network in (before, shrink(before, plan, keep=masks))
        )
    except (TypeError, ValueError) as error:
        reason = str(error).partition("\n")[0]
        problem = f"the network does not run with fewer of them ({reason})"
        raise ValueError(refusal({producers: problem})) from error
    modules: dict[str, Any] = dict(named_modules(model))
    widths = [jnp.dtype(modules[p].dtype or modules[p].kernel.dtype).itemsize for p in plan.uses]
    tolerance = SAME_OUTPUTS if min(widths) >= 4 else SAME_OUTPUTS_HALF
    for a, b in zip(full, slim):
        size = np.abs(a[np.isfinite(a)]).max(initial=0)
        if a.shape != b.shape or not np.allclose(a, b, rtol=0, atol=tolerance * size, equal_nan=True):
            raise ValueError(refusal({producers: "removing channels that are zero changes the outputs"}))


def _outputs(model: nnx.Module, inputs: Sequence[Any]) -> list[np.ndarray]:
    """What a model gives for random inputs."""
    graphdef, state = nnx.split(model)

    def call(state: Any, inputs: Any) -> list[jax.Array]:
        return jax.tree.leaves(nnx.merge(graphdef, state, copy=True)(*inputs))

    arrays = random_inputs(inputs, 3)
    return [np.asarray(out, np.float64) for out in compiled(call, state, arrays)(state, arrays)]
