"""The same training as PyTorch: twenty steps end with equal parameters, with and without RepOptimizer."""

import jax.numpy as jnp
import numpy as np
import pytest
import tolerances

from repopt_jax.core.published import repopt
from repopt_jax.core.scales import LayerScales, Scales
from repopt_jax.interop.names import torch_names
from repopt_jax.interop.weights import from_torch, to_torch
from repopt_jax.models import VGGVariant
from repopt_jax.nn import Merged
from repopt_jax.surgery import extract_scales
from repopt_jax.surgery.modules import named_modules

torch = pytest.importorskip("torch")

import torch_networks as reference  # noqa: E402
from forms import CSLA  # noqa: E402
from torch_forms import FORMS, abstract, arrays, vgg_form  # noqa: E402
from torch_training import recipe, running_variance, train_ours, train_torch, training_batches  # noqa: E402

SMALL = VGGVariant("small", (2, 1, 1, 1), (4, 4, 6, 6, 8), (1, 2, 1, 1, 1))


def mixed_scales(variant, seed=3):
    """Scales of both signs for the target network."""
    rng = np.random.default_rng(seed)
    entries = {}
    for path, place in variant.layers().items():
        branches = repopt(place.geometry).branch_set()
        vectors = {name: jnp.asarray(1 + 0.7 * rng.normal(size=branches.out)) for name in branches.names}
        entries[path] = LayerScales(branches, vectors)
    return Scales(entries)


def official_masks(network, scales):
    """RepOptimizer's multipliers, by its published formula, in PyTorch's layout: s^2, t^2 on the centre, 1 on
    its diagonal."""
    masks = {}
    for path, entry in scales.entries.items():
        stage, index = path.split("/")[1:3]
        name = f"stage{stage}.conv" if stage == "0" else f"stage{stage}.{index}.conv"
        weight = network.get_submodule(name).weight
        s, t = (torch.from_numpy(np.array(entry.vectors[b])) for b in ("3x3", "1x1"))
        mask = torch.ones_like(weight) * (s**2).view(-1, 1, 1, 1)
        mask[:, :, 1:2, 1:2] += (t**2).view(-1, 1, 1, 1)
        if "identity" in entry.vectors:
            for channel in range(weight.shape[0]):
                mask[channel, channel, 1, 1] += 1
        masks[weight] = mask
    return masks


@pytest.mark.parametrize(
    ("mode", "block"),
    [
        ("plain", reference.PlainBlock),
        (CSLA, reference.LinearAddition),
        ("repvgg", reference.ThreeBranches),
        # Its gradients in training mode are compared with PyTorch's in `test_torch_repmlp`.
        pytest.param("repmlp", None, marks=pytest.mark.long),
    ],
)
def test_twenty_steps_of_training(mode, block, x64):
    """Nesterov momentum, decay, batch norm in training mode; plain, with RepOptimizer's multipliers."""
    form, size = vgg_form("repopt", mode, block, variant=SMALL), (7, 8)
    if mode == "repmlp":
        form, size = FORMS["repmlp"], FORMS["repmlp"].size
    network = reference.randomise(form.network().double())
    start = arrays(network)
    model = from_torch(start, abstract(form, "float64"))
    scales = mixed_scales(SMALL) if mode == "plain" else None
    batches = training_batches(size=size)
    seen = train_torch(network, batches, {} if scales is None else official_masks(network, scales))
    trained = train_ours(model, batches, recipe(scales))
    theirs, ours = arrays(network), to_torch(trained, form.scheme)

    variances = {key for key in theirs if key.endswith("running_var")}
    counters = {key for key in theirs if key.endswith("num_batches_tracked")}
    same = set(theirs) - variances - counters
    assert max(np.abs(ours[key] - theirs[key]).max() for key in same) <= tolerances.TRAINED_AS_TORCH
    moved = [key for key in same if key.endswith((".conv.weight", "running_mean", "linear.weight"))]
    assert min(np.abs(theirs[key] - start[key]).max() for key in moved) > 1e-3

    # The one known difference: PyTorch keeps the variance over n - 1, we the one over n that normalises.
    for key in variances:
        steps = seen[key.removesuffix(".running_var")]
        for found, unbiased in ((theirs, True), (ours, False)):
            expected = running_variance(start[key], steps, unbiased=unbiased)
            assert np.abs(found[key] - expected).max() <= tolerances.TRAINED_AS_TORCH
    assert max(np.abs(ours[key] - theirs[key]).max() for key in variances) > tolerances.TORCH_VARIANCE_APART


def test_training_without_the_multipliers_goes_elsewhere(x64):
    """The negative control of the test above."""
    form = vgg_form("repopt", "plain", reference.PlainBlock, variant=SMALL)
    network = reference.randomise(form.network().double())
    model = from_torch(arrays(network), abstract(form, "float64"))
    batches = training_batches()[:3]
    train_torch(network, batches, official_masks(network, mixed_scales(SMALL)))
    ours, theirs = to_torch(train_ours(model, batches, recipe())), arrays(network)
    key = "stage1.0.conv.weight"
    assert np.abs(ours[key] - theirs[key]).max() > tolerances.WITHOUT_MULTIPLIERS


def test_pytorch_trains_the_branches_and_we_the_merged_kernel(x64):
    """The claim of the method across both frameworks: their CSLA network against our plain one with
    `repopt_mask`."""
    form = vgg_form("repopt", CSLA, reference.LinearAddition, variant=SMALL)
    network = reference.randomise(form.network().double())
    twin = from_torch(arrays(network), abstract(form, "float64"))
    scales = extract_scales(twin)

    def merged(model):
        """The search network's state dict with merged kernels: the plain network's."""
        state = to_torch(model, "repopt")
        for path, module in named_modules(model):
            if isinstance(module, Merged):
                key = torch_names(model, "repopt")[f"{path}/weights/3x3"].key
                state[key] = np.asarray(module.merged_kernel()).transpose(3, 2, 0, 1)
        return {k: v for k, v in state.items() if "scale_" not in k and "conv_1x1" not in k}

    plain = from_torch(merged(twin), abstract(vgg_form("repopt", "plain", None, variant=SMALL), "float64"))
    batches = training_batches()
    train_torch(network, batches, {})
    ours = to_torch(train_ours(plain, batches, recipe(scales)), "repopt")
    theirs = merged(from_torch(arrays(network), twin))
    same = [key for key in theirs if not key.endswith(("running_var", "num_batches_tracked"))]
    assert max(np.abs(ours[key] - theirs[key]).max() for key in same) <= tolerances.TRAINED_AS_TORCH
