"""Draws results as bars, with a panel for each table."""

from typing import Any

import matplotlib
from matplotlib.figure import Figure

from repopt_jax.bench.results import Section, short
from repopt_jax.report.figures import DPI, INK, RC

__all__ = ["DPI", "draw"]

# The quantities that can be drawn, and their labels; the first that all candidates have is drawn.
MEASURES = (
    ("ms", "median with quartiles (ms)"),
    ("batch", "images in a batch"),
    ("total_s", "seconds"),
    ("images_per_s", "images/s"),
)
OURS, THEIRS = "#0072B2", "#9a9a9a"
# Candidates that are drawn in colour: RepOpt, its optimizers, and its deployed networks.
OWN = ("repopt", "reparameterize")
ROW, HEAD = 0.34, 0.95  # heights in inches of a bar, and of a panel's title and axis


def draw(sections: list[Section]) -> Figure:
    """Draws a column of panels; shorter bars are better except for batches and images per second."""
    drawn = [section for section in sections if measure_of(section)]
    heights = [ROW * len(section.candidates) + HEAD for section in drawn] or [1.0]
    with matplotlib.rc_context(RC):
        figure = Figure(figsize=(9.2, sum(heights)), layout="constrained")
        panels = figure.subplots(len(heights), 1, squeeze=False, height_ratios=heights)[:, 0]
        for axes, section in zip(panels, drawn):
            _panel(axes, section)
        if not drawn:
            panels[0].set_axis_off()
    return figure


def measure_of(section: Section) -> tuple[str, str] | None:
    """Returns the first of `MEASURES` that all candidates have, except those that failed."""
    measured = [facts for facts in section.candidates.values() if "failed" not in facts]
    shared = (one for one in MEASURES if measured and all(one[0] in facts for facts in measured))
    return next(shared, None)


def _panel(axes: Any, section: Section) -> None:
    key, label = measure_of(section) or MEASURES[0]
    names = list(section.candidates)[::-1]
    found = [section.candidates[name].get(key) for name in names]
    values = [v["median"] if isinstance(v, dict) else v or 0 for v in found]
    colours = [OURS if name.lower().startswith(OWN) else THEIRS for name in names]
    axes.barh(names, values, color=colours, height=0.62)
    furthest = max(values) or 1
    for i, (name, one) in enumerate(zip(names, found)):
        end, text = values[i], section.candidates[name].get("failed", "")
        if isinstance(one, dict):
            text = short(one["median"])
            if "low" in one:
                axes.hlines(i, one["low"], one["high"], color=INK, linewidth=1.4)
                end = max(end, one["high"])
        elif one is not None:
            text = short(one)
        furthest = max(furthest, end)
        axes.annotate(text, (end, i), xytext=(5, 0), textcoords="offset points", va="center")
    axes.set(xlabel=label, xlim=(0, 1.14 * furthest))
    axes.set_title(section.title, loc="left")
    axes.grid(visible=False, axis="y")
    axes.tick_params(axis="y", length=0)
