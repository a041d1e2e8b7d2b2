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

from typing import Any

from repopt_jax.report.comparison import Comparison, smoke_of
from repopt_jax.train.config import Config, DataConfig, ModelConfig, OptimConfig, parse_argument, smoke

# Argument -> mode, scales, what it is called.
RUNS = {
    "plain": ("plain", "", "plain SGD"),
    "search": ("search", "", "search"),
    "repopt": ("repopt", "runs/cifar10_small/search/scales", "RepOpt, searched scales"),
    "repvgg": ("repvgg", "", "RepVGG"),
    "depth": ("repopt", "depth", "RepOpt, depth rule"),
    "online": ("online", "", "online, RepVGG's branches"),
    "orepa": ("orepa", "", "online, OREPA's branches"),
    "dbb": ("dbb", "", "DBB"),
    "qarepvgg": ("qarepvgg", "", "QARepVGG"),
}


def get_config(arg: str = "") -> Config:
    run, small = parse_argument(arg, RUNS)
    mode, scales, _ = RUNS[run]
    config = Config(
        name=f"cifar10_small-{run}",
        epochs=8,
        batch_size=128,
        eval_batch_size=1000,
        scales=scales,
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
    """The comparison called "three", "structures", "a0" or "quantize".

    three: plain SGD, RepOpt with searched scales and RepVGG, three seeds each, all by the same recipe.
    structures: these, the depth rule, structures trained online and DBB; five seeds, the same recipe.
    a0: the same, of a network with the stages of RepVGG-A0 (2, 4, 14, 1 blocks) at a third of its width.
    quantize: the three, QARepVGG and online, three seeds each by the same recipe, for
    `scripts/quantize_table.py`.
    """
    choice, small = parse_argument(arg, ("three", "structures", "a0", "quantize"))
    names = ["plain", "repopt", "repvgg"]
    settings: dict[str, Any] = {}
    if choice in ("structures", "a0"):
        names += ["depth", "online", "orepa", "dbb"]
        settings = {"seeds": 5}
    if choice == "quantize":
        names += ["qarepvgg", "online"]
    ways = {name: get_config(name) for name in names}
    searches = {"search": get_config("search")}
    ways["repopt"].scales = "search:search"
    if choice == "a0":
        for config in (*ways.values(), *searches.values()):
            config.model.name = "vgg-cifar-a0-narrow"
    comparison = Comparison(
        title="CIFAR-10 at a small size" + (", stages of A0" if choice == "a0" else ""),
        ways=ways,
        searches=searches,
        labels={name: RUNS[name][2] for name in names},
        **settings,
    )
    return smoke_of(comparison) if small else comparison
