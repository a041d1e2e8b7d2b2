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

import dataclasses
from typing import Any

from repopt_jax.report.compare import Comparison
from repopt_jax.train.config import Config, DataConfig, ModelConfig, OptimConfig, parse_argument, smoke

SEARCHED = "runs/deep_digits/search/scales"

# Argument -> mode of training, other settings, what it is called.
RUNS: dict[str, tuple[str, dict[str, Any], str]] = {
    "plain": ("plain", {}, "plain SGD"),
    "init": ("repopt", {"scales": "depth", "rules": "init"}, "initialization only"),
    "depth": ("repopt", {"scales": "depth"}, "RepOpt, depth rule"),
    "repopt": ("repopt", {"scales": SEARCHED}, "RepOpt, searched scales"),
    "repvgg": ("repvgg", {}, "RepVGG"),
    "online": ("online", {}, "online"),
    "search": ("search", {}, "search"),
}
ABOUT = (
    "A network of 32 convolutions in a row, without shortcuts, learns the embedded handwritten digits. "
    "RepVGG would give each layer three branches, 3x3, 1x1 and identity, and train them all. RepOptimizer "
    "(RepOpt) keeps the plain network: it starts from kernels that such branches merge into, and multiplies "
    "each gradient by what SGD on the branches would have made of it.",
    "The table shows what the same plain network learns with and without that, in the same number of epochs. "
    "Every way of training had the same seeds and the same learning rates to choose from; training images "
    "that were held out decided between them, and the test images were read once, at the end.",
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
    """The ways of training with three learning rates, chosen with two seeds of three on 240 held-out "
    "images."""
    _, small = parse_argument(arg, ("quickstart",))
    ways = {name: get_config(f"{name},smoke" if small else name) for name in RUNS if name != "search"}
    ways["repopt"] = dataclasses.replace(ways["repopt"], scales="search:search")
    return Comparison(
        title="32 layers in a row: plain SGD and RepOptimizer",
        ways=ways,
        searches={"search": get_config("search,smoke" if small else "search")},
        labels={name: label for name, (_, _, label) in RUNS.items() if name != "search"},
        differences=(
            ("depth", "plain"),
            ("repopt", "plain"),
            ("init", "plain"),
            ("depth", "init"),
            ("repvgg", "plain"),
            ("online", "plain"),
            ("depth", "repvgg"),
        ),
        seeds=3,
        tuning_seeds=2,
        grid={"optim.learning_rate": (0.03, 0.1, 0.3)},
        validation=16 if small else 240,
        about=ABOUT,
    )
