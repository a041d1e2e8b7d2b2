"""RepGhostNet as its authors name it. Names from ChengpengChen/RepGhost (MIT licence)."""

import functools
from collections.abc import Callable

from repopt_jax.interop.names.scheme import BIASED, NORM, TENSOR, Blocks, Layout, Row, Scheme, Table

OUTSIDE: Table = (
    ("stages/0/0/conv", "conv_stem", TENSOR),
    ("stages/0/0/bn", "bn1", NORM),
    ("features", "conv_head", BIASED),
    ("head", "classifier", BIASED),
)
# Our stage 0 is the stem, which the code base does not count as a stage.
BLOCKS: Blocks = ((r"stages/(\d+)/(\d+)", lambda match: f"blocks.{int(match[1]) - 1}.{match[2]}"),)
INSIDE: Table = (
    ("conv", "conv", TENSOR),  # of the 1x1 block after the last stage
    ("bn", "bn1", NORM),
    ("(ghost[12])/primary/conv", r"\1.primary_conv.0", TENSOR),
    ("(ghost[12])/primary/bn", r"\1.primary_conv.1", NORM),
    ("depthwise/conv", "conv_dw", TENSOR),
    ("depthwise/bn", "bn_dw", NORM),
    ("se/down", "se.conv_reduce", BIASED),
    ("se/up", "se.conv_expand", BIASED),
    ("shortcut/0/conv", "shortcut.0", TENSOR),
    ("shortcut/0/bn", "shortcut.1", NORM),
    ("shortcut/1/conv", "shortcut.2", TENSOR),
    ("shortcut/1/bn", "shortcut.3", NORM),
)
ghost_layout: Callable[..., Layout] = functools.partial(Layout, "GhostNet", rows=OUTSIDE, blocks=BLOCKS)
GHOST = r"blocks\.\d+\.\d+\.ghost1\."  # the beginning of the keys of a ghost module


def cheap(*rows: Row) -> Table:
    """A bottleneck's rows, with these for the cheap layers of its ghost modules."""
    return INSIDE + tuple((f"(ghost[12])/cheap/{path}", rf"\1.{name}", arrays) for path, name, arrays in rows)


LAYOUTS = (
    ghost_layout(
        "repghost",
        signature=GHOST + r"fusion_bn\.0\.weight ",
        inside=cheap(
            ("conv/weights/3x3", "cheap_operation.0", TENSOR),
            ("conv/norms/3x3", "cheap_operation.1", NORM),
            ("conv/norms/identity", "fusion_bn.0", NORM),
        ),
    ),
    ghost_layout(
        "repghost",
        "merged",
        signature=GHOST + r"cheap_operation\.weight ",
        inside=cheap(("conv", "cheap_operation", BIASED)),
    ),
    ghost_layout(
        signature=GHOST + r"cheap_operation\.1\.weight ",
        inside=cheap(("conv", "cheap_operation.0", TENSOR), ("bn", "cheap_operation.1", NORM)),
    ),
)

SCHEME = Scheme("repghost", "RepGhostNet as its authors name it", LAYOUTS)
