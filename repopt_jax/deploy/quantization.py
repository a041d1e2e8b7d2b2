"""Quantizes the network of a run, after training or by training on, and measures what it costs.

OUT/weights/, deploy.json     the quantized network, which `load_deployed` reads
OUT/quantize.json             what quantizing came to; written last
OUT/training/                 of quantization-aware training: its run
"""

import dataclasses
import json
import logging
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final

import jax
import numpy as np
from flax import nnx

from repopt_jax.arguments import check_path
from repopt_jax.core import paths
from repopt_jax.deploy.evaluation import compared_batches, evaluate, training_images
from repopt_jax.deploy.network import RECORD as DEPLOYED
from repopt_jax.deploy.network import (
    as_plain,
    load_any,
    load_deployed,
    origin_of,
    plain_network,
    save_deployed,
)
from repopt_jax.quantize import (
    Histogram,
    Scheme,
    calibrate,
    expected,
    find_quantizable,
    find_ranges,
    image_statistics,
    layer_noise,
    quantize,
    quantizers,
    sensitivity,
)
from repopt_jax.quantize.calibration import PERCENTILE, check_method
from repopt_jax.quantize.layers import Quantizer
from repopt_jax.surgery.prepare import Mode
from repopt_jax.train.build import Trained, load_trained
from repopt_jax.train.config import Config, QuantizeConfig
from repopt_jax.train.loop import run
from repopt_jax.train.rundir import PART, Summary, from_record, read_json, refuse_strangers, replace_file
from repopt_jax.train.tasks import METRICS

logger: Final = logging.getLogger(__name__)

RECORD = "quantize.json"
TRAINING = "training"
SENSITIVITY_IMAGES = 128
# Steps of training after which running statistics have forgotten where they began: 0.9^50 is 0.5 %.
SETTLED_STEPS = 50
BARS = 64  # of the histograms in the record
FLOAT_BYTES = 4


@dataclasses.dataclass(frozen=True)
class Options:
    """How a run is quantized; see `quantize.quantize` for what is not described here.

    Attributes:
      images: training images that the ranges are found on, not augmented.
      keep_float: how many of the most sensitive layers stay in floating point; of a detector beside those
        that make its outputs (`FCOS.predictions`).
      sensitivity: whether the sensitivity of each layer is measured, also where none stays in floating point.
      aware: whether the network is trained on with quantization.
      epochs: of that training; None for half of those of the run.

    Raises:
      ValueError: as `quantize.quantize`, and numbers out of range; it lists all.
    """

    bits: int = 8
    weight_bits: int | None = None
    per: str = "channel"
    calibration: str = "percentile"
    percentile: float = PERCENTILE
    weight_range: str = "reduced"
    scale_bits: int | None = None
    images: int = 512
    keep_float: int = 0
    sensitivity: bool = False
    aware: bool = False
    epochs: int | None = None

    def __post_init__(self) -> None:
        problems = []
        for check in (lambda: check_method(self.calibration, self.percentile), lambda: self.scheme):
            try:
                check()
            except ValueError as error:
                problems.append(str(error))
        problems += [
            f"`{name}` is {value}: it must be at least {least}"
            for name, value, least in (
                ("images", self.images, 1),
                ("keep_float", self.keep_float, 0),
                ("epochs", 1 if self.epochs is None else self.epochs, 1),
            )
            if value < least
        ]
        if self.epochs is not None and not self.aware:
            problems.append(f"`epochs` is {self.epochs}, and only quantization-aware training has epochs")
        if problems:
            raise ValueError("; ".join(problems))

    @property
    def scheme(self) -> Scheme:
        """Bits and scales of the layers."""
        return Scheme.of(vars(self))

    @property
    def ranges(self) -> dict[str, Any]:
        """How ranges are found, as arguments of the functions of `repopt_jax.quantize`."""
        return {"calibration": self.calibration, "percentile": self.percentile}


@dataclasses.dataclass(frozen=True)
class QuantizedLayer:
    """What became of a layer.

    Attributes:
      kept: whether it stayed in floating point.
      low, high: the range of its input.
      tail: max|K| / rms of its kernel.
      expected: the signal-to-noise ratio in dB to expect of it, see `quantize.expected`.
      arriving: the ratio in dB of its input, from what the layers before it add.
      sensitivity: the ratio in dB of the network's output with this layer alone quantized; None if it was not
        measured.
      kernel, inputs: histograms, {"low", "high", "before": counts, "after": counts} in equal bars; of the
        inputs absolute values. "after" is empty of a layer that stayed in floating point.

    A ratio is None where there is no noise.
    """

    kept: bool
    low: float
    high: float
    tail: float
    expected: float | None
    arriving: float | None
    sensitivity: float | None
    kernel: dict[str, Any]
    inputs: dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Quantized:
    """What quantizing a run came to; `quantize.json` holds the same fields.

    Attributes:
      run, step: of the network that was quantized.
      task: of its config.
      options: as dict.
      images: how many there were for the ranges.
      warning: what is wrong with these images, or ""; not looked for in runs of fewer than `SETTLED_STEPS`.
      expected: signal-to-noise ratio of the output in dB to expect, see `quantize.expected`.
      measured: that of the output on `compared` test images; None where nothing differs.
      test_float, test: the numbers over the test images by name (`tasks.METRICS`), in floating point and
        quantized.
      test_count: number of test images.
      max_abs, max_rel, agreement, compared: of the outputs, quantized and in floating point, as in `deploy`.
      float_bytes, quantized_bytes: of all parameters: kernels at their bits, everything else at 32.
      layers: path -> what became of the layer.
      reused: True if it was there already and nothing was done.
    """

    run: str
    step: int
    task: str
    options: dict[str, Any]
    images: int
    warning: str
    expected: float | None
    measured: float | None
    test_float: dict[str, Any]
    test: dict[str, Any]
    test_count: int
    max_abs: float
    max_rel: float
    agreement: float
    compared: int
    float_bytes: int
    quantized_bytes: int
    layers: dict[str, QuantizedLayer]
    reused: bool = False

    @property
    def kept(self) -> list[str]:
        """The paths of the layers that stayed in floating point."""
        return [path for path, layer in self.layers.items() if layer.kept]


def quantize_run(
    run_dir: str | Path,
    out_dir: str | Path,
    options: Options | None = None,
    *,
    config: Callable[[Config], Config] = lambda config: config,
    checkpoint: str | int | None = None,
    data_dir: str | None = None,
    progress: bool = True,
    stop: Callable[[], bool] | None = None,
) -> Quantized | Summary:
    """Quantizes the network of a run or deployment and saves it in `out_dir`, where `load_deployed` finds it.

    Ranges are found on training images. Started again with equal options, it returns what is there;
    quantization-aware training goes on where it was stopped.

    Args:
      run_dir: a run, whose network is fused, or a deployment.
      out_dir: new, empty, or of this very quantization.
      options: None for 8 bits after training.
      config: changes the config of quantization-aware training that `aware_config` makes.
      checkpoint: of a run, as `deploy.load_any` takes it.
      data_dir: where the images are now, if not where the run found them.
      progress, stop: of the training, as in `loop.run`.

    Returns:
      What it came to; the training's summary if it was stopped before the end.

    Raises:
      FileNotFoundError: no run or deployment, no such checkpoint, or no images.
      ValueError: the network is quantized already or has no test images; `keep_float` leaves nothing to
        quantize; the training cannot run; or `out_dir` holds something else.
      OSError: `out_dir` cannot be written.
    """
    check_path("run_dir", run_dir)
    check_path("out_dir", out_dir)
    options, out_dir = options or Options(), Path(out_dir).expanduser().absolute()
    source = load_any(run_dir, checkpoint=checkpoint)
    name = str(Path(run_dir).expanduser().absolute())
    spec = {"run": name, "step": source.step, "options": dataclasses.asdict(options)}
    if (stored := _stored(out_dir, spec)) is not None:
        return stored
    if done := quantizers(source.model):
        raise ValueError(
            f"the network of {run_dir} is quantized already ({paths.listed(list(done))}): give the run in "
            "floating point"
        )
    plain = as_plain(source, run_dir)
    kept: list[str] = list(getattr(plain.model, "predictions", ()))
    free = len(find_quantizable(plain.model)) - len(kept)
    if options.keep_float >= free:
        raise ValueError(
            f"`keep_float` is {options.keep_float}: the network has {free} layers that "
            "can be quantized, and one must be"
        )
    images = training_images(source, options.images, data_dir=data_dir)
    statistics = image_statistics(source.model, images) if source.step >= SETTLED_STEPS else None
    warning = "" if statistics is None else statistics.problem
    if warning:
        logger.warning("%s: %s", source.config.name, warning)
    histograms = calibrate(plain.model, images)
    how = dataclasses.asdict(options.scheme) | options.ranges
    measured: Mapping[str, float] = {}
    if options.sensitivity or options.keep_float:
        few = images[:SENSITIVITY_IMAGES]
        found = sensitivity(plain.model, few, histograms=histograms, **how)
        measured = found.layers
        kept += [path for path in measured if path not in kept][: options.keep_float]
    if options.aware:
        made = aware_config(source, run_dir, options, kept)
        training = out_dir / TRAINING
        done = run(config(made), training, progress=progress, stop=stop)
        if not done.finished:
            return done
        trained = load_trained(training)
        network, origin = plain_network(trained), (str(training), trained.step, trained.config)
        scheme = None  # the config says it
    else:
        network = quantize(plain.model, histograms, keep_float=kept, **how)
        trained, origin = plain, (name, source.step, source.config)
        scheme = dataclasses.asdict(options.scheme) | {"layers": list(quantizers(network))}
    test_float = evaluate(plain, data_dir=data_dir)
    deployed = save_deployed(
        out_dir,
        origin_of(*origin, plain.info, scheme),
        plain._replace(config=trained.config, step=trained.step),
        network,
        data_dir=data_dir,
    )
    ratio, look, layers = _by_layer(plain, network, histograms, measured, options, data_dir)
    float_bytes, quantized_bytes = weight_bytes(network, options.scheme)
    names = [metric.name for metric in METRICS[source.config.task]]
    quantized = Quantized(
        **spec,
        task=source.config.task,
        images=len(images),
        warning=warning,
        expected=_finite(look),
        measured=_finite(ratio),
        test_float={name: test_float[name] for name in names},
        test=deployed.test,
        test_count=deployed.test_count,
        max_abs=deployed.max_abs,
        max_rel=deployed.max_rel,
        agreement=deployed.agreement,
        compared=deployed.compared,
        float_bytes=float_bytes,
        quantized_bytes=quantized_bytes,
        layers=layers,
    )
    values = dataclasses.asdict(quantized)
    values.pop("reused")
    replace_file(out_dir / RECORD, json.dumps(values, indent=1) + "\n")
    return quantized


def _by_layer(
    plain: Trained,
    network: Any,
    histograms: Mapping[str, Histogram],
    measured: Mapping[str, float],
    options: Options,
    data_dir: str | None,
) -> tuple[float, float, dict[str, QuantizedLayer]]:
    """The ratio of the output on the test images, the expected one, and what is known of each layer."""
    how = dataclasses.asdict(options.scheme) | options.ranges
    ranges = find_ranges(
        histograms, how["calibration"], levels=options.scheme.levels, percentile=options.percentile
    )
    look = expected(plain.model, histograms, **how)
    ratio, arriving = layer_noise(plain.model, network, compared_batches(plain, data_dir))
    placed = quantizers(network)
    layers = {
        path: _layer(
            np.asarray(layer.kernel[...]),
            histograms[path],
            placed.get(path),
            ranges[path],
            tail=look.layers[path].tail,
            expected=_finite(look.layers[path].decibel),
            arriving=_finite(arriving[path]),
            sensitivity=_finite(measured.get(path)),
        )
        for path, layer in find_quantizable(plain.model).items()
    }
    return ratio, look.decibel, layers


def aware_config(source: Trained, run_dir: str | Path, options: Options, kept: list[str]) -> Config:
    """The config with which the network of a run is trained on with quantization.

    It is the run's, with half of its epochs, a tenth of its learning rate without warm-up, and ranges that
    are frozen half-way. Batch norms are kept where that is exact: per channel with scales that are not
    rounded, in modes plain and repopt. Otherwise the fused network is trained.

    Args:
      source: the network of the run.
      run_dir: its folder.
      options: bits, scales and epochs.
      kept: paths of the layers that stay in floating point.

    Raises:
      ValueError: a deployment, a search or a run that prunes, which cannot be trained on.
    """
    config, mode = source.config, source.config.model.mode
    if (Path(run_dir).expanduser() / DEPLOYED).is_file():
        raise ValueError(f"{run_dir} is a deployment, which cannot be trained on: give the folder of its run")
    if mode == Mode.SEARCH or config.prune.run:
        what = "a search" if mode == Mode.SEARCH else "a pruning"
        raise ValueError(f"{run_dir} is {what}: train the network of another run with quantization")
    fused = not options.scheme.by_channel or mode not in (Mode.PLAIN, Mode.REPOPT)
    epochs = options.epochs or max(1, config.epochs // 2)
    train_limit, size = config.data.train_limit, source.info.num_train - config.data.validation
    steps = min(size, train_limit or size) // config.batch_size * epochs
    optim = dataclasses.replace(
        config.optim,
        learning_rate=config.optim.learning_rate / 10,
        min_learning_rate=config.optim.min_learning_rate / 10,
        warmup_epochs=0.0,
        warmup_start=0.0,
        custom_l2=False,
    )
    without = {"scales": "", "scales_mean": False, "rules": "both", "normalise": False} if fused else {}
    plain = dataclasses.replace(config.model, mode="plain")
    return dataclasses.replace(
        config,
        name=f"{config.name}-quantized",
        epochs=epochs,
        published=None,
        model=plain if fused and mode == Mode.REPOPT else config.model,
        optim=optim,
        quantize=QuantizeConfig(
            **dataclasses.asdict(options.scheme),
            keep_float=tuple(kept),
            freeze_after=steps // 2,
            run=str(Path(run_dir).expanduser().absolute()),
            step=source.step,
            fused=fused,
        ),
        **without,
    )


def weight_bytes(model: nnx.Module, scheme: Scheme) -> tuple[int, int]:
    """Returns the bytes of all parameters as float32, and with the kernels of quantized layers at their bits.

    Everything else stays at 32 bits: biases are whole numbers of 32 bits in integer arithmetic.
    """
    leaves, _ = paths.named_leaves(nnx.state(model, nnx.Param))
    sizes = {path: math.prod(leaf.shape) for path, leaf in leaves.items()}
    kernels = sum(sizes[f"{path}/kernel" if path else "kernel"] for path in quantizers(model))
    total = sum(sizes.values())
    bits = scheme.bits if scheme.weight_bits is None else scheme.weight_bits
    return FLOAT_BYTES * total, FLOAT_BYTES * (total - kernels) + math.ceil(kernels * bits / 8)


def load_quantized(directory: str | Path) -> tuple[Trained, Quantized]:
    """The network that `quantize_run` saved, and what it came to.

    Raises:
      FileNotFoundError: there is none in `directory`.
      ValueError: its record or its weights are damaged.
    """
    check_path("directory", directory)
    path = Path(directory).expanduser() / RECORD
    if (record := read_json(path)) is None:
        raise FileNotFoundError(f"{directory} has no {RECORD}: it holds no quantized network")
    return load_deployed(directory), _read(record, path)


def _stored(out_dir: Path, spec: Mapping[str, Any]) -> Quantized | None:
    path = out_dir / RECORD
    if (record := read_json(path)) is not None:
        stored = _read(record, path, reused=True)
        if differing := [name for name in spec if record.get(name) != spec[name]]:
            raise ValueError(
                f"`out_dir` {out_dir} holds another quantization (it differs in {', '.join(differing)}): "
                "choose another folder, or remove that one"
            )
        return stored
    ours = (RECORD, DEPLOYED, "weights") if (out_dir / (DEPLOYED + PART)).exists() else (DEPLOYED + PART,)
    known = ours if (out_dir / TRAINING).is_dir() or len(ours) > 1 else ()
    refuse_strangers(out_dir, "quantization", lambda name: name == TRAINING or name.startswith(known))
    return None


def _read(record: Any, path: Path, *, reused: bool = False) -> Quantized:
    layers = record.get("layers") if isinstance(record, dict) else None
    if isinstance(layers, dict):
        record = record | {
            "layers": {p: from_record(QuantizedLayer, layer, path) for p, layer in layers.items()}
        }
    return from_record(Quantized, record, path, reused=reused)


def _layer(
    kernel: np.ndarray,
    histogram: Histogram,
    quantizer: Quantizer | None,
    calibrated: tuple[float, float],
    **numbers: Any,
) -> QuantizedLayer:
    """What became of a layer with this kernel in floating point; None for the quantizer if it was kept."""
    low, high = calibrated if quantizer is None else map(float, np.asarray(quantizer.range[...]))
    side = float(np.abs(kernel).max()) or 1.0
    edges = np.linspace(-side, side, BARS + 2)  # an odd number of bars, so that zero is in the middle of one
    after, levels = [], []
    if quantizer is not None:
        rounded = np.asarray(quantizer.quantized_kernel(jax.numpy.asarray(kernel)))
        after = np.histogram(np.clip(rounded, -side, side), edges)[0].tolist()
    top = histogram.largest or 1.0
    bars = np.linspace(0, top, BARS + 1)
    centres = np.arange(len(histogram.counts)) * histogram.width + histogram.width / 2
    centres[0] = 0.0
    some = histogram.counts > 0
    values, counts = np.minimum(centres[some], top), histogram.counts[some]
    if quantizer is not None:
        rounded = np.abs(np.asarray(quantizer.quantized_input(jax.numpy.asarray(values, "float32"))))
        levels = np.histogram(np.minimum(rounded, top), bars, weights=counts)[0].astype(int).tolist()
    return QuantizedLayer(
        kept=quantizer is None,
        low=low,
        high=high,
        kernel={
            "low": -side,
            "high": side,
            "before": np.histogram(kernel, edges)[0].tolist(),
            "after": after,
        },
        inputs={
            "low": 0.0,
            "high": top,
            "before": np.histogram(values, bars, weights=counts)[0].astype(int).tolist(),
            "after": levels,
        },
        **numbers,
    )


def _finite(decibel: float | None) -> float | None:
    return decibel if decibel is not None and math.isfinite(decibel) else None
