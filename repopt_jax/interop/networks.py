"""Descriptions from which networks are rebuilt: inferred from PyTorch state dicts, kept in converted folders.

A converted folder holds

convert.json    the description of the network
weights/        the network's arrays, an Orbax checkpoint; written last, and whole or not there
"""

import dataclasses
import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx

from repopt_jax import jsontext, models
from repopt_jax._version import __version__
from repopt_jax.arguments import check_path
from repopt_jax.core.scales import readable
from repopt_jax.interop.names import NETWORKS, arrays_of, recognise
from repopt_jax.interop.weights import init_rng_state
from repopt_jax.nn.branched import Branched
from repopt_jax.surgery.fuse import fuse
from repopt_jax.surgery.prepare import Mode, prepare


@dataclasses.dataclass(frozen=True)
class Description:
    """The arguments from which a network is rebuilt.

    Attributes:
      model: its name in `models.list()`.
      mode: the `surgery.Mode` whose arrays it has; "plain" also for networks that are trained in mode
        "repopt".
      classes: number of classes.
      in_channels: channels of the images.
      post_se: whether every block of a VGG has squeeze-and-excitation after its ReLU.
      form: "training"; "deployed", fused entirely; or "merged", with only the branches fused, as RepGhost's
        authors deploy it.
    """

    model: str
    mode: str
    classes: int
    in_channels: int = 3
    post_se: bool = False
    form: str = "training"


def describe(tensors: Mapping[str, Any], model: str, *, classes: int = 0) -> Description:
    """Infers the description of a PyTorch state dict from its keys and shapes and the name of the model.

    Args:
      tensors: key -> anything with a `shape`.
      model: its name in `models.list()`, in upper or lower case.
      classes: expected number of classes; 0 for any.

    Raises:
      ValueError: unknown names, an unknown model, a state dict of another architecture or another number of
        classes.
    """
    entry = models.find(model)
    found = recognise(tensors)
    layout = found.layout
    if not isinstance(entry.variant, NETWORKS[layout.network]):
        raise ValueError(f"the state dict holds {found}, which is no {model}")
    names = ("linear", "head.fc", "classifier", "head")
    heads = [f"{name}.weight" for name in names if f"{name}.weight" in tensors]
    stems = [
        key
        for key, tensor in tensors.items()
        if re.match(r"(stage0|stem|conv_stem|conv_embedding)\.(?!se\.|post_se\.|attn\.)", key)
        and len(tensor.shape) == 4
    ]
    if not heads or not stems:
        raise ValueError(f"the state dict holds {found} without its {'stem' if heads else 'classifier'}")
    given = int(tensors[heads[0]].shape[0])
    if classes and classes != given:
        raise ValueError(f"`classes` is {classes}, but the state dict's classifier has {given}")
    return Description(
        entry.name,
        layout.mode,
        given,
        int(tensors[stems[0]].shape[1]),
        any(".post_se." in key for key in tensors),
        layout.form,
    )


def build(description: Description) -> Any:
    """Builds the described network in evaluation mode, abstract: shapes and dtypes without values.

    Raises:
      ValueError: an unknown model or mode, or arguments that they refuse.
    """
    mode = Mode.parse(description.mode)

    def make() -> nnx.Module:
        options: dict[str, Any] = {"post_se": True} if description.post_se else {}
        sizes = {"num_classes": description.classes, "in_channels": description.in_channels}
        return models.create(description.model, **sizes, **options, rngs=nnx.Rngs(0))

    def prepared(model: nnx.Module) -> nnx.Module:
        if mode not in (Mode.PLAIN, Mode.REPOPT):
            model = prepare(model, mode, rngs=nnx.Rngs(0)).model
        model.eval()
        if description.form == "training":
            return model
        return fuse(model, only=(Branched,) if description.form == "merged" else ())

    return nnx.eval_shape(lambda: prepared(make()))


def save_converted(directory: str | os.PathLike[str], model: nnx.Module, description: Description) -> None:
    """Writes `model` and its description to a new folder, which `load_converted` reads.

    Raises:
      FileExistsError: `directory` exists.
    """
    from orbax.checkpoint import v1 as ocp

    folder = Path(directory).expanduser().absolute()
    if folder.exists():
        raise FileExistsError(f"{folder} exists: give another path or remove it")
    folder.mkdir(parents=True)
    record = {**dataclasses.asdict(description), "library_version": __version__}
    (folder / RECORD).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    ocp.save(str(folder / WEIGHTS), nnx.to_pure_dict(arrays_of(model)))


def load_converted(directory: str | os.PathLike[str]) -> Any:
    """Reads the network of a converted folder, in evaluation mode.

    Raises:
      FileNotFoundError: `directory` holds no converted network.
      ValueError: it was written by a version of this library with other descriptions, or is damaged.
    """
    check_path("directory", directory)
    from orbax.checkpoint import v1 as ocp

    folder = Path(directory).expanduser().absolute()
    model = build(read_description(folder))
    graph, state = nnx.split(model)
    device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    target = jax.tree.map(
        lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=device), nnx.to_pure_dict(arrays_of(model))
    )
    weights = folder / WEIGHTS
    complaint = f"{weights} is damaged or not of the network of {RECORD}: convert the file again"
    nnx.replace_by_pure_dict(state, readable(lambda: ocp.load(str(weights), target), complaint))
    return nnx.merge(graph, jax.tree.map(init_rng_state, state))


def read_description(directory: str | os.PathLike[str]) -> Description:
    """Reads the description that `save_converted` wrote; raises as `load_converted`."""
    record = Path(directory).expanduser().absolute() / RECORD
    if not record.is_file():
        raise FileNotFoundError(f"{record.parent} has no {RECORD}: it holds no converted network")
    if not (record.parent / WEIGHTS).is_dir():
        raise FileNotFoundError(
            f"{record.parent} has no {WEIGHTS}: its conversion was interrupted, repeat it"
        )
    fields = jsontext.parse(record.read_bytes(), record)
    if not isinstance(fields, dict):
        raise ValueError(f"{record} is damaged: it holds no object of fields; convert the file again")
    version = fields.pop("library_version", "?")
    if set(fields) != {field.name for field in dataclasses.fields(Description)}:
        raise ValueError(
            f"{record} is of version {version}, whose descriptions are others: convert the file again"
        )
    return Description(**fields)


RECORD, WEIGHTS = "convert.json", "weights"


def strides_of(model: models.Network) -> tuple[int, ...]:
    """Returns the strides of the layers that can be re-parameterized, in order.

    For a VGG or a MobileOne these are the strides of all blocks, which a state dict does not contain.
    """
    return tuple(spec.geometry.strides[0] for spec in model.layers().values())


def count_parameters(tree: Any) -> int:
    """Counts the parameters of a model or of a PyTorch state dict, without batch statistics and counters."""
    if isinstance(tree, nnx.Module):
        kept = nnx.state(tree, nnx.Not(nnx.Any(nnx.RngState, nnx.BatchStat)))
        return sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(kept))
    statistics = ("running_mean", "running_var", "num_batches_tracked")
    return sum(int(np.prod(v.shape)) for key, v in tree.items() if not key.endswith(statistics))
