"""The registry of data sets, folders of images and prepared TFDS data sets."""

import dataclasses
import io
import os

import numpy as np
import pytest
from PIL import Image

from repopt_jax.data import SOURCES, DatasetInfo, Record, Split, open_configured, open_scenes, open_source
from repopt_jax.data.images import decode_image
from repopt_jax.data.sources import SourceEntry
from repopt_jax.train import DataConfig


def write_image(path, pixels, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path, **options)


def make_folder(root, *, classes=("cat", "dog"), count=3, evaluation="test", suffix="png", shape=(8, 8, 3)):
    """A folder data set; pixel values say which image it is."""
    for part, offset in (("train", 0), (evaluation, 100)):
        for label, name in enumerate(classes):
            for i in range(count):
                pixels = np.full(shape, offset + 10 * label + i, np.uint8)
                write_image(root / part / name / f"{i:03}.{suffix}", pixels)
    return root


# -- folder ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("evaluation", ["test", "val", "validation"])
@pytest.mark.parametrize("suffix", ["png", "jpg", "JPEG"])
def test_folder_gives_every_image_with_its_class(tmp_path, evaluation, suffix):
    source = open_source("folder", data_dir=make_folder(tmp_path, evaluation=evaluation, suffix=suffix))
    assert source.info == DatasetInfo(
        name=tmp_path.name,
        class_names=("cat", "dog"),
        channels=3,
        image_shape=(8, 8, 3),
        num_train=6,
        num_eval=6,
    )
    assert source.info.num_classes == 2
    assert [example["label"] for example in source.train] == [0, 0, 0, 1, 1, 1]
    values = [int(example["image"].mean()) for example in source.eval]
    np.testing.assert_allclose(values, [100, 101, 102, 110, 111, 112], atol=1 if suffix != "png" else 0)
    assert source.train[0]["image"].dtype == np.uint8
    assert source.train[-1]["label"] == 1
    with pytest.raises(IndexError, match="`index` 6 is outside a split of 6 images"):
        source.train[6]


def test_folder_passes_over_what_is_not_an_image(tmp_path):
    make_folder(tmp_path)
    (tmp_path / "train/cat/notes.txt").write_text("no image")
    (tmp_path / "train/cat/.hidden.png").write_bytes(b"no image")
    (tmp_path / "train/.cache").mkdir()
    (tmp_path / "train/list.csv").write_text("no class")
    source = open_source("folder", data_dir=tmp_path, name="pets")
    assert (source.info.name, source.info.num_train) == ("pets", 6)


def test_test_is_preferred_to_val_and_may_lack_classes(tmp_path):
    make_folder(tmp_path, evaluation="val", count=5)
    write_image(tmp_path / "test/dog/a.png", np.zeros((8, 8, 3), np.uint8))
    source = open_source("folder", data_dir=tmp_path)
    assert [example["label"] for example in source.eval] == [1]


def test_grey_folder_has_one_channel(tmp_path):
    source = open_source("folder", data_dir=make_folder(tmp_path, shape=(8, 8)))
    assert source.info.image_shape == (8, 8, 1)
    assert source.train[4]["image"].shape == (8, 8, 1)
    assert int(source.train[4]["image"][0, 0, 0]) == 11


def test_mixed_modes_become_rgb_and_mixed_sizes_have_no_shape(tmp_path):
    make_folder(tmp_path, shape=(8, 8))
    red = np.zeros((4, 6, 4), np.uint8)
    red[..., 0], red[..., 3] = 200, 7
    write_image(tmp_path / "train/cat/rgba.png", red)
    Image.fromarray(red[..., :3]).quantize(2).save(tmp_path / "train/cat/palette.png")
    source = open_source("folder", data_dir=tmp_path)
    assert (source.info.channels, source.info.image_shape) == (3, None)
    images = [example["image"] for example in source.train]
    np.testing.assert_array_equal(images[1], np.full((8, 8, 3), 1))  # grey, repeated
    for image in images[3:5]:
        np.testing.assert_array_equal(image, np.broadcast_to([200, 0, 0], (4, 6, 3)))


def test_a_colour_image_in_a_grey_data_set_becomes_luminance():
    encoded = _png(np.broadcast_to(np.uint8([255, 0, 0]), (2, 2, 3)))
    assert decode_image(encoded, channels=1, name="red").tolist() == [[[76], [76]], [[76], [76]]]


def _remove_train(root):
    os.rename(root / "train", root / "training")


def _remove_test(root):
    os.rename(root / "test", root / "exam")


def _remove_class(root):
    for part in ("train", "test"):
        os.rename(root / part / "dog", root / f"{part}-dog")


def _remove_classes(root):
    _remove_class(root)
    os.rename(root / "train" / "cat", root / "cat")


def _empty_class(root):
    for path in (root / "train/dog").iterdir():
        path.unlink()


def _empty_test(root):
    for path in (root / "test").glob("*/*"):
        path.unlink()


def _add_test_class(root):
    (root / "test/bird").mkdir()
    (root / "test/ant").mkdir()


@pytest.mark.parametrize(
    ("spoil", "error", "message"),
    [
        (_remove_train, FileNotFoundError, "has no folder train; expected train/<class>/"),
        (_remove_test, FileNotFoundError, "has no folder test, val or validation"),
        (_remove_class, ValueError, "holds only the class 'cat'; at least two folders"),
        (_remove_classes, ValueError, "holds no class folders"),
        (_empty_class, ValueError, "has classes without a JPEG, PNG, WebP or BMP image: dog; add images"),
        (_empty_test, ValueError, "test holds no JPEG, PNG, WebP or BMP images"),
        (_add_test_class, ValueError, "has classes that .*train does not have: ant, bird; every"),
    ],
)
def test_a_folder_that_cannot_be_used_is_refused_at_opening(tmp_path, spoil, error, message):
    make_folder(tmp_path)
    spoil(tmp_path)
    with pytest.raises(error, match=message) as raised:
        open_source("folder", data_dir=tmp_path)
    assert "\n" not in str(raised.value)


def test_missing_folder(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"`data_dir` .*nowhere is not a folder"):
        open_source("folder", data_dir=tmp_path / "nowhere")


def _damage(path):
    path.write_bytes(path.read_bytes()[:45])


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (lambda path: path.write_bytes(b"not an image"), "not an image in a known format"),
        (lambda path: path.write_bytes(b""), "not an image in a known format"),
        (_damage, "runcated"),
        (lambda path: path.unlink(), "No such file"),
        (lambda path: Image.fromarray(np.zeros((8, 8), np.uint16)).save(path), "more than 8 bits"),
    ],
)
def test_an_unreadable_image_is_named_when_it_is_read(tmp_path, spoil, reason):
    source = open_source("folder", data_dir=make_folder(tmp_path))
    spoil(tmp_path / "train/dog/001.png")
    assert source.train[3]["label"] == 1
    with pytest.raises(ValueError, match=rf"{tmp_path}/train/dog/001.png.*") as raised:
        source.train[4]
    assert reason in str(raised.value)
    assert "\n" not in str(raised.value)


def test_opening_reads_a_few_headers_only(tmp_path):
    make_folder(tmp_path, count=100)
    for i in (1, 2):  # 200 files, 64 headers: these are not among them
        (tmp_path / f"train/cat/{i:03}.png").write_bytes(b"not an image")
    assert open_source("folder", data_dir=tmp_path).info.num_train == 200
    (tmp_path / "train/cat/000.png").write_bytes(b"not an image")  # `check` finds it
    assert open_source("folder", data_dir=tmp_path).info.channels == 3
    for path in (tmp_path / "train").glob("*/*"):
        path.write_bytes(b"not an image")
    with pytest.raises(ValueError, match=r"cannot read image .*train/cat/000.png"):
        open_source("folder", data_dir=tmp_path)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"source": "photos"}, "`source` is 'photos'; it must be one of digits, folder, tfds, scenes, coco"),
        ({"source": "folder"}, "`data_dir` is missing: source 'folder' needs it"),
        ({"source": "folder", "data_dir": ""}, "`data_dir` is missing"),
        ({"source": "coco"}, "`data_dir` is missing"),
        ({"source": "tfds"}, "`name` is missing"),
        ({"source": "digits", "name": "mnist"}, "`name` is 'mnist', but source 'digits' takes only data_dir"),
        ({"source": "scenes", "sigmas": ()}, r"`sigmas` is \(\), but source 'scenes' takes only scenes, "),
        ({"source": "tfds", "scenes_seed": 0}, "`name` is missing: .*; `scenes_seed` is 0"),
        ({"source": "scenes", "scenes": (5,)}, r"`scenes` is \(5,\); it must be two numbers of scenes"),
        ({"source": "scenes", "scenes": (5, 0)}, r"`scenes` is \(5, 0\); .*, each at least 1"),
    ],
)
def test_arguments_that_do_not_fit_the_source(arguments, message):
    with pytest.raises(ValueError, match=message):
        open_source(**arguments)


# -- the registry ----------------------------------------------------------------------------------


def test_a_row_says_what_its_data_set_takes():
    rows = {name: (entry.task, entry.options, entry.required) for name, entry in SOURCES.items()}
    coco = rows.pop("coco")
    assert rows == {
        "digits": ("classify", ("data_dir",), ()),
        "folder": ("classify", ("data_dir", "name", "max_pixels"), ("data_dir",)),
        "tfds": ("classify", ("name", "data_dir", "max_pixels"), ("name",)),
        "scenes": ("detect", ("scenes", "scenes_seed", "image_size"), ()),
    }
    assert (coco[0], coco[2]) == ("detect", ("data_dir",))


def test_options_of_the_registry_are_fields_of_a_config():
    fields = {field.name for field in dataclasses.fields(DataConfig)}
    for name, entry in SOURCES.items():
        assert set(entry.options) <= fields, name


def test_scenes_are_opened_by_name():
    source = open_source("scenes", scenes=(3, 2), scenes_seed=5, image_size=48)
    expected = open_scenes(5, num_train=3, num_eval=2, size=48)
    assert source.info == expected.info
    np.testing.assert_array_equal(source.eval[1]["image"], expected.eval[1]["image"])


def test_a_new_data_set_is_a_row(monkeypatch):
    """A config opens it by its fields; those that are empty are left at the reader's defaults."""

    def open_made(data_dir, *, name="made"):
        return data_dir, name

    monkeypatch.setitem(SOURCES, "made", SourceEntry("classify", open_made))
    assert open_source("made", data_dir="here") == ("here", "made")
    settings = DataConfig(source="made", data_dir="there", scenes_seed=3)
    assert open_configured(settings) == ("there", "made")
    assert open_configured(dataclasses.replace(settings, name="x")) == ("there", "x")
    with pytest.raises(ValueError, match="`data_dir` is missing: source 'made' needs it"):
        open_configured(DataConfig(source="made"))
    with pytest.raises(ValueError, match="`source` is 'photos'"):
        open_configured(DataConfig(source="photos"))


def test_a_folder_in_the_users_home(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    make_folder(tmp_path / "pets")
    assert open_source("folder", data_dir="~/pets").info.name == "pets"


# -- TFDS ------------------------------------------------------------------------------------------


def _png(pixels):
    buffer = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(pixels)).save(buffer, format="PNG")
    return buffer.getvalue()


def prepare_tfds(data_dir, *, channels=3, labelled_test=True, splits=("train", "test", "validation")):
    """Prepares the data set `tiny` with 5 images a split, of value 10 * split + index."""
    import tensorflow_datasets as tfds

    class Tiny(tfds.core.GeneratorBasedBuilder, skip_registration=True):
        """Images of one colour."""

        name = "tiny"
        VERSION = tfds.core.Version("1.0.0")
        pkg_dir_path = data_dir

        def _info(self):
            return tfds.core.DatasetInfo(
                builder=self,
                features=tfds.features.FeaturesDict(
                    {
                        "image": tfds.features.Image(shape=(None, None, channels)),
                        "label": tfds.features.ClassLabel(names=["low", "high"]),
                    }
                ),
                supervised_keys=("image", "label"),
                disable_shuffling=True,
            )

        def _split_generators(self, dl_manager):
            return {split: self._generate_examples(number) for number, split in enumerate(splits)}

        def _generate_examples(self, number):
            for i in range(5):
                label = -1 if number == 1 and not labelled_test else i % 2
                pixels = np.full((6, 4, channels), 10 * number + i, np.uint8)
                yield i, {"image": _png(pixels[..., 0] if channels == 1 else pixels), "label": label}

    Tiny(data_dir=data_dir, file_format="array_record").download_and_prepare()


@pytest.mark.parametrize("channels", [1, 3])
def test_a_prepared_tfds_data_set_is_read_by_name(tmp_path, capsys, channels):
    prepare_tfds(tmp_path, channels=channels)
    source = open_source("tfds", name="tiny", data_dir=tmp_path)
    assert source.info == DatasetInfo(
        name="tiny",
        class_names=("low", "high"),
        channels=channels,
        image_shape=None,
        num_train=5,
        num_eval=5,
    )
    assert [example["label"] for example in source.train] == [0, 1, 0, 1, 0]
    assert [int(example["image"][0, 0, 0]) for example in source.eval] == [10, 11, 12, 13, 14]
    assert source.train[0]["image"].shape == (6, 4, channels)
    assert open_source("tfds", name="tiny:1.0.0", data_dir=tmp_path).info == source.info


def test_a_test_split_without_labels_gives_way_to_validation(tmp_path):
    prepare_tfds(tmp_path, labelled_test=False)
    source = open_source("tfds", name="tiny", data_dir=tmp_path)
    assert [int(example["image"][0, 0, 0]) for example in source.eval] == [20, 21, 22, 23, 24]


@pytest.mark.parametrize(
    ("splits", "message"),
    [(("train", "extra"), "no labelled split test or validation; it has"), (("test",), "has no split train")],
)
def test_a_tfds_data_set_without_its_splits_is_refused(tmp_path, splits, message):
    prepare_tfds(tmp_path, splits=splits)
    with pytest.raises(ValueError, match=message):
        open_source("tfds", name="tiny", data_dir=tmp_path)


def test_a_tfds_data_set_that_is_not_prepared(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"'cifar10' is not prepared in .*download_and_prepare"):
        open_source("tfds", name="cifar10", data_dir=tmp_path)


def test_a_tfds_data_set_in_another_format_is_refused(tmp_path):
    prepare_tfds(tmp_path)
    info = tmp_path / "tiny/1.0.0/dataset_info.json"
    info.write_text(info.read_text().replace("array_record", "tfrecord"))
    with pytest.raises(ValueError, match="is not stored as array_record; prepare it in another"):
        open_source("tfds", name="tiny", data_dir=tmp_path)


@pytest.mark.parametrize("file", ["dataset_info.json", "tiny-train.array_record-00000-of-00001"])
def test_a_damaged_tfds_data_set_is_named_with_what_to_do(tmp_path, file):
    prepare_tfds(tmp_path)
    os.truncate(tmp_path / "tiny/1.0.0" / file, 30)
    with pytest.raises(ValueError, match=rf"cannot read .* in {tmp_path}.*; remove its folder and .*anew"):
        open_source("tfds", name="tiny", data_dir=tmp_path).train[0]


def test_a_damaged_record_is_named():
    split = Split([Record(b"not an image", 0, "3 of split train in place")], channels=3)
    with pytest.raises(ValueError, match="cannot read image 3 of split train in place"):
        split[0]
