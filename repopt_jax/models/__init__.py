"""Networks, always built plain: a variant is a row in a table, all of them by name in one registry."""

from repopt_jax.models.efficientrep import BACKBONES as BACKBONES
from repopt_jax.models.efficientrep import BackboneVariant as BackboneVariant
from repopt_jax.models.efficientrep import EfficientRep as EfficientRep
from repopt_jax.models.fcos import DETECTORS as DETECTORS
from repopt_jax.models.fcos import FCOS as FCOS
from repopt_jax.models.fcos import DetectorVariant as DetectorVariant
from repopt_jax.models.ghost import GHOST_VARIANTS as GHOST_VARIANTS
from repopt_jax.models.ghost import GhostRow as GhostRow
from repopt_jax.models.ghost import GhostVariant as GhostVariant
from repopt_jax.models.ghost import ghostnet as ghostnet
from repopt_jax.models.mobileone import MOBILEONE_VARIANTS as MOBILEONE_VARIANTS
from repopt_jax.models.mobileone import MobileOneVariant as MobileOneVariant
from repopt_jax.models.mobileone import mobileone as mobileone
from repopt_jax.models.network import Classifier as Classifier
from repopt_jax.models.network import LayerSpec as LayerSpec
from repopt_jax.models.network import Network as Network
from repopt_jax.models.registry import Entry as Entry
from repopt_jax.models.registry import create as create
from repopt_jax.models.registry import find as find
from repopt_jax.models.registry import list as list
from repopt_jax.models.registry import register as register
from repopt_jax.models.vgg import VGG_VARIANTS as VGG_VARIANTS
from repopt_jax.models.vgg import VGGVariant as VGGVariant
from repopt_jax.models.vgg import vgg as vgg
