"""A kernel as a function of what is trained: K = A(theta).

theta holds the tensors of a structure without batch norms and its trainable scales. It can be kept in the
network (`nn.Merged`) or in the optimizer's state (`optim.reparameterize`); both need the same three things:

    K       = A(theta)                                 merge
    dL/dtheta = A'(theta)^T g,  g = dL/dK              gradients
    theta   with A(theta) = K, nearest to theta_0      split

A is linear where the scales are constant and no chain is a product of tensors; `core.branches` has the rules
that follow from that. Nothing here needs it.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from repopt_jax.arguments import check_kind
from repopt_jax.core import algebra, paths
from repopt_jax.core.branches import (
    BranchSet,
    Kernel,
    Shape,
    canonical_order,
    canonical_shape,
    check_layout,
    from_canonical,
    to_canonical,
)
from repopt_jax.core.published import of_branches
from repopt_jax.core.scales import Scales, is_concrete
from repopt_jax.core.structure import Affine, Geometry, Part, Structure

# {"weights": key of a stage -> its tensor, "scales": key -> the trainable factor after the stage}
Theta = dict[str, dict[str, jax.Array]]


@dataclasses.dataclass(frozen=True)
class Parametrization:
    """The structure of one kernel, or of each of several equal kernels stacked in one array.

    It is static and hashable; arrays are passed to its methods. The arrays of theta have the axes of the
    stack in front, and the axes of one layer in the order of `Structure`, whatever `layout` says.

    Attributes:
      structure: the structure of one layer; without batch norms inside the sum.
      stack: leading axes of all arrays; () for a single layer.
      layout: axis order of kernels, as in `BranchSet`.
      shape: shape of one kernel in this layout, needed where it has several axes of inputs or outputs.

    Raises:
      ValueError: at construction, for a structure with a batch norm inside, because its kernel depends on the
        data; or an unknown `layout`.
    """

    structure: Structure
    stack: Shape = ()
    layout: str = "...io"
    shape: Shape = ()

    def __post_init__(self) -> None:
        if normed := self.structure.followers("norm"):
            raise ValueError(
                f"{', '.join(normed)} have batch norms, so that the kernel is not a function of what is "
                "trained: keep this structure in the network (`to_structure`)"
            )
        check_layout(self.layout)
        if self.shape and canonical_shape(self.shape, self.layout) != self.structure.layer.kernel:
            raise ValueError(
                f"`shape` is {self.shape} in the layout {self.layout!r}: it must be one of the kernel "
                f"{self.structure.layer.kernel}"
            )

    @classmethod
    def of_branch_set(cls, branches: BranchSet) -> "Parametrization":
        """Returns these branches, each with a trainable scale.

        The set knows no strides and no padding, on which a kernel does not depend.
        """
        *window, inputs, out = branches.canonical
        layer = Geometry(tuple(window), inputs * branches.groups, out, branches.groups)
        shape = branches.layer.kernel
        return cls(of_branches(branches, layer), branches.stack, branches.layout, shape)

    @property
    def kernel(self) -> Shape:
        """Shape of the merged kernel, with the axes of the stack in front."""
        return (*self.stack, *self._one)

    @property
    def _one(self) -> Shape:
        if self.shape:
            return self.shape
        kernel = self.structure.layer.kernel
        order = canonical_order(self.layout, len(kernel))
        return tuple(kernel[order.index(axis)] for axis in range(len(kernel)))

    @property
    def is_product(self) -> bool:
        """Whether a chain is a product of several trained tensors, which zeros cannot start."""
        chains = self.structure.placed.values()
        return any(p.stage.trained and not p.stage.residual for chain in chains for p in chain[:-1])

    def shapes(self) -> dict[str, dict[str, Shape]]:
        """Shapes of theta's arrays."""
        scaled = self.structure.followers("scale")
        return {
            "weights": {key: (*self.stack, *shape) for key, shape in self.structure.shapes().items()},
            "scales": {key: (*self.stack, part.channels) for key, part in scaled.items()},
        }

    def merge(self, theta: Mapping[str, Mapping[str, jax.Array]]) -> jax.Array:
        """K = A(theta)."""
        return self._from_canonical(self._by_layer(self._merge)(theta))

    def gradients(self, theta: Mapping[str, Mapping[str, jax.Array]], g: jax.Array) -> Theta:
        """dL/dtheta = A'(theta)^T g, from g = dL/dK."""
        kernel, transpose = jax.vjp(self.merge, theta)
        (gradients,) = transpose(g.astype(kernel.dtype))
        return gradients

    def sample(self, key: jax.Array, *, dtype: Any = jnp.float32) -> Theta:
        """Draws theta as each stage's own layer would be initialised, with the stages' initial scales."""
        draw = functools.partial(self.structure.sample, dtype=dtype)
        keys = jax.random.split(key, self.stack) if self.stack else key
        return {"weights": self._by_layer(draw)(keys), "scales": self._start(dtype)}

    def split(
        self,
        kernel: jax.Array,
        near: Mapping[str, Mapping[str, jax.Array]] | None = None,
        *,
        scales: Mapping[str, jax.Array] | None = None,
    ) -> Theta:
        """Returns a theta that merges into `kernel`, in its dtype: of least norm, or nearest to `near`.

        Of each chain the last tensor is moved, and nothing else: in these tensors A is affine, and the change
        is the one of least norm. If they cannot express the kernel (no branch is as large as the window), the
        result merges into the nearest kernel that they can express.

        Args:
          kernel: the merged kernel.
          near: where to start; None for tensors of zeros, with which the moved tensors have least norm.
          scales: the scales of theta; by default those of `near`, or else the stages' initial ones.

        Raises:
          ValueError: there is no `near`, and a chain is a product of tensors, of which zeros express nothing.
        """
        wide = jnp.promote_types(kernel.dtype, jnp.float32)
        if near is None:
            if self.is_product:
                raise ValueError(
                    "a chain is a product of several trained tensors, for which there is no theta of least "
                    "norm: give `near`, for example what `sample` draws"
                )
            shapes = self.shapes()["weights"]
            near = {
                "weights": {k: jnp.zeros(s, wide) for k, s in shapes.items()},
                "scales": self._start(wide),
            }
        near = {
            "weights": dict(near["weights"]),
            "scales": dict(near["scales"] if scales is None else scales),
        }
        near = jax.tree.map(lambda x: jnp.asarray(x).astype(wide), near)
        found = _split_all(self, kernel.astype(wide), near)
        return jax.tree.map(lambda x: x.astype(kernel.dtype), found)

    def scales(self, trained: Mapping[str, jax.Array], stack: Shape = ()) -> dict[str, jax.Array]:
        """Returns the factors after all stages, of which the constant ones are not part of theta."""
        dtype = jnp.result_type(*trained.values(), jnp.float32)
        constant = self.structure.followers("constant").items()
        return dict(trained) | {
            key: jnp.full((*stack, part.channels), part.stage.start, dtype) for key, part in constant
        }

    def _merge(self, theta: Mapping[str, Mapping[str, jax.Array]]) -> jax.Array:
        weights = theta["weights"]
        dtype = jnp.result_type(*weights.values()) if weights else jnp.float32
        affines: dict[str, Affine] = {k: (s, None) for k, s in self.scales(theta["scales"]).items()}
        return self.structure.merge(weights, affines, dtype=dtype)[0]

    def _branch_set(self) -> BranchSet | None:
        """Returns the structure as a branch set, if it is one whose branches all place coordinates."""
        try:
            branches = self.structure.branch_set()
        except ValueError:
            return None
        return branches if branches.elementwise else None

    def _start(self, dtype: Any) -> dict[str, jax.Array]:
        scaled = self.structure.followers("scale")
        return {k: jnp.full((*self.stack, p.channels), p.stage.start, dtype) for k, p in scaled.items()}

    def _split(self, kernel: jax.Array, near: Theta) -> Theta:
        """Does the work of `split` for one layer: d of least norm with A(near + d) = kernel."""
        moved = [chain[-1].key for chain in self.structure.placed.values() if chain[-1].stage.trained]
        weights = near["weights"]

        def merge(part: Mapping[str, jax.Array]) -> jax.Array:
            return self._merge({"weights": weights | dict(part), "scales": near["scales"]})

        start = {key: weights[key] for key in moved}
        if branches := self._branch_set():  # for which the change is known in closed form
            change = branches.split(kernel - merge(start), self.scales(near["scales"]))
        else:
            merged, forward = jax.linearize(merge, start)
            change = algebra.least_norm(forward, kernel - merged, start)
        found = {key: start[key] + change[key] for key in moved}
        # What the iteration has left is the kernel's own branch's, so that nothing is lost by rounding.
        if own := self._own_part():
            ones = jnp.ones((own.channels,), kernel.dtype)
            s = own.spread(self.scales(near["scales"]).get(own.key, ones))
            inverse = jnp.where(s == 0, 0, 1 / jnp.where(s == 0, 1, s)).astype(kernel.dtype)
            found[own.key] = found[own.key] + algebra.scale_output(kernel - merge(found), inverse)
        return {"weights": weights | found, "scales": near["scales"]}

    def _own_part(self) -> Part | None:
        """Returns the chain that is only a kernel over the whole window, if there is one."""
        for chain in self.structure.placed.values():
            (part, *others) = chain
            if not others and part.stage.map == Kernel(self.structure.layer.window) and part.stage.trained:
                return part
        return None

    def _by_layer(self, fn: Callable[..., Any]) -> Callable[..., Any]:
        return algebra.over_stack(fn, self.stack)

    def _to_canonical(self, kernel: jax.Array) -> jax.Array:
        return self._by_layer(functools.partial(to_canonical, layout=self.layout))(kernel)

    def _from_canonical(self, kernel: jax.Array) -> jax.Array:
        return self._by_layer(functools.partial(from_canonical, layout=self.layout, shape=self._one))(kernel)


@functools.partial(jax.jit, static_argnums=0)
def _split_all(parametrization: Parametrization, kernel: jax.Array, near: Theta) -> Theta:
    """Does the work of `Parametrization.split`, compiled for the same reason as that of a branch set."""
    return parametrization._by_layer(parametrization._split)(parametrization._to_canonical(kernel), near)


def check_structures(name: str, structures: Any) -> None:
    """Raises TypeError if an argument that must be `Scales`, or the structures of kernels by their paths, is
    something else."""
    what = "`Scales`, or a mapping of paths to structures"
    check_kind(name, structures, (Scales, Mapping), what, remedy="`load_scales` reads a file")
    if isinstance(structures, Scales):
        return
    wrong = [f"{p} ({type(s).__name__})" for p, s in structures.items() if not isinstance(s, Parametrization)]
    if wrong:
        raise TypeError(
            f"`{name}` holds {', '.join(wrong)}: they must be `Parametrization`s, such as "
            "`find_parametrizations` returns"
        )


def check_kernels(structures: Mapping[str, Parametrization], leaves: Mapping[str, Any]) -> None:
    """Raises ValueError, with every path, if parameters lack kernels of the structures or have others."""
    expected = {path: structure.kernel for path, structure in structures.items()}
    found = {path: tuple(leaves[path].shape) for path in expected if path in leaves}
    if difference := paths.describe_difference(expected, found, noun="kernels"):
        raise ValueError(f"the structures do not fit the parameters: {difference}")


def other_kernels(
    merges: Mapping[str, tuple[Callable[..., jax.Array], tuple[Any, ...]]],
    leaves: Mapping[str, Any],
    tolerance: float,
) -> list[str]:
    """Returns the paths at which branches merge into another kernel than that of the parameters.

    Arrays without values, of a traced or abstract call, and those that other processes hold a part of are
    not looked at.

    Args:
      merges: path -> (how branches are merged, its arguments).
      leaves: path -> parameter.
      tolerance: largest difference, relative to the kernel's largest entry, beside the rounding of the sum:
        terms that cancel are rounded by their own size, not by that of the kernel, which may be zero.
    """

    def known(x: Any) -> bool:
        return is_concrete(x) and getattr(x, "is_fully_addressable", True)

    wrong = []
    for path, (merge, arrays) in merges.items():
        if not all(map(known, jax.tree.leaves((arrays, leaves[path])))):
            continue
        merged = merge(*arrays), merge(*jax.tree.map(jnp.abs, arrays))
        if not all(map(is_concrete, merged)):  # what is computed while a function is traced has no value
            continue
        kernel, size = (np.asarray(x, np.float64) for x in merged)
        k = np.asarray(leaves[path], np.float64)
        rounding = 4 * float(jnp.finfo(leaves[path].dtype).eps) * np.abs(size).max()
        if not np.abs(kernel - k).max() <= tolerance * np.abs(k).max() + rounding:
            wrong.append(path)
    return wrong


def parametrizations(scales: Scales) -> dict[str, Parametrization]:
    """Returns the branches of each layer of `scales` with trainable scales, by the kernel's path."""
    return {path: Parametrization.of_branch_set(entry.branches) for path, entry in scales.entries.items()}


def theta_of(scales: Scales, weights: Mapping[str, Mapping[str, jax.Array]]) -> dict[str, Theta]:
    """Returns the theta of each layer: branch tensors, and `scales` as the values of trainable scales.

    Args:
      scales: the initial scales.
      weights: path -> branch -> w_b, as `reinitialize(..., return_weights=True)` returns them. A path that it
        lacks has no tensors in the result, which whoever checks it against the structures will name.
    """
    vectors = scale_vectors(scales)
    return {
        path: {"weights": dict(weights.get(path, {})), "scales": vectors[path]} for path in scales.entries
    }


def scale_vectors(scales: Scales) -> dict[str, dict[str, jax.Array]]:
    """Returns the vectors of the scaled branches of each layer, without the identities' weights."""
    return {
        path: {b.name: entry.vectors[b.name] for b in entry.branches.branches if b.has_scale}
        for path, entry in scales.entries.items()
    }
