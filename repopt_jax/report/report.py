"""A report of several runs, written to a folder.

report.html     the page, with its figures embedded
report.json     the numbers
report/*.png    the figures
"""

import dataclasses
import json
import math
import statistics
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from repopt_jax.report import figures, monitor, page
from repopt_jax.report.records import History, Run, history_of
from repopt_jax.train.tasks import METRICS

NAMED_SCALES = {"": "plain SGD", "ones": "RepOpt, all ones", "depth": "RepOpt, depth rule"}
MODES = {
    **{"plain": "plain SGD", "search": "search network", "repvgg": "RepVGG", "repghost": "RepGhost"},
    **{"mobileone": "MobileOne", "acnet": "ACNet", "dbb": "DBB", "qarepvgg": "QARepVGG"},
    "repmlp": "RepMLP",
}


@dataclasses.dataclass(frozen=True)
class Row:
    """One way of training, over its seeds.

    Attributes:
      label: what it is called in tables and legends.
      measured: metric -> its value in [0, 1] for each seed. The metric that runs are compared by comes first;
        metrics that are not defined (None) for a seed are left out.
      standard_error: of an accuracy, from the number of test images alone, in [0, 1]; None for metrics that
        are not a share of images.
      test_count: number of test images.
      step_ms: median over the seeds of the time of a training step, in ms; None if it was not timed.
      train_parameters: number of trained parameters.
      deployed: the fields of `deploy.Deployed` for the first seed that was deployed, or None.
    """

    label: str
    measured: Mapping[str, tuple[float, ...]]
    standard_error: float | None
    test_count: int
    step_ms: float | None
    train_parameters: int
    deployed: Mapping[str, Any] | None

    @property
    def score(self) -> float | None:
        """The mean over the seeds of the metric that runs are compared by; None if nothing was measured."""
        values = next(iter(self.measured.values()), None)
        return None if values is None else statistics.fmean(values)


def write_report(
    runs: Sequence[Run],
    out_dir: str | Path,
    *,
    title: str,
    deployed: Mapping[Path, Mapping[str, Any]] | None = None,
    equivalence: Mapping[str, Any] | None = None,
    commands: Sequence[str] = (),
    galleries: Mapping[str, tuple[str, bytes]] | None = None,
) -> Path:
    """Writes the report of finished runs and returns the path of its page.

    Args:
      runs: finished runs, in the order of the table; those of one kind and source of scales (none, ones,
        depth rule, searched) count as repetitions and share a row.
      out_dir: the folder for report.html, report.json and report/; existing ones are replaced.
      title: heading of the page.
      deployed: run folder -> the fields of `deploy.Deployed`.
      equivalence: the result of the check of CSLA against `repopt_mask`.
      commands: shell commands that repeat the runs, one for each.
      galleries: drawings of what networks find on test images: name of the file -> (caption, PNG).

    Raises:
      ValueError: no runs, runs of different tasks, or runs without a summary or an evaluation; all of them
        are listed.
      OSError: `out_dir` cannot be written.
    """
    _check(runs)
    out_dir = Path(out_dir)
    rows = table(runs, deployed or {})
    history = next((history_of(r.of_kind("scales"), r.of_kind("train")) for r in _searches(runs)), None)
    verdict = monitor.verdict(history) if history else None
    drawn = dict(_draw(runs, rows, history))
    content = {
        "title": title,
        "task": _task(runs),
        "rows": [{**dataclasses.asdict(row), "score": row.score} for row in rows],
        "noise": noise(rows),
        "search": dataclasses.asdict(verdict) if verdict else None,
        "equivalence": equivalence,
        "runs": [{"directory": str(run.directory), **run.summary} for run in runs],
        "commands": list(commands),
    }
    galleries = galleries or {}
    _write_pngs(out_dir / "report", {**drawn, **{name: png for name, (_, png) in galleries.items()}})
    (out_dir / "report.json").write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    path = out_dir / "report.html"
    path.write_text(page.render(content, drawn, dict(galleries.values())), encoding="utf-8")
    return path


def draw_search(history: History, folder: Path) -> list[Path]:
    """Draws how the scales of a search moved as two figures in `folder`, and returns their paths."""
    return _write_pngs(folder, dict(_draw_scales(history)))


def label_of(mode: str, scales: str) -> str:
    """Returns the name of a way of training: that of its mode or, for RepOpt, of the source of its scales."""
    if mode != "repopt":
        return MODES.get(mode, mode)
    return NAMED_SCALES.get(scales, "RepOpt, searched scales")


def table(runs: Sequence[Run], deployed: Mapping[Path, Mapping[str, Any]]) -> list[Row]:
    """Returns a row for each way of training, in the order of their first runs."""
    return [_row(label, group, deployed) for label, group in _groups(runs).items()]


def noise(rows: Sequence[Row]) -> dict[str, float]:
    """Returns two standard errors of a difference of accuracies, and the largest difference, in [0, 1].

    Empty if the runs are not compared by an accuracy. All networks are tested on the same images, so that the
    true error of a difference is smaller; more seeds do not reduce it, as they share the images too. The
    search network is left out: it is not an alternative to the others.
    """
    compared = [row for row in rows if row.label != MODES["search"]] or list(rows)
    means = [row.score for row in compared if row.score is not None]
    errors = [row.standard_error for row in compared if row.standard_error is not None]
    if not errors:
        return {}
    error = max(errors)
    return {"two_errors": 2 * math.sqrt(2) * error, "largest_difference": max(means) - min(means)}


def standard_error(accuracy: float, count: int) -> float:
    """Returns the binomial standard error of an accuracy, with 2 hits and 2 misses added (Agresti, Coull).

    Without these it would be 0 for a network that makes no mistake on a small test set.
    """
    adjusted = (accuracy * count + 2) / (count + 4)
    return math.sqrt(adjusted * (1 - adjusted) / (count + 4))


def _row(label: str, runs: Sequence[Run], deployed: Mapping[Path, Mapping[str, Any]]) -> Row:
    summaries = [run.summary for run in runs]
    times = [s["step_ms_median"] for s in summaries if s["step_ms_median"] is not None]
    count = min(s["test_count"] for s in summaries)
    task = _task(runs)
    measured = {}
    for metric in METRICS[task]:
        values = tuple(s["test"].get(metric.name) for s in summaries)
        if None not in values:
            measured[metric.name] = values
    accuracies = measured.get("accuracy")
    return Row(
        label=label,
        measured=measured,
        standard_error=standard_error(statistics.fmean(accuracies), count) if accuracies else None,
        test_count=count,
        step_ms=statistics.median(times) if times else None,
        train_parameters=summaries[0]["train_parameters"],
        deployed=next((deployed[run.directory] for run in runs if run.directory in deployed), None),
    )


def _draw(runs: Sequence[Run], rows: Sequence[Row], history: History | None) -> Iterator[tuple[str, bytes]]:
    metric = METRICS[_task(runs)][0]
    curves = {}
    for label, group in _groups(runs).items():
        if seeds := [c for c in (run.curve("eval", metric.name) for run in group) if c[0].size]:
            curves[label] = seeds
    if curves:
        yield "accuracy", figures.png(figures.accuracy(curves, metric.label))
    if history:
        yield from _draw_scales(history)
    if times := {row.label: row.step_ms for row in rows if row.step_ms is not None}:
        yield "step_time", figures.png(figures.step_time(times))


def _draw_scales(history: History) -> Iterator[tuple[str, bytes]]:
    yield "scales", figures.png(figures.scales(history))
    yield "movement", figures.png(figures.movement(history))


def _write_pngs(folder: Path, pngs: Mapping[str, bytes]) -> list[Path]:
    """Writes NAME.png in `folder` for each name, and returns their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, png in pngs.items():
        (folder / f"{name}.png").write_bytes(png)
    return [folder / f"{name}.png" for name in pngs]


def _groups(runs: Sequence[Run]) -> dict[str, list[Run]]:
    """Groups runs by the label of their way of training."""
    groups: dict[str, list[Run]] = {}
    for run in runs:
        groups.setdefault(label_of(run.summary["mode"], run.summary["scales"]), []).append(run)
    return groups


def _searches(runs: Sequence[Run]) -> Iterator[Run]:
    return (run for run in runs if run.summary["mode"] == "search" and run.of_kind("scales"))


def _check(runs: Sequence[Run]) -> None:
    if not runs:
        raise ValueError("`runs` is empty: a report needs at least one finished run")
    unfinished = [str(run.directory) for run in runs if not run.summary or not run.of_kind("eval")]
    if unfinished:
        raise ValueError(
            f"not finished, or never evaluated: {', '.join(unfinished)}; let these runs end first"
        )
    if len(tasks := sorted({run.summary["task"] for run in runs})) > 1:
        raise ValueError(f"the runs are of different tasks, {' and '.join(tasks)}: make a report of each")


def _task(runs: Sequence[Run]) -> str:
    return runs[0].summary["task"]
