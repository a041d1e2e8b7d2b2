"""The known schemes: recognising that of a state dict, finding that of a network, and naming arrays."""

import collections
import re
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from flax import nnx

from repopt_jax.core import paths
from repopt_jax.core.branches import Kernel
from repopt_jax.interop.names import mobileone, repghost, repmlp, repopt, repvgg, timm
from repopt_jax.interop.names.scheme import NETWORKS, Layout, Scheme, TorchName
from repopt_jax.models import Network
from repopt_jax.nn.block import Block
from repopt_jax.nn.branched import StructuredLayer
from repopt_jax.surgery.modules import join, named_modules
from repopt_jax.surgery.prepare import Mode

SCHEMES: dict[str, Scheme] = {
    module.SCHEME.name: module.SCHEME for module in (repvgg, repopt, mobileone, repghost, repmlp, timm)
}
COUNTER = "num_batches_tracked"


class Recognised(NamedTuple):
    """The scheme and the form of a network that a state dict's keys show."""

    scheme: Scheme
    layout: Layout

    def __str__(self) -> str:
        form = "" if self.layout.form == "training" else f", {self.layout.form}"
        return f"{self.scheme.name} ({self.layout.network}, mode {self.layout.mode}{form})"


def torch_names(model: nnx.Module, scheme: str | Scheme) -> dict[str, TorchName]:
    """Returns the names of every array of `model` in `scheme`: our path -> `TorchName`.

    The state of random number generators has no counterpart and is left out.

    Args:
      model: an NNX model, also an abstract one from `nnx.eval_shape`.
      scheme: a key of `SCHEMES`, or a scheme of your own.

    Raises:
      ValueError: an unknown scheme; layers that the code base has no name for, that lack branches of those
        there, or whose squeeze-and-excitation is at another place there, all of them listed; or a scheme that
        gives several arrays one name.
    """
    _, names = _fit(model, find_scheme(scheme))
    return names


def counters(names: Mapping[str, TorchName]) -> list[str]:
    """Returns the keys of the batch counters (`num_batches_tracked`) that PyTorch adds to `names`."""
    found = (name.key.rpartition(".") for name in names.values())
    return [f"{layer}.{COUNTER}" for layer, _, array in found if array == "running_mean"]


def find_scheme(scheme: str | Scheme) -> Scheme:
    """Returns the scheme of that name; raises ValueError for an unknown one."""
    if isinstance(scheme, Scheme):
        return scheme
    if scheme not in SCHEMES:
        known = ", ".join(f"{s.name} ({s.about})" for s in SCHEMES.values())
        raise ValueError(f"`names` is {scheme!r}: it must be 'auto' or one of {known}")
    return SCHEMES[scheme]


def authors_scheme(model: nnx.Module, mode: str = "") -> str:
    """Returns the scheme of the network's authors, among those that have a name for every array.

    Args:
      model: the network.
      mode: the `surgery.Mode` in which it was trained. A deployed network does not show it; without it, a VGG
        gets RepVGG's names.

    Raises:
      ValueError: there is none, with what each scheme lacks.
    """
    fitting, complaints = [], []
    mode = Mode.PLAIN if mode == Mode.REPOPT else mode
    for scheme in SCHEMES.values():
        if not _layouts(model, scheme):
            continue
        try:
            layout, _ = _fit(model, scheme)
        except ValueError as error:
            complaints.append(str(error).partition(". Others:")[0])
        else:
            # Code bases also name other authors' networks, as baselines.
            fitting.append((layout.mode != mode, layout.mode != scheme.name, len(fitting), scheme.name))
    if fitting:
        return min(fitting)[-1]
    raise ValueError(
        "; ".join(complaints)
        or f"no scheme names a {type(model).__name__}: give `names` a `Scheme` with tables of your own"
    )


def recognise(tensors: Mapping[str, Any]) -> Recognised:
    """Recognises the scheme, network and form of a state dict by keys that only they have.

    Args:
      tensors: key -> anything with a `shape`.

    Raises:
      ValueError: the keys are of no known scheme; the known ones are listed.
    """
    lines = [f"{key} {','.join(map(str, tensor.shape))}" for key, tensor in tensors.items()]
    for scheme in SCHEMES.values():
        for layout in scheme.layouts:
            if any(re.match(layout.signature, line) for line in lines):
                return Recognised(scheme, layout)
    some = ", ".join(list(tensors)[:5]) or "no tensors"
    known = "; ".join(f"{s.name}, {s.about}" for s in SCHEMES.values())
    raise ValueError(f"these names are of no known scheme: {some} ... Known are: {known}")


def arrays_of(model: nnx.Module) -> Any:
    """Returns the model's state without its random number generators."""
    return nnx.state(model, nnx.Not(nnx.RngState))


def _layouts(model: nnx.Module, scheme: Scheme) -> list[Layout]:
    """Returns the scheme's layouts for this network."""
    variant = getattr(model, "variant", None)
    return [
        layout
        for layout in scheme.layouts
        if not layout.network or isinstance(variant, NETWORKS[layout.network])
    ]


def _fit(model: nnx.Module, scheme: Scheme) -> tuple[Layout, dict[str, TorchName]]:
    """Returns the layout that names every array of `model`, and the names; raises as `torch_names`."""
    arrays, _ = paths.named_leaves(arrays_of(model))
    roles = _roles(model)
    tables = [
        (layout, {path: layout.key(roles.get(path, path)) or layout.key(path) for path in arrays})
        for layout in _layouts(model, scheme)
    ]
    # If no table fits, the error is about the one that lacks the fewest names.
    layout, keys = min(
        tables or [(Layout(), dict.fromkeys(arrays))], key=lambda table: list(table[1].values()).count(None)
    )
    problems = []
    if nameless := dict.fromkeys(_layer(path) for path, key in keys.items() if key is None):
        problems.append(f"the layers {', '.join(nameless)}")
    else:
        problems += _other_branches(model, layout)
    for path, block in named_modules(model):
        if not isinstance(block, Block) or block.se is None or scheme.se_first in (None, block.se_first):
            continue
        ours, theirs = ("before", "after") if block.se_first else ("after", "before")
        problems.append(f"{path}: its squeeze-and-excitation comes {ours} the ReLU, there it comes {theirs}")
    if problems:
        others = ", ".join(name for name in SCHEMES if name != scheme.name)
        raise ValueError(
            f"names {scheme.name!r} ({scheme.about}) have no place for {'; '.join(problems)}. "
            f"Others: {others}"
        )
    uses = collections.Counter(keys.values())
    if twice := sorted(str(key) for key, count in uses.items() if count > 1):
        raise ValueError(f"names {scheme.name!r} call several arrays {', '.join(twice)}: correct its tables")

    def name(path: str, key: str) -> TorchName:
        shape = tuple(arrays[path].shape)
        flattened = layout.flattened and re.fullmatch(layout.flattened, key)
        window = shape[:-2] if flattened and len(shape) > 2 else ()
        return TorchName(key, "kernel" if len(shape) > 1 else "vector", window)

    return layout, {path: name(path, str(key)) for path, key in keys.items()}


def _other_branches(model: nnx.Module, layout: Layout) -> Iterator[str]:
    """Yields layers whose branches all have names but are not all the branches of the code base."""
    layers = {p: m for p, m in named_modules(model) if isinstance(m, StructuredLayer)}
    declared = model.descriptions(layout.mode) if layers and isinstance(model, Network) else {}
    described = {path.removesuffix("/kernel"): description for path, description in declared.items()}
    for pattern, description in layout.described:
        described |= dict.fromkeys((path for path in layers if re.fullmatch(pattern, path)), description)
    for path, layer in layers.items():
        if path not in described:
            continue
        structures = layer.structure, described[path](layer.structure.layer)
        ours, theirs = (", ".join(sorted(part.key for part in s.parts)) for s in structures)
        if ours != theirs:
            yield f"{path}: it is made of {ours}, there of {theirs}"


def _roles(model: nnx.Module) -> dict[str, str]:
    """Returns the paths of the arrays in layers of branches -> those in the tables of `blocks`."""
    found = {}
    for path, layer in named_modules(model):
        if isinstance(layer, StructuredLayer):
            own = Kernel(layer.structure.layer.window).name
            for part in layer.structure.parts:
                role = "_".join("own" if word == own else word for word in part.key.split("_"))
                kind = "deltas" if part.stage.residual else "weights"
                found[join(path, f"weights/{part.key}")] = join(path, f"{kind}/{role}")
                for array in ("scale", "bias", "mean", "var"):
                    found[join(path, f"norms/{part.key}/{array}")] = join(path, f"norms/{role}/{array}")
    return found


def _layer(path: str) -> str:
    """Returns the path of the layer that an array belongs to."""
    return re.sub(r"/(kernel|bias|scale|mean|var|(weights|scales|norms)/.*)$", "", path)
