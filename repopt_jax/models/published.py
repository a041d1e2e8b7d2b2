"""Accuracies that the authors of the networks publish, on ImageNet, each with its source.

A network without one has no row.
"""

from typing import NamedTuple


class Published(NamedTuple):
    """A published accuracy.

    Attributes:
      top1: of one crop of the validation images of ImageNet-1k, in [0, 1], without other training data.
      source: where it stands.
      image_size: side, in pixels, of the images that it was measured on.
    """

    top1: float
    source: str
    image_size: int = 224


def _rows(prefix: str, source: str, /, image_size: int = 224, **top1: float) -> dict[str, Published]:
    return {f"{prefix}{key}": Published(value, source, image_size) for key, value in top1.items()}


_SHORT, _LONG = (f"RepVGG, arXiv 2101.03697, table {table}" for table in ("4, 120 epochs", "5, 200 epochs"))
_REPMLP = "README of DingXiaoH/RepMLP"

# Name in the registry -> what its authors report of the network, trained in the way of its entry.
PUBLISHED: dict[str, Published] = {
    **_rows("repopt-vgg-", "README of DingXiaoH/RepOptimizers", b1=0.7862, b2=0.7968, l1=0.7982, l2=0.8047),
    **_rows("repvgg-", _SHORT, a0=0.7241, a1=0.7446, a2=0.7648, b0=0.7514, b1=0.7837),
    **_rows("repvgg-", _SHORT, b1g2=0.7778, b1g4=0.7758, b2=0.7878, b2g4=0.7850),
    **_rows("repvgg-", _LONG, b3=0.8052, b3g4=0.8021),
    **_rows("repvgg-", "RepOptimizers, arXiv 2205.15242, table 2, 32 images a GPU", l1=0.7939, l2=0.8052),
    **_rows("repvgg-", "README of DingXiaoH/RepVGG", image_size=320, d2se=0.8355),
    "repopt-ghostnet-0.5": Published(0.6650, "README of DingXiaoH/RepOptimizers"),
    **{
        f"repghost-{width}": Published(top1, "README of ChengpengChen/RepGhost")
        for width, top1 in (
            *(("0.5", 0.6695), ("0.58", 0.6894), ("0.8", 0.7224), ("1.0", 0.7422)),
            *(("1.11", 0.7507), ("1.3", 0.7637), ("1.5", 0.7745), ("2.0", 0.7881)),
        )
    },
    **_rows("mobileone-", "README of apple/ml-mobileone", s0=0.714, s1=0.759, s2=0.774, s3=0.781, s4=0.794),
    **_rows("repmlpnet-", _REPMLP, t224=0.7662, b224=0.8032),
    **_rows("repmlpnet-", _REPMLP, image_size=256, t256=0.7744, b256=0.8103, d256=0.8083, l256=0.8168),
}
