"""RepVGG as its authors name it. Names from DingXiaoH/RepVGG (MIT licence)."""

import functools
from collections.abc import Callable

from repopt_jax.interop.names.scheme import BIASED, NORM, TENSOR, Layout, Scheme

HEAD = (("head", "linear", BIASED),)
BLOCKS = (("stages/0/0", "stage0"), (r"stages/(\d+)/(\d+)", r"stage\1.\2"))
vgg_layout: Callable[..., Layout] = functools.partial(Layout, "VGG", rows=HEAD, blocks=BLOCKS)
BLOCK = r"stage\d+\.(\d+\.)?"  # the beginning of the keys of a block

_SE = ("se/(down|up)", r"se.\1", BIASED)

SCHEME = Scheme(
    "repvgg",
    "RepVGG as its authors name it",
    (
        vgg_layout(
            "repvgg",
            signature=BLOCK + r"rbr_dense\.conv\.weight ",
            inside=(
                ("conv/weights/3x3", "rbr_dense.conv", TENSOR),
                ("conv/norms/3x3", "rbr_dense.bn", NORM),
                ("conv/weights/1x1", "rbr_1x1.conv", TENSOR),
                ("conv/norms/1x1", "rbr_1x1.bn", NORM),
                ("conv/norms/identity", "rbr_identity", NORM),
                _SE,
            ),
        ),
        vgg_layout(
            "repvgg",
            "deployed",
            signature=BLOCK + r"rbr_reparam\.weight ",
            inside=(("conv", "rbr_reparam", BIASED), _SE),
        ),
    ),
    se_first=True,
)
