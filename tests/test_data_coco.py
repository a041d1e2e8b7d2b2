"""Annotations in COCO's format: what is read, and what is refused in one clear sentence."""

import copy
import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from repopt_jax.data import coco, open_coco

KEYPOINTS = ["left_eye", "right_eye", "nose"]


def annotation(number, image, category=7, box=(2.0, 3.0, 10.0, 8.0), keypoints=(), **more):
    keypoints = list(keypoints) or [3, 4, 2, 11, 4, 1, 0, 0, 0]
    return {
        "id": number,
        "image_id": image,
        "category_id": category,
        "bbox": list(box),
        "keypoints": keypoints,
        "iscrowd": 0,
        **more,
    }


CATEGORIES = [
    {"id": 7, "name": "face", "keypoints": KEYPOINTS, "skeleton": [[1, 2]]},
    {"id": 3, "name": "mask"},
]
TRAIN = {
    "images": [
        {"id": 50, "file_name": "a.png", "width": 24, "height": 20},
        {"id": 9, "file_name": "b.jpg", "width": 24, "height": 20},
        {"id": 11, "file_name": "deep/c.png", "width": 24, "height": 20},
    ],
    "annotations": [
        annotation(1, 11, area=33.5),
        annotation(2, 50, category=3, box=(-2, 0, 12, 5.5), keypoints=[0] * 9),
        annotation(3, 11, box=(0, 0, 24, 20), iscrowd=1),
        {"id": 4, "image_id": 11, "category_id": 7, "bbox": [1, 1, 3, 3]},
    ],
    "categories": CATEGORIES,
}
VAL = {
    "images": [{"id": "x1", "file_name": "v.png"}],
    "annotations": [annotation(1, "x1")],
    "categories": CATEGORIES[::-1],
}


def write(root, train=TRAIN, val=VAL, *, shape=(20, 24), folders=("train", "val")):
    rng = np.random.default_rng(0)
    for found, folder in zip((TRAIN, VAL), folders, strict=True):
        for image in found["images"]:
            path = root / folder / image["file_name"]
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(rng.integers(0, 256, shape, np.uint8)).save(path)
    for name, found in (("train", train), ("val", val)):
        (root / f"{name}.json").write_text(found if isinstance(found, str) else json.dumps(found))
    return root


# -- what is read --------------------------------------------------------------------------------------


def test_a_folder_in_coco_format(tmp_path):
    source = open_coco(write(tmp_path))
    info = source.info
    assert info.name == tmp_path.name
    assert info.class_names == ("mask", "face")  # by id
    assert info.keypoint_names == ("left_eye", "right_eye", "nose")
    assert (info.channels, info.max_objects, info.num_train, info.num_eval) == (1, 2, 3, 1)
    assert info.flip_pairs == ((0, 1),)
    assert info.sigmas == (0.05, 0.05, 0.05)
    first, second, third = (source.train.objects(i) for i in range(3))
    np.testing.assert_array_equal(first["boxes"], [[-2, 0, 10, 5.5]])
    assert first["classes"].tolist() == [0]
    assert first["area"].tolist() == [12 * 5.5]
    assert not first["keypoints"].any()
    assert {name: array.shape for name, array in second.items()} == {
        "boxes": (0, 4),
        "classes": (0,),
        "keypoints": (0, 3, 3),
        "crowd": (0,),
        "area": (0,),
    }
    np.testing.assert_array_equal(third["boxes"], [[2, 3, 12, 11], [0, 0, 24, 20], [1, 1, 4, 4]])
    assert third["crowd"].tolist() == [False, True, False]
    assert third["area"].tolist() == [33.5, 480, 9]
    np.testing.assert_array_equal(third["keypoints"][0], [[3, 4, 2], [11, 4, 1], [0, 0, 0]])
    assert not third["keypoints"][2].any()


def test_images_are_decoded_with_their_objects(tmp_path):
    source = open_coco(write(tmp_path))
    stored = np.asarray(Image.open(tmp_path / "train/deep/c.png"))
    example = source.train[-1]
    np.testing.assert_array_equal(example["image"][..., 0], stored)
    assert len(example["classes"]) == 3
    assert example["boxes"].dtype == np.float32
    assert example["classes"].dtype == np.int32


def test_colour_images_have_three_channels(tmp_path):
    source = open_coco(write(tmp_path, shape=(20, 24, 3)))
    assert source.info.channels == 3
    assert source.eval[0]["image"].shape == (20, 24, 3)


def test_paths_names_and_numbers_may_be_given(tmp_path):
    write(tmp_path, folders=("pictures", "pictures"))
    (tmp_path / "annotations").mkdir()
    (tmp_path / "train.json").rename(tmp_path / "annotations/one.json")
    source = open_coco(
        tmp_path,
        train_annotations="annotations/one.json",
        train_images="pictures",
        eval_images=tmp_path / "pictures",
        name="faces",
        max_objects=5,
        sigmas=[0.1, 0.2, 0.3],
    )
    assert (source.info.name, source.info.max_objects) == ("faces", 5)
    assert source.info.sigmas == (0.1, 0.2, 0.3)
    assert source.train[0]["image"].shape == (20, 24, 1)


def test_a_folder_images_serves_both(tmp_path):
    assert open_coco(write(tmp_path, folders=("images", "images"))).info.num_eval == 1


def test_boxes_without_keypoints(tmp_path):
    def without(found):
        kept = [{k: v for k, v in a.items() if k != "keypoints"} for a in found["annotations"]]
        return {**found, "annotations": kept, "categories": [{"id": 3, "name": "m"}, {"id": 7, "name": "f"}]}

    source = open_coco(write(tmp_path, without(TRAIN), without(VAL)))
    assert source.info.num_keypoints == 0
    assert source.train.objects(2)["keypoints"].shape == (3, 0, 3)


def test_a_person_has_the_constants_of_coco(tmp_path):
    names = ["nose", *(f"{side}_{part}" for part in "abcdefgh" for side in ("left", "right"))]
    person = [{"id": 7, "name": "person", "keypoints": names}]

    def of(found):
        kept = [{**a, "category_id": 7, "keypoints": []} for a in found["annotations"]]
        return {**found, "annotations": kept, "categories": person}

    info = open_coco(write(tmp_path, of(TRAIN), of(VAL))).info
    assert (info.sigmas[0], info.sigmas[12], len(info.sigmas)) == (0.026, 0.107, 17)
    assert info.flip_pairs == tuple((i, i + 1) for i in range(1, 17, 2))


def named(found, names):
    """`found` with these names of its three keypoints."""
    categories = [{**c, "keypoints": names} if "keypoints" in c else c for c in found["categories"]]
    return {**found, "categories": categories}


@pytest.mark.parametrize(
    ("names", "pairs"),
    [
        (["Left_Eye", "right_eye", "nose"], ((0, 1),)),
        (["nose", "RIGHT EYE", "Left eye"], ((1, 2),)),
        (["leftEye", "rightEye", "nose"], ((0, 1),)),
        (["l_eye", "r_eye", "nose"], ((0, 1),)),
        (["eye_r", "nose", "eye_l"], ((0, 2),)),
        (["eye.L", "eye.R", "nose"], ((0, 1),)),
        (["eyeL", "eyeR", "nose"], ((0, 1),)),
        (["l", "r", "n"], ((0, 1),)),
        (["left_eye", "r_eye", "nose"], ()),
        (["ear", "eal", "nose"], ()),  # letters of a word
        (["LEFT_A", "left_A", "right_a"], ()),  # which one is meant?
    ],
)
def test_sides_in_names_of_keypoints(tmp_path, names, pairs):
    assert open_coco(write(tmp_path, named(TRAIN, names), named(VAL, names))).info.flip_pairs == pairs


def test_every_side_in_a_name_changes_and_case_decides_where_it_can():
    corners = ("left_eye_left", "left_eye_right", "right_eye_left", "right_eye_right")
    assert coco._flip_pairs(corners) == ((0, 3), (1, 2))
    assert coco._flip_pairs(("left_a", "left_A", "right_A", "right_a")) == ((0, 3), (1, 2))


def test_pairs_may_be_stated(tmp_path):
    write(tmp_path)
    assert open_coco(tmp_path, flip_pairs=[(1, 2)]).info.flip_pairs == ((1, 2),)
    assert open_coco(tmp_path, flip_pairs=(1, 2)).info.flip_pairs == ((1, 2),)
    assert open_coco(tmp_path, flip_pairs=[]).info.flip_pairs == ()
    for wrong in ([(0, 3)], [(0, 1, 2)], (0, 1, 2)):
        with pytest.raises(ValueError, match="`flip_pairs` is"):
            open_coco(tmp_path, flip_pairs=wrong)  # pyright: ignore[reportArgumentType]


def test_numbers_that_float32_cannot_hold_where_they_mean_nothing(tmp_path):
    huge = [10**400, 1, 0, 3, 4, 2, 0, 0, 0]
    train = with_annotation(area=10**400, keypoints=huge)
    objects = open_coco(write(tmp_path, train)).train.objects(2)
    assert objects["area"][0] == 80  # the box's
    np.testing.assert_array_equal(objects["keypoints"][0], [[0, 0, 0], [3, 4, 2], [0, 0, 0]])


# -- what is refused -----------------------------------------------------------------------------------


def with_annotation(**changes):
    train = copy.deepcopy(TRAIN)
    train["annotations"][0].update(changes)
    return train


def changed(part, index, **changes):
    train = copy.deepcopy(TRAIN)
    train[part][index].update(changes)
    return train


@pytest.mark.parametrize(
    ("train", "message"),
    [
        (with_annotation(image_id=77), r"annotations of images that are not listed: 1 \(image 77\)$"),
        (with_annotation(bbox=[5, 5, 0, 4]), r"empty or inverted box: 1 \(image c.png\) \(width and height"),
        (with_annotation(bbox=[5, 5, 3, -4]), r"empty or inverted box: 1 \(image c.png\)"),
        (with_annotation(bbox=[5, float("nan"), 3, 4]), r"empty or inverted box: 1 \(image c.png\)"),
        (with_annotation(bbox=[24, 2, 3, 4]), r"a box outside their image: 1 \(image c.png\)$"),
        (with_annotation(bbox=[-3, 2, 3, 4]), r"a box outside their image: 1 \(image c.png\)$"),
        (with_annotation(bbox=[1, 2, 3]), r"bbox is not four numbers x, y, width, height: 1 \("),
        (with_annotation(bbox=[1, 2, 3, "4"]), "bbox is not four numbers"),
        (with_annotation(category_id=4), r"of an unknown category: 1 \("),
        (with_annotation(keypoints=[1, 2, 2]), r"keypoints are not 9 numbers, three for each .*: 1 \("),
        (with_annotation(bbox=[5, 10**400, 3, 4]), r"empty or inverted box: 1 \(.*and all four finite\)$"),
        (with_annotation(bbox=[5, 1e39, 3, 4]), r"empty or inverted box: 1 \(image c.png\)"),
        (with_annotation(bbox=[-float("inf"), 1, float("inf"), 4]), "empty or inverted box"),
        (with_annotation(bbox=[1e308, 1, 1e308, 4]), "empty or inverted box"),
        (with_annotation(bbox=[5, 5, 1e-9, 4]), r"empty or inverted box: 1 \(image c.png\)"),
        (with_annotation(bbox=[0, 0, 4, 1e-9]), r"empty or inverted box: 1 \(image c.png\)"),
        (with_annotation(keypoints=[10**400, 2, 2] * 3), "keypoints that are not x, y and 0, 1 or 2"),
        (with_annotation(keypoints=[1, 2, 10**400] * 3), "keypoints that are not x, y and 0, 1 or 2"),
        (
            changed("categories", 0, keypoints=["eye", "eye", "nose"]),
            r"cannot be used: keypoints that a category names twice: eye \(give each a name of its own\)$",
        ),
        (
            {**TRAIN, "categories": [{"id": 7, "name": "face"}, {"id": 3, "name": "mask"}]},
            r"annotations with keypoints: 1 \(.* \(the categories name no keypoints: add `keypoints`, the "
            r"list of their names, to a category\)$",
        ),
        (with_annotation(keypoints=[1, 2, 3] * 3), r"keypoints that are not x, y and 0, 1 or 2: 1 \("),
        (with_annotation(keypoints=[float("inf"), 2, 2] * 3), "keypoints that are not x, y and 0, 1 or 2"),
        (with_annotation(bbox=None), r"annotations \(counted from 0\) without a usable .*bbox: 0$"),
        (changed("images", 1, file_name="z.jpg"), r"images whose file is missing: .*train/z.jpg \(put"),
        *(
            (changed("images", 1, file_name=name), "images whose file_name leads out of their folder: ")
            for name in ("../val/v.png", "/etc/passwd", "deep/../../val.json", "a\0b", "")
        ),
        ("[" * 100_000, "train.json is nested too deeply to be read; expected annotations"),
        (changed("images", 1, id=50), "images whose id occurs twice: 50"),
        (changed("categories", 1, id=7), "categories whose id occurs twice: 7"),
        (
            changed("categories", 1, keypoints=["a"]),
            "categories with different keypoints, which must be the same: face, mask",
        ),
        ({**TRAIN, "annotations": TRAIN["annotations"][2:3]}, "no annotation but crowds: there is nothing"),
        ({**TRAIN, "annotations": []}, "no annotation but crowds"),
        ({**TRAIN, "images": [], "annotations": []}, "it has no images"),
        (
            {"images": [], "annotations": {}},
            "is not in COCO's format: it has no list annotations, categories",
        ),
        ([TRAIN], "is not in COCO's format: it has no list images, annotations, categories"),
        ("{'images': ", "train.json is not JSON: "),
        (
            changed("categories", 0, name="head"),
            "have different categories, .*head.* and .*face.*must be the",
        ),
        (changed("categories", 0, keypoints=["l", "r", "n"]), "have different keypoints, .*'n'"),
    ],
)
def test_what_cannot_be_used_is_refused_in_one_sentence(tmp_path, train, message):
    write(tmp_path, train)
    with pytest.raises(ValueError, match=message) as raised:
        open_coco(tmp_path)
    assert str(tmp_path / "train.json") in str(raised.value)
    assert "\n" not in str(raised.value)


def test_all_mistakes_are_told_at_once_and_only_the_first_are_named(tmp_path):
    train = copy.deepcopy(TRAIN)
    train["annotations"] += [annotation(10 + i, 50, box=(1, 1, 0, 0)) for i in range(5)]
    train["annotations"] += [annotation(20, 50, box=(90, 1, 2, 2))]
    with pytest.raises(
        ValueError,
        match=r"box: 10 \(image a.png\), 11 \(image a.png\), 12 \(image a.png\) and 2 more \(width.*"
        r"; annotations with a box outside their image: 20 \(image a.png\)$",
    ):
        open_coco(write(tmp_path, train))


def test_val_is_checked_too(tmp_path):
    val = copy.deepcopy(VAL)
    val["annotations"][0]["bbox"][2] = 0
    with pytest.raises(ValueError, match=r"val.json cannot be used: annotations with an empty or inverted"):
        open_coco(write(tmp_path, val=val))


def test_missing_files_and_folders(tmp_path):
    with pytest.raises(
        FileNotFoundError, match=r"no folder of the images of .*train.json: .*train or .*images"
    ):
        open_coco(tmp_path)
    (tmp_path / "images").mkdir()
    with pytest.raises(FileNotFoundError, match=r"there is no annotation file .*train.json; expected JSON"):
        open_coco(tmp_path)


def test_an_image_of_another_size_than_was_annotated(tmp_path):
    write(tmp_path)
    Image.fromarray(np.zeros((24, 20), np.uint8)).save(tmp_path / "train/a.png")
    source = open_coco(tmp_path)
    with pytest.raises(ValueError, match=r"a.png is 20 wide and 24 high, but .* for 24 by 20; use the image"):
        source.train[0]


def test_an_image_that_vanishes_is_named(tmp_path):
    source = open_coco(write(tmp_path))
    (tmp_path / "train/b.jpg").unlink()
    with pytest.raises(ValueError, match=r"cannot read image .*train/b.jpg \(No such file"):
        source.train[1]


def test_numbers_that_do_not_fit(tmp_path):
    write(tmp_path)
    with pytest.raises(ValueError, match="`sigmas` has 2 numbers, but there are 3 keypoints"):
        open_coco(tmp_path, sigmas=[0.1, 0.1])
    with pytest.raises(ValueError, match="`max_objects` is 0"):
        open_coco(tmp_path, max_objects=0)


ANY = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | st.text(max_size=4),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=3), inner, max_size=2),
    max_leaves=6,
)
FIELDS = [
    (part, name)
    for part, names in (
        ("images", ("id", "file_name", "width", "height")),
        ("annotations", ("image_id", "category_id", "bbox", "keypoints", "iscrowd", "area")),
        ("categories", ("id", "name", "keypoints")),
    )
    for name in names
]


@given(changes=st.lists(st.tuples(st.sampled_from(FIELDS), ANY), min_size=1, max_size=2))
@settings(max_examples=200, deadline=None)
def test_whatever_stands_in_an_entry(changes, tmp_path_factory):
    """The data set is opened, or refused in a sentence that names the file."""
    root = tmp_path_factory.getbasetemp() / "any"
    if not root.exists():
        root.mkdir()
        write(root)
    train = copy.deepcopy(TRAIN)
    for (part, name), value in changes:
        train[part][0][name] = value
    (root / "train.json").write_text(json.dumps(train))
    try:
        source = open_coco(root)
        assert source.train[0]["image"].dtype == np.uint8
    except ValueError as error:
        if str(root) not in str(error):
            raise
