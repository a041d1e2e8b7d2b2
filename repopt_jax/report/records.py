"""Reads a run's folder: its summary, its curves, and how its scales moved."""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from repopt_jax.core.paths import natural_order
from repopt_jax.train.rundir import read_json, read_records


@dataclass(frozen=True)
class Run:
    """One finished or unfinished run.

    Attributes:
      directory: the run's folder.
      summary: what summary.json holds; empty while the run is unfinished.
      records: the lines of metrics.jsonl, in the order in which they were written.
    """

    directory: Path
    summary: Mapping[str, Any]
    records: tuple[Mapping[str, Any], ...]

    def of_kind(self, kind: str) -> list[Mapping[str, Any]]:
        """Returns the records of one kind: train, eval or scales."""
        return [record for record in self.records if record["kind"] == kind]

    def curve(self, kind: str, field: str) -> tuple[np.ndarray, np.ndarray]:
        """Returns epochs and values of one field, each (records,) float, from the records that have it."""
        records = [r for r in self.of_kind(kind) if r.get(field) is not None]
        epochs, values = ([float(r[name]) for r in records] for name in ("epoch", field))
        return np.array(epochs), np.array(values)


@dataclass(frozen=True)
class History:
    """Scale statistics over a search.

    Attributes:
      epochs: (records,) float, when each record was taken.
      rates: (records,) float, mean learning rate since the record before, over the highest one of the run;
        the first entry is 1 and has no meaning.
      vectors: (layer path, branch) -> {statistic: (records,) float}, named as in metrics.jsonl.
      law: what the last record says of the law of a search (`train.searchlaw`); None where it says nothing.
    """

    epochs: np.ndarray
    rates: np.ndarray
    vectors: Mapping[tuple[str, str], Mapping[str, np.ndarray]]
    law: Mapping[str, Any] | None = None


def read_run(run_dir: str | Path) -> Run:
    """Reads a run's folder.

    Raises:
      FileNotFoundError: no metrics.jsonl in `run_dir`.
      ValueError: a line is no record, or the summary is no JSON object.
    """
    directory = Path(run_dir)
    path = directory / "metrics.jsonl"
    if not path.is_file():
        raise FileNotFoundError(f"`run_dir` {directory} has no metrics.jsonl: it holds no run")
    summary = read_json(directory / "summary.json", default={})
    if not isinstance(summary, dict):
        raise ValueError(f"{directory / 'summary.json'} is damaged: it holds no object of fields")
    return Run(directory, summary, tuple(read_records(path)))


def read_history(run_dir: str | Path) -> History:
    """Reads how the scales of a search moved.

    Raises:
      FileNotFoundError: no metrics.jsonl in `run_dir`.
      ValueError: no scale records there, or records of different vectors.
    """
    run = read_run(run_dir)
    if not run.of_kind("scales"):
        raise ValueError(f"`run_dir` {run_dir} holds no scale records: only a search makes them")
    return history_of(run.of_kind("scales"), run.of_kind("train"))


def history_of(scales: Sequence[Mapping[str, Any]], train: Sequence[Mapping[str, Any]] = ()) -> History:
    """Makes a history from `scales` records in order of step; `train` records have the learning rate.

    Without those the rate counts as constant.

    Raises:
      ValueError: the records do not hold the same vectors.
    """
    names = [{(layer, b) for layer in r["layers"] for b in r["layers"][layer]} for r in scales]
    uneven = sorted(set.union(*names) - set.intersection(*names))
    if uneven:
        raise ValueError(f"not all scale records hold {', '.join(map(' '.join, uneven))}")
    vectors = {
        (layer, branch): {
            field: np.array([float(r["layers"][layer][branch][field]) for r in scales]) for field in fields
        }
        for layer, branches in sorted(scales[0]["layers"].items(), key=lambda item: natural_order(item[0]))
        for branch, fields in sorted(branches.items(), key=_largest_first)
    }
    epochs = np.array([float(r["epoch"]) for r in scales])
    return History(epochs, _rates([r["step"] for r in scales], train), vectors, scales[-1].get("law"))


def _largest_first(item: tuple[str, Any]) -> tuple[bool, list[int]]:
    """3x3, 1x1, then the identity and whatever else has no size in its name."""
    sizes = item[0].split("x")
    numbered = all(size.isdigit() for size in sizes)
    return (not numbered, [-int(size) for size in sizes] if numbered else [])


def _rates(steps: Sequence[int], train: Sequence[Mapping]) -> np.ndarray:
    known = np.array([(r["step"], r["lr"]) for r in train], float).reshape(-1, 2)
    at, rates = known.T
    if not rates.size or rates.max() <= 0:
        return np.ones(len(steps))
    # Many points in an interval: a schedule may bend between two records.
    points = [np.linspace(a, b, 33) for a, b in itertools.pairwise(steps)]
    means = [np.interp(point, at, rates).mean() / rates.max() for point in points]
    return np.array([1.0, *means])
