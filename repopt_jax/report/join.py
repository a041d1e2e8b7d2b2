"""Results of one comparison from several machines, joined: each made some of the seeds, or of the ways."""

import itertools
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from repopt_jax.report.results import difference_row, sentences, spread, starts_of
from repopt_jax.report.statistics import difference

# What results that are joined have in common, and what is the same of a way wherever it was trained. Where a
# machine does not know it, since all of its runs diverged or its file is older than the field, nothing is
# compared.
SAME = ("title", "task", "metric", "points", "validation")
SAME_OF_A_WAY = ("label", "point", "epochs", "steps", "train_parameters", "test_count")

Results = Mapping[str, Mapping[str, Any]]  # name for messages -> what a results file holds
Rows = Mapping[str, Mapping[str, Any]]  # the same name -> its row of one way


def join(results: Results) -> dict[str, Any]:
    """The results of all seeds and ways, from those of some.

    Means, deviations, differences and what they show are computed anew from the values of all seeds. A
    difference is over the seeds that both of its ways have.

    Args:
      results: name for messages -> what a results file holds, as `read_results` gives it; what was joined
        already can be joined with more.

    Raises:
      ValueError: fewer than two, other comparisons or settings, or a seed of a way twice; it lists all
        problems.
    """
    problems = list(_problems(results))
    if problems:
        raise ValueError("these results cannot be joined: " + "; ".join(problems))
    contents = list(results.values())
    first, metric = contents[0], contents[0]["metric"]
    found = _rows(results)
    order = dict.fromkeys(way for content in contents for way in content.get("ways", ()))
    rows = {way: _joined([*found[way].values()], metric) for way in (*order, *found) if way in found}
    tests = {way: _by_seed(row["test"].get(metric, {})) for way, row in rows.items()}
    labels = {way: row["label"] for way, row in rows.items()}
    pairs = dict.fromkeys(pair for content in contents for pair in _pairs(content))
    differences = [
        difference(way, than, tests[way], tests[than])
        for way, than in pairs
        if way in tests and than in tests and tests[way].keys() & tests[than].keys()
    ]
    starts = starts_of({way: row.get("settings", {}) for way, row in rows.items()})
    known = [row for row in rows.values() if row["steps"] is not None]
    of_runs = {name: known[0][name] if known else None for name in ("epochs", "steps")}
    return {
        **{name: first[name] for name in (*SAME, "about")},
        "made": {**first["made"], **of_runs, "command": ""},
        "parts": [part for content in contents for part in _parts(content)],
        "tuned_by": max(row["tuned_by"] for row in rows.values()),
        "ways": list(order or rows),
        "pairs": [list(pair) for pair in pairs],
        "conclusions": list(sentences(differences, labels, starts)),
        "rows": list(rows.values()),
        "differences": [difference_row(d, labels.__getitem__) for d in differences],
        # What only the machine that has the runs can tell.
        "deployed": {},
        "equivalence": None,
        "searches": [],
    }


# -- what forbids it


def _problems(results: Results) -> Iterator[str]:
    if len(results) < 2:
        yield f"{len(results)} is not enough, give two or more"
        return
    if others := list(_others(results)):
        yield from others  # and nothing of their ways, which are others too
        return
    yield from _of_all_ways(_differing, results)
    yield from _of_all_ways(_twice, results)


def _others(results: Results) -> Iterator[str]:
    """What makes results those of other comparisons than the first."""
    (name, first), *others = results.items()
    for other, content in others:
        for field in SAME:
            if content[field] != first[field]:
                yield f"`{field}` is {first[field]!r} in {name} and {content[field]!r} in {other}"


def _of_all_ways(problems: Callable[[Rows], Iterator[tuple[str, str]]], results: Results) -> Iterator[str]:
    """The problems of each way, as (what, what is wrong with it); that of several ways is said once."""
    ways: dict[tuple[str, str], list[str]] = {}
    for way, found in _rows(results).items():
        for problem in problems(found):
            ways.setdefault(problem, []).append(way)
    yield from (f"{what} of {', '.join(named)} {wrong}" for (what, wrong), named in ways.items())


def _differing(found: Rows) -> Iterator[tuple[str, str]]:
    """What a row has otherwise than the one before that has it."""
    for field in SAME_OF_A_WAY:
        known = {file: row[field] for file, row in found.items() if row[field]}
        for (name, one), (other, two) in itertools.pairwise(known.items()):
            if one != two:
                hint = ""
                if field == "point":
                    hint = " (each part chooses for itself: share a comparison with a grid by ways)"
                yield f"`{field}`", f"is {one!r} in {name} and {two!r} in {other}{hint}"
    settings = {file: row["settings"] for file, row in found.items() if "settings" in row}
    for (name, one), (other, two) in itertools.pairwise(settings.items()):
        for field in sorted(one.keys() | two.keys()):
            first, second = (repr(of[field]) if field in of else "at its default" for of in (one, two))
            if first != second:
                yield f"`{field}`", f"is {first} in {name} and {second} in {other}"


def _twice(found: Rows) -> Iterator[tuple[str, str]]:
    for (name, row), (other, again) in itertools.combinations(found.items(), 2):
        if twice := sorted({*row["seeds"]} & {*again["seeds"]}):
            yield f"seeds {', '.join(map(str, twice))}", f"are in {name} and in {other}"


# -- what it is made of


def _rows(results: Results) -> dict[str, dict[str, dict[str, Any]]]:
    """Way -> file -> its row there, with what older files have elsewhere."""
    rows: dict[str, dict[str, dict[str, Any]]] = {}
    for file, content in results.items():
        of_all = {name: content["made"].get(name) for name in ("epochs", "steps")}
        of_all["tuned_by"] = content["tuned_by"]
        for row in content["rows"]:
            seeds = sorted({int(seed) for values in row["test"].values() for seed in values})
            rows.setdefault(row["way"], {})[file] = {**of_all, "seeds": seeds, **row}
    return rows


def _joined(rows: Sequence[Mapping[str, Any]], metric: str) -> dict[str, Any]:
    """The row of a way, from its rows in several files."""
    test: dict[str, dict[int, float]] = {}
    for row in rows:
        for name, values in row["test"].items():
            test.setdefault(name, {}).update(_by_seed(values))
    test = {name: dict(sorted(values.items())) for name, values in test.items()}
    known = {
        name: next((row[name] for row in rows if row.get(name)), rows[0][name]) for name in SAME_OF_A_WAY
    }
    weights = [row["tuned_by"] for row in rows]
    tuning = [
        None if None in means else statistics.fmean(means, weights)
        for means in zip(*(row["tuning"] for row in rows))
    ]
    settings = next(({"settings": row["settings"]} for row in rows if "settings" in row), {})
    return {
        **rows[0],
        **known,
        **settings,
        "seeds": sorted(seed for row in rows for seed in row["seeds"]),
        "test": test,
        **spread(test, metric, known["test_count"]),
        "tuning": tuning,
        "tuned_by": sum(weights),
        # Of one machine: the times are in `parts`.
        "step_ms": None,
        "deploy_parameters": None,
        "deploy_error": None,
    }


def _by_seed(values: Mapping[Any, float]) -> dict[int, float]:
    return {int(seed): value for seed, value in values.items()}


def _pairs(content: Mapping[str, Any]) -> list[tuple[str, str]]:
    """What is compared with what, also with ways that other parts have; older files tell their own alone."""
    if "pairs" in content:
        return [(way, than) for way, than in content["pairs"]]
    return [(d["way"], d["than"]) for d in content["differences"]]


def _parts(content: Mapping[str, Any]) -> Sequence[Mapping[str, Any]]:
    """Where each part of results was made: command, machine, seeds and time of a step of each way there."""
    if "parts" in content:
        return content["parts"]
    ways = {
        row["label"]: {"seeds": row["seeds"], "step_ms": row["step_ms"]}
        for found in _rows({"": content}).values()
        for row in found.values()
    }
    return [{**content["made"], "ways": ways}]
