"""A search without search layers: trains a network of any framework through a tree of branch tensors.

A search layer runs one convolution with K = sum_b s_b * E_b(w_b), so a search does not need layers of its
own: keep w_b and s_b in a tree, merge them into the plain network's parameters, and call the plain network.
The Linen or Equinox module or the function that uses the parameters does not change::

    tree = search_tree(params, scales, rngs=nnx.Rngs(0))  # instead of the parameters
    loss, grads = jax.value_and_grad(lambda tree: loss_of(tree.merged(), batch))(tree)
    ...
    save_scales("scales", tree.extract_scales())

For NNX models use `surgery.to_search`. `examples/with_*.py` are complete programs for each framework.

Source: "Re-parameterizing Your Optimizers rather than Architectures" (ICLR 2023), section 3.1.
"""

import dataclasses
from typing import Any, Generic, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from repopt_jax.core import paths
from repopt_jax.core.branches import BranchSet
from repopt_jax.core.scales import LayerScales, Scales, ScalesMetadata, check_finite, check_fit
from repopt_jax.nn.rngs import check_rngs
from repopt_jax.surgery.modules import copy_leaf
from repopt_jax.surgery.reinitialize import Weights, merge_weights, sample_weights

P = TypeVar("P")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class SearchTree(Generic[P]):
    """Parameters of a network whose kernels are sums of branches: a pytree to differentiate and to optimize.

    It is made by `search_tree`. Its leaves have the paths `other_params/<path>`, `weights/<path>/<branch>`
    and `scales/<path>/<branch>`, which rules by path can distinguish. As published, scales are not decayed;
    everything else is decayed as in the plain network, the identity's u like the kernels::

        def decayed(tree):
            return paths.map_named(lambda path, _: not path.startswith("scales/"), tree)

        optax.chain(optax.add_decayed_weights(4e-5, mask=decayed), optax.sgd(0.1, 0.9, nesterov=True))

    Attributes:
      other_params: path -> parameter, for those that are not merged from branches.
      weights: path of a kernel -> branch -> w_b; for the identity u, (out,).
      scales: path of a kernel -> branch -> s_b, (out,), without the identity.
      branch_sets: path and branches of each kernel. This and all following attributes are static.
      structure: treedef of the plain parameters.
      order: paths of the plain parameters' leaves.
      metadata: metadata of the scales from which the search starts.
      trainable_scales: False for the CSLA network with constant scales.
    """

    other_params: dict[str, jax.Array]
    weights: Weights
    scales: Weights
    branch_sets: tuple[tuple[str, BranchSet], ...] = dataclasses.field(metadata={"static": True})
    structure: Any = dataclasses.field(metadata={"static": True})
    order: tuple[str, ...] = dataclasses.field(metadata={"static": True})
    metadata: ScalesMetadata = dataclasses.field(metadata={"static": True})
    trainable_scales: bool = dataclasses.field(default=True, metadata={"static": True})

    def merged(self) -> P:
        """Returns the plain network's parameters, with K = sum_b s_b * E_b(w_b) at each kernel's path.

        The tree has the structure of the given parameters and is differentiable in weights and scales.
        """
        scales = self.extract_scales()
        if not self.trainable_scales:
            scales = jax.lax.stop_gradient(scales)
        leaves = dict(self.other_params)
        for path, kernel in merge_weights(scales, self.weights).items():
            # The merge of tensors in half precision is float32 if a branch has no scale.
            leaves[path] = kernel.astype(jnp.result_type(*self.weights[path].values()))
        return jax.tree.unflatten(self.structure, [leaves[path] for path in self.order])

    def extract_scales(self) -> Scales:
        """Returns the present scales: s_b of every scaled branch and u of the identity.

        They fit the plain parameters, like those of `surgery.extract_scales` for an NNX model.
        """
        entries = {}
        for path, branches in self.branch_sets:
            found = self.weights[path] | self.scales[path]  # the identity has a weight but no scale
            entries[path] = LayerScales(branches, {name: found[name] for name in branches.names})
        return Scales(entries, self.metadata)


def search_tree(params: P, scales: Scales, *, rngs: nnx.Rngs, trainable_scales: bool = True) -> SearchTree[P]:
    """Makes the tree that is trained in place of `params` in a search for scales.

    Args:
      params: the framework's parameters, arrays only; for an Equinox model the first part of
        `eqx.partition(model, eqx.is_inexact_array)`. They are not changed. Values of the kernels that
        `scales` name are not used: branch tensors are drawn as by `reinitialize`, from the same key for each
        path, in the kernel's dtype.
      scales: the initial scales (`Scales.depth_rule`, as published, or `Scales.ones`), which also define the
        kernels and branches of the search.
      rngs: `nnx.Rngs` with the stream `params`.
      trainable_scales: False gives the scales a gradient of 0. Do not decay them either.

    Raises:
      TypeError: `params` is an NNX model, or has leaves that are not arrays (all listed).
      ValueError: the scales do not fit (every misshapen path and every path that `params` lack), or are NaN
        or infinite.
    """
    check_rngs(rngs)
    leaves, structure = _arrays(params)
    check_finite(scales)
    check_fit(scales, params)

    def copies(values, path):
        # As for the other parameters: a step that donates the tree must not delete what the caller has.
        return {name: jnp.array(value, leaves[path].dtype) for name, value in values.items()}

    drawn = sample_weights(scales, rngs.params())
    scaled = {
        path: {b.name: entry.vectors[b.name] for b in entry.branches.branches if b.has_scale}
        for path, entry in scales.entries.items()
    }
    return SearchTree(
        other_params={path: copy_leaf(leaf) for path, leaf in leaves.items() if path not in scales.entries},
        weights={path: copies(values, path) for path, values in drawn.items()},
        scales={path: copies(values, path) for path, values in scaled.items()},
        branch_sets=tuple(scales.branch_sets.items()),
        structure=structure,
        order=tuple(leaves),
        metadata=scales.metadata,
        trainable_scales=trainable_scales,
    )


def _arrays(params: Any) -> tuple[dict[str, Any], Any]:
    """Returns the leaves of `params` by path, and their treedef."""
    if isinstance(params, nnx.Module):
        raise TypeError(
            "`params` is an NNX model, whose search model is made by `to_search`; or give its parameters, "
            "`nnx.state(model, nnx.Param)`"
        )
    leaves, structure = paths.named_leaves(params)
    if others := [
        f"{path} ({type(leaf).__name__})"
        for path, leaf in leaves.items()
        if not isinstance(leaf, (jax.Array, np.ndarray))
    ]:
        raise TypeError(
            f"`params` must hold arrays only, not {', '.join(others)}: give the arrays and keep the other "
            "leaves separate (Equinox: `eqx.partition(model, eqx.is_inexact_array)`)"
        )
    return leaves, structure
