"""A search without search layers: the network of any framework, trained through a tree of branch tensors.

A search layer runs one convolution with K = sum_b s_b * E_b(w_b), so a search needs no layers of its own:
hold w_b and s_b in a tree, merge them into the parameters that the plain network has, and call the network.
What Linen, Equinox or a function of one's own makes of the parameters stays as it is::

    tree = search_tree(params, scales, rngs=nnx.Rngs(0))  # instead of the parameters
    loss, grads = jax.value_and_grad(lambda tree: loss_of(tree.merged(), batch))(tree)
    ...
    save_scales("scales", tree.extract_scales())

NNX models need none of this: `surgery.to_search`. Runnable for each framework in `examples/with_*.py`.
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
from repopt_jax.surgery.reinitialize import Weights, merge_weights, sample_weights

P = TypeVar("P")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class SearchTree(Generic[P]):
    """Parameters of a network whose kernels are sums of branches: a pytree to differentiate and to optimize.

    Made by `search_tree`. Its leaves have the paths `other_params/<path>`, `weights/<path>/<branch>` and
    `scales/<path>/<branch>`, so that rules by name tell them apart. As published, scales are not decayed, and
    everything else is as in the plain network, the identity's u with the kernels::

        def decayed(tree):
            return paths.map_named(lambda path, _: not path.startswith("scales/"), tree)

        optax.chain(optax.add_decayed_weights(4e-5, mask=decayed), optax.sgd(0.1, 0.9, nesterov=True))

    Attributes:
      other_params: path -> parameter, of those that are not merged from branches.
      weights: path of a kernel -> branch -> w_b; of the identity u, (out,).
      scales: path of a kernel -> branch -> s_b, (out,). The identity has none.
      branch_sets: path and branches of each kernel. Static, as is all that follows.
      structure: treedef of the plain parameters.
      order: the paths of their leaves.
      metadata: of the scales from which the search starts.
      trainable_scales: False: the CSLA network of constant scales.
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
        """The parameters of the plain network, structured as those given: K = sum_b s_b * E_b(w_b) at each
        kernel's path. Differentiable in weights and scales."""
        scales = self.extract_scales()
        if not self.trainable_scales:
            scales = jax.lax.stop_gradient(scales)
        leaves = dict(self.other_params)
        for path, kernel in merge_weights(scales, self.weights).items():
            # A merge of half precision comes in float32 where a branch has no scale.
            leaves[path] = kernel.astype(jnp.result_type(*self.weights[path].values()))
        return jax.tree.unflatten(self.structure, [leaves[path] for path in self.order])

    def extract_scales(self) -> Scales:
        """What the search has found so far: s_b of every scaled branch, u of the identity, as
        `surgery.extract_scales` takes them from an NNX model. Fits the plain parameters."""
        entries = {}
        for path, branches in self.branch_sets:
            found = self.weights[path] | self.scales[path]  # of the identity, which has no scale, its weight
            entries[path] = LayerScales(branches, {name: found[name] for name in branches.names})
        return Scales(entries, self.metadata)


def search_tree(params: P, scales: Scales, *, rngs: nnx.Rngs, trainable_scales: bool = True) -> SearchTree[P]:
    """The tree to train in place of `params` in a search for scales.

    Args:
      params: parameters as the framework holds them, arrays only; of an Equinox model the first part of
        `eqx.partition(model, eqx.is_inexact_array)`. They are untouched. Values of the kernels that `scales`
        name are not used: the branch tensors are drawn as `reinitialize` draws them, from the same key for
        each path, in the kernel's dtype.
      scales: where the search starts (`Scales.depth_rule`, as published; or `Scales.ones`), and what is
        searched: the kernels and branches that they name.
      rngs: source of the draws (stream `params`).
      trainable_scales: False keeps the scales as they are: their gradient is 0. Keep decay off them too.

    Raises:
      TypeError: `params` is an NNX model, or has leaves that are no arrays (all listed).
      ValueError: the scales do not fit (every misshapen path and every one that `params` lack); NaN or
        infinite scales.
    """
    leaves, structure = _arrays(params)
    check_finite(scales)
    check_fit(scales, params)

    def copies(values, path):
        # A step that is given the tree to overwrite must not take the caller's scales with it.
        return {name: jnp.array(value, leaves[path].dtype) for name, value in values.items()}

    drawn = sample_weights(scales, rngs.params())
    scaled = {
        path: {b.name: entry.vectors[b.name] for b in entry.branches.branches if b.has_scale}
        for path, entry in scales.entries.items()
    }
    return SearchTree(
        other_params={path: leaf for path, leaf in leaves.items() if path not in scales.entries},
        weights={path: copies(values, path) for path, values in drawn.items()},
        scales={path: copies(values, path) for path, values in scaled.items()},
        branch_sets=tuple(scales.branch_sets.items()),
        structure=structure,
        order=tuple(leaves),
        metadata=scales.metadata,
        trainable_scales=trainable_scales,
    )


def _arrays(params: Any) -> tuple[dict[str, Any], Any]:
    """The leaves of `params` by path, and their structure."""
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
            f"`params` must hold arrays only, but not so {', '.join(others)}: give the arrays and keep the "
            "rest aside (Equinox: `eqx.partition(model, eqx.is_inexact_array)`)"
        )
    return leaves, structure
