"""RepMLPNet as its authors name it. Names from DingXiaoH/RepMLP (MIT licence)."""

import functools

from repopt_jax.interop.names.scheme import BIASED, NORM, TENSOR, Blocks, Layout, Row, Scheme, Table

# The block that makes the map smaller is the first of our stages, and outside of theirs.
BLOCKS: Blocks = (
    ("stages/0/0", "conv_embedding"),
    (r"stages/(\d+)/0", lambda match: f"embeds.{int(match[1]) - 1}"),
    (r"stages/(\d+)/(\d+)", lambda match: f"stages.{match[1]}.{int(match[2]) - 1}"),
)
UNIT = r"stages\.\d+\.\d+\.repmlp_block\."  # the beginning of the keys of a mixer


def unit(*rows: Row) -> Table:
    """A unit's rows, with these for its dense layer."""
    return (
        ("conv", "conv", TENSOR),  # of the block that makes the map smaller
        ("bn", "bn", NORM),
        ("norm", "prebn1", NORM),
        ("mixer/gate/down", "repmlp_block.gp.fc1", BIASED),
        ("mixer/gate/up", "repmlp_block.gp.fc2", BIASED),
        *((f"mixer/fc/{path}", f"repmlp_block.{name}", arrays) for path, name, arrays in rows),
        ("up/pre", "prebn2", NORM),
        ("up/conv", "ffn_block.ffn_fc1.conv", TENSOR),
        ("up/bn", "ffn_block.ffn_fc1.bn", NORM),
        ("down/conv", "ffn_block.ffn_fc2.conv", TENSOR),
        ("down/bn", "ffn_block.ffn_fc2.bn", NORM),
    )


_layout = functools.partial(
    Layout,
    "RepMLPNet",
    rows=(("head/pre", "head_norm", NORM), ("head/conv", "head", BIASED)),
    blocks=BLOCKS,
    flattened=UNIT + r"fc3\.weight",
)

SCHEME = Scheme(
    "repmlp",
    "RepMLPNet as its authors name it",
    (
        _layout(
            "repmlp",
            signature=UNIT + r"repconv\d+\.conv\.weight ",
            inside=unit(
                (r"conv/weights/local_(\d+)x\d+", r"repconv\1.conv", TENSOR),
                (r"conv/norms/local_(\d+)x\d+", r"repconv\1.bn", NORM),
                (r"conv/weights/\d+x\d+", "fc3", TENSOR),
                (r"conv/norms/\d+x\d+", "fc3_bn", NORM),
            ),
        ),
        # Their deployed form: the dense layers merged, and all other batch norms as they are.
        _layout("repmlp", "merged", signature=UNIT + r"fc3\.bias ", inside=unit(("conv", "fc3", BIASED))),
        _layout(
            signature=UNIT + r"fc3_bn\.weight ", inside=unit(("conv", "fc3", TENSOR), ("bn", "fc3_bn", NORM))
        ),
    ),
)
