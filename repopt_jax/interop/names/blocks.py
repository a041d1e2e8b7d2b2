r"""Published blocks by themselves: the names of a structure's arrays inside a module of any PyTorch network.

The other tables of this folder name whole networks. Here a network is your own, and some of its layers are a
block of the literature:

    scheme = block_scheme(
        "dbb",
        {r"stages/(\d+)/(\d+)/conv(\d)": r"layer\1.\2.conv\3"},     # our layer -> their module
        (("fc", "fc", BIASED), (r"stages/(\d+)/(\d+)/bn(\d)", r"layer\1.\2.bn\3", NORM)),
    )
    model = from_torch(tensors, to_structure(model, "dbb", rngs=nnx.Rngs(0)), scheme)

`tensors` is any mapping from keys to arrays: a state dict, or the HDF5 file of keys in which ACNet's authors
store their weights, as NumPy arrays.

In these tables the layer's own kernel is called `own`, whatever its size, and a tensor to which the identity
is added, which PyTorch stores without it, is in `deltas` in place of `weights`. Names are those of
DingXiaoH/{ACNet,DiverseBranchBlock,RepVGG,RepLKNet-pytorch} (MIT licence), AILab-CVC/UniRepLKNet (Apache
2.0), cxxgtxy/QARepVGG, apple/ml-mobileone (Apple's licence) and ChengpengChen/RepGhost (MIT licence).
"""

from collections.abc import Mapping
from typing import Literal, NamedTuple

from repopt_jax.core import paths
from repopt_jax.hints import did_you_mean
from repopt_jax.interop.names.scheme import BIASED, NORM, TENSOR, Layout, Row, Scheme, Table
from repopt_jax.surgery.choose import Options, find_structure


class BlockNames(NamedTuple):
    """The names of one block.

    Attributes:
      rows: as in `Layout`, of paths inside the layer. Groups have names, because the numbered ones are those
        of the layer's own path.
      deployed: the name of the one convolution of the deployed block.
    """

    rows: Table
    deployed: str


def _normed(part: str, convolution: str, norm: str) -> tuple[Row, Row]:
    """Rows of a stage's tensor and of its batch norm."""
    return (f"weights/{part}", convolution, TENSOR), (f"norms/{part}", norm, NORM)


_QAREPVGG = BlockNames(
    (*_normed("own", "rbr_dense.conv", "rbr_dense.bn"), ("weights/1x1", "rbr_1x1", TENSOR)), "rbr_reparam"
)

# Name of a structure -> the names of its block.
BLOCK_NAMES: dict[str, BlockNames] = {
    "repvgg": BlockNames(
        (
            *_normed("own", "rbr_dense.conv", "rbr_dense.bn"),
            *_normed("1x1", "rbr_1x1.conv", "rbr_1x1.bn"),
            ("norms/identity", "rbr_identity", NORM),
        ),
        "rbr_reparam",
    ),
    "mobileone": BlockNames(
        (
            *_normed(
                r"own_(?P<block_copy>\d+)", r"rbr_conv.\g<block_copy>.conv", r"rbr_conv.\g<block_copy>.bn"
            ),
            *_normed("1x1", "rbr_scale.conv", "rbr_scale.bn"),
            ("norms/identity", "rbr_skip", NORM),
        ),
        "reparam_conv",
    ),
    "repghost": BlockNames(
        (
            *_normed("own", "cheap_operation.0", "cheap_operation.1"),
            ("norms/identity", "fusion_bn.0", NORM),
        ),
        "cheap_operation",
    ),
    "acnet": BlockNames(
        (
            *_normed("own", "square_conv", "square_bn"),
            *_normed(r"\d+x1", "ver_conv", "ver_bn"),
            *_normed(r"1x\d+", "hor_conv", "hor_bn"),
        ),
        "fused_conv",
    ),
    "dbb": BlockNames(
        (
            *_normed("own", "dbb_origin.conv", "dbb_origin.bn"),
            *_normed("1x1", "dbb_1x1.conv", "dbb_1x1.bn"),
            *_normed("average_0", "dbb_avg.conv", "dbb_avg.bn.bn"),
            ("norms/average(_1)?", "dbb_avg.avgbn", NORM),
            *_normed("1x1_own_0", "dbb_1x1_kxk.conv1", "dbb_1x1_kxk.bn1.bn"),
            ("deltas/1x1_own_0", "dbb_1x1_kxk.idconv1", TENSOR),
            *_normed("1x1_own_1", "dbb_1x1_kxk.conv2", "dbb_1x1_kxk.bn2"),
        ),
        "dbb_reparam",
    ),
    "replknet": BlockNames(
        (
            *_normed("own", "lkb_origin.conv", "lkb_origin.bn"),
            *_normed(r"\d+x\d+", "small_conv.conv", "small_conv.bn"),
        ),
        "lkb_reparam",
    ),
    "unireplknet": BlockNames(
        (
            *_normed("own", "lk_origin", "origin_bn"),
            *_normed(r"(?P<block_k>\d+)x(?P=block_k)", r"dil_conv_k\g<block_k>_1", r"dil_bn_k\g<block_k>_1"),
            *_normed(
                r"(?P<block_k>\d+)x(?P=block_k)_d(?P<block_d>\d+)x(?P=block_d)",
                r"dil_conv_k\g<block_k>_\g<block_d>",
                r"dil_bn_k\g<block_k>_\g<block_d>",
            ),
        ),
        "lk_origin",
    ),
    # The pooling of the second version and the bare identity have no arrays. The batch norm after the sum,
    # `bn` there, is an array of the network here.
    "qarepvgg": _QAREPVGG,
    "qarepvgg2": _QAREPVGG,
}


def block_scheme(
    structure: str, blocks: Mapping[str, str], rows: Table = (), *, options: Options = None
) -> Scheme:
    r"""Returns the names of a network of your own some of whose layers are a published block.

    The scheme serves the network with branches and the deployed one, whose blocks are one convolution each.
    A block has no bias beside those of its batch norms. The batch norm after QARepVGG's sum belongs to the
    block there and is a module of the network here: name it in `rows`, as `(r"norms/(\d+)",
    r"layers.\1.bn", NORM)`. `fuse` folds it as well; the deployed form that keeps it, for training with
    quantization, is that of `fuse(model, only=(nn.Branched,))`.

    Args:
      structure: a key of `BLOCK_NAMES`.
      blocks: regular expression for the whole path of a layer of branches, `stages/1/0/conv` -> the name of
        the block in PyTorch, which may refer to groups of the expression by number.
      rows: (expression, name, arrays) for the other layers, as in `Layout`.
      options: those with which the layers were made, as in `find_structures`.

    Raises:
      ValueError: a structure without published names, an unknown option, or what is no regular expression.
    """
    description = find_structure(structure, options)
    for pattern in blocks:
        paths.compiled(pattern, "blocks")
    described = tuple((pattern, description) for pattern in blocks)

    def layout(form: Literal["training", "deployed"]) -> Layout:
        inside = (
            row
            for pattern, name in blocks.items()
            for row in block_rows(structure, pattern, name, deployed=form == "deployed")
        )
        return Layout(mode=structure, form=form, rows=(*inside, *rows), described=described)

    about = f"{structure} blocks in a network of its own"
    return Scheme(f"{structure} blocks", about, (layout("training"), layout("deployed")))


def block_rows(structure: str, pattern: str, name: str, *, deployed: bool = False) -> Table:
    """Returns the rows of the blocks at `pattern`, for a `Layout` of several kinds of blocks.

    Raises:
      ValueError: a structure without published names.
    """
    if structure not in BLOCK_NAMES:
        raise ValueError(
            f"there are no names of {structure!r} blocks{did_you_mean(structure, BLOCK_NAMES)}: `structure` "
            f"must be one of {', '.join(BLOCK_NAMES)}"
        )
    names = BLOCK_NAMES[structure]
    if deployed:
        return ((f"(?:{pattern})", f"{name}.{names.deployed}", BIASED),)
    return tuple(
        (f"(?:{pattern})/{inside}", f"{name}.{inner}", arrays) for inside, inner, arrays in names.rows
    )
