"""The figures of a quantization: ratios by layer, histograms before and after."""

from collections.abc import Mapping

import matplotlib
import numpy as np
from matplotlib.figure import Figure

from repopt_jax.deploy.quantization import QuantizedLayer
from repopt_jax.report.figures import INK, OTHERS, PLAIN, RC, WIDTH


def ratios(layers: Mapping[str, QuantizedLayer]) -> Figure:
    """Draws a row for each layer with its ratios in dB; those that are None are left out."""
    series = (
        ("expected", [one.expected for one in layers.values()], "o", PLAIN.colour),
        ("arriving", [one.arriving for one in layers.values()], "s", OTHERS[0].colour),
        ("alone", [one.sensitivity for one in layers.values()], "D", OTHERS[3].colour),
    )
    with matplotlib.rc_context(RC):
        figure = Figure(figsize=(WIDTH, 0.26 * len(layers) + 1.1), layout="constrained")
        axes = figure.subplots()
        for name, values, marker, colour in series:
            points = [(value, row) for row, value in enumerate(values) if value is not None]
            if points:
                axes.plot(*zip(*points), marker, color=colour, markersize=5, label=name)
        names = [f"{path} (float)" if one.kept else path for path, one in layers.items()]
        axes.set_yticks(range(len(layers)), names, fontsize=8)
        axes.invert_yaxis()
        axes.set(xlabel="signal-to-noise ratio (dB)")
        axes.tick_params(axis="y", length=0)
        figure.legend(loc="outside lower center", ncols=3, fontsize=9)
    return figure


def histograms(layers: Mapping[str, QuantizedLayer]) -> Figure:
    """Draws kernels and inputs of each layer in a row, before (line) and after (bars) rounding."""
    with matplotlib.rc_context(RC):
        size = (WIDTH, 1.2 * len(layers) + 0.3)
        figure = Figure(figsize=size, layout="constrained")
        rows = np.atleast_2d(figure.subplots(len(layers), 2))
        for (path, one), (left, right) in zip(layers.items(), rows):
            _histogram(left, one.kernel, f"{path}: kernel")
            _histogram(right, one.inputs, "absolute input")
    return figure


def _histogram(axes, counts: Mapping, title: str) -> None:
    edges = np.linspace(counts["low"], counts["high"], len(counts["before"]) + 1)
    if counts["after"]:
        width = edges[1] - edges[0]
        axes.bar(edges[:-1], counts["after"], width, align="edge", color=OTHERS[5].colour)
    axes.stairs(counts["before"], edges, color=INK, linewidth=1.0, baseline=None)
    axes.set_yscale("log")
    axes.set_ylim(bottom=0.7)
    axes.set_title(title, fontsize=8, fontweight="normal")
    axes.tick_params(labelsize=7)
