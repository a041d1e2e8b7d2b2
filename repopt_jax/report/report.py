"""The report of a comparison, written to a folder.

report.html     the page, with its figures embedded
report.json     the numbers
report.md       the tables as text
report/*.png    the figures
"""

import dataclasses
import datetime
import itertools
import json
import math
import shutil
import statistics
import subprocess
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from repopt_jax.report import figures, monitor, page
from repopt_jax.report.compare import Results
from repopt_jax.report.comparison import point_text
from repopt_jax.report.machine import processor
from repopt_jax.report.records import History, Run, history_of, read_run
from repopt_jax.report.statistics import Difference, standard_error
from repopt_jax.surgery.prepare import Mode
from repopt_jax.train.config import Config, settings_of
from repopt_jax.train.tasks import METRICS, metric_label


def write_report(
    results: Results,
    out_dir: str | Path,
    *,
    deployed: Mapping[str, Mapping[str, Any]] | None = None,
    equivalence: Mapping[str, Any] | None = None,
    answers: Sequence[Mapping[str, Any]] = (),
    galleries: Mapping[str, tuple[str, bytes]] | None = None,
    command: str = "",
) -> Path:
    """Writes the report of a comparison and returns the path of its page.

    Args:
      results: what `compare` returned.
      out_dir: the folder for report.html, report.json, report.md and report/; existing ones are replaced.
      deployed: way or search -> the fields of `deploy.Deployed` of its first run.
      equivalence: the result of the check of CSLA against `repopt_mask`.
      answers: test images with what networks make of them, as `gallery.answers` returns them.
      galleries: drawings of what networks find on test images: name of the file -> (caption, PNG).
      command: the command that made all this.

    Raises:
      OSError: `out_dir` cannot be written.
    """
    out_dir, galleries = Path(out_dir).expanduser().absolute(), galleries or {}
    runs = {way: list(map(read_run, r.folders.values())) for way, r in results.ways.items()}
    searches = {name: read_run(folder) for name, folder in results.searches.items()}
    histories = {
        name: history_of(run.of_kind("scales"), run.of_kind("train")) for name, run in searches.items()
    }
    drawn = dict(_draw(results, runs, histories))
    content = _content(results, deployed or {}, equivalence, histories, command)
    _write_pngs(out_dir / "report", {**drawn, **{name: png for name, (_, png) in galleries.items()}})
    (out_dir / "report.json").write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    (out_dir / "report.md").write_text(markdown(content), encoding="utf-8")
    path = out_dir / "report.html"
    path.write_text(page.render(content, drawn, dict(galleries.values()), answers), encoding="utf-8")
    return path


def draw_search(history: History, folder: Path) -> list[Path]:
    """Draws how the scales of a search moved as two figures in `folder`, and returns their paths."""
    return _write_pngs(folder, dict(_draw_scales(history)))


# -- the numbers


def _content(
    results: Results,
    deployed: Mapping[str, Mapping[str, Any]],
    equivalence: Mapping[str, Any] | None,
    histories: Mapping[str, History],
    command: str,
) -> dict[str, Any]:
    comparison = results.comparison
    return {
        "title": comparison.title,
        "about": list(comparison.about),
        "task": comparison.task,
        "metric": comparison.metric,
        "made": _made(results, command),
        "conclusions": list(conclusions(results)),
        "rows": [_row(results, way, deployed.get(way)) for way in results.ways],
        "points": [point_text(point) for point in comparison.points],
        "tuned_by": comparison.tuned_by,
        "ways": list(comparison.all_ways),
        "pairs": [list(pair) for pair in comparison.all_pairs],
        "validation": comparison.validation,
        "differences": [difference_row(d, comparison.label) for d in results.differences],
        "searches": [
            {"name": name, **dataclasses.asdict(monitor.verdict(history))}
            for name, history in histories.items()
        ],
        "deployed": {name: dict(fields) for name, fields in deployed.items()},
        "equivalence": equivalence,
        "runs": list(_runs(results)),
        "run_count": comparison.tuned_by * len(comparison.points) * len(results.ways)
        + (comparison.seeds - comparison.tuned_by) * len(results.ways),
    }


def _row(results: Results, way: str, deployed: Mapping[str, Any] | None) -> dict[str, Any]:
    result, comparison = results.ways[way], results.comparison
    return {
        "way": way,
        "label": comparison.label(way),
        "point": point_text(result.point),
        "settings": comparison.settings(way),
        "seeds": list(result.folders),
        "epochs": result.summary.get("epochs"),
        "steps": result.summary.get("steps"),
        "tuned_by": comparison.tuned_by,
        "tuning": [None if value != value else value for value in result.tuning],
        "test": result.test,
        **spread(result.test, comparison.metric, result.count),
        "test_count": result.count,
        "step_ms": result.step_ms,
        "train_parameters": result.summary.get("train_parameters"),
        "deploy_parameters": deployed and deployed["deploy_parameters"],
        "deploy_error": deployed and deployed["max_rel"],
        "gradients": {layer: size for layer, size in result.gradients.items() if math.isfinite(size)},
    }


def difference_row(d: Difference, label: Callable[[str], str]) -> dict[str, Any]:
    """A difference as report.json has it; `label` gives what a way is called."""
    return {"label": f"{label(d.way)} minus {label(d.than)}", **dataclasses.asdict(d), "shown": d.shown}


def spread(test: Mapping[str, Mapping[Any, float]], metric: str, count: int) -> dict[str, float | None]:
    """Mean and deviation of the seeds, and the binomial error of an accuracy on so many images.

    Args:
      test: metric -> seed -> value in [0, 1].
      metric: whose mean and deviation.
      count: number of test images.
    """
    values, accuracies = list(test.get(metric, {}).values()), test.get("accuracy")
    return {
        "mean": statistics.fmean(values) if values else None,
        "deviation": statistics.stdev(values) if len(values) > 1 else None,
        "standard_error": standard_error(statistics.fmean(accuracies.values()), count)
        if accuracies
        else None,
    }


def _runs(results: Results) -> Iterator[dict[str, Any]]:
    """The runs that the table is made of, and the searches."""
    folders = [
        (results.comparison.label(way), seed, folder)
        for way, result in results.ways.items()
        for seed, folder in result.folders.items()
    ]
    folders += [
        (f"search {name}", results.comparison.searches[name].seed, f) for name, f in results.searches.items()
    ]
    for label, seed, folder in folders:
        summary = read_run(folder).summary
        yield {
            "label": label,
            "directory": _relative(folder),
            "seed": seed,
            "epochs": summary.get("epochs"),
            "steps": summary.get("steps"),
            "wall_s": summary.get("wall_s"),
        }


def conclusions(results: Results) -> Iterator[str]:
    """What the differences allow to be said: who is ahead of whom, what is not shown, and how much of a lead
    is there at the start."""
    comparison = results.comparison
    labels = {way: comparison.label(way) for way in results.ways}
    # With folders of scales, which `settings` leaves out: here they are of one machine.
    of = {way: {**comparison.settings(way), "scales": comparison.ways[way].scales} for way in results.ways}
    starts = starts_of(of)
    return sentences(results.differences, labels, starts)


def sentences(
    differences: Sequence[Difference], labels: Mapping[str, str], starts: Mapping[str, str]
) -> Iterator[str]:
    """`conclusions` of differences alone.

    Args:
      differences: way minus way.
      labels: way -> what it is called.
      starts: way -> the way that is its rule of initialization alone.
    """
    for than in dict.fromkeys(d.than for d in differences):
        for word, sign in (("Ahead of", 1), ("Behind", -1)):
            found = [d for d in differences if d.than == than and d.shown and d.mean * sign > 0]
            if found:
                listed = "; ".join(f"{labels[d.way]} {_with_interval(d)}" for d in found)
                yield f"{word} {labels[than]} by points that are unlikely to be chance: {listed}."
    if unclear := [d for d in differences if not d.shown and d.low is not None]:
        listed = "; ".join(f"{labels[d.way]} minus {labels[d.than]} {_with_interval(d)}" for d in unclear)
        yield f"Not shown which is better, as the interval contains zero: {listed}."
    if single := [d for d in differences if d.low is None]:
        listed = "; ".join(f"{labels[d.way]} minus {labels[d.than]} {_points(d.mean)}" for d in single)
        yield f"One seed says nothing of the spread: {listed}."
    yield from _share_of_start(differences, labels, starts)


def _with_interval(d: Difference) -> str:
    assert d.low is not None
    assert d.high is not None
    return f"{_points(d.mean)} ({_points(d.low)} to {_points(d.high)})"


def _share_of_start(
    differences: Sequence[Difference], labels: Mapping[str, str], starts: Mapping[str, str]
) -> Iterator[str]:
    """How much of a lead that is shown is there with the rule of initialization alone."""
    found = {(d.way, d.than): d for d in differences}
    for (way, than), whole in found.items():
        start = starts.get(way)
        if start is None or (start, than) not in found or not whole.shown or whole.mean <= 0:
            continue
        part, rest = found[start, than].mean, found.get((way, start))
        lead = f"{labels[way]} is ahead of {labels[than]}"
        more = "" if rest is None or rest.shown else ", and more than that is not shown"
        if part >= whole.mean:
            yield (
                f"All of the lead is where the training starts: {lead} by {_points(whole.mean)} points, and "
                f"the initialization alone is by {_points(part)}."
            )
        elif part >= whole.mean / 2:
            yield (
                f"Most of the lead is where the training starts: of the {_points(whole.mean)} points that "
                f"{lead}, {_points(part)} are there with the initialization alone{more}."
            )
        elif part > 0:
            yield (
                f"The initialization alone gives {_points(part)} of the {_points(whole.mean)} points that "
                f"{lead}."
            )
        else:
            yield f"The initialization alone gives none of the {_points(whole.mean)} points that {lead}."


def _points(value: float) -> str:
    return f"{100 * value:+.1f}"


# Fields that have no meaning where scales do not multiply gradients.
OF_MULTIPLIERS = tuple(
    name
    for name, *_, rules, _ in settings_of(Config())
    if "init" not in rules["only"].get("rules", ("init",))
)


def starts_of(settings: Mapping[str, Mapping[str, Any]]) -> dict[str, str]:
    """Way -> the way that is its rule of initialization alone, where there is one; `settings` are those of
    each way as `Comparison.settings` gives them."""
    rules, kept = {}, {}
    for way, of in settings.items():
        if of.get("model.mode") == Mode.REPOPT and "scales" in of:
            rules[way] = of.get("rules", Config.rules)
            kept[way] = {name: v for name, v in of.items() if name not in ("rules", *OF_MULTIPLIERS)}
    return {
        way: other
        for way, other in itertools.permutations(kept, 2)
        if (rules[way], rules[other]) == ("both", "init") and kept[way] == kept[other]
    }


def _made(results: Results, command: str) -> dict[str, Any]:
    """When, from what and on what the results were made."""
    first = next((r.summary for r in results.ways.values() if r.summary), {})
    return {
        "command": command,
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "commit": commit(),
        "processor": processor(),
        "versions": dict(first.get("versions", {})),
        "device": first.get("device", ""),
        "epochs": first.get("epochs"),
        "steps": first.get("steps"),
    }


def commit() -> str:
    """The commit of this package's source, with a + if files differ from it; "" where it is not known."""
    folder = Path(__file__).parents[2]
    git = shutil.which("git")
    if git is None or not (folder / ".git").exists():
        return ""

    def ask(*arguments: str) -> str:
        done = subprocess.run([git, "-C", str(folder), *arguments], capture_output=True, text=True)
        return done.stdout.strip() if done.returncode == 0 else ""

    name = ask("rev-parse", "--short=10", "HEAD")
    return name + ("+" if name and ask("status", "--porcelain", "--untracked-files=no") else "")


def _relative(path: Path) -> str:
    """The path as it is typed where the command was given, if it is below that folder."""
    try:
        return str(path.relative_to(Path.cwd()))
    except ValueError:
        return str(path)


# -- as text


def markdown(content: Mapping[str, Any]) -> str:
    """The tables of report.json's content, or of what `join` made of several, as Markdown."""
    made, parts = content["made"], content.get("parts", ())
    rows = content["rows"]
    metrics = [m for m in METRICS[content["task"]] if any(m.name in row["test"] for row in rows)]
    lines = [f"# {content['title']}", ""]
    if made["command"]:
        lines += [f"`{made['command']}`", ""]
    size = (
        f"{made['epochs']} epochs, {made['steps']} steps, {rows[0]['test_count']:,} test images"
        f"{_binomial(rows)}."
    )
    if parts:
        lines += [f"{size} Made in {len(parts)} parts:", ""]
        lines += [
            f"{i}. {_origin(part)}" + (f" `{part['command']}`" if part["command"] else "")
            for i, part in enumerate(parts, 1)
        ]
        lines += [""]
    else:
        lines += [f"{_origin(made)} {size}", ""]
    if len(content["points"]) > 1:
        lines += [
            f"Each way was trained at every point of the grid by {_tuned_by(content)}; "
            f"{content['validation']} training images that were held out decided between the points"
            f"{', in each part for itself' if parts else ''}, and the test images were read when all was "
            "trained.",
            "",
        ]
    for metric in metrics:
        lines += [*_ways_table(rows, metric.name, metric.label), ""]
    if parts:
        lines += [*_parts_table(rows, parts), ""]
    if len(content["points"]) > 1:
        lines += [*_tuning_table(content), ""]
    if content["differences"]:
        lines += [*_difference_table(content), "", *(f"- {s}" for s in content["conclusions"]), ""]
    if content["deployed"]:
        lines += ["| | largest difference of an output | parameters deployed |", "|---|---|---|"]
        lines += [
            f"| {name} | {d['max_abs']:.1e} | {d['deploy_parameters']:,} |"
            for name, d in content["deployed"].items()
        ]
        lines += [""]
    return "\n".join(lines).rstrip() + "\n"


def _tuned_by(content: Mapping[str, Any]) -> str:
    counts = {row.get("tuned_by", content["tuned_by"]) for row in content["rows"]}
    least, most = min(counts), max(counts)
    if least < most:
        return f"{least} to {most} seeds"
    return "one seed" if most == 1 else f"{most} seeds"


def _origin(made: Mapping[str, Any]) -> str:
    """When, from which commit and on what results were made."""
    versions = ", ".join(f"{name} {version}" for name, version in made["versions"].items())
    commit_text = f", commit {made['commit']}" if made["commit"] else ""
    return f"{made['date']}{commit_text}; {made['processor']}; {versions}."


def _binomial(rows: Sequence[Mapping[str, Any]]) -> str:
    errors = [row["standard_error"] for row in rows if row["standard_error"] is not None]
    return f" (binomial standard error at most {100 * max(errors):.1f} points)" if errors else ""


def _ways_table(rows: Sequence[Mapping[str, Any]], metric: str, label: str) -> list[str]:
    # Without a grid nothing was chosen, and what was joined has its times part by part.
    chosen, timed = any(row["point"] for row in rows), any(row["step_ms"] is not None for row in rows)
    heads = [f"{label}, %, seed by seed", "mean", "standard deviation"]
    heads += [*(["chosen"] if chosen else []), *(["ms a step"] if timed else []), "parameters in training"]
    lines = [f"| | {' | '.join(heads)} |", "|---" * (1 + len(heads)) + "|"]
    for row in rows:
        values = [100 * value for value in row["test"].get(metric, {}).values()]
        if not values:
            continue
        cells = [", ".join(f"{value:.2f}" for value in values), f"{statistics.mean(values):.2f}"]
        cells += [f"{statistics.stdev(values):.2f}" if len(values) > 1 else ""]
        cells += [row["point"]] if chosen else []
        cells += ["" if row["step_ms"] is None else f"{row['step_ms']:.1f}"] if timed else []
        cells += ["" if row["train_parameters"] is None else f"{row['train_parameters']:,}"]
        lines.append(f"| {row['label']} | {' | '.join(cells)} |")
    return lines


def _parts_table(rows: Sequence[Mapping[str, Any]], parts: Sequence[Mapping[str, Any]]) -> list[str]:
    lines = [
        "Seeds, and ms a step on the machine of each part:",
        "",
        "| | " + " | ".join(f"part {i}" for i, _ in enumerate(parts, 1)) + " |",
        "|---" * (1 + len(parts)) + "|",
    ]
    for row in rows:
        cells = []
        for part in parts:
            way = part["ways"].get(row["label"], {"seeds": [], "step_ms": None})
            seeds, step = ", ".join(map(str, way["seeds"])), way["step_ms"]
            cells.append(seeds if step is None else f"{seeds}: {step:.1f} ms")
        lines.append(f"| {row['label']} | {' | '.join(cells)} |")
    return lines


def _tuning_table(content: Mapping[str, Any]) -> list[str]:
    name = metric_label(METRICS[content["task"]][0], "validation")
    lines = [
        f"Mean {name}, %, by which the point was chosen:",
        "",
        "| | " + " | ".join(content["points"]) + " |",
        "|---" * (1 + len(content["points"])) + "|",
    ]
    for row in content["rows"]:
        cells = ("diverged" if v is None else f"{100 * v:.2f}" for v in row["tuning"])
        lines.append(f"| {row['label']} | {' | '.join(cells)} |")
    return lines


def _difference_table(content: Mapping[str, Any]) -> list[str]:
    lines = [
        "Differences in points, seed by seed:",
        "",
        "| | differences | mean | 95 % interval |",
        "|---|---|---|---|",
    ]
    for d in content["differences"]:
        each = ", ".join(_points(value) for value in d["by_seed"].values())
        interval = "" if d["low"] is None else f"{_points(d['low'])} to {_points(d['high'])}"
        lines.append(f"| {d['label']} | {each} | {_points(d['mean'])} | {interval} |")
    searches = "one search in each part" if content.get("parts") else "one search"
    return [*lines, "", page.INTERVALS.format(count=len(content["differences"]), searches=searches)]


# -- the figures


def _draw(
    results: Results, runs: Mapping[str, Sequence[Run]], histories: Mapping[str, History]
) -> Iterator[tuple[str, bytes]]:
    comparison = results.comparison
    metric = METRICS[comparison.task][0]
    labels = {way: comparison.label(way) for way in results.ways}
    styles = figures.styles(labels.values())
    tests = {labels[w]: list(r.test.get(metric.name, {}).values()) for w, r in results.ways.items()}
    if any(tests.values()):
        yield "accuracy", figures.png(figures.spread(tests, styles, metric.label))
    for name, kind, field, label in (
        ("loss", "train", "loss", "training loss"),
        (
            "progress",
            "eval",
            metric.name,
            metric_label(metric, "validation" if comparison.validation else "test"),
        ),
    ):
        curves = {
            labels[way]: seeds
            for way, group in runs.items()
            if (seeds := [c for c in (run.curve(kind, field) for run in group) if len(c[0]) > 1])
        }
        if curves:
            yield name, figures.png(figures.curves(curves, styles, label, percent=kind == "eval"))
    gradients = {labels[w]: list(r.gradients.values()) for w, r in results.ways.items() if r.gradients}
    gradients = {label: sizes for label, sizes in gradients.items() if all(map(math.isfinite, sizes))}
    if gradients and min(map(len, gradients.values())) > 1:
        yield "gradients", figures.png(figures.by_layer(gradients, styles))
    for name, history in histories.items():
        suffix = "" if len(histories) == 1 else f"-{name}"
        for figure, drawn in _draw_scales(history):
            yield figure + suffix, drawn
    if times := {labels[w]: r.step_ms for w, r in results.ways.items() if r.step_ms is not None}:
        yield "step_time", figures.png(figures.step_time(times, styles))


def _draw_scales(history: History) -> Iterator[tuple[str, bytes]]:
    yield "scales", figures.png(figures.scales(history))
    yield "movement", figures.png(figures.movement(history))


def _write_pngs(folder: Path, pngs: Mapping[str, bytes]) -> list[Path]:
    """Writes NAME.png in `folder` for each name, and returns their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, png in pngs.items():
        (folder / f"{name}.png").write_bytes(png)
    return [folder / f"{name}.png" for name in pngs]
