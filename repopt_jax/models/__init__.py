"""Networks, always built plain: a variant is a row in a table, all of them by name in one registry."""

from repopt_jax import extras

extras.require("flax", by=__name__)

from repopt_jax.models.efficientrep import BACKBONES, BackboneVariant, EfficientRep
from repopt_jax.models.fcos import DETECTORS, FCOS, DetectorVariant
from repopt_jax.models.ghost import GHOST_VARIANTS, GhostRow, GhostVariant, ghostnet
from repopt_jax.models.mobileone import MOBILEONE_VARIANTS, MobileOneVariant, mobileone
from repopt_jax.models.network import Classifier, LayerSpec, Network
from repopt_jax.models.registry import Entry, create, find, list, register
from repopt_jax.models.repmlp import REPMLP_VARIANTS, RepMLPNet, RepMLPVariant
from repopt_jax.models.vgg import VGG_VARIANTS, VGGVariant, vgg

__all__ = [
    "BACKBONES",
    "DETECTORS",
    "FCOS",
    "GHOST_VARIANTS",
    "MOBILEONE_VARIANTS",
    "REPMLP_VARIANTS",
    "VGG_VARIANTS",
    "BackboneVariant",
    "Classifier",
    "DetectorVariant",
    "EfficientRep",
    "Entry",
    "GhostRow",
    "GhostVariant",
    "LayerSpec",
    "MobileOneVariant",
    "Network",
    "RepMLPNet",
    "RepMLPVariant",
    "VGGVariant",
    "create",
    "find",
    "ghostnet",
    "list",
    "mobileone",
    "register",
    "vgg",
]
