"""Networks: a variant is a row in a table, the kind of block an argument."""

from repopt_jax.models.vgg import KINDS as KINDS
from repopt_jax.models.vgg import VGG_VARIANTS as VGG_VARIANTS
from repopt_jax.models.vgg import RepOptVGG as RepOptVGG
from repopt_jax.models.vgg import VGGVariant as VGGVariant
