"""Results of one comparison that two machines made: joined, they are those of one."""

import dataclasses
import json

import pytest
from test_cli import refused
from test_report import WAYS, made

from repopt_jax.cli.main import main
from repopt_jax.report import report
from repopt_jax.report.compare import Results
from repopt_jax.report.comparison import load_comparison
from repopt_jax.report.join import join, read_results, write_results
from repopt_jax.report.statistics import difference

# Way -> seed -> accuracy.
ALL = {
    "plain": {0: 0.60, 1: 0.50, 2: 0.55, 3: 0.58, 4: 0.61},
    "init": {0: 0.80, 1: 0.71, 2: 0.76, 3: 0.77, 4: 0.79},
    "depth": {0: 0.82, 1: 0.70, 2: 0.78, 3: 0.81, 4: 0.80},
}


def content(folder, names, seeds, *, machine="EPYC", **changes):
    """What the results file of a part has, `seeds` of the ways `names`."""
    results = made(folder, {way: tuple(ALL[way][seed] for seed in seeds) for way in names}, searched=False)
    results = dataclasses.replace(
        results, comparison=dataclasses.replace(results.comparison, **{"seeds": len(seeds), **changes})
    )
    found = {
        way: dataclasses.replace(
            result,
            test={"accuracy": dict(zip(seeds, result.test["accuracy"].values()))},
            folders=dict(zip(seeds, result.folders.values())),
        )
        for way, result in results.ways.items()
    }
    pairs = results.comparison.pairs
    differences = [difference(a, b, found[a].test["accuracy"], found[b].test["accuracy"]) for a, b in pairs]
    whole = report._content(
        Results(results.comparison, found, differences, {}), {}, None, {}, f"repopt compare on {machine}"
    )
    whole["made"]["processor"] = machine
    whole.pop("runs")
    return json.loads(json.dumps(whole))


@pytest.fixture
def whole(tmp_path):
    return content(tmp_path / "whole", ALL, range(5))


@pytest.fixture
def parts(tmp_path):
    """Two machines by seeds, and a third that made a way of its own."""
    return {
        "a": content(tmp_path / "a", ("plain", "depth"), (0, 1, 2)),
        "b": content(tmp_path / "b", ("plain", "depth"), (3, 4), machine="Xeon"),
        "c": content(tmp_path / "c", ("init",), range(5))
        | {"differences": [{"way": "init", "than": "plain"}]},
    }


def numbers(content):
    """What must not depend on how seeds and ways were shared out."""
    rows = {
        row["way"]: {name: row[name] for name in ("test", "mean", "deviation", "standard_error", "tuning")}
        for row in content["rows"]
    }
    return rows, {(d["way"], d["than"]): d for d in content["differences"]}


def test_joined_parts_are_the_whole(whole, parts):
    rows, differences = numbers(json.loads(json.dumps(join(parts))))
    expected_rows, expected_differences = numbers(whole)
    assert differences == expected_differences
    for way, row in expected_rows.items():
        assert rows[way]["test"] == row["test"]
        for name in ("mean", "deviation", "standard_error", "tuning"):
            assert rows[way][name] == pytest.approx(row[name], rel=1e-12), (way, name)


def test_conclusions_are_of_all_seeds_and_ways(whole, parts):
    found = join(parts)["conclusions"]
    (start,) = found[1:]
    assert [start] == whole["conclusions"][1:]
    assert start.startswith(
        "Most of the lead is where the training starts: of the +21.4 points that depth is"
    )
    for lead in ("init +19.8 (+18.2 to +21.4)", "depth +21.4 (+19.1 to +23.7)"):
        assert lead in found[0]
        assert lead in whole["conclusions"][0]
        assert lead not in " ".join(parts["a"]["conclusions"])


def test_what_was_joined_is_joined_with_more(parts):
    two = join({name: parts[name] for name in "ab"})
    again = json.loads(json.dumps(two))
    three, at_once = join({"two": again, "c": parts["c"]}), join(parts)
    assert numbers(three) == numbers(at_once)
    assert three["parts"] == at_once["parts"]
    assert [part["processor"] for part in three["parts"]] == ["EPYC", "Xeon", "EPYC"]


def test_a_difference_is_over_the_seeds_that_both_ways_have(tmp_path):
    first = content(tmp_path / "a", ("plain", "depth"), (0, 1, 2))
    second = content(tmp_path / "b", ("plain",), (3, 4))
    (difference,) = join({"a": first, "b": second})["differences"]
    assert list(difference["by_seed"]) == [0, 1, 2]


def test_tables_name_every_part_with_its_times(parts, tmp_path):
    parts["b"]["rows"][0]["step_ms"] = 21.25
    write_results(join(parts), tmp_path / "new" / "joined")
    text = (tmp_path / "new" / "joined.md").read_text()
    assert "1. `repopt compare on EPYC`, " in text
    assert "2. `repopt compare on Xeon`, " in text
    assert "| plain | 0, 1, 2: 10.5 ms | 3, 4: 21.2 ms |  |" in text
    assert "| plain | 60.00, 50.00, 55.00, 58.00, 61.00 | 56.80 |" in text
    assert "one search in each part" in text
    assert (tmp_path / "new" / "joined.png").read_bytes().startswith(b"\x89PNG")
    assert read_results(tmp_path / "new" / "joined.json") == json.loads(json.dumps(join(parts)))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"title": "x"}, "`title` is 'Digits' in a and 'x' in b"),
        ({"validation": 30}, "`validation` is 20 in a and 30 in b"),
        ({"labels": {"plain": "SGD"}}, "`label` of way 'plain' is 'plain' in a and 'SGD' in b"),
        (
            {"ways": {**WAYS, "plain": dataclasses.replace(WAYS["plain"], epochs=7)}},
            r"`settings` of way 'plain' is {} in a and {'epochs': 7} in b",
        ),
    ],
)
def test_other_comparisons_are_refused(parts, tmp_path, changes, said):
    other = content(tmp_path / "other", ("plain", "depth"), (3, 4), **changes)
    with pytest.raises(ValueError) as error:
        join({"a": parts["a"], "b": other})
    assert str(error.value) == f"these results cannot be joined: {said}"


def test_all_problems_are_said_at_once(parts):
    other = json.loads(json.dumps(parts["a"]))
    other["rows"][0]["point"] = "learning rate 0.1"
    with pytest.raises(ValueError) as error:
        join({"a": parts["a"], "b": other})
    assert str(error.value) == "these results cannot be joined: " + "; ".join(
        (
            "`point` of way 'plain' is 'learning rate 0.3' in a and 'learning rate 0.1' in b",
            "seeds 0, 1, 2 of way 'plain' are in a and in b",
            "seeds 0, 1, 2 of way 'depth' are in a and in b",
        )
    )
    with pytest.raises(ValueError, match="1 is not enough"):
        join({"a": parts["a"]})


def test_some_ways_of_a_comparison():
    whole = load_comparison("cifar10_small:structures")
    some = whole.of(["dbb", "repopt", "depth"])
    assert list(some.ways) == list(some.labels) == ["repopt", "depth", "dbb"]
    assert (list(some.searches), list(some.pairs)) == (["search"], [])  # they are compared with another way
    assert (some.seeds, some.title) == (whole.seeds, whole.title)
    some = whole.of(["plain", "dbb"])
    assert (list(some.searches), list(some.pairs)) == ([], [("dbb", "plain")])


def test_ways_are_chosen_by_an_option(capfd):
    command = ["compare", "--config=cifar10_small", "--out=x", "--print-config"]
    assert main([*command, "--ways=plain,repvgg"]) == 0
    out = capfd.readouterr().out
    assert "repvgg" in out
    assert "repopt" not in out.partition("def get_comparison")[2]
    refused(
        capfd, [*command, "--ways=plain,repvg"], "--ways has repvg, and", "did you mean 'repvgg'?", code=2
    )


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
    refused(capfd, ["join", "a.json", "a.json", "--results=again"], "a.json is given twice", code=2)
    for files, said in (
        (["a.json"], "1 is not enough"),
        (["a.json", "none.json"], "none.json: No such file"),
        (["a.json", "other.json"], "other.json is not the results of a comparison, it has no about,"),
        (["a.json", "broken.json"], "broken.json is not JSON"),
        (["a.json", "binary.json"], "binary.json is not text"),
    ):
        refused(capfd, ["join", *files, "--results=again"], said)
    assert not (tmp_path / "again.json").exists()
