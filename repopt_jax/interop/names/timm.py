"""RepVGG, MobileOne and RepGhostNet as timm names them; the last has its authors' names there.

Source: huggingface/pytorch-image-models (Apache 2.0), read for facts."""

from repopt_jax.interop.names import repghost
from repopt_jax.interop.names.scheme import BIASED, NORM, TENSOR, Layout, Scheme

_HEAD = (("head", "head.fc", BIASED),)
# Stages count from 1 here, as the stem is the stage 0.
_BLOCKS = (
    ("stages/0/0", "stem"),
    (r"stages/(\d+)/(\d+)", lambda match: f"stages.{int(match[1]) - 1}.{match[2]}"),
)
_SE = (("se/down", "attn.fc1", BIASED), ("se/up", "attn.fc2", BIASED))
_DEPLOYED = (("conv", "reparam_conv", BIASED), *_SE)

SCHEME = Scheme(
    "timm",
    "RepVGG, MobileOne and RepGhostNet as timm names them",
    (
        Layout(
            "VGG",
            "repvgg",
            mark=r"stem\.conv_kxk\.conv\.weight ",
            rows=_HEAD,
            blocks=_BLOCKS,
            inside=(
                ("conv/weights/3x3", "conv_kxk.conv", TENSOR),
                ("conv/norms/3x3", "conv_kxk.bn", NORM),
                ("conv/weights/1x1", "conv_1x1.conv", TENSOR),
                ("conv/norms/1x1", "conv_1x1.bn", NORM),
                ("conv/norms/identity", "identity", NORM),
                *_SE,
            ),
        ),
        Layout(
            "MobileOne",
            "mobileone",
            mark=r"stem\.conv_kxk\.0\.conv\.weight ",
            rows=_HEAD,
            blocks=_BLOCKS,
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
        Layout(
            "MobileOne",
            "mobileone",
            "deployed",
            mark=r"stages\.0\.1\.reparam_conv\.weight \d+,\d+,1,1$",
            rows=_HEAD,
            blocks=_BLOCKS,
            inside=_DEPLOYED,
        ),
        Layout(
            "VGG",
            "repvgg",
            "deployed",
            mark=r"stem\.reparam_conv\.weight ",
            rows=_HEAD,
            blocks=_BLOCKS,
            inside=_DEPLOYED,
        ),
        *repghost.LAYOUTS,
    ),
    se_first=True,
)
