"""The names of a network's arrays in a PyTorch code base: tables of paths and names.

A row has the name of one layer in the code base, and its arrays, or a constant that the code base stores and
this package computes. The other modules of this folder hold the tables of published code bases, a few rows
for each form of a network. Reading and writing use the same rows.
"""

import dataclasses
import math
import re
from collections.abc import Callable, Mapping
from typing import Any, Literal

import numpy as np

from repopt_jax.core.structure import Description, Structure
from repopt_jax.models import GhostVariant, MobileOneVariant, RepMLPVariant, VGGVariant


@dataclasses.dataclass(frozen=True)
class Stored:
    """How a code base stores an array that is not one tensor of its own with the outputs in our order.

    Attributes:
      name: the tensor's name.
      row: the array is this row of the tensor, which holds vectors of several stages of a layer; None for a
        tensor of its own.
      rows: how many rows of the tensor are arrays here.
      spare: number of further rows, which the code base stores and does not use, by the layer's structure.
        They are written as zeros.
      groups_last: output j of group g of the layer is entry j * groups + g of the tensor's first axis, and
        not g * (out / groups) + j.
    """

    name: str
    row: int | None = None
    rows: int = 1
    spare: Callable[[Structure], int] | None = None
    groups_last: bool = False


# Names of a layer's arrays, ours -> PyTorch's. The tensors of a structure (`conv/weights/3x3`) and its scales
# are separate layers in PyTorch, so our name for the array is empty.
Arrays = Mapping[str, str | Stored]
# What a code base stores of a structure that is no array here: its value, in PyTorch's order of axes.
Constant = Callable[[Structure], np.ndarray]
TENSOR: Arrays = {"": "weight", "kernel": "weight"}
BIASED: Arrays = {"kernel": "weight", "bias": "bias"}
NORM: Arrays = {"scale": "weight", "bias": "bias", "mean": "running_mean", "var": "running_var"}

# How the axes of an array are ordered there, see `TorchName`.
Kind = Literal["kernel", "transposed", "same"]
Name = str | Callable[[re.Match[str]], str]
Row = tuple[str, str, Arrays | Constant]
Table = tuple[Row, ...]
Blocks = tuple[tuple[str, Name], ...]

# Names of our networks in layouts -> the class of their variants.
NETWORKS: dict[str, type] = {
    "VGG": VGGVariant,
    "GhostNet": GhostVariant,
    "MobileOne": MobileOneVariant,
    "RepMLPNet": RepMLPVariant,
}


@dataclasses.dataclass(frozen=True)
class Layout:
    """The names of one form of a network.

    Attributes:
      network: a key of `NETWORKS`; "" for any.
      mode: the `surgery.Mode` in which the network has these arrays. A network with constant scales has those
        of a search.
      form: "training"; "deployed", fused entirely; or "merged", with only its branches fused.
      signature: regular expression for the beginning of a line "key shape", such as "linear.weight 10,64", by
        which a state dict is recognised; of the known ones the first that matches counts.
      rows: (pattern, name, arrays): the pattern must match the whole path of a layer, and the name may refer
        to its groups. In layers of branches, paths can also be those of `names.blocks`, which come first. A
        row with a constant in place of the arrays is for a layer of branches, and its name is the whole key.
      blocks: (pattern, name) of the paths of blocks, inside of which `inside` counts; the name may also be a
        function of the match.
      inside: rows whose patterns are for paths inside a block, and whose names follow the block's name.
      described: (pattern, description): the structure that the names are for, of the layers of branches whose
        path the pattern matches. A network of ours describes its layers itself.
      flattened: regular expression for the keys of kernels that are 1x1 there, of maps with a channel for
        each position, and have a window here.
    """

    network: str = ""
    mode: str = "plain"
    form: Literal["training", "deployed", "merged"] = "training"
    signature: str = ""
    rows: Table = ()
    blocks: Blocks = ()
    inside: Table = ()
    described: tuple[tuple[str, Description], ...] = ()
    flattened: str = ""

    def find(self, path: str) -> Stored | None:
        """Returns how the code base stores the array at our `path`, the name being its whole key, or None."""
        if stored := _named(self.rows, path):
            return stored
        for pattern, name in self.blocks:
            if block := re.match(f"{pattern}/", path):
                above = name(block) if callable(name) else block.expand(name)
                stored = _named(self.inside, path[block.end() :])
                return stored and dataclasses.replace(stored, name=f"{above}.{stored.name}")
        return None

    def constants(self, path: str, structure: Structure) -> dict[str, np.ndarray]:
        """Returns the constants, by key, that the code base stores of the layer of branches at our `path`."""
        return {
            match.expand(name): constant(structure)
            for pattern, name, constant in self.rows
            if callable(constant) and (match := re.fullmatch(pattern, path))
        }


@dataclasses.dataclass(frozen=True)
class Scheme:
    """The names that one code base uses.

    Attributes:
      name: key in `SCHEMES`.
      about: a description, for messages.
      layouts: a table for each form of each network.
      se_first: whether the code base has squeeze-and-excitation before a block's activation; None if it may
        be before or after. Names do not show this, so a network with another order is refused.
    """

    name: str
    about: str
    layouts: tuple[Layout, ...]
    se_first: bool | None = None


@dataclasses.dataclass(frozen=True)
class TorchName:
    """The counterpart in PyTorch of one of our arrays.

    Attributes:
      key: key in the state dict.
      kind: "kernel", (out, in, *spatial) there and (*spatial, in, out) here, with no spatial axes in a dense
        layer; "transposed", of a transposed convolution, (in, out, *spatial) there and (*spatial, in, out)
        here, with the taps in reverse order; or "same", equal in both, as vectors and embeddings are.
      window: () or, for a kernel that has this spatial shape here and is (out, in * positions, 1, 1) there,
        the spatial shape.
      row: None or, for a vector that is one row of a tensor (rows, out) there, its index.
      rows: number of rows of that tensor.
      groups: 1 or, for a kernel whose outputs are ordered otherwise there (`Stored.groups_last`), the groups.
    """

    key: str
    kind: Kind
    window: tuple[int, ...] = ()
    row: int | None = None
    rows: int = 1
    groups: int = 1

    def to_torch(self, array: Any) -> np.ndarray:
        """Converts our array to PyTorch's order of axes: the whole tensor, or its row."""
        theirs = self._reversed(np.asarray(array))
        theirs = np.ascontiguousarray(theirs.transpose(self._axes(theirs.ndim)))
        if self.groups > 1:
            theirs = _transposed(theirs, self.groups)
        return theirs if self.row is not None else theirs.reshape(self.shape_in_torch(array.shape))

    def from_torch(self, tensor: np.ndarray) -> np.ndarray:
        """Converts PyTorch's tensor, of which the array may be a row, to our order of axes."""
        if self.row is not None:
            return tensor[self.row]
        if self.window:
            tensor = tensor.reshape(tensor.shape[0], -1, *self.window)
        if self.groups > 1:
            tensor = _transposed(tensor, tensor.shape[0] // self.groups)
        return self._reversed(tensor.transpose(np.argsort(self._axes(tensor.ndim))))

    def shape_in_torch(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Returns the shape in PyTorch of the tensor that an array of `shape` is there, or is a row of."""
        theirs = tuple(shape[axis] for axis in self._axes(len(shape)))
        if self.row is not None:
            return (self.rows, *theirs)
        return (theirs[0], math.prod(theirs[1:]), *(1 for _ in self.window)) if self.window else theirs

    def _axes(self, rank: int) -> tuple[int, ...]:
        """Returns our axes in PyTorch's order."""
        spatial = tuple(range(rank - 2))
        match self.kind:
            case "kernel":
                return (rank - 1, rank - 2, *spatial)
            case "transposed":
                return (rank - 2, rank - 1, *spatial)
            case "same":
                return tuple(range(rank))

    def _reversed(self, ours: np.ndarray) -> np.ndarray:
        return np.flip(ours, range(ours.ndim - 2)) if self.kind == "transposed" else ours


def _transposed(tensor: np.ndarray, first: int) -> np.ndarray:
    """Reorders the first axis, (first * n), as (n, first)."""
    by_first = tensor.reshape(first, -1, *tensor.shape[1:])
    return np.ascontiguousarray(by_first.swapaxes(0, 1)).reshape(tensor.shape)


def _named(table: Table, path: str) -> Stored | None:
    above, _, last = path.rpartition("/")
    for pattern, name, arrays in table:
        for layer, array in ((above, last), (path, "")):
            if not callable(arrays) and array in arrays and (match := re.fullmatch(pattern, layer)):
                stored = arrays[array]
                stored = Stored(stored) if isinstance(stored, str) else stored
                return dataclasses.replace(stored, name=f"{match.expand(name)}.{stored.name}")
    return None
