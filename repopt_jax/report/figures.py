"""The figures of a report, one function each, from numbers to a Matplotlib figure.

Figures are built without pyplot: no global state, no display, and several threads may draw. Colours are from
the palette of Okabe and Ito, which stays readable with colour blindness, and every line has a style of its
own for print.
"""

import io
import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib
import numpy as np
from matplotlib.cm import ScalarMappable
from matplotlib.colors import ListedColormap, Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from repopt_jax.report.records import History

DPI = 160  # of the files: sharp on high-density screens
INK = "#333333"
RC: dict[Any, Any] = {
    "font.size": 10,
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "text.color": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e4e4e4",
    "legend.frameon": False,
}


@dataclass(frozen=True)
class LineStyle:
    """The colour and the style of line of one way of training, in all figures."""

    colour: str
    line: Any


PLAIN = LineStyle("#4d4d4d", "-")
OTHERS = (
    LineStyle("#0072B2", "-"),
    LineStyle("#E69F00", "--"),
    LineStyle("#009E73", "-."),
    LineStyle("#D55E00", (0, (5, 1, 1, 1))),
    LineStyle("#CC79A7", ":"),
    LineStyle("#56B4E9", (0, (3, 1, 1, 1, 1, 1))),
    LineStyle("#000000", (0, (1, 1))),
)
WIDTH = 4.8  # inches, of a figure: on a telephone its text is still legible


def styles(labels: Iterable[str]) -> dict[str, LineStyle]:
    """A style for each way of training, in all figures of a report: grey for the first, which is the one that
    others are compared with."""
    first, *others = labels
    return {first: PLAIN, **dict(zip(others, itertools.cycle(OTHERS)))}


def spread(values: Mapping[str, Sequence[float]], styles: Mapping[str, LineStyle], name: str) -> Figure:
    """Draws a row for each way of training: every seed as a point, and the mean as a bar.

    Args:
      values: label -> the metric, in [0, 1], of each seed.
      styles: label -> style.
      name: of the metric, for the axis.
    """
    with matplotlib.rc_context(RC):
        figure = Figure(figsize=(WIDTH, 0.42 * len(values) + 0.9), layout="constrained")
        axes = figure.subplots()
        for row, (label, seeds) in enumerate(values.items()):
            points, colour = 100 * np.asarray(seeds), styles[label].colour
            axes.plot(points, np.full(len(points), row), "o", color=colour, alpha=0.6, markersize=6)
            if len(points):
                axes.plot([points.mean()] * 2, [row - 0.32, row + 0.32], color=colour, linewidth=2.5)
        axes.set_yticks(range(len(values)), list(values))
        axes.invert_yaxis()
        axes.set(xlabel=f"{name} (%)")
        axes.grid(visible=False, axis="y")
        axes.tick_params(axis="y", length=0)
    return figure


def curves(
    curves: Mapping[str, Sequence[tuple[np.ndarray, np.ndarray]]],
    styles: Mapping[str, LineStyle],
    name: str,
    *,
    percent: bool,
) -> Figure:
    """Draws a quantity over epochs: thin lines are single seeds, thick ones their mean.

    Args:
      curves: label -> one (epochs, values) for each seed.
      styles: label -> style.
      name: of the quantity, for the axis.
      percent: values are shares, shown in percent; else their axis is logarithmic.
    """
    with matplotlib.rc_context(RC):
        figure = Figure(figsize=(WIDTH, 3.8), layout="constrained")
        axes = figure.subplots()
        for label, seeds in curves.items():
            epochs = min((epochs for epochs, _ in seeds), key=len)
            values = np.stack([value[: len(epochs)] for _, value in seeds]) * (100 if percent else 1)
            colour = styles[label].colour
            if len(seeds) > 1:
                axes.plot(epochs, values.T, color=colour, linewidth=0.6, alpha=0.35)
            axes.plot(
                epochs, values.mean(0), color=colour, linestyle=styles[label].line, linewidth=2, label=label
            )
        axes.set(xlabel="epoch", ylabel=f"{name} (%)" if percent else name)
        if not percent:
            axes.set_yscale("log")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=8))
        figure.legend(loc="outside lower center", ncols=2, handlelength=2.6, fontsize=9)
    return figure


def by_layer(values: Mapping[str, Sequence[float]], styles: Mapping[str, LineStyle]) -> Figure:
    """Draws the size of each layer's gradient, from the input to the output. `values`: label -> one for each
    layer."""
    with matplotlib.rc_context(RC):
        figure = Figure(figsize=(WIDTH, 3.8), layout="constrained")
        axes = figure.subplots()
        for label, sizes in values.items():
            layers = np.arange(1, len(sizes) + 1)
            axes.plot(
                layers,
                sizes,
                color=styles[label].colour,
                linestyle=styles[label].line,
                linewidth=2,
                label=label,
            )
        axes.set(xlabel="layer, from input to output", ylabel="size of the gradient at the start")
        axes.set_yscale("log")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=8))
        figure.legend(loc="outside lower center", ncols=2, handlelength=2.6, fontsize=9)
    return figure


def scales(history: History) -> Figure:
    """Draws mean and spread of each layer's scales over epochs, relative to the initial mean.

    There is a row for each kind of branch. Layers start at different values (the depth rule), which would
    hide how they change.
    """
    layers = list(dict.fromkeys(layer for layer, _ in history.vectors))
    branches = list(dict.fromkeys(branch for _, branch in history.vectors))
    # The palest end is hard to see on white.
    colours = ListedColormap(matplotlib.colormaps["viridis"](np.linspace(0, 0.92, 256)))
    norm = Normalize(1, max(len(layers), 2))
    with matplotlib.rc_context(RC):
        figure = Figure(figsize=(WIDTH, 1.7 * len(branches) + 1.1), layout="constrained")
        grid = figure.subplots(len(branches), 2, squeeze=False, sharex=True)
        grid[0, 0].set_title("mean")
        grid[0, 1].set_title("standard deviation")
        for row, branch in enumerate(branches):
            grid[row, 0].set_ylabel(f"{branch} branch")
        for column in (0, 1):
            grid[-1, column].set_xlabel("epoch")
            grid[-1, column].xaxis.set_major_locator(MaxNLocator(integer=True, nbins=5))
        for (layer, branch), series in history.vectors.items():
            row, colour = branches.index(branch), colours(norm(1 + layers.index(layer)))
            start = abs(series["mean"][0]) or 1.0
            for column, field in enumerate(("mean", "std")):
                grid[row, column].plot(history.epochs, series[field] / start, color=colour, linewidth=1.2)
        figure.colorbar(
            ScalarMappable(norm, colours),
            ax=grid,
            location="bottom",
            label="layer, from input (1) to output",
            ticks=MaxNLocator(integer=True, nbins=8),
            pad=0.02,
            aspect=35,
        )
    return figure


def movement(history: History) -> Figure:
    """Draws how far scales move in an epoch, relative to their size, and below it the learning rate."""
    branches = list(dict.fromkeys(branch for _, branch in history.vectors))
    styles = list(zip(("#0072B2", "#D55E00", "#009E73", "#CC79A7"), ("-", "--", "-.", ":")))
    epochs = history.epochs[1:]
    with matplotlib.rc_context(RC):
        figure = Figure(figsize=(WIDTH, 4.6), layout="constrained")
        upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
        for (colour, style), branch in zip(styles, branches):
            vectors = [s for (_, name), s in history.vectors.items() if name == branch]
            change = np.stack([100 * s["rms_change"][1:] / s["rms"][1:] for s in vectors])
            low, middle, high = np.quantile(change / np.diff(history.epochs), (0.1, 0.5, 0.9), axis=0)
            upper.fill_between(epochs, low, high, color=colour, alpha=0.15, linewidth=0)
            upper.plot(epochs, middle, color=colour, linestyle=style, linewidth=2, label=branch)
        upper.set(title="Movement of the scales in one epoch", ylim=(0, None))
        upper.set_ylabel("rms change over rms (%)")
        upper.legend(title="branch: median of the layers,\nband from 10 to 90 %", alignment="left")
        lower.step(epochs, history.rates[1:], where="mid", color=INK)
        lower.set(xlabel="epoch", ylabel="learning rate\n(share of highest)", ylim=(0, 1.08))
        lower.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=10))
    return figure


def step_time(times: Mapping[str, float], styles: Mapping[str, LineStyle]) -> Figure:
    """Draws bars of the time of one training step. `times`: label -> milliseconds."""
    labels = list(times)[::-1]
    values = [times[label] for label in labels]
    with matplotlib.rc_context(RC):
        figure = Figure(figsize=(WIDTH, 0.42 * len(labels) + 1.0), layout="constrained")
        axes = figure.subplots()
        bars = axes.barh(labels, values, color=[styles[label].colour for label in labels], height=0.62)
        axes.bar_label(bars, [f"{value:.3g} ms" for value in values], padding=4)
        axes.set(xlabel="one training step, median (ms)", xlim=(0, 1.3 * max(values)))
        axes.grid(visible=False, axis="y")
        axes.tick_params(axis="y", length=0)
    return figure


def png(figure: Figure) -> bytes:
    """Returns the figure as a PNG file of `DPI`."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=DPI)
    return buffer.getvalue()
