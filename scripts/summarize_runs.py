"""Writes a table of finished runs, grouped by name, with means, spreads and confidence intervals.

    python scripts/summarize_runs.py RUNS --compare plain repopt --out scripts/results/NAME

RUNS holds a folder for each run, called NAME-SEED. `--compare A B [C ...]` adds the differences of the groups
B, C, ... to A, seed by seed (runs of one seed use the images in the same order), each with a 95 % interval
from Student's t; groups without a finished run are left out. `--metrics` are the metrics to report, for a
detector for instance `ap50 keypoint_ap50`, each in a table of its own; those that no run has are left out.
`--deployed DIR`, with a folder of `repopt deploy` for each name, adds the effect of deploying. Writes OUT.md,
OUT.json and OUT.png.
"""

import argparse
import itertools
import json
import math
import pathlib
import statistics
from typing import Any

from scipy.stats import t as student_t

from repopt_jax.train.tasks import METRICS

# Metric -> its name in tables.
LABELS = {metric.name: metric.label for task in METRICS.values() for metric in task}
# Fields of a summary that are not results: the path of the scales, and times, which depend on other programs.
LEFT_OUT = ("scales", "step_ms_median", "images_per_s", "wall_s")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("runs", type=pathlib.Path)
    parser.add_argument("--compare", nargs="+", default=[], metavar="NAME", help="A B [C ...]")
    parser.add_argument("--metrics", nargs="+", default=["accuracy"], choices=LABELS)
    parser.add_argument("--deployed", type=pathlib.Path, metavar="DIR", help="deployments, by name")
    parser.add_argument("--out", type=pathlib.Path, required=True, help="path without suffix")
    parser.add_argument("--title", default="CIFAR-10 at a small size")
    parser.add_argument("--command", default="", help="the command that made the runs, for the results file")
    parser.add_argument("--hardware", default="", help="the machine that they ran on, for the results file")
    args = parser.parse_args()
    args.out.parent.mkdir(parents=True, exist_ok=True)
    groups = read_groups(args.runs)
    metrics = [m for m in args.metrics if any(measured(group, m) for group in groups.values())]
    if not metrics:
        raise SystemExit(f"no run in {args.runs} has measured {', '.join(args.metrics)}")
    result: dict[str, Any] = {"groups": groups, "metrics": metrics}
    result["comparisons"] = [
        compare_all(groups, metric, *args.compare) if args.compare else [] for metric in metrics
    ]
    if args.deployed:
        result["deployed"] = read_deployed(args.deployed)
    result["command"], result["hardware"] = args.command, args.hardware
    args.out.with_suffix(".json").write_text(json.dumps(result, indent=1))
    args.out.with_suffix(".md").write_text(markdown(args.title, result))
    draw(args.title, groups, args.runs, metrics[0], args.out.with_suffix(".png"))


def read_groups(runs: pathlib.Path) -> dict[str, dict[int, dict[str, Any]]]:
    """Group name -> seed -> summary, for the runs that are finished."""
    groups: dict[str, dict[int, dict[str, Any]]] = {}
    for folder in sorted(runs.iterdir()):
        if (folder / "summary.json").exists():
            name, _, seed = folder.name.rpartition("-")
            summary = json.loads((folder / "summary.json").read_text())
            kept = {key: value for key, value in summary.items() if key not in LEFT_OUT}
            groups.setdefault(name, {})[int(seed)] = kept
    if not groups:
        raise SystemExit(f"no finished run in {runs}")
    return groups


def read_deployed(folder: pathlib.Path) -> dict[str, dict[str, Any]]:
    """Name -> the effect of deploying."""
    records = {p.parent.name: json.loads(p.read_text()) for p in sorted(folder.glob("*/deploy.json"))}
    if not records:
        raise SystemExit(f"no deployment in {folder}")
    kept = ("max_abs", "max_rel", "compared", "deploy_parameters")
    return {name: {key: record[key] for key in kept} for name, record in records.items()}


def measured(group: dict[int, dict[str, Any]], metric: str) -> dict[int, float]:
    """Seed -> the metric in percent, for the runs that have it."""
    values = {seed: summary["test"].get(metric) for seed, summary in group.items()}
    return {seed: 100 * value for seed, value in values.items() if value is not None}


def compare_all(groups, metric: str, base: str, *others: str) -> list[dict[str, Any]]:
    """Compares `base` with each of `others` that has finished runs of the same seeds."""
    if base not in groups:
        raise SystemExit(f"no finished run of {base}, to which the others are to be compared")
    first = measured(groups[base], metric).keys()
    finished = [b for b in others if first & measured(groups.get(b, {}), metric).keys()]
    return [compare(groups, metric, base, b) for b in finished]


def compare(groups, metric: str, a: str, b: str) -> dict[str, Any]:
    """The difference b - a over the seeds that both have, in points, with its 95 % interval."""
    first, second = measured(groups[a], metric), measured(groups[b], metric)
    differences = [second[seed] - first[seed] for seed in sorted(first.keys() & second.keys())]
    mean = statistics.mean(differences)
    out = {"a": a, "b": b, "differences": differences, "mean": mean}
    if (n := len(differences)) > 1:
        quantile = float(student_t.ppf(0.975, n - 1))
        half = quantile * statistics.stdev(differences) / math.sqrt(n)
        out |= {"low": mean - half, "high": mean + half}
    return out


def markdown(title: str, result: dict[str, Any]) -> str:
    first = next(iter(next(iter(result["groups"].values())).values()))
    versions = ", ".join(f"{name} {version}" for name, version in first["versions"].items())
    lines = [
        f"# {title}",
        "",
        f"`{result['command']}`",
        "",
        f"{result['hardware'] or first['device']}; {versions}. "
        f"{first['epochs']} epochs, {first['steps']} steps, {first['test_count']:,} test images"
        f"{binomial_error(first)}.",
    ]
    for metric, comparisons in zip(result["metrics"], result["comparisons"], strict=True):
        lines += ["", *table(result["groups"], metric)]
        if len(comparisons) == 1:
            lines += ["", verdict(comparisons[0])]
        elif comparisons:
            lines += ["", *difference_table(comparisons)]
    if result.get("deployed"):
        lines += ["", *deployed_table(result["deployed"])]
    return "\n".join(lines) + "\n"


def table(groups, metric: str) -> list[str]:
    """A table with a line for each group."""
    lines = [
        f"| | seeds | {LABELS[metric]}, % | mean | standard deviation | parameters in training |",
        "|---|---|---|---|---|---|",
    ]
    for name, group in groups.items():
        values = measured(group, metric)
        if not values:
            continue
        spread = f"{statistics.stdev(values.values()):.2f}" if len(values) > 1 else ""
        parameters = next(iter(group.values()))["train_parameters"]
        lines.append(
            f"| {name} | {', '.join(map(str, values))} | {', '.join(f'{v:.2f}' for v in values.values())} | "
            f"{statistics.mean(values.values()):.2f} | {spread} | {parameters:,} |"
        )
    return lines


def difference_table(comparisons: list[dict[str, Any]]) -> list[str]:
    """A table of many groups against one, with a line for each."""
    lines = [
        f"Points more than {comparisons[0]['a']}, seed by seed:",
        "",
        "| | differences | mean | 95 % interval | contains zero |",
        "|---|---|---|---|---|",
    ]
    for c in comparisons:
        interval, contains = "", ""
        if "low" in c:
            interval = f"{c['low']:+.2f} to {c['high']:+.2f}"
            contains = "no" if c["low"] > 0 or c["high"] < 0 else "yes"
        differences = ", ".join(f"{d:+.2f}" for d in c["differences"])
        lines.append(f"| {c['b']} | {differences} | {c['mean']:+.2f} | {interval} | {contains} |")
    return [
        *lines,
        "",
        f"Each interval is Student's t over its own pairs, without a correction for there being "
        f"{len(comparisons)} of them. Runs that share one search do not show the spread between searches.",
    ]


def deployed_table(deployed: dict[str, dict[str, Any]]) -> list[str]:
    """A table of how far the outputs of each deployed network are from those of the trained one."""
    lines = ["| | largest difference of an output | parameters deployed |", "|---|---|---|"]
    for name, found in deployed.items():
        lines.append(f"| {name} | {found['max_abs']:.1e} | {found['deploy_parameters']:,} |")
    return lines


def verdict(c: dict[str, Any]) -> str:
    """The conclusion that a comparison allows, in a sentence."""
    differences = ", ".join(f"{d:+.2f}" for d in c["differences"])
    text = f"{c['b']} minus {c['a']}, seed by seed: {differences} points, mean {c['mean']:+.2f}"
    if "low" not in c:
        return text + ". One seed says nothing about the spread."
    text += (
        f", 95 % interval {c['low']:+.2f} to {c['high']:+.2f} (Student's t, {len(c['differences'])} pairs). "
    )
    if c["low"] > 0 or c["high"] < 0:
        return (
            text + "The interval does not contain zero: the order of the two means is unlikely to be chance."
        )
    return text + (
        "The interval contains zero: the means are in this order, but so few seeds do not show that the "
        "order is more than chance."
    )


def binomial_error(summary: dict[str, Any]) -> str:
    """The error of an accuracy, in parentheses; an average precision, no share of images, has none."""
    p = summary["test"].get("accuracy")
    if p is None:
        return ""
    return f" (binomial standard error {100 * math.sqrt(p * (1 - p) / summary['test_count']):.1f} points)"


def draw(title: str, groups, runs: pathlib.Path, metric: str, path: pathlib.Path) -> None:
    """Draws the metric of every run: over epochs, or as points if it was measured at the end only."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    groups = {name: group for name, group in groups.items() if measured(group, metric)}
    curves = {
        name: [read_curve(runs / f"{name}-{seed}", metric) for seed in measured(group, metric)]
        for name, group in groups.items()
    }
    figure = Figure(figsize=(7.2, 4.2), layout="constrained")
    axes = figure.add_subplot(title=title)
    axes.grid(alpha=0.3)
    if all(len(curve) == 1 for group in curves.values() for curve in group):
        draw_points(axes, {name: measured(group, metric) for name, group in groups.items()}, metric)
    else:
        draw_curves(axes, curves, metric)
    FigureCanvasAgg(figure).print_png(path)


def draw_curves(axes: Any, curves: dict[str, list[dict[float, float]]], metric: str) -> None:
    """Draws every run as a thin line, and the mean of a group as a thick one."""
    colours = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000"]
    for colour, (name, group) in zip(itertools.cycle(colours), curves.items()):
        for curve in group:
            axes.plot(curve.keys(), curve.values(), color=colour, alpha=0.35, linewidth=1)
        common = sorted(set.intersection(*(set(curve) for curve in group)))
        mean = [statistics.mean(curve[epoch] for curve in group) for epoch in common]
        label = f"{name}: {mean[-1]:.1f} %" + (f", {len(group)} seeds" if len(group) > 1 else "")
        axes.plot(common, mean, color=colour, linewidth=2.2, label=label)
    axes.set(xlabel="epoch", ylabel=f"{LABELS[metric]}, %")
    axes.legend(loc="lower right")


def draw_points(axes: Any, values: dict[str, dict[int, float]], metric: str) -> None:
    """Draws a row for each group, the first on top: every run as a point, the mean as a bar."""
    for row, group in enumerate(values.values()):
        axes.plot(group.values(), [row] * len(group), "o", color="#0072B2", alpha=0.6)
        mean = statistics.mean(group.values())
        axes.plot([mean, mean], [row - 0.3, row + 0.3], color="#D55E00", linewidth=2.2)
    axes.set_yticks(range(len(values)), list(values))
    axes.invert_yaxis()
    axes.set(xlabel=f"{LABELS[metric]}, %")


def read_curve(run: pathlib.Path, metric: str) -> dict[float, float]:
    records = (json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines())
    return {r["epoch"]: 100 * r[metric] for r in records if r["kind"] == "eval" and r.get(metric) is not None}


if __name__ == "__main__":
    main()
