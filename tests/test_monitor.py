"""The monitor on made-up searches whose true answer is known."""

import json

import numpy as np
import pytest
from searches import EPOCHS, constant, cosine, full_rate_time, records, search, train_records

from repopt_jax.report import monitor
from repopt_jax.report.records import history_of, read_history, read_run


@pytest.mark.parametrize(
    ("shape", "rate", "state", "settled"),
    [
        (lambda x: 1 - np.exp(-10 * x), constant, "settled", True),
        (lambda x: 1 - np.exp(-10 * full_rate_time(x)), cosine, "settled", True),
        (lambda x: x, constant, "moving", False),
        (lambda x: x**2, cosine, "moving", False),
        (full_rate_time, cosine, "stopped", False),
        (lambda x: np.sin(2 * np.pi * 10 * x + 0.8), constant, "swinging", False),
        (lambda x: cosine(x) * np.sin(2 * np.pi * 10 * x + 0.8), cosine, "swinging", True),
        (lambda x: 1e-3 * x, constant, "unmoved", False),
    ],
)
def test_the_verdict_names_what_the_scales_did(shape, rate, state, settled):
    found = monitor.verdict(search(shape, rate, size=0.5 if rate is constant else 5.0)[1])
    assert (found.state, found.settled) == (state, settled), found.sentence
    assert found.sentence.count("\n") == 0
    assert found.sentence.endswith(".")
    assert {v.state for v in found.vectors} == {state}


def test_a_scale_that_only_the_learning_rate_stopped_is_called_so():
    _, with_rate = search(full_rate_time, cosine)
    assert "because the learning rate decayed" in monitor.verdict(with_rate).sentence
    # Negative control: the same movement under a constant rate has come to rest by itself.
    _, without = search(full_rate_time, constant)
    assert monitor.verdict(without).state == "settled"


def test_the_criterion_has_no_unit():
    for scale in (1e-3, 1e3):
        paths, _ = search(lambda x: x)
        scaled = history_of(records({k: scale * v for k, v in paths.items()}))
        assert monitor.verdict(scaled).state == "moving"


def test_one_moving_vector_of_many_does_not_decide_but_a_quarter_does():
    for moving, settled in ((1, True), (10, False)):
        paths, _ = search(lambda x: 1 - np.exp(-10 * x), layers=20)
        for key in list(paths)[:moving]:
            paths[key] = 1 + np.linspace(0, 1, EPOCHS + 1)[:, None] * np.ones(8)
        found = monitor.verdict(history_of(records(paths), train_records(constant)))
        assert found.settled is settled
        assert sum(v.state == "moving" for v in found.vectors) == moving


def test_a_layer_that_did_not_move_is_named_and_explained():
    paths, _ = search(lambda x: 1 - np.exp(-10 * x))
    paths["stages/4/0/conv", "3x3"] = np.ones((EPOCHS + 1, 8))
    found = monitor.verdict(history_of(records(paths), train_records(constant)))
    assert found.settled
    (note,) = [note for note in found.notes if "did not move" in note]
    assert "(stages/4/0 3x3)" in note
    assert "1x1 pixels" in note


def test_a_search_in_which_most_scales_did_not_move_has_not_settled():
    paths, _ = search(lambda x: 1 - np.exp(-10 * x))
    for key in list(paths)[:5]:
        paths[key] = np.ones((EPOCHS + 1, 8))
    found = monitor.verdict(history_of(records(paths), train_records(constant)))
    assert (found.state, found.settled) == ("unmoved", False)
    assert "Only 3 of 8" in found.sentence


def test_scales_near_their_start_are_called_a_valid_result():
    _, near = search(lambda x: -(1 - np.exp(-10 * x)), size=0.02)
    assert any("valid result" in note for note in monitor.verdict(near).notes)
    _, far = search(lambda x: 1 - np.exp(-10 * x), size=0.5)
    assert not any("valid result" in note for note in monitor.verdict(far).notes)


def test_oscillation_and_negative_channels_are_explained():
    _, history = search(lambda x: np.sin(2 * np.pi * 10 * x + 0.8), negative=3)
    notes = " ".join(monitor.verdict(history).notes)
    assert "this is normal" in notes
    assert "24 channels have a negative scale" in notes
    assert "and 2 more" in notes


def test_a_short_search_gets_no_verdict():
    paths, _ = search(lambda x: x)
    found = monitor.verdict(history_of(records(paths)[:4]))
    assert (found.state, found.settled) == ("too short", False)
    assert "3 epochs" in found.sentence


def test_statistics_that_are_not_finite_are_refused_by_name():
    paths, _ = search(lambda x: x)
    paths["stages/2/0/conv", "1x1"] = np.full((EPOCHS + 1, 8), np.nan)
    with pytest.raises(ValueError, match=r"not finite, of stages/2/0/conv 1x1$"):
        monitor.verdict(history_of(records(paths)))


def test_read_history_reads_what_a_search_writes(tmp_path):
    paths, history = search(lambda x: x, cosine)
    lines = [*records(paths), *train_records(cosine)]
    text = "\n".join(json.dumps(line) for line in lines)
    (tmp_path / "metrics.jsonl").write_text(text + "\n")
    read = read_history(tmp_path)
    np.testing.assert_array_equal(read.epochs, history.epochs)
    np.testing.assert_allclose(read.rates, history.rates)
    for key, series in history.vectors.items():
        for field, values in series.items():
            np.testing.assert_array_equal(read.vectors[key][field], values)


def test_folders_that_hold_no_search_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no metrics\.jsonl"):
        read_run(tmp_path)
    (tmp_path / "metrics.jsonl").write_text('{"kind": "eval", "step": 1, "epoch": 1.0}\n')
    with pytest.raises(ValueError, match="only a search makes them"):
        read_history(tmp_path)
    (tmp_path / "metrics.jsonl").write_text("{\n")
    with pytest.raises(ValueError, match=r"line 1 of .* is no record"):
        read_run(tmp_path)
    (tmp_path / "metrics.jsonl").write_text("")
    (tmp_path / "summary.json").write_text("[]\n")
    with pytest.raises(ValueError, match=r"summary\.json is damaged: it holds no object"):
        read_run(tmp_path)


def test_records_of_different_vectors_are_refused():
    paths, _ = search(lambda x: x)
    made = records(paths)
    del made[3]["layers"]["stages/1/0/conv"]["1x1"]
    with pytest.raises(ValueError, match="stages/1/0/conv 1x1"):
        history_of(made)
