"""What PyTorch code bases call the tensors of our networks: one small table for each code base.

A scheme says, for each of our module classes, what its children are called there: the network's table names
its blocks (`stages/1/0` is `stage1.0`), a block's table names its layers (`conv_3x3` is `rbr_dense.conv`),
and layers have the same names everywhere (a kernel is `weight`, a batch norm's mean `running_mean`). Reading
and writing use the same tables. Sources, read for facts: the published code of RepOptimizers, RepVGG and
RepGhost (MIT licence), of MobileOne (Apple's licence) and of timm (Apache 2.0).
"""

import collections
import dataclasses
import re
from collections.abc import Callable, Mapping
from typing import Any, Literal

import numpy as np
from flax import nnx

from repopt_jax.core import paths
from repopt_jax.models import MobileOne, RepGhostNet, RepOptVGG
from repopt_jax.nn import (
    ConvNorm,
    CSLAConv,
    FusedBlock,
    GhostBottleneck,
    GhostModule,
    MobileOneBlock,
    PlainBlock,
    RepGhostConv,
    RepVGGBlock,
)
from repopt_jax.surgery.modules import join, named_modules

Moved = Literal["kernel", "vector"]
Table = tuple[tuple[str, str], ...]


@dataclasses.dataclass(frozen=True)
class TorchName:
    """Where PyTorch keeps one of our arrays.

    Attributes:
      key: in the state dict.
      kind: "kernel", (out, in, *spatial) there and (*spatial, in, out) here, with no spatial axes in a dense
        layer; or "vector", the same in both.
    """

    key: str
    kind: Moved

    def to_torch(self, array: Any) -> np.ndarray:
        """Our array with PyTorch's order of axes."""
        array = np.asarray(array)
        return np.ascontiguousarray(array.transpose(self._axes(array.ndim)))

    def from_torch(self, tensor: np.ndarray) -> np.ndarray:
        """PyTorch's tensor with our order of axes."""
        return tensor.transpose(np.argsort(self._axes(tensor.ndim)))

    def shape_in_torch(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Shape there of an array that has `shape` here."""
        return tuple(shape[axis] for axis in self._axes(len(shape)))

    def _axes(self, rank: int) -> tuple[int, ...]:
        """Our axes in PyTorch's order."""
        return tuple(range(rank)) if self.kind == "vector" else (rank - 1, rank - 2, *range(rank - 2))


@dataclasses.dataclass(frozen=True)
class Scheme:
    """The names that one code base uses.

    Attributes:
      name: key in `SCHEMES`.
      about: whose names these are.
      tables: module class -> rows (pattern of a path inside such a module, the name there). A pattern must
        match the whole of a layer's path, or of the path of a module whose class has a table too, which
        then goes on; the name may refer to the pattern's groups, and be "" for a level that is not there.
        The class of the network itself must have a table.
      accepts: says why a module cannot be named by this scheme although its class has a table ("" if it can):
        for what the code base cannot express.
    """

    name: str
    about: str
    tables: Mapping[type[nnx.Module], Table]
    accepts: Callable[[nnx.Module], str] = lambda module: ""


@dataclasses.dataclass(frozen=True)
class Layout:
    """What a state dict holds, as far as its keys say.

    Attributes:
      scheme: name of the scheme.
      network: "vgg", "ghost" or "mobileone".
      kind: as in the network's argument; a CSLA network has the keys of "search". "" where there is one kind.
      fused: whether it is the form for inference.
    """

    scheme: str
    network: str
    kind: str
    fused: bool = False

    def __str__(self) -> str:
        form = "deployed" if self.fused else self.kind or "training form"
        return f"{self.scheme} ({self.network}, {form})"


def torch_names(model: nnx.Module, scheme: "str | Scheme") -> dict[str, TorchName]:
    """What `scheme` calls every array of `model`: our path -> `TorchName`. The state of random number
    generators has no counterpart and is left out.

    Args:
      model: an NNX model, also an abstract one from `nnx.eval_shape`.
      scheme: a key of `SCHEMES`, or a scheme of your own.

    Raises:
      ValueError: an unknown scheme; layers that the code base has no name for, all of them listed; or a
        scheme that gives several arrays one name.
    """
    scheme = find_scheme(scheme)
    modules = dict(named_modules(model))
    arrays, _ = paths.named_leaves(arrays_of(model))
    found: dict[str, TorchName] = {}
    nameless: dict[str, None] = {}
    for path, array in arrays.items():
        layer = _owner(path, modules)
        attribute, kind = _attribute(path, layer, modules[layer], array)
        # Inside a search layer each tensor is a layer of its own there.
        parts = _named(path if isinstance(modules[layer], CSLAConv) else layer, modules, scheme)
        if parts is None or attribute is None:
            nameless[layer] = None
        else:
            found[path] = TorchName(".".join([*parts, attribute]), kind)
    refused = {f"{path}: {why}": None for path, m in modules.items() if (why := scheme.accepts(m))}
    if nameless or refused:
        classes = sorted({type(_block(path, modules)).__name__ for path in nameless})
        raise ValueError(
            f"names {scheme.name!r} ({scheme.about}) have no place for "
            + "; ".join(filter(None, [_listed(nameless, classes), ", ".join(refused)]))
            + f". Others: {', '.join(name for name in SCHEMES if name != scheme.name)}"
        )
    uses = collections.Counter(name.key for name in found.values())
    if twice := sorted(key for key, count in uses.items() if count > 1):
        raise ValueError(f"names {scheme.name!r} call several arrays {', '.join(twice)}: correct its tables")
    return found


def counters(model: nnx.Module, names: Mapping[str, TorchName]) -> list[str]:
    """Keys of the batch counters (`num_batches_tracked`) that PyTorch's batch norms have beside `names`."""
    norms = {path for path, m in named_modules(model) if isinstance(m, nnx.BatchNorm)}
    return [
        name.key.removesuffix("running_mean") + COUNTER
        for path, name in names.items()
        if path.rpartition("/")[0] in norms and path.endswith("/mean")
    ]


def find_scheme(scheme: "str | Scheme") -> Scheme:
    """The scheme of that name; ValueError for an unknown one."""
    if isinstance(scheme, Scheme):
        return scheme
    if scheme not in SCHEMES:
        known = ", ".join(f"{s.name} ({s.about})" for s in SCHEMES.values())
        raise ValueError(f"`names` is {scheme!r}: it must be 'auto' or one of {known}")
    return SCHEMES[scheme]


def own_scheme(model: nnx.Module) -> str:
    """The scheme of the network's own authors: the first of `SCHEMES` that has a name for every array.

    Raises:
      ValueError: there is none; what each one lacks is told.
    """
    order = list(SCHEMES)
    if any(isinstance(m, RepGhostConv) for _, m in named_modules(model)):
        order.insert(0, "repghost")  # RepOptimizers has these branches too, under names of its own
    if isinstance(model, RepOptVGG) and model.kind != "repvgg":
        order.insert(0, "repopt")  # deployed, its blocks are those of RepVGG
    complaints = []
    for name in order:
        try:
            torch_names(model, name)
            return name
        except ValueError as error:
            if _table(model, SCHEMES[name]) is not None:
                complaints.append(str(error).partition(". Others:")[0])
    raise ValueError(
        "; ".join(complaints)
        or f"no scheme names a {type(model).__name__}: give `names` a `Scheme` with tables of your own"
    )


def recognise(tensors: Mapping[str, Any]) -> Layout:
    """Whose names a state dict has, and which form of which network it is, from keys that only they have.

    Args:
      tensors: key -> anything with a `shape`.

    Raises:
      ValueError: no scheme's; the known ones are listed.
    """
    lines = [f"{key} {','.join(map(str, tensor.shape))}" for key, tensor in tensors.items()]
    for pattern, layout in _MARKS:
        compiled = re.compile(pattern)
        if any(compiled.match(line) for line in lines):
            return layout
    some = ", ".join(list(tensors)[:5]) or "no tensors"
    known = "; ".join(f"{s.name}, {s.about}" for s in SCHEMES.values())
    raise ValueError(f"these names are of no known scheme: {some} ... Known are: {known}")


def arrays_of(model: nnx.Module) -> Any:
    """The model's state without its random number generators."""
    return nnx.state(model, nnx.Not(nnx.RngState))


COUNTER = "num_batches_tracked"

_ATTRIBUTES: dict[type, dict[str, str]] = {
    nnx.Conv: {"kernel": "weight", "bias": "bias"},
    nnx.Linear: {"kernel": "weight", "bias": "bias"},
    nnx.BatchNorm: {"scale": "weight", "bias": "bias", "mean": "running_mean", "var": "running_var"},
}


def _attribute(path: str, layer: str, module: nnx.Module, array: Any) -> tuple[str | None, Moved]:
    """A leaf's name inside its layer, and how its axes move."""
    kind: Moved = "kernel" if len(array.shape) > 1 else "vector"
    if isinstance(module, CSLAConv):
        return "weight", kind
    inside = path.removeprefix(layer).removeprefix("/")
    for cls, names in _ATTRIBUTES.items():
        if isinstance(module, cls):
            return names.get(inside), kind
    return None, kind


def _owner(path: str, modules: Mapping[str, nnx.Module]) -> str:
    """The innermost module that is a layer: what holds the leaf, seen from outside its own containers."""
    parts = path.split("/")
    for n in range(len(parts) - 1, -1, -1):
        above = "/".join(parts[:n])
        if above in modules and not isinstance(modules[above], (nnx.Dict, nnx.List)):
            return above
    return ""


def _named(
    path: str, modules: Mapping[str, nnx.Module], scheme: Scheme, inside: str = ""
) -> list[str] | None:
    """The names of `path` there, from the module `inside` down; None where no table has a row for it."""
    table = _table(modules[inside], scheme)
    rest = path.removeprefix(inside).removeprefix("/").split("/")
    if table is None:
        return None
    # The module's own row for the whole of it, else its row for a module on the way and that one's table.
    for n in range(len(rest), 0, -1):
        at = "/".join(rest[:n])
        match = next(((m, to) for pattern, to in table if (m := re.fullmatch(pattern, at))), None)
        if match is None:
            continue
        name = match[0].expand(match[1])
        if n == len(rest):
            if name:
                return [name]
            continue
        below = _named(path, modules, scheme, join(inside, at))
        if below is not None:
            return [name, *below] if name else below
    return None


def _table(module: nnx.Module, scheme: Scheme) -> Table | None:
    return next((table for cls, table in scheme.tables.items() if isinstance(module, cls)), None)


def _block(path: str, modules: Mapping[str, nnx.Module]) -> nnx.Module:
    above = path.rpartition("/")[0]
    while above not in modules or isinstance(modules[above], (nnx.Dict, nnx.List)):
        above = above.rpartition("/")[0]
    return modules[above]


def _listed(layers: Mapping[str, None], classes: list[str]) -> str:
    return f"the layers {', '.join(layers)} (of {', '.join(classes)})" if layers else ""


_STAGES: Table = (("stages/0/0", "stage0"), (r"stages/(\d+)/(\d+)", r"stage\1.\2"), ("head", "linear"))
_TIMM_STAGES: Table = (
    ("stages/0/0", "stem"),
    *((rf"stages/{n}/(\d+)", rf"stages.{n - 1}.\1") for n in range(1, 5)),
    ("head", "head.fc"),
)
_GHOST_NET: Table = (
    ("stem/conv", "conv_stem"),
    ("stem/bn", "bn1"),
    (r"blocks/(\d+)/0/conv", r"blocks.\1.0.conv"),
    (r"blocks/(\d+)/0/bn", r"blocks.\1.0.bn1"),
    (r"blocks/(\d+)/(\d+)", r"blocks.\1.\2"),
    ("conv_head", "conv_head"),
    ("head", "classifier"),
)
_GHOST_BOTTLENECK: Table = (
    ("ghost1|ghost2", r"\g<0>"),
    ("depthwise/(conv|bn)", r"\1_dw"),
    ("se/down", "se.conv_reduce"),
    ("se/up", "se.conv_expand"),
    ("shortcut/0/conv", "shortcut.0"),
    ("shortcut/0/bn", "shortcut.1"),
    ("shortcut/1/conv", "shortcut.2"),
    ("shortcut/1/bn", "shortcut.3"),
)
_GHOST_PRIMARY: Table = (("primary/conv", "primary_conv.0"), ("primary/bn", "primary_conv.1"))
_REPGHOST: dict[type[nnx.Module], Table] = {
    RepGhostNet: _GHOST_NET,
    GhostBottleneck: _GHOST_BOTTLENECK,
    GhostModule: (
        *_GHOST_PRIMARY,
        ("cheap/conv", "cheap_operation.0"),
        ("cheap/bn", "cheap_operation.1"),
        ("cheap/bn_identity", "fusion_bn.0"),
        ("cheap", "cheap_operation"),
    ),
}


def _se_before_relu(module: nnx.Module) -> str:
    if getattr(module, "se", None) is not None and not getattr(module, "se_first", True):
        return "its squeeze-and-excitation comes after the ReLU, there it comes before"
    return ""


def _se_after_relu(module: nnx.Module) -> str:
    if getattr(module, "se", None) is not None and getattr(module, "se_first", False):
        return "its squeeze-and-excitation comes before the ReLU, there it comes after"
    return ""


SCHEMES: dict[str, Scheme] = {
    scheme.name: scheme
    for scheme in (
        Scheme(
            "repvgg",
            "RepVGG as its authors name it",
            {
                RepOptVGG: _STAGES,
                RepVGGBlock: (
                    ("conv_3x3", "rbr_dense.conv"),
                    ("bn_3x3", "rbr_dense.bn"),
                    ("conv_1x1", "rbr_1x1.conv"),
                    ("bn_1x1", "rbr_1x1.bn"),
                    ("bn_identity", "rbr_identity"),
                    ("se/(down|up)", r"se.\1"),
                ),
                FusedBlock: (("conv", "rbr_reparam"), ("se/(down|up)", r"se.\1")),
            },
            _se_before_relu,
        ),
        Scheme(
            "repopt",
            "RepOpt-VGG and RepOpt-GhostNet as their authors name them",
            {
                RepOptVGG: _STAGES,
                PlainBlock: (
                    ("conv", "conv"),
                    ("conv/weights/3x3", "conv"),
                    ("conv/scales/3x3", "scale_conv"),
                    ("conv/weights/1x1", "conv_1x1"),
                    ("conv/scales/1x1", "scale_1x1"),
                    ("conv/weights/identity", "scale_identity"),
                    ("bn", "bn"),
                    ("se/(down|up)", r"post_se.\1"),
                ),
                RepVGGBlock: (
                    ("conv_3x3|bn_3x3|conv_1x1|bn_1x1|bn_identity", r"\g<0>"),
                    ("se/(down|up)", r"post_se.\1"),
                ),
                FusedBlock: (("conv", "conv"), ("se/(down|up)", r"post_se.\1")),
                RepGhostNet: _GHOST_NET,
                GhostBottleneck: _GHOST_BOTTLENECK,
                GhostModule: (*_GHOST_PRIMARY, ("cheap", "")),
                ConvNorm: (
                    ("conv", "cheap_operation.0"),
                    ("conv/weights/3x3", "cheap_operation.0"),
                    ("conv/scales/3x3", "cheap_operation.1"),
                    ("conv/weights/identity", "fusion_scale"),
                    ("bn", "final_bn"),
                ),
                RepGhostConv: (
                    ("conv", "cheap_operation.0"),
                    ("bn", "cheap_operation.1"),
                    ("bn_identity", "fusion_bn"),
                ),
            },
            _se_after_relu,
        ),
        Scheme(
            "mobileone",
            "MobileOne as its authors name it",
            {
                MobileOne: _STAGES,
                MobileOneBlock: (
                    (r"conv_kxk/(\d+)/(conv|bn)", r"rbr_conv.\1.\2"),
                    ("conv_1x1/(conv|bn)", r"rbr_scale.\1"),
                    ("bn_identity", "rbr_skip"),
                    ("se/down", "se.reduce"),
                    ("se/up", "se.expand"),
                ),
                FusedBlock: (("conv", "reparam_conv"), ("se/down", "se.reduce"), ("se/up", "se.expand")),
            },
        ),
        Scheme("repghost", "RepGhostNet as its authors name it", _REPGHOST),
        Scheme(
            "timm",
            "RepVGG, MobileOne and RepGhostNet as timm names them",
            {
                RepOptVGG: _TIMM_STAGES,
                RepVGGBlock: (
                    ("conv_3x3", "conv_kxk.conv"),
                    ("bn_3x3", "conv_kxk.bn"),
                    ("conv_1x1", "conv_1x1.conv"),
                    ("bn_1x1", "conv_1x1.bn"),
                    ("bn_identity", "identity"),
                    ("se/down", "attn.fc1"),
                    ("se/up", "attn.fc2"),
                ),
                MobileOne: _TIMM_STAGES,
                MobileOneBlock: (
                    (r"conv_kxk/(\d+)/(conv|bn)", r"conv_kxk.\1.\2"),
                    ("conv_1x1/(conv|bn)", r"conv_scale.\1"),
                    ("bn_identity", "identity"),
                    ("se/down", "attn.fc1"),
                    ("se/up", "attn.fc2"),
                ),
                FusedBlock: (("conv", "reparam_conv"), ("se/down", "attn.fc1"), ("se/up", "attn.fc2")),
                **_REPGHOST,
            },
            _se_before_relu,
        ),
    )
}

# Keys, each with its shape, that no other layout has; the first row that matches decides.
_BLOCK = r"stage\d+\.(\d+\.)?"
_GHOST = r"blocks\.\d+\.\d+\.ghost1\."
_MARKS: tuple[tuple[str, Layout], ...] = (
    (_BLOCK + r"rbr_dense\.conv\.weight ", Layout("repvgg", "vgg", "repvgg")),
    (_BLOCK + r"rbr_reparam\.weight ", Layout("repvgg", "vgg", "repvgg", fused=True)),
    (_BLOCK + r"scale_conv\.weight ", Layout("repopt", "vgg", "search")),
    (_BLOCK + r"conv_3x3\.weight ", Layout("repopt", "vgg", "repvgg")),
    (_BLOCK + r"bn\.running_mean ", Layout("repopt", "vgg", "target")),
    (_BLOCK + r"conv\.bias ", Layout("repopt", "vgg", "target", fused=True)),
    (_BLOCK + r"rbr_conv\.0\.conv\.weight ", Layout("mobileone", "mobileone", "")),
    (_BLOCK + r"reparam_conv\.weight ", Layout("mobileone", "mobileone", "", fused=True)),
    (r"stem\.conv_kxk\.conv\.weight ", Layout("timm", "vgg", "repvgg")),
    (r"stem\.conv_kxk\.0\.conv\.weight ", Layout("timm", "mobileone", "")),
    (r"stages\.0\.1\.reparam_conv\.weight \d+,\d+,1,1$", Layout("timm", "mobileone", "", fused=True)),
    (r"stem\.reparam_conv\.weight ", Layout("timm", "vgg", "repvgg", fused=True)),
    (_GHOST + r"fusion_scale\.weight ", Layout("repopt", "ghost", "search")),
    (_GHOST + r"fusion_bn\.weight ", Layout("repopt", "ghost", "repghost")),
    (_GHOST + r"fusion_bn\.0\.weight ", Layout("repghost", "ghost", "repghost")),
    (_GHOST + r"final_bn\.weight ", Layout("repopt", "ghost", "target")),
    (_GHOST + r"cheap_operation\.weight ", Layout("repghost", "ghost", "repghost", fused=True)),
    (_GHOST + r"cheap_operation\.1\.weight ", Layout("repghost", "ghost", "target")),
)
