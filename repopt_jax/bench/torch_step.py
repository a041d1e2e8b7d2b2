"""The same training step and update in PyTorch, on the same device. Only this file imports torch.

The network is the plain one of the same variant, made from the same table: convolution, batch norm, ReLU. It
runs with PyTorch's recommended settings: channels last, autotuned algorithms, autocast for bfloat16.
"""

import contextlib
import logging
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import torch
from torch import nn

from repopt_jax import models
from repopt_jax.bench.networks import title
from repopt_jax.bench.results import Section
from repopt_jax.bench.settings import XLA, Settings
from repopt_jax.bench.step import add_speed, section_of, stepping
from repopt_jax.bench.timing import Builder, Candidate, Facts, measure
from repopt_jax.bench.update import (
    BYTES,
    COPY,
    add_bandwidth,
    copying,
    kernels,
    parameters,
    random_like,
    updating,
)
from repopt_jax.models.vgg import VGGVariant, block_specs
from repopt_jax.train.config import OptimConfig
from repopt_jax.train.optimizer import make_optimizer

LOG = logging.getLogger(__name__)

EAGER, COMPILED = "PyTorch", "PyTorch, torch.compile"
FOREACH, FUSED = "PyTorch SGD, foreach", "PyTorch SGD, fused"
DECAY = OptimConfig().weight_decay


def bench_torch(settings: Settings) -> list[Section]:
    """Measures training steps and updates of JAX and of PyTorch.

    Raises:
      ValueError: PyTorch does not see the device that JAX has.
    """
    check_same_device()
    with fastest_settings(settings.tf32):
        return [*(_steps(settings, *pair) for pair in settings.pairs), _updates(settings)]


def _steps(settings: Settings, dtype: str, batch: int) -> Section:
    LOG.info("torch: %s", settings.label(dtype, batch))
    names = [name for name in ("plain", "repopt", "repvgg", XLA) if name in settings.networks]
    builders: dict[str, Builder] = {
        f"{title(name)}, JAX": (lambda name=name: stepping(name, settings, dtype, batch)) for name in names
    }
    builders[EAGER] = lambda: torch_stepping(settings, dtype, batch, compiled=False)
    if torch.cuda.is_available():
        builders[COMPILED] = lambda: torch_stepping(settings, dtype, batch, compiled=True)
    found = measure(builders, settings.rounds, dict.fromkeys(builders, (EAGER,)))
    add_speed(found, batch)
    heading = "Training step beside PyTorch"
    return section_of("torch", heading, settings, dtype, batch, found, torch=torch.__version__)


def _updates(settings: Settings) -> Section:
    LOG.info("torch: update")
    shapes, scales = parameters(settings)
    values = random_like(shapes)
    arrays = jax.tree.leaves(values)
    count = sum(array.size for array in arrays)

    def updating_by(scales: Any) -> Builder:
        tx = make_optimizer(OptimConfig(), lambda _: 0.1, scales=scales, batch_size=1, decayed=kernels)
        return lambda: updating(tx, values, {"moved_bytes": BYTES * count})

    builders: dict[str, Builder] = {
        "plain SGD, JAX": updating_by(None),
        "repopt_mask, JAX": updating_by(scales),
        FOREACH: lambda: torch_updating(arrays, {"moved_bytes": BYTES * count}, foreach=True),
        FUSED: lambda: torch_updating(arrays, {"moved_bytes": BYTES * count}, fused=True),
        COPY: lambda: copying(BYTES * count),
    }
    found = measure(builders, settings.rounds, dict.fromkeys(builders, (FOREACH, COPY)))
    add_bandwidth(found)
    return Section(
        part="torch",
        title=f"Optimizer update beside PyTorch, SGD, {settings.model}, {count:,} parameters",
        settings=settings.recorded(parameters=count, torch=torch.__version__),
        rounds=settings.rounds,
        candidates=found,
    )


def torch_stepping(settings: Settings, dtype: str, batch: int, *, compiled: bool) -> tuple[Candidate, Facts]:
    """Runs training steps: forward, backward, update; batch norm in training mode."""
    device = torch_device()
    network = plain_network(models.find(settings.model).variant, settings.classes).to(device)
    network = network.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
    optimizer = sgd(network, foreach=True)
    size = (batch, 3, settings.size, settings.size)
    images = torch.randn(size, device=device).to(memory_format=torch.channels_last)
    labels = torch.arange(batch, device=device) % settings.classes

    def loss_of() -> Any:
        with torch.autocast(device.type, torch.bfloat16, enabled=dtype == "bfloat16"):
            logits = network(images)
        return nn.functional.cross_entropy(logits.float(), labels)

    forward: Callable[[], Any] = torch.compile(loss_of) if compiled else loss_of

    def start() -> Any:
        optimizer.zero_grad(set_to_none=True)
        loss = forward()
        loss.backward()
        optimizer.step()
        return loss.detach()

    facts: Facts = {}
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated() - held_bytes(network, images)
        start()
        start()  # with the momentum
        torch.cuda.synchronize()
        facts["peak_bytes"] = torch.cuda.max_memory_allocated() - before
    return Candidate(start, wait), facts


def torch_updating(arrays: Any, facts: Facts, **how: bool) -> tuple[Candidate, Facts]:
    """Runs updates of the same arrays as `update.updating`, with the same rule of decay.

    `foreach` adds the momentum in place to gradients that decay has not copied, so the gradients of vectors
    grow over the updates. This does not affect the time.
    """
    tensors = [nn.Parameter(torch.from_numpy(a).clone().to(torch_device())) for a in arrays]
    for tensor in tensors:
        tensor.grad = tensor.detach().clone()
    return Candidate(sgd_of(tensors, **how).step, wait), facts


def convolving(
    x: np.ndarray, w: np.ndarray, g: np.ndarray, dtype: str, name: str, *, stride: int, groups: int
) -> Candidate:
    """Runs one pass of a convolution with `conv.arrays`: "forward", "input gradient" or "kernel gradient"."""
    device, kind = torch_device(), getattr(torch, dtype)

    def tensor(a: np.ndarray, order: tuple[int, ...]) -> torch.Tensor:
        return (
            torch.from_numpy(a).permute(order).to(device, kind).contiguous(memory_format=torch.channels_last)
        )

    images, gradient = tensor(x, (0, 3, 1, 2)), tensor(g, (0, 3, 1, 2))
    kernel = tensor(w, (3, 2, 0, 1))
    half = (w.shape[0] // 2,) * 2
    if name == "forward":
        return Candidate(lambda: nn.functional.conv2d(images, kernel, None, stride, half, 1, groups), wait)
    mask = [name == "input gradient", name == "kernel gradient", False]
    backward = torch.ops.aten.convolution_backward
    rest = (None, (stride,) * 2, half, (1, 1), False, (0, 0), groups, mask)
    return Candidate(lambda: backward(gradient, images, kernel, *rest), wait)


def plain_network(variant: VGGVariant, classes: int) -> nn.Sequential:
    """Builds convolution, batch norm and ReLU for each block, the mean over the map, a linear classifier."""
    layers: list[nn.Module] = []
    for spec in block_specs(variant):
        layers += [
            nn.Conv2d(
                spec.inputs, spec.outputs, 3, stride=spec.stride, padding=1, groups=spec.groups, bias=False
            ),
            nn.BatchNorm2d(spec.outputs),
            nn.ReLU(inplace=True),
        ]
    return nn.Sequential(
        *layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(variant.widths[-1], classes)
    )


def sgd(network: nn.Module, **how: bool) -> torch.optim.SGD:
    return sgd_of(list(network.parameters()), **how)


def sgd_of(tensors: list[nn.Parameter], **how: bool) -> torch.optim.SGD:
    """Returns Nesterov SGD that decays kernels but not vectors, like the trainer for plain networks."""
    groups = [
        {"params": [p for p in tensors if p.ndim > 1], "weight_decay": DECAY},
        {"params": [p for p in tensors if p.ndim <= 1], "weight_decay": 0.0},
    ]
    return torch.optim.SGD(groups, lr=0.01, momentum=0.9, nesterov=True, **how)


def held_bytes(network: nn.Module, images: torch.Tensor) -> int:
    held = [*network.parameters(), *network.buffers(), images]
    return sum(tensor.numel() * tensor.element_size() for tensor in held)


def torch_device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def wait(_: Any) -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def check_same_device() -> None:
    ours, theirs = jax.default_backend(), torch_device().type
    if (ours == "gpu") != (theirs == "cuda"):
        raise ValueError(
            f"JAX runs on {ours} and PyTorch on {theirs}: a comparison of the two needs both on one device"
        )


@contextlib.contextmanager
def fastest_settings(tf32: bool):
    """Lets cuDNN autotune, and allows or disables TF32 for convolutions and products."""
    cudnn = torch.backends.cudnn
    before = cudnn.benchmark, cudnn.allow_tf32, torch.get_float32_matmul_precision()
    cudnn.benchmark, cudnn.allow_tf32 = True, tf32
    torch.set_float32_matmul_precision("high" if tf32 else "highest")
    try:
        yield
    finally:
        cudnn.benchmark, cudnn.allow_tf32 = before[:2]
        torch.set_float32_matmul_precision(before[2])
