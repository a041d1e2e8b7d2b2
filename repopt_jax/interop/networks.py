"""Networks by a name and a few words: what a weight file does not say, and a converted folder writes down.

A converted folder holds

weights/        the network's arrays, an Orbax checkpoint
convert.json    the words that rebuild the network; written last: its presence means all is whole
"""

import dataclasses
import json
import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx

from repopt_jax._version import __version__
from repopt_jax.interop.names import arrays_of, recognise
from repopt_jax.interop.weights import start_random
from repopt_jax.models import (
    GHOST_KINDS,
    GHOST_VARIANTS,
    KINDS,
    MOBILEONE_VARIANTS,
    VGG_VARIANTS,
    MobileOne,
    RepGhostNet,
    RepOptVGG,
)
from repopt_jax.models.mobileone import mobileone_specs
from repopt_jax.models.vgg import block_specs
from repopt_jax.nn import RepGhostConv
from repopt_jax.surgery.fuse import fuse


@dataclasses.dataclass(frozen=True)
class Description:
    """A network in words.

    Attributes:
      model: as `--model` names it, such as "repopt-vgg-B1", "repvgg-A0", "mobileone-s0", "repghost-0.5" or
        "repopt-ghostnet-0.5".
      kind: as the network's argument; "" for MobileOne.
      classes: size of the classifier.
      in_channels: of the images.
      post_se: squeeze-and-excitation after the ReLU of every block of a VGG.
      form: "training"; "deployed", all of it given to `fuse`; or "merged", only RepGhost's branches, as its
        authors deploy it.
    """

    model: str
    kind: str
    classes: int
    in_channels: int = 3
    post_se: bool = False
    form: str = "training"


def describe(tensors: Mapping[str, Any], model: str, *, kind: str = "", classes: int = 0) -> Description:
    """The network of a PyTorch state dict: what its keys and shapes tell, and what they do not.

    Args:
      tensors: key -> anything with a `shape`.
      model: name of the architecture.
      kind: where the keys do not tell: "csla", whose keys are those of a search. "" for what they tell.
      classes: size of the classifier, 0 for what the file says.

    Raises:
      ValueError: unknown names, an unknown model or kind, a state dict of another architecture or another
        number of classes.
    """
    family, _ = find_network(model)
    layout = recognise(tensors)
    if layout.network != family.network:
        raise ValueError(f"the state dict holds {layout}, which is no {model}")
    known = [layout.kind, "csla"] if layout.kind == "search" else [layout.kind]
    if kind and kind not in known and not (layout.fused and kind in family.kinds):
        raise ValueError(f"`kind` is {kind!r}, but the state dict holds {layout}: its kind is {known[0]!r}")
    heads = [f"{name}.weight" for name in ("linear", "head.fc", "classifier") if f"{name}.weight" in tensors]
    stems = [
        key
        for key, tensor in tensors.items()
        if re.match(r"(stage0|stem|conv_stem)\.(?!se\.|post_se\.|attn\.)", key) and len(tensor.shape) == 4
    ]
    if not heads or not stems:
        raise ValueError(f"the state dict holds {layout} without its {'stem' if heads else 'classifier'}")
    found = int(tensors[heads[0]].shape[0])
    if classes and classes != found:
        raise ValueError(f"`classes` is {classes}, but the state dict's classifier has {found}")
    return Description(
        model,
        kind or layout.kind,
        found,
        int(tensors[stems[0]].shape[1]),
        any(".post_se." in key for key in tensors),
        ("merged" if layout.network == "ghost" else "deployed") if layout.fused else "training",
    )


def build(description: Description) -> Any:
    """The described network in evaluation mode, abstract: shapes and dtypes without values.

    Raises:
      ValueError: an unknown model or kind.
    """
    return nnx.eval_shape(lambda: _build(description))


def save_converted(directory: str | os.PathLike[str], model: nnx.Module, description: Description) -> None:
    """Writes `model` and the words that rebuild it to a new folder, which `load_converted` reads.

    Raises:
      FileExistsError: something is at `directory`.
    """
    from orbax.checkpoint import v1 as ocp

    folder = Path(directory).expanduser().absolute()
    if folder.exists():
        raise FileExistsError(f"{folder} exists: give another path or remove it")
    ocp.save(str(folder / "weights"), nnx.to_pure_dict(arrays_of(model)))
    record = {**dataclasses.asdict(description), "library_version": __version__}
    part = folder / (RECORD + ".part")
    part.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    part.replace(folder / RECORD)


def load_converted(directory: str | os.PathLike[str]) -> Any:
    """The network of a converted folder, in evaluation mode, with its values.

    Raises:
      FileNotFoundError: no converted network in `directory`.
    """
    from orbax.checkpoint import v1 as ocp

    folder = Path(directory).expanduser().absolute()
    model = build(read_description(folder))
    graph, state = nnx.split(model)
    device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    target = jax.tree.map(
        lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=device), nnx.to_pure_dict(arrays_of(model))
    )
    nnx.replace_by_pure_dict(state, ocp.load(str(folder / "weights"), target))
    return nnx.merge(graph, jax.tree.map(start_random, state))


def read_description(directory: str | os.PathLike[str]) -> Description:
    """The words that `save_converted` wrote; FileNotFoundError where there are none."""
    record = Path(directory).expanduser().absolute() / RECORD
    if not record.is_file():
        raise FileNotFoundError(f"{record.parent} has no {RECORD}: it holds no converted network")
    fields = json.loads(record.read_text(encoding="utf-8"))
    fields.pop("library_version")
    return Description(**fields)


RECORD = "convert.json"


@dataclasses.dataclass(frozen=True)
class Family:
    """Networks that share a table of variants: `network` as `Layout` calls it, and the kinds, of which the
    first is meant where none is named."""

    network: str
    variants: Mapping[str, Any]
    kinds: tuple[str, ...]
    make: Callable[..., Any]


def _kinds(first: str, kinds: tuple[str, ...]) -> tuple[str, ...]:
    return (first, *(kind for kind in kinds if kind != first))


# By the beginning of a model's name; what follows is the variant.
NETWORKS: dict[str, Family] = {
    "repopt-vgg-": Family("vgg", VGG_VARIANTS, _kinds("target", KINDS), RepOptVGG),
    "repvgg-": Family("vgg", VGG_VARIANTS, _kinds("repvgg", KINDS), RepOptVGG),
    "repopt-ghostnet-": Family("ghost", GHOST_VARIANTS, _kinds("target", GHOST_KINDS), RepGhostNet),
    "repghost-": Family("ghost", GHOST_VARIANTS, _kinds("repghost", GHOST_KINDS), RepGhostNet),
    "mobileone-": Family("mobileone", MOBILEONE_VARIANTS, ("",), MobileOne),
}


def find_network(model: str) -> tuple[Family, Any]:
    """The family and the variant that a name such as "repvgg-A0" means; ValueError for an unknown one."""
    for prefix, family in NETWORKS.items():
        if model.startswith(prefix) and model.removeprefix(prefix) in family.variants:
            return family, family.variants[model.removeprefix(prefix)]
    known = "; ".join(f"{prefix}{{{','.join(family.variants)}}}" for prefix, family in NETWORKS.items())
    raise ValueError(f"`model` is {model!r}: it must be one of {known}")


def strides_of(model: Any) -> tuple[int, ...]:
    """The strides of the blocks of a VGG or a MobileOne in order: what a state dict does not tell."""
    if isinstance(model, RepOptVGG):
        return tuple(spec.stride for spec in block_specs(model.variant, model.in_channels))
    if isinstance(model, MobileOne):
        return tuple(spec.stride for spec in mobileone_specs(model.variant, model.in_channels))
    return ()


def count_parameters(tree: Any) -> int:
    """Numbers in a model or in a PyTorch state dict, without batch statistics and counters."""
    if isinstance(tree, nnx.Module):
        kept = nnx.state(tree, nnx.Not(nnx.Any(nnx.RngState, nnx.BatchStat)))
        return sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(kept))
    statistics = ("running_mean", "running_var", "num_batches_tracked")
    return sum(int(np.prod(v.shape)) for key, v in tree.items() if not key.endswith(statistics))


def _build(description: Description) -> Any:
    family, variant = find_network(description.model)
    options: dict[str, Any] = {"num_classes": description.classes, "in_channels": description.in_channels}
    if family.kinds != ("",):
        options["kind"] = description.kind or family.kinds[0]
    if description.post_se:
        options["post_se"] = True
    model = family.make(variant, **options, rngs=nnx.Rngs(0))
    model.eval()
    if description.form == "training":
        return model
    return fuse(model, only=(RepGhostConv,) if description.form == "merged" else ())
