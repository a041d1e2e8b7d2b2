"""The hyper-search of the RepOptimizer paper: scales for ImageNet's networks, found on CIFAR-100.

    repopt search --config=configs/cifar100.py:B1 --out=runs/cifar100/B1
    repopt search --config=configs/cifar100.py:ghost-0.5 --out=runs/cifar100/ghost-0.5

The data set is TFDS's `cifar100`, prepared beforehand; `--config.data.data_dir=` names TFDS's folder if it is
not the default one. An image folder (`train/<class>/*`, `test/<class>/*`, 32x32 pixels) serves as well:
`--config.data.source=folder --config.data.name= --config.data.data_dir=cifar100`. `imagenet.py` takes the
scales from where the commands above leave them. `,smoke` after the argument runs two short epochs on a few
embedded digits.

The recipe is that of the repository DingXiaoH/RepOptimizers (README, config.py, lr_scheduler.py,
data/build.py): 8 devices of 32 images (Ghost: 128), with batch statistics of each device; the network is
ImageNet's with all its strides and 100 classes. The learning rate is for 256 images, so that Ghost's 0.6
becomes 2.4. One thing is different: the identity's weight of Ghost is decayed, which the repository excludes
by its name. So the search trains the network that the target's optimizer reproduces.
"""

from repopt_jax.train.config import (
    Config,
    DataConfig,
    MeshConfig,
    ModelConfig,
    OptimConfig,
    parse_argument,
    smoke,
)

# Network -> published top-1 of the search itself: paper (arXiv 2205.15242), table 6. It does not measure the
# quality of the scales: other strides give a better search and worse scales.
RUNS = {"B1": 0.5453, "B2": None, "L1": None, "L2": None, "ghost-0.5": None}
NETWORKS = {
    **{key: f"repopt-vgg-{key.lower()}" for key in ("B1", "B2", "L1", "L2")},
    "ghost-0.5": "repopt-ghostnet-0.5",
}


def get_config(arg: str = "") -> Config:
    network, small = parse_argument(arg, RUNS)
    ghost = network.startswith("ghost")
    config = Config(
        name=f"cifar100-{network}",
        epochs=600 if ghost else 240,
        batch_size=8 * (128 if ghost else 32),
        eval_batch_size=1024,
        eval_every=10,
        published=RUNS[network],
        mesh=MeshConfig(statistics="device"),
        model=ModelConfig(name=NETWORKS[network], mode="search"),
        data=DataConfig(
            source="tfds",
            name="cifar100",
            image_size=32,
            crop_padding=4,
            flip=True,
            mean=(0.5071, 0.4865, 0.4409),
            std=(0.2673, 0.2564, 0.2762),
        ),
        optim=OptimConfig(
            learning_rate=0.6 if ghost else 0.1,
            base_batch=256,
            weight_decay=1e-5 if ghost else 4e-5,
            warmup_epochs=10,
            cosine_over="run",
            label_smoothing=0.1,
            clip_norm=5.0,
        ),
    )
    return smoke(config) if small else config
