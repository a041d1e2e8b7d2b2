"""A linear layer that can be made of branches: where its kernel is, and what it does with it."""

import dataclasses
from collections.abc import Sequence
from typing import TypeAlias

from repopt_jax.core import paths
from repopt_jax.core.branches import Branch, BranchSet, Shape
from repopt_jax.core.parametrization import Parametrization
from repopt_jax.core.published import repopt
from repopt_jax.core.structure import Geometry, Structure

Chosen: TypeAlias = Sequence[Branch] | BranchSet | None


@dataclasses.dataclass(frozen=True)
class Layer:
    """A convolution or a dense layer that can be re-parameterized.

    Attributes:
      path: path of its kernel in the model, `encoder/0/conv/kernel`.
      geometry: its geometry.
      stack: leading axes of its arrays, along which equal layers are stacked; () for a single layer.
      has_bias: whether it has a bias.
      layout: order of the kernel's axes, as in `BranchSet`.
      shape: shape of the kernel with the axes of the stack; () for (*stack, *window, in/groups, out).
      uses: how often the layer is run in a call of the network; 0 if it was found without a call.
      readers: what reads its output, after a bias: the primitives with the parameters that they take, such as
        "sub bn/mean", and "output" if it is an output of the network, up to a factor and the order of its
        entries; empty if it was found without a call.
    """

    path: str
    geometry: Geometry
    stack: Shape = ()
    has_bias: bool = False
    layout: str = "...io"
    shape: Shape = ()
    uses: int = 0
    readers: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """The path of the layer itself, `encoder/0/conv`."""
        return self.path.rpartition("/")[0]

    @property
    def kernel(self) -> Shape:
        """Shape of the kernel, with the axes of the stack in front."""
        return self.shape or (*self.stack, *self.geometry.kernel)

    def parametrization(self, structure: Structure) -> Parametrization:
        """Returns this structure of one layer as the kernel's function of what is trained.

        Raises:
          ValueError: the structure has batch norms inside.
        """
        shape = self.kernel[len(self.stack) :]
        return Parametrization(structure, self.stack, self.layout, shape)

    def branch_set(self, branches: Chosen = None) -> BranchSet:
        """Returns these branches as a set for this layer; those of `repopt` for None.

        Raises:
          ValueError: a branch that is not defined for this layer, or a `BranchSet` of another kernel.
        """
        if branches is None:
            branches = repopt(self.geometry).branch_set().branches
        stacked, groups = len(self.stack), self.geometry.groups
        if not isinstance(branches, BranchSet):
            if not isinstance(branches, Sequence) or not all(isinstance(b, Branch) for b in branches):
                raise ValueError(f"{branches!r} is neither a sequence of branches nor a `BranchSet`")
            return BranchSet(self.kernel, tuple(branches), groups, self.layout, stacked)
        expected = {"kernel": self.kernel, "groups": groups, "layout": self.layout, "stacked": stacked}
        found = {name: getattr(branches, name) for name in expected}
        if difference := paths.describe_difference(expected, found, noun="attributes"):
            raise ValueError(f"the branch set is of another layer: {difference}")
        return branches
