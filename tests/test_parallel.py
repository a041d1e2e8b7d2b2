"""The same training on any number of devices and processes, and where its state lies."""

import sys

import jax
import jax.numpy as jnp
import numpy as np
import parallel
import pytest
import tiers
import tolerances
from jax.sharding import PartitionSpec as P

from repopt_jax import data
from repopt_jax.core import paths
from repopt_jax.train import state as shardings
from repopt_jax.train.build import abstract_program, build_program, open_feed
from repopt_jax.train.config import Config, MeshConfig, ModelConfig, OptimConfig


@pytest.fixture(scope="module")
def on_one_device(digits):
    """Parameters after the training on one device, in float64: what every other training is compared with."""
    return named(parallel.train(digits, parallel.Case(1, "float64"), devices=jax.devices()[:1]).params)


# The case in two processes that is run every time; the others are `long`, and have a job of their own.
OFTEN = parallel.IN_PROCESSES.index(parallel.Case(4, "float64"))


@pytest.fixture(scope="module")
def in_two_processes(digits, tmp_path_factory):
    """k -> what the job that trains by case k of `IN_PROCESSES` left: arrays by the name of their file."""
    jobs = {}

    def job_of(k):
        cases = (OFTEN,) if k == OFTEN else tuple({*range(len(parallel.IN_PROCESSES))} - {OFTEN})
        if cases not in jobs:
            folder = tmp_path_factory.mktemp("processes")
            command = [sys.executable, parallel.__file__, str(folder), str(digits), ",".join(map(str, cases))]
            ends = parallel.ends_of(parallel.start(command, 2))
            assert [code for code, *_ in ends] == [0, 0], ends
            names = [*map(str, cases), "rows0", "rows1"]
            jobs[cases] = {name: dict(np.load(folder / f"{name}.npz")) for name in names}
        return jobs[cases]

    return job_of


def named(params):
    return {name: np.asarray(leaf) for name, leaf in paths.named_leaves(jax.device_get(params))[0].items()}


def difference(found, expected):
    """The largest difference of any array, as a share of its largest entry."""
    assert found.keys() == expected.keys()
    return max(np.abs(found[name] - expected[name]).max() / np.abs(expected[name]).max() for name in expected)


# Each dtype and each layout of the state is among those that are run every time.
@pytest.mark.parametrize(
    "case",
    tiers.often(map(pytest.param, parallel.CASES), parallel.Case(1, "float32"), parallel.Case(4, "float64")),
    ids=str,
)
def test_four_devices_train_as_one(digits, on_one_device, case):
    found = named(parallel.train(digits, case).params)
    assert difference(found, on_one_device) < tolerances.DEVICES[case.dtype]


@pytest.mark.parametrize(
    ("k", "case"),
    tiers.often(enumerate(parallel.IN_PROCESSES), (OFTEN, parallel.IN_PROCESSES[OFTEN])),
    ids=str,
)
def test_two_processes_train_as_one_device(in_two_processes, on_one_device, k, case):
    assert difference(in_two_processes(k)[str(k)], on_one_device) < tolerances.DEVICES[case.dtype]


def test_detections_stay_with_their_images_whatever_the_order_of_the_devices(in_two_processes):
    """The control: the rows of the processes, one after the other, are in another order than the mesh's."""
    for rows in (in_two_processes(OFTEN)[name] for name in ("rows0", "rows1")):
        np.testing.assert_array_equal(rows["found"], rows["index"])
        assert sorted(rows["index"]) == list(range(8))
        assert list(rows["by_process"]) == list(range(8)) != list(rows["index"])


def test_statistics_of_each_device_are_another_training(digits, on_one_device):
    """The control: it differs as soon as batch norm sees a quarter of the batch."""
    state = parallel.train(digits, parallel.Case(1, "float64"), mesh__statistics="device")
    assert difference(named(state.params), on_one_device) > 1e-2


# -- where the state lies
# ---


def bytes_of_a_device(tree):
    """Bytes that the first device holds."""
    return sum(leaf.addressable_shards[0].data.nbytes for leaf in jax.tree.leaves(tree))


def bytes_whole(tree):
    return sum(leaf.nbytes for leaf in jax.tree.leaves(tree))


def shares(state, count):
    """(parameters, optimizer state, moving average) on a device, of their whole size over `count`."""
    parts = (state.params, [moments(state.opt_state)], state.ema["params"])
    return [bytes_of_a_device(part) / (bytes_whole(part) / count) for part in parts]


def moments(opt_state):
    return [leaf for path, leaf in paths.named_leaves(opt_state)[0].items() if "scales/" not in path]


@pytest.mark.parametrize("fsdp", tiers.often([2, 4], 4))
def test_a_device_holds_its_share(digits, fsdp):
    config = parallel.config_of(digits, fsdp, optim__ema=0.9, model__name="vgg-cifar-small")
    config.batch_size = config.eval_batch_size = 8
    feed, mesh = open_feed(config), shardings.make_mesh(fsdp)
    _, state = build_program(config, feed, mesh)
    assert shares(state, fsdp) == pytest.approx([1, 1, 1], rel=0.1)
    vectors = [leaf for path, leaf in paths.named_leaves(state.opt_state)[0].items() if "scales/" in path]
    assert len(vectors) > 10
    assert all(leaf.sharding.is_fully_replicated for leaf in vectors)


@pytest.mark.parametrize("fsdp", [2, 4])
def test_b1_divides(fsdp):
    """Shapes only: 51.8 million parameters."""
    config = Config(
        scales="depth",
        model=ModelConfig(name="repopt-vgg-b1", mode="repopt"),
        mesh=MeshConfig(fsdp=fsdp),
        optim=OptimConfig(ema=0.999),
    )
    info = data.DatasetInfo(
        name="images",
        class_names=tuple(map(str, range(1000))),
        channels=3,
        image_shape=None,
        num_train=1,
        num_eval=1,
    )
    _, state = abstract_program(config, info, shardings.make_mesh(fsdp), steps_per_epoch=1)

    def on_a_device(leaf):
        return np.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize

    for tree in (state.params, moments(state.opt_state), state.ema["params"]):
        leaves = jax.tree.leaves(tree)
        whole = sum(leaf.size * leaf.dtype.itemsize for leaf in leaves)
        assert sum(map(on_a_device, leaves)) == pytest.approx(whole / fsdp, rel=0.1)


def test_an_array_is_divided_along_its_largest_axis_that_can_be():
    mesh = shardings.make_mesh(2)
    specs = {shape: shardings.fsdp_sharding(mesh, shape).spec for shape in ((3, 3, 4, 8), (3, 5), (), (6, 2))}
    assert specs == {(3, 3, 4, 8): P(None, None, None, "fsdp"), (3, 5): P(), (): P(), (6, 2): P("fsdp")}


@pytest.mark.parametrize(
    ("data_axis", "fsdp", "message"),
    [
        (None, 3, "`mesh.fsdp`=3 does not divide the 4 devices"),
        (3, 1, "`mesh.data`=3 times `mesh.fsdp`=1 is 3, but there are 4 devices"),
        (0, 1, "must be at least 1"),
    ],
)
def test_a_mesh_that_does_not_fit_is_refused(data_axis, fsdp, message):
    with pytest.raises(ValueError, match=message):
        shardings.make_mesh(fsdp, data=data_axis)


def test_an_fsdp_axis_that_divides_nothing_is_refused():
    network = {"params": {"a": jnp.zeros((3, 5))}, "opt_state": {"m": jnp.zeros((3, 5))}}
    with pytest.raises(ValueError, match=r"`mesh\.fsdp`=4 divides no axis of any of the 2 arrays"):
        shardings.state_sharding(shardings.make_mesh(4), network)
    assert shardings.state_sharding(shardings.make_mesh(1), network)


def test_a_leaf_that_the_table_does_not_cover_is_refused():
    with pytest.raises(ValueError, match="no rule of `rules` matches strange"):
        shardings.state_sharding(shardings.make_mesh(), {"strange": jnp.zeros(3)})
