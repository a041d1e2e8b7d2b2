"""Prunes the network of a finished run by ResRep: one training with compactors, then the smaller network.

The training is a run like any other, in the same folder, with the same log, checkpoints and resume; its
config says in `prune` what it starts from.

deployed/     the smaller network, as `deploy` writes it
prune.json    what pruning came to; written last
"""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import optax
from flax import nnx

from repopt_jax.arguments import check_path
from repopt_jax.deploy.evaluation import evaluate
from repopt_jax.deploy.network import deploy
from repopt_jax.optim.resrep import row_norms
from repopt_jax.surgery.resrep import kept_rows
from repopt_jax.train.build import load_source, load_trained, open_checkpoints, pruning_plan
from repopt_jax.train.config import Config, PruneConfig, check_config
from repopt_jax.train.loop import run
from repopt_jax.train.rundir import RunFolder, Summary, from_record, read_json, read_records, replace_file
from repopt_jax.train.tasks import METRICS

RECORD = "prune.json"
DEPLOYED = "deployed"


@dataclasses.dataclass(frozen=True)
class Pruned:
    """What pruning a run came to; `prune.json` holds the same fields.

    Attributes:
      run, step: folder and step of the network that it started from.
      target: share of the multiply-accumulates that was to stay.
      macs_before, macs_after: multiply-accumulates of one image.
      parameters_before, parameters_after: trained numbers, those of the smaller one with batch norms folded.
      test_before, test_trained, test_after: the test images' numbers by name (`tasks.METRICS`) of the network
        at the start, of that with compactors at the end of the training, and of the smaller one.
      test_count: number of test images.
      max_abs, max_rel: largest difference between the outputs of the last two, as in `deploy`.
      masked, removed: rows that the last masks cover, and rows that are removed. Fewer are removed where the
        training was too short for masked ones to become zero.
      smallest: the smallest norm of a row that stays.
      widths: path of a layer -> inputs and outputs before, inputs and outputs after.
      reused: True if it was there already and nothing was done.
    """

    run: str
    step: int
    target: float
    macs_before: int
    macs_after: int
    parameters_before: int
    parameters_after: int
    test_before: dict[str, Any]
    test_trained: dict[str, Any]
    test_after: dict[str, Any]
    test_count: int
    max_abs: float
    max_rel: float
    masked: int
    removed: int
    smallest: float
    widths: dict[str, tuple[int, int, int, int]]
    reused: bool = False


def prune_config(run_dir: str | Path, *, target: float = 0.5, checkpoint: str | int = "latest") -> Config:
    """The config with which the network of a run is pruned: its data, network and length, the published
    recipe's optimizer.

    The rate is a cosine from 0.01 to 0, momentum 0.9 without Nesterov, decay 1e-4; the published code gives
    biases twice the rate. Of the run's own optimizer only what the images and the batch ask for is kept:
    label smoothing and accumulation.

    Args:
      run_dir: the run, finished or not, of a plain network: mode plain or repopt.
      target: share of the multiply-accumulates that is to stay.
      checkpoint: of the run, as `build.load_trained` takes it.

    Raises:
      FileNotFoundError: no run, or no such checkpoint, in `run_dir`.
      ValueError: `checkpoint` is none; the run is of another mode, or prunes itself.
    """
    check_path("run_dir", run_dir)
    folder = RunFolder(run_dir)
    config, _ = folder.read()
    if config.prune.run:
        raise ValueError(
            f"{folder.path} is itself a pruning, of {config.prune.run}: prune that run to another target"
        )
    if config.model.mode not in ("plain", "repopt"):
        raise ValueError(
            f"{folder.path} was trained in mode {config.model.mode!r}, whose layers have branches: prune a "
            "run of mode plain or repopt"
        )
    with open_checkpoints(folder, config) as checkpoints:
        step = checkpoints.find(checkpoint)
    optim = dataclasses.replace(
        type(config.optim)(),
        learning_rate=0.01,
        momentum=0.9,
        nesterov=False,
        weight_decay=1e-4,
        label_smoothing=config.optim.label_smoothing,
        accumulate=config.optim.accumulate,
    )
    return dataclasses.replace(
        config,
        name=f"{config.name}-pruned",
        scales="",
        scales_mean=False,
        rules="both",
        freeze_scales=None,
        published=None,
        model=dataclasses.replace(config.model, mode="plain"),
        optim=optim,
        prune=PruneConfig(run=str(folder.path), step=step, target=target),
    )


def prune(
    config: Config, out_dir: str | Path, *, progress: bool = True, stop: Callable[[], bool] | None = None
) -> Pruned | Summary:
    """Trains as `config` says, makes the smaller network in `out_dir`/deployed, and compares.

    Started again with an equal config, it goes on where it was stopped, or returns what is there.

    Args:
      config: made by `prune_config`.
      out_dir: its folder: new, empty, or of this run.
      progress, stop: as in `loop.run`.

    Returns:
      What it came to; the training's summary if it was stopped before the end.

    Raises:
      ValueError: the config prunes nothing; and as `loop.run`, `deploy`.
      FileNotFoundError: the run that it started from is gone.
      OSError: as `loop.run`, `deploy`.
    """
    check_config(config)
    check_path("out_dir", out_dir)
    if not config.prune.run:
        raise ValueError("`prune.run` is empty: make the config with `prune_config`")
    done = run(config, out_dir, progress=progress, stop=stop)
    if not done.finished:
        return done
    folder = RunFolder(out_dir)
    path = folder.path / RECORD
    if (record := read_json(path)) is not None:
        return from_record(Pruned, record, path, reused=True)
    trained = load_trained(folder.path)
    plan = pruning_plan(config, trained.info)
    assert plan is not None
    deployed = deploy(folder.path, folder.path / DEPLOYED)
    source = load_source(config)
    names = [metric.name for metric in METRICS[config.task]]
    before = evaluate(source, data_dir=config.data.data_dir or None)

    kept = kept_rows(trained.model, plan, config.prune.threshold)
    norms = jax.device_get(row_norms(nnx.state(trained.model, nnx.Param), plan.compactors))
    chosen = [record["masked"] for record in read_records(folder.metrics) if record["kind"] == "prune"]
    full, slim = plan.widths(plan.masks), plan.widths(kept)
    pruned = Pruned(
        run=config.prune.run,
        step=source.step,
        target=config.prune.target,
        macs_before=plan.total,
        macs_after=plan.macs(kept),
        parameters_before=optax.tree.size(nnx.state(source.model, nnx.Param)),
        parameters_after=deployed.deploy_parameters,
        test_before={name: before[name] for name in names},
        test_trained=done.test,
        test_after=deployed.test,
        test_count=before["count"],
        max_abs=deployed.max_abs,
        max_rel=deployed.max_rel,
        masked=chosen[-1] if chosen else 0,
        removed=sum(int((~mask).sum()) for mask in kept.values()),
        smallest=min(float(norms[path][mask].min()) for path, mask in kept.items()),
        widths={path: (*full[path], *slim[path]) for path in full},
    )
    values = dataclasses.asdict(pruned)
    values.pop("reused")
    replace_file(path, json.dumps(values, indent=2) + "\n")
    return pruned
