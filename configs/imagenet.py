"""ImageNet, as published: RepOpt-VGG and RepOpt-GhostNet, what they are compared with, RepVGG and RepGhost.

    data=--config.data.data_dir=imagenet
    repopt train --config=configs/imagenet.py:B1 $data --out=runs/imagenet/B1
    repopt train --config=configs/imagenet.py:B1-plain $data --out=runs/imagenet/B1-plain
    repopt train --config=configs/imagenet.py:B1-repvgg $data --out=runs/imagenet/B1-repvgg
    repopt train --config=configs/imagenet.py:ghost-0.5 $data --out=runs/imagenet/ghost-0.5
    repopt train --config=configs/imagenet.py:repvgg-A0 $data --out=runs/imagenet/repvgg-A0
    repopt train --config=configs/imagenet.py:repghost-1.0 $data --out=runs/imagenet/repghost-1.0

`B1`, `B2`, `L1`, `L2` and `ghost-0.5` take the scales of `cifar100.py` (`runs/cifar100/B1/scales`);
`--config.scales=` names others, such as the authors', converted, or `depth` for those of no search. With
`-plain` they are trained by ordinary SGD, with `-repvgg` or `-repghost` as the structure that they replace.
`repvgg-...` and `repghost-...` are separate recipes. `data_dir` is an image folder, `train/<class>/*` and
`val/<class>/*`; TFDS's by `--config.data.source=tfds --config.data.name=imagenet2012`. `,smoke` after the
argument runs two short epochs on a few embedded digits. Options that are not part of these recipes:

    --config.data.mixup=0.2 --config.data.cutmix=1.0 --config.model.dtype=bfloat16 --config.optim.ema=0.9999

Sources: the code of the repositories DingXiaoH/RepOptimizers, DingXiaoH/RepVGG (train.py) and
ChengpengChen/RepGhost (args.yaml of its runs). All used 8 devices with batch statistics of each device. What
is different here: images are resized bilinearly, always (Ghost: at random in training, bicubic in
evaluation); erased boxes take the mean colour, not noise; a bias has the same learning rate as other
parameters (RepVGG: twice that, "made no difference"); for the widest RepGhosts RandAugment is that of the
other recipes, not timm's `rand-m9-mstd0.5`; their half precision is bfloat16, not float16.
"""

import dataclasses

from repopt_jax import models
from repopt_jax.train.config import (
    Config,
    DataConfig,
    MeshConfig,
    ModelConfig,
    OptimConfig,
    parse_argument,
    smoke,
)

# Network -> way of training -> published top-1; those of RepOpt itself, and of the networks below, are in
# `models.published`. Ghost's: README of RepOptimizers; plain SGD: paper (arXiv 2205.15242), table 4; RepVGG
# there: table 2, 32 images a device.
REPOPT: dict[str, dict[str, float | None]] = {
    "B1": {"-plain": 0.7691, "-repvgg": 0.7841},
    "B2": {"-plain": None, "-repvgg": 0.7953},
    "L1": {"-plain": None, "-repvgg": 0.7939},
    "L2": {"-plain": None, "-repvgg": 0.8052},
    "ghost-0.5": {"-plain": None, "-repghost": 0.6651},
}
# Those that are trained for 120 epochs.
REPVGG = ("A0", "A1", "A2", "B0", "B1", "B1g2", "B1g4", "B2", "B2g4")
REPGHOST = ("0.5", "0.58", "0.8", "1.0", "1.11", "1.3", "1.5", "2.0")


def get_config(arg: str = "") -> Config:
    recipes = _recipes()
    run, small = parse_argument(arg, recipes)
    config = dataclasses.replace(recipes[run], name=f"imagenet-{run}")
    return smoke(config) if small else config


def _recipes() -> dict[str, Config]:
    repopt = {network + way: _repopt(network, way) for network, ways in REPOPT.items() for way in ("", *ways)}
    repvgg = {f"repvgg-{variant}": _repvgg(variant) for variant in REPVGG}
    repghost = {f"repghost-{width}": _repghost(width) for width in REPGHOST}
    return repopt | repvgg | repghost


def _repopt(network: str, way: str) -> Config:
    name = f"repopt-vgg-{network}" if network in ("B1", "B2", "L1", "L2") else "repopt-ghostnet-0.5"
    config = _base(name, way.removeprefix("-") or "repopt")
    if way:
        config.published = REPOPT[network][way]
    config.scales = "" if way else f"runs/cifar100/{network}/scales"
    config.optim = OptimConfig(
        learning_rate=0.1,
        base_batch=256,
        weight_decay=4e-5,
        warmup_epochs=5,
        cosine_over="run",
        label_smoothing=0.1,
    )
    if network.startswith("ghost"):
        config.epochs, config.batch_size = 300, 8 * 128
        # Both rates are for 256 images: 2.4 and 4e-4 for these 1,024.
        config.optim.learning_rate, config.optim.warmup_start = 0.6, 1e-4
        config.optim.weight_decay = 1e-5
        config.data.resize, config.data.jitter, config.data.erasing = 256, 0.4, 0.2
    else:
        config.data.randaugment = 15  # and test images of 224 pixels, resized to that
    return config


def _repvgg(variant: str) -> Config:
    config = _base(f"repvgg-{variant}", "repvgg")
    config.data.resize = 256
    config.optim = OptimConfig(learning_rate=0.1, base_batch=256, nesterov=False, weight_decay=1e-4)
    return config


def _repghost(width: str) -> Config:
    config = _base(f"repghost-{width}", "repghost")
    config.epochs, config.batch_size = 300, 8 * 128
    config.model.dtype = "bfloat16"
    config.data.resize, config.data.jitter, config.data.erasing = 256, 0.4, 0.2
    if float(width) >= 1.3:
        config.data.randaugment = 9
    config.optim = OptimConfig(
        learning_rate=0.6,
        base_batch=1024,
        weight_decay=1e-5,
        warmup_epochs=5,
        warmup_start=1e-4,
        min_learning_rate=1e-5,
        cosine_over="run",
        schedule_by="epoch",
        label_smoothing=0.1,
        ema=0.9999,
    )
    return config


def _base(name: str, mode: str) -> Config:
    """Returns what all recipes share: 8 devices of 32 images, 120 epochs, random crops."""
    published = models.find(name).published
    return Config(
        epochs=120,
        batch_size=8 * 32,
        eval_batch_size=1024,
        eval_every=5,
        log_every=100,
        keep_best=1,
        published=None if published is None else published.top1,
        mesh=MeshConfig(statistics="device"),
        model=ModelConfig(name=name.lower(), mode=mode),
        data=DataConfig(
            source="folder",
            image_size=224,
            area=(0.08, 1.0),
            flip=True,
            mean=(0.485, 0.456, 0.406),
            std=(0.229, 0.224, 0.225),
            workers=8,
        ),
    )
