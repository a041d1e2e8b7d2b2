"""Quantizes all networks of a comparison, to 8, 6, 5 and 4 bits, and writes what becomes of them.

    repopt compare --config=quantize_digits --out=RUNS
    python scripts/quantize_table.py RUNS --out=scripts/results/quantize_digits
    python scripts/quantize_table.py RUNS --out=PATH --qat=4:tensor    # also trained on with 4 bits

RUNS is the folder of a finished `repopt compare`: every way of training and every seed of it (of a grid, at
the point that was chosen) is fused and quantized, kernels and inputs to the same number of bits, with a scale
per channel and per tensor. Ranges are found on 512 training images, which are not augmented. With `--qat`
each network is trained on with that many bits, for half of its epochs at a tenth of its learning rate; these
trainings are kept in RUNS/aware. Writes PATH.json, PATH.md and PATH.png.
"""

import argparse
import json
import logging
import pathlib
import statistics
from typing import Any

import jax
import matplotlib
import numpy as np
from matplotlib.figure import Figure

from repopt_jax.deploy import Options, evaluate, load_plain, open_test, quantize_run, training_images
from repopt_jax.quantize import calibrate, expected, output_noise, quantize
from repopt_jax.report import figures
from repopt_jax.report.machine import processor
from repopt_jax.report.report import commit
from repopt_jax.train.rundir import Summary
from repopt_jax.train.tasks import METRICS, metric_label

BITS = (8, 6, 5, 4)
PER = ("channel", "tensor")
IMAGES = 512
DIVERGED = "diverged.json"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("runs", metavar="RUNS", type=pathlib.Path)
    parser.add_argument("--out", type=pathlib.Path, required=True, help="results, without an ending")
    parser.add_argument("--calibration", default="percentile", help="abs-max, percentile, entropy or mse")
    parser.add_argument("--qat", default="", metavar="BITS:PER", help="such as 4:tensor")
    parser.add_argument("--data-dir", help="folder of the images, if not the one that the runs used")
    args = parser.parse_args()
    logging.getLogger("repopt_jax").setLevel(logging.WARNING)
    report = json.loads((args.runs / "report.json").read_text())
    labels = {row["way"]: row["label"] for row in report["rows"]}
    networks = []
    for way, folder in runs_of(report, args.runs):
        if not (folder / DIVERGED).exists():
            networks.append(measure(way, folder, args))
            print(json.dumps(networks[-1]), flush=True)
    task = report["task"]
    content = {
        "title": report["title"],
        "labels": labels,
        "metric": METRICS[task][0].name,
        "label": metric_label(METRICS[task][0]),
        "calibration": args.calibration,
        "images": IMAGES,
        "qat": args.qat,
        "test_count": networks[0]["count"],
        "made": {
            "commit": commit(),
            "processor": processor(),
            "jax": jax.__version__,
        },
        "networks": networks,
    }
    pathlib.Path(f"{args.out}.json").write_text(json.dumps(content, indent=1) + "\n")
    pathlib.Path(f"{args.out}.md").write_text(markdown(content))
    pathlib.Path(f"{args.out}.png").write_bytes(figures.png(draw(content)))


def runs_of(report: dict[str, Any], runs: pathlib.Path) -> list[tuple[str, pathlib.Path]]:
    """Way and folder of each run in the table of a comparison, by way and seed: of a grid those at the point
    that was chosen. The report names folders as they were seen where it was made; their ends are kept."""
    return [
        (row["way"], runs.joinpath(*pathlib.Path(run["directory"]).parts[-4:]))  # runs/WAY/POINT/seedN
        for row in report["rows"]
        for run in report["runs"]
        if run["label"] == row["label"]
    ]


def measure(way: str, folder: pathlib.Path, args: argparse.Namespace) -> dict[str, Any]:
    """What a network becomes at each number of bits and each kind of scales."""
    plain = load_plain(folder)
    metric = METRICS[plain.config.task][0].name
    images = training_images(plain, IMAGES, data_dir=args.data_dir)
    test = [batch["image"][batch["mask"] > 0] for batch in open_test(plain, args.data_dir)[2]]
    histograms = calibrate(plain.model, images)
    exact = evaluate(plain, data_dir=args.data_dir)
    found: dict[str, Any] = {}
    for bits in BITS:
        for per in PER:
            how: Any = {"bits": bits, "per": per, "calibration": args.calibration}
            network = quantize(plain.model, histograms, **how)
            found[f"{bits}:{per}"] = {
                "value": evaluate(plain._replace(model=network), data_dir=args.data_dir)[metric],
                "ratio": output_noise(plain.model, network, test),
                "expected": expected(plain.model, histograms, **how).decibel,
            }
    tails = [one.tail for one in expected(plain.model).layers.values()]
    aware = trained_on(way, folder, args, metric) if args.qat else None
    return {
        "way": way,
        "seed": int(folder.name.removeprefix("seed")),
        "count": exact["count"],
        "float": exact[metric],
        "tail": max(tails),
        "median_tail": statistics.median(tails),
        "quantized": found,
        "aware": aware,
    }


def trained_on(way: str, folder: pathlib.Path, args: argparse.Namespace, metric: str) -> dict[str, Any]:
    """The same of the network after quantization-aware training."""
    bits, _, per = args.qat.partition(":")
    options = Options(bits=int(bits), per=per, calibration=args.calibration, images=IMAGES, aware=True)
    out = args.runs / "aware" / f"{way}-{folder.name}-{bits}-{per}"
    done = quantize_run(folder, out, options, data_dir=args.data_dir, progress=False)
    assert not isinstance(done, Summary)
    return {"value": done.test[metric], "ratio": done.measured}


def columns(content: dict[str, Any]) -> list[tuple[str, Any]]:
    """Name of a column -> the function of a network that gives its entry."""
    found: list[tuple[str, Any]] = [
        (f"{bits} bits per {per}", lambda network, key=f"{bits}:{per}": network["quantized"][key])
        for bits in BITS
        for per in PER
    ]
    if content["qat"]:
        bits, _, per = content["qat"].partition(":")
        found.append((f"{bits} bits per {per}, trained on", lambda network: network["aware"]))
    return found


def of_way(content: dict[str, Any], way: str) -> list[dict[str, Any]]:
    return [network for network in content["networks"] if network["way"] == way]


def markdown(content: dict[str, Any]) -> str:
    names = [name for name, _ in columns(content)]
    aware = f" --qat={content['qat']}" if content["qat"] else ""
    made = content["made"]
    lines = [
        f"# {content['title']}: what becomes of the networks in whole numbers",
        "",
        f"`python scripts/quantize_table.py RUNS --out=PATH{aware}`",
        "",
        f"{made['processor']}; jax {made['jax']}{made['commit'] and ', commit ' + made['commit']}. Inputs "
        f"and kernels of all layers, ranges by {content['calibration']} on {content['images']} training "
        f"images, {content['test_count']:,} test images. Kernels of 8 bits reach to 63 (reduced range).",
        "",
        f"{content['label'].capitalize()}, %: the mean over the seeds, and each seed.",
        "",
        f"| | floating point | {' | '.join(names)} |",
        "|---" * (len(names) + 2) + "|",
    ]
    for way, label in content["labels"].items():
        networks = of_way(content, way)
        cells = [percent([network["float"] for network in networks])]
        cells += [percent([get(network)["value"] for network in networks]) for _, get in columns(content)]
        lines.append(f"| {label} | {' | '.join(cells)} |")
    lines += [
        "",
        "Signal-to-noise ratio of the output on the test images, dB: mean, and each seed.",
        "",
        f"| | {' | '.join(names)} |",
        "|---" * (len(names) + 1) + "|",
    ]
    for way, label in content["labels"].items():
        cells = [
            ratios([get(network)["ratio"] for network in of_way(content, way)]) for _, get in columns(content)
        ]
        lines.append(f"| {label} | {' | '.join(cells)} |")
    lines += [
        "",
        "What is expected from kernels and ranges alone (`quantize.expected`), dB, and max / rms of the "
        "kernels: the largest and the median over the layers. Means over the seeds.",
        "",
        f"| | {' | '.join(f'{bits} bits per {per}' for bits in BITS for per in PER)} | largest | median |",
        "|---" * (len(BITS) * len(PER) + 3) + "|",
    ]
    for way, label in content["labels"].items():
        networks = of_way(content, way)
        looks = [[n["quantized"][f"{b}:{per}"]["expected"] for n in networks] for b in BITS for per in PER]
        cells = [f"{statistics.mean(look):.1f}" for look in looks]
        cells += [
            f"{statistics.mean(network[name] for network in networks):.1f}"
            for name in ("tail", "median_tail")
        ]
        lines.append(f"| {label} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def percent(values: list[float]) -> str:
    return f"{100 * statistics.mean(values):.1f} ({', '.join(f'{100 * value:.1f}' for value in values)})"


def ratios(values: list[float]) -> str:
    return f"{statistics.mean(values):.1f} ({', '.join(f'{value:.1f}' for value in values)})"


def draw(content: dict[str, Any]) -> Figure:
    """Draws the metric over the bits, per channel and per tensor: points are seeds, lines their mean."""
    styles = figures.styles(content["labels"].values())
    with matplotlib.rc_context(figures.RC):
        figure = Figure(figsize=(2 * figures.WIDTH, 4.2), layout="constrained")
        for axes, per in zip(figure.subplots(1, 2, sharey=True), PER):
            for shift, (way, label) in enumerate(content["labels"].items()):
                networks, style = of_way(content, way), styles[label]
                values = 100 * np.array(
                    [
                        [n["float"], *(n["quantized"][f"{bits}:{per}"]["value"] for bits in BITS)]
                        for n in networks
                    ]
                )
                places = np.arange(len(BITS) + 1)
                offset = places + 0.07 * (shift - (len(content["labels"]) - 1) / 2)
                for seed in values:
                    axes.plot(offset, seed, "o", color=style.colour, markersize=4, alpha=0.5)
                axes.plot(
                    places, values.mean(0), color=style.colour, linestyle=style.line, linewidth=2, label=label
                )
            axes.set_xticks(places, ["float", *map(str, BITS)])
            axes.set(xlabel="bits of inputs and kernels", title=f"one scale per {per}")
            axes.grid(visible=False, axis="x")
        figure.axes[0].set_ylabel(f"{content['label']} (%)")
        handles, names = figure.axes[0].get_legend_handles_labels()
        figure.legend(handles, names, loc="outside lower center", ncols=3, handlelength=2.6, fontsize=9)
    return figure


if __name__ == "__main__":
    main()
