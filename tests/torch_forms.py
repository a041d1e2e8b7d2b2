"""Every form of every network, ours and PyTorch's, and how to run both: what the parity tests share."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
import torch_networks as reference
from flax import nnx
from forms import CSLA, ghostnet, mobileone, repmlpnet, vgg

from repopt_jax.models import GhostRow, GhostVariant, MobileOneVariant, RepMLPVariant, VGGVariant
from repopt_jax.models.ghost import ghost_specs

torch.set_num_threads(1)  # more only wait for one another on arrays this small

CLASSES = 5

VGG = VGGVariant("tiny", (2, 3, 1, 1), (4, 4, 6, 8, 8), (2, 1, 2, 1, 2), groups=2)
VGG_SE = VGGVariant("tiny-se", (2, 1, 1, 1), (16, 16, 16, 32, 32), (2, 1, 2, 1, 1), pre_se=16)
ONE = MobileOneVariant("tiny", (4, 6, 16, 16, 32), 2, (1, 1, 2, 1), (0, 0, 1, 1))
GHOST = GhostVariant(
    "tiny",
    0.5,
    (
        (GhostRow(5, 24, 24, True, 2),),
        (GhostRow(3, 16, 24, False, 1),),
    ),
    stem=16,
    features=20,
)
MLP = RepMLPVariant("tiny", (4, 8, 8), (1, 2, 1), (6, 3, 3), (2, 4, 8), patch=2)


@dataclasses.dataclass(frozen=True)
class Form:
    """One form of one network: `make` makes ours, `network` PyTorch's, `strides` are those of its blocks, and
    `size` that of the images."""

    scheme: str
    make: Callable[[], Any]
    network: Callable[[], Any]
    strides: tuple[int, ...] = ()
    size: tuple[int, int] = (
        15,
        18,
    )  # an odd and an even side: at stride 2, "SAME" would show on the even one


def strides(variant):
    return tuple(place.geometry.strides[0] for place in variant.layers().values())


def vgg_form(scheme, mode, block, *, variant=VGG, post_se=False, form="training"):
    return Form(
        scheme,
        lambda: vgg(variant, mode, form=form, num_classes=CLASSES, post_se=post_se),
        lambda: reference.vgg(
            block,
            variant.blocks,
            variant.widths,
            variant.strides,
            CLASSES,
            variant.groups,
            timm=scheme == "timm",
            se=post_se or variant.pre_se > 0,
        ),
        strides(variant),
    )


def one_form(scheme, block, *, form="training"):
    return Form(
        scheme,
        lambda: mobileone(ONE, form=form, num_classes=CLASSES),
        lambda: reference.mobileone(
            block, ONE.pairs, ONE.widths, CLASSES, ONE.copies, ONE.se_pairs, timm=scheme == "timm"
        ),
        strides(ONE),
    )


def ghost_form(scheme, mode, theirs, *, form="training"):
    specs, rows = list(ghost_specs(GHOST)), [[], []]
    for s in specs:
        rows[s.stage - 1].append((s.size, s.hidden, s.outputs, s.se_hidden, s.stride))
    return Form(
        scheme,
        lambda: ghostnet(GHOST, mode, form=form, num_classes=CLASSES),
        lambda: reference.GhostNet(rows, specs[0].inputs, 16, GHOST.features, CLASSES, theirs),
    )


def mlp_form(mode, theirs, *, form="training", **options):
    stages = list(zip(MLP.widths, MLP.units, MLP.sides, MLP.sets))
    return Form(
        "repmlp",
        lambda: repmlpnet(MLP, mode, form=form, num_classes=CLASSES, **options),
        lambda: reference.RepMLPNet(stages, MLP.patch, CLASSES, theirs, **options),
        size=(MLP.image_size, 2 * MLP.image_size),  # several tiles a map, and not the same number along both
    )


FORMS = {
    "repopt target": vgg_form("repopt", "plain", reference.PlainBlock),
    "repopt target se": vgg_form("repopt", "plain", reference.PlainBlock, post_se=True),
    "repopt target deployed": vgg_form("repopt", "plain", reference.PlainDeployed, form="deployed"),
    "repopt search": vgg_form("repopt", "search", reference.LinearAddition),
    "repopt csla": vgg_form("repopt", CSLA, reference.LinearAddition),
    "repopt repvgg": vgg_form("repopt", "repvgg", reference.ThreeBranches, post_se=True),
    "repvgg": vgg_form("repvgg", "repvgg", reference.RepVGGTrained),
    "repvgg se": vgg_form("repvgg", "repvgg", reference.RepVGGTrained, variant=VGG_SE),
    "repvgg deployed": vgg_form("repvgg", "repvgg", reference.RepVGGDeployed, form="deployed"),
    "timm repvgg se": vgg_form("timm", "repvgg", reference.TimmRepVGG, variant=VGG_SE),
    "timm repvgg deployed": vgg_form("timm", "repvgg", reference.TimmDeployed, form="deployed"),
    "mobileone": one_form("mobileone", reference.MobileOneTrained),
    "mobileone deployed": one_form("mobileone", reference.MobileOneDeployed, form="deployed"),
    "timm mobileone": one_form("timm", reference.TimmMobileOne),
    "timm mobileone deployed": one_form("timm", reference.TimmDeployed, form="deployed"),
    "repopt ghost target": ghost_form("repopt", "plain", "target"),
    "repopt ghost search": ghost_form("repopt", "search", "hs"),
    "repopt ghost csla": ghost_form("repopt", CSLA, "hs"),
    "repopt ghost rep": ghost_form("repopt", "repghost", "rep"),
    "repghost": ghost_form("repghost", "repghost", "train"),
    "repghost deployed": ghost_form("repghost", "repghost", "deploy", form="merged"),
    "repmlp": mlp_form("repmlp", "train"),
    "repmlp plain": mlp_form("plain", "plain"),
    "repmlp deployed": mlp_form("repmlp", "deploy", form="merged"),
}


def images(dtype, batch=2, size=Form.size):
    return np.random.default_rng(0).normal(size=(batch, *size, 3)).astype(dtype)


def arrays(network):
    """The state dict as NumPy arrays."""
    return {key: tensor.detach().numpy().copy() for key, tensor in network.state_dict().items()}


def tensors(state):
    return {key: torch.from_numpy(np.array(value)) for key, value in state.items()}


def compiled(function):
    """`jax.jit` that spends less time on compiling, which is most of what a test here takes."""
    return jax.jit(function, compiler_options={"xla_backend_optimization_level": "0"})


def run_torch(network, x):
    with torch.no_grad():
        return network(torch.from_numpy(x.transpose(0, 3, 1, 2))).numpy()


def run_ours(model, x):
    model.eval()
    graph, state = nnx.split(model)
    return np.asarray(compiled(lambda state, x: nnx.merge(graph, state)(x))(state, jnp.asarray(x)))


def abstract(form, dtype):
    """Our network of that form, without its values, its numbers of that dtype."""
    graph, state = nnx.split(_abstract(form))

    def retyped(leaf):
        return jax.ShapeDtypeStruct(leaf.shape, dtype) if jnp.issubdtype(leaf.dtype, jnp.floating) else leaf

    return nnx.merge(graph, jax.tree.map(retyped, state))


@functools.cache
def _abstract(form):
    return nnx.eval_shape(form.make)


def relative(a, b):
    return float(np.abs(a - b).max() / np.abs(b).max())
