"""Converts and checks a network between PyTorch's files and our folders.

The check compares the state dict run by PyTorch (`torch_forward`) with the network run by JAX on the same
random images, and the numbers of parameters on both sides.
"""

import dataclasses
import importlib.util
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx

from repopt_jax.interop.files import read_tensors
from repopt_jax.interop.names import authors_scheme, find_scheme, recognise
from repopt_jax.interop.networks import (
    Description,
    build,
    count_parameters,
    describe,
    save_converted,
    strides_of,
)
from repopt_jax.interop.torch_forward import torch_logits
from repopt_jax.interop.weights import from_torch, to_torch, write_tensors
from repopt_jax.models import Network
from repopt_jax.surgery.modules import named_modules

TORCH_SUFFIXES = (".safetensors", ".pth", ".pt")
# Of the images on which logits are compared: the smallest for which no map is one pixel, where a network has
# no size of its own.
SIZE, COUNT = 64, 2
TOLERANCE = 1e-3  # relative to the largest logit: rounding in float32 is about 1e-6, mistakes are above 1e-2


@dataclasses.dataclass(frozen=True)
class Check:
    """The comparison of the two sides of a conversion.

    Attributes:
      scheme: name of the scheme on the PyTorch side.
      torch_parameters, parameters: numbers of parameters on PyTorch's side and on ours, without batch
        statistics.
      difference: largest difference of a logit; None if PyTorch is not installed.
      largest: largest absolute logit.
      size: side of the images on which logits are compared.
    """

    scheme: str
    torch_parameters: int
    parameters: int
    difference: float | None
    largest: float | None
    size: int = SIZE

    @property
    def lines(self) -> tuple[str, ...]:
        """The result as lines of text."""
        counts = f"parameters: {self.torch_parameters:,} in PyTorch ({self.scheme}), {self.parameters:,} here"
        if self.difference is None or self.largest is None:
            return counts, "logits not compared: PyTorch is not installed"
        share = self.difference / (self.largest or 1)
        images = f"{COUNT} random images of {self.size} x {self.size}"
        return (
            counts,
            f"largest logit difference {self.difference:.2e} ({share:.2e} of the largest), {images}",
        )


def import_weights(
    path: str | os.PathLike[str], model: str, *, classes: int = 0, key: str | None = None
) -> tuple[Any, Description, Check]:
    """Reads the network of a PyTorch or safetensors file.

    Args:
      path, key: as in `read_tensors`.
      model, classes: as in `describe`.

    Returns:
      The model in evaluation mode, its description, and the check.

    Raises:
      As `read_tensors`, `describe` and `from_torch`; ValueError also if the check fails.
    """
    tensors = read_tensors(path, key=key)
    description = describe(tensors, model, classes=classes)
    network = from_torch(tensors, build(description))
    return network, description, check(network, tensors, recognise(tensors).scheme.name)


def export_weights(path: str | os.PathLike[str], model: Network, *, names: str = "", mode: str = "") -> Check:
    """Writes `model`, in evaluation mode, to a PyTorch or safetensors file, after checking.

    Args:
      path: the file.
      model: the network.
      names: a key of `SCHEMES`; "" for the names of the network's authors.
      mode: as in `authors_scheme`, if `names` is "".

    Raises:
      As `to_torch` and `write_tensors`; ValueError also if the check fails, and then nothing is written.
    """
    scheme = find_scheme(names).name if names else authors_scheme(model, mode)
    tensors = to_torch(model, scheme)
    checked = check(model, tensors, scheme)
    write_tensors(path, tensors)
    return checked


def convert_file(
    source: str | os.PathLike[str],
    out: str | os.PathLike[str],
    model: str,
    *,
    classes: int = 0,
    key: str | None = None,
    names: str = "",
) -> Check:
    """Converts a PyTorch or safetensors file to a converted folder, or to such a file with other names.

    The result is a file if `out` ends in one of `TORCH_SUFFIXES`. Arguments and errors are those of
    `import_weights` and `export_weights`; FileExistsError, before anything is read, if `out` exists.
    """
    refuse_existing(out)
    if names and not is_torch_file(out):
        endings = ", ".join(TORCH_SUFFIXES)
        raise ValueError(f"`to` is {names!r}, but {out} is a folder of ours, not a file ending in {endings}")
    network, description, checked = import_weights(source, model, classes=classes, key=key)
    if is_torch_file(out):
        return export_weights(out, network, names=names, mode=description.mode)
    save_converted(out, network, description)
    return checked


def check(model: Network, tensors: Mapping[str, np.ndarray], scheme: str) -> Check:
    """Compares `model`, in evaluation mode, with a state dict of the same network.

    Raises:
      ValueError: the numbers of parameters differ, or logits by more than `TOLERANCE` of the largest.
    """
    counts = count_parameters(tensors), count_parameters(model)
    difference = largest = None
    size = getattr(getattr(model, "variant", None), "image_size", SIZE)
    if importlib.util.find_spec("torch") is not None:
        channels = getattr(model, "in_channels", 3)
        images = np.random.default_rng(0).normal(size=(COUNT, size, size, channels)).astype(np.float32)
        single = {
            key: value.astype(np.float32) if jnp.issubdtype(value.dtype, jnp.floating) else value
            for key, value in tensors.items()
        }
        theirs = torch_logits(single, images, scheme=scheme, strides=strides_of(model))
        ours = np.asarray(nnx.jit(lambda m, x: m(x))(_in_single(model), jnp.asarray(images)))
        difference, largest = float(np.abs(ours - theirs).max()), float(np.abs(theirs).max())
    result = Check(scheme, *counts, difference, largest, size)
    # The comparison is written so that NaN fails.
    if counts[0] != counts[1] or not (difference is None or difference <= TOLERANCE * (largest or 0)):
        raise ValueError(f"the two sides differ, nothing was written: {'; '.join(result.lines)}")
    return result


def _in_single(model: nnx.Module) -> nnx.Module:
    """Returns a copy that computes in the dtype of its parameters, whatever its `dtype` is."""
    copy = nnx.clone(model)
    for _, module in named_modules(copy):
        if hasattr(module, "dtype"):
            module.dtype = None  # pyright: ignore[reportAttributeAccessIssue]
    return copy


def is_torch_file(path: str | os.PathLike[str]) -> bool:
    """Whether a path, existing or not, is named like a PyTorch or safetensors file."""
    return Path(path).suffix in TORCH_SUFFIXES


def refuse_existing(out: str | os.PathLike[str]) -> None:
    """Raises FileExistsError if `out` exists."""
    if Path(out).expanduser().exists():
        raise FileExistsError(f"{out} exists: it is not overwritten, give another path or remove it")
