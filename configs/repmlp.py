"""RepMLPNet on ImageNet, as published.

    data=--config.data.data_dir=imagenet
    repopt train --config=configs/repmlp.py:T224 $data --out=runs/repmlp/T224
    repopt train --config=configs/repmlp.py:T224 $data --config.model.mode=plain --out=runs/repmlp/T224-plain

The second command trains the dense layers without their branches. The number in a network's name is the size
of its images. `data_dir` is an image folder, `train/<class>/*` and `val/<class>/*`;
TFDS's by `--config.data.source=tfds --config.data.name=imagenet2012`. `,smoke` after the argument runs two
short epochs on a few embedded digits.

Source: the repository DingXiaoH/RepMLP (README, config.py, main_repmlp.py, data/build.py). It used 8 devices
of 32 images with batch statistics of each device, and half precision (here bfloat16 by
`--config.model.dtype=bfloat16`). Different here: mixup or cutmix is chosen for each pair of images, not for a
whole batch.
"""

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

NETWORKS = ("T224", "T256", "B224", "B256", "D256", "L256")


def get_config(arg: str = "") -> Config:
    network, small = parse_argument(arg, NETWORKS)
    name = f"repmlpnet-{network.lower()}"
    published = models.find(name).published
    config = Config(
        name=f"repmlp-{network}",
        epochs=100,
        batch_size=8 * 32,
        eval_batch_size=256,
        eval_every=5,
        log_every=100,
        keep_best=1,
        published=None if published is None else published.top1,
        mesh=MeshConfig(statistics="device"),
        model=ModelConfig(name=name, mode="repmlp"),
        data=DataConfig(
            source="folder",
            image_size=int(network[1:]),
            area=(0.08, 1.0),
            flip=True,
            randaugment=15,
            mixup=0.4,
            cutmix=1.0,
            mean=(0.485, 0.456, 0.406),
            std=(0.229, 0.224, 0.225),
            workers=8,
        ),
        optim=OptimConfig(
            name="adamw",
            learning_rate=1e-3,
            base_batch=256,
            weight_decay=0.1,
            warmup_epochs=10,
            warmup_start=5e-7,
            cosine_over="run",
            label_smoothing=0.1,
            clip_norm=5.0,
        ),
    )
    return smoke(config) if small else config
