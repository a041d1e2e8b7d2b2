"""Converts weights between PyTorch state dicts and our models, strictly in both directions.

Missing, extra and misshapen tensors are an error that lists all of them. Only PyTorch's batch counters
(`num_batches_tracked`), which no computation uses, may be absent; they are written as zero, so that the
original network loads the result with `strict=True`. Constants that a code base stores and this package
computes, such as a table of cosines, must have the values that they have here, to the rounding of float32.
"""

import logging
import os
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from repopt_jax.arguments import check_kind, check_path
from repopt_jax.core import paths
from repopt_jax.interop.files import read_tensors, write_safetensors, write_torch
from repopt_jax.interop.names import (
    COUNTER,
    Scheme,
    arrays_of,
    authors_scheme,
    counters,
    find_scheme,
    recognise,
    torch_names,
    torch_tensors,
)
from repopt_jax.surgery.modules import check_model

Model = TypeVar("Model", bound=nnx.Module)

_log = logging.getLogger(__name__)


def from_torch(tensors: Mapping[str, np.ndarray], model: Model, names: str | Scheme = "auto") -> Model:
    """Returns a copy of `model` with the values of a PyTorch state dict.

    Args:
      tensors: key -> array, in PyTorch's order of axes, as `read_tensors` returns them; or the tensors of
        `module.state_dict()` themselves.
      model: defines the arrays' paths, shapes and dtypes; its values are not used, so an abstract model
        (`nnx.eval_shape`) serves as well. For deployed weights, a model that `fuse` returned.
      names: the scheme of the keys, a key of `SCHEMES` or a `Scheme`; "auto" recognises it by the keys and
        logs its name.

    Returns:
      A new model. Values have the dtype of the model's arrays, so half precision is widened.

    Raises:
      ValueError: unknown names; names that do not fit the model; every missing, extra and misshapen key;
        tensors that hold no floating-point numbers; or constants that are others here.
    """
    check_kind(
        "tensors", tensors, Mapping, "a mapping of names to arrays", remedy="`load_torch` reads a file"
    )
    check_model(model)
    tensors = {key: _as_array(value) for key, value in tensors.items()}
    scheme = _scheme_of(tensors, model) if names == "auto" else find_scheme(names)
    places, constants = torch_tensors(model, scheme)
    given = {key: value for key, value in tensors.items() if not key.endswith(COUNTER)}
    ours, _ = paths.named_leaves(arrays_of(model))
    expected = {name.key: name.shape_in_torch(tuple(ours[path].shape)) for path, name in places.items()}
    expected |= {key: value.shape for key, value in constants.items()}
    found = {key: tuple(value.shape) for key, value in given.items()}
    # A counter is reported only if no other key shows that its batch norm is extra.
    found |= {
        key: tuple(tensors[key].shape)
        for key in set(tensors) - set(given) - set(counters(places))
        if key.removesuffix(COUNTER) + "running_mean" not in given
    }
    if difference := paths.describe_difference(expected, found, noun="tensors"):
        raise ValueError(
            f"the state dict, by the names of {scheme.name!r}, does not fit {_described(model)}: {difference}"
            f"{_hint(tensors)}"
        )
    if wrong := [
        f"{key} ({v.dtype})" for key, v in given.items() if not jnp.issubdtype(v.dtype, np.floating)
    ]:
        raise ValueError(f"weights must be floating-point numbers, not {', '.join(wrong)}")
    if others := list(_other_constants(given, constants)):
        raise ValueError(
            f"tensors that {_described(model)} computes, and does not read, hold other values: "
            f"{'; '.join(others)}. It was trained with other branches, which no structure here has"
        )

    def value(path: str, leaf: Any) -> Any:
        name = places.get(path)
        if name is None:
            return init_rng_state(leaf)
        # A copy, because the array may share memory with a PyTorch tensor that is trained.
        return jnp.array(name.from_torch(given[name.key]), dtype=leaf.dtype)

    graph, state = nnx.split(model)
    return nnx.merge(graph, paths.map_named(value, state), copy=True)


def _as_array(value: Any) -> np.ndarray:
    """Returns a PyTorch tensor as an array; anything else as it is."""
    torch = sys.modules.get("torch")  # who has a tensor has imported it
    if torch is None or not isinstance(value, torch.Tensor):
        return value
    value = value.detach().cpu()
    if value.dtype is torch.bfloat16:  # which NumPy has not by itself
        return value.view(torch.int16).numpy().view(jnp.bfloat16)
    return value.numpy()


def to_torch(model: nnx.Module, names: str | Scheme = "auto") -> dict[str, np.ndarray]:
    """Returns a PyTorch state dict with the values of `model`, in its dtype.

    Args:
      model: the model; `fuse` it first for the deployed form.
      names: the scheme of the keys, a key of `SCHEMES` or a `Scheme`; "auto" takes that of the network's
        authors, see `authors_scheme`.

    Returns:
      key -> array, in PyTorch's order of axes; batch counters are 0, int64.

    Raises:
      ValueError: unknown names, or layers that these names have no place for; all of them are listed.
    """
    check_model(model)
    places, constants = torch_tensors(model, authors_scheme(model) if names == "auto" else names)
    arrays, _ = paths.named_leaves(arrays_of(model))
    tensors: dict[str, np.ndarray] = {}
    for path, name in places.items():
        value = name.to_torch(arrays[path])
        if name.row is None:
            tensors[name.key] = value
        else:
            rows = np.zeros(name.shape_in_torch(arrays[path].shape), value.dtype)
            tensors.setdefault(name.key, rows)[name.row] = value
    return tensors | constants | {key: np.zeros((), np.int64) for key in counters(places)}


def load_torch(
    path: str | os.PathLike[str], model: Model, names: str | Scheme = "auto", *, key: str | None = None
) -> Model:
    """Applies `from_torch` to a file's tensors; `path` and `key` as in `read_tensors`, errors as of both."""
    check_path("path", path)
    check_model(model)
    return from_torch(read_tensors(path, key=key), model, names)


def save_torch(path: str | os.PathLike[str], model: nnx.Module, names: str | Scheme = "auto") -> None:
    """Writes `to_torch(model, names)` to a file.

    The suffix determines the format: `.safetensors`, or `.pth` and `.pt` for a file that
    `torch.load(path, weights_only=True)` reads.

    Raises:
      ValueError: another suffix, or as `to_torch`.
      FileExistsError: `path` exists.
    """
    check_path("path", path)
    check_model(model)
    write_tensors(path, to_torch(model, names))


def write_tensors(path: str | os.PathLike[str], tensors: Mapping[str, np.ndarray]) -> None:
    """Writes a state dict in the format of the suffix of `path`; see `save_torch`."""
    writers = {".safetensors": write_safetensors, ".pth": write_torch, ".pt": write_torch}
    suffix = Path(path).suffix
    if suffix not in writers:
        raise ValueError(f"{path} must end in one of {', '.join(writers)}, by which the format is chosen")
    writers[suffix](path, tensors)


def init_rng_state(leaf: Any) -> Any:
    """Returns the state of a random number generator, which files do not hold: from seed 0 if abstract."""
    if not isinstance(leaf, jax.ShapeDtypeStruct):
        return leaf
    if not jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        return jnp.zeros(leaf.shape, leaf.dtype)
    key = jax.random.key(0)
    return jax.random.split(key, leaf.shape) if leaf.shape else key


def _other_constants(given: Mapping[str, np.ndarray], constants: Mapping[str, np.ndarray]) -> Iterator[str]:
    """Yields the constants of which a state dict holds other values, beyond rounding, NaN among them."""
    for key, ours in constants.items():
        theirs = given[key]
        difference = np.abs(theirs.astype(np.float64) - ours.astype(np.float64)).max(initial=0.0)
        # A code base computes them in float32 and casts them with the weights.
        eps = max(float(jnp.finfo(dtype).eps) for dtype in (theirs.dtype, ours.dtype, np.float32))
        if not difference <= 8 * eps:
            yield f"{key} (by up to {difference:.2g})"


def _scheme_of(tensors: Mapping[str, np.ndarray], model: nnx.Module) -> Scheme:
    found = recognise(tensors)
    _log.info("the state dict has the names of %s", found)
    try:
        torch_names(model, found.scheme)
    except ValueError as error:
        raise ValueError(
            f"the state dict does not fit {_described(model)}: {error}{_hint(tensors)}"
        ) from error
    return found.scheme


def _hint(tensors: Mapping[str, np.ndarray]) -> str:
    """Describes the model of a state dict if its keys are recognised."""
    try:
        found = recognise(tensors)
    except ValueError:
        return ""
    made = {
        "training": "",
        "deployed": " and given to `fuse`",
        "merged": " and given to `fuse(model, only=(nn.Branched,))`",
    }
    return (
        f". Its keys are those of {found}: they fit a network prepared in mode '{found.layout.mode}'"
        f"{made[found.layout.form]}"
    )


def _described(model: nnx.Module) -> str:
    name = getattr(model, "architecture", "")
    return f"the {type(model).__name__}{f' {name}' if isinstance(name, str) and name else ''}"
