"""The known schemes: recognising that of a state dict, finding that of a network, and naming arrays."""

import collections
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np
from flax import nnx

from repopt_jax.arguments import check_kind
from repopt_jax.core import paths
from repopt_jax.core.branches import Kernel
from repopt_jax.core.structure import Structure
from repopt_jax.interop.names import mobileone, repghost, repmlp, repopt, repvgg, timm
from repopt_jax.interop.names.scheme import NETWORKS, Kind, Layout, Scheme, Stored, TorchName
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
    return torch_tensors(model, scheme).arrays


class TorchTensors(NamedTuple):
    """What a code base stores of a model.

    Attributes:
      arrays: the names of its arrays, by our path.
      constants: key -> value of the tensors that are computed here from a structure and are no arrays, in
        PyTorch's order of axes and the dtype of the structure's arrays.
    """

    arrays: dict[str, TorchName]
    constants: dict[str, np.ndarray]


def torch_tensors(model: nnx.Module, scheme: str | Scheme) -> TorchTensors:
    """Returns the names of `torch_names`, with the constants that the code base stores beside them."""
    return _fit(model, find_scheme(scheme))[1]


def counters(names: Mapping[str, TorchName]) -> list[str]:
    """Returns the keys of the batch counters (`num_batches_tracked`) that PyTorch adds to `names`."""
    found = (name.key.rpartition(".") for name in names.values())
    return [f"{layer}.{COUNTER}" for layer, _, array in found if array == "running_mean"]


def find_scheme(scheme: str | Scheme, argument: str = "names") -> Scheme:
    """Returns the scheme of that name; raises ValueError, which names the `argument`, for an unknown one."""
    if isinstance(scheme, Scheme):
        return scheme
    if scheme not in SCHEMES:
        known = ", ".join(f"{s.name} ({s.about})" for s in SCHEMES.values())
        auto = "'auto' or " if argument == "names" else ""
        raise ValueError(f"`{argument}` is {scheme!r}: it must be {auto}one of {known}")
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
    check_kind(
        "tensors", tensors, Mapping, "a mapping of names to arrays", remedy="`read_tensors` reads a file"
    )
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


def _fit(model: nnx.Module, scheme: Scheme) -> tuple[Layout, TorchTensors]:
    """Returns the layout that names every array of `model`, and the names; raises as `torch_names`."""
    arrays, _ = paths.named_leaves(arrays_of(model))
    modules = dict(named_modules(model))
    layers = {p: m.structure for p, m in modules.items() if isinstance(m, StructuredLayer)}
    roles, owners = _roles(layers), _owners(layers)
    tables = [
        (layout, {path: layout.find(roles.get(path, path)) or layout.find(path) for path in arrays})
        for layout in _layouts(model, scheme)
    ]
    # If no table fits, the error is about the one that lacks the fewest names.
    layout, found = min(
        tables or [(Layout(), dict.fromkeys(arrays))], key=lambda table: list(table[1].values()).count(None)
    )
    stored = {path: one for path, one in found.items() if one is not None}
    problems = []
    if nameless := dict.fromkeys(_layer(path) for path in found if path not in stored):
        problems.append(f"the layers {', '.join(nameless)}")
    else:
        problems += [*_other_branches(model, layers, layout), *_missing_rows(stored.values())]
    for path, block in modules.items():
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
    uses = collections.Counter((one.name, one.row) for one in stored.values())
    if foreign := [f"{p} ({type(modules[_above(p)]).__name__})" for p in stored if _is_foreign(p, modules)]:
        raise ValueError(
            f"names {scheme.name!r} are of arrays whose axes PyTorch has in no order that is known here: "
            f"{', '.join(foreign)}. Leave them out of the tables, or use nnx.Linear in their place"
        )
    if twice := sorted(f"{key}" for (key, _), count in uses.items() if count > 1):
        raise ValueError(f"names {scheme.name!r} call several arrays {', '.join(twice)}: correct its tables")

    def name(path: str, one: Stored) -> TorchName:
        shape, owner = tuple(arrays[path].shape), owners.get(path)
        flattened = layout.flattened and re.fullmatch(layout.flattened, one.name)
        window = shape[:-2] if flattened and len(shape) > 2 else ()
        spare = one.spare(owner) if one.spare and owner else 0
        groups = owner.layer.groups if one.groups_last and owner else 1
        kind = _kind(path, modules, rank=len(shape))
        return TorchName(one.name, kind, window, one.row, one.rows + spare, groups)

    constants = {
        key: np.asarray(value, next(arrays[p].dtype for p in arrays if p.startswith(join(path, "weights/"))))
        for path, structure in layers.items()
        for key, value in layout.constants(path, structure).items()
    }
    return layout, TorchTensors({path: name(path, one) for path, one in stored.items()}, constants)


def _above(path: str) -> str:
    return path.rpartition("/")[0]


def _kind(path: str, modules: Mapping[str, nnx.Module], *, rank: int) -> Kind:
    """Returns the `TorchName.kind` of an array of so many axes."""
    module = modules.get(_above(path))
    if rank < 2 or isinstance(module, nnx.Embed):
        return "same"
    if isinstance(module, nnx.ConvTranspose) and not module.transpose_kernel:
        return "transposed"
    return "kernel"


def _is_foreign(path: str, modules: Mapping[str, nnx.Module]) -> bool:
    """Whether an array is a kernel of a layer that PyTorch has in no comparable form."""
    return isinstance(modules.get(_above(path)), (nnx.Einsum, nnx.LinearGeneral)) and path.endswith("/kernel")


def _missing_rows(stored: Iterable[Stored]) -> Iterator[str]:
    """Yields tensors of which some rows are arrays here and others, which the code base uses, are not."""
    found: dict[tuple[str, int], set[int]] = {}
    for one in stored:
        if one.row is not None:
            found.setdefault((one.name, one.rows), set()).add(one.row)
    for (key, count), rows in found.items():
        if absent := [str(row) for row in range(count) if row not in rows]:
            yield f"{key}: no branch of the layer here has row {', '.join(absent)}"


def _other_branches(model: nnx.Module, layers: Mapping[str, Structure], layout: Layout) -> Iterator[str]:
    """Yields layers whose branches all have names but are not all the branches of the code base."""
    declared = model.descriptions(layout.mode) if layers and isinstance(model, Network) else {}
    described = {path.removesuffix("/kernel"): description for path, description in declared.items()}
    for pattern, description in layout.described:
        described |= dict.fromkeys((path for path in layers if re.fullmatch(pattern, path)), description)
    for path, structure in layers.items():
        if path not in described:
            continue
        structures = structure, described[path](structure.layer)
        ours, theirs = (", ".join(sorted(part.key for part in s.parts)) for s in structures)
        if ours != theirs:
            yield f"{path}: it is made of {ours}, there of {theirs}"


def _roles(layers: Mapping[str, Structure]) -> dict[str, str]:
    """Returns the paths of the arrays in layers of branches -> those in the tables of `blocks`."""
    found = {}
    for path, structure in layers.items():
        own = Kernel(structure.layer.window).name
        for part in structure.parts:
            role = "_".join("own" if word == own else word for word in part.key.split("_"))
            kind = "deltas" if part.stage.residual else "weights"
            found[join(path, f"weights/{part.key}")] = join(path, f"{kind}/{role}")
            found[join(path, f"scales/{part.key}")] = join(path, f"scales/{role}")
            for array in ("scale", "bias", "mean", "var"):
                found[join(path, f"norms/{part.key}/{array}")] = join(path, f"norms/{role}/{array}")
    return found


def _owners(layers: Mapping[str, Structure]) -> dict[str, Structure]:
    """Returns the structures of the layers of branches by the paths of their tensors and scales."""
    return {
        join(path, f"{kind}/{part.key}"): structure
        for path, structure in layers.items()
        for part in structure.parts
        for kind in ("weights", "scales")
    }


def _layer(path: str) -> str:
    """Returns the path of the layer that an array belongs to."""
    return re.sub(r"/(kernel|bias|scale|mean|var|(weights|scales|norms)/.*)$", "", path)
