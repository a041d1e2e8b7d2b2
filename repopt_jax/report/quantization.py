"""What quantizing a run came to, as lines and as a page with pictures.

OUT/report.html    the page, with its pictures inside
OUT/report/*.png   the pictures
"""

from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

from repopt_jax.deploy.quantization import Quantized
from repopt_jax.report import page
from repopt_jax.train.tasks import METRICS, format_metrics, metric_label

DRAWN_LAYERS = 6  # whose histograms are drawn: the worst
CAPTIONS = {
    "layers": "Signal-to-noise ratio by layer, in the order of their paths. Expected: of the layer by "
    "itself, as estimated from its kernel and the range of its input. Arriving: of its input, as "
    "measured, from what the layers before it add. Alone: of the network's output with only this layer "
    "quantized.",
    "histograms": "Kernels and inputs of the layers with the least ratios, before (line) and after (bars) "
    "rounding; the axis of counts is logarithmic. A few bars far from the rest mean heavy tails: the steps "
    "are as wide as the largest value asks for.",
}


def lines(done: Quantized) -> list[str]:
    """What is printed of a quantization."""
    options, metric = done.options, METRICS[done.task][0]
    weight_bits = options["weight_bits"] or options["bits"]
    digits = f", of {options['scale_bits']} significant bits" if options["scale_bits"] else ""
    change = [done.test[metric.name], done.test_float[metric.name]]
    points = "" if None in change else f" ({100 * (change[0] - change[1]):+.2f} points)"
    kept = done.kept
    return [
        *([f"Warning: {done.warning}"] if done.warning else []),
        f"{options['bits']} bits, kernels {weight_bits} bits with a scale per {options['per']}{digits}; "
        f"ranges by {options['calibration']} on {done.images} training images"
        + ("; trained on with quantization" if options["aware"] else ""),
        *([f"in floating point: {', '.join(kept)}"] if kept else []),
        f"floating point: {format_metrics(done.task, done.test_float)} of {done.test_count} images",
        f"quantized:      {format_metrics(done.task, done.test)}{points}; the same class for "
        f"{done.agreement:.2%}",
        f"signal-to-noise ratio of the output: {decibels(done.measured)}, expected from kernels and ranges "
        f"{decibels(done.expected)}",
        *_worst(done),
        f"size of the parameters: {done.float_bytes:,} bytes, quantized {done.quantized_bytes:,}",
    ]


def _worst(done: Quantized) -> list[str]:
    measured = {p: one.sensitivity for p, one in done.layers.items() if one.sensitivity is not None}
    worst = sorted(measured, key=lambda path: measured[path])[:5]
    text = ", ".join(f"{path} ({decibels(measured[path])})" for path in worst)
    return [f"most sensitive layers, each alone: {text}"] if worst else []


def decibels(ratio: float | None) -> str:
    """A ratio in words; None where there is no noise."""
    return "no noise" if ratio is None else f"{ratio:.1f} dB"


def write_page(done: Quantized, out: Path) -> Path:
    """Writes report.html and its pictures to `out`, and returns the path of the page.

    Raises:
      ModuleNotFoundError: Matplotlib is not installed.
      OSError: a file cannot be written.
    """
    from repopt_jax.report import figures, quantization_figures

    worst = sorted(done.layers, key=lambda path: _order(done, path))[:DRAWN_LAYERS]
    drawn = [path for path in done.layers if path in worst]
    pictures = {
        "layers": figures.png(quantization_figures.ratios(done.layers)),
        "histograms": figures.png(quantization_figures.histograms({p: done.layers[p] for p in drawn})),
    }
    folder = out / "report"
    folder.mkdir(exist_ok=True)
    for name, picture in pictures.items():
        (folder / f"{name}.png").write_bytes(picture)
    shown = {name: page.figure(CAPTIONS[name], picture) for name, picture in pictures.items()}
    title = f"{Path(done.run).name}, quantized to {done.options['bits']} bits"
    text = page.document(
        title,
        (
            f'<h1>{escape(title)}</h1>\n<p class="soft">{escape(done.run)}, step {done.step}</p>',
            page.section("Result", _summary(done), _results(done)),
            page.section("Layers", shown["layers"], _layers(done)),
            page.section("Kernels and inputs", shown["histograms"]),
        ),
    )
    path = out / "report.html"
    path.write_text(text, encoding="utf-8")
    return path


def _order(done: Quantized, path: str) -> float:
    one = done.layers[path]
    ratio = one.expected if one.sensitivity is None else one.sensitivity
    return float("inf") if ratio is None else ratio


def _summary(done: Quantized) -> str:
    items = "".join(f"<li>{escape(line)}</li>" for line in lines(done))
    return f'<div class="verdict"><ul>{items}</ul></div>'


def _results(done: Quantized) -> str:
    metrics = [m for m in METRICS[done.task] if done.test.get(m.name) is not None]
    heads = ("", *(f"{metric_label(m)} (%)" for m in metrics), "parameters (bytes)")
    rows: list[Sequence[str]] = [
        (name, *(f"{100 * test[m.name]:.2f}" for m in metrics), f"{size:,}")
        for name, test, size in (
            ("floating point", done.test_float, done.float_bytes),
            ("quantized", done.test, done.quantized_bytes),
        )
    ]
    return page.table(heads, rows)


def _layers(done: Quantized) -> str:
    heads = (
        "layer",
        "range of its input",
        "max / rms of its kernel",
        "expected (dB)",
        "arriving (dB)",
        "alone (dB)",
    )

    def number(value: Any) -> str:
        return "-" if value is None else f"{value:.1f}"

    rows = [
        (
            escape(path) + ("<br><small>in floating point</small>" if one.kept else ""),
            f"{one.low:.3g} to {one.high:.3g}",
            f"{one.tail:.1f}",
            *map(number, (one.expected, one.arriving, one.sensitivity)),
        )
        for path, one in done.layers.items()
    ]
    return page.table(heads, rows)
