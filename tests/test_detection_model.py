"""The detector: counts, geometry, the shared head against one call a level, and its way through surgery."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiers
from flax import nnx
from networks import (
    abstract,
    conv_by_hand,
    made_ready,
    norm_by_hand,
    parameter_shapes,
    random_input,
    randomised,
    relative,
)
from networks import run as run_model

from repopt_jax import extract_scales, fuse, load_scales, save_scales, verify_equivalence
from repopt_jax.core.scales import Scales
from repopt_jax.detection import LossWeights, detection_loss
from repopt_jax.models import BACKBONES, DETECTORS, FCOS, BackboneVariant, DetectorVariant, EfficientRep
from repopt_jax.models.efficientrep import SimSPPF, backbone_specs
from repopt_jax.models.fcos import FPN, MAX_LOG_DISTANCE, PRIOR, FCOSHead
from repopt_jax.models.mosaic import Mosaic
from repopt_jax.nn import ACTIVATIONS, Block, Branched, Merged
from repopt_jax.surgery.layers import find_branches
from repopt_jax.surgery.modules import named_modules

EXACT = 1e-12  # of the largest output, float64; measured: 2e-15 at most
WRONG = 1e-3  # of the largest output: what a mistake exceeds; measured: 0.02 at least

# Two of the backbone's maps, three levels: strides 16, 32 and 64.
TINY = DetectorVariant("tiny", BackboneVariant("tiny", (2, 3, 4, 4, 5), (0, 0, 1, 1)), 4, 2, 3, 2)
# One map, two levels, every width the same but the last: little to compile.
SMALL = DetectorVariant("small", BackboneVariant("small", (2, 2, 2, 2, 3), (0, 0, 0, 1)), 3, 1, 2, 1)
SIZE = (80, 50)  # not a multiple of any stride
MAPS = ((5, 4), (3, 2), (2, 1))


def tiny(variant=TINY, mode="plain", **options):
    """The shapes of a detector, ready for a way of training."""
    options = {"num_classes": 3, "num_keypoints": 2, "in_channels": 1, "activation": "relu6"} | options
    return made_ready(FCOS, mode, variant, **options)


# Backbones


@pytest.mark.parametrize(
    ("name", "factor", "elements"), [("N", 1, 9_152), ("T", 1.5, 13_728), ("S", 2, 18_304)]
)
def test_yolov6_backbones_have_its_blocks_and_scales(name, factor, elements):
    variant = BACKBONES[f"efficientrep-{name}"]
    model = abstract(EfficientRep, variant)
    specs = list(backbone_specs(variant))
    assert [sum(s.stage == stage for s in specs) for stage in range(5)] == [1, 3, 5, 7, 3]
    sets = model.branch_sets()
    assert sum("identity" in branches.names for branches in sets.values()) == 2 + 4 + 6 + 2
    searched = sum(branches.out * len(branches.names) for branches in sets.values())
    # YOLOv6 also searches its neck: 4 blocks at each of 4 places, two of which begin by changing the width.
    neck = sum((12 - changes) * width * factor for width, changes in ((64, 1), (32, 1), (64, 0), (128, 0)))
    assert searched + neck == elements


def test_the_face_detector_is_the_one_asked_for():
    variant = DETECTORS["face"]
    model = abstract(FCOS, variant, num_classes=1, num_keypoints=5, activation="relu6")
    specs = list(backbone_specs(variant.backbone))
    widths = [next(s.outputs for s in specs if s.stage == stage) for stage in range(5)]
    assert widths == [32, 64, 128, 192, 384]
    # A block that halves the map, then the repeats; of stage 0 it is the one.
    assert [sum(s.stage == stage for s in specs) for stage in range(5)] == [1, 4, 4, 5, 4]
    assert variant.strides == (8, 16, 32, 64, 128)
    shapes = parameter_shapes(model)
    assert shapes["pyramid/extras/0/kernel"] == (3, 3, 384, 96)
    assert {shape[-1] for path, shape in shapes.items() if path.startswith("pyramid/")} == {96}
    assert shapes["head/box_scale"] == shapes["head/keypoint_scale"] == (5,)
    outputs = nnx.eval_shape(lambda model, x: model(x), model, jnp.zeros((2, 640, 480, 3)))
    count = sum((640 // s) * -(-480 // s) for s in variant.strides)
    assert [part.shape for part in outputs] == [(2, count, 1), (2, count, 4), (2, count), (2, count, 5, 2)]


@pytest.mark.parametrize("name", tiers.often(DETECTORS, "face", "efficientrep-N", "scenes"))
def test_locations_are_those_of_the_outputs_at_odd_sizes(name):
    model = abstract(FCOS, DETECTORS[name], num_classes=2, in_channels=1)
    for size in ((65, 130), (31, 97)):
        outputs = nnx.eval_shape(lambda model, x: model(x), model, jnp.zeros((1, *size, 1)))
        points, strides, levels = model.locations(size)
        assert outputs.classes.shape[:2] == outputs.keypoints.shape[:2] == (1, len(points))
        assert outputs.keypoints.shape[2:] == (0, 2)
        assert strides.tolist() == [DETECTORS[name].strides[level] for level in levels]
        np.testing.assert_array_equal(points % strides[:, None], np.stack([strides / 2] * 2, -1))
        # Row by row, x first, inside the image but for half a stride.
        assert (np.diff(levels) >= 0).all()
        assert (np.diff(points[levels == 0, 0]) > 0).sum() > len(points) / 2
        assert (points < np.array(size[::-1]) + strides[:, None] / 2).all()


def test_locations_of_two_levels_by_hand():
    points, strides, levels = tiny().locations((40, 50))
    first = [[8, 8], [24, 8], [40, 8], [56, 8], [8, 24], [24, 24], [40, 24], [56, 24]]
    np.testing.assert_array_equal(points[:8], first)
    np.testing.assert_array_equal(points[levels == 1], [[16, 16], [48, 16], [16, 48], [48, 48]])
    np.testing.assert_array_equal(points[levels == 2], [[32, 32]])
    np.testing.assert_array_equal(np.unique(strides), [16, 32, 64])
    np.testing.assert_array_equal(tiny().locations(64).points, tiny().locations((64, 64)).points)


def activated_by_hand(block, x):
    y = norm_by_hand(conv_by_hand(x, block.conv.kernel[...], stride=block.conv.strides), block.bn)
    if block.activation == "gelu":
        return y * (1 + np.vectorize(math.erf)(y / math.sqrt(2))) / 2
    bounds = {"none": (None, None), "relu": (0, None), "relu6": (0, 6)}
    return np.clip(y, *bounds[block.activation])


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_pooling_pyramid_against_loops(x64, activation):
    layer = randomised(abstract(SimSPPF, 6, activation=activation))
    x = 3 * random_input(2, 7, 5, 6)
    maps = [activated_by_hand(layer.cv1, x)]
    for _ in range(3):
        y = np.empty_like(maps[-1])
        for i in range(7):
            for j in range(5):
                y[:, i, j] = maps[-1][:, max(i - 2, 0) : i + 3, max(j - 2, 0) : j + 3].max((1, 2))
        maps.append(y)
    expected = activated_by_hand(layer.cv2, np.concatenate(maps, -1))
    assert relative(run_model(layer, jnp.asarray(x)), expected) < EXACT


def test_relu6_is_cut_at_6(x64):
    x = jnp.array([-1.0, 3.0, 9.0])
    assert ACTIVATIONS["relu6"](x).tolist() == [0, 3, 6]
    assert ACTIVATIONS["relu"](x).tolist() == [0, 3, 9]
    assert ACTIVATIONS["none"](x).tolist() == [-1, 3, 9]


def test_backbone_against_loops(x64):
    variant = BackboneVariant("net", (2, 3, 3, 4, 4), (1, 0, 1, 0), sppf=True)
    model = randomised(abstract(EfficientRep, variant, in_channels=2, activation="relu6"))
    x = random_input(1, 37, 22, 2)
    maps = run_model(model, jnp.asarray(x))
    assert [y.shape for y in maps] == [(1, 10, 6, 3), (1, 5, 3, 3), (1, 3, 2, 4), (1, 2, 1, 4)]
    expected = []
    for stage in model.stages:
        for block in stage:
            x = activated_by_hand(block, x)
        expected.append(x)
    assert isinstance(model.sppf, SimSPPF)
    expected[-1] = model.sppf(jnp.asarray(expected[-1]))  # its own test is above
    assert max(relative(one, other) for one, other in zip(maps, expected[1:], strict=True)) < EXACT


# Pyramid


def test_pyramid_against_loops(x64):
    pyramid = randomised(abstract(FPN, (2, 3, 4), 5, levels=5))
    maps = [random_input(2, *size, width) for size, width in zip(((9, 7), (5, 4), (3, 2)), (2, 3, 4))]

    def layer(module, x):
        return conv_by_hand(x, module.kernel[...], stride=module.strides, bias=module.bias[...])

    merged = [layer(lateral, x) for lateral, x in zip(pyramid.laterals, maps)]
    for i in (1, 0):
        for row in range(maps[i].shape[1]):
            for column in range(maps[i].shape[2]):
                merged[i][:, row, column] += merged[i + 1][:, row // 2, column // 2]
    expected = [layer(output, x) for output, x in zip(pyramid.outputs, merged)]
    expected.append(layer(pyramid.extras[0], maps[2]))
    expected.append(layer(pyramid.extras[1], np.maximum(expected[3], 0)))
    got = run_model(pyramid, [jnp.asarray(x) for x in maps])
    assert [x.shape[1:3] for x in got] == [(9, 7), (5, 4), (3, 2), (2, 1), (1, 1)]
    assert max(relative(one, other) for one, other in zip(got, expected, strict=True)) < EXACT


# Head


@pytest.mark.parametrize("sizes", [[(4, 6)], [(5, 4), (3, 2), (2, 1)], [(2, 2), (2, 5), (1, 1), (3, 1)]])
def test_a_mosaic_keeps_maps_apart(x64, sizes):
    mosaic = Mosaic(sizes)
    maps = [jnp.asarray(random_input(2, *size, 3)) + n for n, size in enumerate(sizes)]
    packed = mosaic.pack(maps)
    assert packed.shape == (2, *mosaic.shape, 3)
    assert mosaic.inside.sum() == len(mosaic.levels) == sum(h * w for h, w in sizes)
    np.testing.assert_array_equal(packed, mosaic.clear(packed))  # zeros between
    expected = np.concatenate([x.reshape(2, -1, 3) for x in maps], axis=1)
    np.testing.assert_array_equal(mosaic.flat(packed), expected)
    kernels = random_input(2, 3, 3, 3, 3)

    def blurred(x, clear):
        y = conv_by_hand(clear(np.asarray(x)), kernels[0]) + 1
        return conv_by_hand(np.asarray(clear(y)), kernels[1])

    alone = np.concatenate([blurred(x, np.asarray).reshape(2, -1, 3) for x in maps], axis=1)
    assert relative(mosaic.flat(jnp.asarray(blurred(packed, mosaic.clear))), alone) < EXACT
    if len(sizes) > 1:
        assert relative(mosaic.flat(jnp.asarray(blurred(packed, np.asarray))), alone) > WRONG


@pytest.fixture(scope="module")
def detector():
    """A tiny detector in float64 with random statistics, an input and its outputs."""
    with jax.enable_x64(True):
        model = randomised(tiny())
        x = jnp.asarray(random_input(2, *SIZE, 1))
        return model, x, run_model(model, x)


@pytest.fixture(scope="module")
def trained():
    """The smallest detector, in float32 and in training mode."""
    model = randomised(tiny(SMALL), dtype=jnp.float32)
    model.train()
    return model


def head_by_hand(head, level, number):
    """The outputs of one level, by a call of its own."""

    def through(tower):
        x = np.asarray(level)
        for block in tower:
            x = activated_by_hand(block, x)
        return x

    def predicted(layer, x):
        y = conv_by_hand(x, layer.kernel[...], bias=layer.bias[...])
        return y.reshape(y.shape[0], -1, y.shape[-1])

    box = through(head.box_tower)
    keypoints = predicted(head.keypoints, through(head.keypoint_tower))
    keypoints = keypoints * float(head.keypoint_scale[number])
    distances = np.minimum(predicted(head.boxes, box) * float(head.box_scale[number]), MAX_LOG_DISTANCE)
    return (
        predicted(head.classes, through(head.class_tower)),
        np.exp(distances),
        predicted(head.centerness, box)[..., 0],
        keypoints.reshape(*keypoints.shape[:2], -1, 2),
    )


def test_the_shared_head_gives_each_level_what_a_call_of_its_own_would(x64, detector):
    model, x, outputs = detector
    levels = model.pyramid(model.backbone(x)[-2:])
    assert tuple(level.shape[1:3] for level in levels) == MAPS
    by_level = [head_by_hand(model.head, level, n) for n, level in enumerate(levels)]
    for got, parts in zip(outputs, zip(*by_level), strict=True):
        assert relative(got, np.concatenate(parts, axis=1)) < EXACT
    swapped = [head_by_hand(model.head, level, 2 - n) for n, level in enumerate(levels)]
    for n in (1, 3):  # factors of another level
        assert relative(np.concatenate([s[n] for s in swapped], axis=1), outputs[n]) > WRONG


def test_one_set_of_towers_for_all_levels():
    paths = [path for path, _ in named_modules(tiny()) if "tower" in path and path.endswith("conv")]
    towers = ("box", "class", "keypoint")
    assert paths == [f"head/{tower}_tower/{i}/conv" for tower in towers for i in range(2)]


def test_at_first_every_location_gives_every_class_a_hundredth():
    head = FCOSHead(8, 0, 2, num_classes=3, num_keypoints=2, rngs=nnx.Rngs(0))
    levels = [jnp.asarray(random_input(2, *size, 8), jnp.float32) for size in ((4, 5), (2, 3))]
    outputs = run_model(head, levels)
    np.testing.assert_allclose(nnx.sigmoid(outputs.classes), PRIOR, rtol=0.4)
    np.testing.assert_allclose(outputs.boxes, 1, atol=0.4)
    assert {part.dtype for part in outputs} == {jnp.dtype(jnp.float32)}


def test_distances_stay_finite(x64, detector):
    model, x, _ = detector
    model = nnx.clone(model)
    model.head.box_scale[...] = jnp.full((3,), 1e6)
    boxes = run_model(model, x).boxes
    assert np.isfinite(boxes).all()
    assert boxes.max() == pytest.approx(np.exp(MAX_LOG_DISTANCE))


# Surgery and training


@pytest.mark.parametrize("name", [*DETECTORS, "tiny"])
@pytest.mark.parametrize("keypoints", [0, 5])
def test_the_layers_that_can_be_re_parameterized_are_the_3x3_blocks(name, keypoints):
    variant = TINY if name == "tiny" else DETECTORS[name]
    model = tiny(variant, num_keypoints=keypoints)
    declared = model.branch_sets()
    assert find_branches(model) == declared
    blocks = sum(1 for _ in backbone_specs(variant.backbone))
    assert len(declared) == blocks + variant.tower * (3 if keypoints else 2)
    # All blocks but the pooling pyramid's, which are 1x1.
    blocks = {
        f"{path}/conv/kernel"
        for path, module in named_modules(model)
        if isinstance(module, Block) and "sppf" not in path
    }
    assert set(declared) == blocks
    assert find_branches(model.backbone) == model.backbone.branch_sets()


def batch_of(seed=0):
    rng = np.random.default_rng(seed)
    centre, half = rng.uniform(15, 45, (2, 4, 1, 2)), rng.uniform(5, 30, (2, 4, 1, 2))
    keypoints = np.concatenate([centre + rng.normal(size=(2, 4, 2, 2)), np.full((2, 4, 2, 1), 2.0)], -1)
    return {
        "image": rng.normal(size=(2, *SIZE, 1)),
        "boxes": np.concatenate([centre - half, centre + half], -1)[:, :, 0],
        "classes": rng.integers(-1, 3, (2, 4)),
        "keypoints": keypoints,
    }


def loss_of(model, batch):
    return detection_loss(
        model(batch["image"]), batch, model.locations(SIZE), LossWeights(), level_range=2.0
    )[0]


@pytest.mark.once
def test_repopt_in_backbone_and_head_is_training_the_branches(trained):
    batches = [batch_of(seed) for seed in range(2)]
    scales = Scales.ones(trained.branch_sets())
    report = verify_equivalence(trained, scales, batches, loss=loss_of, rngs=nnx.Rngs(1))
    assert report.equivalent, report
    assert report.movement > WRONG


def test_every_parameter_learns_and_all_gradients_are_finite(trained):
    batch = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32 if x.dtype == float else jnp.int32), batch_of())
    gradients = nnx.jit(nnx.grad(loss_of))(nnx.clone(trained), batch)
    for path, gradient in jax.tree.leaves_with_path(nnx.to_pure_dict(gradients)):
        assert np.isfinite(gradient).all(), path
        assert float(jnp.abs(gradient).max()) > 0, path


@pytest.mark.parametrize("mode", [pytest.param("plain", marks=pytest.mark.long), "search", "repvgg"])
def test_every_mode_deploys_to_plain_convolutions(x64, mode):
    model = randomised(tiny(SMALL, mode))
    x = jnp.asarray(random_input(2, *SIZE, 1))
    deployed = fuse(model)
    kinds = {type(m) for _, m in named_modules(deployed)}
    assert kinds.isdisjoint({nnx.BatchNorm, Merged, Branched})
    for got, wanted in zip(run_model(deployed, x), run_model(model, x), strict=True):
        assert relative(got, wanted) < EXACT * 10
    assert {m.activation for _, m in named_modules(deployed) if isinstance(m, Block)} == {"relu6"}


def test_scales_of_a_search_fit_the_detector_and_a_missing_layer_is_named(trained, tmp_path):
    scales = extract_scales(randomised(tiny(SMALL, "search"), dtype=jnp.float32))
    assert scales.branch_sets == trained.branch_sets()
    save_scales(tmp_path / "whole", scales)
    assert list(load_scales(tmp_path / "whole", trained).entries) == list(scales.entries)
    lost = "head/box_tower/0/conv/kernel"
    save_scales(tmp_path / "part", Scales({p: e for p, e in scales.entries.items() if p != lost}))
    with pytest.raises(ValueError, match=lost):
        load_scales(tmp_path / "part", trained)


# Mistakes


def test_mistakes_are_told():
    with pytest.raises(ValueError, match="`activation` is 'swish': it must be one of relu, relu6"):
        tiny(activation="swish")
    with pytest.raises(ValueError, match="`num_classes` is 0"):
        tiny(num_classes=0)
    with pytest.raises(ValueError, match="`num_keypoints` is -1"):
        tiny(num_keypoints=-1)
    with pytest.raises(ValueError, match="`maps` of 'bad' is 5"):
        DetectorVariant("bad", TINY.backbone, 4, maps=5, levels=5, tower=1)
    with pytest.raises(ValueError, match="`levels` of 'bad' is 2, fewer than `maps`, 3"):
        DetectorVariant("bad", TINY.backbone, 4, maps=3, levels=2, tower=1)
