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
2.0), VITA-Group/SLaK, cxxgtxy/QARepVGG, apple/ml-mobileone (Apple's licence), ChengpengChen/RepGhost (MIT
licence) and JUGGHM/OREPA_CVPR2022.

OREPA's block stores the scales of its branches as rows of one array, and three constants. Its table of
cosines is the one here in windows of three taps a side, with an even number of outputs. In other windows the
published code fills three taps a side and leaves the others as it finds the memory, and an odd number of
outputs gives it frequencies of half a step: such weights are refused, because no structure here computes the
same.
"""

from collections.abc import Callable, Mapping
from typing import Literal, NamedTuple

import numpy as np

from repopt_jax.arguments import check_kind
from repopt_jax.core import algebra, paths
from repopt_jax.core.structure import Structure
from repopt_jax.hints import did_you_mean
from repopt_jax.interop.names.scheme import (
    BIASED,
    NORM,
    TENSOR,
    Constant,
    Layout,
    Row,
    Scheme,
    Stored,
    Table,
)
from repopt_jax.surgery.choose import Options, find_structure


class BlockNames(NamedTuple):
    """The names of one block.

    Attributes:
      rows: as in `Layout`, of paths inside the layer, with names inside the block, or "" for both. Groups
        have names, because the numbered ones are those of the layer's own path.
      deployed: the name of the one convolution of the deployed block.
    """

    rows: Table
    deployed: str


def _normed(part: str, convolution: str, norm: str) -> tuple[Row, Row]:
    """Rows of a stage's tensor and of its batch norm."""
    return (f"weights/{part}", convolution, TENSOR), (f"norms/{part}", norm, NORM)


def _orepa(prefix: str, module: str, *scaled: str, spare: Callable[[Structure], int] | None = None) -> Table:
    """Rows of OREPA's tensors, which are parameters of one module, and of the constants beside them.

    Args:
      prefix: the beginning of the tensors' names.
      module: the name of the module in the block; "" for the block itself.
      scaled: the stages whose scales are the rows of `vector`, in this order.
      spare: as in `Stored`, of `vector`.
    """
    tensors: dict[str, str | Stored] = {
        "weights/own": f"{prefix}_origin",
        "weights/average": f"{prefix}_avg_conv",
        "weights/frequency": f"{prefix}_pfir_conv",
        "deltas/1x1_own_0": f"{prefix}_1x1_kxk_idconv1",
        "weights/1x1_own_1": f"{prefix}_1x1_kxk_conv2",
        "weights/depthwise_1x1_0": f"{prefix}_gconv_dw",
        "weights/depthwise_1x1_1": Stored(f"{prefix}_gconv_pw", groups_last=True),
    }
    if "1x1" in scaled:
        tensors["weights/1x1"] = f"{prefix}_1x1"
    for row, stage in enumerate(scaled):
        tensors[f"scales/{stage}"] = Stored("vector", row, len(scaled), spare)
    constants: dict[str, Constant] = {
        f"{prefix}_avg_avg": lambda structure: np.full(structure.layer.window, 1 / structure.layer.taps),
        f"{prefix}_prior": lambda structure: np.moveaxis(
            algebra.frequencies(structure.layer.kernel)[..., 0, :], -1, 0
        ),
        "id_tensor": _identity_of_residual,
    }
    above = f"{module}." if module else ""
    return (
        *((stage, module, {"": name}) for stage, name in tensors.items()),
        *(("", above + name, constant) for name, constant in constants.items()),
    )


def _identity_of_residual(structure: Structure) -> np.ndarray:
    """Returns the identity that is added to the tensor of the structure's one residual stage."""
    (part,) = (part for part in structure.parts if part.stage.residual)
    return np.moveaxis(np.asarray(algebra.diagonal(part.layer.kernel)), (-1, -2), (0, 1))


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
    # With small kernels of five, as in all published networks.
    "slak": BlockNames(
        (
            *_normed(r"(?!5x)\d+x5", "Decom1.conv", "Decom1.bn"),
            *_normed(r"5x(?!5$)\d+", "Decom2.conv", "Decom2.bn"),
            *_normed("5x5", "small_conv.conv", "small_conv.bn"),
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
    # As of QARepVGG, the batch norm after the sum is an array of the network here.
    "orepa": BlockNames(
        _orepa("weight_orepa", "", "own", "average", "frequency", "1x1_own_1", "1x1", "depthwise_1x1_1"),
        "orepa_reparam",
    ),
    # Not defined there for layers of several groups.
    "orepa_repvgg": BlockNames(
        (
            # Where the block has an identity, `vector` has one row more, which nothing uses.
            *_orepa(
                "weight_rbr",
                "rbr_dense",
                "own",
                "average",
                "frequency",
                "1x1_own_1",
                "depthwise_1x1_1",
                spare=lambda structure: int(structure.layer.has_identity),
            ),
            ("norms/squeezed", "rbr_dense.bn", NORM),
            *_normed("1x1", "rbr_1x1.conv", "rbr_1x1.bn"),
            ("norms/identity", "rbr_identity", NORM),
        ),
        "rbr_reparam",
    ),
}


def block_scheme(
    structure: str, blocks: Mapping[str, str], rows: Table = (), *, options: Options = None
) -> Scheme:
    r"""Returns the names of a network of your own some of whose layers are a published block.

    The scheme serves the network with branches and the deployed one, whose blocks are one convolution each.
    A block has no bias beside those of its batch norms. The batch norm after the sum of QARepVGG and OREPA
    belongs to the block there and is a module of the network here: name it in `rows`, as `(r"norms/(\d+)",
    r"layers.\1.bn", NORM)`. `fuse` folds it as well; the deployed form that keeps it, for training with
    quantization, is that of `fuse(model, only=(nn.Branched,))`.

    Args:
      structure: a key of `BLOCK_NAMES`.
      blocks: regular expression for the whole path of a layer of branches, `stages/1/0/conv` -> the name of
        the block in PyTorch, which may refer to groups of the expression by number.
      rows: (expression, name, arrays) for the other layers, as in `Layout`.
      options: those with which the layers were made, as in `find_structures`.

    Raises:
      ValueError: a structure without published names, an unknown option, what is no regular expression, or a
        name that refers to a group which its expression has not.
    """
    check_kind("structure", structure, str, "the name of a structure")
    check_kind("blocks", blocks, Mapping, "a mapping of patterns to names")
    description = find_structure(structure, options)
    for pattern, name in blocks.items():
        paths.compiled(pattern, "blocks", replacement=name)
    for pattern, name, _ in rows:
        paths.compiled(pattern, "rows", replacement=name)
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
        (f"(?:{pattern})/{inside}" if inside else pattern, f"{name}.{inner}" if inner else name, arrays)
        for inside, inner, arrays in names.rows
    )
