"""What a network of the registry comes to: parameters in both forms, operations, published accuracy."""

import dataclasses
from typing import Any

import jax
import numpy as np
from flax import nnx

from repopt_jax import models
from repopt_jax.nn.rngs import counted_in_python
from repopt_jax.surgery.fuse import fuse
from repopt_jax.surgery.macs import count_macs
from repopt_jax.surgery.prepare import Mode, prepare


@dataclasses.dataclass(frozen=True)
class Description:
    """One network.

    Attributes:
      name, mode, task: as in its `models.Entry`.
      image_size, num_classes, in_channels: what the counts are for.
      train_parameters: trained numbers in the form of `mode`, with its branches where it has some.
      deploy_parameters: numbers of the fused network.
      macs: multiply-accumulates of the fused network for one image, see `count_macs`; None without an
        `image_size`.
      top1, source: the published accuracy in [0, 1], of images of `image_size`, and where it stands; None
        where there is none.
    """

    name: str
    mode: str
    task: str
    image_size: int | None
    num_classes: int
    in_channels: int
    train_parameters: int
    deploy_parameters: int
    macs: int | None
    top1: float | None
    source: str | None


def describe(name: str) -> Description:
    """Counts a network by its name. Nothing of it is drawn or computed: it is traced, in about a second.

        describe("repvgg-b1").train_parameters  # 57_415_016, of which 51_829_480 are deployed

    Raises:
      ValueError: an unknown name.
    """
    entry = models.find(name)
    sizes = {"num_classes": entry.num_classes, "in_channels": entry.in_channels}

    def build() -> nnx.Module:
        with counted_in_python(nnx.Rngs(0)) as rngs:
            plain = models.create(entry.name, **sizes, rngs=rngs)
            # With its structure in the optimizer a network trains as it is.
            return plain if entry.mode == Mode.REPOPT else prepare(plain, entry.mode, rngs=rngs).model

    def deploy(model: nnx.Module) -> nnx.Module:
        model.eval()
        return fuse(model)

    trained = nnx.eval_shape(build)
    deployed = nnx.eval_shape(deploy, trained)
    macs = None
    if entry.image_size is not None:
        shape = (1, entry.image_size, entry.image_size, entry.in_channels)
        macs = count_macs(deployed, jax.ShapeDtypeStruct(shape, np.float32))
    published = entry.published
    return Description(
        *(entry.name, entry.mode, entry.task, entry.image_size, entry.num_classes, entry.in_channels),
        train_parameters=_count(trained),
        deploy_parameters=_count(deployed),
        macs=macs,
        top1=None if published is None else published.top1,
        source=None if published is None else published.source,
    )


def _count(model: Any) -> int:
    return sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(nnx.state(model, nnx.Param)))
