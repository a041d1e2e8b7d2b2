"""CIFAR-10 by a network of 32 narrow layers in a row: 12,800 images, 8 epochs, 800 steps of 128.

    repopt compare --config=cifar10_deep --config.data.data_dir=cifar10 --out=runs/cifar10_deep

By hand, each a run of its own, with the same `--config.data.data_dir`:

    repopt search --config=configs/cifar10_deep.py:search --out=runs/cifar10_deep/search
    repopt train --config=configs/cifar10_deep.py:plain --out=runs/cifar10_deep/plain
    repopt train --config=configs/cifar10_deep.py:init --out=runs/cifar10_deep/init
    repopt train --config=configs/cifar10_deep.py:depth --out=runs/cifar10_deep/depth
    repopt train --config=configs/cifar10_deep.py:normalised --out=runs/cifar10_deep/normalised
    repopt train --config=configs/cifar10_deep.py:transferred --out=runs/cifar10_deep/transferred

`transferred` needs the authors' scales of B1: `repopt convert RepOpt-VGG-B1-scales.pth runs/b1-scales
--to=scales`. The data are those of `cifar10_small`. `,smoke` after the argument
(`cifar10_deep.py:search,smoke`) runs two short epochs on a few embedded digits.
"""

import dataclasses
from typing import Any

from repopt_jax.report.compare import Comparison
from repopt_jax.train.config import Config, load_config, parse_argument, smoke

# Argument -> mode, other settings, what it is called.
RUNS: dict[str, tuple[str, dict[str, Any], str]] = {
    "plain": ("plain", {}, "plain SGD"),
    "init": ("repopt", {"scales": "depth", "rules": "init"}, "initialization only"),
    "depth": ("repopt", {"scales": "depth"}, "RepOpt, depth rule"),
    "normalised": ("repopt", {"scales": "depth", "normalise": True}, "RepOpt, depth rule, normalised"),
    "transferred": ("repopt", {"scales": "transfer:runs/b1-scales"}, "RepOpt, from B1's scales"),
    "search": ("search", {}, "search"),
}
# Way -> the weight decay of its search, which sets Lambda: the learning rates of the 800 steps add up to
# 40.1, and Lambda is decay * 40.1 / (1 - momentum).
SEARCHES = {"lambda-0.03": 0.03 / 401, "lambda-1": 1 / 401}


def get_config(arg: str = "") -> Config:
    run, small = parse_argument(arg, RUNS)
    mode, own, _ = RUNS[run]
    config = load_config("cifar10_small:plain")
    config = dataclasses.replace(config, name=f"cifar10_deep-{run}", **own)
    config.model.name, config.model.mode = "vgg-cifar-deep", mode
    config.data.train_limit = 12_800
    config.optim.weight_decay, config.optim.warmup_epochs = 1e-4, 1
    return smoke(config) if small else config


def get_comparison(arg: str = "") -> Comparison:
    """Five seeds, and for each way the best of three learning rates on 2,560 held-out images, chosen with the
    first seed."""
    _, small = parse_argument(arg, ("deep",))
    suffix = ",smoke" if small else ""
    ways = {name: get_config(name + suffix) for name in RUNS if name != "search"}
    labels = {name: RUNS[name][2] for name in ways}
    searches = {}
    for name, decay in SEARCHES.items():
        search = f"search-{name}"
        searches[search] = get_config("search" + suffix)
        searches[search].optim.weight_decay = decay
        ways[name] = dataclasses.replace(ways["depth"], scales=f"search:{search}")
        labels[name] = f"RepOpt, searched, Lambda {name.removeprefix('lambda-')}"
    return Comparison(
        title="CIFAR-10, 32 layers in a row",
        ways=ways,
        searches=searches,
        labels=labels,
        differences=[
            (way, other) for other in ("plain", "init") for way in ways if way not in ("plain", other)
        ],
        seeds=5,
        tuning_seeds=1,
        grid={"optim.learning_rate": (0.03, 0.1, 0.3)},
        validation=16 if small else 2560,
    )
