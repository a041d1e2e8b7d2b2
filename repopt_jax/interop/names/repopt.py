"""RepOpt-VGG, RepOpt-GhostNet and their baselines as the authors of RepOptimizer name them.

Source: DingXiaoH/RepOptimizers (MIT licence), read for facts."""

from repopt_jax.interop.names import repghost
from repopt_jax.interop.names.repghost import GHOST, OUTSIDE, cheap
from repopt_jax.interop.names.repvgg import BLOCK, BLOCKS, HEAD
from repopt_jax.interop.names.scheme import BIASED, NORM, TENSOR, Layout, Scheme

_SE = ("se/(down|up)", r"post_se.\1", BIASED)

SCHEME = Scheme(
    "repopt",
    "RepOpt-VGG and RepOpt-GhostNet as their authors name them",
    (
        Layout(
            "VGG",
            "search",
            mark=BLOCK + r"scale_conv\.weight ",
            rows=HEAD,
            blocks=BLOCKS,
            inside=(
                ("conv/weights/3x3", "conv", TENSOR),
                ("conv/scales/3x3", "scale_conv", TENSOR),
                ("conv/weights/1x1", "conv_1x1", TENSOR),
                ("conv/scales/1x1", "scale_1x1", TENSOR),
                ("conv/weights/identity", "scale_identity", TENSOR),
                ("bn", "bn", NORM),
                _SE,
            ),
        ),
        Layout(
            "VGG",
            "repvgg",
            mark=BLOCK + r"conv_3x3\.weight ",
            rows=HEAD,
            blocks=BLOCKS,
            inside=(
                ("conv/weights/([13]x[13])", r"conv_\1", TENSOR),
                ("conv/norms/([13]x[13]|identity)", r"bn_\1", NORM),
                _SE,
            ),
        ),
        Layout(
            "VGG",
            mark=BLOCK + r"bn\.running_mean ",
            rows=HEAD,
            blocks=BLOCKS,
            inside=(("conv", "conv", TENSOR), ("bn", "bn", NORM), _SE),
        ),
        Layout(
            "VGG",
            form="deployed",
            mark=BLOCK + r"conv\.bias ",
            rows=HEAD,
            blocks=BLOCKS,
            inside=(("conv", "conv", BIASED), _SE),
        ),
        Layout(
            "GhostNet",
            "search",
            mark=GHOST + r"fusion_scale\.weight ",
            rows=OUTSIDE,
            blocks=repghost.BLOCKS,
            inside=cheap(
                ("conv/weights/3x3", "cheap_operation.0", TENSOR),
                ("conv/scales/3x3", "cheap_operation.1", TENSOR),
                ("conv/weights/identity", "fusion_scale", TENSOR),
                ("bn", "final_bn", NORM),
            ),
        ),
        Layout(
            "GhostNet",
            "repghost",
            mark=GHOST + r"fusion_bn\.weight ",
            rows=OUTSIDE,
            blocks=repghost.BLOCKS,
            inside=cheap(
                ("conv/weights/3x3", "cheap_operation.0", TENSOR),
                ("conv/norms/3x3", "cheap_operation.1", NORM),
                ("conv/norms/identity", "fusion_bn", NORM),
            ),
        ),
        Layout(
            "GhostNet",
            mark=GHOST + r"final_bn\.weight ",
            rows=OUTSIDE,
            blocks=repghost.BLOCKS,
            inside=cheap(("conv", "cheap_operation.0", TENSOR), ("bn", "final_bn", NORM)),
        ),
    ),
    se_first=False,
)
