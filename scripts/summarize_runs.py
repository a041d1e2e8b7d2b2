"""A table of finished runs, grouped by name, with mean, spread and what the spread allows to be said.

    python scripts/summarize_runs.py RUNS --compare plain repopt --out scripts/results/NAME

RUNS holds a folder for each run, called NAME-SEED. `--compare A B` adds the difference of two groups, seed
by seed (runs of one seed see the images in the same order), with a 95 % interval from Student's t. Writes
OUT.md, OUT.json, OUT.png.
"""

import argparse
import json
import math
import pathlib
import statistics
from typing import Any

# Two-sided 95 % quantiles of Student's t by degrees of freedom.
T95 = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447, 7: 2.365, 8: 2.306, 9: 2.262}
LEFT_OUT = ("scales", "step_ms_median", "images_per_s", "wall_s")
MANY = 2.262  # for more degrees of freedom: a little too wide


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("runs", type=pathlib.Path)
    parser.add_argument("--compare", nargs=2, metavar=("A", "B"))
    parser.add_argument("--out", type=pathlib.Path, required=True, help="path without suffix")
    parser.add_argument("--title", default="CIFAR-10 at a small size")
    parser.add_argument("--command", default="", help="what made the runs, for the results file")
    parser.add_argument("--hardware", default="", help="what they ran on, likewise")
    args = parser.parse_args()
    args.out.parent.mkdir(parents=True, exist_ok=True)
    groups = read_groups(args.runs)
    result: dict[str, Any] = {"groups": groups}
    if args.compare:
        result["comparison"] = compare(groups, *args.compare)
    result["command"], result["hardware"] = args.command, args.hardware
    args.out.with_suffix(".json").write_text(json.dumps(result, indent=1))
    args.out.with_suffix(".md").write_text(markdown(args.title, result))
    draw(args.title, groups, args.runs, args.out.with_suffix(".png"))


def read_groups(runs: pathlib.Path) -> dict[str, dict[int, dict[str, Any]]]:
    """Group name -> seed -> summary, of the runs that are finished."""
    groups: dict[str, dict[int, dict[str, Any]]] = {}
    for folder in sorted(runs.iterdir()):
        if (folder / "summary.json").exists():
            name, _, seed = folder.name.rpartition("-")
            summary = json.loads((folder / "summary.json").read_text())
            # Where scales lay is no result, and times depend on what else the machine did: see benchmark.py.
            kept = {key: value for key, value in summary.items() if key not in LEFT_OUT}
            groups.setdefault(name, {})[int(seed)] = kept
    if not groups:
        raise SystemExit(f"no finished run in {runs}")
    return groups


def accuracies(group: dict[int, dict[str, Any]]) -> dict[int, float]:
    return {seed: 100 * summary["test_accuracy"] for seed, summary in group.items()}


def compare(groups, a: str, b: str) -> dict[str, Any]:
    """Difference b - a over the seeds that both have, in points, with its 95 % interval."""
    first, second = accuracies(groups[a]), accuracies(groups[b])
    differences = [second[seed] - first[seed] for seed in sorted(first.keys() & second.keys())]
    mean = statistics.mean(differences)
    out = {"a": a, "b": b, "differences": differences, "mean": mean}
    if len(differences) > 1:
        half = (
            T95.get(len(differences) - 1, MANY) * statistics.stdev(differences) / math.sqrt(len(differences))
        )
        out |= {"low": mean - half, "high": mean + half}
    return out


def markdown(title: str, result: dict[str, Any]) -> str:
    some = next(iter(next(iter(result["groups"].values())).values()))
    versions = ", ".join(f"{name} {version}" for name, version in some["versions"].items())
    lines = [
        f"# {title}",
        "",
        f"`{result['command']}`",
        "",
        f"{result['hardware'] or some['device']}; {versions}. "
        f"{some['epochs']} epochs, {some['steps']} steps, {some['test_count']:,} test images "
        f"(binomial standard error {binomial_error(some):.1f} points).",
        "",
        "| | seeds | test accuracy, % | mean | standard deviation | parameters in training |",
        "|---|---|---|---|---|---|",
    ]
    for name, group in result["groups"].items():
        values = accuracies(group)
        spread = f"{statistics.stdev(values.values()):.2f}" if len(values) > 1 else ""
        parameters = next(iter(group.values()))["train_parameters"]
        lines.append(
            f"| {name} | {', '.join(map(str, values))} | {', '.join(f'{v:.2f}' for v in values.values())} | "
            f"{statistics.mean(values.values()):.2f} | {spread} | {parameters:,} |"
        )
    if "comparison" in result:
        lines += ["", verdict(result["comparison"])]
    return "\n".join(lines) + "\n"


def verdict(c: dict[str, Any]) -> str:
    """What the numbers allow to be said, in a sentence."""
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


def binomial_error(summary: dict[str, Any]) -> float:
    p = summary["test_accuracy"]
    return 100 * math.sqrt(p * (1 - p) / summary["test_count"])


def draw(title: str, groups, runs: pathlib.Path, path: pathlib.Path) -> None:
    """Test accuracy against epochs: every run as a thin line, the group's mean as a thick one."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.2, 4.2), layout="constrained")
    axes = figure.add_subplot()
    colours = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00"]
    for colour, (name, group) in zip(colours, groups.items()):
        curves = [read_curve(runs / f"{name}-{seed}") for seed in group]
        for curve in curves:
            axes.plot(curve.keys(), curve.values(), color=colour, alpha=0.35, linewidth=1)
        common = sorted(set.intersection(*(set(curve) for curve in curves)))
        mean = [statistics.mean(curve[epoch] for curve in curves) for epoch in common]
        label = f"{name}: {mean[-1]:.1f} %" + (f", {len(curves)} seeds" if len(curves) > 1 else "")
        axes.plot(common, mean, color=colour, linewidth=2.2, label=label)
    axes.set(title=title, xlabel="epoch", ylabel="test accuracy, %")
    axes.grid(alpha=0.3)
    axes.legend(loc="lower right")
    FigureCanvasAgg(figure).print_png(path)


def read_curve(run: pathlib.Path) -> dict[float, float]:
    records = (json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines())
    return {r["epoch"]: 100 * r["accuracy"] for r in records if r["kind"] == "eval"}


if __name__ == "__main__":
    main()
