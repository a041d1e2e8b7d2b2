"""Compiles training steps, with scales and without, for devices that need not be there, and says what the
scales added.

Devices are virtual ones of this machine, "cpu:8", or a TPU by its name, "v5e:4x4", for which libtpu must be
installed; a TPU is not needed. Every set of devices gets a process of its own: `facts_of`. As a program,

    python tests/compiled_programs.py report scripts/results/tpu_compiled.md

compiles the networks of `REPORTED` for TPUs and writes what was found; with `check`, it compiles the cases
on standard input and prints their facts, which is how those processes are started.
"""

import contextlib
import dataclasses
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import compiled_text
import program_cache

# A vector of scales takes no more memory than its numbers and this: TPUs round buffers up.
PADDING_BYTES = 1024
# What updates read and write with scales over what they do without. Measured 1.0005 (TPU) to 1.003 (CPU, 64
# channels); with a stored multiplier 1.2 and 1.1.
MOST_UPDATE_BYTES = 1.01
# No compilation took longer than a quarter of it, on 2 cores that were not alone.
TIMEOUT_SECONDS = 3600

# What the gradient goes through: nothing, `repopt_mask`, and three ways not to do it.
RULES = ("plain", "repopt", "scattered", "stored", "divided")


class Network(NamedTuple):
    """Blocks after the first, by stage (None: those of the variant of this name), and their width; what each
    device gets of a batch."""

    blocks: tuple[int, int, int, int] | None
    width: int
    image_size: int
    images: int
    classes: int
    dtype: str = "float32"


NETWORKS = {
    # Two convolutions, the second with the identity: what all layers are, and quick to compile.
    "narrow": Network((1, 0, 0, 0), 64, 4, 2, 10),
    # With maps from which our convolutions have forms of their own on a CPU.
    "mapped": Network((1, 0, 0, 0), 16, 12, 2, 10),
    # The same as wide as the layers that hold most of a network's parameters.
    "wide": Network((1, 0, 0, 0), 512, 14, 8, 10, "bfloat16"),
    "B1": Network(None, 0, 224, 8, 1000, "bfloat16"),
}


@dataclasses.dataclass(frozen=True)
class Case:
    """One program.

    Attributes:
      rule: one of `RULES`.
      fsdp: of the mesh.
      statistics: of batch norm, "global" or "device".
      optimizer: "sgd" (momentum, Nesterov, decay), "adamw" or "lion".
      network: a row of `NETWORKS`.
      whole: the training step; else the update by itself, the gradient being given.
      xla: with XLA's own convolutions.
    """

    rule: str
    fsdp: int = 1
    statistics: str = "global"
    optimizer: str = "sgd"
    network: str = "narrow"
    whole: bool = True
    xla: bool = False


@dataclasses.dataclass(frozen=True)
class Facts:
    """What a compiled program does, on one device.

    Attributes:
      devices: how many there are.
      collectives: kind and arrays -> (how many, bytes).
      memory: bytes of "arguments", "outputs" and "temporaries".
      buffers: arrays larger than any vector of scales, computed into memory -> how many.
      largest_constant: elements of the largest array written into the program.
      reads: kernel -> what its new value and its moments depend on, the gradient being one of it.
      writers: how many instructions compute these from the gradient on.
      update_bytes: of memory that those read and write.
      parameters: elements of all kernels.
      kernel_bytes: of the largest one.
      scales: kernel -> inputs that its update may read besides.
      scale_bytes: of all vectors of scales.
      seconds: of compilation.
    """

    devices: int
    collectives: dict[str, tuple[int, int]]
    memory: dict[str, int]
    buffers: dict[str, int]
    largest_constant: int
    reads: dict[str, list[str]]
    writers: int
    update_bytes: int
    parameters: int
    kernel_bytes: int
    scales: dict[str, list[str]]
    scale_bytes: int
    seconds: float

    @property
    def collective_count(self) -> int:
        return sum(count for count, _ in self.collectives.values())

    @property
    def collective_bytes(self) -> int:
        return sum(size for _, size in self.collectives.values())


def differences(plain: Facts, repopt: Facts) -> list[str]:
    """What a program with scales does that the one without does not, and should not: nothing if all is well.

    Allowed are the vectors of scales, as arguments and outputs and in what updates read, and temporaries
    smaller than the largest kernel, none of them an array larger than a vector.
    """
    found = []
    for key in sorted({*plain.collectives, *repopt.collectives}):
        counts = [tuple(facts.collectives.get(key, (0, 0))) for facts in (plain, repopt)]
        if counts[0] != counts[1]:
            found.append(f"collectives: {key}: {counts[1]} and not {counts[0]} (number, bytes)")
    vectors = sum(map(len, repopt.scales.values())) * 2  # the identity's start is one more, at most
    most = repopt.scale_bytes + vectors * PADDING_BYTES
    more = {kind: repopt.memory[kind] - plain.memory[kind] for kind in plain.memory}
    for kind in ("arguments", "outputs"):
        if not repopt.scale_bytes <= more[kind] <= most:
            found.append(f"memory: {more[kind]} bytes more of {kind}: the vectors have {repopt.scale_bytes}")
    if more["temporaries"] >= repopt.kernel_bytes:
        found.append(
            f"memory: {more['temporaries']} bytes more of temporaries: a kernel has {repopt.kernel_bytes}"
        )
    for array, count in repopt.buffers.items():
        if count > plain.buffers.get(array, 0):
            found.append(f"buffers: {count} of {array} and not {plain.buffers.get(array, 0)}")
    # Where the parts of an array begin, one number for each device, is written into the program.
    if repopt.largest_constant > max(plain.largest_constant, repopt.devices):
        found.append(f"constants: one of {repopt.largest_constant} elements")
    for kernel, reads in repopt.reads.items():
        allowed = sorted({*plain.reads[kernel], *repopt.scales[kernel]})
        if reads != allowed:
            found.append(f"reads: {kernel} from {', '.join(reads)} and not {', '.join(allowed)}")
    if repopt.update_bytes > MOST_UPDATE_BYTES * plain.update_bytes:
        found.append(f"updates: they read and write {repopt.update_bytes} bytes and not {plain.update_bytes}")
    return found


def facts_of(devices: str, cases: Sequence[Case]) -> list[Facts]:
    """Compiles the cases for `devices` in a process of their own.

    Raises:
      RuntimeError: it failed; what it said is in the message.
    """
    # libtpu must neither ask a cloud where it is, nor refuse to be loaded by two processes.
    env = {**os.environ, "JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}
    # Compiled as in use, and here: the tests' own settings are inherited.
    env |= {"JAX_DISABLE_MOST_OPTIMIZATIONS": "0", "JAX_ENABLE_COMPILATION_CACHE": "0"}
    env |= {"XLA_FLAGS": program_cache.flags_in_use(os.environ)}
    child = subprocess.run(
        [sys.executable, __file__, "check", devices],
        input=json.dumps([dataclasses.asdict(case) for case in cases]),
        env=env,
        capture_output=True,
        text=True,
        timeout=TIMEOUT_SECONDS,
    )
    if child.returncode:
        raise RuntimeError(f"compiling for {devices} failed:\n{child.stderr[-4000:]}")
    return [Facts(**facts) for facts in json.loads(child.stdout.splitlines()[-1])]


def compile_case(case: Case, devices: Sequence[Any]) -> Facts:
    """The facts of one program, in this process."""
    from repopt_jax.nn.convolution import xla_convolutions
    from repopt_jax.train import state as sharding

    network, info, config = _settings(case, len(devices))
    with _rule(case.rule), xla_convolutions() if case.xla else contextlib.nullcontext():
        mesh = sharding.make_mesh(case.fsdp, devices=devices)
        lowered = _lowered(case, network, info, config, mesh)
        start = time.perf_counter()
        compiled = lowered.compile()
        seconds = time.perf_counter() - start
    return _facts(compiled, info, config, len(devices), seconds)


def _settings(case: Case, devices: int) -> tuple[Network, Any, Any]:
    """The network, what its images are, and the config."""
    from repopt_jax import data, models, train

    network = NETWORKS[case.network]
    name = "repopt-vgg-b1" if network.blocks is None else f"compiled-{case.network}"
    if network.blocks is not None:
        w = network.width
        row = models.VGGVariant(name, network.blocks, (w, w, w, w, w), strides=(1, 1, 1, 1, 1))
        models.register(models.Entry(name, models.vgg, row))
    names = tuple(map(str, range(network.classes)))
    info = data.DatasetInfo(
        name="none", class_names=names, channels=3, image_shape=None, num_train=1, num_eval=1
    )
    config = train.Config(batch_size=network.images * devices)
    config.model = train.ModelConfig(name=name, dtype=network.dtype)
    if case.rule != "plain":
        config.model.mode, config.scales, config.rules = "repopt", "depth", "multiplier"
    config.optim = train.OptimConfig(name=case.optimizer, weight_decay=1e-4)
    config.mesh = train.MeshConfig(fsdp=case.fsdp, statistics=case.statistics)
    return network, info, config


def _lowered(case: Case, network: Network, info: Any, config: Any, mesh: Any) -> Any:
    """The program before compilation."""
    import jax
    import jax.numpy as jnp
    import optax
    from flax import nnx

    from repopt_jax import weight_decay_mask
    from repopt_jax.train import build, optimizer
    from repopt_jax.train import state as sharding

    program, state = build.abstract_program(config, info, mesh, steps_per_epoch=100)
    if case.whole:
        place, count, side = sharding.batch_sharding(mesh), config.batch_size, network.image_size
        batch = {
            "image": jax.ShapeDtypeStruct((count, side, side, 3), jnp.float32, sharding=place),
            "label": jax.ShapeDtypeStruct((count,), jnp.int32, sharding=place),
        }
        return program.train_step.lower(state, batch)
    schedule = optimizer.make_schedule(config.optim, epochs=1, steps_per_epoch=100)
    scales = None if case.rule == "plain" else build.make_task(config).resolve_scales("depth", info)
    model = nnx.eval_shape(lambda: build.make_task(config).new_model(info, seed=0))
    tx = optimizer.make_optimizer(
        config.optim,
        schedule,
        scales=scales,
        batch_size=config.batch_size,
        decayed=weight_decay_mask(model),
    )

    def update(params, gradient, opt_state):
        updates, opt_state = tx.update(gradient, opt_state, params)
        return optax.apply_updates(params, updates), opt_state

    places = program.sharding.params, program.sharding.opt_state
    step = jax.jit(update, donate_argnums=(0, 2), out_shardings=places)
    return step.lower(state.params, state.params, state.opt_state)


def _facts(compiled: Any, info: Any, config: Any, devices: int, seconds: float) -> Facts:
    from repopt_jax.train import build

    scales = build.make_task(config).resolve_scales("depth", info)
    program = compiled_text.parse(compiled.as_text())
    widest = max(branches.out for branches in scales.branch_sets.values())
    moved = {
        kernel: [name for name in program.inputs if _is_moved(name, kernel)] for kernel in scales.branch_sets
    }
    kernels = [program.inputs[f"params {kernel}"].arrays[0] for kernel in moved]
    memory = compiled.memory_analysis()
    together = compiled_text.update(program, [n for names in moved.values() for n in names], widest)
    vectors = [i for name, i in program.inputs.items() if name.startswith("scales ")]
    return Facts(
        devices=devices,
        collectives=compiled_text.collectives(program),
        memory={
            "arguments": memory.argument_size_in_bytes,
            "outputs": memory.output_size_in_bytes,
            "temporaries": memory.temp_size_in_bytes,
        },
        buffers=compiled_text.buffers(program, widest),
        largest_constant=compiled_text.largest_constant(program),
        reads={k: list(compiled_text.update(program, names, widest).reads) for k, names in moved.items()},
        writers=len(together.writers),
        update_bytes=together.bytes,
        parameters=sum(kernel.size for kernel in kernels),
        kernel_bytes=max(kernel.bytes for kernel in kernels),
        # The identity's scale is 1, and no vector.
        scales={
            kernel: [f"scales {kernel}/{branch.name}" for branch in branches.branches if branch.has_scale]
            for kernel, branches in scales.branch_sets.items()
        },
        scale_bytes=sum(i.arrays[0].bytes for i in vectors),
        seconds=seconds,
    )


def _is_moved(name: str, kernel: str) -> bool:
    """Whether an input of a step is this kernel or a moment of it."""
    return name.endswith(f" {kernel}") and name.split()[0] not in ("gradient", "multiplier")


@contextlib.contextmanager
def _rule(rule: str) -> Iterator[None]:
    """What stands for `repopt_sgd` and for the table of places while a program is made."""
    from repopt_jax.train import optimizer
    from repopt_jax.train import state as sharding

    if rule in ("plain", "repopt"):
        yield
    elif rule == "divided":
        table = [(p, sharding.SHARDED if "scales" in p else place) for p, place in sharding.STATE_TABLE]
        with mock.patch.object(sharding, "STATE_TABLE", tuple(table)):
            yield
    else:
        wrong = {"scattered": _scattered_mask, "stored": _stored_mask}[rule]
        plain = optimizer.READY["sgd"][0]
        import optax

        def made(learning_rate, scales, **options):
            return optax.chain(wrong(scales), plain(learning_rate, **options))

        with mock.patch.dict(optimizer.READY, {"sgd": (plain, made)}):
            yield


def _scattered_mask(scales: Any) -> Any:
    """`repopt_mask` with a multiplier that is put together by indexing, as one would write it first."""
    import jax.numpy as jnp
    import optax

    from repopt_jax.core import paths
    from repopt_jax.optim.sgd import repopt_mask

    def multiplier(shape, vectors):
        m = jnp.broadcast_to(vectors["3x3"] ** 2, shape)
        m = m.at[1, 1].add(vectors["1x1"] ** 2)
        channels = jnp.arange(shape[-1])
        return m.at[1, 1, channels, channels].add(1) if "identity" in vectors else m

    def update(updates, state, params=None):
        def transform(path, g):
            return g * multiplier(g.shape, state.scales[path]) if path in state.scales else g

        return paths.map_named(transform, updates), state

    return optax.GradientTransformation(repopt_mask(scales).init, update)


class StoredState(NamedTuple):
    multiplier: Any


def _stored_mask(scales: Any) -> Any:
    """`repopt_mask` with the multiplier in its state."""
    import jax
    import optax

    from repopt_jax.optim.sgd import gradient_multipliers

    def update(updates, state, params=None):
        return jax.tree.map(lambda g, m: g * m, updates, state.multiplier), state

    def init(params):
        return StoredState(gradient_multipliers(params, scales))

    return optax.GradientTransformation(init, update)


def find_devices(name: str) -> Sequence[Any]:
    """ "cpu:8": virtual devices, before JAX has started; else those of a TPU that need not be there."""
    import jax
    from jax.experimental import topologies

    if name.startswith("cpu:"):
        jax.config.update("jax_num_cpu_devices", int(name.removeprefix("cpu:")))
        # Of code generation, not of the program: the text is the same to the letter.
        jax.config.update("jax_disable_most_optimizations", True)
        return jax.devices()
    return topologies.get_topology_desc(platform="tpu", topology_name=name).devices


def check(devices: str) -> None:
    """Compiles the cases on standard input and prints their facts, as JSON in the last line."""
    found = find_devices(devices)
    cases = [Case(**case) for case in json.loads(sys.stdin.read())]
    sys.stdout.write(json.dumps([dataclasses.asdict(compile_case(case, found)) for case in cases]) + "\n")


# What `report` compiles: network, TPU, fsdp.
REPORTED = (
    ("wide", "v5e:4x4", 4),
    ("wide", "v5e:4x4", 1),
    ("wide", "v5e:16x16", 16),
    ("wide", "v5e:16x16", 1),
    ("B1", "v5e:4x4", 4),
    ("B1", "v5e:16x16", 16),
)


DESCRIBED = {
    "wide": "3x3 convolutions 3 -> 512 -> 512 at 14 px",
    "B1": "RepOpt-VGG B1 at 224 px",
}


def report(path: str, *networks: str) -> None:
    """Compiles `REPORTED`, or what of it is of the networks named, and writes a table."""
    chosen = [row for row in REPORTED if not networks or row[0] in networks]
    chosen_names = {row[0]: None for row in chosen}
    versions = ", ".join(f"{name} {metadata.version(name)}" for name in ("jax", "libtpu", "flax", "optax"))
    lines = [
        "# The training step, compiled for TPUs",
        "",
        f"`python tests/compiled_programs.py report {' '.join((path, *networks))}`",
        "",
        f"{versions}, Python {platform.python_version()}. No TPU was used: these are the programs of",
        "one chip, with SGD (momentum, Nesterov, decay), without scales / with `repopt_mask`.",
        "",
        *(f"- `{name}`: {DESCRIBED[name]}; 8 images a chip, in bfloat16." for name in chosen_names),
        "- more, vectors: by how many bytes the arguments grow, and how many all scale vectors have.",
        "- update: bytes that are read and written, for one element of a kernel, to turn gradient, kernel",
        "  and momentum into the new kernel and momentum. 20 is the least in float32, three reads and two",
        "  writes; 18 where the gradient arrives in bfloat16.",
        "- compiled in s: on this machine, which did other work besides.",
        "- differences: what the check of the tests finds, of collectives (kind, number, bytes), memory,",
        "  buffers larger than a vector, constants, and what new kernels and momenta are made from.",
        "",
        "| network | TPU, data x fsdp | collectives | their MB | arguments, bytes | more, vectors "
        "| temporaries, bytes | update | compiled in s | differences |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for network, devices, fsdp in chosen:
        pair = [Case(rule, fsdp, network=network) for rule in ("plain", "repopt")]
        lines.append(_row(network, devices, fsdp, *facts_of(devices, pair)))
        Path(path).write_text("\n".join(lines) + "\n")  # each row may take long: keep those that there are


def _row(network: str, devices: str, fsdp: int, plain: Facts, repopt: Facts) -> str:
    both = (plain, repopt)

    def pair(form: str, value: Callable[[Facts], Any]) -> str:
        return " / ".join(format(value(facts), form) for facts in both)

    cells = (
        network,
        f"{devices}, {plain.devices // fsdp} x {fsdp}",
        pair("", lambda f: f.collective_count),
        pair(".1f", lambda f: f.collective_bytes / 1e6),
        pair(",", lambda f: f.memory["arguments"]),
        f"{repopt.memory['arguments'] - plain.memory['arguments']:,}, {repopt.scale_bytes:,}",
        pair(",", lambda f: f.memory["temporaries"]),
        pair(".3f", lambda f: f.update_bytes / f.parameters),
        pair(".0f", lambda f: f.seconds),
        "; ".join(differences(plain, repopt)) or "none",
    )
    return f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    {"check": check, "report": report}[sys.argv[1]](*sys.argv[2:])
