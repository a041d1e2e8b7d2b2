"""From a run to a plain network on disk, and back: fuse, measure, save, load.

weights/       the fused network's arrays, an Orbax checkpoint
deploy.json    how to rebuild it, and what deploying changed; written last: its presence means all is whole
"""

import dataclasses
import json
from pathlib import Path
from typing import Any

import optax
from flax import nnx
from orbax.checkpoint import v1 as ocp

from repopt_jax._version import __version__
from repopt_jax.arguments import check_path
from repopt_jax.core import paths
from repopt_jax.core.scales import readable
from repopt_jax.deploy.evaluation import compared_images, evaluate
from repopt_jax.quantize.layers import Scheme, with_quantizers
from repopt_jax.surgery.fuse import output_difference
from repopt_jax.surgery.resrep import resized, shrink
from repopt_jax.train.build import Trained, build_model, fused, load_trained, open_checkpoints, pruning_plan
from repopt_jax.train.config import Config, PruneConfig, from_json
from repopt_jax.train.rundir import (
    PART,
    RunFolder,
    from_record,
    info_from_json,
    read_json,
    refuse_strangers,
    replace_file,
)
from repopt_jax.train.state import Network, abstract, first_device, merge_model, split_model
from repopt_jax.train.tasks import METRICS

RECORD = "deploy.json"


@dataclasses.dataclass(frozen=True)
class Deployed:
    """What deploying a run came to; `deploy.json` holds the same fields.

    Attributes:
      run, step: the run's folder and the step of its checkpoint.
      config, dataset: of the run, as plain dicts.
      max_abs, max_rel: largest difference between the outputs of the trained and the fused network (logits;
        of a detector also distances and offsets in strides), absolute and over the largest absolute one.
      agreement: share of the compared images (of a detector: of their locations) to which both give the same
        class.
      compared: how many test images were compared.
      train_parameters, deploy_parameters: trained numbers in the two networks.
      test_accuracy, test_loss, test_count: of the fused network; None where the task has none.
      test: its numbers by name, as `tasks.METRICS` has them for the task.
      shapes: of a pruned network, path -> shape of every parameter; else None.
      quantized: of a network that was quantized after training, the fields of its `quantize.Scheme` and
        "layers", the paths of the quantized ones; else None. The differences are then those from the fused
        network in floating point.
      library_version: of repopt_jax.
      reused: True if it was there already and nothing was done.
    """

    run: str
    step: int
    config: dict[str, Any]
    dataset: dict[str, Any]
    max_abs: float
    max_rel: float
    agreement: float
    compared: int
    train_parameters: int
    deploy_parameters: int
    test_accuracy: float | None
    test_loss: float | None
    test_count: int
    test: dict[str, Any]
    shapes: dict[str, tuple[int, ...]] | None
    quantized: dict[str, Any] | None = None
    library_version: str = __version__
    reused: bool = False


def deploy(
    run_dir: str | Path, out_dir: str | Path, *, data_dir: str | None = None, checkpoint: str | int = "latest"
) -> Deployed:
    """Fuses the network of a run's checkpoint into plain convolutions and saves it in `out_dir`. Of a run
    that prunes, compactors are merged and the rows that have become zero removed.

    Args:
      run_dir: the run, finished or not.
      out_dir: new, empty, or holding this very deployment, which is then returned as it is.
      data_dir: where the test images are now, if not where the run found them.
      checkpoint: of the run, as `build.load_trained` takes it.

    Raises:
      FileNotFoundError: no run, or no such checkpoint, in `run_dir`.
      ValueError: `checkpoint` is none, `out_dir` holds something else, or the data do not fit the network.
      OSError: `out_dir` cannot be written.
    """
    check_path("run_dir", run_dir)
    check_path("out_dir", out_dir)
    out_dir = Path(out_dir).expanduser().absolute()
    origin = _origin(run_dir, checkpoint)
    if (stored := _stored(out_dir, origin)) is not None:
        return stored
    trained = load_trained(run_dir, checkpoint=origin["step"])
    return save_deployed(out_dir, origin, trained, plain_network(trained), data_dir=data_dir)


def save_deployed(
    out_dir: Path, origin: dict[str, Any], trained: Trained, fused: Any, *, data_dir: str | None = None
) -> Deployed:
    """Compares a plain network with what it was made from, measures and saves it.

    Args:
      out_dir: a folder that holds no deployment.
      origin: the first four fields of `Deployed`, and `quantized`.
      trained: the network that it was made from, of which it is to be the deployment.
      fused: the plain network.
      data_dir: where the test images are now.

    Raises:
      FileNotFoundError, ValueError, OSError: as `deploy`.
    """
    out_dir.mkdir(parents=True, exist_ok=True)
    # From here on the folder is known as ours, should this be interrupted.
    (out_dir / (RECORD + PART)).write_text(json.dumps(origin), encoding="utf-8")
    parameters = nnx.state(fused, nnx.Param)
    shapes = {path: tuple(leaf.shape) for path, leaf in paths.named_leaves(parameters)[0].items()}
    difference = output_difference(trained.model, fused, compared_images(trained, data_dir))
    test = evaluate(trained._replace(model=fused), data_dir=data_dir)
    ocp.save(str(out_dir / "weights"), _arrays(split_model(fused)), overwrite=True)
    deployed = Deployed(
        **origin,
        max_abs=difference.max_abs,
        max_rel=difference.max_rel,
        agreement=difference.agreement,
        compared=difference.count,
        train_parameters=optax.tree.size(nnx.state(trained.model, nnx.Param)),
        deploy_parameters=optax.tree.size(parameters),
        test_accuracy=test.get("accuracy"),
        test_loss=test["loss"],
        test_count=test["count"],
        test={metric.name: test[metric.name] for metric in METRICS[trained.config.task]},
        shapes=shapes if trained.config.prune.run else None,
    )
    replace_file(out_dir / RECORD, json.dumps(dataclasses.asdict(deployed), indent=2) + "\n")
    return deployed


def plain_network(trained: Trained) -> Any:
    """The network of a run as plain convolutions: compactors merged and rows that are zero removed, branches
    and batch norms fused."""
    slim, plan = trained.model, pruning_plan(trained.config, trained.info)
    if plan is not None:
        slim = shrink(slim, plan, threshold=trained.config.prune.threshold)
    return fused(trained.config, trained.info, slim)


def load_plain(directory: str | Path, *, checkpoint: str | int | None = None) -> Trained:
    """`load_any`, as plain convolutions.

    Raises:
      FileNotFoundError, ValueError: as `load_any`.
    """
    return as_plain(load_any(directory, checkpoint=checkpoint), directory)


def as_plain(trained: Trained, directory: str | Path) -> Trained:
    """What `load_any` returned from `directory`, as plain convolutions."""
    if (Path(directory).expanduser() / RECORD).is_file():
        return trained
    return trained._replace(model=plain_network(trained))


def load_deployed(directory: str | Path) -> Trained:
    """The fused network that `deploy` saved.

    Raises:
      FileNotFoundError: no deployment in `directory`.
      ValueError: its record or its weights are damaged.
    """
    check_path("directory", directory)
    directory = Path(directory).expanduser().absolute()
    record = read_json(directory / RECORD)
    if record is None:
        raise FileNotFoundError(f"{directory} has no deploy.json: it holds no deployed network")
    config, info = read_settings(directory)

    def plain() -> Any:
        # Scales and pruning shape training, not the fused network; their folders may be gone.
        model, _ = build_model(dataclasses.replace(config, scales="", prune=PruneConfig()), info)
        model.eval()
        return fused(config, info, model)

    whole = nnx.eval_shape(plain)
    try:
        whole = resized(whole, record["shapes"]) if record.get("shapes") else whole
        if quantized := record.get("quantized"):
            layers = dict.fromkeys(quantized["layers"], (0.0, 0.0))
            whole = with_quantizers(whole, Scheme.of(quantized), layers)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise _damaged(directory / RECORD, error) from error
    network = split_model(whole)
    weights = directory / "weights"
    loaded = readable(
        lambda: ocp.load(str(weights), abstract(_arrays(network), first_device())),
        f"{weights} is damaged or not of the network of {RECORD}: deploy the run again in another folder",
    )
    return Trained(merge_model(network.graphdef, **loaded), config, info, int(record["step"]))


def read_settings(directory: str | Path) -> tuple[Config, Any]:
    """The config and the data set of a run or deployment, without its network.

    Raises:
      FileNotFoundError: there is neither.
      ValueError: the record of the deployment is damaged.
    """
    record = read_json(path := Path(directory).expanduser() / RECORD)
    if record is None:
        return RunFolder(directory).read()
    try:
        config = from_json(json.dumps(record["config"]))
        int(record["step"])
        return config, info_from_json(config.task, record["dataset"], path)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise _damaged(path, error) from error


def _damaged(path: Path, error: Exception) -> ValueError:
    return ValueError(
        f"{path} is damaged or of another version ({type(error).__name__}: {error}): deploy the run again in "
        "another folder"
    )


def load_any(directory: str | Path, *, checkpoint: str | int | None = None) -> Trained:
    """The network of a deployment or, if `directory` is none, of a run: of its newest checkpoint, or as
    `build.load_trained` takes it.

    Raises:
      FileNotFoundError: there is neither, or no such checkpoint.
      ValueError: a `checkpoint` of a deployment, which has none.
    """
    check_path("directory", directory)
    if not (Path(directory).expanduser() / RECORD).is_file():
        return load_trained(directory, checkpoint="latest" if checkpoint is None else checkpoint)
    if checkpoint is not None:
        raise ValueError(
            f"`checkpoint`={checkpoint!r}, but {directory} holds a deployed network, which was made from "
            "one: leave it out, or give the folder of the run"
        )
    return load_deployed(directory)


def _origin(run_dir: str | Path, checkpoint: str | int) -> dict[str, Any]:
    """What a deployment is made from, read without loading the network."""
    folder = RunFolder(run_dir)
    config, info = folder.read()
    with open_checkpoints(folder, config) as checkpoints:
        step = checkpoints.find(checkpoint)
    return origin_of(str(folder.path), step, config, info)


def origin_of(
    run: str, step: int, config: Config, info: Any, quantized: dict[str, Any] | None = None
) -> dict[str, Any]:
    """The fields of `Deployed` that say what a deployment is made from, as JSON gives them back."""
    plain = {"config": _plain(config), "dataset": _plain(info)}
    return {"run": run, "step": step, **plain, "quantized": quantized}


def _stored(out_dir: Path, origin: dict[str, Any]) -> Deployed | None:
    record = read_json(out_dir / RECORD)
    if record is not None:
        if not isinstance(record, dict):
            raise ValueError(
                f"{out_dir / RECORD} is damaged: it holds no object of fields; remove its folder"
            )
        differing = [name for name in origin if record.get(name) != origin[name]]
        if not differing:
            return from_record(Deployed, record, out_dir / RECORD, reused=True)
        raise ValueError(
            f"`out_dir` {out_dir} holds another deployment (of {record.get('run')}, step "
            f"{record.get('step')}; it differs in {', '.join(differing)}): choose another folder, or remove "
            "that one"
        )
    # Beside an unfinished record, weights are the remains of a deployment that was interrupted.
    known = ("weights", RECORD + PART) if (out_dir / (RECORD + PART)).exists() else ()
    refuse_strangers(out_dir, "deployment", lambda name: name.startswith(known))
    return None


def _arrays(network: Network) -> dict[str, Any]:
    return {"params": network.params, "non_trainable": network.non_trainable}


def _plain(value: Any) -> dict[str, Any]:
    """A dataclass as what JSON gives back, so that stored and fresh values compare."""
    return json.loads(json.dumps(dataclasses.asdict(value)))
