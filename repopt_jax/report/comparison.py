"""What is compared: ways of training, the searches that some of them take scales from, seeds and a grid."""

import dataclasses
import itertools
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from repopt_jax import userfile
from repopt_jax.hints import did_you_mean
from repopt_jax.models.registry import registering
from repopt_jax.train.config import (
    SEARCH,
    SMOKE_HELD_OUT,
    Config,
    config_file,
    differing_fields,
    from_json,
    load_config,
    needs_no_folder,
    settings_of,
    smoke,
    to_json,
)
from repopt_jax.train.own import note_file
from repopt_jax.train.tasks import METRICS

OWN = ("seed", "name", "task", "scales", "data.validation")  # fields that no grid can be over


@dataclasses.dataclass(frozen=True)
class Comparison:
    """What is compared.

    Attributes:
      title: heading of its page.
      ways: name -> config of a run. Its `scales` may be "search:NAME", those that a search of the comparison
        finds. Seed and name are set by the comparison.
      searches: name -> config of mode "search".
      labels: way -> what tables call it; by default its name.
      differences: pairs (way, other way), whose difference is reported seed by seed; None for every way
        against the first.
      seeds: number of runs of each way, with the seeds 0, 1, ... added to that of its config.
      grid: field of a config -> the values that are tried, the same for every way:
        {"optim.learning_rate": (0.03, 0.1, 0.3)}. Of several fields all combinations are tried. Empty for
        the configs as they are.
      tuning_seeds: how many of the seeds try the whole grid; None for all.
      validation: training images that are held out and decide between the points of the grid; 0 without a
        grid: then there is nothing to decide, and all images train.
      about: paragraphs for the head of the page: what is compared, and what the table shows.
      among: of a part of a comparison (see `of`), the names of all of its ways; `differences` may be of
        these. None for a comparison that is whole.

    Raises:
      ValueError: values that do not fit together; it lists all problems.
    """

    title: str
    ways: Mapping[str, Config]
    searches: Mapping[str, Config] = dataclasses.field(default_factory=dict)
    labels: Mapping[str, str] = dataclasses.field(default_factory=dict)
    differences: Sequence[tuple[str, str]] | None = None
    seeds: int = 3
    grid: Mapping[str, Sequence[Any]] = dataclasses.field(default_factory=dict)
    tuning_seeds: int | None = None
    validation: int = 0
    about: Sequence[str] = ()
    among: Sequence[str] | None = None

    def __post_init__(self) -> None:
        problems = list(self._problems())
        if problems:
            raise ValueError("this comparison cannot run: " + "; ".join(problems))

    def _problems(self) -> Iterator[str]:
        if not self.ways:
            yield "`ways` is empty"
        if self.seeds < 1:
            yield f"`seeds`={self.seeds} must be at least 1"
        if self.tuning_seeds is not None and not self.tuning_seeds >= 1:
            yield f"`tuning_seeds`={self.tuning_seeds} must be at least 1, or None"
        if len(self.points) > 1 and self.validation < 1:
            yield (
                f"`grid` has {len(self.points)} points and `validation` is {self.validation}: hold out "
                "training images to choose by; the test images must not decide"
            )
        if own := [field for field in self.grid if field in OWN]:
            yield f"`grid` cannot be over {', '.join(own)}: make ways of them"
        if empty := [field for field, values in self.grid.items() if len(values) == 0]:
            yield f"`grid` has no values of {', '.join(empty)}"
        if unknown := sorted(set(self.labels) - set(self.ways)):
            yield f"`labels` of ways that are not compared: {', '.join(unknown)}"
        named = set(itertools.chain(*self.all_pairs))
        if unknown := sorted(named - set(self.all_ways)):
            yield f"`differences` of ways that are not compared: {', '.join(unknown)}"
        for way, config in self.ways.items():
            if config.scales.startswith(SEARCH) and search_of(config) not in self.searches:
                yield f"way {way!r} takes `scales`={config.scales!r}, and there is no such search"
        if len(seeds := {config.seed for config in self.ways.values()}) > 1:
            yield f"`ways` have different seeds, {', '.join(map(str, sorted(seeds)))}: they cannot be paired"
        labels = [self.label(way) for way in self.ways]
        if twice := sorted({label for label in labels if labels.count(label) > 1}):
            yield f"`labels` name several ways {', '.join(map(repr, twice))}"
        if both := sorted(set(self.ways) & set(self.searches)):
            yield f"`searches` have names of `ways`: {', '.join(both)}"
        tasks = {config.task for config in (*self.ways.values(), *self.searches.values())}
        if len(tasks) > 1:
            yield f"`ways` are of different tasks, {' and '.join(sorted(tasks))}"
        for name in (*self.ways, *self.searches):
            if not name or "/" in name or name in (".", ".."):
                yield f"name {name!r} cannot be that of a folder"

    @property
    def points(self) -> tuple[dict[str, Any], ...]:
        """The points of the grid, each as field -> value; one without fields if there is no grid."""
        return tuple(dict(zip(self.grid, values)) for values in itertools.product(*self.grid.values()))

    @property
    def all_ways(self) -> tuple[str, ...]:
        """The names of the ways, those of the other parts too."""
        return tuple(self.ways if self.among is None else self.among)

    @property
    def all_pairs(self) -> Sequence[tuple[str, str]]:
        """The pairs of `differences`, those with ways of other parts too."""
        ways = self.all_ways
        return against(ways, *ways[:1]) if self.differences is None else self.differences

    @property
    def pairs(self) -> Sequence[tuple[str, str]]:
        """The pairs of `differences` among the ways."""
        return [pair for pair in self.all_pairs if self.ways.keys() >= set(pair)]

    @property
    def tuned_by(self) -> int:
        """How many seeds try the whole grid."""
        return self.seeds if self.tuning_seeds is None else min(self.tuning_seeds, self.seeds)

    @property
    def task(self) -> str:
        """What all of its ways learn, "classify" or "detect"."""
        return next(iter(self.ways.values())).task

    @property
    def metric(self) -> str:
        """The name of the number that ways are compared by."""
        return METRICS[self.task][0].name

    def label(self, way: str) -> str:
        """What tables and figures call a way."""
        return self.labels.get(way, way)

    def of(self, ways: Iterable[str]) -> "Comparison":
        """The part of it that is some of the ways, for `join` with the others.

        Raises:
          ValueError: a way that is not compared, one twice, or none.
        """
        chosen = list(ways)
        if unknown := [f"{way!r}{did_you_mean(way, self.ways)}" for way in chosen if way not in self.ways]:
            raise ValueError(f"`ways` has {', '.join(unknown)}; compared are {', '.join(self.ways)}")
        if len(set(chosen)) < len(chosen):
            raise ValueError(f"`ways` names one twice: {', '.join(chosen)}")
        named = {way: config for way, config in self.ways.items() if way in chosen}
        taken = {search_of(config) for config in named.values() if config.scales.startswith(SEARCH)}
        return dataclasses.replace(
            self,
            ways=named,
            searches={name: config for name, config in self.searches.items() if name in taken},
            labels={way: label for way, label in self.labels.items() if way in named},
            differences=self.all_pairs,
            among=self.all_ways,
        )

    def settings(self, way: str) -> dict[str, Any]:
        """The fields of a way's config that are not at their defaults, and as `search.FIELD` those of the
        search that its scales are from: without seed and name, what the grid sets, and folders."""
        config = self.ways[way]
        if not config.scales.startswith(SEARCH):
            return self._changed(config)
        search = self._changed(self.searches[search_of(config)])
        return {**self._changed(config), **{f"search.{name}": value for name, value in search.items()}}

    def _changed(self, config: Config) -> dict[str, Any]:
        left_out = {"seed", "name", *self.grid}
        if not (config.scales.startswith(SEARCH) or needs_no_folder(config.scales)):
            left_out.add("scales")
        return {
            name: value
            for name, value, default, rules, _ in settings_of(config)
            if value != default
            and name not in left_out
            and not rules.get("changeable")
            and (name == "scales" or not rules.get("path"))
        }


def search_of(config: Config) -> str:
    """The name of the search that a config takes its scales from."""
    return config.scales.removeprefix(SEARCH)


def point_name(point: Mapping[str, Any]) -> str:
    """The name of the folder of a point: `learning_rate=0.1`."""
    parts = (f"{field.rpartition('.')[2]}={value}" for field, value in point.items())
    return ",".join(parts).replace("/", "_") or "default"


def point_text(point: Mapping[str, Any]) -> str:
    """A point in words: `learning rate 0.1`."""
    return ", ".join(f"{f.rpartition('.')[2].replace('_', ' ')} {value}" for f, value in point.items())


def load_comparison(file_and_arg: str) -> Comparison | Config:
    """The comparison that `path/to/file.py:arg` defines, or where the file defines none, its config.

    Raises:
      FileNotFoundError: no such file.
      ValueError: the file is no Python file with a `get_comparison` or a `get_config`.
      TypeError: the file returns something else.
    """
    name, _, arg = file_and_arg.partition(":")
    path = config_file(name)
    if not userfile.defines(path, "get_comparison"):
        return load_config(file_and_arg)
    with registering(path.absolute()):
        comparison = userfile.call(path, "get_comparison", arg, noun="comparison")
    if not isinstance(comparison, Comparison):
        raise TypeError(f"`get_comparison` of {path} returned {type(comparison).__name__}, not `Comparison`")
    for config in (*comparison.ways.values(), *comparison.searches.values()):
        note_file(config, path)
    return comparison


# -- what config files share


def against(ways: Iterable[str], *others: str) -> list[tuple[str, str]]:
    """The pairs of each way with each of `others`; of these among themselves, only the later with the
    earlier.
    """
    ways = list(ways)
    return [
        (way, other)
        for k, other in enumerate(others)
        for way in ways
        if way != other and way not in others[:k]
    ]


def smoke_of(comparison: Comparison) -> Comparison:
    """The same comparison of runs of seconds that need no data: `smoke` of each config."""
    ways, searches = (
        {name: smoke(config) for name, config in given.items()}
        for given in (comparison.ways, comparison.searches)
    )
    held_out = min(comparison.validation, SMOKE_HELD_OUT[comparison.task])
    return dataclasses.replace(comparison, ways=ways, searches=searches, validation=held_out)


# -- whether two are the same


def spec(comparison: Comparison) -> dict[str, Any]:
    """What makes two comparisons the same, as JSON gives it back."""
    configs = {
        kind: {name: json.loads(to_json(config)) for name, config in given.items()}
        for kind, given in (("ways", comparison.ways), ("searches", comparison.searches))
    }
    choice = {"grid": comparison.grid, "tuning_seeds": comparison.tuning_seeds}
    of_all = {"among": comparison.all_ways, **choice, "validation": comparison.validation}
    return json.loads(json.dumps({**configs, **of_all}))


def differing(stored: Mapping[str, Any], spec: Mapping[str, Any]) -> Iterator[str]:
    """What a stored `spec` differs in from another, each as a phrase. Parts of one comparison do not differ
    by the ways that only one of them has."""
    before, now = set(stored.get("among", stored.get("ways", {}))), spec["among"]
    if before != set(now):
        yield f"`ways` ({', '.join(sorted(before))} there and {', '.join(sorted(now))} here)"
    for kind in ("ways", "searches"):
        for name in stored.get(kind, {}).keys() & spec[kind].keys():
            pair = (from_json(json.dumps(of[kind][name])) for of in (stored, spec))
            yield from (f"{name}: {field}" for field in differing_fields(*pair))
    for field in ("grid", "tuning_seeds", "validation"):
        if stored.get(field) != spec[field]:
            yield f"`{field}` ({stored.get(field)} there and {spec[field]} here)"


def joined_spec(stored: Mapping[str, Any], spec: Mapping[str, Any]) -> dict[str, Any]:
    """The spec of a folder that parts with these specs have been made in."""
    return {**spec, **{kind: {**stored.get(kind, {}), **spec[kind]} for kind in ("ways", "searches")}}
