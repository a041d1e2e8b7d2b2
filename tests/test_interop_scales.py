"""Scales of PyTorch searches: the authors' files, whole checkpoints and pickled detectors land on the right
paths, with the published multipliers, and what does not fit is refused by name.

The released files are read from the folder in REPOPT_TEST_DATA, where there is one; files of the same layout
with random values stand in for them everywhere.
"""

import functools
import importlib
import os
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from torch_pickles import legacy_bytes, module, zip_bytes

from repopt_jax import (
    BranchSet,
    Identity,
    Kernel,
    Scales,
    default_branches,
    gradient_multipliers,
    reinitialize,
)
from repopt_jax.core.published import repopt
from repopt_jax.interop import load_torch_scales, write_torch
from repopt_jax.models import GHOST_VARIANTS, VGG_VARIANTS, VGGVariant, ghostnet, vgg
from repopt_jax.models.efficientrep import BackboneVariant, EfficientRep

TINY = VGGVariant("tiny", (2, 1, 3, 1), (4, 4, 6, 8, 8))
DATA = os.environ.get("REPOPT_TEST_DATA")

# Relative to a layer's largest. Measured 0: the same products and sums of float64 numbers, in the same order.
EQUAL = 1e-15


@functools.cache
def abstract(network, variant):
    return nnx.eval_shape(lambda: network(variant, num_classes=3, rngs=nnx.Rngs(0)))


def declared(variant, in_channels=3):
    """What the network of a VGG variant declares."""
    return {path: repopt(place.geometry).branch_set() for path, place in variant.layers(in_channels).items()}


def vgg_keys(variant):
    """Block name of the published code -> (our path, in, out, whether there is an identity), by the rule of
    the paper: five stages, the first a single block, each opened by a strided block."""
    keys, inputs = {}, 3
    for stage, (count, width) in enumerate(zip((1, *variant.blocks), variant.widths)):
        for index in range(count):
            name = "stage0" if stage == 0 else f"stage{stage}.{index}"
            keys[name] = (f"stages/{stage}/{index}/conv/kernel", inputs, width, index > 0)
            inputs = width
    return keys


def vgg_file(variant, seed=0, dtype: type = np.float32, whole=False) -> dict[str, np.ndarray]:
    """What the published search saves: the scales alone, or the `whole` network."""
    rng = np.random.default_rng(seed)
    tensors = {}
    for name, (_, inputs, out, identity) in vgg_keys(variant).items():
        vectors = {"scale_1x1": rng.normal(size=out), "scale_conv": rng.normal(size=out)}
        vectors |= {"scale_identity": rng.uniform(0.1, 2, out)} if identity else {}
        tensors |= {f"{name}.{key}.weight": v.astype(dtype) for key, v in vectors.items()}
        if whole:
            tensors[f"{name}.conv.weight"] = rng.normal(size=(out, inputs, 3, 3)).astype(dtype)
            tensors[f"{name}.conv_1x1.weight"] = rng.normal(size=(out, inputs, 1, 1)).astype(dtype)
            tensors[f"{name}.bn.weight"] = np.ones(out, dtype)
    return tensors | ({"linear.weight": np.ones((3, variant.widths[-1]), dtype)} if whole else {})


def ghost_file(variant=GHOST_VARIANTS["0.5"]):
    rng = np.random.default_rng(1)
    tensors = {}
    for path, branches in abstract(ghostnet, variant).branch_sets().items():
        for key in ("fusion_scale", "cheap_operation.1"):
            tensors[f"{ghost_name(path)}.{key}.weight"] = rng.normal(size=branches.out).astype(np.float32)
    return tensors


def ghost_name(path):
    """The ghost module at the path of a cheap kernel, in the published code, which counts stages without the
    stem."""
    _, stage, block, module, *_ = path.split("/")
    return f"blocks.{int(stage) - 1}.{block}.{module}"


def released(name):
    if not DATA:
        pytest.skip("REPOPT_TEST_DATA is not set")
    return Path(DATA) / "scales" / name


@pytest.fixture(params=["released", "same layout"])
def b1_file(request, tmp_path):
    if request.param == "released":
        return released("RepOpt-VGG-B1-scales.pth")
    write_torch(tmp_path / "B1.pth", vgg_file(VGG_VARIANTS["B1"]))
    return tmp_path / "B1.pth"


@pytest.fixture(params=["released", "same layout"])
def ghost_path(request, tmp_path):
    if request.param == "released":
        return released("RepOptGhostNet_0_5x_scales.pth")
    write_torch(tmp_path / "ghost.pth", ghost_file())
    return tmp_path / "ghost.pth"


@pytest.fixture
def write(tmp_path):
    def write(tensors, name="scales.pth"):
        (tmp_path / name).unlink(missing_ok=True)
        write_torch(tmp_path / name, tensors)
        return tmp_path / name

    return write


def multipliers(scales):
    """Path -> the library's multiplier in float64, with PyTorch's order of axes. (All in one program: to
    compile the operations one by one takes a minute.)"""
    kernels = {path: bs.kernel for path, bs in scales.branch_sets.items()}
    params = {path: jax.ShapeDtypeStruct(kernel, jnp.float64) for path, kernel in kernels.items()}
    found = jax.jit(lambda scales: gradient_multipliers(params, scales))(scales)
    return {path: np.moveaxis(np.asarray(m), (3, 2), (0, 1)) for path, m in found.items()}


def raw(file):
    from repopt_jax.interop import read_tensors

    return {name: array.astype(np.float64) for name, array in read_tensors(file).items()}


@pytest.mark.usefixtures("x64")
class TestPublishedFormula:
    def test_repopt_vgg(self, b1_file):
        """M[o, i, h, w] = s_o^2 + centre t_o^2 + centre diagonal 1, in PyTorch's order of axes."""
        model = abstract(vgg, VGG_VARIANTS["B1"])
        scales = load_torch_scales(b1_file, model)
        assert list(scales.entries) == list(model.branch_sets())
        assert scales.branch_sets == load_torch_scales(b1_file).branch_sets == model.branch_sets()
        tensors, found = raw(b1_file), multipliers(scales)
        centre_moved = 0.0
        for name, (path, inputs, out, identity) in vgg_keys(VGG_VARIANTS["B1"]).items():
            s, t = tensors[f"{name}.scale_conv.weight"], tensors[f"{name}.scale_1x1.weight"]
            expected = np.tile((s**2).reshape(out, 1, 1, 1), (1, inputs, 3, 3))
            expected[:, :, 1, 1] += (t**2).reshape(out, 1)
            if identity:
                expected[range(out), range(out), 1, 1] += 1
            assert found[path].shape == expected.shape
            assert np.abs(found[path] - expected).max() <= EQUAL * expected.max()
            if out < 100:
                centre_moved = np.abs(found[path] - np.roll(expected, 1, 2)).max()
        assert centre_moved > 0.1  # a control: the 1x1 at another tap

    def test_repopt_ghostnet(self, ghost_path):
        """M = s^2 + centre 1 on depthwise kernels."""
        model = abstract(ghostnet, GHOST_VARIANTS["0.5"])
        scales = load_torch_scales(ghost_path, model)
        assert set(scales.entries) == set(model.branch_sets())
        alone = load_torch_scales(ghost_path)
        assert scales.branch_sets == alone.branch_sets == model.branch_sets()
        assert alone.metadata.architecture == model.architecture
        tensors, found = raw(ghost_path), multipliers(scales)
        for path, entry in scales.entries.items():
            name = ghost_name(path)
            s = tensors[f"{name}.cheap_operation.1.weight"]
            expected = np.tile((s**2).reshape(-1, 1, 1, 1), (1, 1, 3, 3))
            expected[:, :, 1, 1] += 1
            assert found[path].shape == expected.shape
            assert np.abs(found[path] - expected).max() <= EQUAL * expected.max()
            np.testing.assert_array_equal(entry.vectors["identity"], tensors[f"{name}.fusion_scale.weight"])


class TestReleased:
    def test_vgg_b1(self):
        scales = load_torch_scales(released("RepOpt-VGG-B1-scales.pth"))
        assert scales.metadata.architecture == "B1"
        assert scales.metadata.config == "RepOpt-VGG-B1-scales.pth"
        vectors = [v for entry in scales.vectors.values() for v in entry.items()]
        assert len(vectors) == 79
        negative = {name: sum(int((v < 0).sum()) for n, v in vectors if n == name) for name, _ in vectors}
        assert negative == {"3x3": 85, "1x1": 71, "identity": 0}
        assert sum(v.size for name, v in vectors if name == "3x3") == 12_352
        assert sum(v.size for name, v in vectors if name == "identity") == 9_344

    def test_ghostnet(self):
        scales = load_torch_scales(released("RepOptGhostNet_0_5x_scales.pth"))
        assert scales.metadata.architecture == "GhostNet-0.5"
        values = np.concatenate([v for entry in scales.vectors.values() for v in entry.values()])
        assert sum(len(entry) for entry in scales.vectors.values()) == 64
        assert (values < 0).sum() == 17
        assert values.max() == pytest.approx(14.67, abs=0.005)


class TestRefused:
    def test_another_width(self, b1_file):
        with pytest.raises(
            ValueError, match=r"\(searched on B1\) do not fit the model: 27 misshapen"
        ) as error:
            load_torch_scales(b1_file, declared(VGG_VARIANTS["B2"]))
        for path, _, out, _ in list(vgg_keys(VGG_VARIANTS["B1"]).values())[1:]:
            assert f"{path} (expected (3, 3, " in str(error.value)
            assert f", {out}))" in str(error.value)
        assert "\n" not in str(error.value)

    def test_another_depth(self, b1_file):
        with pytest.raises(ValueError, match="20 missing layers: ") as error:
            load_torch_scales(b1_file, declared(VGG_VARIANTS["L1"]))
        for path in ("stages/1/4/", "stages/1/7/", "stages/2/13/", "stages/3/16/", "stages/3/23/"):
            assert f"{path}conv/kernel (3, 3, " in str(error.value)
        assert "extra" not in str(error.value)

    def test_a_shallower_network(self, write):
        file = write(vgg_file(TINY))
        shallow = VGGVariant("shallow", (1, 1, 3, 1), TINY.widths)
        with pytest.raises(ValueError, match=r"1 extra layers: stages/1/1/conv/kernel \(3, 3, 4, 4\)$"):
            load_torch_scales(file, declared(shallow))

    def test_ghostnet_for_vgg(self, ghost_path):
        with pytest.raises(ValueError, match=r"28 missing layers: .*; 32 extra layers: stages/1/0/ghost1"):
            load_torch_scales(ghost_path, declared(VGG_VARIANTS["B1"]))

    def test_all_that_is_missing_or_misshapen(self, write):
        tensors = vgg_file(TINY)
        del tensors["stage1.1.scale_1x1.weight"], tensors["stage0.scale_conv.weight"]
        tensors["stage3.1.scale_identity.weight"] = np.ones(7, np.float32)
        tensors["stage3.2.scale_conv.weight"] = np.ones((8, 1), np.float32)
        with pytest.raises(ValueError, match=r"scales\.pth is no complete file of scales") as error:
            load_torch_scales(write(tensors))
        message = str(error.value)
        assert "2 missing scales: stage0.scale_conv.weight (4,), stage1.1.scale_1x1.weight (4,)" in message
        assert "stage3.1.scale_identity.weight (expected (8,), found (7,))" in message
        assert "stage3.2.scale_conv.weight" in message
        ghost = ghost_file()
        del ghost["blocks.0.0.ghost1.fusion_scale.weight"]
        with pytest.raises(
            ValueError, match=r"1 missing scales: blocks\.0\.0\.ghost1\.fusion_scale\.weight \(4,\)$"
        ):
            load_torch_scales(write(ghost))

    def test_a_missing_block(self, write):
        tensors = {k: v for k, v in vgg_file(TINY).items() if not k.startswith(("stage0.", "stage3.1."))}
        with pytest.raises(ValueError, match=r"2 missing blocks: stage0, stage3\.1$"):
            load_torch_scales(write(tensors))
        with pytest.raises(ValueError, match=r"2 missing layers: stages/0/0/conv/kernel .*, stages/3/1/conv"):
            load_torch_scales(write(tensors), declared(TINY))

    def test_an_identity_where_none_can_be(self, write):
        tensors = vgg_file(TINY) | {"stage2.0.scale_identity.weight": np.ones(6, np.float32)}
        with pytest.raises(ValueError, match=r"fit no network: stage2\.0: branch identity does not fit"):
            load_torch_scales(write(tensors))
        with pytest.raises(ValueError, match=r"fit no network: stage2\.0: branch identity does not fit"):
            load_torch_scales(write(tensors), declared(TINY))

    def test_no_numbers(self, write):
        tensors = vgg_file(TINY)
        tensors["stage4.0.scale_conv.weight"][3] = np.nan
        with pytest.raises(
            ValueError, match=r"scales\.pth hold NaN or infinite values: stages/4/0/conv/kernel/3x3"
        ):
            load_torch_scales(write(tensors))

    def test_no_scales(self, write):
        baseline = {  # of RepGhost: where the search has a scale, there is a batch norm
            f"blocks.0.0.ghost1.cheap_operation.1.{name}": np.ones(4, np.float32)
            for name in ("weight", "bias", "running_mean", "running_var")
        }
        with pytest.raises(ValueError, match=r"scales\.pth holds no scales: .*it holds blocks\.0.*\.\.\."):
            load_torch_scales(write(baseline))
        with pytest.raises(FileNotFoundError):
            load_torch_scales("nowhere.pth")


class TestCheckpoints:
    def test_a_scale_file_without_a_model(self, write):
        tensors = vgg_file(TINY)
        scales = load_torch_scales(write(tensors))
        assert scales.branch_sets == declared(TINY)
        assert scales.metadata.architecture == ""
        for name, (path, _, _, _) in vgg_keys(TINY).items():
            for ours, theirs in {"3x3": "conv", "1x1": "1x1", "identity": "identity"}.items():
                vector = scales.vectors[path].get(ours)
                if vector is not None:
                    np.testing.assert_array_equal(vector, tensors.pop(f"{name}.scale_{theirs}.weight"))
        assert not tensors

    def test_the_model_says_what_the_vectors_do_not(self, write):
        """Channels of the images, and groups."""
        file = write(vgg_file(TINY))
        grouped = VGGVariant("grouped", TINY.blocks, TINY.widths, groups=2)
        for branch_sets in (declared(TINY, in_channels=1), declared(grouped)):
            assert load_torch_scales(file, branch_sets).branch_sets == branch_sets
            assert load_torch_scales(file).branch_sets != branch_sets
        equinox = {
            path: BranchSet((bs.out, bs.kernel[2], 3, 3), bs.branches, layout="oi...")
            for path, bs in declared(TINY).items()
        }
        assert load_torch_scales(file, equinox).branch_sets == equinox

    @pytest.mark.parametrize("kind", [zip_bytes, legacy_bytes])
    def test_a_whole_search_in_half_precision(self, kind, tmp_path):
        """Only the scales are taken, and they are squared as float32: in half precision the square of 1e-4 is
        0."""
        tensors = vgg_file(TINY, dtype=np.float16, whole=True)
        tensors["stage0.scale_conv.weight"][:] = 1e-4
        file = tmp_path / "latest.pth"
        file.write_bytes(kind({"model": {f"module.{k}": v for k, v in tensors.items()}, "epoch": 239}))
        scales = load_torch_scales(file, declared(TINY))
        assert {v.dtype for v in jax.tree.leaves(scales)} == {jnp.dtype("float32")}
        np.testing.assert_array_equal(
            scales.vectors["stages/3/1/conv/kernel"]["3x3"],
            tensors["stage3.1.scale_conv.weight"].astype("f4"),
        )
        path = "stages/0/0/conv/kernel"
        params = {path: jnp.ones(scales.entries[path].branches.kernel)}
        corner = gradient_multipliers(params, Scales({path: scales.entries[path]}))[path][0, 0]
        assert float(corner.min()) == pytest.approx(1e-8, rel=0.01)
        assert not (tensors["stage0.scale_conv.weight"] ** 2).any()  # a control

    def test_shapes_of_a_whole_search_come_from_its_kernels(self, write):
        tensors = vgg_file(TINY, whole=True)
        tensors["stage0.conv.weight"] = np.ones((4, 1, 5, 5), np.float32)
        scales = load_torch_scales(write(tensors))
        assert scales.branch_sets["stages/0/0/conv/kernel"] == default_branches((5, 5, 1, 4), stride=2)
        with pytest.raises(ValueError, match=r"expected \(3, 3, 3, 4\), found \(5, 5, 1, 4\)"):
            load_torch_scales(write(tensors), declared(TINY))

    def test_another_entry(self, tmp_path):
        first, second = vgg_file(TINY, seed=1), vgg_file(TINY, seed=2)
        (tmp_path / "latest.pth").write_bytes(zip_bytes({"model": first, "ema": second}))
        for key, tensors in ((None, first), ("model", first), ("ema", second)):
            scales = load_torch_scales(tmp_path / "latest.pth", key=key)
            found = scales.vectors["stages/0/0/conv/kernel"]["3x3"]
            np.testing.assert_array_equal(found, tensors["stage0.scale_conv.weight"])

    def test_a_network_takes_them(self, write):
        params = {path: jnp.zeros(bs.kernel) for path, bs in declared(TINY).items()}
        scales = load_torch_scales(write(vgg_file(TINY)), params)
        path = "stages/1/1/conv/kernel"
        kernel = reinitialize(params, Scales({path: scales.entries[path]}), rngs=nnx.Rngs(1))[path]
        u = scales.vectors[path]["identity"]
        others = jnp.where(jnp.eye(4, dtype=bool), 0, kernel[1, 1])
        assert float(jnp.abs(jnp.diagonal(kernel[1, 1]) - u).max()) < 3  # drawn weights times scales, about u
        assert 0 < float(jnp.abs(others).max()) < 3

    @pytest.mark.long  # that of half width is recognised in `TestPublishedFormula`
    def test_ghostnets_are_recognised(self, write):
        model = abstract(ghostnet, GHOST_VARIANTS["1.3"])
        scales = load_torch_scales(write(ghost_file(GHOST_VARIANTS["1.3"])))
        assert scales.metadata.architecture == model.unit_scales().metadata.architecture

    @pytest.mark.parametrize("name", ["A0", "L1", "B1g4"])
    def test_vggs_are_recognised(self, name, write):
        file = write(vgg_file(VGG_VARIANTS[name]))
        assert load_torch_scales(file, declared(VGG_VARIANTS[name])).metadata.architecture == name


# Channels of the convolutions of a small detector: name -> (in, out).
DETECTOR = {
    "backbone.stem": (3, 4),
    "backbone.ERBlock_2.0": (4, 6),
    "backbone.ERBlock_2.1.conv1": (6, 6),
    "backbone.ERBlock_2.1.block.0": (6, 6),
    "neck.Rep_p4.conv1": (12, 6),
    "neck.Rep_n3.conv1": (6, 6),
}
DETECTOR_PATHS = {name: f"{name.replace('.', '/')}/conv/kernel" for name in DETECTOR}


def detector_state(rng, name):
    inputs, out = DETECTOR[name]
    state = {
        "conv.weight": rng.normal(size=(out, inputs, 3, 3)),
        "conv_1x1.weight": rng.normal(size=(out, inputs, 1, 1)),
        "scale_conv.weight": rng.normal(size=out),
        "scale_1x1.weight": rng.normal(size=out),
    }
    state |= (
        {"scale_identity.weight": rng.normal(size=out)} if inputs == out and ".0" not in name[-2:] else {}
    )
    if name.endswith("block.0"):
        state["scale_identity.weight"] = rng.normal(size=out)
    return {key: value.astype(np.float16) for key, value in state.items()}


class TestDetectors:
    @pytest.fixture
    def state(self):
        rng = np.random.default_rng(3)
        return {f"{name}.{key}": v for name in DETECTOR for key, v in detector_state(rng, name).items()}

    @pytest.fixture(params=["opcodes", "PyTorch"])
    def file(self, request, state, tmp_path, monkeypatch):
        """A YOLOv6 checkpoint: whole modules, in half precision, of classes that are gone."""
        file = tmp_path / "yolov6s_scale.pt"
        if request.param == "opcodes":
            file.write_bytes(zip_bytes({"model": pickled_module("", state), "ema": None, "epoch": 299}))
            return file
        torch = pytest.importorskip("torch")
        (tmp_path / "yolov6_gone.py").write_text("import torch\nclass Layer(torch.nn.Module):\n    pass\n")
        monkeypatch.syspath_prepend(tmp_path)
        Layer = importlib.import_module("yolov6_gone").Layer
        model = Layer()
        for key, value in state.items():
            node = model
            *parts, leaf = key.split(".")
            for part in parts:
                if not hasattr(node, part):
                    node.add_module(part, Layer())
                node = getattr(node, part)
            node.register_parameter(leaf, torch.nn.Parameter(torch.from_numpy(value)))
        torch.save({"model": model, "ema": None, "updates": 7, "epoch": 299}, file)
        monkeypatch.delitem(sys.modules, "yolov6_gone")
        return file

    def test_paths_kernels_and_vectors(self, file, state):
        scales = load_torch_scales(file)
        assert set(scales.entries) == set(DETECTOR_PATHS.values())
        assert scales.metadata.config == "yolov6s_scale.pt"
        for name, path in DETECTOR_PATHS.items():
            inputs, out = DETECTOR[name]
            branches = scales.branch_sets[path]
            assert branches.kernel == (3, 3, inputs, out)
            assert branches.groups == 1
            identity = f"{name}.scale_identity.weight" in state
            assert branches.names == ("3x3", "1x1", "identity")[: 3 if identity else 2]
            for ours, theirs in {"3x3": "conv", "1x1": "1x1", "identity": "identity"}.items():
                if ours in branches.names:
                    expected = state[f"{name}.scale_{theirs}.weight"].astype(np.float32)
                    np.testing.assert_array_equal(scales.vectors[path][ours], expected)

    def test_scales_alone_need_a_model(self, state, write):
        file = write({key: value for key, value in state.items() if "scale_" in key})
        with pytest.raises(
            ValueError, match=r"holds scales but no kernels of backbone/ERBlock_2/0/conv/kernel, .*`model`"
        ):
            load_torch_scales(file)
        params = {path: jnp.ones((3, 3, *DETECTOR[name])) for name, path in DETECTOR_PATHS.items()}
        scales = load_torch_scales(file, params | {"other": jnp.ones(3)})
        assert {path: bs.kernel for path, bs in scales.branch_sets.items()} == {
            path: leaf.shape for path, leaf in params.items()
        }
        stem = "backbone/stem/conv/kernel"
        with pytest.raises(ValueError, match=rf"misshapen layers: {stem} \(expected \(5,\), found \(4,\)\)"):
            load_torch_scales(file, {**params, stem: jnp.ones((3, 3, 3, 5))})

    def test_yolov6_s_backbone_is_efficientrep(self, write, caplog):
        variant = BackboneVariant("tiny", (4, 6, 6, 8, 8), (2, 1, 1, 1))
        model = nnx.eval_shape(lambda: EfficientRep(variant, rngs=nnx.Rngs(0)))
        places = {"backbone.stem": (0, 0), "backbone.ERBlock_2.1.block.0": (1, 2)}
        for s in range(1, 5):
            places |= {f"backbone.ERBlock_{s + 1}.0": (s, 0), f"backbone.ERBlock_{s + 1}.1.conv1": (s, 1)}
        rng = np.random.default_rng(4)
        tensors = {}
        for name, (stage, index) in {**places, "neck.Rep_p4.conv1": (1, 0)}.items():
            for role in ("conv", "1x1", "identity")[: 3 if index else 2]:
                width = variant.widths[stage]
                tensors[f"{name}.scale_{role}.weight"] = rng.normal(size=width).astype(np.float32)
        with caplog.at_level("INFO"):
            scales = load_torch_scales(write(tensors), model)
        assert "the scales of neck.Rep_p4.conv1 are left out" in caplog.text
        assert scales.branch_sets == model.branch_sets()
        for name, (stage, index) in places.items():
            found = scales.vectors[f"stages/{stage}/{index}/conv/kernel"]["3x3"]
            np.testing.assert_array_equal(found, tensors[f"{name}.scale_conv.weight"])
        del (
            tensors["backbone.ERBlock_5.0.scale_conv.weight"],
            tensors["backbone.ERBlock_5.0.scale_1x1.weight"],
        )
        with pytest.raises(ValueError, match=r"1 missing layers: stages/4/0/conv/kernel"):
            load_torch_scales(write(tensors), model)

    def test_depthwise_layers(self, write):
        """Groups follow from the identity, which needs as many inputs as outputs."""
        vectors = {name: np.ones(4, np.float32) for name in ("scale_conv", "scale_1x1", "scale_identity")}
        tensors: dict[str, np.ndarray] = {f"{name}.weight": v for name, v in vectors.items()}
        tensors["conv.weight"] = np.ones((4, 1, 5, 5), np.float32)
        expected = BranchSet((5, 5, 1, 4), (Kernel((5, 5)), Kernel((1, 1)), Identity()), groups=4)
        assert load_torch_scales(write(tensors)).branch_sets == {"conv/kernel": expected}


def pickled_module(prefix, state):
    """A module of modules that holds the parameters whose names start with `prefix`, as a pickle."""
    inside = [key.removeprefix(prefix) for key in state if key.startswith(prefix)]
    children = dict.fromkeys(key.split(".")[0] for key in inside if "." in key)
    return module(
        "yolov6.layers.common.Gone",
        {key: state[prefix + key] for key in inside if "." not in key},
        modules={child: pickled_module(f"{prefix}{child}.", state) for child in children},
    )
