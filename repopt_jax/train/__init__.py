"""The trainer: a config in, a run's folder out. `run(load_config("digits:search"), "runs/search")`."""

from repopt_jax import extras

extras.require("flax", "grain", "rich", by=__name__)

from repopt_jax.train.build import Trained, build_model, load_trained, open_data
from repopt_jax.train.config import (
    Config,
    DataConfig,
    MeshConfig,
    ModelConfig,
    OptimConfig,
    PruneConfig,
    QuantizeConfig,
    from_json,
    load_config,
    to_json,
)
from repopt_jax.train.loop import run
from repopt_jax.train.rules import validate
from repopt_jax.train.rundir import RunFolder, Summary

__all__ = [
    "Config",
    "DataConfig",
    "MeshConfig",
    "ModelConfig",
    "OptimConfig",
    "PruneConfig",
    "QuantizeConfig",
    "RunFolder",
    "Summary",
    "Trained",
    "build_model",
    "from_json",
    "load_config",
    "load_trained",
    "open_data",
    "run",
    "to_json",
    "validate",
]
