"""CIFAR-10 by a network of 32 narrow layers in a row: 12,800 images, 8 epochs, 800 steps of 128.

    repopt compare --config=cifar10_deep --config.data.data_dir=cifar10 --out=runs/cifar10_deep

The ways of training are those of the comparison `deep_digits:decisive`, and a run by hand has the name of one
of them or "search" (`--config=configs/cifar10_deep.py:init`). The data are those of `cifar10_small`. `,smoke`
after the argument (`cifar10_deep.py:search,smoke`) runs two short epochs on a few embedded digits.
"""

import dataclasses

from repopt_jax.report.comparison import Comparison, against, load_comparison, smoke_of
from repopt_jax.train.config import Config, load_config, parse_argument, smoke

RUNS = ("plain", "init", "depth", "normalised", "transferred", "search")
# Way -> the weight decay of its search: as in `deep_digits`, the learning rates adding up to 40.1 here.
SEARCHES = {"lambda-0.03": 0.03 / 401, "lambda-1": 1 / 401}


def on_cifar10(config: Config) -> Config:
    """A way of training on digits, on CIFAR-10."""
    moved = load_config("cifar10_small:plain")
    model = dataclasses.replace(config.model, name="vgg-cifar-deep")
    way = {"scales": config.scales, "rules": config.rules, "normalise": config.normalise}
    moved = dataclasses.replace(moved, name=config.name, model=model, **way)
    moved.data.train_limit = 12_800
    moved.optim.weight_decay, moved.optim.warmup_epochs = 1e-4, 1
    return moved


def get_config(arg: str = "") -> Config:
    run, small = parse_argument(arg, RUNS)
    config = dataclasses.replace(on_cifar10(load_config(f"deep_digits:{run}")), name=f"cifar10_deep-{run}")
    return smoke(config) if small else config


def get_comparison(arg: str = "") -> Comparison:
    """Five seeds, and for each way the best of three learning rates on 2,560 held-out images, chosen with the
    first seed."""
    _, small = parse_argument(arg, ("deep",))
    digits = load_comparison("deep_digits:decisive")
    assert isinstance(digits, Comparison)
    ways = {way: on_cifar10(config) for way, config in digits.ways.items() if way not in ("repvgg", "online")}
    searches = {name: on_cifar10(config) for name, config in digits.searches.items()}
    for way, decay in SEARCHES.items():
        searches[f"search-{way}"].optim.weight_decay = decay
    comparison = Comparison(
        title="CIFAR-10, 32 layers in a row",
        ways=ways,
        searches=searches,
        labels={way: digits.label(way) for way in ways},
        differences=against(ways, "plain", "init"),
        seeds=5,
        tuning_seeds=1,
        grid={"optim.learning_rate": (0.03, 0.1, 0.3)},
        validation=2560,
    )
    return smoke_of(comparison) if small else comparison
