"""The embedded digits, trained in ways whose networks are quantized afterwards and compared.

    repopt compare --config=quantize_digits --out=runs/quantize_digits
    python scripts/quantize_table.py runs/quantize_digits --out=scripts/results/quantize_digits

The first command trains plain SGD, RepOpt with searched scales, RepVGG, QARepVGG and the branches trained
online, three seeds each, all by the recipe of `digits`; the second quantizes all of them after training, to 8
to 4 bits. `,smoke` after an argument (`quantize_digits.py:plain,smoke`) runs two short epochs on a few
images.
"""

from repopt_jax.report.comparison import Comparison, smoke_of
from repopt_jax.train.config import Config, load_config, parse_argument, smoke

# Argument -> mode, scales, what it is called.
RUNS = {
    "plain": ("plain", "", "plain SGD"),
    "search": ("search", "", "search"),
    "repopt": ("repopt", "runs/quantize_digits/searches/search/scales", "RepOpt, searched scales"),
    "repvgg": ("repvgg", "", "RepVGG"),
    "qarepvgg": ("qarepvgg", "", "QARepVGG"),
    "online": ("online", "", "online, RepVGG's branches"),
}


def get_config(arg: str = "") -> Config:
    run, small = parse_argument(arg, RUNS)
    mode, scales, _ = RUNS[run]
    config = load_config("digits:plain")
    config.name, config.scales, config.model.mode = f"quantize_digits-{run}", scales, mode
    return smoke(config) if small else config


def get_comparison(arg: str = "") -> Comparison:
    """All ways, three seeds each, by one recipe: there is no grid, so that no image is held out."""
    _, small = parse_argument(arg, ("all",))
    ways = {name: get_config(name) for name in RUNS if name != "search"}
    ways["repopt"].scales = "search:search"
    comparison = Comparison(
        title="Digits, to be quantized",
        ways=ways,
        searches={"search": get_config("search")},
        labels={name: RUNS[name][2] for name in ways},
        differences=(),
        seeds=3,
        about=(
            "Networks of the same plain shape once they are fused, trained in five ways by one recipe. What "
            "becomes of them in whole numbers is in scripts/results/quantize_digits.md.",
        ),
    )
    return smoke_of(comparison) if small else comparison
