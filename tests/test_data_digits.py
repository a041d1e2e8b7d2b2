"""The embedded digits."""

import os
import shutil
import sys
from collections import Counter

import numpy as np
import pytest

from repopt_jax.data import DatasetInfo, check_images, digits, open_source


@pytest.fixture(scope="module")
def digits_dir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("digits")
    digits.prepare(folder)
    return folder


def test_digits_are_those_of_scikit_learn(digits_dir):
    source = open_source("digits", data_dir=digits_dir)
    assert source.info == DatasetInfo(
        name="digits",
        class_names=tuple("0123456789"),
        channels=1,
        image_shape=(8, 8, 1),
        num_train=1442,
        num_eval=355,
    )
    images, labels, is_test = digits.load()
    for split, chosen in ((source.train, ~is_test), (source.eval, is_test)):
        found = Counter((example["image"].tobytes(), example["label"]) for example in split)
        assert found == Counter((images[i].tobytes(), int(labels[i])) for i in np.flatnonzero(chosen))
    # All 17 grey levels, and scikit-learn's own values can be had back.
    assert len(np.unique(images)) == 17
    from sklearn.datasets import load_digits

    np.testing.assert_array_equal(np.rint(images / 255 * 16), load_digits().images)


def test_no_digit_is_both_trained_and_tested_on(digits_dir):
    source = open_source("digits", data_dir=digits_dir)
    train = {example["image"].tobytes() for example in source.train}
    assert not train & {example["image"].tobytes() for example in source.eval}


def test_digits_are_balanced(digits_dir):
    source = open_source("digits", data_dir=digits_dir)
    train = np.bincount([example["label"] for example in source.train])
    test = np.bincount([example["label"] for example in source.eval])
    np.testing.assert_array_equal(test, (train + test) // 5)  # a fifth of every class
    assert train.min() >= 140
    assert train.max() <= 147


def test_prepared_digits_are_used_again(digits_dir, monkeypatch):
    monkeypatch.setattr(digits, "_build", lambda *_: pytest.fail("prepared twice"))
    assert open_source("digits", data_dir=digits_dir).info.num_train == 1442


def test_digits_go_to_the_users_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert digits.default_data_dir() == tmp_path / "repopt_jax"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert digits.default_data_dir() == tmp_path / "home/.cache/repopt_jax"


def test_preparing_leaves_nothing_else_and_says_nothing(tmp_path, capsys):
    digits.prepare(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["digits"]
    assert [path.name for path in (tmp_path / "digits").iterdir()] == ["1.0.0"]
    assert capsys.readouterr() == ("", "")


def test_the_process_that_is_second_takes_what_the_first_made(tmp_path, monkeypatch):
    build = digits._build

    def build_late(data_dir):
        build(data_dir)
        monkeypatch.setattr(digits, "_build", build)
        digits.prepare(tmp_path)  # another process finishes in the meantime

    monkeypatch.setattr(digits, "_build", build_late)
    made = digits.prepare(tmp_path)
    assert open_source("digits", data_dir=tmp_path).info.num_eval == 355
    assert [path.name for path in made.parent.iterdir()] == ["1.0.0"]
    assert [path.name for path in tmp_path.iterdir()] == ["digits"]


def test_a_failure_to_prepare_leaves_nothing_to_be_mistaken_for_data(tmp_path, monkeypatch):
    def fail(data_dir):
        raise RuntimeError("killed")

    monkeypatch.setattr(digits, "_build", fail)
    with pytest.raises(RuntimeError, match="killed"):
        digits.prepare(tmp_path)
    assert not (tmp_path / "digits/1.0.0").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["digits"]


TRAIN = "digits-train.array_record-00000-of-00001"


@pytest.mark.parametrize(
    ("file", "size"),
    [
        ("dataset_info.json", None),
        ("dataset_info.json", 20),
        ("features.json", None),
        ("features.json", 20),
        (TRAIN, None),
        (TRAIN, 1000),
        (TRAIN, 200_000),
    ],
)
def test_damaged_digits_are_named_with_what_to_do(digits_dir, tmp_path, file, size):
    """A file that is missing, or cut to so many bytes."""
    shutil.copytree(digits_dir, tmp_path, dirs_exist_ok=True)
    folder = tmp_path / "digits/1.0.0"
    if size is None:
        (folder / file).unlink()
    else:
        os.truncate(folder / file, size)
    if file == TRAIN:  # which is opened when the first image is read
        problem = check_images(open_source("digits", data_dir=tmp_path))[0].problem
        assert problem.startswith(f"cannot read image 0 of split train in {folder} (")
    else:
        with pytest.raises(ValueError, match="cannot read the data set in ") as raised:
            open_source("digits", data_dir=tmp_path)
        problem = str(raised.value)
        assert str(folder) in problem
    assert problem.endswith("; remove the folder: it is made anew")
    assert "\n" not in problem


def test_a_data_dir_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match=r"cannot write .*file to prepare the digits: .*name another"):
        open_source("digits", data_dir=tmp_path / "file")


def test_digits_without_scikit_learn(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(ImportError, match=r"pip install 'repopt_jax\[digits\]'"):
        open_source("digits", data_dir=tmp_path)
