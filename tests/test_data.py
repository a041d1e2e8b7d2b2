"""From a source to batches: the order of images, sharding, resuming, evaluation."""

import contextlib
import itertools
import multiprocessing
import os
import signal
import subprocess
import sys
from dataclasses import replace

import grain
import numpy as np
import pytest
from PIL import Image

import repopt_jax
from repopt_jax.data import (
    DatasetInfo,
    Source,
    Transform,
    eval_batches,
    eval_steps,
    open_source,
    pipeline,
    steps_per_epoch,
    train_batches,
)
from repopt_jax.data import batches as batches_module
from repopt_jax.data.augment import crop_and_flip
from repopt_jax.data.rng import batch_rng
from repopt_jax.data.transforms import fit, normalise

SIZE = 6


def make_source(num_train=20, num_eval=7, *, channels=1, shape=(SIZE, SIZE)):
    """Source in memory: the first pixel of image i is i, the rest noise; sorted by class, as in a folder."""
    rng = np.random.default_rng(0)

    def split(count):
        examples = []
        for i in range(count):
            image = rng.integers(1, 255, (*shape, channels), np.uint8)
            image[0, 0] = i
            examples.append({"image": image, "label": 4 * i // count})
        return examples

    info = DatasetInfo(
        name="made",
        class_names=tuple("abcd"),
        channels=channels,
        image_shape=(*shape, channels),
        num_train=num_train,
        num_eval=num_eval,
    )
    return Source(info, split(num_train), split(num_eval))


PLAIN = Transform(image_size=SIZE)
AUGMENTED = Transform(image_size=SIZE, crop_padding=2, flip=True)
CUT = Transform(image_size=SIZE, area=(0.2, 1.0))
EVERYTHING = Transform(
    image_size=SIZE,
    area=(0.2, 1.0),
    flip=True,
    randaugment=15,
    jitter=0.4,
    erasing=0.5,
    mixup=0.4,
    cutmix=1.0,
)


def take(batches, count):
    iterator = iter(batches)
    found = list(itertools.islice(iterator, count))
    iterator.close()
    return found


def numbers(batch):
    """Which images a batch of a PLAIN transform holds."""
    return np.rint(batch["image"][:, 0, 0, 0] * 255).astype(int).tolist()


def assert_equal(left, right):
    assert len(left) == len(right)
    for a, b in zip(left, right, strict=True):
        assert a.keys() == b.keys()
        for name in a:
            np.testing.assert_array_equal(a[name], b[name])


# -- training batches ------------------------------------------------------------------------------


def test_training_batches_have_their_shapes_and_labels():
    source = make_source(channels=3)
    (batch,) = take(train_batches(source, PLAIN, batch_size=8, seed=0), 1)
    assert batch["image"].shape == (8, SIZE, SIZE, 3)
    assert (batch["image"].dtype, batch["label"].dtype) == (np.float32, np.int32)
    for row, number in enumerate(numbers(batch)):
        expected = source.train[number]
        np.testing.assert_allclose(batch["image"][row], expected["image"] / 255, rtol=1e-6)
        assert batch["label"][row] == expected["label"]


@pytest.mark.parametrize("batch_size", [5, 6, 20])
def test_an_epoch_holds_every_image_at_most_once_and_drops_the_rest(batch_size):
    source = make_source(20)
    steps = steps_per_epoch(source, batch_size)
    assert steps == 20 // batch_size
    batches = take(train_batches(source, PLAIN, batch_size=batch_size, seed=0), 3 * steps)
    rows = list(itertools.chain.from_iterable(map(numbers, batches)))
    used = steps * batch_size
    epochs = [rows[i * used : (i + 1) * used] for i in range(3)]
    for epoch in epochs:
        assert len(set(epoch)) == len(epoch) == used
    assert epochs[0] != epochs[1] != epochs[2]  # a new order each time


def test_the_seed_decides():
    source = make_source()
    first, again, other = (
        take(train_batches(source, AUGMENTED, batch_size=5, seed=seed), 10) for seed in (1, 1, 2)
    )
    assert_equal(first, again)
    assert any((a["image"] != b["image"]).any() for a, b in zip(first, other, strict=True))
    plain = [take(train_batches(source, PLAIN, batch_size=5, seed=seed), 4) for seed in (1, 2)]
    assert [numbers(b) for b in plain[0]] != [numbers(b) for b in plain[1]]


def test_augmentation_differs_between_epochs_and_rows():
    source = make_source(4)
    source.train[:] = [source.train[0]] * 4
    transform = Transform(image_size=SIZE, crop_padding=4)
    batches = take(train_batches(source, transform, batch_size=4, seed=0), 5)
    images = np.concatenate([batch["image"].reshape(4, -1) for batch in batches])
    assert len(np.unique(images, axis=0)) > 12


@pytest.mark.parametrize("transform", [PLAIN, AUGMENTED, CUT, EVERYTHING])
@pytest.mark.parametrize("count", [2, 3])
def test_processes_share_each_batch_without_overlap(transform, count):
    source = make_source(32)
    whole = take(train_batches(source, transform, batch_size=12, seed=3), 7)
    shares = [
        take(
            train_batches(source, transform, batch_size=12, seed=3, process_index=i, process_count=count),
            7,
        )
        for i in range(count)
    ]
    joined = [
        {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
        for parts in zip(*shares, strict=True)
    ]
    assert_equal(joined, whole)


def test_a_batch_is_a_function_of_seed_batch_size_and_number():
    """The order is that of a plain Grain chain, although a process looks up its own rows only."""
    import grain

    def augmented(number, rows):
        images = np.stack([source.train[row]["image"] for row in rows])
        rng = batch_rng(5, number, 6)
        return normalise(crop_and_flip(images, rng, padding=2, flip=True), AUGMENTED)

    source = make_source(20)
    chain = grain.MapDataset.range(20).seed(5).shuffle().batch(6, drop_remainder=True).repeat()
    found = take(train_batches(source, AUGMENTED, batch_size=6, seed=5), 10)  # three an epoch
    for k in range(10):
        rows = chain[k]
        np.testing.assert_array_equal(found[k]["label"], [source.train[row]["label"] for row in rows])
        np.testing.assert_array_equal(found[k]["image"], augmented(k, rows))
    assert (found[0]["image"] != augmented(1, chain[0])).any()


def test_each_augmentation_leaves_the_numbers_of_the_others_alone():
    source = make_source(24, channels=3, shape=(9, 12))

    def first(**changes):
        transform = replace(CUT, **changes)
        return take(train_batches(source, transform, batch_size=24, seed=0), 1)[0]

    plain, erased, mixed = first(), first(erasing=0.7), first(mixup=0.4)
    kept = (erased["image"] == plain["image"]).all(-1)
    assert (erased["image"][~kept] == 0).all()
    assert 0.5 < kept.mean() < 0.95
    share = mixed["share"][:, None, None, None]
    partner = plain["image"].reshape(12, 2, -1)[:, ::-1].reshape(plain["image"].shape)
    np.testing.assert_allclose(mixed["image"], share * plain["image"] + (1 - share) * partner, atol=1e-6)
    assert abs(mixed["image"] - plain["image"]).max() > 0.1
    coloured = first(randaugment=15)
    assert (coloured["image"] != plain["image"]).any((1, 2, 3)).sum() > 18


def test_mixed_batches_have_the_partners_label_and_the_share():
    source = make_source(20)
    (batch,) = take(train_batches(source, EVERYTHING, batch_size=20, seed=0), 1)
    assert {name: (array.dtype, array.shape) for name, array in batch.items()} == {
        "image": (np.float32, (20, SIZE, SIZE, 1)),
        "label": (np.int32, (20,)),
        "other": (np.int32, (20,)),
        "share": (np.float32, (20,)),
    }
    np.testing.assert_array_equal(batch["other"].reshape(10, 2)[:, ::-1].ravel(), batch["label"])
    (unmixed,) = take(train_batches(source, AUGMENTED, batch_size=20, seed=0), 1)
    np.testing.assert_array_equal(batch["label"], unmixed["label"])
    assert unmixed.keys() == {"image", "label"}
    for evaluated in eval_batches(source, EVERYTHING, batch_size=3):  # odd: nothing is mixed here
        assert evaluated.keys() == {"image", "label", "mask"}


class Recording(list):
    """A split that notes which images are read."""

    def __init__(self, examples):
        super().__init__(examples)
        self.read = []

    def __getitem__(self, index):
        self.read.append(index)
        return super().__getitem__(index)


def test_a_process_reads_its_own_images_only():
    made = make_source(24)
    read = []
    for i in range(2):
        source = Source(made.info, Recording(made.train), made.eval)
        batches = train_batches(
            source, PLAIN, batch_size=8, seed=0, process_index=i, process_count=2, prefetch=0
        )
        take(batches, 3)
        read.append(set(source.train.read))
    assert [len(r) for r in read] == [12, 12]
    assert not read[0] & read[1]


@pytest.mark.parametrize("prefetch", [0, 1, 3])
def test_prefetching_changes_nothing(prefetch):
    source = make_source()
    expected = take(train_batches(source, AUGMENTED, batch_size=6, seed=0), 8)
    found = train_batches(source, AUGMENTED, batch_size=6, seed=0, prefetch=prefetch)
    assert_equal(take(found, 8), expected)


@pytest.mark.parametrize("given", [0, 1, 4, 6, 7])  # three batches an epoch
def test_an_iterator_continues_where_its_state_was_taken(given):
    source = make_source()
    unbroken = take(train_batches(source, AUGMENTED, batch_size=6, seed=0), given + 7)
    first = iter(train_batches(source, AUGMENTED, batch_size=6, seed=0))
    for _ in range(given):
        next(first)
    state = first.get_state()
    first.close()
    # A fresh source, and an iterator that has moved already.
    second = iter(train_batches(make_source(), AUGMENTED, batch_size=6, seed=0))
    next(second)
    second.set_state(state)
    assert second.get_state() == state == {"next_index": given}
    assert_equal(list(itertools.islice(second, 7)), unbroken[given:])
    second.close()
    with pytest.raises(ValueError, match="closed"):
        next(second)


def folder_source(tmp_path, count=10):
    rng = np.random.default_rng(0)
    for part in ("train", "test"):
        for name in ("a", "b"):
            (tmp_path / part / name).mkdir(parents=True)
            for i in range(count):
                pixels = rng.integers(0, 256, (SIZE, SIZE, 3), np.uint8)
                Image.fromarray(pixels).save(tmp_path / part / name / f"{i}.png")
    return open_source("folder", data_dir=tmp_path)


def test_worker_processes_give_the_same_batches_and_the_same_state(tmp_path):
    source = folder_source(tmp_path)
    unbroken = take(train_batches(source, EVERYTHING, batch_size=6, seed=0), 8)
    first = iter(train_batches(source, EVERYTHING, batch_size=6, seed=0, workers=2))
    assert_equal(list(itertools.islice(first, 4)), unbroken[:4])
    state = first.get_state()
    first.close()
    second = iter(train_batches(source, EVERYTHING, batch_size=6, seed=0))
    second.set_state(state)
    assert_equal(list(itertools.islice(second, 4)), unbroken[4:])
    second.close()


# Prints a line for each batch that its workers make, as long as it lives.
READER = """
import signal, sys
from repopt_jax.data import Transform, open_source, train_batches

if __name__ == "__main__":
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: None)
    source = open_source("folder", data_dir=sys.argv[1])
    for batch in train_batches(source, Transform(image_size=6), batch_size=4, seed=0, workers=2):
        print(batch["label"].sum(), flush=True)
"""


def test_workers_end_with_their_parent_and_not_before(tmp_path):
    """Signals that reach the whole group leave them at work; a parent that is killed takes them with it. They
    hold its standard output, which ends with the last of them."""
    folder_source(tmp_path)
    program = tmp_path / "reader.py"
    program.write_text(READER)
    command = [sys.executable, str(program), str(tmp_path)]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    ) as reader:
        assert reader.stdout is not None
        try:
            first = [reader.stdout.readline() for _ in range(3)]
            for number in (signal.SIGINT, signal.SIGTERM):
                os.killpg(reader.pid, number)
                # More than workers and pipe can hold ready.
                more = [reader.stdout.readline() for _ in range(200)]
                assert all(line.strip().isdigit() for line in first + more)
            reader.kill()
            reader.communicate(timeout=60)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(reader.pid, signal.SIGKILL)


@pytest.mark.parametrize(("workers", "prefetch"), [(0, 0), (0, 2), (1, 1)])
def test_an_unreadable_image_stops_the_run_and_is_named(tmp_path, workers, prefetch):
    source = folder_source(tmp_path)
    (tmp_path / "train/b/7.png").write_bytes(b"not an image")
    batches = train_batches(source, EVERYTHING, batch_size=20, seed=0, workers=workers, prefetch=prefetch)
    iterator = iter(batches)
    with pytest.raises(ValueError, match=r"^cannot read image .*train/b/7.png \(not an image"):
        next(iterator)
    iterator.close()


def test_limit_is_a_fixed_mixture_of_the_classes():
    source = make_source(200)
    assert steps_per_epoch(source, 10, limit=45) == 4
    used = []
    for seed in (0, 1):
        batches = take(train_batches(source, PLAIN, batch_size=45, seed=seed, limit=45), 2)
        assert set(numbers(batches[0])) == set(numbers(batches[1]))
        used.append(set(numbers(batches[0])))
        counts = np.bincount(batches[0]["label"], minlength=4)
        assert counts.min() >= 5  # 11 each on average
    assert used[0] == used[1]
    longer = take(train_batches(source, PLAIN, batch_size=90, seed=0, limit=90), 1)
    assert used[0] < set(numbers(longer[0]))


def test_images_of_other_sizes_are_fitted_and_grey_stays_grey():
    source = make_source(8, shape=(12, 9))
    (batch,) = take(train_batches(source, PLAIN, batch_size=8, seed=0), 1)
    assert batch["image"].shape == (8, SIZE, SIZE, 1)
    (evaluated,) = take(eval_batches(make_source(8, shape=(12, 9)), PLAIN, batch_size=7), 1)
    expected = fit(make_source(8, shape=(12, 9)).eval[2]["image"], SIZE)
    np.testing.assert_allclose(evaluated["image"][2], expected / 255, rtol=1e-6)


def test_padding_is_black_before_normalisation():
    source = make_source(4)
    transform = Transform(image_size=SIZE, crop_padding=SIZE, mean=(0.5,), std=(0.25,))
    (batch,) = take(train_batches(source, transform, batch_size=4, seed=0), 1)
    assert batch["image"].min() == -2  # (0 - 0.5) / 0.25


# -- caching ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("transform", [AUGMENTED, Transform(image_size=4, flip=True)])
def test_caching_changes_nothing_and_reads_each_image_once(transform):
    made = make_source()
    source = Source(made.info, Recording(made.train), Recording(made.eval))
    kept = take(train_batches(source, transform, batch_size=5, seed=0, prefetch=0), 12)
    assert sorted(source.train.read) == list(range(20))
    read = take(train_batches(source, transform, batch_size=5, seed=0, prefetch=0, cache=False), 12)
    assert len(source.train.read) == 20 + 60
    assert_equal(kept, read)
    for _ in range(2):  # and evaluation is its own iterable, made anew
        list(eval_batches(source, transform, batch_size=4, prefetch=0))
    assert sorted(source.eval.read) == list(range(7))


def test_what_is_too_large_or_cut_at_random_is_not_cached(monkeypatch):
    source = make_source()
    take(train_batches(source, Transform(image_size=SIZE, area=(0.5, 1.0)), batch_size=5, seed=0), 2)
    monkeypatch.setattr(pipeline, "CACHE_BYTES", 20 * SIZE**2 - 1)
    take(train_batches(source, PLAIN, batch_size=5, seed=0), 2)
    assert not source.cache
    take(train_batches(source, PLAIN, batch_size=5, seed=0, cache=True), 2)
    assert len(source.cache) == 1
    monkeypatch.setattr(pipeline, "CACHE_BYTES", 20 * SIZE**2)
    take(train_batches(source, Transform(image_size=SIZE - 1), batch_size=5, seed=0), 1)
    assert len(source.cache) == 2
    # Fitted otherwise, they are other images.
    resized = Transform(image_size=SIZE - 1, resize=SIZE)
    (kept,) = take(train_batches(source, resized, batch_size=5, seed=0), 1)
    (read,) = take(train_batches(source, resized, batch_size=5, seed=0, cache=False), 1)
    assert_equal([kept], [read])
    assert len(source.cache) == 3


# -- evaluation ------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch_size", [1, 3, 7, 10])
@pytest.mark.parametrize("prefetch", [0, 2])
def test_every_image_is_evaluated_once(batch_size, prefetch):
    source = make_source()
    batches = list(eval_batches(source, PLAIN, batch_size=batch_size, prefetch=prefetch))
    assert len(batches) == eval_steps(source, batch_size) == -(-7 // batch_size)
    for batch in batches:
        assert batch["image"].shape == (batch_size, SIZE, SIZE, 1)
        assert {name: batch[name].dtype for name in batch} == {
            "image": np.float32,
            "label": np.int32,
            "mask": np.float32,
        }
    masks = np.concatenate([batch["mask"] for batch in batches])
    np.testing.assert_array_equal(masks, np.arange(len(masks)) < 7)
    images = np.concatenate([batch["image"] for batch in batches])
    labels = np.concatenate([batch["label"] for batch in batches])
    np.testing.assert_allclose(images[:7], [e["image"] / 255 for e in source.eval], rtol=1e-6)
    assert labels[:7].tolist() == [e["label"] for e in source.eval]
    assert not images[7:].any()
    assert not labels[7:].any()


def test_evaluation_does_not_augment_and_starts_again():
    source = make_source()
    transform = replace(EVERYTHING, crop_padding=4)
    batches = eval_batches(source, transform, batch_size=4)
    assert_equal(list(batches), list(eval_batches(source, PLAIN, batch_size=4)))
    assert_equal(list(batches), list(batches))


def test_evaluation_resizes_before_it_cuts_out_the_centre():
    source = make_source(shape=(12, 17))
    (batch,) = take(eval_batches(source, replace(EVERYTHING, resize=8), batch_size=7), 1)
    expected = np.stack([fit(example["image"], SIZE, 8) for example in source.eval])
    np.testing.assert_allclose(batch["image"], expected / 255, rtol=1e-6)


@pytest.mark.parametrize("batch_size", [2, 4, 8, 16])
def test_processes_share_the_evaluation(batch_size):
    source = make_source(num_eval=13)
    shares = [
        list(eval_batches(source, PLAIN, batch_size=batch_size, process_index=i, process_count=2))
        for i in range(2)
    ]
    assert len(shares[0]) == len(shares[1]) == eval_steps(source, batch_size)
    seen = []
    for batch in itertools.chain(*shares):
        seen += [n for n, real in zip(numbers(batch), batch["mask"], strict=True) if real]
    assert sorted(seen) == list(range(13))


def test_evaluation_takes_a_limit():
    source = make_source(num_eval=40)
    batches = list(eval_batches(source, PLAIN, batch_size=16, limit=20))
    assert sum(batch["mask"].sum() for batch in batches) == 20
    assert len(batches) == eval_steps(source, 16, limit=20) == 2
    assert len(set(batches[0]["label"])) == 4


# -- refusals and imports --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"batch_size": 21}, r"`batch_size` is 21; it must be in \[1, 20\]"),
        ({"batch_size": 0}, "`batch_size` is 0; it must be at least 1"),
        ({"limit": 21}, "`limit` is 21, but the train split has 20 images.*data.train_limit"),
        ({"limit": 3}, r"`batch_size` is 4; it must be in \[1, 3\]"),
        ({"seed": -1}, "`seed` is -1"),
        ({"process_count": 3}, "`batch_size` 4 is not divisible by 3 processes"),
        ({"process_index": 1}, r"`process_index` is 1; it must be in \[0, 1\)"),
        ({"workers": -1}, "`workers` is -1"),
        ({"prefetch": -1}, "`prefetch` is -1"),
        ({"cache": "yes"}, "`cache` is 'yes'; it must be 'auto', True or False"),
        ({"cache": True, "workers": 2}, "`cache` is True, but .* with 2 worker processes"),
        (
            {"transform": EVERYTHING, "batch_size": 5},
            "in pairs, but `batch_size` 5 leaves .* 5 rows; .* even",
        ),
        (
            {"transform": replace(PLAIN, mixup=0.2), "batch_size": 6, "process_count": 2},
            "`batch_size` 6 leaves each of 2 processes 3 rows",
        ),
        (
            {"cache": True, "transform": Transform(image_size=6, area=(0.5, 1.0))},
            "`cache` is True, but .*`area`",
        ),
        (
            {"transform": Transform(image_size=6, mean=(0.1, 0.2, 0.3))},
            "`mean` has 3 numbers, but the images have 1 channels",
        ),
    ],
)
def test_training_arguments_that_do_not_fit(arguments, message):
    arguments = {"transform": PLAIN, "batch_size": 4, "seed": 0, **arguments}
    with pytest.raises(ValueError, match=message):
        train_batches(make_source(), **arguments)


def test_an_unknown_argument_is_named():
    with pytest.raises(TypeError, match="worker"):
        train_batches(make_source(), PLAIN, batch_size=4, seed=0, worker=2)


def test_evaluation_arguments_that_do_not_fit():
    source = make_source()
    with pytest.raises(ValueError, match=r"`limit` is 8, but the eval split has 7 .*data\.eval_limit"):
        eval_batches(source, PLAIN, batch_size=4, limit=8)
    with pytest.raises(ValueError, match="`batch_size` 4 is not divisible by 3 processes"):
        eval_batches(source, PLAIN, batch_size=4, process_count=3)
    with pytest.raises(ValueError, match="`std` has 3 numbers"):
        eval_batches(source, Transform(image_size=SIZE, std=(1.0, 1.0, 1.0)), batch_size=4)


def test_a_sequence_of_the_wrong_kind_of_images_is_refused():
    source = make_source()
    source.train[:] = [{"image": np.zeros((SIZE, SIZE, 1)), "label": 0}] * 20
    with pytest.raises(ValueError, match=r"image \d+ is float64 \(6, 6, 1\); it must be uint8"):
        take(train_batches(source, PLAIN, batch_size=4, seed=0), 1)


def test_importing_the_package_imports_no_reader_and_no_decoder():
    """In a fresh interpreter, and without the `__init__` of `repopt_jax`, which imports the trainer."""
    heavy = ("grain", "tensorflow_datasets", "tensorflow", "PIL", "etils", "sklearn", "torch", "jax", "flax")
    program = (
        "import sys, types; package = types.ModuleType('repopt_jax');"
        f"package.__path__ = {list(repopt_jax.__path__)!r}; sys.modules['repopt_jax'] = package;"
        f"import repopt_jax.data; sys.exit(' '.join(m for m in {heavy!r} if m in sys.modules) or 0)"
    )
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr


# -- workers that die or hang
# ---


@pytest.fixture
def worked():
    """An iterator over batches of two workers, of which the first batch has come, and one of the workers."""
    before = set(multiprocessing.active_children())
    batches = iter(train_batches(make_source(64), PLAIN, batch_size=4, seed=0, workers=2, prefetch=1))
    next(batches)
    worker = min(set(multiprocessing.active_children()) - before, key=lambda process: process.pid)
    yield batches, worker
    batches.close()
    assert set(multiprocessing.active_children()) == before


@pytest.mark.once
def test_a_worker_that_dies_ends_the_training_with_a_sentence(worked):
    batches, worker = worked
    worker.kill()
    with pytest.raises(
        ChildProcessError, match=r"workers`=2\) has ended \(exit code -9\), perhaps .*run the"
    ):
        list(itertools.islice(batches, 100))


def large_message(index):
    """A batch that does not fit in a pipe, and is no array, for which Grain would use shared memory."""
    return {"x": bytes([index]) * 1_000_000}


@pytest.mark.once
def test_a_worker_that_dies_in_the_middle_of_a_message_ends_the_training_too(monkeypatch):
    monkeypatch.setattr(batches_module, "GRACE_S", 2.0)
    before = set(multiprocessing.active_children())
    dataset = grain.MapDataset.source(range(64)).map(large_message)
    batches = iter(batches_module.Batches(dataset, workers=1, prefetch=1))
    next(batches)
    (worker,) = set(multiprocessing.active_children()) - before
    worker.kill()
    with pytest.raises(ChildProcessError, match=r"workers`=1\) has ended \(exit code -9\), perhaps"):
        list(batches)
    batches.close()
    assert set(multiprocessing.active_children()) == before


@pytest.mark.once
def test_a_worker_that_hangs_ends_the_training_with_a_sentence(worked, monkeypatch):
    batches, worker = worked
    monkeypatch.setattr(batches_module, "HANG_S", 1.0)
    os.kill(worker.pid, signal.SIGSTOP)
    with pytest.raises(ChildProcessError, match=r"has made no batch for 1 s, and was ended \(exit code -9\)"):
        list(itertools.islice(batches, 100))
