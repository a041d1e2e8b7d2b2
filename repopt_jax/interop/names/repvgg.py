"""RepVGG as its authors name it. Source: DingXiaoH/RepVGG (MIT licence), read for facts."""

from repopt_jax.interop.names.scheme import BIASED, NORM, TENSOR, Layout, Scheme

HEAD = (("head", "linear", BIASED),)
BLOCKS = (("stages/0/0", "stage0"), (r"stages/(\d+)/(\d+)", r"stage\1.\2"))
BLOCK = r"stage\d+\.(\d+\.)?"  # the beginning of the keys of a block

_SE = ("se/(down|up)", r"se.\1", BIASED)

SCHEME = Scheme(
    "repvgg",
    "RepVGG as its authors name it",
    (
        Layout(
            "VGG",
            "repvgg",
            mark=BLOCK + r"rbr_dense\.conv\.weight ",
            rows=HEAD,
            blocks=BLOCKS,
            inside=(
                ("conv/weights/3x3", "rbr_dense.conv", TENSOR),
                ("conv/norms/3x3", "rbr_dense.bn", NORM),
                ("conv/weights/1x1", "rbr_1x1.conv", TENSOR),
                ("conv/norms/1x1", "rbr_1x1.bn", NORM),
                ("conv/norms/identity", "rbr_identity", NORM),
                _SE,
            ),
        ),
        Layout(
            "VGG",
            "repvgg",
            "deployed",
            mark=BLOCK + r"rbr_reparam\.weight ",
            rows=HEAD,
            blocks=BLOCKS,
            inside=(("conv", "rbr_reparam", BIASED), _SE),
        ),
    ),
    se_first=True,
)
