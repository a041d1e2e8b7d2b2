"""RepVGG, MobileOne and RepGhostNet as timm names them; the last has its authors' names there.

Names from huggingface/pytorch-image-models (Apache 2.0)."""

import functools

from repopt_jax.interop.names import repghost
from repopt_jax.interop.names.scheme import BIASED, NORM, TENSOR, Layout, Scheme

_HEAD = (("head", "head.fc", BIASED),)
# Our stage 0 is the stem, which the code base does not count as a stage.
_BLOCKS = (
    ("stages/0/0", "stem"),
    (r"stages/(\d+)/(\d+)", lambda match: f"stages.{int(match[1]) - 1}.{match[2]}"),
)
_SE = (("se/down", "attn.fc1", BIASED), ("se/up", "attn.fc2", BIASED))
_layout = functools.partial(Layout, rows=_HEAD, blocks=_BLOCKS)
_DEPLOYED = (("conv", "reparam_conv", BIASED), *_SE)

SCHEME = Scheme(
    "timm",
    "RepVGG, MobileOne and RepGhostNet as timm names them",
    (
        _layout(
            "VGG",
            "repvgg",
            signature=r"stem\.conv_kxk\.conv\.weight ",
            inside=(
                ("conv/weights/3x3", "conv_kxk.conv", TENSOR),
                ("conv/norms/3x3", "conv_kxk.bn", NORM),
                ("conv/weights/1x1", "conv_1x1.conv", TENSOR),
                ("conv/norms/1x1", "conv_1x1.bn", NORM),
                ("conv/norms/identity", "identity", NORM),
                *_SE,
            ),
        ),
        _layout(
            "MobileOne",
            "mobileone",
            signature=r"stem\.conv_kxk\.0\.conv\.weight ",
            inside=(
                (r"conv/weights/\dx\d_(\d+)", r"conv_kxk.\1.conv", TENSOR),
                (r"conv/norms/\dx\d_(\d+)", r"conv_kxk.\1.bn", NORM),
                ("conv/weights/1x1", "conv_scale.conv", TENSOR),
                ("conv/norms/1x1", "conv_scale.bn", NORM),
                ("conv/norms/identity", "identity", NORM),
                *_SE,
            ),
        ),
        # Deployed, both have the same keys; only MobileOne has 1x1 kernels.
        _layout(
            "MobileOne",
            "mobileone",
            "deployed",
            signature=r"stages\.0\.1\.reparam_conv\.weight \d+,\d+,1,1$",
            inside=_DEPLOYED,
        ),
        _layout(
            "VGG",
            "repvgg",
            "deployed",
            signature=r"stem\.reparam_conv\.weight ",
            inside=_DEPLOYED,
        ),
        *repghost.LAYOUTS,
    ),
    se_first=True,
)
