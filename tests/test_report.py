"""The report of a comparison, on made-up runs: what it says, what it escapes, and what it refuses."""

import dataclasses
import json
import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from searches import cosine, records, search, train_records

from repopt_jax.report import quickstart, report
from repopt_jax.report.compare import Results, WayResult
from repopt_jax.report.comparison import Comparison
from repopt_jax.report.statistics import difference, standard_error
from repopt_jax.train.config import Config, ModelConfig
from repopt_jax.verify.equivalence import Equivalence

pytestmark = pytest.mark.once

PNG = b"\x89PNG\r\n\x1a\n"
DEPLOYED = {
    "max_abs": 1e-6,
    "max_rel": 2e-7,
    "agreement": 1.0,
    "compared": 355,
    "deploy_parameters": 900,
    "test_accuracy": 0.99,
    "test": {"accuracy": 0.99},
}
EQUIVALENCE = {
    "equivalent": True,
    "steps": 50,
    "max_difference": 3.2e-15,
    "movement": 0.4,
    "wrong_order_difference": 2e-3,
}
WAYS = {
    "plain": Config(),
    "init": Config(model=ModelConfig(mode="repopt"), scales="depth", rules="init"),
    "depth": Config(model=ModelConfig(mode="repopt"), scales="depth"),
    "repvgg": Config(model=ModelConfig(mode="repvgg")),
}
ACCURACIES = {
    "plain": (0.60, 0.50, 0.55),
    "init": (0.80, 0.71, 0.76),
    "depth": (0.82, 0.70, 0.78),
    "repvgg": (0.5, 0.9, 0.6),
}


def write_run(folder: Path, *, mode="plain", seed=0, accuracy=0.98, metric="accuracy") -> Path:
    """The files that a finished run leaves and that a report reads."""
    folder.mkdir(parents=True)
    lines = [
        {"kind": "eval", "step": 100 * e, "epoch": e, "loss": 0.1, metric: accuracy * e / 20, "count": 355}
        for e in range(1, 21)
    ]
    if mode == "search":
        lines += records(search(lambda x: 1 - np.exp(-10 * x))[0])
    lines += [{**record, "loss": 2 / (1 + i)} for i, record in enumerate(train_records(cosine))]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    summary = {"seed": seed, "epochs": 20, "steps": 2000, "wall_s": 20.0, "train_parameters": 1000}
    summary |= {"versions": {"python": "3", "jax": "1"}, "device": "1 x cpu"}
    (folder / "summary.json").write_text(json.dumps(summary))
    return folder


def made(tmp_path, accuracies=None, *, searched=True, metric="accuracy", ways=WAYS, **changes) -> Results:
    """Results as `compare` returns them, with the files behind them."""
    accuracies = accuracies or ACCURACIES
    ways = {way: ways[way] for way in accuracies}
    settings = {
        "title": "Digits",
        "ways": ways,
        "searches": {"short": Config(model=ModelConfig(mode="search"))} if searched else {},
        "differences": [(way, "plain") for way in list(ways)[1:]],
        "seeds": len(next(iter(accuracies.values()))),
        "grid": {"optim.learning_rate": (0.1, 0.3)},
        "validation": 20,
        "about": ["What this shows."],
    }
    comparison = Comparison(**{**settings, **changes})
    found = {}
    for way, values in accuracies.items():
        folders = {
            seed: write_run(tmp_path / way / str(seed), seed=seed, accuracy=value or 0.1, metric=metric)
            for seed, value in enumerate(values)
        }
        test = {seed: value for seed, value in enumerate(values) if value is not None}
        found[way] = WayResult(
            way=way,
            point={"optim.learning_rate": 0.3} if comparison.grid else {},
            tuning=[0.5, 0.7] if comparison.grid else [],
            test={metric: test} if test else {},
            count=355,
            folders=folders,
            summary=json.loads((folders[0] / "summary.json").read_text()),
            step_ms=10.5,
            gradients={"a": 8.0, "b": 4.0, "c": 2.0},
        )
    differences = [
        difference(a, b, found[a].test[metric], found[b].test[metric]) for a, b in comparison.pairs
    ]
    searches = {name: write_run(tmp_path / "searches" / name, mode="search") for name in comparison.searches}
    return Results(comparison, found, differences, searches)


@pytest.fixture
def written(tmp_path):
    """(report.html, report.json, report.md) of all runs."""
    answers = [
        {"image": PNG + bytes(16), "truth": "3", "answers": {"plain SGD": "8", "RepOpt": "3"}},
        {"image": PNG + bytes(16), "truth": "4", "answers": {"plain SGD": "4", "RepOpt": "4"}},
    ]
    out = tmp_path / "out"
    results = made(tmp_path, labels={"depth": "RepOpt, depth rule"})
    path = report.write_report(
        results,
        out,
        deployed={"depth": DEPLOYED},
        equivalence=EQUIVALENCE,
        answers=answers,
        command="repopt quickstart",
    )
    return path.read_text(), json.loads((out / "report.json").read_text()), (out / "report.md").read_text()


def test_the_page_needs_nothing_from_outside(written, tmp_path):
    html, *_ = written
    assert re.findall(r'(?:src|href)="(?!data:image/png;base64,)', html) == []
    assert "http" not in html
    assert "<script" not in html
    names = ("accuracy", "loss", "progress", "gradients", "scales", "movement", "step_time")
    assert html.count("<img ") == len(names) + 2
    for name in names:
        assert (tmp_path / "out" / "report" / f"{name}.png").read_bytes().startswith(PNG)
    assert html.count("<section>") == html.count("</section>") == 10


def test_the_numbers_are_those_of_the_runs(written):
    html, content, text = written
    assert [row["way"] for row in content["rows"]] == list(WAYS)
    depth = content["rows"][2]
    assert depth["test"] == {"accuracy": {"0": 0.82, "1": 0.70, "2": 0.78}}
    assert depth["mean"] == pytest.approx(2.3 / 3)
    assert (depth["point"], depth["deploy_parameters"]) == ("learning rate 0.3", 900)
    assert content["rows"][0]["deploy_parameters"] is None
    assert len(content["runs"]) == 4 * 3 + 1
    assert content["run_count"] == 4 * 3 * 2
    assert content["searches"][0]["settled"] is True
    for part in ("76.67", "82.00, 70.00, 78.00", "10.5", "1,000", "learning rate 0.3", "RepOpt, depth rule"):
        assert part in html, part
        assert part in text, part
    for part in ("900", "2.0e-07", "3.2e-15", "it is 0.002", "What this shows.", "repopt quickstart"):
        assert part in html, part
    assert content["searches"][0]["sentence"] in html
    assert '<span class="wrong">8</span>' in html
    assert "RepOpt, depth rule 4" in html  # the largest gradient over the last layer's


def test_differences_are_paired_and_say_what_they_show(written):
    _, content, _ = written
    found = {d["way"]: d for d in content["differences"]}
    # By hand: differences .22, .20, .23; t of 2 degrees of freedom 4.3027.
    assert found["depth"]["mean"] == pytest.approx(0.65 / 3)
    half = 4.302653 * np.std([0.22, 0.20, 0.23], ddof=1) / np.sqrt(3)
    assert found["depth"]["low"] == pytest.approx(0.65 / 3 - half, rel=1e-6)
    assert found["depth"]["high"] == pytest.approx(0.65 / 3 + half, rel=1e-6)
    assert found["depth"]["shown"]
    assert not found["repvgg"]["shown"]
    ahead, unclear, start = content["conclusions"]
    assert ahead.startswith("Ahead of plain by points that are unlikely to be chance: init +20.7 (")
    assert "; RepOpt, depth rule +21.7 (" in ahead
    assert unclear.startswith("Not shown which is better, as the interval contains zero: repvgg minus plain")
    assert start == (
        "Most of the lead is where the training starts: of the +21.7 points that RepOpt, depth rule is ahead "
        "of plain, +20.7 are there with the initialization alone."
    )


def test_what_is_said_of_the_start_and_of_who_is_behind(tmp_path):
    def said(name, **accuracies):
        return " ".join(report.conclusions(made(tmp_path / name, accuracies)))

    less = said("less", plain=(0.6, 0.5), init=(0.65, 0.55), depth=(0.8, 0.701))
    assert "The initialization alone gives +5.0 of the +20.1 points that depth is ahead of plain" in less
    more = said("more", plain=(0.6, 0.5), init=(0.85, 0.75), depth=(0.8, 0.701))
    assert "All of the lead is where the training starts: depth is ahead of plain by +20.1" in more
    # Nothing is said of parts of a difference that is not shown.
    wide = said("wide", plain=(0.6, 0.5), init=(0.65, 0.55), depth=(0.8, 0.1))
    assert "starts" not in wide
    assert "nitialization alone" not in wide
    assert "Behind plain by points that are unlikely to be chance: repvgg -9.9" in said(
        "behind", plain=(0.6, 0.5), repvgg=(0.5, 0.401)
    )
    assert said("one", plain=(0.6,), repvgg=(0.5,)) == (
        "One seed says nothing of the spread: repvgg minus plain -10.0."
    )


def test_one_seed_shows_no_spread():
    one = difference("a", "b", {0: 0.9}, {0: 0.8})
    assert (one.low, one.high, one.shown) == (None, None, False)
    with pytest.raises(ValueError, match="a and b have no seed in common"):
        difference("a", "b", {0: 0.9}, {1: 0.8})
    # Only seeds that both have count.
    assert difference("a", "b", {0: 0.9, 1: 0.5}, {1: 0.8}).by_seed == {1: pytest.approx(-0.3)}


@given(
    images=st.integers(1, 5000),
    hits=st.lists(st.integers(0, 4000), min_size=2, max_size=10),
    more=st.integers(0, 1000),
)
def test_equal_differences_show_nothing(images, hits, more):
    """However they are rounded; and one image more in one of them is a spread."""

    def found(*extra):
        first = {seed: (n + more + by) / images for seed, (n, by) in enumerate(zip(hits, extra))}
        return difference("a", "b", first, {seed: n / images for seed, n in enumerate(hits)})

    equal = found(*[0] * len(hits))
    assert (equal.equal, equal.shown) == (True, False)
    assert not found(1, *[0] * (len(hits) - 1)).equal


def test_of_equal_differences_no_interval_is_given(tmp_path):
    # In floating point the two differ in the last digit, and the interval would leave out zero.
    results = made(tmp_path, {"plain": (0.725, 0.925), "repvgg": (0.75, 0.95)})
    assert list(report.conclusions(results)) == [
        "The same in each seed, so that there is no spread to judge by: repvgg minus plain +2.5."
    ]
    html = report.write_report(results, tmp_path / "out").read_text()
    assert "<td>no spread</td><td>-</td>" in html
    text = (tmp_path / "out" / "report.md").read_text()
    assert "| +2.5, +2.5 | +2.5 | no spread |" in text


@pytest.mark.parametrize("task", ["classify", "detect"])
def test_numbers_of_the_test_images_are_those_of_a_way_that_was_tested(tmp_path, task):
    """A way of which every run diverged has none."""
    tests = {"plain": (0.0, 0.0), "repvgg": (0.5, 0.6)}
    results = made(tmp_path, tests) if task == "classify" else detector(tmp_path, tests)

    def without(*ways):
        lost = {way: dataclasses.replace(results.ways[way], count=0, summary={}) for way in ways}
        path = tmp_path / "-".join(ways)
        changed = dataclasses.replace(results, ways={**results.ways, **lost})
        html = report.write_report(changed, path).read_text()
        return html, (path / "report.md").read_text(), json.loads((path / "report.json").read_text())

    html, text, content = without("plain")
    assert "20 epochs, 2000 steps, 355 test images" in text
    assert "355 images" in html
    assert content["rows"][0]["standard_error"] is None
    assert ("standard error of up to" in html) == (task == "classify")
    html, text, _ = without("plain", "repvgg")
    assert "Every run diverged." in html
    assert "Every run diverged." in text
    assert "None" not in html + text


def test_the_standard_error_is_the_binomial_one_and_never_zero():
    assert standard_error(0.5, 10_000) == pytest.approx(0.005, rel=1e-3)
    # Agresti and Coull: 362 of 364, by hand.
    assert standard_error(1.0, 360) == pytest.approx(np.sqrt(362 / 364 * 2 / 364 / 364))


def test_a_failed_equivalence_is_not_called_one(tmp_path):
    found = {**EQUIVALENCE, "equivalent": False, "max_difference": 0.3}
    html = report.write_report(made(tmp_path), tmp_path / "out", equivalence=found).read_text()
    assert "<strong>not</strong> the same function" in html


def test_text_from_runs_is_escaped(tmp_path):
    results = made(
        tmp_path / "<img onerror=alert(1)>",
        title="<i>&",
        about=["<b>"],
        labels={"plain": "<script>"},
    )
    html = report.write_report(results, tmp_path / "out", command="<u>").read_text()
    assert not re.search(r"<script>|<b>|<i>|<u>|<img onerror", html)
    assert "&lt;script&gt;" in html
    assert "&lt;i&gt;&amp;" in html


def test_a_report_without_search_check_or_deployment_is_whole(tmp_path):
    plain = {"plain": (0.98,)}
    results = made(tmp_path, plain, searched=False, grid={}, validation=0)
    html = report.write_report(results, tmp_path / "out").read_text()
    for absent in ("settled", "deployed", "chosen", "difference, seed by seed"):
        assert absent not in html
    assert html.count("<section>") == html.count("</section>") == 4


def detector(tmp_path, ap50s, **changes) -> Results:
    ways = {way: Config(task="detect") for way in ap50s}
    options = {"searched": False, "metric": "ap50", "ways": ways, "grid": {}, "validation": 0}
    return made(tmp_path, ap50s, **{**options, **changes})


def test_a_detector_is_told_by_its_precision_and_chance_is_not_computed(tmp_path):
    galleries = {"found": ("a <caption>", PNG + bytes(16))}
    results = detector(tmp_path, {"plain": (0.8,)})
    html = report.write_report(results, tmp_path / "out", galleries=galleries).read_text()
    content = json.loads((tmp_path / "out" / "report.json").read_text())
    assert content["rows"][0]["test"] == {"ap50": {"0": 0.8}}
    assert content["rows"][0]["standard_error"] is None
    for text in ("AP50 (%)", "80.00", "COCO's evaluation", "a &lt;caption&gt;"):
        assert text in html
    assert "keypoint AP50 (%)" not in html
    assert (tmp_path / "out" / "report" / "found.png").read_bytes().startswith(PNG)
    assert "test accuracy" not in html
    assert "One seed says nothing about the spread" in html
    assert "Seeds differ" not in html


def test_the_spread_of_the_seeds_is_the_one_measured(tmp_path):
    results = detector(tmp_path, {"plain": (0.8, 0.83), "repvgg": (0.4, 0.41)})
    html = report.write_report(results, tmp_path / "out").read_text()
    assert "Seeds differ by up to 3.0 points of AP50 within one way of training" in html
    assert "One seed" not in html


def test_a_number_that_is_not_defined_ends_no_report(tmp_path):
    deployed = {"plain": {**DEPLOYED, "test": {"ap50": None}}}
    results = detector(tmp_path, {"plain": (None,), "repvgg": (0.8,)}, differences=())
    html = report.write_report(results, tmp_path / "out", deployed=deployed).read_text()
    assert "80.00" in html
    assert "same class (% of locations)" in html
    rows = json.loads((tmp_path / "out" / "report.json").read_text())["rows"]
    assert [row["mean"] for row in rows] == [None, 0.8]
    # Nothing is measured at all.
    results = detector(tmp_path / "b", {"plain": (None,)}, differences=())
    html = report.write_report(results, tmp_path / "none", deployed=deployed).read_text()
    assert "<td>-</td>" in html
    assert not (tmp_path / "none" / "report" / "accuracy.png").exists()


BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
# A window cannot be as narrow as a telephone; a frame can.
FRAME = """<!doctype html><body style="margin:0">
<iframe style="border:0;width:{width}px;height:800px"></iframe>
<script>
const frame = document.querySelector("iframe");
frame.onload = () => {{
  const page = frame.contentDocument;
  const images = [...page.querySelectorAll(".figures img")];
  const legible = images.map(image => image.width / image.getAttribute("width"));
  document.title = [page.documentElement.scrollWidth, Math.min(...legible)].join(" ");
}};
frame.srcdoc = {page};
</script></body>"""
# The figures' text is 10 points, 13 pixels at full width.
LEGIBLE = 0.65


@pytest.mark.parametrize("width", [1280, 390])
def test_the_page_fits_the_screen(written, tmp_path, width):
    browser = next(filter(None, map(shutil.which, BROWSERS)), None)
    if browser is None:
        pytest.skip("no Chromium on this machine")
    framed = tmp_path / "framed.html"
    source = json.dumps(written[0]).replace("</", "<\\/")
    framed.write_text(FRAME.format(width=width, page=source))
    command = [
        *(browser, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}"),
        *("--window-size=1400,900", "--dump-dom", framed.as_uri()),
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)
    title = re.search(r"<title>(\d+) ([\d.]+)</title>", done.stdout)
    assert title is not None
    assert int(title[1]) <= width  # tables scroll in their own boxes
    assert float(title[2]) >= LEGIBLE


def test_an_equivalence_that_is_none_is_made_anew(tmp_path, monkeypatch):
    """Of the same config it is reused; what is no object of fields ended in an AttributeError."""
    chains = []

    def verify(config, chain):
        chains.append(chain)
        return Equivalence({}, [], 0.0, 1.0, steps=1, tolerance=1e-10)

    monkeypatch.setattr(quickstart, "_verify", verify)
    path = tmp_path / "equivalence.json"
    path.write_text("[]")
    made = quickstart.check_equivalence(Config(), path)
    assert (len(chains), made["reused"]) == (2, False)
    assert quickstart.check_equivalence(Config(), path) == {**json.loads(path.read_text()), "reused": True}
    assert len(chains) == 2
