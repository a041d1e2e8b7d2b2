"""Networks of ours in every form that a code base publishes."""

import jax
from flax import nnx

from repopt_jax import Geometry, fuse, models, nn, prepare
from repopt_jax.surgery import csla_twin
from repopt_jax.surgery.choose import find_structure
from repopt_jax.surgery.reinitialize import sample_weights

CSLA = "csla"  # no mode: the network of a search with constant scales

# UniRepLKNet's small kernels as its authors list them: side of the large one -> (sides, dilations).
UNIREPLKNET = {
    17: ((5, 9, 3, 3, 3), (1, 2, 4, 5, 7)),
    15: ((5, 7, 3, 3, 3), (1, 2, 3, 5, 7)),
    13: ((5, 7, 3, 3, 3), (1, 2, 3, 4, 5)),
    11: ((5, 5, 3, 3, 3), (1, 2, 3, 4, 5)),
    9: ((5, 5, 3, 3), (1, 2, 3, 4)),
    7: ((5, 3, 3), (1, 2, 3)),
    5: ((3, 3), (1, 2)),
}


def is_of_small_windows(structure, options=None):
    """Whether a structure has several branches in a layer of 3x3; others need larger windows, or maps."""
    try:
        return len(find_structure(structure, options)(Geometry((3, 3), 4, 4)).chains) > 1
    except ValueError:
        return False


def vgg(variant, mode="plain", *, form="training", num_classes=3, post_se=False):
    options = {"num_classes": num_classes, "post_se": post_se}
    return in_form(models.vgg(variant, **options, rngs=nnx.Rngs(0)), mode, form)


def mobileone(variant, mode="mobileone", *, form="training", num_classes=3):
    return in_form(models.mobileone(variant, num_classes=num_classes, rngs=nnx.Rngs(0)), mode, form)


def ghostnet(variant, mode="plain", *, form="training", num_classes=3):
    options = {"num_classes": num_classes, "dropout": 0.0}
    return in_form(models.ghostnet(variant, **options, rngs=nnx.Rngs(0)), mode, form)


def repmlpnet(variant, mode="repmlp", *, form="training", num_classes=3, **options):
    return in_form(
        models.RepMLPNet(variant, num_classes=num_classes, **options, rngs=nnx.Rngs(0)), mode, form
    )


def in_form(model, mode, form):
    """The plain `model` made ready for `mode`, in evaluation mode, and `form` as in `interop`'s `Layout`."""
    if mode == CSLA:
        scales = model.unit_scales()
        model = csla_twin(model, scales, sample_weights(scales, jax.random.key(0)))
    else:
        model = prepare(model, mode, rngs=nnx.Rngs(0)).model
    model.eval()
    options = {"training": None, "deployed": {}, "merged": {"only": (nn.Branched,)}}[form]
    return model if options is None else fuse(model, **options)
