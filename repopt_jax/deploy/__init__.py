"""What becomes of a run: pruned, fused, measured, quantized, and written as files that run elsewhere.

`deploy("runs/repopt", "runs/plain")` fuses it; `prune`, `quantize_run` and `export` begin with a run or with
what `deploy` made of it.
"""

from repopt_jax import extras

extras.require("flax", "grain", "rich", by=__name__)

from repopt_jax.deploy.conversion import convert
from repopt_jax.deploy.evaluation import evaluate, open_test, training_images
from repopt_jax.deploy.exporting import Exported, evaluate_file, export
from repopt_jax.deploy.network import Deployed, deploy, load_any, load_deployed, load_plain
from repopt_jax.deploy.pruning import Pruned, prune, prune_config
from repopt_jax.deploy.quantization import Options, Quantized, load_quantized, quantize_run

__all__ = [
    "Deployed",
    "Exported",
    "Options",
    "Pruned",
    "Quantized",
    "convert",
    "deploy",
    "evaluate",
    "evaluate_file",
    "export",
    "load_any",
    "load_deployed",
    "load_plain",
    "load_quantized",
    "open_test",
    "prune",
    "prune_config",
    "quantize_run",
    "training_images",
]
