"""The report, on made-up runs: what it says, what it escapes, and what it refuses."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
from searches import cosine, records, search, train_records

from repopt_jax.report import report
from repopt_jax.report.records import Run, read_run

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


def write_run(folder: Path, *, kind="target", scales="", seed=0, accuracy=0.98, name="run", count=355):
    """The files that a finished run leaves and that a report reads."""
    folder.mkdir(parents=True)
    lines = [
        {
            "kind": "eval",
            "step": 100 * e,
            "epoch": e,
            "loss": 0.1,
            "accuracy": accuracy * e / 20,
            "count": count,
        }
        for e in range(1, 21)
    ]
    if kind == "search":
        lines += records(search(lambda x: 1 - np.exp(-10 * x))[0])
    lines += train_records(cosine)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    summary = {
        "name": name,
        "kind": kind,
        "scales": scales,
        "seed": seed,
        "epochs": 20,
        "steps": 2000,
        "test_accuracy": accuracy,
        "test_loss": 0.1,
        "test_count": count,
        "train_parameters": 1000,
        "step_ms_median": 10.0 + seed,
        "images_per_s": 6400.0,
        "wall_s": 20.0,
        "finished": True,
        "versions": {"python": "3", "jax": "1"},
        "device": "1 x cpu",
        "task": "classify",
        "test": {"accuracy": accuracy},
    }
    (folder / "summary.json").write_text(json.dumps(summary))
    return read_run(folder)


@pytest.fixture
def runs(tmp_path) -> list[Run]:
    made = []
    for seed in (0, 1):
        for way, kind, scales in (
            ("plain", "target", ""),
            ("repopt", "target", "somewhere/scales"),
            ("depth", "target", "depth"),
            ("repvgg", "repvgg", ""),
        ):
            accuracy = 0.97 + 0.01 * seed
            folder = tmp_path / f"{way}-{seed}"
            made.append(write_run(folder, kind=kind, scales=scales, seed=seed, accuracy=accuracy))
    return [*made, write_run(tmp_path / "search", kind="search")]


@pytest.fixture
def written(runs, tmp_path):
    """(report.html, report.json) of all runs."""
    path = report.write_report(
        runs,
        tmp_path / "out",
        title="Digits",
        deployed={runs[0].directory: DEPLOYED},
        equivalence=EQUIVALENCE,
        commands=["repopt train --config=a --out=b"],
    )
    return path.read_text(), json.loads((tmp_path / "out" / "report.json").read_text())


def test_the_page_needs_nothing_from_outside(written, tmp_path):
    html, _ = written
    assert re.findall(r'(?:src|href)="(?!data:image/png;base64,)', html) == []
    assert "http" not in html
    assert "<script" not in html
    assert html.count("<img ") == 4
    for name in ("accuracy", "scales", "movement", "step_time"):
        assert (tmp_path / "out" / "report" / f"{name}.png").read_bytes().startswith(PNG)


def test_seeds_share_a_row_and_the_numbers_are_theirs(written):
    _, content = written
    labels = [row["label"] for row in content["rows"]]
    expected = ["plain SGD", "RepOpt, searched scales", "RepOpt, depth rule", "RepVGG", "search network"]
    assert labels == expected
    plain = content["rows"][0]
    assert plain["measured"] == {"accuracy": [0.97, 0.98]}
    assert plain["score"] == pytest.approx(0.975)
    assert plain["step_ms"] == 10.5
    assert plain["deployed"]["deploy_parameters"] == 900
    assert content["rows"][1]["deployed"] is None
    assert len(content["runs"]) == 9
    assert content["search"]["settled"] is True


def test_the_page_shows_what_was_measured(written):
    html, content = written
    for text in (
        "97.50",
        "97.00, 98.00",
        "10.5",
        "1,000",
        "900",
        "2.0e-07",
        "3.2e-15",
        "it is 0.002",
        "Test accuracy in the course of training.",
        "the same function",
    ):
        assert text in html, text
    assert content["search"]["sentence"] in html
    assert "repopt train --config=a --out=b" in html


def test_a_failed_equivalence_is_not_called_one(runs, tmp_path):
    found = {**EQUIVALENCE, "equivalent": False, "max_difference": 0.3}
    html = report.write_report(runs, tmp_path / "out", title="x", equivalence=found).read_text()
    assert "<strong>not</strong> the same function" in html


def test_small_differences_are_not_called_a_ranking(tmp_path):
    near = [write_run(tmp_path / "a", accuracy=0.98), write_run(tmp_path / "b", kind="repvgg", accuracy=0.97)]
    assert "do not rank" in report.write_report(near, tmp_path / "near", title="x").read_text()
    far = [near[0], write_run(tmp_path / "c", kind="repvgg", accuracy=0.80)]
    assert (
        "more than the choice of test images"
        in report.write_report(far, tmp_path / "far", title="x").read_text()
    )


def test_the_standard_error_is_the_binomial_one_and_never_zero():
    assert report.standard_error(0.5, 10_000) == pytest.approx(0.005, rel=1e-3)
    # Agresti and Coull: 362 of 364, by hand.
    assert report.standard_error(1.0, 360) == pytest.approx(np.sqrt(362 / 364 * 2 / 364 / 364))


def test_text_from_runs_is_escaped(tmp_path):
    run = write_run(tmp_path / "<img onerror=alert(1)>", kind="<script>", name="<b>")
    path = report.write_report([run], tmp_path / "out", title="<i>&", commands=["<u>"])
    html = path.read_text()
    assert not re.search(r"<script>|<b>|<i>|<u>|<img onerror", html)
    assert "&lt;script&gt;" in html
    assert "&lt;i&gt;&amp;" in html


def test_a_report_without_search_check_or_deployment_is_whole(tmp_path):
    html = report.write_report([write_run(tmp_path / "a")], tmp_path / "out", title="x").read_text()
    assert "None of these runs was deployed" in html
    assert "settled" not in html
    assert html.count("<section>") == html.count("</section>") == 4


def write_detector(folder: Path, ap50: float | None = 0.8, **options) -> Run:
    """A finished run of a detector without keypoints."""
    summary = write_run(folder, **options).summary
    test = {"ap50": ap50, "ap": ap50 and 0.5, "keypoint_ap50": None, "keypoint_ap": None}
    (folder / "summary.json").write_text(
        json.dumps({**summary, "task": "detect", "test": test, "test_accuracy": None})
    )
    path = folder / "metrics.jsonl"
    lines = path.read_text().replace('"accuracy"', '"ap50"')
    if ap50 is None:
        lines = re.sub(r'"ap50": [0-9.e-]+', '"ap50": null', lines)
    path.write_text(lines)
    return read_run(folder)


def test_a_detector_is_told_by_its_precision_and_chance_is_not_computed(tmp_path):
    run = write_detector(tmp_path / "a")
    galleries = {"found": ("a <caption>", PNG + bytes(16))}
    path = report.write_report([run], tmp_path / "out", title="x", galleries=galleries)
    html, content = path.read_text(), json.loads((tmp_path / "out" / "report.json").read_text())
    assert content["rows"][0]["measured"] == {"ap50": [0.8], "ap": [0.5]}
    assert content["rows"][0]["standard_error"] is None
    assert content["noise"] == {}
    for text in ("AP50 (%)", "80.00", "COCO's evaluation", "a &lt;caption&gt;"):
        assert text in html
    assert "keypoint AP50 (%)" not in html
    assert (tmp_path / "out" / "report" / "found.png").read_bytes().startswith(PNG)
    assert "test accuracy" not in html
    assert "AP50 in the course of training." in html
    assert "One seed says nothing about the spread" in html
    assert "Seeds differ" not in html


def test_the_spread_of_the_seeds_is_the_one_measured(tmp_path):
    seeds = [write_detector(tmp_path / f"a-{seed}", ap50, seed=seed) for seed, ap50 in enumerate((0.8, 0.83))]
    others = [
        write_detector(tmp_path / f"b-{seed}", ap50, seed=seed, kind="repvgg")
        for seed, ap50 in enumerate((0.4, 0.41))
    ]
    html = report.write_report([*seeds, *others], tmp_path / "out", title="x").read_text()
    assert "Seeds differ by up to 3.0 points of AP50 within one way of training" in html
    assert "One seed" not in html


def test_a_number_that_is_not_defined_ends_no_report(tmp_path):
    runs = [write_detector(tmp_path / "a", None), write_detector(tmp_path / "b", kind="repvgg")]
    deployed = {run.directory: {**DEPLOYED, "test": run.summary["test"]} for run in runs}
    html = report.write_report(runs, tmp_path / "out", title="x", deployed=deployed).read_text()
    assert "80.00" in html
    assert "same class (% of locations)" in html
    rows = json.loads((tmp_path / "out" / "report.json").read_text())["rows"]
    assert [row["score"] for row in rows] == [None, 0.8]
    # Nothing is measured at all.
    html = report.write_report(runs[:1], tmp_path / "none", title="x", deployed=deployed).read_text()
    assert "<td>-</td>" in html
    assert not (tmp_path / "none" / "report" / "accuracy.png").exists()


def test_runs_of_different_tasks_make_no_report(tmp_path):
    runs = [write_run(tmp_path / "a"), write_detector(tmp_path / "b")]
    with pytest.raises(ValueError, match="different tasks, classify and detect"):
        report.write_report(runs, tmp_path / "out", title="x")


def test_unfinished_runs_are_refused_by_name(tmp_path):
    good, bad = write_run(tmp_path / "good"), write_run(tmp_path / "bad")
    (bad.directory / "summary.json").unlink()
    with pytest.raises(ValueError, match=r"not finished, or never evaluated: \S*bad;"):
        report.write_report([good, read_run(bad.directory)], tmp_path / "out", title="x")
    with pytest.raises(ValueError, match="`runs` is empty"):
        report.write_report([], tmp_path / "out", title="x")
    assert not (tmp_path / "out").exists()
