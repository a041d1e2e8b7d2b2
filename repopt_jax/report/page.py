"""The HTML page of a report: self-contained, readable on light and dark screens.

Whatever comes from a run (names, paths, versions) is escaped; only text of this file is markup.
"""

import base64
import statistics
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import Any

from repopt_jax.report import figures
from repopt_jax.train.tasks import METRICS

CSS = """
:root { color-scheme: light dark; --ink: #1d2329; --soft: #5b6570; --line: #dcdfe3; --back: #ffffff;
  --panel: #f5f6f8; --accent: #0072b2; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6e8ea; --soft: #a3abb3; --line: #3a4047;
  --back: #16191c; --panel: #1f2327; --accent: #6cb8e6; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 2.5rem 1.25rem 4rem; max-width: 62rem;
  background: var(--back); color: var(--ink);
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif; }
h1 { font-size: 1.75rem; line-height: 1.2; margin: 0 0 .4rem; }
h2 { font-size: 1.2rem; margin: 2.6rem 0 .6rem; padding-top: .8rem; border-top: 1px solid var(--line); }
p, li { max-width: 46rem; }
.soft, figcaption { color: var(--soft); font-size: .9rem; }
.table { overflow-x: auto; margin: 1rem 0; }
table { border-collapse: collapse; width: 100%; font-size: .92rem; font-variant-numeric: tabular-nums; }
th, td { padding: .45rem .7rem; text-align: right; border-bottom: 1px solid var(--line); }
td { white-space: nowrap; }
th { color: var(--soft); font-weight: 600; vertical-align: bottom; }
th:first-child, td:first-child { text-align: left; }
td small { color: var(--soft); }
.verdict { background: var(--panel); border-left: 4px solid var(--accent); padding: .8rem 1rem; }
figure { margin: 1.2rem 0; }
figure img { display: block; max-width: 100%; height: auto; padding: .6rem;
  background: #ffffff; border-radius: 6px; }
figcaption { margin-top: .4rem; max-width: 46rem; }
pre { background: var(--panel); padding: .8rem 1rem; border-radius: 6px; white-space: pre-wrap;
  font-size: .85rem; }
code { font: .9em ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; }
"""

CAPTIONS = {
    "accuracy": "{label} in the course of training. Thin lines are single seeds, thick ones their mean.",
    "scales": "Each line is one layer: the mean of its scales over the channels (top) and their spread "
    "(bottom), both over the mean at the start. The spread grows from 0 because all channels start equal.",
    "movement": "How far the scales of a layer move in an epoch, relative to their size, and below it the "
    "learning rate. What moves only while the learning rate is high has not necessarily arrived.",
    "step_time": "Time of one training step at the same batch size, without compilation, evaluation and "
    "checkpoints.",
}


def render(
    content: Mapping[str, Any], pictures: Mapping[str, bytes], galleries: Mapping[str, bytes] | None = None
) -> str:
    """Renders the page.

    Args:
      content: the content of report.json.
      pictures: PNG files of the figures, by the names of `CAPTIONS`.
      galleries: PNG files of drawings on test images, by caption.
    """
    label = METRICS[content["task"]][0].label
    captions = CAPTIONS | {"accuracy": CAPTIONS["accuracy"].format(label=label[0].upper() + label[1:])}
    images = {name: _figure(captions[name], picture) for name, picture in pictures.items()}
    drawings = [_figure(caption, picture) for caption, picture in (galleries or {}).items()]
    sections = (
        _header(content),
        _section("Result", _results(content), _uncertainty(content), images.get("accuracy", "")),
        _search(content["search"], images) if content["search"] else "",
        _section("What the networks find", *drawings) if drawings else "",
        _equivalence(content["equivalence"]) if content["equivalence"] else "",
        _section("Deploying", _deploying(content)),
        _section("Speed", _speed(), images["step_time"]) if "step_time" in images else "",
        _section("Runs", _runs(content["runs"]), _commands(content["commands"])),
    )
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(content['title'])}</title>\n<style>{CSS}</style>\n</head>\n<body>\n"
        + "\n".join(filter(None, sections))
        + "\n</body>\n</html>\n"
    )


def _header(content: Mapping[str, Any]) -> str:
    first = content["runs"][0]
    versions = ", ".join(f"{name} {version}" for name, version in first["versions"].items())
    return (
        f"<h1>{escape(content['title'])}</h1>\n"
        f'<p class="soft">{escape(first["device"])}; {escape(versions)}</p>'
    )


def _results(content: Mapping[str, Any]) -> str:
    metrics = [
        metric
        for metric in METRICS[content["task"]]
        if any(metric.name in row["measured"] for row in content["rows"])
    ]
    with_error = content["rows"][0]["standard_error"] is not None
    heads = (
        "way of training",
        *(f"{metric.label} (%)" for metric in metrics),
        *(["standard error (points)"] if with_error else []),
        "time of a step (ms)",
        "parameters in training",
        "parameters deployed",
        "deploy error, largest (relative)",
    )
    rows = [
        (
            escape(row["label"]),
            *(_percent(row["measured"].get(metric.name, ())) for metric in metrics),
            *([f"{100 * row['standard_error']:.1f}"] if with_error else []),
            "-" if row["step_ms"] is None else f"{row['step_ms']:.3g}",
            f"{row['train_parameters']:,}",
            f"{row['deployed']['deploy_parameters']:,}" if row["deployed"] else "-",
            f"{row['deployed']['max_rel']:.1e}" if row["deployed"] else "-",
        )
        for row in content["rows"]
    ]
    return _table(heads, rows)


def _percent(values: Sequence[float]) -> str:
    if not values:
        return "-"
    mean = f"{100 * statistics.fmean(values):.2f}"
    if len(values) == 1:
        return mean
    return f"{mean}<br><small>{', '.join(f'{100 * value:.2f}' for value in values)}</small>"


def _percent_or_dash(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.2f}"


def _uncertainty(content: Mapping[str, Any]) -> str:
    """Says whether the results rank the ways of training."""
    rows, noise = content["rows"], content["noise"]
    if not noise:
        return (
            f"<p>Measured on {rows[0]['test_count']:,} images by COCO's evaluation: AP50 counts a detection "
            "as right where its box (for keypoint AP50: its keypoints) agrees with the object by at least "
            f"0.5, AP averages over 0.5 to 0.95. {_spread_of_seeds(content)} The search network finds the "
            "scales and is not used after.</p>"
        )
    two, largest = 100 * noise["two_errors"], 100 * noise["largest_difference"]
    seeds = max(len(row["measured"]["accuracy"]) for row in rows)
    conclusion = (
        "so these runs do not rank the ways of training"
        if largest <= two
        else "so the best and the worst of them differ by more than the choice of test images explains"
    )
    return (
        f"<p>The test set has {rows[0]['test_count']:,} images. Two accuracies on that many differ by chance "
        f"by up to about {two:.1f} points (two standard errors of a difference); the largest difference "
        f"between ways of training here is {largest:.1f} points, {conclusion}. "
        + ("More seeds do not help against that, as all share the test images. " if seeds > 1 else "")
        + "The search network is shown for completeness: it finds the scales and is not used after.</p>"
    )


def _spread_of_seeds(content: Mapping[str, Any]) -> str:
    """Describes the differences between seeds of the metric by which runs are compared."""
    metric = METRICS[content["task"]][0]
    seeds = [row["measured"].get(metric.name, ()) for row in content["rows"]]
    spreads = [100 * (max(values) - min(values)) for values in seeds if len(values) > 1]
    if not spreads:
        return "One seed says nothing about the spread, so small differences rank nothing."
    return (
        f"Seeds differ by up to {max(spreads):.1f} points of {metric.label} within one way of training, so "
        "differences of that size rank nothing."
    )


def _search(search: Mapping[str, Any], images: Mapping[str, str]) -> str:
    law = search["law"] or {"sentence": "", "notes": (), "residuals": {}}
    notes = "".join(f"<li>{escape(note)}</li>" for note in (*law["notes"], *search["notes"]))
    residuals = [(escape(layer), f"{error:+.1%}") for layer, error in law["residuals"].items()]
    return _section(
        "Have the scales settled?",
        f'<p class="verdict">{escape(search["sentence"])}</p>',
        f"<p>{escape(law['sentence'])}</p>" if law["sentence"] else "",
        f"<ul>{notes}</ul>" if notes else "",
        _table(("layer", "sum of the squared scales, above (+) or below what the law says"), residuals)
        if residuals
        else "",
        images.get("scales", ""),
        images.get("movement", ""),
    )


def _equivalence(result: Mapping[str, Any]) -> str:
    outcome = "the same function" if result["equivalent"] else "<strong>not</strong> the same function"
    return _section(
        "Is the plain network the multi-branch one?",
        f"<p>The multi-branch network with constant scales (CSLA) under SGD, and the plain network under "
        f"<code>repopt_mask</code>, were trained side by side in float64 for {result['steps']} steps of "
        f"Nesterov momentum with weight decay, from the same start on the same images. They are {outcome}: "
        "the largest relative difference of any kernel, statistic or loss is "
        f"<strong>{result['max_difference']:.1e}</strong>, while the kernels moved by "
        f"{result['movement']:.0%}. With weight decay put before the mask, which is wrong, it is "
        f"{result['wrong_order_difference']:.2g}.</p>",
    )


def _deploying(content: Mapping[str, Any]) -> str:
    rows, metric = content["rows"], METRICS[content["task"]][0]
    heads = (
        "network",
        "largest difference of an output",
        "relative to the largest output",
        "same class (% of locations)" if content["task"] == "detect" else "same class (%)",
        f"{metric.label} deployed (%)",
        "images",
    )
    lines = [
        (
            escape(row["label"]),
            f"{d['max_abs']:.1e}",
            f"{d['max_rel']:.1e}",
            f"{100 * d['agreement']:.2f}",
            _percent_or_dash(d["test"].get(metric.name)),
            f"{d['compared']:,}",
        )
        for row in rows
        if (d := row["deployed"])
    ]
    if not lines:
        return "<p>None of these runs was deployed.</p>"
    return (
        "<p>Deploying folds batch norm, and the branches where there are any, into one convolution with a "
        "bias for each block. The first seed of each way was deployed and compared with the trained network "
        "in float32.</p>" + _table(heads, lines)
    )


def _speed() -> str:
    return (
        "<p>RepOpt adds nothing to the forward and backward pass of a plain network and a product to its "
        "update; the search merges its branches before the convolution; RepVGG runs every branch. Steps of "
        "networks this small are mostly overhead, and their times depend on what else the machine does.</p>"
    )


def _runs(runs: Iterable[Mapping[str, Any]]) -> str:
    runs = list(runs)
    metric = METRICS[runs[0]["task"]][0]
    heads = ("folder", "seed", "epochs", "steps", f"{metric.label} (%)", "time (s)")
    return _table(
        heads,
        [
            (
                f"<code>{escape(run['directory'])}</code>",
                escape(str(run["seed"])),
                escape(str(run["epochs"])),
                escape(str(run["steps"])),
                _percent_or_dash(run["test"].get(metric.name)),
                f"{run['wall_s']:.0f}",
            )
            for run in runs
        ],
    )


def _commands(commands: Sequence[str]) -> str:
    if not commands:
        return ""
    return f"<p>To make the same runs by hand:</p>\n<pre>{escape(chr(10).join(commands))}</pre>"


def _figure(caption: str, picture: bytes) -> str:
    data = base64.b64encode(picture).decode()
    caption = escape(caption)
    pixels = int.from_bytes(picture[16:20], "big")  # the width, in the header of a PNG file
    width = round(pixels / figures.DPI * 100)
    image = f'<img width="{width}" alt="{caption}" src="data:image/png;base64,{data}">'
    return f"<figure>{image}<figcaption>{caption}</figcaption></figure>"


def _table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table; `heads` are text, and the cells of `rows` markup."""
    head = "".join(f"<th>{escape(text)}</th>" for text in heads)
    body = "\n".join("<tr>" + "".join(f"<td>{cell}</td>" for cell in row) + "</tr>" for row in rows)
    return (
        f'<div class="table"><table>\n<thead><tr>{head}</tr></thead>\n<tbody>\n{body}\n</tbody></table></div>'
    )


def _section(title: str, *parts: str) -> str:
    return f"<section>\n<h2>{escape(title)}</h2>\n" + "\n".join(filter(None, parts)) + "\n</section>"
