"""MobileOne as its authors name it. Source: apple/ml-mobileone (Apple's licence), read for facts."""

from repopt_jax.interop.names.repvgg import BLOCK, BLOCKS, HEAD
from repopt_jax.interop.names.scheme import BIASED, NORM, TENSOR, Layout, Scheme

_SE = (("se/down", "se.reduce", BIASED), ("se/up", "se.expand", BIASED))

SCHEME = Scheme(
    "mobileone",
    "MobileOne as its authors name it",
    (
        Layout(
            "MobileOne",
            "mobileone",
            mark=BLOCK + r"rbr_conv\.0\.conv\.weight ",
            rows=HEAD,
            blocks=BLOCKS,
            inside=(
                (r"conv/weights/\dx\d_(\d+)", r"rbr_conv.\1.conv", TENSOR),
                (r"conv/norms/\dx\d_(\d+)", r"rbr_conv.\1.bn", NORM),
                ("conv/weights/1x1", "rbr_scale.conv", TENSOR),
                ("conv/norms/1x1", "rbr_scale.bn", NORM),
                ("conv/norms/identity", "rbr_skip", NORM),
                *_SE,
            ),
        ),
        Layout(
            "MobileOne",
            "mobileone",
            "deployed",
            mark=BLOCK + r"reparam_conv\.weight ",
            rows=HEAD,
            blocks=BLOCKS,
            inside=(("conv", "reparam_conv", BIASED), *_SE),
        ),
    ),
    se_first=True,
)
