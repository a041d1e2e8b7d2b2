"""Replaces layers by structures in a copy of any NNX model."""

import functools
import re
import zlib
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
from flax import nnx

from repopt_jax.core import paths
from repopt_jax.core.structure import STRUCTURES, Description, Structure, of_branches
from repopt_jax.models.network import Network
from repopt_jax.nn.block import Block
from repopt_jax.nn.branched import Branched, StructuredLayer
from repopt_jax.nn.merged import Merged
from repopt_jax.nn.rngs import counted_in_python
from repopt_jax.surgery.layers import Branches, Layer, Select, find_branches, find_layers
from repopt_jax.surgery.modules import Removed, aliases, join, named_modules, replace_modules

Described: TypeAlias = str | Description | Mapping[str, str | Description]


def to_structure(
    model: nnx.Module, structure: Described, select: Select = None, *, rngs: nnx.Rngs
) -> nnx.Module:
    """Returns a copy of any NNX model with this structure in each selected layer; `fuse` merges them again.

        to_structure(model, "acnet", r"stages/.*", rngs=nnx.Rngs(0))

    A structure with batch norms inside becomes an `nn.Branched`, any other an `nn.Merged`. If the layer is
    the convolution of an `nn.Block`, the block's batch norm is removed, unless the structure has one after
    its sum: then it is kept as that one. In other networks the batch norm after the layer is kept. Weights
    are newly drawn, with a key for each path; biases and everything else are copied.

    Args:
      model: the network, which is not changed.
      structure: a name in `STRUCTURES`; a description; or a mapping of regular expressions for a layer's
        whole path to names or descriptions, of which the first that matches counts. A network may have
        particular descriptions for a name (`models.Network.descriptions`).
      select: which layers, as in `find_layers`.
      rngs: `nnx.Rngs` with the stream `params`.

    Raises:
      ValueError: as `find_layers`; an unknown name; a rule that matches no selected layer; layers that no
        rule matches, or for which the structure is not defined, all with the reasons; or batch norms for
        stacked layers, because `nnx.scan` and `nnx.vmap` would not carry the batch statistics of new modules.
    """
    layers = find_layers(model, select)
    describe = _describer(model, structure, [layer.name for layer in layers.values()])
    made, problems = {}, []
    for path, layer in layers.items():
        try:
            made[path] = describe(layer)(layer.geometry)
            if layer.stack and made[path].followers("norm"):
                raise ValueError(
                    "it is a stacked layer, whose branches would need batch norms made by the same nnx.vmap: "
                    "leave it out with `select`, or build the network of `nn.Branched`"
                )
        except ValueError as error:
            problems.append(f"{layer.name}: {error}")
    if problems:
        raise ValueError(f"`structure` is not defined for all selected layers: {'; '.join(problems)}")
    key = rngs.params()

    def make(layer: Layer, **options: Any) -> StructuredLayer:
        kind = Branched if made[layer.path].followers("norm") else Merged
        with counted_in_python(nnx.Rngs(params=key_of(layer.path, key))) as own:
            return kind(made[layer.path], rngs=own, **options)

    without_norm = {path for path, s in made.items() if not s.norm}
    return replace_layers(model, layers, make, without_norm=without_norm)


def to_repvgg(
    model: nnx.Module, select: Select = None, branches: Branches = None, *, rngs: nnx.Rngs
) -> nnx.Module:
    """`to_structure(model, "repvgg", ...)`, or with `branches` (as in `find_branches`) these, a norm each."""
    if branches is None:
        return to_structure(model, "repvgg", select, rngs=rngs)
    described: dict[str, str | Description] = {
        re.escape(path.rpartition("/")[0]): functools.partial(of_branches, branch_set, then="norm")
        for path, branch_set in find_branches(model, select, branches).items()
    }
    return to_structure(model, described, select, rngs=rngs)


def replace_layers(
    model: nnx.Module,
    layers: Mapping[str, Layer],
    make: Callable[..., StructuredLayer],
    *,
    without_norm: set[str] = frozenset(),  # pyright: ignore[reportArgumentType]
) -> nnx.Module:
    """Returns a copy of `model` with `make(layer, **options)` in place of each of `layers`.

    The options are the bias and the dtypes of the replaced layer. `without_norm` are the paths of layers with
    which the batch norm of their `nn.Block` is removed, unless the layer is also used without this block.
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
        layer = layers.get(join(path, "kernel"))
        if layer is None or not isinstance(module, (nnx.Conv, nnx.Linear)):
            return None
        return make(
            layer,
            bias=None if module.bias is None else module.bias[...],
            dtype=module.dtype,
            precision=module.precision,
            param_dtype=module.kernel.dtype,
        )

    return replace_modules(model, replace)


def merged_layer(
    structure: Structure, weights: Mapping[str, jax.Array], vectors: Mapping[str, jax.Array], **options: Any
) -> Merged:
    """Makes an `nn.Merged` with these tensors and scales, without drawing initial ones."""
    new = nnx.eval_shape(lambda: Merged(structure, rngs=nnx.Rngs(0), **options))
    for variables, values in ((new.weights, weights), (new.scales, vectors)):
        for name, variable in variables.items():
            variable.set_value(jnp.asarray(values[name], variable.dtype))
    if new.bias is not None:
        new.bias.set_value(options["bias"])
    return new


def key_of(path: str, key: jax.Array) -> jax.Array:
    """Returns the key of the layer at `path`, which does not depend on the other layers."""
    return jax.random.fold_in(key, zlib.crc32(path.encode()))


def find_structure(name: str) -> Description:
    """Returns the description of this name in `STRUCTURES`; raises ValueError for an unknown one."""
    if name not in STRUCTURES:
        raise ValueError(f"there is no structure {name!r}: it must be one of {', '.join(STRUCTURES)}")
    return STRUCTURES[name]


def _describer(
    model: nnx.Module, structure: Described, names: Sequence[str]
) -> Callable[[Layer], Description]:
    """Returns a function from a layer, whose name is one of `names`, to its description."""
    if isinstance(structure, str):
        general = find_structure(structure)
        particular = model.descriptions(structure) if isinstance(model, Network) else {}
        return lambda layer: particular.get(layer.path, general)
    if isinstance(structure, Mapping):
        rules = [
            (paths.compiled(pattern, "structure"), _describer(model, one, names))
            for pattern, one in structure.items()
        ]
        idle = [p.pattern for p, _ in rules if not any(p.fullmatch(name) for name in names)]
        if idle:
            raise ValueError(
                f"the rules {', '.join(map(repr, idle))} of `structure` match none of the layers "
                f"{paths.listed(names, 8)}"
            )

        def by_rule(layer: Layer) -> Description:
            for pattern, describe in rules:
                if pattern.fullmatch(layer.name):
                    return describe(layer)
            raise ValueError(f"no rule of `structure` matches it, of {list(structure)}")

        return by_rule
    return lambda layer: structure
