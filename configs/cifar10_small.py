"""CIFAR-10 at a size that a laptop trains: 20,480 images, 8 epochs, 1,280 steps of 128.

    config=configs/cifar10_small.py
    data=--config.data.data_dir=cifar10
    repopt search --config=$config:search $data --out=runs/cifar10_small/search
    repopt train --config=$config:plain $data --out=runs/cifar10_small/plain
    repopt train --config=$config:repopt $data --out=runs/cifar10_small/repopt
    repopt train --config=$config:repvgg $data --out=runs/cifar10_small/repvgg

or all of these with three seeds each, and a report: `repopt compare --config=cifar10_small`, with $data and
an `--out`. `repopt` takes the scales that the first command wrote; `--config.scales=` names others.
`data_dir` is an image folder: `train/<class>/*` and `test/<class>/*`, 32x32 pixels. `,smoke` after the
argument (`cifar10_small.py:search,smoke`) runs two short epochs on a few embedded digits.
"""

import dataclasses

from repopt_jax.report.compare import Comparison
from repopt_jax.train.config import Config, DataConfig, ModelConfig, OptimConfig, parse_argument, smoke

# Mode -> scales.
RUNS = {"plain": "", "search": "", "repopt": "runs/cifar10_small/search/scales", "repvgg": ""}


def get_config(arg: str = "") -> Config:
    mode, small = parse_argument(arg, RUNS)
    config = Config(
        name=f"cifar10_small-{mode}",
        epochs=8,
        batch_size=128,
        eval_batch_size=1000,
        scales=RUNS[mode],
        log_every=20,
        model=ModelConfig(name="vgg-cifar-small", mode=mode),
        data=DataConfig(
            source="folder",
            image_size=32,
            crop_padding=4,
            flip=True,
            mean=(0.4913, 0.4821, 0.4465),
            std=(0.2470, 0.2435, 0.2616),
            train_limit=20_480,
            eval_limit=5_000,
        ),
        # Clipping steadies a search, as published; the other runs need none.
        optim=OptimConfig(learning_rate=0.1, weight_decay=4e-5, clip_norm=5.0 if mode == "search" else None),
    )
    return smoke(config) if small else config


def get_comparison(arg: str = "") -> Comparison:
    """Plain SGD, RepOpt with searched scales and RepVGG, three seeds each, all by the same recipe."""
    _, small = parse_argument(arg, ("three",))
    suffix = ",smoke" if small else ""
    ways = {way: get_config(way + suffix) for way in ("plain", "repopt", "repvgg")}
    ways["repopt"] = dataclasses.replace(ways["repopt"], scales="search:search")
    return Comparison(
        title="CIFAR-10 at a small size",
        ways=ways,
        searches={"search": get_config("search" + suffix)},
        labels={"plain": "plain SGD", "repopt": "RepOpt, searched scales", "repvgg": "RepVGG"},
        differences=(("repopt", "plain"), ("repvgg", "plain")),
    )
