"""A network of Flax alone beside its PyTorch counterpart for each published block: for parity tests."""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import torch_blocks as reference
from flax import nnx
from forms import UNIREPLKNET
from networks import abstract

from repopt_jax import interop, to_structure
from repopt_jax.interop.names import BIASED, NORM

CLASSES = 3


class Layers(nnx.Module):
    """Convolutions, each with a batch norm after it if `normed`, and a classifier."""

    def __init__(self, shapes, normed, *, rngs):
        self.layers, self.norms = nnx.List([]), nnx.List([])
        for shape in shapes:
            half = shape.size // 2
            pad = half if shape.padding is None else shape.padding
            self.layers.append(
                nnx.Conv(
                    shape.inputs,
                    shape.outputs,
                    (shape.size, shape.size),
                    strides=shape.stride,
                    padding=((pad, pad), (pad, pad)),
                    feature_group_count=shape.groups,
                    use_bias=False,
                    rngs=rngs,
                )
            )
            if normed:
                self.norms.append(
                    nnx.BatchNorm(shape.outputs, momentum=0.9, use_fast_variance=False, rngs=rngs)
                )
        self.fc = nnx.Linear(shapes[-1].outputs, CLASSES, rngs=rngs)

    def __call__(self, x):
        for i, layer in enumerate(self.layers):
            x = layer(x)
            x = nnx.relu(self.norms[i](x) if self.norms else x)
        return self.fc(x.mean((1, 2)))


@dataclasses.dataclass(frozen=True)
class Shape:
    inputs: int
    outputs: int
    size: int
    stride: int = 1
    groups: int = 1
    padding: int | None = None

    def made(self, block, **options):
        sizes = (self.inputs, self.outputs, self.size, self.stride, self.groups)
        return (
            block(*sizes, **options)
            if self.padding is None
            else block(*sizes, padding=self.padding, **options)
        )


@dataclasses.dataclass(frozen=True)
class BlockForm:
    """A network of one block.

    Attributes:
      structure: ours.
      block: PyTorch's.
      shapes: of the layers.
      options: arguments of the structure, by its names; `theirs` of the block by its.
      deployed: name of the deployed convolution.
    """

    structure: str
    block: Any
    shapes: tuple[Shape, ...]
    deployed: str
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    theirs: Callable[[Shape], Mapping[str, Any]] = lambda shape: {}

    @property
    def normed(self):
        return self.structure in ("qarepvgg", "qarepvgg2", "orepa")

    def network(self, **more):
        """PyTorch's network; `more` are further arguments of every block."""
        blocks = [shape.made(self.block, **self.theirs(shape), **more) for shape in self.shapes]
        return reference.Chain(blocks, self.shapes[-1].outputs, CLASSES)

    def deployed_network(self):
        block = functools.partial(reference.Deployed, self.deployed)
        return reference.Chain([shape.made(block) for shape in self.shapes], self.shapes[-1].outputs, CLASSES)

    def scheme(self):
        rows = (("fc", "fc", BIASED), *([(r"norms/(\d+)", r"layers.\1.bn", NORM)] if self.normed else []))
        return interop.block_scheme(
            self.structure, {r"layers/(\d+)": r"layers.\1"}, rows, options=self.options
        )

    def model(self):
        """Ours, abstract, in float64."""

        def build(rngs):
            return to_structure(
                Layers(self.shapes, self.normed, rngs=rngs), self.structure, options=self.options, rngs=rngs
            )

        graph, state = nnx.split(abstract(build))

        def wide(leaf):
            return (
                jax.ShapeDtypeStruct(leaf.shape, "float64")
                if jnp.issubdtype(leaf.dtype, jnp.floating)
                else leaf
            )

        return nnx.merge(graph, jax.tree.map(wide, state))

    @property
    def pairs(self):
        """Which batch norm follows which layer, for `fuse`."""
        return {r"layers/(\d+)": r"norms/\1"} if self.normed else None


DENSE = (Shape(3, 4, 3, 2), Shape(4, 4, 3), Shape(4, 6, 5, groups=2))
DEPTHWISE = (Shape(3, 6, 3), Shape(6, 6, 3, groups=6), Shape(6, 6, 5, 2, groups=6))
SQUARE = (Shape(3, 4, 3, 2), Shape(4, 4, 3), Shape(4, 6, 3))
LARGE = (Shape(3, 3, 9, groups=3), Shape(3, 3, 7, groups=3))

FORMS = {
    "acnet": BlockForm("acnet", reference.ACBlock, DENSE, "fused_conv"),
    "acnet, little padding": BlockForm(
        "acnet",
        reference.ACBlock,
        (Shape(3, 4, 5, padding=0), Shape(4, 4, 3, 2, padding=0), Shape(4, 4, 5, padding=1)),
        "fused_conv",
    ),
    "dbb": BlockForm("dbb", reference.DiverseBranch, DENSE, "dbb_reparam"),
    "dbb, depthwise": BlockForm("dbb", reference.DiverseBranch, DEPTHWISE, "dbb_reparam"),
    "dbb, middle": BlockForm(
        "dbb", reference.DiverseBranch, DENSE, "dbb_reparam", {"middle": 8}, lambda shape: {"middle": 8}
    ),
    "replknet": BlockForm("replknet", reference.LargeKernel, LARGE, "lkb_reparam"),
    "replknet, small 3": BlockForm(
        "replknet", reference.LargeKernel, LARGE, "lkb_reparam", {"small": 3}, lambda shape: {"small": 3}
    ),
    "slak": BlockForm("slak", reference.LongKernels, (*LARGE, Shape(3, 6, 11, 2, groups=3)), "lkb_reparam"),
    "unireplknet": BlockForm(
        "unireplknet",
        reference.DilatedReparam,
        (Shape(3, 3, 7, groups=3), Shape(3, 3, 9, groups=3), Shape(3, 3, 5, groups=3)),
        "lk_origin",
        theirs=lambda shape: {"sets": [*zip(*UNIREPLKNET[shape.size])]},
    ),
    "unireplknet, larger": BlockForm(
        "unireplknet",
        reference.DilatedReparam,
        (Shape(3, 3, 11, groups=3), *(Shape(3, 3, size, groups=3) for size in (13, 15, 17))),
        "lk_origin",
        theirs=lambda shape: {"sets": [*zip(*UNIREPLKNET[shape.size])]},
    ),
    "qarepvgg": BlockForm("qarepvgg", reference.QuantizationAware, DENSE, "rbr_reparam"),
    "qarepvgg2": BlockForm(
        "qarepvgg2", reference.QuantizationAware, DENSE, "rbr_reparam", theirs=lambda shape: {"pool": True}
    ),
    "repvgg": BlockForm("repvgg", reference.ThreeNorms, DENSE, "rbr_reparam"),
    "mobileone": BlockForm(
        "mobileone",
        reference.SeveralCopies,
        (Shape(3, 4, 3, 2), Shape(4, 4, 3, groups=4), Shape(4, 6, 1), Shape(6, 6, 1)),
        "reparam_conv",
        {"copies": 2},
        lambda shape: {"copies": 2},
    ),
    "repghost": BlockForm(
        "repghost",
        reference.CheapOperation,
        (Shape(3, 3, 3, groups=3), Shape(3, 3, 5, groups=3), Shape(3, 3, 3)),
        "cheap_operation",
    ),
    "orepa": BlockForm("orepa", reference.SixScales, DENSE, "orepa_reparam"),
    "orepa, depthwise": BlockForm("orepa", reference.SixScales, DEPTHWISE, "orepa_reparam"),
    # With more than four groups the 1x1 before the kernel is twice as wide.
    "orepa, grouped": BlockForm(
        "orepa",
        reference.SixScales,
        (Shape(3, 12, 3), Shape(12, 12, 3, 2, groups=6), Shape(12, 24, 3, groups=12)),
        "orepa_reparam",
    ),
    "orepa_repvgg": BlockForm("orepa_repvgg", reference.ThreeNormsOfSixScales, SQUARE, "rbr_reparam"),
}
