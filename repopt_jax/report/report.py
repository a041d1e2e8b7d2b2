"""The report of a comparison, written to a folder.

report.html     the page, with its figures embedded
report.json     the numbers
report.md       the tables as text
report/*.png    the figures
"""

import dataclasses
import datetime
import json
import math
import shutil
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from repopt_jax.report import figures, monitor, page
from repopt_jax.report.compare import Results
from repopt_jax.report.comparison import point_text
from repopt_jax.report.machine import processor
from repopt_jax.report.records import History, Run, history_of, read_run
from repopt_jax.report.results import difference_row, markdown, sentences, spread, starts_of
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
