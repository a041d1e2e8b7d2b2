"""A layer that merges its branches and runs one convolution: the structure is kept in the weights.

    y = conv(x, K),  K = A(weights, scales)

If there is no norm inside the sum, the branches are linear, so merging them in weight space gives the same
function and gradients as running every branch, at about the time and the activation memory of a plain layer.
With scales it is the layer of RepOptimizer's search (ICLR 2023, section 3.1), whose published code runs every
branch.
"""

import jax
from flax import nnx

from repopt_jax.core import paths
from repopt_jax.core.branches import BranchSet
from repopt_jax.core.structure import Structure
from repopt_jax.nn.branched import StructuredLayer
from repopt_jax.nn.geometry import one_batch_axis


class Merged(StructuredLayer):
    """A layer that merges its structure into one kernel before each use.

    See `nn.StructuredLayer` for attributes and arguments.

    Raises:
      ValueError: as `nn.StructuredLayer`; or a structure with a batch norm inside, which is not linear in
        training and needs `nn.Branched`.
    """

    def __init__(self, structure: Structure, *, rngs: nnx.Rngs, **options):
        if normed := structure.followers("norm"):
            raise ValueError(
                f"{paths.listed(list(normed))} have batch norms, so that the branches cannot be merged "
                "before they have been trained: use nn.Branched"
            )
        super().__init__(structure, rngs=rngs, **options)

    def __call__(self, x: jax.Array) -> jax.Array:
        """(*batch, *spatial, in) -> (*batch, *spatial', out), with any number of batch axes, also none.

        Raises:
          ValueError: the arrays are those of stacked layers.
        """
        self._check_one()
        x, batch = one_batch_axis(x, self.structure.layer.axes)
        return self._finish(self._run_merged(x, self.merged_kernel()), batch)

    def merged_kernel(self) -> jax.Array:
        """Returns K, (*spatial, in/groups, out), with the axes of the stack in front for stacked layers."""
        kernel, _ = self.kernel_and_bias()
        return kernel

    def branch_set(self) -> BranchSet:
        """Returns the branch set that scales files and optimizers use, with the axes of a stack.

        Raises:
          ValueError: as `Structure.branch_set`, and as `stack`.
        """
        return self.structure.branch_set(stack=self.stack)
