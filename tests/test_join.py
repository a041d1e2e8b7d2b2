"""Results of one comparison that two machines made: joined, they are those of one."""

import dataclasses
import itertools
import json
import math

import pytest
from test_cli import refused
from test_report import WAYS, made

from repopt_jax.cli.main import main
from repopt_jax.report import report
from repopt_jax.report.compare import Results
from repopt_jax.report.comparison import Comparison, load_comparison
from repopt_jax.report.join import join
from repopt_jax.report.results import markdown, read_results, write_results
from repopt_jax.report.statistics import difference, standard_error
from repopt_jax.train.config import Config, ModelConfig

# Way -> seed -> accuracy.
ALL = {
    "plain": {0: 0.60, 1: 0.50, 2: 0.55, 3: 0.58, 4: 0.61},
    "init": {0: 0.80, 1: 0.71, 2: 0.76, 3: 0.77, 4: 0.79},
    "depth": {0: 0.82, 1: 0.70, 2: 0.78, 3: 0.81, 4: 0.80},
}


WHOLE = {way: WAYS[way] for way in ALL}
PAIRS = [("init", "plain"), ("depth", "plain"), ("depth", "init")]


def content(folder, names, seeds, *, machine="EPYC", tuning=(0.5, 0.7), **changes):
    """What the results file of a part has, `seeds` of the ways `names`, each tuned by all of its seeds."""
    results = made(folder, {way: tuple(ALL[way][seed] for seed in seeds) for way in names}, searched=False)
    settings = {"ways": WHOLE, "differences": PAIRS, "seeds": len(seeds), **changes}
    comparison = dataclasses.replace(results.comparison, **settings).of(names)
    found = {
        way: dataclasses.replace(
            result,
            test={"accuracy": {seed: ALL[way][seed] for seed in seeds}},
            tuning=tuning,
            folders=dict(zip(seeds, result.folders.values())),
        )
        for way, result in results.ways.items()
    }
    tests = {way: result.test["accuracy"] for way, result in found.items()}
    differences = [difference(a, b, tests[a], tests[b]) for a, b in comparison.pairs]
    command = f"repopt compare on {machine}"
    whole = report._content(Results(comparison, found, differences, {}), {}, None, {}, command)
    whole["made"]["processor"] = machine
    whole.pop("runs")
    return json.loads(json.dumps(whole))


def shared(folder):
    """Parts of the comparison: two machines have some seeds of two ways each, a third one a way of its own.
    The means at the points of the grid are of 3, 2 and 5 seeds."""
    return {
        "a": content(folder / "a", ("plain", "depth"), (0, 1, 2), tuning=(0.5, 0.7)),
        "b": content(folder / "b", ("plain", "depth"), (3, 4), machine="Xeon", tuning=(0.25, 0.9)),
        "c": content(folder / "c", ("init",), range(5), tuning=(0.4, 0.78)),
    }


@pytest.fixture
def whole(tmp_path):
    tuning = ((3 * 0.5 + 2 * 0.25) / 5, (3 * 0.7 + 2 * 0.9) / 5)
    return content(tmp_path / "whole", ALL, range(5), tuning=tuning)


@pytest.fixture
def parts(tmp_path):
    return shared(tmp_path)


def numbers(content):
    """What must not depend on how seeds and ways were shared out, or on the order of the files."""
    content = json.loads(json.dumps(content))
    names = (
        "test",
        "mean",
        "deviation",
        "standard_error",
        "tuning",
        "tuned_by",
        "seeds",
        "settings",
        "steps",
    )
    rows = {row["way"]: {name: row[name] for name in names} for row in content["rows"]}
    return rows, {(d["way"], d["than"]): d for d in content["differences"]}, content["conclusions"]


@pytest.mark.parametrize("order", ["".join(files) for files in itertools.permutations("abc")])
def test_joined_parts_are_the_whole_in_any_order(whole, parts, order):
    joined = join({name: parts[name] for name in order})
    rows, differences, conclusions = numbers(joined)
    expected_rows, expected_differences, expected_conclusions = numbers(whole)
    assert differences == expected_differences
    assert conclusions == expected_conclusions
    assert list(rows) == list(expected_rows)
    for way, row in expected_rows.items():
        for name, value in row.items():
            near = pytest.approx(value, rel=1e-12) if name in ("mean", "deviation", "tuning") else value
            assert rows[way][name] == near, (way, name)
    assert (joined["tuned_by"], joined["ways"], joined["pairs"]) == (
        whole["tuned_by"],
        whole["ways"],
        whole["pairs"],
    )


def test_conclusions_are_of_all_seeds_and_ways(parts):
    ahead, *_, start = join(parts)["conclusions"]
    leads = ("init +19.8 (+18.2 to +21.4)", "depth +21.4 (+19.1 to +23.7)")
    for lead in leads:
        assert lead in ahead
        assert lead not in " ".join(parts["a"]["conclusions"])
    assert start.startswith(
        "Most of the lead is where the training starts: of the +21.4 points that depth is"
    )


@pytest.mark.parametrize("first", ["ab", "bc", "ca"])
def test_what_was_joined_is_joined_with_more(whole, parts, first):
    some = json.loads(json.dumps(join({name: parts[name] for name in first})))
    (rest,) = set(parts) - set(first)
    joined = join({"some": some, rest: parts[rest]})
    assert numbers(joined)[1:] == numbers(whole)[1:]
    for row, expected in zip(joined["rows"], whole["rows"], strict=True):
        assert row["tuning"] == pytest.approx(expected["tuning"], rel=1e-12)
        assert (row["mean"], row["tuned_by"]) == (pytest.approx(expected["mean"], rel=1e-12), 5)
    assert sorted(part["processor"] for part in joined["parts"]) == ["EPYC", "EPYC", "Xeon"]


def test_a_difference_is_over_the_seeds_that_both_ways_have(tmp_path):
    first = content(tmp_path / "a", ("plain", "depth"), (0, 1, 2))
    second = content(tmp_path / "b", ("plain",), (3, 4))
    joined = join({"a": first, "b": second})
    (found,) = joined["differences"]
    assert list(found["by_seed"]) == [0, 1, 2]
    assert "by 3 to 5 seeds" in markdown(joined)


def test_a_part_whose_runs_diverged_is_joined(parts):
    row = parts["b"]["rows"][0]
    row |= {"test_count": 0, "train_parameters": None, "epochs": None, "steps": None, "step_ms": None}
    row["test"] = {"accuracy": {"3": 0.0, "4": 0.0}}
    for order in ("ab", "ba"):
        plain = join({name: parts[name] for name in order})["rows"][0]
        assert list(plain["test"]["accuracy"].values()) == [0.6, 0.5, 0.55, 0.0, 0.0]
        assert (plain["test_count"], plain["train_parameters"], plain["steps"]) == (355, 1000, 2000)
        assert plain["standard_error"] == pytest.approx(standard_error(1.65 / 5, 355))


def test_results_of_before_are_joined(parts):
    """Rows had no settings, seeds and steps of their own, and files no pairs."""
    old = parts["a"]
    for row in old["rows"]:
        for name in ("settings", "seeds", "epochs", "steps", "tuned_by"):
            del row[name]
    for name in ("ways", "pairs"):
        del old[name]
    joined = join({"a": old, **{name: parts[name] for name in "bc"}})
    assert {(d["way"], d["than"]) for d in joined["differences"]} == set(PAIRS)
    assert "initialization alone" in joined["conclusions"][-1]
    assert joined["parts"][0]["ways"]["plain"] == {"seeds": [0, 1, 2], "step_ms": 10.5}


def test_tables_name_every_part_with_its_times(parts, tmp_path):
    parts["b"]["rows"][0]["step_ms"] = 21.25
    write_results(join(parts), tmp_path / "new" / "joined")
    text = (tmp_path / "new" / "joined.md").read_text()
    assert "\n2. 20" in text
    assert "; Xeon; python 3, jax 1. `repopt compare on Xeon`\n" in text
    assert text.count("ms a step") == 1
    assert "| plain | 0, 1, 2: 10.5 ms | 3, 4: 21.2 ms |  |" in text
    assert "| plain | 60.00, 50.00, 55.00, 58.00, 61.00 | 56.80 |" in text
    assert "one search in each part" in text
    assert (tmp_path / "new" / "joined.png").read_bytes().startswith(b"\x89PNG")
    assert read_results(tmp_path / "new" / "joined.json") == json.loads(json.dumps(join(parts)))


SLOWER = {way: dataclasses.replace(config, epochs=7) for way, config in WHOLE.items()}


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"title": "x"}, "`title` is 'Digits' in a and 'x' in b"),
        ({"validation": 30}, "`validation` is 20 in a and 30 in b"),
        ({"labels": {"plain": "SGD"}}, "`label` of plain is 'plain' in a and 'SGD' in b"),
        ({"ways": SLOWER}, "`epochs` of plain, depth is at its default in a and 7 in b"),
    ],
)
def test_other_comparisons_are_refused(parts, tmp_path, changes, said):
    other = content(tmp_path / "other", ("plain", "depth"), (3, 4), **changes)
    with pytest.raises(ValueError) as error:
        join({"a": parts["a"], "b": other})
    assert str(error.value) == f"these results cannot be joined: {said}"


def test_scales_of_another_search_are_refused():
    ways = {"searched": Config(model=ModelConfig(mode="repopt"), scales="search:short")}
    searches = {"short": Config(model=ModelConfig(mode="search"), epochs=3)}
    settings = Comparison("x", ways, searches).settings("searched")
    assert settings == {
        "model.mode": "repopt",
        "scales": "search:short",
        "search.model.mode": "search",
        "search.epochs": 3,
    }


def test_all_problems_are_said_at_once(parts):
    other = json.loads(json.dumps(parts["a"]))
    other["rows"][0]["point"] = "learning rate 0.1"
    with pytest.raises(ValueError) as error:
        join({"a": parts["a"], "b": other})
    assert str(error.value) == "these results cannot be joined: " + "; ".join(
        (
            "`point` of plain is 'learning rate 0.3' in a and 'learning rate 0.1' in b (each part chooses "
            "for itself: share a comparison with a grid by ways)",
            "seeds 0, 1, 2 of plain, depth are in a and in b",
        )
    )
    with pytest.raises(ValueError, match="1 is not enough"):
        join({"a": parts["a"]})


def spoiled(part, *path, value):
    """JSON of a part with one value replaced."""
    part = json.loads(json.dumps(part))
    owner = part
    for name in path[:-1]:
        owner = owner[name]
    owner[path[-1]] = value
    return json.dumps(part)


@pytest.mark.parametrize(
    ("path", "value", "said"),
    [
        (("task",), "sing", "`task` is 'sing', not one of"),
        (("rows",), [], "`rows` is empty"),
        (("rows",), "x", "`rows` of it is 'x'"),
        (("rows", 0), "x", "row 0 is no object"),
        (("rows", 1), {}, "row 1 has no label, point, step_ms"),
        (("rows", 0, "test"), [], "`test` of row 0 is []"),
        (("rows", 0, "test"), {"accuracy": {"x": 0.5}}, "`test` of row 0 has no seeds of accuracy"),
        (("rows", 0, "test"), {"accuracy": {"0": "x"}}, "`test` of row 0 has something that is no number"),
        (
            ("rows", 0, "test"),
            {"accuracy": {"0": math.nan}},
            "`test` of row 0 has something that is no number",
        ),
        (("rows", 0, "tuning"), ["x"], "`tuning` of row 0 has something that is no number"),
        (("rows", 0, "seeds"), ["x"], "`seeds` of row 0 has something that is no whole number"),
        (("made",), {}, "`made` has no command, commit, date, processor, versions"),
        (("differences",), ["x"], "difference 0 is no object"),
        (("pairs",), [["a"]], "pair 0 is not two names"),
        (("parts",), [{"ways": {"plain": 1}}], "'plain' of part 0 is no object"),
    ],
)
def test_files_that_are_no_results(tmp_path, parts, path, value, said):
    file = tmp_path / "spoiled.json"
    file.write_text(spoiled(parts["a"], *path, value=value))
    with pytest.raises(ValueError) as error:
        read_results(file)
    assert str(file) in str(error.value)
    assert said in str(error.value)


def test_some_ways_of_a_comparison():
    whole = load_comparison("cifar10_small:structures")
    some = whole.of(["dbb", "repopt", "depth"])
    assert list(some.ways) == list(some.labels) == ["repopt", "depth", "dbb"]
    assert (list(some.searches), list(some.pairs)) == (["search"], [])  # they are compared with another way
    assert (some.seeds, some.title) == (whole.seeds, whole.title)
    assert (some.all_ways, list(some.all_pairs)) == (tuple(whole.ways), list(whole.pairs))
    some = whole.of(way for way in ("plain", "dbb"))
    assert (list(some.searches), list(some.pairs)) == ([], [("dbb", "plain")])
    assert some.of(["dbb"]).all_ways == tuple(whole.ways)
    with pytest.raises(
        ValueError, match=r"`ways` has 'orca' \(did you.*\), 'acnet'.*; compared are plain, rep"
    ):
        whole.of(["plain", "orca", "acnet"])


def test_ways_are_chosen_by_an_option(capfd):
    command = ["compare", "--config=cifar10_small", "--out=x", "--print-config"]
    assert main([*command, "--ways=plain,repvgg"]) == 0
    out = capfd.readouterr().out
    assert "repvgg" in out
    assert "'repopt': Config(" not in out
    assert "differences=[('repopt', 'plain'), ('repvgg', 'plain')]" in out
    assert "among=('plain', 'repopt', 'repvgg')" in out
    for ways, said in (
        (
            "plain,repvg",
            "`ways` has 'repvg' (did you mean 'repvgg'?); compared are plain, repopt, repvgg",
        ),
        ("plain,plain", "`ways` names one twice: plain, plain"),
        ("plain,", "`ways` has ''; compared are"),
    ):
        refused(capfd, [*command, f"--ways={ways}"], said)


def test_command(parts, tmp_path, capfd, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name, part in parts.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(part))
    assert main(["join", "a.json", "b.json", "c.json", "--results=joined"]) == 0
    out = capfd.readouterr().out
    assert "depth: 82.00, 70.00, 78.00, 81.00, 80.00" in out
    assert "Ahead of plain" in out
    assert read_results("joined.json")["rows"] == json.loads(json.dumps(join(parts)))["rows"]
    (tmp_path / "other.json").write_text("{}")
    (tmp_path / "broken.json").write_text("{")
    (tmp_path / "binary.json").write_bytes(b"\xff\xfe\x00")
    same = ["join", "a.json", f"{tmp_path}/a.json", "--results=again"]
    refused(capfd, same, f"a.json, {tmp_path}/a.json are not all different files", code=2)
    over = ["join", "a.json", "b.json", "--results=a"]
    refused(capfd, over, "--results=a would replace a.json, which is joined", code=2)
    for files, said in (
        (["a.json"], "1 is not enough"),
        (["a.json", "none.json"], "none.json: No such file"),
        (["a.json", "other.json"], "other.json is not the results of a comparison: it has no about,"),
        (["a.json", "broken.json"], "broken.json is not JSON"),
        (["a.json", "binary.json"], "binary.json is not JSON"),
    ):
        refused(capfd, ["join", *files, "--results=again"], said)
    assert not (tmp_path / "again.json").exists()
