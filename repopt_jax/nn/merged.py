"""A layer that merges its branches and runs one convolution: the structure is kept in the weights.

    y = conv(x, K),  K = A(weights, scales)

If there is no norm inside the sum, the branches are linear, so merging them in weight space gives the same
function and gradients as running every branch, at about the time and the activation memory of a plain layer.
With scales it is the layer of RepOptimizer's search (ICLR 2023, section 3.1), whose published code runs every
branch.
"""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from repopt_jax.core import paths
from repopt_jax.core.branches import BranchSet, Shape
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

    def __init__(self, structure: Structure, *, rngs: nnx.Rngs, **options: Any):
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


class MergedGeneral(Merged):
    """A dense layer over several axes, `nnx.LinearGeneral` or an `nnx.Einsum` that is one, likewise.

    The axes of its inputs are one for the structure, in their order, and so are those of its outputs. Its
    bias has the axes of the outputs.

    Attributes:
      inputs, outputs: sizes of the axes of the inputs and outputs.

    Args:
      structure: of the dense layer prod(inputs) -> prod(outputs).
      bias: initial bias (*stack, *outputs), or None.

    Raises:
      ValueError: as `Merged`; sizes or a bias that do not fit the structure.
    """

    def __init__(
        self,
        structure: Structure,
        *,
        inputs: Shape,
        outputs: Shape,
        bias: jax.Array | None = None,
        rngs: nnx.Rngs,
        **options: Any,
    ):
        super().__init__(structure, rngs=rngs, **options)
        self.inputs: Shape = tuple(inputs)
        self.outputs: Shape = tuple(outputs)
        layer, stack = structure.layer, options.get("stack", ())
        if layer.axes or (math.prod(inputs), math.prod(outputs)) != (layer.inputs, layer.outputs):
            raise ValueError(f"`inputs` {inputs} and `outputs` {outputs} are not those of {layer}")
        if bias is not None and bias.shape != (*stack, *self.outputs):
            raise ValueError(f"`bias` has the shape {bias.shape}: it must be {(*stack, *self.outputs)}")
        bias_param = None if bias is None else nnx.Param(jnp.asarray(bias, self.param_dtype))
        self.bias: nnx.Param[jax.Array] | None = nnx.data(bias_param)

    @property
    def in_features(self) -> Shape:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Sizes of the axes of the inputs, as in `nnx.LinearGeneral`."""
        return self.inputs

    @property
    def out_features(self) -> Shape:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Sizes of the axes of the outputs, as in `nnx.LinearGeneral`."""
        return self.outputs

    def __call__(self, x: jax.Array, out_sharding: Any = None) -> jax.Array:
        """(*batch, *inputs) -> (*batch, *outputs).

        Raises:
          ValueError: the arrays are those of stacked layers; or an `out_sharding`, which attention passes on
            and a layer of branches does not have.
        """
        if out_sharding is not None:
            raise ValueError(f"`out_sharding` is {out_sharding}: a layer of branches takes None")
        self._check_one()
        batch = x.shape[: x.ndim - len(self.inputs)]
        joined = math.prod(x.shape[len(batch) :])
        y = self._run_merged(x.reshape(*batch, joined), self.structure_kernel())
        y = y.reshape(*batch, *self.outputs)
        if self.bias is None:
            return y
        return y + jnp.asarray(self.bias[...], y.dtype).reshape((1,) * len(batch) + self.outputs)

    def structure_kernel(self) -> jax.Array:
        """Returns K as one matrix, (prod(inputs), prod(outputs)), with the axes of the stack in front."""
        return super().merged_kernel()

    def merged_kernel(self) -> jax.Array:
        """Returns K, (*inputs, *outputs), with the axes of the stack in front for stacked layers."""
        return self.structure_kernel().reshape(*self.stack, *self.inputs, *self.outputs)

    def branch_set(self) -> BranchSet:
        """Returns the branch set with the kernel's axes, (*stack, *inputs, *outputs), in its layout."""
        plain = super().branch_set()
        shape = (*plain.stack, *self.inputs, *self.outputs)
        return dataclasses.replace(plain, kernel=shape, layout=layout_of(self.inputs, self.outputs))


def layout_of(inputs: Shape, outputs: Shape) -> str:
    """Returns the layout of a kernel (*inputs, *outputs), as in `BranchSet`."""
    return "...io" if len(inputs) == len(outputs) == 1 else "i" * len(inputs) + "o" * len(outputs)
