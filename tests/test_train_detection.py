"""The trainer on detection: search, scales, RepOpt, evaluation, deployment, prediction, and every mistake on
the way."""

import dataclasses
import io
import json
import shlex
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiers
from networks import TINY_DETECTOR
from PIL import Image

from repopt_jax import Scales, cli, data, deploy, load_scales, models, save_scales, train
from repopt_jax.cli.commands import command_after_search
from repopt_jax.cli.config import read_config
from repopt_jax.data.pipeline import subset
from repopt_jax.data.transforms import normalise
from repopt_jax.detection import Detections
from repopt_jax.report import gallery, quickstart, records
from repopt_jax.train import build
from repopt_jax.train.state import make_mesh

models.register(models.Entry("fcos-tiny", models.FCOS, TINY_DETECTOR, task="detect"))


def tiny(mode="", scales="", **changes) -> train.Config:
    """Two epochs of two steps on scenes of 32 pixels."""
    config = train.Config(name="tiny", task="detect", epochs=2, batch_size=4, eval_batch_size=4, log_every=1)
    config.scales = str(scales)
    config.model = train.ModelConfig(
        name="fcos-tiny", mode=mode or ("repopt" if scales else "plain"), activation="relu6"
    )
    config.data = train.DataConfig(source="scenes", image_size=32, scenes=(8, 6))
    config.optim = train.OptimConfig(learning_rate=0.01, clip_norm=5.0)
    for name, value in changes.items():
        owner, _, field = name.rpartition("__")
        setattr(getattr(config, owner) if owner else config, field, value)
    return config


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A search and a RepOpt run with what it found, finished."""
    folder = tmp_path_factory.mktemp("runs")
    train.run(tiny("search"), folder / "search", progress=False)
    train.run(tiny(scales=folder / "search" / "scales"), folder / "repopt", progress=False)
    return folder


@pytest.mark.once
def test_search_finds_scales_of_the_layers_that_the_network_declares(runs):
    scales = load_scales(runs / "search" / "scales")
    plain = build.make_task(tiny()).new_model(data.open_scenes(num_train=1, num_eval=1).info, seed=0)
    assert scales.branch_sets == plain.branch_sets()
    assert scales.metadata.architecture == "tiny/relu6"
    assert any(path.startswith("head/keypoint_tower") for path in scales.entries)
    started = Scales.ones(scales.branch_sets)
    assert any(
        not np.allclose(v, u) for v, u in zip(jax.tree.leaves(scales), jax.tree.leaves(started), strict=True)
    )


def test_the_records_hold_every_part_of_the_loss_and_every_metric(runs):
    run = records.read_run(runs / "repopt")
    line = run.of_kind("train")[0]
    parts = [line[f"{part}_loss"] for part in ("classes", "boxes", "centerness", "keypoints")]
    assert line["loss"] == pytest.approx(sum(parts), rel=1e-5)
    assert run.summary["test"].keys() == {"ap50", "ap", "keypoint_ap50", "keypoint_ap"}
    assert run.summary["test_count"] == 6
    assert run.summary["test_accuracy"] is None


def test_evaluation_does_not_depend_on_batches(runs):
    trained = build.load_trained(runs / "repopt")
    found = [
        deploy.evaluate(trained._replace(config=dataclasses.replace(trained.config, eval_batch_size=size)))
        for size in (1, 4)
    ]
    assert found[0] == found[1]
    assert found[0]["count"] == 6


# In the ordinary run `test_resume.py` goes on with runs, and `test_data_detection.py` with scenes.
@pytest.mark.long
def test_an_interrupted_run_continues_to_the_same_state(runs, tmp_path):
    steps = iter([False, True])
    config = tiny(scales=runs / "search" / "scales", checkpoint_every=2)
    assert not train.run(config, tmp_path / "run", progress=False, stop=lambda: next(steps)).finished
    train.run(config, tmp_path / "run", progress=False)
    whole, resumed = (build.load_trained(folder).model for folder in (runs / "repopt", tmp_path / "run"))
    for a, b in zip(jax.tree.leaves(whole), jax.tree.leaves(resumed), strict=True):
        np.testing.assert_array_equal(a, b)


# float32; measured 2e-6 at most.
DEPLOYED = 1e-4


@pytest.mark.parametrize("mode", tiers.often(["repopt", "search", "repvgg", "dbb"], "search"))
def test_every_mode_trains_and_deploys_to_the_same_outputs(runs, tmp_path, mode):
    run = {"search": runs / "search", "repopt": runs / "repopt"}.get(mode, tmp_path / "run")
    if not run.exists():
        train.run(tiny(mode), run, progress=False)
    done = deploy.deploy(run, tmp_path / "deployed")
    assert done.max_abs < DEPLOYED
    assert done.agreement == 1
    assert done.test.keys() == {"ap50", "ap", "keypoint_ap50", "keypoint_ap"}
    plain = deploy.load_deployed(tmp_path / "deployed")
    image = jnp.asarray(np.random.default_rng(0).normal(size=(2, 32, 32, 1)), jnp.float32)
    trained = build.load_trained(run).model
    for a, b in zip(trained(image), plain.model(image), strict=True):
        np.testing.assert_allclose(a, b, atol=DEPLOYED)


# In the ordinary run `test_detection_model.py` has this of a detector, and `test_cli.py` of a config.
@pytest.mark.long
def test_the_training_is_that_of_the_network_with_branches(runs):
    """What the trainer does, clipping and decay included, in float64 against the CSLA network."""
    check = build.config_check(tiny(scales=runs / "search" / "scales", batch_size=2, optim__clip_norm=0.5))
    result = check.run(steps=3)
    assert result.equivalent, result.reasons
    assert result.max_difference < 1e-10


def test_predict_draws_on_an_image_of_any_size(runs, tmp_path, capsys):
    scene = data.open_scenes(num_train=1, num_eval=1, size=48).eval[0]["image"]
    wide = np.pad(scene, ((0, 0), (0, 30), (0, 0)))
    Image.fromarray(wide[..., 0]).save(tmp_path / "in.png")
    trained = build.load_trained(runs / "repopt")
    found = gallery.predict(trained, tmp_path / "in.png", tmp_path / "out.png", threshold=0.05)
    assert found
    scores = [one.score for one in found]
    assert scores == sorted(scores, reverse=True)
    boxes = np.array([one.box for one in found])
    assert boxes.min() >= 0
    # The square that the network sees is 78 pixels of the image each way, of which 48 are the image's height.
    assert boxes[:, [0, 2]].max() <= 78
    assert boxes[:, [1, 3]].max() <= 48
    assert (boxes[:, 2:] > boxes[:, :2]).all()
    assert len(found[0].keypoints) == 5
    with Image.open(tmp_path / "out.png") as after:
        drawn = np.asarray(after.convert("RGB"))
    zoom = drawn.shape[0] // wide.shape[0]
    assert drawn.shape[:2] == (zoom * wide.shape[0], zoom * wide.shape[1])
    assert (drawn.max(-1) != drawn.min(-1)).any(), "nothing in colour"

    command = ["predict", str(tmp_path / "in.png"), f"--run={runs / 'repopt'}", "--threshold=0.05"]
    assert cli.main(command) == 0
    assert (tmp_path / "in-detected.png").is_file()
    assert f"{len(found)} found" in capsys.readouterr().out


def test_boxes_are_cut_at_the_image_and_those_in_the_padding_left_out():
    """An image 40 wide and 20 high in a square of 20: its lower half is padding."""
    boxes = np.array([[[2, 4, 9, 18], [3, 12, 8, 16], [1, 1, 5, 5], [0, 0, 20, 9]]], np.float32)
    scores, classes = np.array([[0.9, 0.8, 0.7, 0.3]]), np.array([[0, 1, 2, 0]])
    found = Detections(boxes, scores, classes, np.full((1, 4, 1, 2), 6, np.float32))
    objects = gallery._objects(found, 0, 0.5, 0.5, (20, 40, 1))
    np.testing.assert_array_equal(objects["boxes"], [[4, 8, 18, 20], [2, 2, 10, 10]])
    np.testing.assert_array_equal(objects["classes"], [0, 2])
    np.testing.assert_array_equal(objects["keypoints"], np.full((2, 1, 2), 12))


def test_large_images_are_shrunk_with_their_objects_and_small_ones_left():
    image = np.zeros((256, 1024, 1), np.uint8)
    objects = {"boxes": np.array([[100.0, 40, 400, 200]]), "keypoints": np.array([[[100.0, 40, 1]]])}
    small, scaled = gallery._shrunk(image, objects)
    assert small.shape == (64, gallery.SIDE, 1)
    np.testing.assert_array_equal(scaled["boxes"], [[25, 10, 100, 50]])
    np.testing.assert_array_equal(scaled["keypoints"], [[[25, 10, 1]]])
    assert gallery._shrunk(small, scaled) == (small, scaled)


def test_gallery_has_the_images_asked_for_in_columns(runs, monkeypatch):
    """Of 32 pixels each, drawn 8 times as large; compiled once."""
    trained = build.load_trained(runs / "repopt")
    made = []
    make_detect = gallery.make_detect
    monkeypatch.setattr(gallery, "make_detect", lambda *a: made.append(a) or make_detect(*a))
    monkeypatch.setattr(gallery, "COLUMNS", 4)
    side, gap = 256, 6
    for annotated, count, columns, rows in ((False, 5, 4, 2), (True, 3, 3, 1), (True, 99, 4, 2)):
        with Image.open(io.BytesIO(gallery.gallery(trained, count=count, annotated=annotated))) as sheet:
            assert sheet.size == (columns * (side + gap) - gap, rows * (side + gap) - gap)
    assert len(made) == 1


def test_annotations_are_drawn_with_their_visibility(runs, monkeypatch):
    drawn = []
    draw = gallery.draw_detections
    monkeypatch.setattr(gallery, "draw_detections", lambda *a, **k: drawn.append(k) or draw(*a, **k))
    gallery.gallery(build.load_trained(runs / "repopt"), count=1, annotated=True)
    assert drawn[0]["keypoints"].shape[1:] == (5, 3)
    assert drawn[0]["scores"] is None


@pytest.mark.parametrize("threshold", [0, 0.049, 1.01, float("nan")])
def test_predict_refuses_scores_that_the_network_does_not_give(runs, tmp_path, capsys, threshold):
    Image.new("L", (32, 32)).save(tmp_path / "in.png")
    command = ["predict", str(tmp_path / "in.png"), f"--run={runs / 'repopt'}", f"--threshold={threshold}"]
    assert cli.main(command) == 1
    said = capsys.readouterr().err
    assert f"`threshold` is {threshold:g}; it must be between 0.05" in said
    assert said.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["in.png"]


def test_the_command_after_a_search_leaves_a_detector_clipped():
    command = command_after_search(tiny("search"), Path("out"), "scenes:search", ())
    assert "--config.scales=out/scales" in command
    assert "clip_norm" not in command
    assert "clip_norm=None" in command_after_search(train.Config(), Path("out"), "x", ())


def test_the_command_after_a_search_can_run(tmp_path):
    """Without what is only for searches, whether a file or the command line has set it."""
    overrides = ("--config.freeze_scales=0.5", "--config.published=0.9", "--config.optim.clip_norm=2")
    config = read_config("digits:search,smoke", overrides)
    command = command_after_search(config, tmp_path, "digits:search,smoke", overrides)
    words = shlex.split(command)
    assert words[:3] == ["repopt", "train", "--config=digits:search,smoke"]
    (tmp_path / "scales").mkdir()
    after = read_config("digits:search,smoke", [word for word in words if word.startswith("--config.")])
    train.validate(after)
    assert (after.model.mode, after.freeze_scales, after.published) == ("repopt", None, None)


def test_deploying_a_detector_is_told_by_locations(runs, tmp_path, capsys):
    command = ["deploy", f"--run={runs / 'repopt'}", f"--out={tmp_path / 'deployed'}"]
    assert cli.main(command) == 0
    assert "the same class for 100.00% of the locations of 6 test images" in capsys.readouterr().out
    assert cli.main(command) == 0
    assert "Already deployed" in capsys.readouterr().out
    path = tmp_path / "deployed" / "deploy.json"
    record = json.loads(path.read_text())
    record["config"]["seed"] = 7
    path.write_text(json.dumps(record))
    assert cli.main(command) == 1
    assert "it differs in config" in capsys.readouterr().err


@pytest.mark.long
def test_quickstart_of_a_detector(tmp_path):
    # RepVGG's way is left out: its training is tested above, and takes long to compile.
    comparison = quickstart.comparison_of(tiny(epochs=1, eval_every=1)).of(["plain", "repopt"])
    done = quickstart.quickstart(comparison, tmp_path, count=0)
    assert done.equivalence["equivalent"]
    assert done.equivalence["max_difference"] < 1e-10 < done.equivalence["wrong_order_difference"]
    assert done.deployed.keys() == {"plain", "repopt", "search"}
    assert all(deployed["max_abs"] < DEPLOYED for deployed in done.deployed.values())
    content = json.loads((tmp_path / "report.json").read_text())
    assert content["task"] == "detect"
    assert [row["label"] for row in content["rows"]][:2] == ["plain SGD", "RepOpt, searched scales"]
    html = done.page.read_text()
    for text in ("keypoint AP50 (%)", "What the networks find", "as they are annotated"):
        assert text in html
    assert "keypoint AP50" in "\n".join(quickstart.summary_lines(done.results))


def write_coco(folder, source):
    """The images and objects of `source` in COCO's format."""
    info = source.info
    for split, examples in (("train", source.train), ("val", source.eval)):
        (folder / split).mkdir(parents=True)
        truth = {"images": [], "annotations": [], "categories": []}
        names = list(info.keypoint_names)
        truth["categories"] = [
            {"id": 7 + c, "name": n, "keypoints": names} for c, n in enumerate(info.class_names)
        ]
        for i, example in enumerate(examples):
            height, width, _ = example["image"].shape
            Image.fromarray(example["image"][..., 0]).save(folder / split / f"{i}.png")
            truth["images"].append({"id": i, "file_name": f"{i}.png", "height": height, "width": width})
            for box, c, points in zip(example["boxes"], example["classes"], example["keypoints"]):
                x, y, right, bottom = box.tolist()
                truth["annotations"].append(
                    {
                        "id": len(truth["annotations"]) + 1,
                        "image_id": i,
                        "category_id": 7 + int(c),
                        "bbox": [x, y, right - x, bottom - y],
                        "area": (right - x) * (bottom - y),
                        "iscrowd": 0,
                        "keypoints": points.ravel().tolist(),
                        "num_keypoints": len(points),
                    }
                )
        (folder / f"{split}.json").write_text(json.dumps(truth))


@pytest.mark.once
def test_the_same_scenes_as_a_coco_folder_train_to_the_same_network(runs, tmp_path):
    source, _ = build.open_data(tiny())
    write_coco(tmp_path / "coco", source)
    folder = {"data__source": "coco", "data__data_dir": str(tmp_path / "coco"), "data__scenes": (4096, 256)}
    constants = {"data__max_objects": source.info.max_objects, "data__sigmas": source.info.sigmas}
    config = tiny(scales=runs / "search" / "scales", **folder, **constants)
    train.run(config, tmp_path / "run", progress=False)
    there, here = (records.read_run(run) for run in (runs / "repopt", tmp_path / "run"))
    for a, b in zip(there.of_kind("train"), here.of_kind("train"), strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-4)
    assert here.summary["test"] == pytest.approx(there.summary["test"], abs=0.02)


@pytest.fixture(scope="module")
def larger_scenes(tmp_path_factory):
    """A config whose 6 test images have 48 pixels where the network sees 32."""
    source = data.open_scenes(num_train=4, num_eval=6, size=48)
    folder = tmp_path_factory.mktemp("larger") / "coco"
    write_coco(folder, source)
    constants = {"data__max_objects": source.info.max_objects, "data__sigmas": source.info.sigmas}
    return tiny(data__source="coco", data__data_dir=str(folder), data__scenes=(4096, 256), **constants)


def truth_of(source, transform, shift):
    """Like `make_detect`, but knows the images by their pixels: finds what is to be found on the image
    `shift` places further on."""
    examples = [source.eval[i] for i in range(len(source.eval))]
    fitted = [data.letterbox(example["image"], transform.image_size) for example in examples]
    pictures = [normalise(image[None], transform.pixels)[0] for image, _ in fitted]
    most = max(len(example["classes"]) for example in examples)

    def detect(_params, _rest, images):
        shape = (len(images), most)
        found = Detections(
            np.zeros((*shape, 4)), np.ones(shape), np.full(shape, -1), np.zeros((*shape, 5, 2))
        )
        for row, image in enumerate(np.asarray(images)):
            for i, picture in enumerate(pictures):
                if np.array_equal(image, picture):
                    j = (i + shift) % len(examples)
                    objects, ratio, n = examples[j], fitted[j][1], len(examples[j]["classes"])
                    found.boxes[row, :n] = objects["boxes"] * ratio
                    found.classes[row, :n] = objects["classes"]
                    found.keypoints[row, :n] = objects["keypoints"][..., :2] * ratio
        return found

    return detect


@pytest.mark.parametrize("batch_size", [1, 4])
def test_a_network_that_finds_the_truth_is_measured_as_perfect(larger_scenes, monkeypatch, batch_size):
    task = build.make_task(larger_scenes)
    source, transform = task.open_data(larger_scenes.data)
    batches = task.eval_batches(
        source, transform, batch_size=batch_size, process_index=0, process_count=1, limit=None
    )
    for batch in batches:
        np.testing.assert_allclose(batch["ratio"][batch["mask"] > 0], 2 / 3, rtol=1e-6)
    measured = []
    for shift in (0, 1):
        found = truth_of(source, transform, shift)
        monkeypatch.setattr("repopt_jax.train.tasks.make_detect", lambda *_, found=found: found)
        evaluate = task.make_evaluator(None, source, make_mesh(devices=jax.local_devices()[:1]))
        measured.append(evaluate(None, None, batches))
    right, shifted = measured
    assert (right["ap50"], right["keypoint_ap50"], right["count"]) == (1, 1, 6)
    # Everything in place, on the wrong image.
    assert shifted["ap50"] < 0.3
    assert shifted["keypoint_ap50"] < 0.3


def test_test_images_without_objects_are_refused_before_training(larger_scenes, tmp_path):
    """Those that are evaluated have no object, the others have."""
    folder = shutil.copytree(larger_scenes.data.data_dir, tmp_path / "coco")
    used = subset(6, 4, "eval").tolist()
    truth = json.loads((folder / "val.json").read_text())
    truth["annotations"] = [a for a in truth["annotations"] if a["image_id"] not in used]
    (folder / "val.json").write_text(json.dumps(truth))
    settings = dataclasses.replace(larger_scenes.data, data_dir=str(folder), eval_limit=4)
    config = dataclasses.replace(larger_scenes, data=settings)
    with pytest.raises(ValueError, match=r"no object is to be found on the 4 test .*`data.eval_limit`"):
        train.run(config, tmp_path / "run", progress=False)
    assert not (tmp_path / "run").exists()


def test_an_annotation_of_no_image_is_told_in_a_sentence(tmp_path, capsys):
    source, _ = build.open_data(tiny())
    write_coco(tmp_path / "coco", source)
    path = tmp_path / "coco" / "train.json"
    truth = json.loads(path.read_text())
    truth["annotations"][0]["image_id"] = 999
    truth["annotations"][1]["bbox"][2] = 0
    path.write_text(json.dumps(truth))
    command = ["train", "--config=scenes:plain", "--config.data.source=coco"]
    command += [f"--config.data.data_dir={tmp_path / 'coco'}", f"--out={tmp_path / 'run'}"]
    assert cli.main(command) == 1
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert "999" in said
    assert "train.json" in said


MISTAKES = {
    "mode": ({"model__mode": "hyper-search"}, "`model.mode`='hyper-search' must be one of"),
    "name": ({"model__name": "vgg-digits"}, "`model.name`='vgg-digits' must be one of"),
    "source": ({"data__source": "folder"}, "`data.source`='folder' must be one of scenes, coco"),
    "activation": ({"model__activation": "relu7"}, r"`model.activation`='relu7' .*did you mean 'relu'"),
    "classifier's": ({"optim__label_smoothing": 0.1}, "`optim.label_smoothing`=0.1 does nothing with `task`"),
    "no folder": ({"data__source": "coco", "data__scenes": (4096, 256)}, "`data.data_dir` is empty"),
    "detector's": ({"task": "classify", "model__name": "vgg-digits", "data__source": "digits",
                    "detect__radius": 2.0}, "`detect.radius`=2.0 does nothing with `task`='classify'"),
    "task": ({"task": "detection"}, r"`task`='detection' must be one of classify, detect \(did you mean"),
}  # fmt: skip


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_in_a_config(tmp_path, mistake):
    changes, message = MISTAKES[mistake]
    with pytest.raises(ValueError, match=message):
        train.run(tiny(**changes), tmp_path / "run", progress=False)
    assert not (tmp_path / "run").exists()


def test_scales_of_another_activation_are_refused(runs, tmp_path):
    config = tiny(scales=runs / "search" / "scales", model__activation="relu")
    with pytest.raises(ValueError, match=r"were searched with relu6, and `model.activation` is 'relu'"):
        train.run(config, tmp_path / "run", progress=False)


def test_scales_that_lack_a_layer_are_refused(runs, tmp_path):
    scales = load_scales(runs / "search" / "scales")
    path = "head/box_tower/0/conv/kernel"
    entries = {name: entry for name, entry in scales.entries.items() if name != path}
    save_scales(tmp_path / "scales", dataclasses.replace(scales, entries=entries))
    with pytest.raises(ValueError, match=rf"do not fit the model: 1 missing layers: {path}"):
        train.run(tiny(scales=tmp_path / "scales"), tmp_path / "run", progress=False)


def test_predict_refuses_what_it_cannot_draw(runs, tmp_path, capsys):
    trained = build.load_trained(runs / "repopt")
    with pytest.raises(FileNotFoundError, match="no image"):
        gallery.predict(trained, tmp_path / "none.png", tmp_path / "out.png")
    (tmp_path / "text.png").write_text("no image")
    with pytest.raises(ValueError, match="not an image in a known format"):
        gallery.predict(trained, tmp_path / "text.png", tmp_path / "out.png")
    Image.new("L", (32, 32)).save(tmp_path / "in.png")
    with pytest.raises(ValueError, match=r"use a name that ends in \.png"):
        gallery.predict(trained, tmp_path / "in.png", tmp_path / "out.xyz")
    assert cli.main(["predict", f"--run={runs / 'repopt'}"]) == 2
    assert "required: IMAGE" in capsys.readouterr().err


def test_the_shipped_config_names_the_modes(capsys):
    assert train.load_config("scenes:repvgg").model.mode == "repvgg"
    assert train.load_config("scenes:repopt").scales == "runs/scenes/search/scales"
    with pytest.raises(ValueError, match="search"):
        train.load_config("scenes:hyper-search")
