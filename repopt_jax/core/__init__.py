"""The method's algebra: kernel maps, branches, scales, and pytrees by path. Nothing here knows Flax."""

from repopt_jax.core.branches import AfterPointwise as AfterPointwise
from repopt_jax.core.branches import Average as Average
from repopt_jax.core.branches import Branch as Branch
from repopt_jax.core.branches import BranchSet as BranchSet
from repopt_jax.core.branches import Identity as Identity
from repopt_jax.core.branches import Kernel as Kernel
from repopt_jax.core.branches import Local as Local
from repopt_jax.core.branches import Pool as Pool
from repopt_jax.core.law import compare_with_law as compare_with_law
from repopt_jax.core.law import search_lambda as search_lambda
from repopt_jax.core.parametrization import Parametrization as Parametrization
from repopt_jax.core.published import STRUCTURES as STRUCTURES
from repopt_jax.core.published import default_branches as default_branches
from repopt_jax.core.scales import Scales as Scales
from repopt_jax.core.scales import load_scales as load_scales
from repopt_jax.core.scales import save_scales as save_scales
from repopt_jax.core.structure import Geometry as Geometry
from repopt_jax.core.structure import Stage as Stage
from repopt_jax.core.structure import Structure as Structure
from repopt_jax.core.tracing import trace_layers as trace_layers
