"""MobileOne as its authors name it. Names from apple/ml-mobileone (Apple's licence)."""

import functools

from repopt_jax.interop.names.repvgg import BLOCK, BLOCKS, HEAD
from repopt_jax.interop.names.scheme import BIASED, NORM, TENSOR, Layout, Scheme

_layout = functools.partial(Layout, "MobileOne", rows=HEAD, blocks=BLOCKS)
_SE = (("se/down", "se.reduce", BIASED), ("se/up", "se.expand", BIASED))

SCHEME = Scheme(
    "mobileone",
    "MobileOne as its authors name it",
    (
        _layout(
            "mobileone",
            signature=BLOCK + r"rbr_conv\.0\.conv\.weight ",
            inside=(
                (r"conv/weights/\dx\d_(\d+)", r"rbr_conv.\1.conv", TENSOR),
                (r"conv/norms/\dx\d_(\d+)", r"rbr_conv.\1.bn", NORM),
                ("conv/weights/1x1", "rbr_scale.conv", TENSOR),
                ("conv/norms/1x1", "rbr_scale.bn", NORM),
                ("conv/norms/identity", "rbr_skip", NORM),
                *_SE,
            ),
        ),
        _layout(
            "mobileone",
            "deployed",
            signature=BLOCK + r"reparam_conv\.weight ",
            inside=(("conv", "reparam_conv", BIASED), *_SE),
        ),
    ),
    se_first=True,
)
