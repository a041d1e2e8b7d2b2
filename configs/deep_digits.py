"""Handwritten digits by a network of 32 narrow layers in a row, which plain SGD trains badly.

    repopt quickstart
    repopt compare --config=deep_digits --out=runs/deep_digits

The first command makes this comparison and a report with all that belongs to it; the second the comparison
alone. By hand, each a run of its own:

    repopt search --config=configs/deep_digits.py:search --out=runs/deep_digits/search
    repopt train --config=configs/deep_digits.py:plain --out=runs/deep_digits/plain
    repopt train --config=configs/deep_digits.py:init --out=runs/deep_digits/init
    repopt train --config=configs/deep_digits.py:depth --out=runs/deep_digits/depth
    repopt train --config=configs/deep_digits.py:repopt --out=runs/deep_digits/repopt
    repopt train --config=configs/deep_digits.py:repvgg --out=runs/deep_digits/repvgg
    repopt train --config=configs/deep_digits.py:online --out=runs/deep_digits/online

`repopt` takes the scales that the first of these wrote; `--config.scales=` names others. `,smoke` after the
argument (`deep_digits.py:search,smoke`) runs two short epochs on a few images.
"""

from typing import Any

from repopt_jax.report.comparison import Comparison, against, smoke_of
from repopt_jax.train.config import Config, DataConfig, ModelConfig, OptimConfig, parse_argument, smoke

# Argument -> mode of training, other settings, what it is called.
RUNS: dict[str, tuple[str, dict[str, Any], str]] = {
    "plain": ("plain", {}, "plain SGD"),
    "init": ("repopt", {"scales": "depth", "rules": "init"}, "initialization only"),
    "depth": ("repopt", {"scales": "depth"}, "RepOpt, depth rule"),
    "repopt": ("repopt", {"scales": "runs/deep_digits/search/scales"}, "RepOpt, searched scales"),
    "repvgg": ("repvgg", {}, "RepVGG"),
    "online": ("online", {}, "online"),
    "normalised": ("repopt", {"scales": "depth", "normalise": True}, "RepOpt, depth rule, normalised"),
    "transferred": ("repopt", {"scales": "transfer:runs/b1-scales"}, "RepOpt, from B1's scales"),
    "search": ("search", {}, "search"),
}
RATE = "optim.learning_rate"
# Way -> the weight decay of its search, which sets Lambda: the learning rates of the 180 steps add up to
# 9.1, and Lambda is decay * 9.1 / (1 - momentum).
SEARCHES = {"lambda-0.03": 0.03 / 91, "lambda-1": 1 / 91}
TITLE = "32 layers in a row: plain SGD and RepOptimizer"
ABOUT = (
    "A network of 32 convolutions in a row, without shortcuts, learns the embedded handwritten digits. "
    "RepVGG would give each layer three branches, 3x3, 1x1 and identity, and train them all. RepOptimizer "
    "(RepOpt) keeps the plain network: it starts from kernels that such branches merge into, and multiplies "
    "each gradient by what SGD on the branches would have made of it.",
    "The table shows what the same plain network learns with and without that, in the same number of epochs. "
    "Every way of training had the same seeds and the same learning rates to choose from. Training images "
    "that were held out decided between them, and the test images were not read before all was trained.",
)


def get_config(arg: str = "") -> Config:
    run, small = parse_argument(arg, RUNS)
    mode, own, _ = RUNS[run]
    config = Config(
        name=f"deep_digits-{run}",
        epochs=10,
        batch_size=64,
        eval_batch_size=256,
        log_every=10,
        model=ModelConfig(name="vgg-digits-deep", mode=mode),
        data=DataConfig(source="digits", image_size=8, mean=(0.3,), std=(0.37,)),
        optim=OptimConfig(learning_rate=0.1, weight_decay=1e-4, warmup_epochs=1),
        **own,
    )
    return smoke(config) if small else config


def get_comparison(arg: str = "") -> Comparison:
    choice, small = parse_argument(arg, COMPARISONS)
    comparison = COMPARISONS[choice]()
    return smoke_of(comparison) if small else comparison


def quickstart() -> Comparison:
    """Three learning rates, chosen with one seed of three on 240 held-out images."""
    names = ("plain", "init", "depth", "repopt", "repvgg", "online")
    ways = {name: get_config(name) for name in names}
    ways["repopt"].scales = "search:search"
    return Comparison(
        title=TITLE,
        ways=ways,
        searches={"search": get_config("search")},
        labels={name: RUNS[name][2] for name in names},
        differences=[*against(names, "plain"), *against(("depth", "repopt"), "init")],
        seeds=3,
        tuning_seeds=1,
        grid={RATE: (0.03, 0.1, 0.3)},
        validation=240,
        about=ABOUT,
    )


def decisive() -> Comparison:
    """More ways, and five learning rates, chosen with three seeds of ten on 240 held-out images; two
    searches.

    `transferred` needs the authors' scales of B1, which
    `repopt convert RepOpt-VGG-B1-scales.pth runs/b1-scales --to=scales` makes of their file.
    """
    names = ("plain", "init", "depth", "repvgg", "online", "normalised", "transferred")
    ways, searches = {name: get_config(name) for name in names}, {}
    labels = {name: RUNS[name][2] for name in names}
    for way, decay in SEARCHES.items():
        searches[f"search-{way}"], ways[way] = get_config("search"), get_config("depth")
        searches[f"search-{way}"].optim.weight_decay = decay
        ways[way].scales = f"search:search-{way}"
        labels[way] = f"RepOpt, searched, Lambda {way.removeprefix('lambda-')}"
    return Comparison(
        title=TITLE,
        ways=ways,
        searches=searches,
        labels=labels,
        differences=against(ways, "plain", "init"),
        seeds=10,
        tuning_seeds=3,
        grid={RATE: (0.01, 0.03, 0.1, 0.3, 1.0)},
        validation=240,
        about=ABOUT,
    )


COMPARISONS = {"quickstart": quickstart, "decisive": decisive}
