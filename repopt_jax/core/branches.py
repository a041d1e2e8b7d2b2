"""A linear layer as a sum of branches: K = sum_b s_b * E_b(w_b).

K is the merged kernel, shape (*spatial, in/groups, out). Branch b owns a tensor w_b and an embedding E_b, a
fixed linear map from w_b to the shape of K; s_b is a constant with one entry for each output channel. A
branch is one class that states its shape and its embedding; merging, the SGD rule P(g), its elementwise
multiplier and re-initialisation are derived here, for every set of branches:

    K       = sum_b s_b * E_b(w_b)               merge
    dL/dw_b = E_b^T(s_b * g),  g = dL/dK         branch_gradients
    P(g)    = sum_b s_b * E_b(E_b^T(s_b * g))    precondition
    m       = sum_b |s_b|^power * E_b(1)         multiplier
    K -> w  = E_b^T(s_b * P^+(K)), least norm    split

Where every E_b places coordinates, P(g) = m * g at power 2. Equal layers whose kernels are stacked in one
array (made by `nnx.vmap`, run by `nnx.scan`) are one set with `stacked` > 0: every formula then holds for
each layer of the stack by itself.

The identity branch has s = 1 and a trainable weight per channel, so it contributes 1 to m on its diagonal.
Source: "Re-parameterizing Your Optimizers rather than Architectures" (ICLR 2023), sections 3 and appendix A.
"""

import abc
import dataclasses
import functools
import json
import math
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from repopt_jax.core import algebra

Shape = tuple[int, ...]
T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class Branch(abc.ABC):
    """One linear branch. Subclasses state where its tensor lives (`shape`) and how it enters the kernel
    (`embed`)."""

    has_scale: ClassVar[bool] = True  # False: the constant scale is 1 (the identity)
    places: ClassVar[bool] = True  # E_b puts each entry of w_b at one entry of K, no two at the same
    types: ClassVar[
        dict[str, type["Branch"]]
    ] = {}  # by class name, so that a file of scales can be read back

    def __init_subclass__(cls, **kwargs):
        super().__init_subclass__(**kwargs)
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
        """E_b(1) as a boolean array made of iota comparisons; only of branches whose embedding `places`
        coordinates."""
        raise TypeError(f"branch {self.name} places no coordinates, so it has no support")

    def sample(self, key: jax.Array, kernel: Shape, dtype: Any) -> jax.Array:
        """Draws w_b as the branch's own layer would be initialised: uniform(-1/sqrt(fan_in), 1/sqrt(fan_in)).

        The default of PyTorch's layers, which RepVGG, RepOptimizer, DBB and MobileOne all rely on.
        """
        shape = self.shape(kernel)
        bound = 1 / math.sqrt(math.prod(shape[:-1]))
        return jax.random.uniform(key, shape, dtype, -bound, bound)

    def check(self, kernel: Shape, groups: int) -> None:  # noqa: B027  (optional: most branches fit every layer)
        """Raises ValueError with the reason if the branch is not defined for this layer."""


@dataclasses.dataclass(frozen=True)
class Kernel(Branch):
    """A convolution with a kernel of spatial shape `size`, dilated, centred in the layer's window.

    `Kernel((3, 3))` in a 3x3 layer is the layer's own kernel, `Kernel((1, 1))` its 1x1 branch, `Kernel((1,
    3))` ACNet's horizontal one, `Kernel(())` the weight of a dense layer. `dilation` is relative to the
    layer's own.
    """

    size: Shape
    dilation: Shape = ()

    def __post_init__(self):
        object.__setattr__(self, "size", tuple(self.size))
        object.__setattr__(self, "dilation", tuple(self.dilation) or (1,) * len(self.size))

    @property
    def name(self) -> str:
        name = "x".join(map(str, self.size)) or "dense"
        return name if set(self.dilation) <= {1} else f"{name}_d{'x'.join(map(str, self.dilation))}"

    def taps(self, kernel: Shape) -> tuple[algebra.Taps, ...]:
        return algebra.centred_taps(self.size, kernel[:-2], self.dilation)

    def shape(self, kernel: Shape) -> Shape:
        return (*self.size, *kernel[-2:])

    def embed(self, w, kernel):
        return algebra.place(w, kernel[:-2], self.taps(kernel))

    def support(self, kernel):
        return algebra.covers(kernel, self.taps(kernel))

    def check(self, kernel, groups):
        self.taps(kernel)


@dataclasses.dataclass(frozen=True)
class Identity(Branch):
    """y = u * x with a trainable u for each channel. The searched value of u is where u starts; its scale is
    1."""

    has_scale: ClassVar[bool] = False

    @property
    def name(self) -> str:
        return "identity"

    def shape(self, kernel):
        return (kernel[-1],)

    def embed(self, w, kernel):
        return algebra.identity(w, kernel)

    def support(self, kernel):
        return algebra.diagonal(kernel)

    def sample(self, key, kernel, dtype):
        return jnp.ones(self.shape(kernel), dtype)

    def check(self, kernel, groups):
        algebra.centre_tap(kernel[:-2])
        _check_own_channels("the identity", kernel, groups)


@dataclasses.dataclass(frozen=True)
class Pool(Branch):
    """Average pooling over the layer's window, channel by channel, padding counted in the mean: y = v *
    mean of x.

    v is a vector like the identity's: ones in a structure that does not train it. Like the identity it
    needs as many input as output channels. E E^T mixes the taps."""

    has_scale: ClassVar[bool] = False
    places: ClassVar[bool] = False

    @property
    def name(self) -> str:
        return "pool"

    def shape(self, kernel):
        return (kernel[-1],)

    def embed(self, w, kernel):
        return algebra.channel_average(w, kernel)

    def sample(self, key, kernel, dtype):
        return jnp.ones(self.shape(kernel), dtype)

    def check(self, kernel, groups):
        _check_own_channels("average pooling", kernel, groups)


@dataclasses.dataclass(frozen=True)
class Average(Branch):
    """A 1x1 convolution followed by average pooling over the layer's window, padding counted in the mean.

    E E^T mixes the taps, so this branch has no elementwise multiplier: the SGD rule is P(g).
    """

    places: ClassVar[bool] = False

    @property
    def name(self) -> str:
        return "average"

    def shape(self, kernel):
        return (*(1,) * (len(kernel) - 2), *kernel[-2:])

    def embed(self, w, kernel):
        return algebra.average(w, kernel[:-2])


@dataclasses.dataclass(frozen=True)
class AfterPointwise(Branch):
    """A fixed 1x1 convolution C, which is not trained, followed by a kernel of spatial shape `size`, centred.

    K[..., i, o] = sum_m C[i, m] * w[..., m, o] at the taps of `size`: the 1x1 -> kxk sequence of DBB (arXiv
    2103.13425, section 3.2) with its first part constant, without which no constant rule would exist. E E^T
    mixes input channels, so the SGD rule is P(g). Batch norm or a bias between the two is not part of it.

    Attributes:
      size: spatial shape of w, which is (*size, mid, out).
      matrix: C, (in/groups, mid) for all groups or (groups, in/groups, mid). Kept as nested tuples: it
        belongs to the description of the layer, goes into scales files, and is a constant of in/groups * mid
        numbers (a ninth of a 3x3 kernel at mid = out) in compiled programs.

    Raises:
      ValueError: at construction, a matrix of another rank, or one that holds NaN or infinity.
    """

    size: Shape
    matrix: tuple

    places: ClassVar[bool] = False

    def __post_init__(self):
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

    def shape(self, kernel):
        return (*self.size, len(self.matrix[0][0]), kernel[-1])

    def embed(self, w, kernel):
        taps = algebra.centred_taps(self.size, kernel[:-2], (1,) * len(self.size))
        return algebra.place(algebra.after_pointwise(w, self.pointwise(w.dtype)), kernel[:-2], taps)

    def pointwise(self, dtype: Any) -> jax.Array:
        """C as an array (1 or groups, in/groups, mid)."""
        return jnp.asarray(np.asarray(self.matrix), dtype)

    def check(self, kernel, groups):
        algebra.centred_taps(self.size, kernel[:-2], (1,) * len(self.size))
        if len(self.matrix) not in (1, groups) or len(self.matrix[0]) != kernel[-2]:
            raise ValueError(
                f"its matrix, (groups, in/groups, mid) = {np.shape(self.matrix)}, must have {kernel[-2]} "
                f"input channels in 1 or {groups} groups"
            )


@dataclasses.dataclass(frozen=True)
class BranchSet:
    """The branches of one layer, or of each of several equal layers stacked in one array: hashable and
    static, the arrays are passed in.

    With a stack every array that comes or goes, a scale vector too, has the axes of the stack in front:
    kernels (*stack, *spatial, in/groups, out), vectors (*stack, out).

    Attributes:
      kernel: shape of the merged kernel, (*stack, *spatial, in/groups, out), or the axes after the stack
        ordered as `layout` says.
      branches: at least one, with distinct names.
      groups: feature groups of the layer.
      layout: "...io" (JAX, Flax) or "oi..." (Equinox, PyTorch): order of the axes of the arrays that come and
        go.
      stacked: how many leading axes of `kernel` the stack has; 0 for a layer of its own.

    Raises:
      ValueError: at construction, a branch that is not defined for this layer (the reason is given), two
        branches of one name, no branch, or a `stacked` that leaves no kernel.
    """

    kernel: Shape
    branches: tuple[Branch, ...]
    groups: int = 1
    layout: str = "...io"
    stacked: int = 0

    def __post_init__(self):
        object.__setattr__(self, "kernel", tuple(int(n) for n in self.kernel))
        object.__setattr__(self, "branches", tuple(self.branches))
        if self.layout not in ("...io", "oi..."):
            raise ValueError(f"`layout` is {self.layout!r}: it must be '...io' or 'oi...'")
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
        return tuple(branch.name for branch in self.branches)

    @property
    def stack(self) -> Shape:
        """The leading axes along which layers are stacked; () for a layer of its own."""
        return self.kernel[: self.stacked]

    @property
    def layer(self) -> "BranchSet":
        """The set of one layer of the stack; this one where nothing is stacked."""
        if not self.stacked:
            return self
        return dataclasses.replace(self, kernel=self.kernel[self.stacked :], stacked=0)

    @property
    def canonical(self) -> Shape:
        """Kernel shape of one layer with the axes ordered (*spatial, in/groups, out)."""
        shape = self.kernel[self.stacked :]
        if self.layout == "...io":
            return shape
        out, inputs, *window = shape
        return (*window, inputs, out)

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
            # No product with ones for the identity: their dtype would widen a sum in half precision.
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

    def precondition(self, g: jax.Array, scales: Mapping[str, jax.Array]) -> jax.Array:
        """P(g) = sum_b s_b * E_b(E_b^T(s_b * g)): the change of K, per unit of learning rate, when SGD moves
        the w_b.

        g has the merged kernel's shape; the result has its shape and dtype. Where every embedding places
        coordinates this is `multiplier(scales) * g`, computed as such; otherwise by transposition, exactly.
        Scales are cast up to the wider of their own and g's dtype before they are squared.
        """
        wide = jnp.promote_types(g.dtype, jnp.result_type(*scales.values()) if scales else g.dtype)
        if self.elementwise:
            result = self.multiplier(scales, dtype=wide) * g
        else:
            scales = {name: s.astype(wide) for name, s in scales.items()}
            result = self.merge(self.branch_gradients(g.astype(wide), scales), scales)
        return result.astype(g.dtype)

    def multiplier(
        self, scales: Mapping[str, jax.Array], *, power: int = 2, dtype: Any = jnp.float32
    ) -> jax.Array:
        """m = sum_b |s_b|^power * E_b(1), of the merged kernel's shape.

        power 2: SGD and momentum, m * g = P(g). power 1: the factor of a sign rule's update.

        Raises:
          ValueError: a branch has no elementwise multiplier (average pooling); `precondition` is exact for
            it.
        """
        return self.sum_at_taps(lambda s: jnp.abs(s) ** power, scales, dtype=dtype)

    def sum_at_taps(
        self,
        term: Callable[..., jax.Array],
        scales: Mapping[str, jax.Array],
        *arrays: jax.Array,
        dtype: Any = jnp.float32,
    ) -> jax.Array:
        """sum_b E_b(1) * term(s_b, *arrays): at each entry of the kernel, one term for each branch that
        reaches it.

        The form that every elementwise rule has. It is made of iota comparisons and `where`, which XLA fuses
        into what reads it.

        Args:
          term: gets s_b as (1, ..., 1, out) in `dtype`, and `arrays`; gives something that broadcasts to the
            kernel. Of a stack it sees one layer at a time (`jax.vmap`).
          scales: branch name -> s_b.
          arrays: of the merged kernel's shape; `term` sees them with the axes (*spatial, in/groups, out).
          dtype: of the sum.

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
        """The branch tensors of least norm whose merge is `kernel`: w_b = E_b^T(s_b * P^+(kernel)).

        A merged kernel does not determine its branches; this is the choice that minimises sum_b |w_b|^2. What
        the branches cannot express (entries whose scales are all 0, or whatever an average alone cannot make)
        is left out of the merge, which then is the nearest that they can. P is inverted entry by entry
        where it is a multiplier; elsewhere the least squares problem is solved by conjugate gradients to the
        precision of the dtype.
        """
        if self.stacked:
            return self._by_layer(self.layer.split, kernel, scales)
        wide = jnp.promote_types(kernel.dtype, jnp.float32)
        scales = {name: jnp.asarray(s).astype(wide) for name, s in scales.items()}
        if self.elementwise:
            m = self.multiplier(scales, dtype=wide)
            x = jnp.where(m > 0, kernel / jnp.where(m > 0, m, 1), 0)
            weights = self.branch_gradients(x, scales)
        else:
            # The normal equations in w, from 0: consistent whatever the kernel is, where P(x) = kernel is
            # not; and what starts in the range of the transpose stays there, so that the norm is least.
            weights, _ = jax.scipy.sparse.linalg.cg(
                lambda w: self.branch_gradients(self.merge(w, scales), scales),
                self.branch_gradients(kernel.astype(wide), scales),
                tol=float(jnp.finfo(wide).eps),
                maxiter=1000,
            )
        return {name: w.astype(kernel.dtype) for name, w in weights.items()}

    def sample(self, key: jax.Array, *, dtype: Any = jnp.float32) -> dict[str, jax.Array]:
        """Draws every w_b as that branch's own layer would be initialised (the identity: ones), each layer of
        a stack by itself."""
        if self.stacked:
            one = functools.partial(self.layer.sample, dtype=dtype)
            return self._by_layer(one, jax.random.split(key, self.stack))
        keys = jax.random.split(key, len(self.branches))
        return {b.name: b.sample(k, self.canonical, dtype) for b, k in zip(self.branches, keys)}

    def to_json(self) -> str:
        """A text that `from_json` turns back into an equal branch set; part of every scales file."""
        branches = [{"type": type(b).__name__, **dataclasses.asdict(b)} for b in self.branches]
        fields = {name: getattr(self, name) for name in ("kernel", "groups", "layout", "stacked")}
        return json.dumps({**fields, "branches": branches})

    @classmethod
    def from_json(cls, text: str) -> "BranchSet":
        """Inverse of `to_json`.

        Raises:
          ValueError: a branch type that is not defined here (import the module that defines it first).
        """
        fields = json.loads(text)
        branches = []
        for branch in fields.pop("branches"):
            kind = branch.pop("type")
            if kind not in Branch.types:
                raise ValueError(f"unknown branch type {kind!r}: known are {', '.join(Branch.types)}")
            fields_of = {k: tuple(v) if isinstance(v, list) else v for k, v in branch.items()}
            branches.append(Branch.types[kind](**fields_of))
        kernel, groups, layout, stacked = (fields[k] for k in ("kernel", "groups", "layout", "stacked"))
        return cls(tuple(kernel), tuple(branches), groups, layout, stacked)

    def _by_layer(self, fn: Callable[..., T], *arrays: Any) -> T:
        """fn, which is for one layer, for every layer of the stack, whose axes all arrays have in front."""
        for size in reversed(self.stack):
            # The size is given: a set of the identity alone may come without an array that tells it.
            fn = jax.vmap(fn, axis_size=size)
        return fn(*arrays)

    def _to_canonical(self, kernel: jax.Array) -> jax.Array:
        return kernel if self.layout == "...io" else jnp.moveaxis(kernel, (0, 1), (-1, -2))

    def _from_canonical(self, kernel: jax.Array) -> jax.Array:
        return kernel if self.layout == "...io" else jnp.moveaxis(kernel, (-1, -2), (0, 1))

    def _scale(self, branch: Branch, scales: Mapping[str, jax.Array], dtype: Any = None) -> jax.Array:
        if not branch.has_scale:
            return jnp.ones((self.out,), dtype or jnp.result_type(*scales.values(), jnp.float32))
        s = jnp.asarray(scales[branch.name])
        return s if dtype is None else s.astype(dtype)


def _check_own_channels(what: str, kernel: Shape, groups: int) -> None:
    inputs, outputs = kernel[-2] * groups, kernel[-1]
    if inputs != outputs:
        raise ValueError(f"{what} needs as many input as output channels, not {inputs} and {outputs}")


def _nested_tuples(x: Any) -> Any:
    return tuple(map(_nested_tuples, x)) if isinstance(x, list) else x
