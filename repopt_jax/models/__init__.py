"""Networks: a variant is a row in a table, the kind of block an argument."""

from repopt_jax.models.efficientrep import BACKBONES as BACKBONES
from repopt_jax.models.efficientrep import BackboneVariant as BackboneVariant
from repopt_jax.models.efficientrep import EfficientRep as EfficientRep
from repopt_jax.models.fcos import DETECTORS as DETECTORS
from repopt_jax.models.fcos import FCOS as FCOS
from repopt_jax.models.fcos import DetectorVariant as DetectorVariant
from repopt_jax.models.ghost import GHOST_KINDS as GHOST_KINDS
from repopt_jax.models.ghost import GHOST_VARIANTS as GHOST_VARIANTS
from repopt_jax.models.ghost import GhostRow as GhostRow
from repopt_jax.models.ghost import GhostVariant as GhostVariant
from repopt_jax.models.ghost import RepGhostNet as RepGhostNet
from repopt_jax.models.mobileone import MOBILEONE_VARIANTS as MOBILEONE_VARIANTS
from repopt_jax.models.mobileone import MobileOne as MobileOne
from repopt_jax.models.mobileone import MobileOneVariant as MobileOneVariant
from repopt_jax.models.vgg import KINDS as KINDS
from repopt_jax.models.vgg import VGG_VARIANTS as VGG_VARIANTS
from repopt_jax.models.vgg import RepOptVGG as RepOptVGG
from repopt_jax.models.vgg import VGGVariant as VGGVariant
