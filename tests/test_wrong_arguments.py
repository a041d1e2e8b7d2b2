"""Every public function, given something else in place of each of its arguments: it says which one is wrong.

The arguments without a default are replaced in turn, the others are right. What is given is a path, None, a
dict or a number; an argument that may be one of these is left out for it.
"""

import importlib
import inspect
import types
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from training import tiny_config

import repopt_jax
from repopt_jax import data, detection, fuse, models, train
from repopt_jax.data.images import to_pillow
from repopt_jax.export import Metadata
from repopt_jax.quantize import Scheme
from repopt_jax.surgery import depth_scales, plan_pruning

GIVEN = {"path": "runs/x", "none": None, "dict": {"w": 1}, "number": 0.5}
ALLOWED = (TypeError, ValueError, KeyError, FileNotFoundError)

# Functions of arrays that are called in a compiled step, and those of the masks beside it: JAX says what does
# not fit, and a check would be one for each step.
OF_ARRAYS = (
    *("area", "assign", "decode", "detection_loss", "giou", "iou", "nms", "pairwise_iou", "smooth_l1"),
    *("fake_quantize", "quantize_array", "conv_general_dilated", "product_of_tiles"),
    *("masks_are_due", "resrep_masks", "row_norms", "get_masks", "set_masks"),
)
# What takes any pytree.
TREES = ("params", "opt_state", "masks")
# Names of arguments, also those of single functions -> what of `GIVEN` they may be.
MAY_BE = {
    **dict.fromkeys(
        ("path", "out", "directory", "run_dir", "out_dir", "data_dir", "deploy.convert.source"), ("path",)
    ),
    **dict.fromkeys(("max_norm", "learning_rate", "Lambda", "weight_decay", "rates"), ("number",)),
    **dict.fromkeys(("tensors", "ranges", "shapes", "histograms", "blocks", "weights"), ("dict",)),
    **dict.fromkeys(("scores", "keypoints"), ("none",)),
    "text": ("path",),
    # Any pytree, of which the layers are said to be missing.
    **dict.fromkeys(("surgery.branches_of.model", "surgery.reinitialize.model"), tuple(GIVEN)),
}


def functions() -> dict[str, Callable[..., Any]]:
    """The public functions, each once; classes keep what they are given."""
    found: dict[str, Callable[..., Any]] = {}
    for name in repopt_jax._SUBPACKAGES:
        module = importlib.import_module(f"repopt_jax.{name}")
        for public in getattr(module, "__all__", ()):
            value = getattr(module, public)
            if isinstance(value, types.FunctionType) and value not in found.values():
                found[f"{name}.{public}"] = value
    return found


FUNCTIONS = functions()


def required(function: Callable[..., Any]) -> list[str]:
    parameters = inspect.signature(function).parameters.values()
    return [
        p.name for p in parameters if p.default is p.empty and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)
    ]


CASES = [
    (name, argument, kind)
    for name, function in FUNCTIONS.items()
    for argument in required(function)
    for kind in GIVEN
    if name.partition(".")[2] not in OF_ARRAYS
    and argument not in TREES
    and kind not in MAY_BE.get(f"{name}.{argument}", MAY_BE.get(argument, ()))
]


@pytest.fixture(scope="module")
def right(digits, tmp_path_factory):
    """Arguments that are right, by their names, and those of single functions."""
    model = models.create("vgg-digits", num_classes=10, in_channels=1, rngs=nnx.Rngs(0))
    model.eval()
    scales = depth_scales(model)
    source = data.open_source("digits", data_dir=digits)
    config = tiny_config("plain", digits)
    image = np.zeros((8, 8, 1), np.uint8)
    nowhere = tmp_path_factory.mktemp("nowhere")
    by_name = {
        "model": model,
        "search_model": model,
        "deployed": model,
        "quantized": model,
        "scales": scales,
        "rngs": nnx.Rngs(0),
        "images": jnp.ones((2, 8, 8, 1)),
        "path": nowhere / "file",
        "out": nowhere / "out",
        "directory": nowhere / "run",
        "run_dir": nowhere / "run",
        "out_dir": nowhere / "out",
        "data_dir": nowhere / "data",
        "config": config,
        "settings": config.data,
        "info": source.info,
        "source": source,
        "transform": data.Transform(image_size=8),
        "batch_size": 4,
        "seed": 0,
        "count": 5,
        "image": image,
        "size": 8,
        "metadata": Metadata(image_size=8, channels=1, mean=(0.5,), std=(0.5,)),
        "plan": plan_pruning(model, jnp.ones((1, 8, 8, 1))),
        "weights": {},
        "shapes": {},
        "apply": lambda params: params,
        "params": nnx.state(model, nnx.Param),
        "tx": optax.sgd(0.1),
        "inner": optax.sgd(0.1),
        "batches": [],
        "structures": scales,
        "structure": "repvgg",
        "mode": "search",
        "scheme": Scheme(),
        "ranges": {},
        "compactors": ["a"],
        "learning_rate": 0.1,
        "max_norm": 1.0,
        "Lambda": 1.0,
        "name": "vgg-digits",
        "num_classes": 10,
        "format": "onnx",
        "input_shape": (8, 8, 1),
        "trained": train.Trained(model, config, source.info, 0),
        "tensors": {"a": np.zeros(3, np.float32)},
        "blocks": {},
        "weight_decay": 1e-4,
        "rates": [0.1],
        "start": scales,
        "sigmas": (),
        "predictions": [],
        "columns": 1,
        "boxes": np.zeros((0, 4)),
        "classes": np.zeros(0, int),
        "class_names": ("a",),
        "index": np.zeros(2, int),
        "ratio": np.ones(2),
        "detections": detection.Detections(*(np.zeros((2, 0, n)) for n in (4, 1, 1, 3))),
    }
    scenes = data.open_source("scenes", scenes=(2, 2), image_size=32)
    annotated = {"source": scenes, "transform": data.DetectionTransform(image_size=32)}
    own = {
        "data.train_detection_batches": annotated,
        "data.eval_detection_batches": annotated,
        "deploy.convert": {"source": nowhere / "file"},
        "detection.evaluate_detections": {"ground_truth": data.eval_annotations(scenes)},
        "detection.contact_sheet": {"images": [to_pillow(image)]},
        "models.vgg": {"variant": models.VGG_VARIANTS["A0"]},
        "models.ghostnet": {"variant": next(iter(models.GHOST_VARIANTS.values()))},
        "models.mobileone": {"variant": next(iter(models.MOBILEONE_VARIANTS.values()))},
        "quantize.quantize": {"model": fuse(model)},
        "deploy.export": {"out": nowhere / "file.onnx"},
    }
    return by_name | {f"{name}.{argument}": v for name, of in own.items() for argument, v in of.items()}


def call(function: Callable[..., Any], arguments: dict[str, Any]) -> None:
    made = function(**arguments)
    if inspect.isgenerator(made):
        next(made)


@pytest.mark.parametrize(("name", "argument", "kind"), CASES)
def test_something_else(name, argument, kind, right, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # what a path names is nowhere
    function, given = FUNCTIONS[name], GIVEN[kind]
    arguments = {other: right.get(f"{name}.{other}", right.get(other)) for other in required(function)}
    with pytest.raises(ALLOWED) as error:
        call(function, {**arguments, argument: given})
    said = str(error.value)
    assert f"`{argument}`" in said or (isinstance(given, str) and given in said)
