"""RepOpt-VGG, RepOpt-GhostNet and their baselines as the authors of RepOptimizer name them.

Names from DingXiaoH/RepOptimizers (MIT licence)."""

from repopt_jax.interop.names.repghost import GHOST, cheap, ghost_layout
from repopt_jax.interop.names.repvgg import BLOCK, vgg_layout
from repopt_jax.interop.names.scheme import BIASED, NORM, TENSOR, Scheme

_SE = ("se/(down|up)", r"post_se.\1", BIASED)

SCHEME = Scheme(
    "repopt",
    "RepOpt-VGG and RepOpt-GhostNet as their authors name them",
    (
        vgg_layout(
            "search",
            signature=BLOCK + r"scale_conv\.weight ",
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
        vgg_layout(
            "repvgg",
            signature=BLOCK + r"conv_3x3\.weight ",
            inside=(
                ("conv/weights/(3x3|1x1)", r"conv_\1", TENSOR),
                ("conv/norms/(3x3|1x1|identity)", r"bn_\1", NORM),
                _SE,
            ),
        ),
        vgg_layout(
            signature=BLOCK + r"bn\.running_mean ",
            inside=(("conv", "conv", TENSOR), ("bn", "bn", NORM), _SE),
        ),
        vgg_layout(
            form="deployed",
            signature=BLOCK + r"conv\.bias ",
            inside=(("conv", "conv", BIASED), _SE),
        ),
        ghost_layout(
            "search",
            signature=GHOST + r"fusion_scale\.weight ",
            inside=cheap(
                ("conv/weights/3x3", "cheap_operation.0", TENSOR),
                ("conv/scales/3x3", "cheap_operation.1", TENSOR),
                ("conv/weights/identity", "fusion_scale", TENSOR),
                ("bn", "final_bn", NORM),
            ),
        ),
        ghost_layout(
            "repghost",
            signature=GHOST + r"fusion_bn\.weight ",
            inside=cheap(
                ("conv/weights/3x3", "cheap_operation.0", TENSOR),
                ("conv/norms/3x3", "cheap_operation.1", NORM),
                ("conv/norms/identity", "fusion_bn", NORM),
            ),
        ),
        ghost_layout(
            signature=GHOST + r"final_bn\.weight ",
            inside=cheap(("conv", "cheap_operation.0", TENSOR), ("bn", "final_bn", NORM)),
        ),
    ),
    se_first=False,
)
