"""The figures of a report, one function each, from numbers to a Matplotlib figure.

Figures are built without pyplot: no global state, no display, and several threads may draw. Colours are from
the palette of Okabe and Ito, which stays readable with colour blindness, and every line has a style of its
own for print.
"""

import io
from collections.abc import Mapping, Sequence
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


STYLES = {
    "plain SGD": LineStyle("#4d4d4d", "-"),
    "RepOpt, searched scales": LineStyle("#0072B2", "-"),
    "RepOpt, depth rule": LineStyle("#E69F00", "--"),
    "RepOpt, all ones": LineStyle("#CC79A7", (0, (5, 1, 1, 1))),
    "RepVGG": LineStyle("#D55E00", "-."),
    "search network": LineStyle("#009E73", ":"),
    "CSLA": LineStyle("#56B4E9", (0, (1, 1))),
}
OTHER_STYLE = LineStyle("#000000", (0, (3, 1, 1, 1, 1, 1)))


def accuracy(
    curves: Mapping[str, Sequence[tuple[np.ndarray, np.ndarray]]], name: str = "test accuracy"
) -> Figure:
    """Draws test accuracy, or another metric called `name`, over epochs.

    The right half enlarges the second half of training: curves that end close together cannot be
    distinguished on the left. A thick line is the mean over the seeds.

    Args:
      curves: label -> one (epochs, values in [0, 1]) for each seed.
      name: of the metric, for the axis.
    """
    with matplotlib.rc_context(RC):
        figure = Figure(figsize=(9.2, 4.4), layout="constrained")
        left, right = figure.subplots(1, 2)
        last = max(epochs[-1] for seeds in curves.values() for epochs, _ in seeds)
        late: list[float] = []
        for label, seeds in curves.items():
            style = STYLES.get(label, OTHER_STYLE)
            epochs = min((epochs for epochs, _ in seeds), key=len)
            values = np.stack([100 * value[: len(epochs)] for _, value in seeds])
            late += list(values[:, epochs >= last / 2].ravel())
            for axes in (left, right):
                if len(seeds) > 1:
                    axes.plot(epochs, values.T, color=style.colour, linewidth=0.6, alpha=0.35)
                mean = values.mean(axis=0)
                axes.plot(epochs, mean, color=style.colour, linestyle=style.line, linewidth=2, label=label)
        left.set(title="Whole training", ylabel=f"{name} (%)", ylim=(0, 102))
        margin = 0.05 * (max(late) - min(late)) + 0.1
        right.set(title="Second half, enlarged", xlim=(last / 2, last))
        right.set_ylim(max(min(late) - margin, 0), max(late) + margin)
        for axes in (left, right):
            axes.set_xlabel("epoch")
            axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=8))
        handles, labels = left.get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=3, handlelength=3)
    return figure


def scales(history: History) -> Figure:
    """Draws mean and spread of each layer's scales over epochs, relative to the initial mean.

    There is a column for each kind of branch. Layers start at different values (the depth rule), which would
    hide how they change.
    """
    layers = list(dict.fromkeys(layer for layer, _ in history.vectors))
    branches = list(dict.fromkeys(branch for _, branch in history.vectors))
    # The palest end is hard to see on white.
    colours = ListedColormap(matplotlib.colormaps["viridis"](np.linspace(0, 0.92, 256)))
    norm = Normalize(1, max(len(layers), 2))
    with matplotlib.rc_context(RC):
        size = (2.7 * len(branches) + 1.6, 5.4)
        figure = Figure(figsize=size, layout="constrained")
        grid = figure.subplots(2, len(branches), squeeze=False, sharex=True, sharey="row")
        for column, branch in enumerate(branches):
            grid[0, column].set_title(f"{branch} branch")
            grid[1, column].set_xlabel("epoch")
            grid[1, column].xaxis.set_major_locator(MaxNLocator(integer=True, nbins=6))
        for (layer, branch), series in history.vectors.items():
            column, colour = branches.index(branch), colours(norm(1 + layers.index(layer)))
            start = abs(series["mean"][0]) or 1.0
            for row, field in enumerate(("mean", "std")):
                grid[row, column].plot(history.epochs, series[field] / start, color=colour)
        grid[0, 0].set_ylabel("mean over channels\n(start: 1)")
        grid[1, 0].set_ylabel("standard deviation\nover channels (mean at start: 1)")
        grid[1, 0].set_ylim(bottom=0)
        figure.colorbar(
            ScalarMappable(norm, colours),
            ax=grid,
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
        figure = Figure(figsize=(7.2, 4.8), layout="constrained")
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


def step_time(times: Mapping[str, float]) -> Figure:
    """Draws bars of the time of one training step. `times`: label -> milliseconds."""
    labels = list(times)[::-1]
    values = [times[label] for label in labels]
    with matplotlib.rc_context(RC):
        figure = Figure(figsize=(7.2, 0.42 * len(labels) + 1.3), layout="constrained")
        axes = figure.subplots()
        colours = [STYLES.get(label, OTHER_STYLE).colour for label in labels]
        bars = axes.barh(labels, values, color=colours, height=0.62)
        axes.bar_label(bars, [f"{value:.3g} ms" for value in values], padding=4)
        axes.set(title="Time of one training step", xlabel="median (ms)", xlim=(0, 1.16 * max(values)))
        axes.grid(visible=False, axis="y")
        axes.tick_params(axis="y", length=0)
    return figure


def png(figure: Figure) -> bytes:
    """Returns the figure as a PNG file of `DPI`."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=DPI)
    return buffer.getvalue()
