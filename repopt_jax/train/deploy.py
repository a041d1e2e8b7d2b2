"""From a run to a plain network on disk, and back: fuse, measure, save, load, evaluate, convert.

weights/       the fused network's arrays, an Orbax checkpoint
deploy.json    how to rebuild it, and what deploying changed; written last: its presence means all is whole
"""

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from orbax.checkpoint import v1 as ocp

from repopt_jax._version import __version__
from repopt_jax.core import paths
from repopt_jax.core.scales import save_scales
from repopt_jax.interop import load_torch_scales
from repopt_jax.interop.convert import convert_file, export_weights, is_torch_file, refuse_existing
from repopt_jax.interop.networks import RECORD as CONVERTED
from repopt_jax.interop.networks import load_converted
from repopt_jax.quantize.layers import Scheme, with_quantizers
from repopt_jax.surgery.fuse import fuse, output_difference
from repopt_jax.surgery.resrep import resized, shrink
from repopt_jax.train.build import (
    Trained,
    build_model,
    load_trained,
    make_task,
    open_checkpoints,
    pruning_plan,
)
from repopt_jax.train.config import Config, DataConfig, PruneConfig, from_json
from repopt_jax.train.rundir import (
    PART,
    RunFolder,
    from_record,
    info_from_json,
    read_json,
    refuse_strangers,
    replace_file,
)
from repopt_jax.train.state import Network, abstract, first_device, make_mesh, merge_model, split_model
from repopt_jax.train.tasks import METRICS, Task

RECORD = "deploy.json"
COMPARED_IMAGES = 1024  # test images on which outputs are compared


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
    difference = output_difference(trained.model, fused, _some_images(trained, data_dir))
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
    return fuse(slim)


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
    """
    directory = Path(directory).expanduser().absolute()
    record = read_json(directory / RECORD)
    if record is None:
        raise FileNotFoundError(f"{directory} has no deploy.json: it holds no deployed network")
    config, info = read_settings(directory)

    def fused() -> Any:
        # Scales and pruning shape training, not the fused network; their folders may be gone.
        model, _ = build_model(dataclasses.replace(config, scales="", prune=PruneConfig()), info)
        model.eval()
        return fuse(model)

    whole = nnx.eval_shape(fused)
    whole = resized(whole, record["shapes"]) if record.get("shapes") else whole
    if quantized := record.get("quantized"):
        scheme = {field.name: quantized[field.name] for field in dataclasses.fields(Scheme)}
        whole = with_quantizers(whole, Scheme(**scheme), dict.fromkeys(quantized["layers"], (0.0, 0.0)))
    network = split_model(whole)
    loaded = ocp.load(str(directory / "weights"), abstract(_arrays(network), first_device()))
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
        return config, info_from_json(config.task, record["dataset"])
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(
            f"{path} is damaged or of another version ({type(error).__name__}: {error}): deploy the run "
            "again in another folder"
        ) from error


def load_any(directory: str | Path, *, checkpoint: str | int | None = None) -> Trained:
    """The network of a deployment or, if `directory` is none, of a run: of its newest checkpoint, or as
    `build.load_trained` takes it.

    Raises:
      FileNotFoundError: there is neither, or no such checkpoint.
      ValueError: a `checkpoint` of a deployment, which has none.
    """
    if not (Path(directory).expanduser() / RECORD).is_file():
        return load_trained(directory, checkpoint="latest" if checkpoint is None else checkpoint)
    if checkpoint is not None:
        raise ValueError(
            f"`checkpoint`={checkpoint!r}, but {directory} holds a deployed network, which was made from "
            "one: leave it out, or give the folder of the run"
        )
    return load_deployed(directory)


def evaluate(trained: Trained, *, data_dir: str | None = None) -> dict[str, Any]:
    """The numbers of the task (`tasks.METRICS`), loss and count over the test images of the network's data
    set, each counted once.

    Raises:
      FileNotFoundError, ValueError: the data are missing, or their classes are not those of the training.
    """
    task, source, batches = open_test(trained, data_dir)
    network = split_model(trained.model)
    mesh = make_mesh(devices=jax.local_devices()[:1])
    return task.make_evaluator(network.graphdef, source, mesh)(network.params, network.non_trainable, batches)


def open_test(trained: Trained, data_dir: str | None = None) -> tuple[Task, Any, Any]:
    """The task of a network, its data set, and the batches of the test split, the last one padded.

    Raises:
      FileNotFoundError, ValueError: as `evaluate`.
    """
    info = trained.info
    return open_test_of(trained.config, info.class_names, info.channels, data_dir)


def open_test_of(
    config: Config,
    class_names: Sequence[str],
    channels: int,
    data_dir: str | None = None,
    **preprocessing: Any,
) -> tuple[Task, Any, Any]:
    """`open_test` by a config, the names of the classes, and the channels of the images; `preprocessing` are
    fields of `DataConfig` that replace those of the config."""
    # The test images, also of a run that was evaluated on training images that it held out.
    settings = dataclasses.replace(config.data, validation=0, **preprocessing)
    task, source, transform = _open(config, settings, class_names, channels, data_dir)
    size, limit = config.eval_batch_size, config.data.eval_limit
    batches = task.eval_batches(
        source, transform, batch_size=size, limit=limit, process_index=0, process_count=1
    )
    return task, source, batches


def training_images(trained: Trained, count: int, *, data_dir: str | None = None) -> np.ndarray:
    """The first `count` training images of a run, in the order of `data.train_limit`, or all if there are
    fewer: preprocessed as in evaluation, not augmented. float32 (count, height, width, channels).

    Raises:
      FileNotFoundError, ValueError: as `evaluate`.
    """
    config, known = trained.config, trained.info
    task, source, transform = _open(config, config.data, known.class_names, known.channels, data_dir)
    info = dataclasses.replace(source.info, num_eval=source.info.num_train)
    source = dataclasses.replace(source, info=info, eval=source.train)
    limit = min(count, info.num_eval)
    size = min(config.eval_batch_size, limit)
    shown = {"batch_size": size, "limit": limit, "process_index": 0, "process_count": 1}
    batches = task.eval_batches(source, transform, **shown)
    return np.concatenate([batch["image"][batch["mask"] > 0] for batch in batches])


def _open(
    config: Config,
    settings: DataConfig,
    class_names: Sequence[str],
    channels: int,
    data_dir: str | None,
) -> tuple[Task, Any, Any]:
    """The task, the data set and the preprocessing of the `data` section of a config.

    Raises:
      FileNotFoundError, ValueError: as `evaluate`.
    """
    if data_dir is not None:
        settings = dataclasses.replace(settings, data_dir=data_dir)
    task = make_task(config)
    source, transform = task.open_data(settings)
    if (found := source.info.class_names) != (wanted := tuple(class_names)):
        raise ValueError(
            f"the network was trained on {len(wanted)} classes ({', '.join(wanted[:6])} ...) and the data "
            f"have {len(found)} ({', '.join(found[:6])} ...): give the data that it was trained on"
        )
    if source.info.channels != channels:
        raise ValueError(
            f"the network takes images of {channels} channels, and the data have {source.info.channels}: "
            "give the data that it was trained on"
        )
    return task, source, transform


def _some_images(trained: Trained, data_dir: str | None) -> jax.Array:
    """The first `COMPARED_IMAGES` test images; no more are read."""
    images, count = [], 0
    for batch in open_test(trained, data_dir)[2]:
        images.append(batch["image"][batch["mask"] > 0])
        count += len(images[-1])
        if count >= COMPARED_IMAGES:
            break
    return jnp.asarray(np.concatenate(images)[:COMPARED_IMAGES])


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


# -- other forms

SCALES = "scales"


def convert(
    source: str, out: str, *, model: str = "", classes: int = 0, key: str = "", to: str = ""
) -> tuple[str, ...]:
    """Converts `source` to `out` and returns a description of the result, line by line.

    | source | out | what |
    |---|---|---|
    | PyTorch or safetensors file | folder | a converted folder, which `interop.load_converted` reads |
    | the same | `.pth`, `.pt`, `.safetensors` | the same weights under the names of `to` |
    | the same, `to="scales"` | folder | the scales alone, as `load_scales` reads them |
    | our run, deployed or converted folder | `.pth`, `.pt`, `.safetensors` | its weights, names of `to` |

    Args:
      source, out: as above; nothing may be at `out`.
      model: the architecture of a file, such as "repopt-vgg-B1".
      classes: of a file's network; where it is given, the file must say the same.
      key: the entry of a checkpoint that holds the weights, as `interop.read_tensors` takes it.
      to: whose names PyTorch's keys are to be (a key of `interop.SCHEMES`), "" for the network's own
        authors'; or "scales".

    Raises:
      FileNotFoundError: nothing at `source`.
      FileExistsError: something is at `out`.
      ValueError: what the file or the folder holds cannot be converted so.
    """
    refuse_existing(out)
    given, target = Path(source).expanduser(), Path(out).expanduser()
    if not given.exists():
        raise FileNotFoundError(f"no file or folder at {source}")
    if given.is_dir():
        if model or classes or key or to == SCALES:
            raise ValueError(
                f"{source} is a folder of ours, which says itself what it holds: give `to` alone"
            )
        if not is_torch_file(target):
            raise ValueError(f"{source} is a folder of ours: `out` must end in .safetensors, .pth or .pt")
        if (given / CONVERTED).is_file():
            return export_weights(target, load_converted(given), names=to).lines
        trained = load_any(given)
        return export_weights(target, trained.model, names=to, mode=trained.config.model.mode).lines
    if to == SCALES:
        if is_torch_file(target):
            raise ValueError(f"scales go into a folder of ours, not a file such as {out}")
        scales = load_torch_scales(given, key=key or None)
        save_scales(target, scales)
        vectors = sum(len(entry) for entry in scales.vectors.values())
        known = f" of {scales.metadata.architecture}" if scales.metadata.architecture else ""
        return (f"scales{known}: {vectors} vectors for {len(scales.entries)} layers",)
    if not model:
        raise ValueError(
            "`model` must name the file's architecture, such as repopt-vgg-B1 or repvgg-A0; of a file of "
            "scales alone, `to` must be scales"
        )
    return convert_file(given, target, model, classes=classes, key=key or None, names=to).lines
