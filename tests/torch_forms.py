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

from repopt_jax import fuse, models
from repopt_jax.models.ghost import GhostRow, GhostVariant, ghost_specs
from repopt_jax.models.mobileone import MobileOneVariant, mobileone_specs
from repopt_jax.models.vgg import VGGVariant, block_specs
from repopt_jax.nn import RepGhostConv

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


@dataclasses.dataclass(frozen=True)
class Form:
    """One form of one network, ours and PyTorch's: `make` ours, `deploy` of it what is loaded, `network`
    PyTorch's, `strides` of its blocks."""

    scheme: str
    make: Callable[[], Any]
    network: Callable[[], Any]
    strides: tuple[int, ...] = ()
    deploy: Callable[[Any], Any] = lambda model: model


def vgg_form(scheme, kind, block, *, variant=VGG, post_se=False, fused=False):
    return Form(
        scheme,
        lambda: models.RepOptVGG(variant, kind=kind, num_classes=CLASSES, post_se=post_se, rngs=nnx.Rngs(0)),
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
        tuple(spec.stride for spec in block_specs(variant)),
        fused_copy if fused else lambda model: model,
    )


def one_form(scheme, block, *, fused=False):
    return Form(
        scheme,
        lambda: models.MobileOne(ONE, num_classes=CLASSES, rngs=nnx.Rngs(0)),
        lambda: reference.mobileone(
            block, ONE.pairs, ONE.widths, CLASSES, ONE.copies, ONE.se_pairs, timm=scheme == "timm"
        ),
        tuple(spec.stride for spec in mobileone_specs(ONE)),
        fused_copy if fused else lambda model: model,
    )


def ghost_form(scheme, kind, mode):
    specs, rows = list(ghost_specs(GHOST)), [[], []]
    for s in specs:
        rows[s.stage].append((s.size, s.hidden, s.outputs, s.se_hidden, s.stride))
    deploy = (lambda m: fused_copy(m, only=(RepGhostConv,))) if mode == "deploy" else (lambda m: m)
    return Form(
        scheme,
        lambda: models.RepGhostNet(GHOST, kind=kind, num_classes=CLASSES, dropout=0.0, rngs=nnx.Rngs(0)),
        lambda: reference.GhostNet(rows, specs[0].inputs, 16, GHOST.features, CLASSES, mode),
        deploy=deploy,
    )


def fused_copy(model, **options):
    model.eval()
    return fuse(model, **options)


FORMS = {
    "repopt target": vgg_form("repopt", "target", reference.PlainBlock),
    "repopt target se": vgg_form("repopt", "target", reference.PlainBlock, post_se=True),
    "repopt target deployed": vgg_form("repopt", "target", reference.PlainDeployed, fused=True),
    "repopt search": vgg_form("repopt", "search", reference.LinearAddition),
    "repopt csla": vgg_form("repopt", "csla", reference.LinearAddition),
    "repopt repvgg": vgg_form("repopt", "repvgg", reference.ThreeBranches, post_se=True),
    "repvgg": vgg_form("repvgg", "repvgg", reference.RepVGGTrained),
    "repvgg se": vgg_form("repvgg", "repvgg", reference.RepVGGTrained, variant=VGG_SE),
    "repvgg deployed": vgg_form("repvgg", "repvgg", reference.RepVGGDeployed, fused=True),
    "timm repvgg se": vgg_form("timm", "repvgg", reference.TimmRepVGG, variant=VGG_SE),
    "timm repvgg deployed": vgg_form("timm", "repvgg", reference.TimmDeployed, fused=True),
    "mobileone": one_form("mobileone", reference.MobileOneTrained),
    "mobileone deployed": one_form("mobileone", reference.MobileOneDeployed, fused=True),
    "timm mobileone": one_form("timm", reference.TimmMobileOne),
    "timm mobileone deployed": one_form("timm", reference.TimmDeployed, fused=True),
    "repopt ghost target": ghost_form("repopt", "target", "target"),
    "repopt ghost search": ghost_form("repopt", "search", "hs"),
    "repopt ghost csla": ghost_form("repopt", "csla", "hs"),
    "repopt ghost rep": ghost_form("repopt", "repghost", "rep"),
    "repghost": ghost_form("repghost", "repghost", "train"),
    "repghost deployed": ghost_form("repghost", "repghost", "deploy"),
}


def images(dtype, batch=2):
    """An odd and an even side at once; at stride 2, padding by SAME would show on the even one."""
    return np.random.default_rng(0).normal(size=(batch, 15, 18, 3)).astype(dtype)


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
    return nnx.eval_shape(lambda: form.deploy(form.make()))


def relative(a, b):
    return float(np.abs(a - b).max() / np.abs(b).max())
