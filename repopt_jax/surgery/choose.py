"""Which layers of a model become which structure, and why the others stay as they are.

`find_structures` is the plan that `to_structure` carries out:

    print(find_structures(model, "dbb"))

prints a line for each layer, `conv1/kernel: 3x3 + 1x1 + average + 1x1_3x3`, then those that stay as they are,
`fc/kernel: it is the dense layer ...`.
"""

import functools
import inspect
import math
import typing
from collections.abc import Callable, Mapping, Sequence
from fractions import Fraction
from typing import Any, NamedTuple, TypeAlias, overload

from flax import nnx

from repopt_jax.core import paths, tracing
from repopt_jax.core.branches import Kernel
from repopt_jax.core.layer import Layer
from repopt_jax.core.published import PUBLISHED_FOR, STRUCTURES, repopt
from repopt_jax.core.scales import DeclaresBranches
from repopt_jax.core.structure import Description, Structure
from repopt_jax.hints import did_you_mean
from repopt_jax.models.network import Network
from repopt_jax.nn.branched import StructuredLayer
from repopt_jax.surgery.layers import LAYERS, Select, survey_layers
from repopt_jax.surgery.modules import join, named_modules

Described: TypeAlias = str | Description | Mapping[str, str | Description]
Options: TypeAlias = Mapping[str, Any] | None


class Choice(NamedTuple):
    """What becomes of a layer.

    Attributes:
      structure: the structure, or None if the layer stays as it is.
      reason: why it stays; "" if it does not.
      undefined: whether it stays because it cannot be this structure.
      layer: the layer; None if it cannot be made of any branches.
    """

    structure: Structure | None
    reason: str = ""
    undefined: bool = False
    layer: Layer | None = None

    def __str__(self) -> str:
        if self.structure is None:
            return f"left as it is: {self.reason}"
        return " + ".join(name for name, _ in self.structure.chains)


class Choices(dict[str, Choice]):
    """What becomes of each layer, by the path of its kernel. As text it is a table, a line for each layer.

    Attributes:
      selected: whether `select` chose the layers.
    """

    def __init__(self, choices: Mapping[str, Choice], *, selected: bool = False):
        super().__init__(sorted(choices.items(), key=lambda item: paths.natural_order(item[0])))
        self.selected = selected

    def __str__(self) -> str:
        taken = [f"  {path}: {choice}" for path, choice in self.items() if choice.structure is not None]
        left = [f"  {path}: {choice.reason}" for path, choice in self.items() if choice.structure is None]
        parts = ((f"{len(taken)} layers taken", taken), (f"{len(left)} left as they are", left))
        return "\n".join(line for title, lines in parts if lines for line in (f"{title}:", *lines))


@overload
def find_structures(
    model: nnx.Module, structure: Described = repopt, select: Select = None, *, options: Options = None
) -> Choices: ...


@overload
def find_structures(
    model: Callable[..., Any],
    params: Any,
    /,
    *example: Any,
    structure: Described = repopt,
    select: tracing.Select = None,
    options: Options = None,
) -> Choices: ...


def find_structures(model: Any, *args: Any, **given: Any) -> Choices:
    """Returns what `to_structure` with these arguments makes of each layer, by the path of its kernel.

    Without `select` some layers are left as they are: those for which the structure is not defined; the dense
    layer that makes the logits (`find_classifier`); and those where it has nothing to add, because its only
    chain would be the layer's own kernel, as a 1x1 layer's in ACNet, or because the authors of the structure
    keep such layers plain (`core.published.PUBLISHED_FOR`). A model that declares its `branch_sets()` decides
    by itself: the layers that it declares become the structure if it is defined for them, no others.

    With `select` every layer that it chooses becomes the structure.

    Parameters of several axes in modules of other kinds (embeddings, classes of your own) are listed as well,
    so that nothing is passed over without a word.

    Of a function of any framework it is what `find_parametrizations` makes of each layer, which is found by
    tracing, as in `find_branches`: `find_structures(apply, params, *example, structure="orepa")`. The dense
    layers of the logits are there those whose output is one of the function.

    Args:
      model: any NNX model; or a function.
      params, example: of a function, its parameters and other arguments, arrays or `jax.ShapeDtypeStruct`s.
      structure: by default the branches of RepOptimizer, which a search and its scales are for; a name in
        `STRUCTURES`; a description; or a mapping of regular expressions for a layer's whole path to names or
        descriptions, of which the first that matches counts. A network may have particular descriptions for
        a name (`models.Network.descriptions`).
      select: which layers, as in `find_layers`; of a function, as in `core.tracing.find_branches`.
      options: arguments of the descriptions, such as {"gamma": 1 / 3} for "acnet"; for `structure` a mapping,
        of all of them.

    Raises:
      ValueError: an unknown name or option; a rule that matches no layer; or as `find_layers` for a `select`
        that chooses nothing, and of a function as `find_branches` for one that chooses what is no layer.
      TypeError: `select` or `structure` is none of the above; or `model` is neither a model nor a function.
    """
    if isinstance(model, nnx.Module):
        return _of_model(model, *args, **given)
    if not callable(model):
        raise TypeError(
            f"`model` is a {type(model).__name__}: it must be an NNX model, or a function of parameters"
        )
    return _of_function(model, *args, **given)


def _of_function(
    apply: Callable[..., Any],
    params: Any,
    *example: Any,
    structure: Described = repopt,
    select: tracing.Select = None,
    options: Options = None,
) -> Choices:
    traced = tracing.trace_layers(apply, params, *example)
    layers = tracing.selected(traced, select)
    describe = _describer(apply, structure, [layer.name for layer in layers.values()], options)

    def stays(layer: Layer, made: Structure, description: Description) -> str:
        makes_output = not layer.geometry.axes and "output" in layer.readers
        return _reason_to_stay(layer, made, description, makes_output) if select is None else ""

    # The structure is kept in the optimizer, which has no place for batch norms.
    found = _choices(layers, describe, Layer.parametrization, stays)
    if select is None:
        found |= {
            path: Choice(None, why, undefined=path in traced.refused, layer=traced.adapted.get(path))
            for path, why in traced.others.items()
        }
    return Choices(found, selected=select is not None)


def _of_model(
    model: nnx.Module, structure: Described = repopt, select: Select = None, *, options: Options = None
) -> Choices:
    layers, unreadable = survey_layers(model, select)
    describe = _describer(model, structure, [layer.name for layer in layers.values()], options)
    declares = isinstance(model, DeclaresBranches)
    classifier = None if declares or select is not None else find_classifier(model)
    found = {
        join(path, "kernel"): Choice(None, why.partition(": ")[2], undefined=True)
        for path, why in unreadable.items()
    }

    def stays(layer: Layer, made: Structure, description: Description) -> str:
        if select is not None or declares:
            return ""
        return _reason_to_stay(layer, made, description, layer.name == classifier)

    found |= _choices(layers, describe, _check_norms, stays)
    if declares and select is None:
        others = (join(p, "kernel") for p, m in named_modules(model) if isinstance(m, LAYERS))
        undeclared = Choice(None, "the model does not declare it: choose it with `select`")
        found |= {path: undeclared for path in others if path not in found}
    if select is None:
        found |= {path: choice for path, choice in _of_other_kinds(model).items() if path not in found}
    return Choices(found, selected=select is not None)


def _choices(
    layers: Mapping[str, Layer],
    describe: Callable[[Layer], Description],
    check: Callable[[Layer, Structure], Any],
    stays: Callable[[Layer, Structure, Description], str],
) -> dict[str, Choice]:
    """Returns what becomes of each layer.

    `check` raises ValueError where a layer cannot be its structure; `stays` gives the reason why one that can
    is left as it is, or "".
    """
    found = {}
    for path, layer in layers.items():
        try:
            description = describe(layer)
            made = description(layer.geometry)
            check(layer, made)
        except ValueError as error:
            found[path] = Choice(None, str(error), undefined=True, layer=layer)
            continue
        reason = stays(layer, made, description)
        found[path] = Choice(None if reason else made, reason, layer=layer)
    return found


def _check_norms(layer: Layer, made: Structure) -> None:
    """Raises ValueError if this layer of a model cannot have the structure's batch norms."""
    if layer.layout != "...io" and made.followers("norm"):
        raise ValueError(
            "its inputs or outputs have several axes: there are no branches with batch norms for it"
        )
    if layer.stack and made.followers("norm"):
        raise ValueError(
            "it is a stacked layer, whose branches would need batch norms made by the same nnx.vmap: "
            "leave it out with `select`, or build the network of `nn.Branched`"
        )


def _of_other_kinds(model: nnx.Module) -> dict[str, Choice]:
    """Returns a choice for each parameter of several axes in a module that is no layer of a known kind."""
    return {
        join(path, name): Choice(
            None, f"it belongs to {type(module).__name__}, which is no convolution or dense layer of Flax"
        )
        for path, module in named_modules(model)
        if not isinstance(module, (StructuredLayer, *LAYERS))
        for name, value in vars(module).items()
        if isinstance(value, nnx.Param) and len(value.shape) > 1
    }


def _reason_to_stay(layer: Layer, structure: Structure, description: Description, makes_logits: bool) -> str:
    """Returns why a layer is not taken unless `select` chooses it, or ""."""
    if makes_logits and description is not repopt:
        return "it is the dense layer that makes the logits: choose it with `select` if it is not"
    own = Kernel(layer.geometry.window)
    if [[stage.map for stage in chain] for _, chain in structure.chains] == [[own]]:
        return "the structure would have its own kernel only"
    usual = PUBLISHED_FOR.get(_unwrapped(description))
    if usual and not usual(layer.geometry):
        window = "x".join(map(str, layer.geometry.window)) or "dense"
        return f"the published networks keep {window} layers plain: choose it with `select` for the structure"
    return ""


def find_classifier(model: nnx.Module) -> str | None:
    """Returns the path of the dense layer that makes the logits, or None without an `nnx.Linear`.

    A model does not say in which order it uses its layers, so this goes by where networks have their
    classifiers: of the dense layers nearest to the model itself, the one whose outputs no other layer takes,
    by its width, and of several the last in the order of paths (`fc2` after `fc1`, `layers/10` after
    `layers/9`).
    """
    modules = dict(named_modules(model))
    dense = [(path, module) for path, module in modules.items() if isinstance(module, nnx.Linear)]

    def rank(indexed: tuple[int, tuple[str, nnx.Linear]]) -> tuple[int, bool, int]:
        index, (path, module) = indexed
        widths = {
            getattr(other, name, None)
            for other in modules.values()
            for name in ("in_features", "num_features")
            if other is not module
        }
        return path.count("/"), module.out_features in widths, -index

    return min(enumerate(dense), key=rank)[1][0] if dense else None


# --- Descriptions by name, with options


def find_structure(name: str, options: Options = None) -> Description:
    """Returns the description of this name in `STRUCTURES`, with these arguments.

    Raises:
      ValueError: an unknown name, with the nearest one, or an unknown option.
    """
    if name not in STRUCTURES:
        hint = did_you_mean(name, STRUCTURES)
        raise ValueError(f"there is no structure {name!r}{hint}: it must be one of {', '.join(STRUCTURES)}")
    return with_options(STRUCTURES[name], options, name)


def with_options(description: Description, options: Options, name: str = "") -> Description:
    """Returns a description with these arguments.

    Raises:
      ValueError: arguments that it does not have, or whose values are not of its types.
    """
    if not options:
        return description
    what = name or getattr(description, "__name__", "the description")
    known = [p.name for p in inspect.signature(description).parameters.values() if p.kind is p.KEYWORD_ONLY]
    if wrong := [option for option in options if option not in known]:
        hint = did_you_mean(wrong[0], known)
        takes = f"it takes {', '.join(known)}" if known else "it takes none"
        raise ValueError(f"{what} has no option {', '.join(map(repr, wrong))}{hint}: {takes}")
    types = typing.get_type_hints(_unwrapped(description))
    for option, value in options.items():
        expected = types.get(option, object)
        number = (int, float) if expected is float else expected
        if not isinstance(value, number) or (isinstance(value, bool) and expected not in (bool, object)):
            kind = getattr(expected, "__name__", expected)
            raise ValueError(f"option `{option}` of {what} is {value!r}: it must be of type {kind}")
    return functools.partial(description, **options)


def _unwrapped(description: Description) -> Description:
    """Returns the function of a description with arguments."""
    while isinstance(description, functools.partial):
        description = description.func
    return description


def parse_options(text: str) -> dict[str, Any]:
    """Returns the options that a text gives: "gamma=1/3, single_init=false" -> {"gamma": 1 / 3, ...}.

    A value is a whole number, a fraction, a decimal number, true, false or none.

    Raises:
      ValueError: anything else, or an option that is given twice.
    """
    options: dict[str, Any] = {}
    for item in filter(None, (item.strip() for item in text.split(","))):
        name, equals, value = (part.strip() for part in item.partition("="))
        if not equals or not name.isidentifier() or name in options:
            raise ValueError(f"{item!r} of {text!r} is not `name=value`, each name once")
        options[name] = _value(value, item)
    return options


def _value(text: str, item: str) -> Any:
    constants = {"true": True, "false": False, "none": None}
    if text.lower() in constants:
        return constants[text.lower()]
    try:
        return int(text)
    except ValueError:
        pass
    try:
        number = float(Fraction(text)) if "/" in text else float(text)
    except (ValueError, ZeroDivisionError):
        number = math.nan
    if not math.isfinite(number):
        raise ValueError(f"{item!r}: its value must be a finite number, a fraction, true, false or none")
    return number


def _describer(
    model: Any, structure: Described, names: Sequence[str], options: Options
) -> Callable[[Layer], Description]:
    """Returns a function from a layer, whose name is one of `names`, to its description.

    Raises:
      TypeError: it is none of `Described`, or rules of a mapping give something else (all listed).
      ValueError: an unknown name or option, or a rule that matches no layer.
    """
    parts = structure.items() if isinstance(structure, Mapping) else [("", structure)]
    if wrong := [
        f"`structure`{f' of the rule {pattern!r}' if pattern else ''} is of type {type(one).__name__}"
        for pattern, one in parts
        if not isinstance(one, (str, Mapping, Callable))
    ]:
        raise TypeError(
            f"{'; '.join(wrong)}: it must be a name in `STRUCTURES`, or a description, which is a function "
            "from a layer's `Geometry` to its `Structure`"
        )
    if isinstance(structure, str):
        general = find_structure(structure, options)
        particular = model.descriptions(structure) if isinstance(model, Network) else {}
        return lambda layer: (
            with_options(particular[layer.path], options, structure) if layer.path in particular else general
        )
    if isinstance(structure, Mapping):
        rules = [
            (paths.compiled(pattern, "structure"), _describer(model, one, names, options))
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
    described = with_options(structure, options)
    return lambda layer: described
