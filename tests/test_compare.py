"""Comparisons on a few digits: what is trained, what decides, what is read when, and what a stopped one
leaves."""

import dataclasses
import json
import math
import os
import signal
import subprocess
import sys
import textwrap
import threading

import numpy as np
import pytest
import training  # noqa: F401 it registers the network "tiny"

from repopt_jax import data
from repopt_jax.cli.main import main
from repopt_jax.deploy import evaluate
from repopt_jax.models.vgg import VGG_VARIANTS, block_specs
from repopt_jax.report import workers
from repopt_jax.report.compare import compare
from repopt_jax.report.comparison import Comparison, against, load_comparison, smoke_of, spec
from repopt_jax.report.depth import gradient_by_layer
from repopt_jax.train import Config, load_config
from repopt_jax.train.build import load_trained, open_feed
from repopt_jax.train.lock import held
from repopt_jax.train.rules import validate
from repopt_jax.train.rundir import read_json

pytestmark = pytest.mark.once

RATES = (0.02, 0.2)


def small(mode="plain", scales="", **changes) -> Config:
    config = load_config("digits:plain,smoke")
    config.model.name, config.model.mode, config.scales = "tiny", mode, scales
    return dataclasses.replace(config, **changes)


def comparison(**changes) -> Comparison:
    settings = {
        "title": "digits",
        "ways": {"plain": small(), "searched": small("repopt", "search:short")},
        "searches": {"short": small("search")},
        "differences": [("searched", "plain")],
        "seeds": 2,
        "tuning_seeds": 1,
        "grid": {"optim.learning_rate": RATES},
        "validation": 100,
    }
    return Comparison(**{**settings, **changes})


@pytest.fixture(scope="module")
def compared(tmp_path_factory):
    """(folder, results, lines) of a whole comparison."""
    folder, lines = tmp_path_factory.mktemp("compared"), []
    return folder, compare(comparison(), folder, count=0, log=lines.append), lines


def test_each_way_is_trained_at_each_point_and_then_at_its_best(compared):
    folder, results, lines = compared
    made = sorted(str(p.parent.relative_to(folder)) for p in folder.rglob("summary.json"))
    points = {way: f"learning_rate={r.point['optim.learning_rate']}" for way, r in results.ways.items()}
    assert made == sorted(
        [
            "searches/short",
            *(f"runs/{way}/learning_rate={rate}/seed0" for way in points for rate in RATES),
            *(f"runs/{way}/{point}/seed1" for way, point in points.items()),
        ]
    )
    assert len(lines) == len(made)
    for way, found in results.ways.items():
        validated = [
            read_json(folder / "runs" / way / f"learning_rate={rate}" / "seed0" / "summary.json")["test"][
                "accuracy"
            ]
            for rate in RATES
        ]
        assert found.tuning == validated
        assert found.point["optim.learning_rate"] == RATES[int(np.argmax(validated))]


def test_test_images_are_read_at_the_end_and_of_the_chosen_alone(compared):
    folder, results, _ = compared
    read = {p.parent for p in folder.rglob("test.json")}
    assert read == {f for found in results.ways.values() for f in found.folders.values()}
    for found in results.ways.values():
        assert found.count == 40  # as many test images as the config wants
        for seed, run in found.folders.items():
            summary = read_json(run / "summary.json")
            assert (summary["split"], summary["test_count"]) == ("validation", 100)
            again = evaluate(load_trained(run))
            assert found.test["accuracy"][seed] == again["accuracy"]
            assert again["count"] == 40


def test_searched_scales_are_those_of_the_search(compared):
    folder, results, _ = compared
    run = results.ways["searched"].folders[1]
    assert read_json(run / "config.json")["scales"] == str(folder / "searches" / "short" / "scales")
    assert results.searches == {"short": folder / "searches" / "short"}


def test_differences_are_those_of_the_seeds(compared):
    _, results, _ = compared
    tests = {way: found.test["accuracy"] for way, found in results.ways.items()}
    expected = {seed: tests["searched"][seed] - tests["plain"][seed] for seed in (0, 1)}
    assert results.differences[0].by_seed == expected


def test_the_command_writes_a_report_of_it(compared, tmp_path, capfd):
    folder, results, _ = compared
    (tmp_path / "small.py").write_text(
        "from test_compare import comparison\n\n\ndef get_comparison(arg=''):\n    return comparison()\n"
    )
    assert main(["compare", f"--config={tmp_path}/small.py", f"--out={folder}", "--workers=0"]) == 0
    said = capfd.readouterr().out
    assert said.count("(was there)") == 7
    assert f"Report: {folder}/report.html" in said
    content = json.loads((folder / "report.json").read_text())
    accuracies = [found.test["accuracy"] for found in results.ways.values()]
    assert [row["test"]["accuracy"] for row in content["rows"]] == json.loads(json.dumps(accuracies))


def test_a_finished_comparison_is_read_back_and_takes_more_seeds(compared):
    folder, results, _ = compared
    lines = []
    again = compare(comparison(title="x", labels={"plain": "SGD"}), folder, count=0, log=lines.append)
    assert all("(was there)" in line for line in lines)
    assert again.ways == results.ways
    more = compare(comparison(seeds=3), folder, count=0)
    assert [found.point for found in more.ways.values()] == [found.point for found in results.ways.values()]
    assert {**more.ways["plain"].test["accuracy"]}.keys() == {0, 1, 2}


def test_another_comparison_is_refused_with_all_differences(compared, tmp_path):
    folder, *_ = compared
    other = comparison(
        ways={"plain": small(epochs=3), "searched": small("repopt", "search:short")},
        grid={"optim.learning_rate": (0.1, 0.2)},
        validation=99,
    )
    with pytest.raises(ValueError, match=r"differs in plain: epochs \(2 and 3\), `grid` .*, `validation`"):
        compare(other, folder, count=0)
    with pytest.raises(ValueError, match=r"`ways` \(plain, searched there and plain here\)"):
        compare(comparison(ways={"plain": small()}, differences=()), folder, count=0)
    with pytest.raises(ValueError, match=r"differs in short: epochs \(2 and 3\)"):
        compare(comparison(searches={"short": small("search", epochs=3)}), folder, count=0)
    (tmp_path / "mine.txt").touch()
    with pytest.raises(ValueError, match=r"holds no comparison \(it has mine\.txt\)"):
        compare(comparison(), tmp_path, count=0)


def test_parts_share_a_folder(compared, tmp_path):
    """What one part has trained is there for the whole."""
    _, results, _ = compared
    known = results.ways["plain"]
    changes = {"grid": {name: (value,) for name, value in known.point.items()}, "seeds": 1}
    whole = comparison(**changes)
    done = compare(whole.of(["plain"]), tmp_path, count=0)
    assert not (tmp_path / "searches").exists()
    assert done.ways.keys() == {"plain"}
    assert done.ways["plain"].test["accuracy"] == {0: known.test["accuracy"][0]}
    compare(whole.of(["searched"]), tmp_path, count=0)
    assert read_json(tmp_path / "comparison.json") == spec(whole)
    again = []
    compare(whole, tmp_path, count=0, log=again.append)
    assert len(again) == 3
    assert all("(was there)" in line for line in again)
    other = comparison(**changes, ways={**whole.ways, "plain": small(epochs=3)})
    with pytest.raises(ValueError, match=r"differs in plain: epochs \(2 and 3\)"):
        compare(other.of(["plain"]), tmp_path, count=0)


def test_a_comparison_has_its_folder_for_itself(compared):
    folder, *_ = compared
    with held(folder), pytest.raises(BlockingIOError, match="is being written by process") as raised:
        compare(comparison(), folder, count=0)
    assert "\n" not in str(raised.value)
    assert not (folder / "run.lock").exists()


def test_pairs_are_every_way_with_the_others():
    assert against("abc", "a") == [("b", "a"), ("c", "a")]
    assert against("abc", "a", "b") == [("b", "a"), ("c", "a"), ("c", "b")]
    assert against("cd", "a") == [("c", "a"), ("d", "a")]
    assert comparison(differences=None).pairs == [("searched", "plain")]


def test_a_smoke_keeps_what_its_own_search_finds():
    made = smoke_of(
        comparison(ways={"plain": small(), "searched": small("repopt", "search:short", scales_mean=True)})
    )
    assert (made.ways["searched"].scales, made.ways["searched"].scales_mean) == ("search:short", True)
    assert made.validation == 16
    assert made.searches["short"].epochs == 2
    with pytest.raises(ValueError, match="`scales`='search:short' is for the ways of a comparison"):
        validate(made.ways["searched"], device_count=1)


def test_what_does_not_fit_together_is_listed():
    with pytest.raises(ValueError) as raised:
        comparison(
            seeds=0,
            tuning_seeds=0,
            validation=0,
            labels={"other": "x"},
            differences=[("plain", "none")],
            searches={},
            ways={"plain": small(), "a/b": small("repopt", "search:short")},
        )
    for part in (
        "`seeds`=0",
        "`tuning_seeds`=0",
        "the test images must not decide",
        "not compared: other",
        "not compared: none",
        "no such search",
        "'a/b' cannot be that of a folder",
    ):
        assert part in str(raised.value)
    with pytest.raises(ValueError) as raised:
        comparison(
            ways={"plain": small(), "short": small(seed=3)},
            labels={"plain": "x", "short": "x"},
            grid={"seed": (1, 2), "data.validation": (3,)},
            differences=(),
        )
    for part in (
        "cannot be over seed, data.validation",
        "different seeds, 0, 3",
        "`labels` name several ways 'x'",
        "names of `ways`: short",
    ):
        assert part in str(raised.value)
    with pytest.raises(ValueError, match=r"no values of optim\.learning_rate"):
        comparison(grid={"optim.learning_rate": ()})


def test_configs_that_cannot_run_are_refused_before_anything_is_written(tmp_path):
    for grid, message in (
        ({"optim.rate": RATES}, "has the field 'optim.rate'"),
        ({"optim.learning_rate": (0.1, -1.0)}, "`optim.learning_rate`=-1.0"),
    ):
        with pytest.raises(ValueError, match=message):
            compare(comparison(grid=grid), tmp_path / "out", count=0)
    assert not (tmp_path / "out").exists()


def test_what_is_wrong_with_several_ways_is_listed_with_their_names(tmp_path):
    fast, heavy = small(), small()
    fast.optim.momentum, heavy.optim.momentum = 2.0, -3.0
    search = small("search")
    search.optim.momentum = 2.0
    broken = comparison(
        ways={"fine": small(), "fast": fast, "heavy": heavy}, searches={"short": search}, differences=()
    )
    with pytest.raises(ValueError, match="this comparison cannot run: ") as caught:
        compare(broken, tmp_path / "out", count=0)
    said = str(caught.value)
    fasts, heavies = (
        [f"way '{way}' with learning rate {rate}" for rate in RATES] for way in ("fast", "heavy")
    )
    assert f"search 'short', {', '.join(fasts)}: `optim.momentum`=2.0 must" in said
    assert f"{', '.join(heavies)}: `optim.momentum`=-3.0 must" in said
    assert "fine" not in said


@pytest.mark.parametrize(
    ("file", "texts", "message"),
    [
        ("test.json", ("{}", "[]", '{"count": 40, "accuracy": "0.5"}'), "it does not hold numbers by name"),
        ("gradients.json", ("[]", '{"stages/0/0": null, "a": []}'), "it does not hold numbers by name"),
        ("comparison.json", ("[]", '{"ways": []}', '{"ways": {"plain": {"optim": 3}}}'), "choose another"),
    ],
)
def test_damaged_files_are_refused(compared, file, texts, message):
    """And never read as results: an empty test.json left the accuracy on held-out images in its place."""
    folder, *_ = compared
    for path in sorted(folder.rglob(file))[:1]:
        whole = path.read_text()
        for text in texts:
            path.write_text(text)
            with pytest.raises(ValueError, match=f"{file} is damaged.*{message}"):
                compare(comparison(), folder, count=0)
        path.write_text(whole)


def test_a_damaged_record_of_a_divergence_is_refused(tmp_path):
    alone = comparison(ways={"plain": small()}, searches={}, differences=(), grid={}, validation=0, seeds=1)
    run = tmp_path / "runs" / "plain" / "default" / "seed0"
    run.mkdir(parents=True)
    (tmp_path / "comparison.json").write_text(json.dumps(spec(alone)))
    for text in ("{}", "[]", '{"reason": 3}'):
        (run / "diverged.json").write_text(text)
        with pytest.raises(ValueError, match=r"diverged\.json is damaged, it has no reason"):
            compare(alone, tmp_path, count=0)


def test_a_rate_at_which_training_diverges_is_not_chosen(tmp_path):
    alone = {"ways": {"plain": small()}, "searches": {}, "differences": (), "seeds": 1}
    found = compare(comparison(**alone, grid={"optim.learning_rate": (1e30, 0.1)}), tmp_path / "a", count=0)
    plain = found.ways["plain"]
    assert plain.point == {"optim.learning_rate": 0.1}
    assert math.isnan(plain.tuning[0])
    # It is not tried again.
    lines = []
    compare(
        comparison(**alone, grid={"optim.learning_rate": (1e30, 0.1)}),
        tmp_path / "a",
        count=0,
        log=lines.append,
    )
    assert sum("diverged" in line for line in lines) == 1
    # Where nothing else was given, it counts as no answer right.
    one = comparison(**alone, grid={"optim.learning_rate": (1e30,)})
    plain = compare(one, tmp_path / "b", count=0).ways["plain"]
    assert plain.test["accuracy"] == {0: 0.0}
    assert plain.summary == {}


def test_a_search_that_diverges_ends_the_comparison(tmp_path):
    search = small("search")
    search.optim.learning_rate = 1e30
    with pytest.raises(FloatingPointError, match=r"the search 'short' diverged \(.*`optim.learning_rate`"):
        compare(comparison(searches={"short": search}), tmp_path, count=0)


def test_a_stopped_comparison_goes_on_to_the_same_results(compared, tmp_path):
    """And the test images wait for the last training: one that is stopped before it has read none of them."""

    class Stop(Exception):
        pass

    def stop_at(text):
        def log(line):
            if text in line:
                raise Stop

        return log

    alone = comparison(ways={"plain": small()}, searches={}, differences=())
    for seed, runs in ((0, {1, 2}), (1, {3})):
        with pytest.raises(Stop):
            compare(alone, tmp_path, count=0, log=stop_at(f"seed {seed}"))
        assert len(list(tmp_path.rglob("summary.json"))) in runs
        assert not list(tmp_path.rglob("test.json"))
    _, results, _ = compared
    found, known = compare(alone, tmp_path, count=0).ways["plain"], results.ways["plain"]
    assert (found.point, found.tuning, found.test) == (known.point, known.tuning, known.test)


def test_without_a_grid_all_images_train_and_nothing_is_held_out(tmp_path):
    whole = comparison(ways={"plain": small()}, searches={}, differences=(), grid={}, validation=0, seeds=1)
    plain = compare(whole, tmp_path, count=0).ways["plain"]
    assert plain.point == {}
    assert not (plain.folders[0] / "test.json").exists()
    assert plain.test["accuracy"] == {0: read_json(plain.folders[0] / "summary.json")["test"]["accuracy"]}


# -- what is held out


def test_held_out_images_are_none_of_those_that_train(digits):
    source = data.open_source("digits", data_dir=digits)
    held = data.hold_out(source, 100)
    whole, kept, out = (
        sorted(example["image"].tobytes() + bytes([example["label"]]) for example in split)
        for split in (source.train, held.train, held.eval)
    )
    assert (held.info.num_train, held.info.num_eval) == (len(source.train) - 100, 100)
    assert sorted(kept + out) == whole
    again = data.hold_out(source, 100)
    assert all((a["image"] == b["image"]).all() for a, b in zip(held.eval, again.eval))
    for count in (0, len(source.train)):
        with pytest.raises(ValueError, match=f"`validation` is {count}"):
            data.hold_out(source, count)


def test_held_out_scenes_keep_their_objects():
    source = data.open_source("scenes", scenes=(8, 2), image_size=64)
    held = data.hold_out(source, 3)
    boxes = {tuple(source.train.objects(i)["boxes"].ravel()): i for i in range(8)}
    seen = []
    for split in (held.train, held.eval):
        for i in range(len(split)):
            index = boxes[tuple(split.objects(i)["boxes"].ravel())]
            assert (split.image(i) == source.train.image(index)).all()
            assert (split[i]["image"] == source.train.image(index)).all()
            seen.append(index)
    assert sorted(seen) == list(range(8))


# -- gradients


def test_a_layers_gradient_is_that_of_a_relative_change():
    """|g| |K| is the largest slope of the loss along K -> K + t |K| D with |D| = 1."""
    import jax
    import jax.numpy as jnp

    from repopt_jax.train.build import build_model, make_task
    from repopt_jax.train.state import merge_model, split_model

    config = small()
    sizes = gradient_by_layer(config)
    feed = open_feed(config)
    model, _ = build_model(config, feed.source.info)
    model.train()
    network = split_model(model)
    batch = {name: jnp.asarray(array) for name, array in next(iter(feed.train)).items()}
    path = list(sizes)[2]
    names = [int(p) if p.isdigit() else p for p in f"{path}/kernel".split("/")]

    def leaf(tree):
        for name in names:
            tree = tree[name]
        return tree

    def loss(step):
        params = jax.tree.map(lambda leaf: leaf, network.params)
        owner = params
        for name in names[:-1]:
            owner = owner[name]
        owner[names[-1]] = owner[names[-1]] + step
        net = merge_model(network.graphdef, params, network.non_trainable)
        net.train()
        return make_task(config).objective(net, batch)[0]

    kernel = leaf(network.params)
    gradient = jax.grad(loss)(jnp.zeros_like(kernel))
    direction = gradient / jnp.linalg.norm(gradient) * jnp.linalg.norm(kernel)
    slope = (loss(1e-3 * direction) - loss(-1e-3 * direction)) / 2e-3
    assert sizes[path] == pytest.approx(float(slope), rel=0.02)


def test_gradients_grow_towards_the_input_in_a_deep_plain_network_alone():
    found = {}
    for run in ("plain", "depth"):
        found_layers = gradient_by_layer(load_config(f"deep_digits:{run}"))
        sizes = list(found_layers.values())
        assert len(sizes) == 32
        assert list(found_layers) == [
            f"{spec.path}/conv" for spec in block_specs(VGG_VARIANTS["digits-deep"])
        ]
        found[run] = max(sizes) / sizes[-1]
    assert found["plain"] > 20  # 60 with this seed
    assert found["depth"] < 8


# -- processes


@pytest.fixture
def jobs(tmp_path, monkeypatch):
    """A module of functions that workers can import."""
    (tmp_path / "worker_jobs.py").write_text(
        textwrap.dedent("""
            import os, threading

            first = []

            def begin(value):
                first.append(value)

            def add(a, b, *, stop):
                print("not a result")
                return a + b, first, os.getpid(), sorted(os.sched_getaffinity(0))

            def fail(*, stop):
                raise FileNotFoundError("there is none")

            def die(*, stop):
                os._exit(9)

            def endless(path, *, stop):
                with open(path + ".new", "w") as file:
                    file.write(str(os.getpid()))
                os.replace(path + ".new", path + ".begun")
                while not stop():
                    threading.Event().wait(0.01)
                open(path, "w").close()
        """)
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), *sys.path]))
    import worker_jobs

    yield worker_jobs
    sys.modules.pop("worker_jobs")


def test_calls_are_made_in_processes_that_share_the_cores(jobs):
    with workers.Workers(2, first=(jobs.begin, (7,))) as pool:
        # Each waits for the other's process to be busy.
        results = [pool.submit(jobs.add, 1, b) for b in range(8)]
        found = [future.result() for future in results]
        with pytest.raises(FileNotFoundError, match="there is none"):
            pool.submit(jobs.fail).result()
        assert pool.submit(jobs.add, 1, 1).result()[0] == 2  # it goes on
    assert [total for total, *_ in found] == [1 + b for b in range(8)]
    assert all(first == [7] for _, first, *_ in found)
    assert os.getpid() not in {pid for _, _, pid, _ in found}
    cores = {pid: tuple(own) for _, _, pid, own in found}
    if len(os.sched_getaffinity(0)) > 1 and len(cores) == 2:
        assert not set.intersection(*map(set, cores.values()))


def test_without_processes_calls_are_made_here(jobs):
    with workers.Workers(0) as pool:
        assert pool.submit(jobs.add, 1, 2).result()[2] == os.getpid()
        with pytest.raises(FileNotFoundError):
            pool.submit(jobs.fail).result()


def test_a_process_that_dies_is_an_error(jobs):
    with workers.Workers(1) as pool, pytest.raises(ChildProcessError, match="exit code 9"):
        pool.submit(jobs.die).result()


def test_a_process_that_hangs_is_ended(jobs, tmp_path, monkeypatch):
    """What a debugger, a full network drive or SIGSTOP make of one: it is there and does nothing."""
    path = tmp_path / "stopped"
    with workers.Workers(2) as pool:
        for call in [pool.submit(jobs.add, 1, 1) for _ in range(8)]:
            call.result()  # both have begun: from here on they are heard twice a second
        monkeypatch.setattr(workers, "TICK_S", 0.4)
        call = pool.submit(jobs.endless, str(path))
        begun(call, path)
        pid = int(path.with_suffix(".begun").read_text())
        os.kill(pid, signal.SIGSTOP)
        with pytest.raises(ChildProcessError, match=r"hung: nothing was heard of it .* run the same command"):
            call.result()
        assert pool.submit(jobs.add, 1, 1).result()[2] != pid  # the other is not thought to hang
    assert not path.exists()


def begun(call, path):
    """Waits until `jobs.endless` is in the middle of its call."""
    while not path.with_suffix(".begun").exists() and not call.done():
        threading.Event().wait(0.01)


def test_the_dead_do_not_keep_others_from_stopping(jobs, tmp_path):
    """More calls are waiting than there are processes, and one that lives is in the middle of its own."""
    path = tmp_path / "stopped"

    def broken():
        with workers.Workers(2) as pool:
            begun(pool.submit(jobs.endless, str(path)), path)
            calls = [pool.submit(jobs.die), *(pool.submit(jobs.add, 1, 1) for _ in range(3))]
            for call in calls:
                call.result()

    with pytest.raises(ChildProcessError, match="exit code 9"):
        broken()
    assert path.exists()


def test_what_a_process_cannot_import_is_the_error_of_its_calls(jobs):
    with workers.Workers(1, first=(load_comparison, ("nowhere.py",))) as pool:
        for _ in range(2):
            with pytest.raises(FileNotFoundError, match=r"no config file 'nowhere\.py'"):
                pool.submit(jobs.add, 1, 1).result()


def test_a_function_that_cannot_be_found_there_is_an_error(jobs, monkeypatch):
    with workers.Workers(1) as pool:
        monkeypatch.setattr(jobs.add, "__qualname__", "gone")
        monkeypatch.setattr(jobs, "gone", jobs.add, raising=False)
        with pytest.raises(AttributeError, match="gone"):
            pool.submit(jobs.add, 1, 1).result()
        monkeypatch.undo()


def test_leaving_by_an_error_asks_calls_to_stop(jobs, tmp_path):
    path = tmp_path / "stopped"

    def interrupted():
        with workers.Workers(1) as pool:
            begun(pool.submit(jobs.endless, str(path)), path)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert path.exists()


COMPARED = """
import dataclasses
from repopt_jax.report.comparison import Comparison
from repopt_jax.train import load_config

def get_comparison(arg=""):
    ways = {}
    for name, (mode, scales) in {"plain": ("plain", ""), "depth": ("repopt", "depth")}.items():
        config = load_config("digits:plain,smoke")
        config.model.mode, config.scales = mode, scales
        ways[name] = config
    return Comparison(title="digits", ways=ways, differences=[("depth", "plain")], seeds=1,
                      grid={"optim.learning_rate": (0.02, 0.2)}, validation=100)
"""


# In the ordinary run one that is stopped goes on, and the command writes the report of a whole one.
@pytest.mark.long
def test_a_killed_comparison_goes_on_to_the_same_table(tmp_path):
    (tmp_path / "small.py").write_text(COMPARED)

    def command(out):
        options = [f"--config={tmp_path}/small.py", f"--out={tmp_path / out}", "--workers=1"]
        return [sys.executable, "-m", "repopt_jax", "compare", *options]

    def table(out):
        content = json.loads((tmp_path / out / "report.json").read_text())
        timed = ("step_ms",)
        return [{k: v for k, v in row.items() if k not in timed} for row in content["rows"]], content[
            "differences"
        ]

    process = subprocess.Popen(command("killed"), stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert "seed 0" in process.stdout.readline()  # one run is finished, others are not
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
    assert not (tmp_path / "killed" / "report.json").exists()
    again = subprocess.run(command("killed"), capture_output=True, text=True, check=True)
    assert "(was there)" in again.stdout
    subprocess.run(command("whole"), capture_output=True, text=True, check=True)
    assert table("killed") == table("whole")


def test_files_without_a_comparison_are_configs(tmp_path):
    assert isinstance(load_comparison("digits:plain"), Config)
    for arg in ("quickstart", "decisive", "decisive,smoke"):
        assert isinstance(load_comparison(f"deep_digits:{arg}"), Comparison)
    for arg in (
        "cifar10_small:three",
        "cifar10_small:structures,smoke",
        "cifar10_small:a0,smoke",
        "cifar10_deep",
        "cifar10_deep:,smoke",
    ):
        assert isinstance(load_comparison(arg), Comparison)
    found = load_comparison("deep_digits:,smoke")
    assert isinstance(found, Comparison)
    assert found.validation == 16
    (tmp_path / "wrong.py").write_text("def get_comparison(arg):\n    return 3\n")
    with pytest.raises(TypeError, match="returned int, not `Comparison`"):
        load_comparison(f"{tmp_path}/wrong.py")
