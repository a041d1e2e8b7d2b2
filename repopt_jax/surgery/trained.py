"""Trained networks: how they are told from fresh ones, and the branches into which their kernels are split.

A redrawn kernel is lost, so `reinitialize`, `to_search` and `to_structure` refuse a network that may have
been trained unless they are told to discard its kernels (`allow_trained`) or to keep them (`keep="split"`).
"""

from collections.abc import Iterator, Mapping
from typing import Any, Literal, overload

import jax
import numpy as np
from flax import nnx

from repopt_jax.core import paths
from repopt_jax.core.parametrization import (
    Parametrization,
    Theta,
    check_kernels,
    check_structures,
    other_kernels,
    parametrizations,
    scale_vectors,
)
from repopt_jax.core.scales import Scales, is_concrete
from repopt_jax.surgery.modules import join, key_of, named_modules

Keep = Literal["split"] | None

# Largest relative difference between a kernel and the merged branches that are to take its place, beside the
# rounding of their sum.
KEPT = 1e-3


@overload
def branches_of(
    model: Any, structures: Scales, *, near: nnx.Rngs | None = None
) -> dict[str, dict[str, jax.Array]]: ...


@overload
def branches_of(
    model: Any, structures: Mapping[str, Parametrization], *, near: nnx.Rngs | None = None
) -> dict[str, Theta]: ...


def branches_of(
    model: Any, structures: Scales | Mapping[str, Parametrization], *, near: nnx.Rngs | None = None
) -> Any:
    """Returns branches that merge into the kernels that the network has, for training on with a structure.

        weights = branches_of(model, scales)
        tx = reparameterize(optax.adamw(1e-4), scales, weights=weights, trainable_scales=True)

    A kernel does not determine its branches. Those returned are of least norm or, with `near`, nearest to a
    fresh draw: of the tensors that can be moved (`Parametrization.split`) with the change of least norm.

    Args:
      model: an NNX model, or any pytree of parameters.
      structures: scales; or structures by the kernels' paths, as `find_parametrizations` returns them.
      near: `nnx.Rngs` with the stream `params`, for the fresh draw. Each path has its own key. Structures in
        which a chain is a product of tensors (OREPA) need it.

    Returns:
      The `weights` of `reparameterize`: for scales path -> branch -> w_b, for structures path -> theta.

    Raises:
      ValueError: the scales or structures do not fit the model, with every path; `near` is missing; or the
        branches cannot express a kernel, because none with a scale other than zero is as large as the window;
        all such paths are listed.
    """
    check_structures("structures", structures)
    leaves, _ = paths.named_leaves(nnx.state(model) if isinstance(model, nnx.Module) else model)
    of_scales = isinstance(structures, Scales)
    known = parametrizations(structures) if of_scales else structures
    vectors = scale_vectors(structures) if of_scales else {}
    check_kernels(known, leaves)
    key = None if near is None else near.params()
    theta = {}
    for path, structure in known.items():
        kernel = leaves[path][...]
        drawn = None
        if key is not None:
            drawn = structure.sample(key_of(path, key))
            if of_scales:  # the identity starts at the searched u, as in `reinitialize`
                drawn["weights"] |= {
                    name: v
                    for name, v in structures.entries[path].vectors.items()
                    if name not in vectors[path]
                }
        theta[path] = structure.split(kernel, drawn, scales=vectors.get(path))
    merges = {path: (one.merge, (theta[path],)) for path, one in known.items()}
    if lost := other_kernels(merges, leaves, KEPT):
        raise ValueError(
            f"the branches of {', '.join(lost)} cannot express the kernels that the network has: a kernel as "
            "large as the window, with no scale of zero, can; add one, or leave these layers out"
        )
    return {path: t["weights"] for path, t in theta.items()} if of_scales else theta


def kept_branches(
    model: Any, structures: Mapping[str, Parametrization], *, rngs: nnx.Rngs
) -> dict[str, Theta]:
    """Returns `branches_of` the model: of least norm, and where a chain is a product of tensors, for which
    there is no such theta, nearest to a fresh draw.

    Raises:
      ValueError: as `branches_of`.
    """
    products = {path: one for path, one in structures.items() if one.is_product}
    others = {path: one for path, one in structures.items() if path not in products}
    return branches_of(model, others) | (branches_of(model, products, near=rngs) if products else {})


def check_keep(keep: Any, allow_trained: bool) -> None:
    """Raises ValueError if `keep` is none of `Keep`, or contradicts `allow_trained`."""
    if keep not in (None, "split"):
        raise ValueError(f"`keep` is {keep!r}: it must be 'split' or None")
    if keep and allow_trained:
        raise ValueError("`keep` is 'split' and `allow_trained` is True: kernels are kept or discarded")


def require_untrained(
    model: Any, *, trained: bool | None, allow_trained: bool, keep: Keep = None, lost: str
) -> None:
    """Raises ValueError if kernels would be lost: if the network has been trained, or that cannot be told.

    The running statistics of batch norms tell it. Without batch norms, a network has not been trained if its
    biases, and the scales of its norms, are all where Flax's layers start them; where they are not, or there
    are none, it cannot be told.

    Args:
      model: an NNX model; other trees, and models without values (`nnx.eval_shape`), are not looked at.
      trained: whether it has been trained; None to look.
      allow_trained: whether the kernels may be lost.
      keep: "split" if they are not lost.
      lost: what would be lost, for the message.
    """
    if keep or allow_trained or trained is False or not isinstance(model, nnx.Module):
        return
    remedy = f'{lost}: give allow_trained=True to discard its kernels, keep="split" to keep them'
    if trained:
        raise ValueError(f"the model has been trained and {remedy}, or a fresh model")
    batch = list(_moved(model, nnx.BatchNorm, {"mean": 0.0, "var": 1.0}))
    if statistics := [path for path, moved in batch if moved]:
        raise ValueError(
            f"the model has been trained (batch statistics {paths.listed(statistics)} have moved) and "
            f"{remedy}, or a fresh model"
        )
    vectors = batch or list(_moved(model, nnx.Module, {"bias": 0.0, "scale": 1.0}))
    values = [x for x in jax.tree.leaves(nnx.state(model, nnx.Param)) if is_concrete(x)]
    if values and (not vectors or any(moved for _, moved in vectors)):
        raise ValueError(
            "it cannot be told whether the model has been trained, because it has no batch norm"
            f"{'' if vectors else ' and no bias'}, and {remedy}, or say trained=False"
        )


def _moved(model: nnx.Module, kind: type, starts: Mapping[str, float]) -> Iterator[tuple[str, bool]]:
    """Yields (path, whether it is elsewhere) of vectors that modules of `kind` start at one value."""
    for path, module in named_modules(model):
        for name, start in starts.items():
            value = getattr(module, name, None) if isinstance(module, kind) else None
            if isinstance(value, nnx.Variable):
                array = value.get_value()  # of an abstract model a shape, which has no items
                yield join(path, name), is_concrete(array) and not np.all(np.asarray(array) == start)
