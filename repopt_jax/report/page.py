"""The HTML page of a report: self-contained, readable on light and dark screens.

Whatever comes from a run (names, paths, versions) is escaped; only text of this file is markup.
"""

import base64
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import Any

from repopt_jax.train.tasks import METRICS, metric_label

CSS = """
:root { color-scheme: light dark; --ink: #1d2329; --soft: #5b6570; --line: #dcdfe3; --back: #ffffff;
  --panel: #f5f6f8; --accent: #0072b2; }
@media (max-width: 40rem) { body { padding: 1.2rem 1rem 3rem; } h1 { font-size: 1.45rem; } }
@media (prefers-color-scheme: dark) { .wrong { color: #fb923c; } :root { --ink: #e6e8ea; --soft: #a3abb3;
  --line: #3a4047; --back: #16191c; --panel: #1f2327; --accent: #6cb8e6; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 2.5rem 1.25rem 4rem; max-width: 64rem;
  background: var(--back); color: var(--ink);
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif; }
h1 { font-size: 1.75rem; line-height: 1.2; margin: 0 0 .4rem; }
h2 { font-size: 1.2rem; margin: 2.6rem 0 .6rem; padding-top: .8rem; border-top: 1px solid var(--line); }
p, li { max-width: 46rem; overflow-wrap: anywhere; }
.soft, figcaption { color: var(--soft); font-size: .9rem; }
.table { overflow-x: auto; margin: 1rem 0; }
table { border-collapse: collapse; width: 100%; font-size: .92rem; font-variant-numeric: tabular-nums; }
th, td { padding: .45rem .7rem; text-align: right; border-bottom: 1px solid var(--line); }
td { white-space: nowrap; }
th { color: var(--soft); font-weight: 600; vertical-align: bottom; }
th:first-child, td:first-child { text-align: left; }
td small { color: var(--soft); }
.facts td { white-space: normal; text-align: left; vertical-align: top; overflow-wrap: anywhere; }
.facts td:first-child { color: var(--soft); min-width: 6rem; }
.verdict { background: var(--panel); border-left: 4px solid var(--accent); padding: .8rem 1rem; }
.figures { display: flex; flex-wrap: wrap; gap: 0 1.5rem; align-items: flex-start; }
.figures figure { flex: 0 1 29rem; min-width: 0; }
.answers td { text-align: center; }
.answers td:first-child { text-align: left; }
.answers img { width: 4rem; height: 4rem; image-rendering: pixelated; border-radius: 4px; }
.wrong { color: #c2410c; font-weight: 600; }
figure { margin: 1.2rem 0; }
figure img { display: block; max-width: 100%; height: auto; padding: .6rem;
  background: #ffffff; border-radius: 6px; }
figcaption { margin-top: .4rem; max-width: 46rem; }
pre { background: var(--panel); padding: .8rem 1rem; border-radius: 6px; white-space: pre-wrap;
  overflow-wrap: anywhere; font-size: .85rem; }
code { font: .9em ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; }
"""

CAPTIONS = {
    "accuracy": "Each point is a seed, the bar their mean.",
    "loss": "Loss in training. Thin lines are single seeds, thick ones their mean.",
    "progress": "In the course of training. Thin lines are single seeds, thick ones their mean.",
    "gradients": "Size of each layer's gradient in the network before its first step, on its first batch: "
    "how much the loss changes for a small relative change of the layer. Of each way the first seed.",
    "scales": "Each line is one layer: the mean of its scales over the channels and their standard "
    "deviation, both over the mean at the start. The deviation grows from 0 because all channels start "
    "equal.",
    "movement": "How far the scales of a layer move in an epoch, relative to their size, and below it the "
    "learning rate. What moves only while the learning rate is high has not necessarily arrived.",
    "step_time": "Time of one training step at the same batch size, without compilation, evaluation and "
    "checkpoints.",
}
INTERVALS = (
    "Runs of one seed see the same images in the same order, so they are compared in pairs. Each interval is "
    "Student's t over its own pairs, without a correction for there being {count} of them. All ways share "
    "the test images, and those with searched scales {searches}: the spread over other test sets and other "
    "searches is not in it."
)
NEXT = """# your own network, as it is: see docs/own_network.md
from repopt_jax import depth_scales, reinitialize, repopt_mask

scales = depth_scales(model)
model = reinitialize(model, scales, rngs=rngs)
sgd = optax.chain(optax.add_decayed_weights(1e-4), optax.sgd(0.1, 0.9, nesterov=True))
optimizer = optax.chain(repopt_mask(scales), sgd)"""


def render(
    content: Mapping[str, Any],
    pictures: Mapping[str, bytes],
    galleries: Mapping[str, bytes] | None = None,
    answers: Sequence[Mapping[str, Any]] = (),
) -> str:
    """Renders the page.

    Args:
      content: the content of report.json.
      pictures: PNG files of the figures, by the names of `CAPTIONS`; those of several searches have
        `-NAME` after it.
      galleries: PNG files of drawings on test images, by caption.
      answers: test images with what networks make of them, as `gallery.answers` returns them.
    """
    images = {name: figure(CAPTIONS[name.partition("-")[0]], picture) for name, picture in pictures.items()}
    drawings = [figure(caption, picture) for caption, picture in (galleries or {}).items()]
    sections = (
        _header(content),
        section(
            "Result",
            _conclusions(content),
            _results(content),
            _figures(images, "accuracy", "loss", "progress"),
            _differences(content),
            _uncertainty(content),
        ),
        section("Gradients at the start", _why(content), _figures(images, "gradients"))
        if "gradients" in images
        else "",
        section("How the settings were chosen", _tuning(content)) if len(content["points"]) > 1 else "",
        section("What the networks make of test images", _answers(answers)) if answers else "",
        section("What the networks find", *drawings) if drawings else "",
        *(_search(search, content, images) for search in content["searches"]),
        _equivalence(content["equivalence"]) if content["equivalence"] else "",
        section("Deploying", _deploying(content)) if content["deployed"] else "",
        section("Speed", _speed(), _figures(images, "step_time")) if "step_time" in images else "",
        section("Next: your own network", f"<pre>{escape(NEXT)}</pre>") if content["equivalence"] else "",
        section("Runs", _runs(content)),
    )
    return document(content["title"], sections)


def document(title: str, sections: Iterable[str]) -> str:
    """A page of this style, with sections in HTML; empty ones are left out."""
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{CSS}</style>\n</head>\n<body>\n"
        + "\n".join(filter(None, sections))
        + "\n</body>\n</html>\n"
    )


def _header(content: Mapping[str, Any]) -> str:
    made = content["made"]
    versions = ", ".join(f"{name} {version}" for name, version in made["versions"].items())
    parts = (made["date"], made["commit"] and f"commit {made['commit']}", made["processor"], versions)
    about = "".join(f"<p>{escape(paragraph)}</p>\n" for paragraph in content["about"])
    return (
        f"<h1>{escape(content['title'])}</h1>\n{about}"
        f'<p class="soft">{escape("; ".join(part for part in parts if part))}</p>'
    )


def _conclusions(content: Mapping[str, Any]) -> str:
    if not content["conclusions"]:
        return ""
    items = "".join(f"<li>{escape(sentence)}</li>" for sentence in content["conclusions"])
    return f'<div class="verdict"><ul>{items}</ul></div>'


def _results(content: Mapping[str, Any]) -> str:
    rows = content["rows"]
    metrics = [m for m in METRICS[content["task"]] if any(m.name in row["test"] for row in rows)]
    tuned = len(content["points"]) > 1
    heads = (
        "way of training",
        *(f"{metric.label} (%)" for metric in metrics),
        "standard deviation",
        *(["chosen"] if tuned else []),
        "time of a step (ms)",
        "parameters in training",
        *(["deployed"] if content["deployed"] else []),
    )
    cells = [
        (
            escape(row["label"]),
            *(_percent(list(row["test"].get(metric.name, {}).values())) for metric in metrics),
            "-" if row["deviation"] is None else f"{100 * row['deviation']:.2f}",
            *([escape(row["point"])] if tuned else []),
            "-" if row["step_ms"] is None else f"{row['step_ms']:.3g}",
            "-" if row["train_parameters"] is None else f"{row['train_parameters']:,}",
            *(
                ["-" if row["deploy_parameters"] is None else f"{row['deploy_parameters']:,}"]
                if content["deployed"]
                else []
            ),
        )
        for row in rows
    ]
    return table(heads, cells)


def _percent(values: Sequence[float]) -> str:
    if not values:
        return "-"
    mean = f"{100 * sum(values) / len(values):.2f}"
    if len(values) == 1:
        return mean
    return f"{mean}<br><small>{', '.join(f'{100 * value:.2f}' for value in values)}</small>"


def _percent_or_dash(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.2f}"


def _differences(content: Mapping[str, Any]) -> str:
    if not content["differences"]:
        return ""
    rows = [
        (
            escape(d["label"]),
            f"{100 * d['mean']:+.2f}<br><small>"
            f"{', '.join(f'{100 * value:+.2f}' for value in d['by_seed'].values())}</small>",
            *_interval(d),
        )
        for d in content["differences"]
    ]
    text = INTERVALS.format(count=len(rows), searches="one search")
    heads = ("difference, seed by seed", "points", "95 % interval", "contains zero")
    return table(heads, rows) + f'<p class="soft">{escape(text)}</p>'


def first_tested(rows: Sequence[Mapping[str, Any]]) -> Mapping[str, Any] | None:
    """The first way of a table of which a run did not diverge; None if there is none."""
    return next((row for row in rows if row["test_count"]), None)


def _interval(d: Mapping[str, Any]) -> tuple[str, str]:
    """The interval of a difference, and whether it contains zero."""
    if d["low"] is None:
        return "-", "-"
    if d["equal"]:
        return "no spread", "-"
    return f"{100 * d['low']:+.2f} to {100 * d['high']:+.2f}", "no" if d["shown"] else "yes"


def _uncertainty(content: Mapping[str, Any]) -> str:
    """Says what the numbers were measured on, and how exact that makes them."""
    rows = content["rows"]
    tested = first_tested(rows)
    if tested is None:
        return "<p>Every run diverged.</p>"
    count = tested["test_count"]
    errors = [row["standard_error"] for row in rows if row["standard_error"] is not None]
    if not errors:
        return (
            f"<p>Measured on {count:,} images by COCO's evaluation: AP50 counts a detection "
            "as right where its box (for keypoint AP50: its keypoints) agrees with the object by at least "
            f"0.5, AP averages over 0.5 to 0.95. {_spread_of_seeds(content)}</p>"
        )
    return (
        f"<p>The test set has {count:,} images; their number alone gives an accuracy a standard error of up "
        f"to {100 * max(errors):.1f} points, which more seeds do not lessen, as all share the images.</p>"
    )


def _spread_of_seeds(content: Mapping[str, Any]) -> str:
    """Describes the differences between seeds of the metric by which runs are compared."""
    metric = METRICS[content["task"]][0]
    seeds = [list(row["test"].get(metric.name, {}).values()) for row in content["rows"]]
    spreads = [100 * (max(values) - min(values)) for values in seeds if len(values) > 1]
    if not spreads:
        return "One seed says nothing about the spread, so small differences rank nothing."
    return (
        f"Seeds differ by up to {max(spreads):.1f} points of {metric.label} within one way of training, so "
        "differences of that size rank nothing."
    )


def _why(content: Mapping[str, Any]) -> str:
    sizes = [(row["label"], list(row["gradients"].values())) for row in content["rows"] if row["gradients"]]
    grown = [(label, max(values) / values[-1]) for label, values in sizes if values and values[-1] > 0]
    listed = "; ".join(f"{escape(label)} {ratio:.3g}" for label, ratio in grown)
    grows = grown and grown[0][1] > 2 * min(ratio for _, ratio in grown)
    explained = (
        "<p>Before anything has been learned, the gradient on its way back from the loss to the input grows "
        "from layer to layer in a plain network. An identity among the branches lets it pass nearly "
        "unchanged, and kernels that were merged from such branches do the same. If the gradients of the "
        "layers differ by much, no learning rate suits them all.</p>"
        if grows
        else ""
    )
    return f"{explained}<p>The largest gradient of a layer over that of the last one: {listed}.</p>"


def _tuning(content: Mapping[str, Any]) -> str:
    name = metric_label(METRICS[content["task"]][0], "validation")
    heads = ("way of training", *content["points"])
    rows = [
        (
            escape(row["label"]),
            *(
                f"<strong>{cell}</strong>" if point == row["point"] else cell
                for point, value in zip(content["points"], row["tuning"])
                for cell in ["diverged" if value is None else f"{100 * value:.2f}"]
            ),
        )
        for row in content["rows"]
    ]
    by = "one seed" if content["tuned_by"] == 1 else f"{content['tuned_by']} seeds"
    return (
        f"<p>Mean {escape(name)} (%) of {by}, on {content['validation']} training images that were held "
        "out; in bold what was chosen. The other seeds were trained with that alone. The "
        "test images were read when all of that was done.</p>" + table(heads, rows)
    )


def _answers(answers: Sequence[Mapping[str, Any]]) -> str:
    ways = list(answers[0]["answers"])

    def cell(answer: str, truth: str) -> str:
        text = escape(answer)
        return text if answer == truth else f'<span class="wrong">{text}</span>'

    rows = [
        ("image", *(_image(one["image"], f"test image of class {one['truth']}") for one in answers)),
        ("class", *(escape(one["truth"]) for one in answers)),
        *((escape(way), *(cell(one["answers"][way], one["truth"]) for one in answers)) for way in ways),
    ]
    body = "\n".join("<tr>" + "".join(f"<td>{cell}</td>" for cell in row) + "</tr>" for row in rows)
    return (
        "<p>Images on which the deployed networks of the first seed do not agree come first; wrong answers "
        "are "
        f'marked.</p>\n<div class="table answers"><table><tbody>\n{body}\n</tbody></table></div>'
    )


def _search(search: Mapping[str, Any], content: Mapping[str, Any], images: Mapping[str, str]) -> str:
    law = search["law"] or {"sentence": "", "notes": (), "residuals": {}}
    notes = "".join(f"<li>{escape(note)}</li>" for note in (*law["notes"], *search["notes"]))
    residuals = [(escape(layer), f"{error:+.1%}") for layer, error in law["residuals"].items()]
    heads = ("layer", "sum of the squared scales, above (+) or below what the law says")
    several = len(content["searches"]) > 1
    suffix = f"-{search['name']}" if several else ""
    return section(
        f"What the search {search['name']} has found" if several else "What the search has found",
        f'<p class="verdict">{escape(search["sentence"])}</p>',
        f"<p>{escape(law['sentence'])}</p>" if law["sentence"] else "",
        f"<ul>{notes}</ul>" if notes else "",
        f"<details><summary>The law layer by layer</summary>{table(heads, residuals)}</details>"
        if residuals
        else "",
        _figures(images, f"scales{suffix}", f"movement{suffix}"),
    )


def _equivalence(result: Mapping[str, Any]) -> str:
    outcome = "the same function" if result["equivalent"] else "<strong>not</strong> the same function"
    return section(
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
    metric = METRICS[content["task"]][0]
    labels = {row["way"]: row["label"] for row in content["rows"]}
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
            escape(labels.get(name, name)),
            f"{d['max_abs']:.1e}",
            f"{d['max_rel']:.1e}",
            f"{100 * d['agreement']:.2f}",
            _percent_or_dash(d["test"].get(metric.name)),
            f"{d['compared']:,}",
        )
        for name, d in content["deployed"].items()
    ]
    return (
        "<p>Deploying folds batch norm, and the branches where there are any, into one convolution with a "
        "bias for each block. The first seed of each way was deployed and compared with the trained network "
        "in float32.</p>" + table(heads, lines)
    )


def _speed() -> str:
    return (
        "<p>RepOpt adds nothing to the forward and backward pass of a plain network and a product to its "
        "update; the search merges its branches before the convolution; RepVGG runs every branch. Steps of "
        "networks this small are mostly overhead, and their times depend on what else the machine does.</p>"
    )


def _runs(content: Mapping[str, Any]) -> str:
    runs = content["runs"]
    heads = ("run", "seed", "epochs", "steps", "time (s)", "folder")
    in_table = table(
        heads,
        [
            (
                escape(run["label"]),
                *(
                    "-" if run[name] is None else escape(str(run[name]))
                    for name in ("seed", "epochs", "steps")
                ),
                "-" if run["wall_s"] is None else f"{run['wall_s']:.0f}",
                f"<code>{escape(run['directory'])}</code>",
            )
            for run in runs
        ],
    )
    others = content["run_count"] > len([run for run in runs if not run["label"].startswith("search ")])
    count = (
        f"<p>{content['run_count']} runs were made to compare the ways. These are the ones in the table; "
        "those that they were chosen from lie beside them.</p>"
        if others
        else ""
    )
    again = f"repopt train --config={runs[0]['directory']}/config.json --out=runs/again"
    return (
        f"{count}{in_table}<p>Each run's folder holds its config, by which it can be made again, alone:</p>\n"
        f"<pre>{escape(again)}</pre>" + made_by(content["made"]["command"])
    )


def made_by(command: str) -> str:
    """The command that has made the page; "" without one."""
    return f"<p>All of this was made by</p>\n<pre>{escape(command)}</pre>" if command else ""


def _figures(images: Mapping[str, str], *names: str) -> str:
    found = "\n".join(images[name] for name in names if name in images)
    return f'<div class="figures">\n{found}\n</div>' if found else ""


def figure(caption: str, picture: bytes) -> str:
    """A PNG file, at its size on paper, and its caption."""
    from repopt_jax.report import figures  # needs Matplotlib, which a page without pictures does not

    pixels = int.from_bytes(picture[16:20], "big")  # the width, in the header of a PNG file
    width = round(pixels / figures.DPI * 100)
    image = _image(picture, caption, f' width="{width}"')
    return f"<figure>{image}<figcaption>{escape(caption)}</figcaption></figure>"


def _image(picture: bytes, text: str, attributes: str = "") -> str:
    data = base64.b64encode(picture).decode()
    return f'<img{attributes} alt="{escape(text)}" src="data:image/png;base64,{data}">'


def table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table; `heads` are text, and the cells of `rows` markup."""
    head = "".join(f"<th>{escape(text)}</th>" for text in heads)
    body = "\n".join("<tr>" + "".join(f"<td>{cell}</td>" for cell in row) + "</tr>" for row in rows)
    return (
        f'<div class="table"><table>\n<thead><tr>{head}</tr></thead>\n<tbody>\n{body}\n</tbody></table></div>'
    )


def facts(rows: Iterable[Sequence[str]]) -> str:
    """A table of names and what they are, which breaks long texts; `rows` are markup."""
    body = "\n".join(f"<tr><td>{name}</td><td>{value}</td></tr>" for name, value in rows)
    return f'<table class="facts">\n<tbody>\n{body}\n</tbody></table>'


def section(title: str, *parts: str) -> str:
    """A heading and what follows it, in HTML; empty parts are left out."""
    return f"<section>\n<h2>{escape(title)}</h2>\n" + "\n".join(filter(None, parts)) + "\n</section>"
