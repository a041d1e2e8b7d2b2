"""What a code base in PyTorch calls the arrays of a network: tables of paths and names.

A row says what one layer is called there, and which arrays it has. The modules beside this one hold the
tables of published code bases, a few rows for each form of a network. Reading and writing use the same rows.
"""

import dataclasses
import re
from collections.abc import Callable, Mapping
from typing import Any, Literal

import numpy as np

from repopt_jax.models import GhostVariant, MobileOneVariant, VGGVariant

# What a layer's arrays are called, ours -> PyTorch's. The tensors of a structure (`conv/weights/3x3`) and
# its scales are layers of their own there, so that nothing comes after their name here.
Arrays = Mapping[str, str]
TENSOR: Arrays = {"": "weight", "kernel": "weight"}
BIASED: Arrays = {"kernel": "weight", "bias": "bias"}
NORM: Arrays = {"scale": "weight", "bias": "bias", "mean": "running_mean", "var": "running_var"}

Name = str | Callable[[re.Match[str]], str]
Row = tuple[str, str, Arrays]
Table = tuple[Row, ...]

# Our networks by the name that a layout gives them -> the class of their variants.
NETWORKS: dict[str, type] = {"VGG": VGGVariant, "GhostNet": GhostVariant, "MobileOne": MobileOneVariant}


@dataclasses.dataclass(frozen=True)
class Layout:
    """The names of one form of a network.

    Attributes:
      network: a key of `NETWORKS`; "" for any.
      mode: the `surgery.Mode` in which the network has these arrays. A network with constant scales has those
        of a search.
      form: "training"; "deployed", all of it given to `fuse`; or "merged", only its branches.
      signature: regular expression for the beginning of a line "key shape", such as "linear.weight 10,64",
        by which a state dict is recognised; of the known ones the first that matches counts.
      rows: (pattern, name, arrays): the pattern is for the whole path of a layer, and the name may refer to
        its groups.
      blocks: (pattern, name) of the paths of blocks, inside of which `inside` counts; the name may also be
        a function of the match.
      inside: rows whose patterns are for paths inside a block, and whose names go behind the block's.
    """

    network: str = ""
    mode: str = "plain"
    form: Literal["training", "deployed", "merged"] = "training"
    signature: str = ""
    rows: Table = ()
    blocks: tuple[tuple[str, Name], ...] = ()
    inside: Table = ()

    def key(self, path: str) -> str | None:
        """What the array at this path of ours is called, or None."""
        if key := _named(self.rows, path):
            return key
        for pattern, name in self.blocks:
            if block := re.match(f"{pattern}/", path):
                key = _named(self.inside, path[block.end() :])
                return key and f"{name(block) if callable(name) else block.expand(name)}.{key}"
        return None


@dataclasses.dataclass(frozen=True)
class Scheme:
    """The names that one code base uses.

    Attributes:
      name: key in `SCHEMES`.
      about: whose names these are.
      layouts: a table for each form of each network.
      se_first: whether squeeze-and-excitation in a block comes before the activation there; None if it may
        be at either place. Its place is not seen in names, so that a network with another is refused.
    """

    name: str
    about: str
    layouts: tuple[Layout, ...]
    se_first: bool | None = None


@dataclasses.dataclass(frozen=True)
class TorchName:
    """Where PyTorch keeps one of our arrays.

    Attributes:
      key: in the state dict.
      kind: "kernel", (out, in, *spatial) there and (*spatial, in, out) here, with no spatial axes in a dense
        layer; or "vector", the same in both.
    """

    key: str
    kind: Literal["kernel", "vector"]

    def to_torch(self, array: Any) -> np.ndarray:
        """Our array with PyTorch's order of axes."""
        array = np.asarray(array)
        return np.ascontiguousarray(array.transpose(self._axes(array.ndim)))

    def from_torch(self, tensor: np.ndarray) -> np.ndarray:
        """PyTorch's tensor with our order of axes."""
        return tensor.transpose(np.argsort(self._axes(tensor.ndim)))

    def shape_in_torch(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Shape there of an array that has `shape` here."""
        return tuple(shape[axis] for axis in self._axes(len(shape)))

    def _axes(self, rank: int) -> tuple[int, ...]:
        """Our axes in PyTorch's order."""
        return tuple(range(rank)) if self.kind == "vector" else (rank - 1, rank - 2, *range(rank - 2))


def _named(table: Table, path: str) -> str | None:
    above, _, last = path.rpartition("/")
    for pattern, name, arrays in table:
        for layer, array in ((above, last), (path, "")):
            if array in arrays and (match := re.fullmatch(pattern, layer)):
                return f"{match.expand(name)}.{arrays[array]}"
    return None
