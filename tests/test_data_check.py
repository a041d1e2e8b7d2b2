"""Images that cannot be read: found before the first epoch, and left out where the config says so."""

import json
import shutil

import numpy as np
import pytest
from PIL import Image
from training import stop_after_step, tiny_config, told, warned

from repopt_jax import data, train
from repopt_jax.cli.main import main
from repopt_jax.data import check


def cut(path):
    path.write_bytes(path.read_bytes()[:-20])


def empty(path):
    path.write_bytes(b"")


def flip(path):
    """Damage in the middle, which only decoding finds."""
    content = bytearray(path.read_bytes())
    start = content.index(b"IDAT") + 4
    content[start : start + 30] = bytes(30)
    path.write_bytes(content)


@pytest.fixture
def folder(tmp_path):
    """30 images for training and 12 for testing, in two classes."""
    rng = np.random.default_rng(0)
    for split, count in (("train", 15), ("test", 6)):
        for name in ("a", "b"):
            place = tmp_path / "images" / split / name
            place.mkdir(parents=True)
            for i in range(count):
                Image.fromarray(rng.integers(0, 256, (8, 8), dtype=np.uint8)).save(place / f"{i:02}.png")
    return tmp_path / "images"


def config_of(folder, **changes):
    options = {"data__source": "folder", "data__data_dir": str(folder), **changes}
    limits = {"data__train_limit": None, "data__eval_limit": None}
    return tiny_config("plain", folder, **{**limits, **options})


def test_a_quick_look_finds_what_a_beginning_and_an_end_show(folder):
    source = data.open_source("folder", data_dir=folder)
    assert check.check_quickly(source) == check.check_images(source) == []
    cut(folder / "train/a/03.png")
    empty(folder / "train/b/00.png")
    flip(folder / "test/b/05.png")
    (folder / "test/a/00.png").unlink()
    quick = check.check_quickly(source)
    assert [(one.split, one.index) for one in quick] == [("train", 3), ("train", 15), ("eval", 0)]
    assert "train/a/03.png" in quick[0].problem
    bad = check.check_images(source)
    assert [(one.split, one.index) for one in bad] == [*((b.split, b.index) for b in quick), ("eval", 11)]


def test_a_quick_look_at_many_files_takes_some(folder, monkeypatch):
    monkeypatch.setattr(check, "QUICK_FILES", 10)
    seen = []
    monkeypatch.setattr(check, "quick_problem", lambda path, **options: seen.append(path))
    check.check_quickly(data.open_source("folder", data_dir=folder))
    assert len(set(seen)) == len(seen) == 20


def test_parts_know_their_files_and_data_without_files_have_none(folder, digits):
    source = data.hold_out(data.open_source("folder", data_dir=folder), 5)
    assert sorted(source.eval.path(i) for i in range(5)) == sorted({source.eval.path(i) for i in range(5)})
    assert all("/train/" in source.eval.path(i) for i in range(5))
    embedded = data.open_source("digits", data_dir=digits)
    assert embedded.train.path(0) is None
    assert check.check_quickly(embedded) == []


def test_a_bad_image_ends_a_run_before_its_first_epoch(folder, tmp_path):
    cut(folder / "train/a/03.png")
    with pytest.raises(ValueError, match=r"^images that cannot be read: .*train/a/03\.png .*skip_bad=True"):
        train.run(config_of(folder), tmp_path / "run", progress=False)
    assert not (tmp_path / "run").exists()


@pytest.mark.once
def test_bad_images_can_be_left_out_with_their_count_in_the_log(folder, tmp_path, caplog):
    """The training is that of a folder that never had them."""
    shutil.copytree(folder, tmp_path / "clean")
    flip(folder / "train/a/03.png")
    empty(folder / "train/b/00.png")
    cut(folder / "test/b/05.png")
    for name in ("train/a/03.png", "train/b/00.png", "test/b/05.png"):
        (tmp_path / "clean" / name).unlink()
    config = config_of(folder, data__skip_bad=True, epochs=1)
    train.run(config, tmp_path / "run", progress=False, stop=stop_after_step(2))
    (message,) = warned(caplog)
    assert "tiny: 2 images for training and 1 for evaluation cannot be read and are left out: " in message
    assert train.run(config, tmp_path / "run", progress=False).finished
    first, *records = told(tmp_path / "run")
    assert first == {"kind": "data", "step": 0, "epoch": 0.0, "skipped_train": 2, "skipped_eval": 1}
    stored = json.loads((tmp_path / "run" / "dataset.json").read_text())
    assert (stored["num_train"], stored["num_eval"]) == (28, 11)
    clean = config_of(tmp_path / "clean", epochs=1)
    train.run(clean, tmp_path / "other", progress=False)
    assert told(tmp_path / "other") == records


def test_a_split_without_a_good_image(folder):
    for path in (folder / "test").glob("*/*"):
        empty(path)
    source = data.open_source("folder", data_dir=folder)
    with pytest.raises(ValueError, match=r"no image of the split eval can be read: .*; and 9 more$"):
        data.without_bad(source)


def test_check_data(folder, tmp_path, capsys):
    (tmp_path / "mine.py").write_text(
        "from repopt_jax.train import Config, DataConfig\n\ndef get_config(arg):\n"
        f"    return Config(data=DataConfig(source='folder', data_dir={str(folder)!r}))\n"
    )
    command = ["check-data", f"--config={tmp_path}/mine.py"]
    assert main(command) == 0
    assert capsys.readouterr().out == "images: 42 of 42 images can be read\n"
    flip(folder / "train/b/07.png")
    assert main(command) == 1
    first, last = capsys.readouterr().out.splitlines()
    assert "train/b/07.png" in first
    assert last == "images: 41 of 42 images can be read"


def test_annotated_images(tmp_path):
    rng = np.random.default_rng(0)
    for split in ("train", "val"):
        (tmp_path / split).mkdir()
        for name in ("1.png", "2.png"):
            Image.fromarray(rng.integers(0, 256, (20, 24), np.uint8)).save(tmp_path / split / name)
        ids = (1, 2)
        content = {
            "images": [{"id": i, "file_name": f"{i}.png", "width": 24, "height": 20} for i in ids],
            "annotations": [
                {"id": i, "image_id": i, "category_id": 1, "bbox": [1, 1, 5, 5 + i]} for i in ids
            ],
            "categories": [{"id": 1, "name": "x"}],
        }
        (tmp_path / f"{split}.json").write_text(json.dumps(content))
    source = data.open_coco(tmp_path)
    flip(tmp_path / "train" / "1.png")
    kept = data.without_bad(source)
    assert (kept.info.num_train, kept.info.num_eval, len(kept.skipped)) == (1, 2, 1)
    assert kept.train[0]["boxes"].tolist() == [[1.0, 1.0, 6.0, 8.0]]
    assert kept.train.objects(0)["boxes"].shape == (1, 4)
