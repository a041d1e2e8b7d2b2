"""A linear layer as a sum of branches: K = sum_b s_b * E_b(w_b).

K is the merged kernel, of shape (*spatial, in/groups, out). Branch b has a tensor w_b and an embedding E_b, a
fixed linear map from w_b to the shape of K; s_b is a constant with one entry for each output channel. Each
kind of branch is one class, which defines the tensor's shape and the embedding. Merging, the SGD rule P(g),
its elementwise multiplier and re-initialisation are derived here for every set of branches:

    K       = sum_b s_b * E_b(w_b)               merge
    dL/dw_b = E_b^T(s_b * g),  g = dL/dK         branch_gradients
    P(g)    = sum_b s_b * E_b(E_b^T(s_b * g))    precondition
    m       = sum_b |s_b|^power * E_b(1)         multiplier
    mean(m) = trace(P) / size of K               mean_multiplier
    K -> w  = E_b^T(s_b * P^+(K)), least norm    split

Where every E_b places coordinates, P(g) = m * g at power 2. Equal layers whose kernels are stacked in one
array (made by `nnx.vmap`, run by `nnx.scan`) are one set with `stacked` > 0: every formula then holds for
each layer of the stack separately.

The identity branch has s = 1 and a trainable weight for each channel, so it contributes 1 to m on its
diagonal.
Source: "Re-parameterizing Your Optimizers rather than Architectures" (ICLR 2023), section 3 and appendix A.
"""

import abc
import dataclasses
import functools
import json
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from repopt_jax import jsontext
from repopt_jax.core import algebra

Shape = tuple[int, ...]
T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class Branch(abc.ABC):
    """One linear branch. Subclasses define the shape of its tensor and how it is embedded in the kernel.

    Raises:
      TypeError: from the definition of a subclass that has the name of one in another file, because files of
        scales know branches by the names of their classes. A class may be defined once more in its own file.
    """

    has_scale: ClassVar[bool] = True  # False: the constant scale is 1 (the identity)
    places: ClassVar[bool] = True  # E_b puts each entry of w_b at one entry of K, no two at the same
    # By class name, so that a scales file can be read back.
    types: ClassVar[dict[str, type["Branch"]]] = {}

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        taken = Branch.types.get(cls.__name__, cls)
        if taken is not cls and _file_of(taken) != _file_of(cls):
            raise TypeError(
                f"the class {cls.__name__} of {cls.__module__} has the name of a branch of "
                f"{taken.__module__}, by which scales files are read: give it another name"
            )
        Branch.types[cls.__name__] = cls

    @property
    @abc.abstractmethod
    def name(self) -> str:
        """Short name, unique within a branch set; part of parameter paths, so without `/`."""

    @abc.abstractmethod
    def shape(self, kernel: Shape) -> Shape:
        """Shape of w_b for a layer whose merged kernel has shape `kernel`."""

    @abc.abstractmethod
    def embed(self, w: jax.Array, kernel: Shape) -> jax.Array:
        """E_b(w_b): linear in w, of shape `kernel`."""

    def support(self, kernel: Shape) -> jax.Array:
        """E_b(1) as a boolean array of iota comparisons, for branches that place coordinates."""
        raise TypeError(f"branch {self.name} places no coordinates, so it has no support")

    def energy(self, kernel: Shape) -> np.ndarray:
        """Sum of the squares of E_b's entries in each output channel, (out,): its part of the trace of P.

        Where E_b places coordinates it counts them. The general form embeds every basis vector of w_b, which
        takes long for large kernels; subclasses that know the sum give it.
        """
        with jax.ensure_compile_time_eval():  # numbers of the layer, also inside a traced update
            if self.places:
                return np.asarray(self.support(kernel)).sum(axis=tuple(range(len(kernel) - 1)))
            shape = self.shape(kernel)
            embed = jax.jit(lambda w: self.embed(w, kernel))
            total = np.zeros(kernel[-1])
            for index in np.ndindex(*shape):
                w = np.zeros(shape, np.float32)
                w[index] = 1
                total += np.square(np.asarray(embed(w), np.float64)).reshape(-1, kernel[-1]).sum(axis=0)
            return total

    def sample(self, key: jax.Array, kernel: Shape, dtype: Any) -> jax.Array:
        """Draws w_b as the branch's own layer would be initialised: uniform(-1/sqrt(fan_in), 1/sqrt(fan_in)).

        This is the default of PyTorch's layers, on which RepVGG, RepOptimizer, DBB and MobileOne all rely.
        """
        shape = self.shape(kernel)
        bound = 1 / math.sqrt(math.prod(shape[:-1]))
        return jax.random.uniform(key, shape, dtype, -bound, bound)

    def tied(self, kernel: Shape) -> int:
        """Number of consecutive output channels, counted from 0, that one entry of w_b may reach."""
        return 1

    def check(self, kernel: Shape, groups: int) -> None:  # noqa: B027  (optional: most branches fit any layer)
        """Raises ValueError with the reason if the branch is not defined for this layer."""


@dataclasses.dataclass(frozen=True)
class Kernel(Branch):
    """A convolution with a kernel of spatial shape `size`, dilated, centred in the layer's window.

    In a 3x3 layer, `Kernel((3, 3))` is the layer's own kernel, `Kernel((1, 1))` its 1x1 branch and
    `Kernel((1, 3))` ACNet's horizontal one; `Kernel(())` is the weight of a dense layer. `dilation` is
    relative to the layer's own.
    """

    size: Shape
    dilation: Shape = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "size", tuple(self.size))
        object.__setattr__(self, "dilation", tuple(self.dilation) or (1,) * len(self.size))

    @property
    def name(self) -> str:
        name = "x".join(map(str, self.size)) or "dense"
        return name if set(self.dilation) <= {1} else f"{name}_d{'x'.join(map(str, self.dilation))}"

    def taps(self, kernel: Shape) -> tuple[algebra.Taps, ...]:
        """For each axis of the layer's window, the taps that the branch's kernel reaches."""
        return algebra.centred_taps(self.size, kernel[:-2], self.dilation)

    def shape(self, kernel: Shape) -> Shape:
        return (*self.size, *kernel[-2:])

    def embed(self, w: jax.Array, kernel: Shape) -> jax.Array:
        return algebra.place(w, kernel[:-2], self.taps(kernel))

    def support(self, kernel: Shape) -> jax.Array:
        return algebra.covers(kernel, self.taps(kernel))

    def energy(self, kernel: Shape) -> np.ndarray:
        return np.full(kernel[-1], math.prod(self.shape(kernel)[:-1]))

    def check(self, kernel: Shape, groups: int) -> None:
        self.taps(kernel)


@dataclasses.dataclass(frozen=True)
class Identity(Branch):
    """y = u * x with a trainable u for each channel, which starts at its searched value. The scale is 1."""

    has_scale: ClassVar[bool] = False

    @property
    def name(self) -> str:
        return "identity"

    def shape(self, kernel: Shape) -> Shape:
        return (kernel[-1],)

    def embed(self, w: jax.Array, kernel: Shape) -> jax.Array:
        return algebra.identity(w, kernel)

    def support(self, kernel: Shape) -> jax.Array:
        return algebra.diagonal(kernel)

    def energy(self, kernel: Shape) -> np.ndarray:
        return np.ones(kernel[-1])

    def sample(self, key: jax.Array, kernel: Shape, dtype: Any) -> jax.Array:
        return jnp.ones(self.shape(kernel), dtype)

    def check(self, kernel: Shape, groups: int) -> None:
        algebra.centre_tap(kernel[:-2])
        _check_own_channels("the identity", kernel, groups)


@dataclasses.dataclass(frozen=True)
class Pool(Branch):
    """Average pooling of each channel over the layer's window: y = v * mean of x, padding counted.

    v is a vector like the identity's, all ones in a structure that does not train it. Like the identity,
    pooling needs as many input as output channels. E E^T mixes the taps, so there is no elementwise
    multiplier.
    """

    has_scale: ClassVar[bool] = False
    places: ClassVar[bool] = False

    @property
    def name(self) -> str:
        return "pool"

    def shape(self, kernel: Shape) -> Shape:
        return (kernel[-1],)

    def embed(self, w: jax.Array, kernel: Shape) -> jax.Array:
        return algebra.channel_average(w, kernel)

    def energy(self, kernel: Shape) -> np.ndarray:
        return np.full(kernel[-1], 1 / math.prod(kernel[:-2]))

    def sample(self, key: jax.Array, kernel: Shape, dtype: Any) -> jax.Array:
        return jnp.ones(self.shape(kernel), dtype)

    def check(self, kernel: Shape, groups: int) -> None:
        _check_own_channels("average pooling", kernel, groups)


@dataclasses.dataclass(frozen=True)
class Average(Branch):
    """A 1x1 convolution followed by average pooling over the layer's window, padding counted.

    E E^T mixes the taps, so this branch has no elementwise multiplier, and the SGD rule is P(g).
    """

    places: ClassVar[bool] = False

    @property
    def name(self) -> str:
        return "average"

    def shape(self, kernel: Shape) -> Shape:
        return (*(1,) * (len(kernel) - 2), *kernel[-2:])

    def embed(self, w: jax.Array, kernel: Shape) -> jax.Array:
        return algebra.average(w, kernel[:-2])

    def energy(self, kernel: Shape) -> np.ndarray:
        return np.full(kernel[-1], kernel[-2] / math.prod(kernel[:-2]))


@dataclasses.dataclass(frozen=True)
class Frequency(Branch):
    """A 1x1 kernel times a fixed table of cosines over the window, `algebra.frequencies`: OREPA's frequency
    prior (arXiv 2204.00826, section 3.2).

    K[h, w, i, o] = w[i, o] * table[h, w, o]. E E^T mixes the taps, so the SGD rule is P(g). The table is
    computed for the layer and is not part of scales files.
    """

    places: ClassVar[bool] = False

    @property
    def name(self) -> str:
        return "frequency"

    def shape(self, kernel: Shape) -> Shape:
        return (*(1,) * (len(kernel) - 2), *kernel[-2:])

    def embed(self, w: jax.Array, kernel: Shape) -> jax.Array:
        return w * jnp.asarray(algebra.frequencies(kernel), w.dtype)

    def energy(self, kernel: Shape) -> np.ndarray:
        table = algebra.frequencies(kernel)
        return kernel[-2] * np.square(table).sum(axis=tuple(range(table.ndim - 1)))

    def check(self, kernel: Shape, groups: int) -> None:
        if len(kernel) == 2:
            raise ValueError("a dense layer has no window over which a frequency could be defined")


@dataclasses.dataclass(frozen=True)
class AfterPointwise(Branch):
    """A non-trainable 1x1 convolution C followed by a centred kernel of spatial shape `size`.

    K[..., i, o] = sum_m C[i, m] * w[..., m, o] at the taps of `size`. It is the 1x1 -> kxk sequence of DBB
    (arXiv 2103.13425, section 3.2) with a constant first part, because there is no constant rule if both are
    trained. E E^T mixes input channels, so the SGD rule is P(g). A batch norm or a bias between the two
    convolutions is not part of the branch.

    Attributes:
      size: spatial shape of w, which is (*size, mid, out).
      matrix: C, (in/groups, mid) for all groups or (groups, in/groups, mid). It is kept as nested tuples,
        because it belongs to the description of the layer and is written to scales files. In compiled
        programs it is a constant of in/groups * mid numbers (a ninth of a 3x3 kernel at mid = out).

    Raises:
      ValueError: at construction, if the matrix has another rank or holds NaN or infinity.
    """

    size: Shape
    matrix: tuple[tuple[tuple[float, ...], ...], ...]

    places: ClassVar[bool] = False

    def __post_init__(self) -> None:
        matrix = np.asarray(self.matrix, np.float64)
        if matrix.ndim not in (2, 3) or not matrix.size or not np.isfinite(matrix).all():
            raise ValueError(
                f"`matrix` has shape {matrix.shape}: it must be finite numbers of shape (in/groups, mid) or "
                "(groups, in/groups, mid)"
            )
        object.__setattr__(self, "size", tuple(int(n) for n in self.size))
        object.__setattr__(self, "matrix", _nested_tuples(matrix.reshape(-1, *matrix.shape[-2:]).tolist()))

    @property
    def name(self) -> str:
        return f"fixed_{'x'.join(map(str, self.size)) or 'dense'}"

    def shape(self, kernel: Shape) -> Shape:
        return (*self.size, len(self.matrix[0][0]), kernel[-1])

    def embed(self, w: jax.Array, kernel: Shape) -> jax.Array:
        taps = algebra.centred_taps(self.size, kernel[:-2], (1,) * len(self.size))
        return algebra.place(algebra.after_pointwise(w, self.pointwise(w.dtype)), kernel[:-2], taps)

    def energy(self, kernel: Shape) -> np.ndarray:
        by_group = math.prod(self.size) * np.square(np.asarray(self.matrix)).sum(axis=(1, 2))
        return np.repeat(by_group, kernel[-1] // len(by_group))

    def pointwise(self, dtype: Any) -> jax.Array:
        """C as an array (1 or groups, in/groups, mid)."""
        return jnp.asarray(np.asarray(self.matrix), dtype)

    def check(self, kernel: Shape, groups: int) -> None:
        algebra.centred_taps(self.size, kernel[:-2], (1,) * len(self.size))
        if len(self.matrix) not in (1, groups) or len(self.matrix[0]) != kernel[-2]:
            raise ValueError(
                f"its matrix, (groups, in/groups, mid) = {np.shape(self.matrix)}, must have {kernel[-2]} "
                f"input channels in 1 or {groups} groups"
            )


@dataclasses.dataclass(frozen=True)
class Local(Branch):
    """A convolution inside the window, of spatial shape `size`, in a layer with an output for each position.

    Such a layer is dense over a map: its outputs are maps of the window's shape, and channel s T + p is
    position p of map s, T positions to a map. The branch is a convolution of the window's pixels, with stride
    1 and zeros around the window. Each entry of w lands at many entries of K (a banded Toeplitz matrix for
    each map), so there is no elementwise multiplier, and the SGD rule is P(g). Source: RepMLPNet (arXiv
    2112.11081), locality injection.

    Attributes:
      size: spatial shape of w, which is (*size, in/groups, maps); odd, and at most 2 n - 1 in a window of n.
    """

    size: Shape

    places: ClassVar[bool] = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "size", tuple(int(n) for n in self.size))

    @property
    def name(self) -> str:
        return f"local_{'x'.join(map(str, self.size))}"

    def shape(self, kernel: Shape) -> Shape:
        return (*self.size, kernel[-2], kernel[-1] // math.prod(kernel[:-2]))

    def embed(self, w: jax.Array, kernel: Shape) -> jax.Array:
        return algebra.inject(w, kernel[:-2])

    def energy(self, kernel: Shape) -> np.ndarray:
        taps = np.ones(())  # that the window holds, of each position
        for size, n in zip(self.size, kernel[:-2]):
            distance = np.abs(np.arange(n)[:, None] - np.arange(n))
            taps = np.multiply.outer(taps, (distance <= size // 2).sum(axis=1))
        return np.tile(kernel[-2] * taps.ravel(), kernel[-1] // taps.size)

    def tied(self, kernel: Shape) -> int:
        return math.prod(kernel[:-2])

    def check(self, kernel: Shape, groups: int) -> None:
        *window, _, out = kernel
        if not window:
            raise ValueError("a dense layer without spatial axes has no window to be inside of")
        if len(self.size) != len(window) or any(
            k < 1 or k % 2 == 0 or k >= 2 * n for k, n in zip(self.size, window)
        ):
            raise ValueError(
                f"`size` {self.size} must have an odd side below 2 * n for each side n of the window "
                f"{tuple(window)}: beyond that no position has the taps"
            )
        if out % (groups * math.prod(window)):
            raise ValueError(
                f"the layer has {out} outputs in {groups} groups, where it needs maps of "
                f"{math.prod(window)} outputs, one for each position of the window {tuple(window)}, in each "
                "group"
            )


@dataclasses.dataclass(frozen=True)
class BranchSet:
    """The branches of one layer, or of each of several equal layers stacked in one array.

    A set is static and hashable; arrays are passed to its methods. If layers are stacked, all arrays, scale
    vectors included, have the axes of the stack in front: kernels (*stack, *spatial, in/groups, out), vectors
    (*stack, out).

    Attributes:
      kernel: shape of the merged kernel, (*stack, *spatial, in/groups, out), or the axes after the stack
        ordered as `layout` says.
      branches: at least one, with distinct names.
      groups: feature groups of the layer.
      layout: axis order of arguments and results: "...io" (JAX, Flax); "oi..." (Equinox, PyTorch); or a
        letter for each axis, "s" for a spatial one, "i" for inputs, "o" for outputs. Several axes of inputs
        or of outputs are one in their order: "ioo" is the layout of an attention's projection, (features,
        heads, head_features).
      stacked: number of leading axes of `kernel` that are axes of a stack; 0 for a single layer.

    Raises:
      ValueError: at construction, for a branch that is not defined for this layer (the reason is given), two
        branches of one name, no branch, or a `stacked` that leaves no kernel.
    """

    kernel: Shape
    branches: tuple[Branch, ...]
    groups: int = 1
    layout: str = "...io"
    stacked: int = 0

    def __post_init__(self) -> None:
        object.__setattr__(self, "kernel", tuple(int(n) for n in self.kernel))
        object.__setattr__(self, "branches", tuple(self.branches))
        check_layout(self.layout)
        if len(self.kernel) < 2 or min(self.kernel) < 1:
            raise ValueError(f"`kernel` is {self.kernel}: it must be a shape (*spatial, in/groups, out)")
        if not isinstance(self.stacked, int) or not 0 <= self.stacked <= len(self.kernel) - 2:
            raise ValueError(
                f"`stacked` is {self.stacked!r}: it must be how many leading axes of `kernel` {self.kernel} "
                f"are those of a stack of layers, 0 to {len(self.kernel) - 2}"
            )
        names = [branch.name for branch in self.branches]
        if not names or len(set(names)) != len(names):
            raise ValueError(f"`branches` are named {names}: at least one, and each name once")
        if self.groups < 1 or self.canonical[-1] % self.groups:
            raise ValueError(
                f"`groups` is {self.groups}: it must divide the {self.canonical[-1]} output channels"
            )
        for branch in self.branches:
            try:
                branch.check(self.canonical, self.groups)
            except ValueError as error:
                raise ValueError(
                    f"branch {branch.name} does not fit a kernel of shape {self.kernel}: {error}"
                ) from None

    @property
    def names(self) -> tuple[str, ...]:
        """The names of the branches, in their order."""
        return tuple(branch.name for branch in self.branches)

    @property
    def stack(self) -> Shape:
        """The leading axes along which layers are stacked; () for a single layer."""
        return self.kernel[: self.stacked]

    @property
    def layer(self) -> "BranchSet":
        """The set of one layer of the stack; this set itself if nothing is stacked."""
        if not self.stacked:
            return self
        return dataclasses.replace(self, kernel=self.kernel[self.stacked :], stacked=0)

    @property
    def canonical(self) -> Shape:
        """Kernel shape of one layer with the axes ordered (*spatial, in/groups, out)."""
        return canonical_shape(self.kernel[self.stacked :], self.layout)

    @property
    def out(self) -> int:
        """Number of output channels."""
        return self.canonical[-1]

    @property
    def vector_shape(self) -> Shape:
        """Shape of every scale vector: (*stack, out)."""
        return (*self.stack, self.out)

    @property
    def elementwise(self) -> bool:
        """Whether P(g) is an elementwise product m * g."""
        return all(branch.places for branch in self.branches)

    def shapes(self) -> dict[str, Shape]:
        """Shape of each branch tensor w_b, by branch name."""
        return {branch.name: (*self.stack, *branch.shape(self.canonical)) for branch in self.branches}

    def merge(self, weights: Mapping[str, jax.Array], scales: Mapping[str, jax.Array]) -> jax.Array:
        """K = sum_b s_b * E_b(w_b)."""
        if self.stacked:
            return self._by_layer(self.layer.merge, weights, scales)
        parts = []
        for branch in self.branches:
            part = branch.embed(weights[branch.name], self.canonical)
            # Multiplying the identity by ones would widen a sum in half precision to their dtype.
            parts.append(
                algebra.scale_output(part, self._scale(branch, scales)) if branch.has_scale else part
            )
        return self._from_canonical(sum(parts[1:], start=parts[0]))

    def branch_gradients(self, g: jax.Array, scales: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
        """dL/dw_b = E_b^T(s_b * g) for every branch, from g = dL/dK, by transposing the embedding."""
        if self.stacked:
            return self._by_layer(self.layer.branch_gradients, g, scales)
        g = self._to_canonical(g)
        gradients = {}
        for branch in self.branches:
            w = jax.ShapeDtypeStruct(branch.shape(self.canonical), g.dtype)
            transpose = jax.linear_transpose(lambda w, b=branch: b.embed(w, self.canonical), w)
            (gradients[branch.name],) = transpose(
                algebra.scale_output(g, self._scale(branch, scales, g.dtype))
            )
        return gradients

    def precondition(
        self, g: jax.Array, scales: Mapping[str, jax.Array], *, normalise: bool = False
    ) -> jax.Array:
        """P(g) = sum_b s_b * E_b(E_b^T(s_b * g)): SGD on the branches moves K by -lr * P(g).

        g has the merged kernel's shape; the result has its shape and dtype. Where every embedding places
        coordinates this is computed as `multiplier(scales) * g`, otherwise by transposition; both are exact.
        Scales are cast to the wider of their own and g's dtype before they are squared. With `normalise` the
        result is divided by `mean_multiplier(scales)`.
        """
        wide = jnp.promote_types(g.dtype, jnp.result_type(*scales.values()) if scales else g.dtype)
        if self.elementwise:
            result = self.multiplier(scales, dtype=wide) * g
        else:
            scales = {name: s.astype(wide) for name, s in scales.items()}
            result = self.merge(self.branch_gradients(g.astype(wide), scales), scales)
        if normalise:
            result = result / self.mean_multiplier(scales, dtype=wide, keepdims=True)
        return result.astype(g.dtype)

    def multiplier(
        self, scales: Mapping[str, jax.Array], *, power: int = 2, dtype: Any = jnp.float32
    ) -> jax.Array:
        """m = sum_b |s_b|^power * E_b(1), of the merged kernel's shape.

        At power 2, m * g = P(g), the rule of SGD and momentum; at power 1, m is the factor of a sign rule's
        update.

        Raises:
          ValueError: a branch has no elementwise multiplier (average pooling); use `precondition`.
        """
        return self.sum_at_taps(lambda s: jnp.abs(s) ** power, scales, dtype=dtype)

    def mean_multiplier(
        self,
        scales: Mapping[str, jax.Array],
        *,
        power: int = 2,
        dtype: Any = jnp.float32,
        keepdims: bool = False,
    ) -> jax.Array:
        """trace(P) / size of K, one number for each layer of the stack, (*stack,); with `keepdims` in an
        array with the axes of the kernel, (*stack, 1, ...).

        Where every branch places coordinates it is the mean of `multiplier` over the entries of the kernel.
        Elsewhere there is no multiplier, and it is the mean eigenvalue of P, as it is there too. It is
        computed from the vectors and `Branch.energy`, without an array of the kernel's size.

        Raises:
          ValueError: a power other than 2 where a branch places no coordinates.
        """
        if power != 2 and not self.elementwise:
            raise ValueError(f"`power` is {power}: branches that mix taps or channels have a mean at power 2")
        total = jnp.zeros((), dtype)
        for branch in self.branches:
            energy = _energy(branch, self.canonical)
            s = jnp.asarray(scales[branch.name], dtype) if branch.has_scale else jnp.ones(self.out, dtype)
            # One number where all channels have it, so that no vector becomes part of the program.
            weight = float(energy[0]) if np.all(energy == energy[0]) else jnp.asarray(energy, dtype)
            weight = jnp.broadcast_to(jnp.asarray(weight, dtype), s.shape)
            total = total + (jnp.abs(s) ** power * weight).sum(axis=-1)
        mean = jnp.broadcast_to(total / math.prod(self.canonical), self.stack)
        return mean.reshape((*self.stack, *(1,) * len(self.canonical))) if keepdims else mean

    def sum_at_taps(
        self,
        term: Callable[..., jax.Array],
        scales: Mapping[str, jax.Array],
        *arrays: jax.Array,
        dtype: Any = jnp.float32,
    ) -> jax.Array:
        """sum_b E_b(1) * term(s_b, *arrays): each entry of the kernel sums over the branches that reach it.

        Every elementwise rule has this form. It consists of iota comparisons and `where`, which XLA fuses
        into whatever reads the result.

        Args:
          term: is given s_b as (1, ..., 1, out) in `dtype`, and `arrays`; returns an array that broadcasts to
            the kernel. It sees one layer of a stack at a time (`jax.vmap`).
          scales: branch name -> s_b.
          arrays: of the merged kernel's shape; `term` sees them with the axes (*spatial, in/groups, out).
          dtype: dtype of the sum.

        Raises:
          ValueError: a branch places no coordinates.
        """
        if self.stacked:
            one = functools.partial(self.layer.sum_at_taps, term, dtype=dtype)
            return self._by_layer(one, scales, *arrays)
        arrays = tuple(self._to_canonical(a) for a in arrays)
        total = jnp.zeros((1,) * len(self.canonical), dtype)
        for branch in self.branches:
            if not branch.places:
                raise ValueError(
                    f"branch {branch.name} mixes taps or channels and has no elementwise multiplier: use "
                    "P(g), `BranchSet.precondition`, or `reparameterize` for optimizers other than SGD"
                )
            s = self._scale(branch, scales, dtype).reshape((1,) * (len(self.canonical) - 1) + (-1,))
            total = total + jnp.where(branch.support(self.canonical), term(s, *arrays), 0)
        return self._from_canonical(total)

    def split(self, kernel: jax.Array, scales: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
        """Returns the branch tensors of least norm that merge into `kernel`: w_b = E_b^T(s_b * P^+(kernel)).

        A merged kernel does not determine its branches; this choice minimises sum_b |w_b|^2. If the branches
        cannot express the kernel (all scales of an entry are 0, or there is only an average), they merge into
        the nearest kernel that they can express. Where P is a multiplier it is inverted elementwise;
        elsewhere the least-squares problem is solved by conjugate gradients to the precision of the dtype.
        """
        return _split(self, kernel, dict(scales))

    def sample(self, key: jax.Array, *, dtype: Any = jnp.float32) -> dict[str, jax.Array]:
        """Draws every w_b as that branch's own layer would be initialised (the identity as ones).

        The layers of a stack are drawn independently.
        """
        if self.stacked:
            one = functools.partial(self.layer.sample, dtype=dtype)
            return self._by_layer(one, jax.random.split(key, self.stack))
        keys = jax.random.split(key, len(self.branches))
        return {b.name: b.sample(k, self.canonical, dtype) for b, k in zip(self.branches, keys)}

    def to_json(self) -> str:
        """Returns the set as JSON, from which `from_json` makes an equal one; part of every scales file."""
        branches = [{"type": type(b).__name__, **dataclasses.asdict(b)} for b in self.branches]
        fields = {name: getattr(self, name) for name in ("kernel", "groups", "layout", "stacked")}
        return json.dumps({**fields, "branches": branches})

    @classmethod
    def from_json(cls, text: str) -> "BranchSet":
        """Returns the branch set that `to_json` wrote.

        Raises:
          ValueError: an unknown branch type; import the module that defines it first. Or any other text.
        """
        fields = jsontext.parse(text, "the description of a branch set")
        try:
            branches = [_branch_from_json(dict(branch)) for branch in fields["branches"]]
            kernel, groups, layout, stacked = (fields[k] for k in ("kernel", "groups", "layout", "stacked"))
            if not all(type(n) is int and abs(n) < _LONGEST for n in (*kernel, groups, stacked)):
                raise TypeError("`kernel`, `groups` and `stacked` must hold whole numbers")
            if math.prod(kernel) > _LARGEST:
                raise TypeError(f"a kernel of shape {tuple(kernel)} fits into no memory")
            return cls(tuple(kernel), tuple(branches), groups, layout, stacked)
        except (TypeError, KeyError, AttributeError, OverflowError, MemoryError) as error:
            raise ValueError(f"this describes no branch set ({type(error).__name__}: {error})") from error

    def _by_layer(self, fn: Callable[..., T], *arrays: Any) -> T:
        """Maps fn, which is for one layer, over the stack, whose axes are the leading ones of all arrays."""
        for size in reversed(self.stack):
            # The size is explicit, because a set of the identity only may come without any array.
            fn = jax.vmap(fn, axis_size=size)
        return fn(*arrays)

    @property
    def plain(self) -> "BranchSet":
        """The set with the layout "...io": of the kernels that `to_plain` returns."""
        return dataclasses.replace(self, kernel=(*self.stack, *self.canonical), layout="...io")

    def to_plain(self, kernel: jax.Array) -> jax.Array:
        """Returns a kernel, or an array of its shape, in the layout "...io", with the axes of the stack."""
        return self._by_layer(self.layer._to_canonical, kernel)

    def from_plain(self, kernel: jax.Array) -> jax.Array:
        """Undoes `to_plain`."""
        return self._by_layer(self.layer._from_canonical, kernel)

    def _to_canonical(self, kernel: jax.Array) -> jax.Array:
        return to_canonical(kernel, self.layout)

    def _from_canonical(self, kernel: jax.Array) -> jax.Array:
        return from_canonical(kernel, self.layout, self.kernel[self.stacked :])

    def _scale(self, branch: Branch, scales: Mapping[str, jax.Array], dtype: Any = None) -> jax.Array:
        if not branch.has_scale:
            return jnp.ones((self.out,), dtype or jnp.result_type(*scales.values(), jnp.float32))
        s = jnp.asarray(scales[branch.name])
        return s if dtype is None else s.astype(dtype)


@functools.partial(jax.jit, static_argnums=0)
def _split(branches: BranchSet, kernel: jax.Array, scales: dict[str, jax.Array]) -> dict[str, jax.Array]:
    """Does the work of `BranchSet.split`, compiled, because an optimizer's `init` splits layer after layer of
    few shapes: tracing the conjugate gradients anew for each would take a third of a second."""
    if branches.stacked:
        return branches._by_layer(functools.partial(_split, branches.layer), kernel, scales)
    wide = jnp.promote_types(kernel.dtype, jnp.float32)
    scales = {name: jnp.asarray(s).astype(wide) for name, s in scales.items()}
    if branches.elementwise:
        m = branches.multiplier(scales, dtype=wide)
        x = jnp.where(m > 0, kernel / jnp.where(m > 0, m, 1), 0)
        weights = branches.branch_gradients(x, scales)
    else:
        like = {b.name: jax.ShapeDtypeStruct(b.shape(branches.canonical), wide) for b in branches.branches}
        weights = algebra.least_norm(lambda w: branches.merge(w, scales), kernel.astype(wide), like)
    return {name: w.astype(kernel.dtype) for name, w in weights.items()}


def check_layout(layout: str) -> None:
    """Raises ValueError if this is no order of the axes of a kernel, as in `BranchSet`."""
    if layout not in ("...io", "oi...") and not ({"i", "o"} <= set(layout) <= {"s", "i", "o"}):
        raise ValueError(
            f"`layout` is {layout!r}: it must be '...io' or 'oi...', or letters s, i and o, one for each axis"
        )


def _letters(layout: str, axes: int) -> str:
    letters = {"...io": "s" * (axes - 2) + "io", "oi...": "oi" + "s" * (axes - 2)}.get(layout, layout)
    if len(letters) != axes:
        raise ValueError(
            f"`layout` is {layout!r}: it must have a letter for each of the {axes} axes of a kernel"
        )
    return letters


def _order(letters: str) -> list[int]:
    return sorted(range(len(letters)), key=lambda axis: "sio".index(letters[axis]))


def canonical_shape(shape: Sequence[int], layout: str) -> Shape:
    """Returns the shape (*spatial, in/groups, out) of a kernel whose axes are in this order."""
    letters = _letters(layout, len(shape))
    sides = {c: [n for n, letter in zip(shape, letters) if letter == c] for c in "sio"}
    return (*sides["s"], math.prod(sides["i"]), math.prod(sides["o"]))


def to_canonical(kernel: T, layout: str) -> T:
    """Returns a kernel, an array of JAX or NumPy, with the axes (*spatial, in/groups, out)."""
    shape = canonical_shape(kernel.shape, layout)  # pyright: ignore[reportAttributeAccessIssue]
    order = _order(_letters(layout, len(kernel.shape)))  # pyright: ignore[reportAttributeAccessIssue]
    return kernel.transpose(order).reshape(shape)  # pyright: ignore[reportAttributeAccessIssue]


def from_canonical(kernel: jax.Array, layout: str, shape: Shape) -> jax.Array:
    """Undoes `to_canonical`; `shape` is that of its argument. The sizes of a broadcast kernel may be 1."""
    order = _order(_letters(layout, len(shape)))
    if kernel.shape == canonical_shape(shape, layout):
        kernel = kernel.reshape([shape[axis] for axis in order])
    elif layout not in ("...io", "oi..."):
        kernel = jnp.broadcast_to(kernel, canonical_shape(shape, layout)).reshape([shape[a] for a in order])
    return kernel.transpose(np.argsort(order))


_LONGEST = 2**31  # no axis of an array is as long
_LARGEST = 2**36  # numbers; no kernel is as large


def _file_of(kind: type) -> str:
    """Returns the file of a class; of one that was typed in, the name of its module."""
    return getattr(sys.modules.get(kind.__module__), "__file__", None) or kind.__module__


def _branch_from_json(fields: dict[str, Any]) -> Branch:
    kind = fields.pop("type")
    if kind not in Branch.types:
        raise ValueError(f"unknown branch type {kind!r}: known are {', '.join(Branch.types)}")
    for name in ("size", "dilation"):
        sizes = fields.get(name, [])
        if not isinstance(sizes, list) or not all(type(n) is int and 0 < n < _LONGEST for n in sizes):
            raise TypeError(f"`{name}` of a branch must hold whole numbers above 0, not {sizes!r}")
    return Branch.types[kind](**{k: tuple(v) if isinstance(v, list) else v for k, v in fields.items()})


@functools.lru_cache(maxsize=1024)
def _energy(branch: Branch, kernel: Shape) -> np.ndarray:
    return np.asarray(branch.energy(kernel), np.float64)


def _check_own_channels(what: str, kernel: Shape, groups: int) -> None:
    inputs, outputs = kernel[-2] * groups, kernel[-1]
    if inputs != outputs:
        raise ValueError(f"{what} needs as many input as output channels, not {inputs} and {outputs}")


def _nested_tuples(x: Any) -> Any:
    return tuple(map(_nested_tuples, x)) if isinstance(x, list) else x
