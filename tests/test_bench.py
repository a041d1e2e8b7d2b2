"""`repopt bench`: what it reports is what was measured, and what it says of memory and bytes is so."""

import dataclasses
import json
import random

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import repopt_jax
from repopt_jax import cli
from repopt_jax.bench import PARTS, Settings, bench, chart, conv, results, suite, timing, update
from repopt_jax.bench.feeding import recipe
from repopt_jax.bench.networks import abstract_model, config_of
from repopt_jax.bench.results import Section
from repopt_jax.bench.step import confirmed, largest_batch, stepping
from repopt_jax.bench.timing import DOES_NOT_FIT, Candidate, measure, spread
from repopt_jax.bench.update import UPDATES, add_bandwidth, kernels, random_like, stored_multiplier, updating
from repopt_jax.core.published import default_branches
from repopt_jax.train.config import OptimConfig
from repopt_jax.train.optimizer import make_optimizer

pytestmark = pytest.mark.once

TINY = Settings(model="vgg-digits", size=8, batches=(4,), rounds=3, classes=10)


class Clock:
    """A clock that moves only when a candidate runs."""

    def __init__(self, monkeypatch):
        self.now = 0.0
        monkeypatch.setattr(timing.time, "perf_counter", lambda: self.now)

    def candidate(self, seconds, **options):
        def start():
            self.now += next(seconds) if hasattr(seconds, "__next__") else seconds

        return Candidate(start, wait=lambda _: None, **options)


def test_ratios_are_of_the_same_round(monkeypatch):
    """A machine that slows down from round to round changes the times and not the ratios."""
    clock, slowness = Clock(monkeypatch), {"value": 1.0}

    def slowing(seconds):
        while True:
            slowness["value"] *= 1.2
            yield seconds * slowness["value"]

    builders = {
        "base": lambda: (clock.candidate(slowing(1.0)), {}),
        "double": lambda: (clock.candidate(slowing(2.0)), {"fact": 7}),
    }
    found = measure(builders, 9, {"base": ("base",), "double": ("base",)})
    ratio, times = found["double"]["ratios"]["base"], found["double"]["ms"]
    assert found["double"]["fact"] == 7
    # One call of the other lies between the two: 1.2 either way. Times spread by far more.
    assert 2 / 1.21 < ratio["low"] <= ratio["median"] <= ratio["high"] < 2 * 1.21
    assert times["high"] / times["low"] > 2
    assert found["base"]["ratios"]["base"] == {"median": 1, "low": 1, "high": 1, "best": 1}


def test_a_time_is_of_one_repetition_and_short_ones_are_queued(monkeypatch):
    clock = Clock(monkeypatch)
    short, count = clock.candidate(1e-3, repeats=4), []
    counted = dataclasses.replace(short, wait=lambda _: count.append(clock.now))
    times, _ = timing.interleave({"short": counted}, 3)
    assert times["short"] == pytest.approx([1e-3 / 4] * 3)
    assert len(count) == 5  # a wait for each measurement and two before, though each takes 50 calls
    assert clock.now == pytest.approx(1e-3 * (2 + 3 * timing.MIN_SECONDS / 1e-3))


def test_rounds_have_several_orders(monkeypatch):
    clock, ran = Clock(monkeypatch), []

    def noting(name):
        return dataclasses.replace(clock.candidate(1.0), wait=lambda _: ran.append(name))

    timing.interleave({name: noting(name) for name in "abc"}, 12)
    orders = {tuple(ran[i : i + 3]) for i in range(6, len(ran), 3)}
    assert len(orders) > 3
    assert all(sorted(order) == ["a", "b", "c"] for order in orders)


@pytest.mark.parametrize(
    ("text", "out"),
    [
        ("RESOURCE_EXHAUSTED: Out of memory while trying to allocate 9 bytes", True),
        ("CUDA out of memory. Tried to allocate 2.00 GiB", True),
        ("INVALID_ARGUMENT: shapes differ", False),
    ],
)
def test_what_does_not_fit_is_a_result_and_other_errors_are_errors(monkeypatch, text, out):
    clock = Clock(monkeypatch)

    def build():
        raise jax.errors.JaxRuntimeError(text)

    def late():
        raise jax.errors.JaxRuntimeError(text)

    builders = {
        "fits": lambda: (clock.candidate(1.0), {}),
        "never": build,
        "late": lambda: (Candidate(late), {}),
    }
    baselines = dict.fromkeys(builders, ("never", "fits"))
    if not out:
        with pytest.raises(jax.errors.JaxRuntimeError, match="shapes differ"):
            measure(builders, 3, baselines)
        return
    found = measure(builders, 3, baselines)
    assert list(found) == ["fits", "never", "late"]
    assert found["never"] == found["late"] == {"failed": DOES_NOT_FIT}
    assert set(found["fits"]["ratios"]) == {"fits"}


def test_spread_is_that_of_numpy():
    values = [random.Random(i).random() for i in range(11)]
    found = spread(values)
    quartiles = np.quantile(values, [0.25, 0.5, 0.75])
    assert [found["low"], found["median"], found["high"]] == pytest.approx(list(quartiles), rel=1e-12)
    assert found["best"] == min(values)


@settings(max_examples=60, deadline=None)
@given(
    fixed=st.integers(0, 10**6),
    each=st.integers(1, 10**4),
    step=st.integers(1, 8),
    limit=st.integers(1, 10**7),
    start=st.integers(1, 512),
)
def test_the_largest_batch_fits_and_little_more_does_not(fixed, each, step, limit, start):
    """Memory that grows by steps, as padded layouts make it grow."""
    asked = []

    def peak(batch):
        asked.append(batch)
        return fixed + each * (-(-batch // step) * step)

    found = largest_batch(peak, limit, start)
    assert len(asked) == len(set(asked)) <= 12
    assert found == 0 or peak(found) <= limit
    if len(asked) < 12:  # the search ended by itself
        assert peak(found + max(1, found // 32)) > limit


def test_the_largest_batch_takes_few_programs():
    asked = []

    def peak(batch):
        asked.append(batch)
        return 10**9 + 3 * 10**7 * batch

    assert largest_batch(peak, 80 * 10**9, 32) >= 2633 * 31 // 32
    assert len(asked) <= 5


def test_what_does_not_run_is_made_smaller():
    assert confirmed(lambda batch: batch <= 100, 110) == 98  # steps of 3
    assert confirmed(lambda batch: False, 3) == 0


@pytest.fixture(scope="module")
def updated():
    """What the part "update" runs, for two kernels and a bias: name -> (transformation, parameters after one
    call, facts); the parameters before; and the rule with a stored multiplier."""
    shapes = {"a": (3, 3, 32, 32), "b": (3, 3, 32, 48)}
    sets = {f"{name}/kernel": default_branches(shape) for name, shape in shapes.items()}
    scales = repopt_jax.Scales.depth_rule(sets, dict(zip(sets, (1, 2))))
    shapes = {name: {"kernel": jax.ShapeDtypeStruct(shape, jnp.float32)} for name, shape in shapes.items()}
    shapes["a"]["bias"] = jax.ShapeDtypeStruct((32,), jnp.float32)
    sgd = optax.chain(optax.add_decayed_weights(4e-5), optax.sgd(0.1, 0.9, nesterov=True))
    params = jax.tree.map(lambda leaf: 100 * leaf, random_like(shapes))
    firsts = {"plain": optax.identity(), "mask": repopt_jax.repopt_mask(scales)}
    found = {}
    for name, first in firsts.items():
        candidate, facts = updating(tx := optax.chain(first, sgd), params, {})
        after, _ = candidate.start()
        found[name] = tx, after, facts
    return found, params, optax.chain(stored_multiplier(scales), sgd)


def test_repeated_updates_are_those_of_a_loop(updated):
    """The loop is of the stored multiplier: the same rule as the mask, and another than the plain one."""
    found, params, stored = updated
    once = jax.jit(stored.update)
    slow, state = params, jax.jit(stored.init)(params)
    for _ in range(UPDATES):
        updates, state = once(params, state, slow)
        slow = jax.tree.map(np.add, slow, updates)
    _, after, facts = found["mask"]
    assert furthest(after, slow) < 1e-6  # 2e-7 measured
    assert furthest(after, found["plain"][1]) > 1e-2
    assert facts["largest_constant_bytes"] < 1000
    states = {name: facts["state_bytes"] for name, (_, _, facts) in found.items()}
    kernels = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
    assert states["plain"] < states["mask"] < states["plain"] + 0.01 * kernels
    assert sum(leaf.nbytes for leaf in jax.tree.leaves(state)) > states["plain"] + 0.99 * kernels


def test_no_multiplier_waits_before_the_loop(updated, monkeypatch):
    """The pass that would take it out of the loop is off: the temporaries are the plain update's (1.00 of
    them measured). With the pass on, the control, there are more (1.4)."""
    found, params, _ = updated
    temporaries = {name: facts["temporary_bytes"] for name, (_, _, facts) in found.items()}
    assert temporaries["mask"] <= 1.02 * temporaries["plain"]
    monkeypatch.setattr(update, "IN_A_LOOP", {})
    _, facts = updating(found["mask"][0], params, {})
    assert facts["temporary_bytes"] > 1.1 * temporaries["plain"]


def furthest(a, b):
    """Largest difference of two trees, relative to the largest number."""
    pairs = list(zip(jax.tree.leaves(a), jax.tree.leaves(b)))
    return max(float(abs(x - y).max()) for x, y in pairs) / max(float(abs(y).max()) for _, y in pairs)


def test_share_of_bandwidth_is_that_of_bytes():
    found = {
        "copy": {"moved_bytes": 2000, "ms": {"median": 1.0}, "ratios": {}},
        "update": {
            "moved_bytes": 2400,
            "ms": {"median": 2.0},
            "ratios": {"copy": {"median": 2.0, "low": 1.5, "high": 2.4, "best": 1.5}},
        },
    }
    add_bandwidth(found)
    assert found["copy"]["bytes_per_s"] == 2e6
    assert found["update"]["bytes_per_s"] == 1.2e6
    assert found["update"]["share_of_copy"] == pytest.approx({"median": 0.6, "low": 0.5, "high": 0.8})


def test_the_step_is_the_trainers():
    """One call is one step of training, from the state that the call before left."""
    candidate, facts = stepping("repopt", TINY, "float32", 4)
    first, _ = jax.device_get(candidate.start())
    second, means = candidate.start()
    assert (int(first.step), int(second.step)) == (1, 2)
    assert jnp.isfinite(means["loss"])
    assert furthest(second.params, first.params) > 1e-6
    assert facts["peak_bytes"] > sum(leaf.nbytes for leaf in jax.tree.leaves(second))


def test_what_is_compared_differs_in_what_it_says():
    """RepOpt is the plain network with scales; each of the others is trained in another mode."""
    configs = {name: config_of(name, TINY, "bfloat16", 4) for name in TINY.networks}
    assert (configs["repopt"].scales, configs["plain"].scales) == ("depth", "")
    assert len({c.model.mode for c in configs.values()}) == len(configs)
    assert len({c.model.name for c in configs.values()}) == 1
    assert {c.model.dtype for c in configs.values()} == {"bfloat16"}
    assert len({(c.batch_size, str(c.optim)) for c in configs.values()}) == 1


def test_the_recipe_of_the_input_is_the_published_one():
    transform = recipe(dataclasses.replace(TINY, size=224))
    assert (transform.image_size, transform.randaugment, transform.flip) == (224, 15, True)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"rounds": 2}, "`rounds` is 2.*at least 3"),
        ({"model": "repopt-vgg-b11"}, "'repopt-vgg-b11'.*did you mean 'repopt-vgg-b1"),
        ({"dtypes": ("float16",)}, "'float16' is none of float32, bfloat16"),
        ({"networks": ("repvg",)}, "did you mean 'repvgg"),
        ({"batches": (0,)}, "`batch` 0 must be at least 1"),
        ({"batches": ()}, "`batch` is empty"),
        ({"memory": float("nan")}, "`memory` is nan"),
        ({"rounds": 1, "size": 0}, "`size` 0.*`rounds` is 1"),
    ],
)
def test_settings_that_cannot_be_measured(changes, words):
    with pytest.raises(ValueError, match=words):
        Settings(**changes)


def made_up(part="step", title="Training step, A", failed=True):
    time = {"median": 1234.5, "low": 1200.0, "high": 1300.0, "best": 1100.0}
    base = {"median": 1.0, "low": 1.0, "high": 1.0, "best": 1.0}
    candidates = {
        "plain": {"ms": time, "ratios": {"plain": base}, "peak_bytes": 5_000_000},
        "RepOpt": {"ms": time, "ratios": {"plain": base | {"median": 0.98765}}, "peak_bytes": 5_000_000},
    }
    if failed:
        candidates["RepVGG"] = {"failed": DOES_NOT_FIT}
    return Section(part, title, {"dtype": "float32", "tf32": False}, candidates, 5, command="repopt bench")


def test_results_are_added_and_measured_again(tmp_path, monkeypatch):
    measured = [made_up(title="Training step, A"), made_up(title="Training step, B", failed=False)]
    monkeypatch.setitem(suite.PARTS, "step", lambda settings: [measured[0]])
    monkeypatch.setitem(suite.PARTS, "compile", lambda settings: [measured[1]])
    out = tmp_path / "deep" / "x"
    bench(["step"], TINY, out=out, command="first")
    bench(["compile"], TINY, out=out, command="second")
    measured[0] = made_up(title="Training step, A", failed=False)
    done = bench(["step"], TINY, out=out, command="third")
    assert [s["title"] for s in done["sections"]] == ["Training step, A"]
    there = json.loads((tmp_path / "deep" / "x.json").read_text())
    assert [(s["title"], s["command"]) for s in there["sections"]] == [
        ("Training step, A", "third"),
        ("Training step, B", "second"),
    ]
    text = (tmp_path / "deep" / "x.md").read_text()
    assert "| RepOpt | 1234 (1200 to 1300) | 0.988 (1.000 to 1.000) | 5.0 |" in text
    assert "TF32 not allowed" in text
    assert DOES_NOT_FIT not in text
    assert (tmp_path / "deep" / "x.png").stat().st_size > 10_000
    there["machine"]["device"] = "another"
    (tmp_path / "deep" / "x.json").write_text(json.dumps(there))
    with pytest.raises(ValueError, match=r"measured elsewhere \(device 'another', now 'cpu'"):
        bench(["step"], TINY, out=out)
    (tmp_path / "deep" / "x.json").write_text("[]")
    with pytest.raises(ValueError, match="holds no results"):
        bench(["step"], TINY, out=out)


@pytest.mark.parametrize(
    "change",
    [
        lambda there: "[" * 100_000,
        lambda there: there | {"machine": [1]},
        lambda there: there | {"machine": {}},
        lambda there: there | {"sections": 3},
        lambda there: there | {"sections": [1]},
        lambda there: there | {"sections": [{}]},
        lambda there: there | {"sections": [there["sections"][0] | {"title": [1]}]},
        lambda there: there | {"sections": [there["sections"][0] | {"candidates": [1]}]},
        lambda there: there | {"sections": [there["sections"][0] | {"candidates": {"plain": {"ms": 1}}}]},
    ],
)
def test_results_that_are_damaged_are_refused(tmp_path, change):
    changed = change(results.joined(None, [made_up()]))
    (tmp_path / "x.json").write_text(changed if isinstance(changed, str) else json.dumps(changed))
    with pytest.raises(ValueError, match=r"x.json holds no results of `repopt bench`: give another --out"):
        results.read(tmp_path / "x")


def test_nothing_is_measured_where_a_part_cannot_be(tmp_path, monkeypatch):
    """All that is wrong is said, before the first part."""
    for part in suite.PARTS:
        monkeypatch.setitem(suite.PARTS, part, lambda settings: pytest.fail("measured"))
    settings = dataclasses.replace(
        TINY, model="repmlpnet-digits", networks=("plain", "orepa"), images=str(tmp_path / "none")
    )
    with pytest.raises(ValueError, match="the parts update and optimizers cannot measure repmlp") as raised:
        bench(["all"], settings)
    said = str(raised.value)
    assert "; `networks` plain, orepa must hold one of repopt, repvgg for the part inference: add" in said
    assert "; the part torch makes VGG-style networks without squeeze-and-excitation only, not rep" in said
    assert f"; `images` cannot be used for the part input: `data_dir` {settings.images} is not a fol" in said
    with pytest.raises(pytest.fail.Exception, match="measured"):
        bench(["step", "input"], TINY)


def test_what_failed_is_in_table_and_chart():
    section = made_up()
    assert f"| RepVGG | {DOES_NOT_FIT} |  |  |" in results.table(section)
    figure = chart.draw([section, made_up("largest", "Largest batch")])
    texts = [text.get_text() for axes in figure.axes for text in axes.texts]
    assert texts.count(DOES_NOT_FIT) == 2
    assert texts.count("1234") == 4


def test_without_torch_the_rest_goes_on(monkeypatch, caplog):
    def missing(settings):
        raise ModuleNotFoundError("No module named 'torch'", name="torch")

    monkeypatch.setitem(suite.PARTS, "torch", missing)
    monkeypatch.setitem(suite.PARTS, "step", lambda settings: [made_up()])
    done = bench(["torch", "step"], TINY)
    assert [s["part"] for s in done["sections"]] == ["step"]
    assert "torch: not installed" in caplog.text
    with pytest.raises(ModuleNotFoundError):
        bench(["torch"], TINY)


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["updat"], "unknown part 'updat' (did you mean 'update'?)"),
        (["update", "--rounds=1"], "at least 3"),
        (["update", "--batch=a"], "argument --batch: invalid integers value: 'a'"),
        (["update", "--tf32=maybe"], "argument --tf32: invalid choice: 'maybe'"),
        (["update", "--modle=repopt-vgg-b1"], "did you mean '--model'?"),
        ([], "required: PARTS"),
    ],
)
def test_a_wrong_command_line_is_one_sentence(capsys, argv, words):
    assert cli.main(["bench", *argv]) in (1, 2)
    said = capsys.readouterr()
    assert words in said.err
    assert said.err.count("\n") == 1
    assert said.out == ""


def test_the_command_reports_what_it_was(capsys, monkeypatch, tmp_path):
    seen = []

    def fake(settings):
        seen.append(settings)
        return [made_up()]

    monkeypatch.setitem(suite.PARTS, "step", fake)
    options = [
        "--model=repopt-vgg-b2",
        "--batch=32,64",
        "--dtype=float32,bfloat16",
        "--tf32=no",
        "--memory=80",
    ]
    assert cli.main(["bench", "step", *options, f"--out={tmp_path / 'x'}"]) == 0
    expected = Settings(
        "repopt-vgg-b2", batches=(32, 64), dtypes=("float32", "bfloat16"), tf32=False, memory=80.0
    )
    assert seen == [expected]
    command = f"repopt bench step {' '.join(options)} --out={tmp_path / 'x'}"
    there = json.loads((tmp_path / "x.json").read_text())["sections"][0]["command"]
    assert sorted(there.split()) == sorted(command.split())
    assert "| RepOpt |" in capsys.readouterr().out


def test_help_names_every_part(capsys):
    assert cli.main(["bench", "--help"]) == 0
    said = capsys.readouterr().out
    assert all(f"\n  {part} " in said for part in PARTS)


SMALL_CONVOLUTIONS = (
    conv.Case(2, 6, 4, 4),
    conv.Case(2, 5, 4, 4, stride=2, groups=4),
    conv.Case(2, 6, 4, 8, window=5, groups=2),
)


def test_convolutions_are_compared_with_xla_s(monkeypatch, tmp_path):
    monkeypatch.setattr(conv, "CASES", SMALL_CONVOLUTIONS[1:2])
    (section,) = bench(["conv"], TINY, out=tmp_path / "x")["sections"]
    assert section["title"] == "Convolution 3x3 depthwise, stride 2, 4 to 4 channels, 2 of 5x5, float32"
    assert {name.partition(",")[0] for name in section["candidates"]} == set(conv.PASSES)
    for name in conv.PASSES:
        assert section["candidates"][name]["ratios"].keys() == {f"{name}, XLA"}
    assert "| forward | forward, XLA |" in (tmp_path / "x.md").read_text()


@pytest.fixture(scope="module")
def torch_step():
    """Where PyTorch is installed."""
    pytest.importorskip("torch")
    from repopt_jax.bench import torch_step

    return torch_step


@pytest.mark.parametrize("name", ["vgg-digits", "repvgg-a0", "repvgg-b1g4"])
def test_the_network_of_pytorch_has_the_parameters_of_ours(torch_step, name):
    import torch

    ours = dataclasses.replace(TINY, model=name)
    _, shapes = abstract_model("plain", ours)
    with torch.device("meta"):
        theirs = torch_step.plain_network(repopt_jax.models.find(name).variant, ours.classes)
    counts = sorted(leaf.size for leaf in jax.tree.leaves(shapes))
    assert sorted(p.numel() for p in theirs.parameters()) == counts


@pytest.mark.parametrize("how", [{"foreach": True}, {"fused": True}])
def test_the_update_of_pytorch_is_ours(torch_step, how):
    """Four updates of kernel and vector, beside the trainer's optimizer."""
    import torch

    values = {"a": {"kernel": np.linspace(-1, 1, 15, dtype=np.float32).reshape(5, 3)}}
    values["b"] = {"bias": np.ones(3, np.float32)}
    tensors = [torch.nn.Parameter(torch.tensor(leaf)) for leaf in jax.tree.leaves(values)]
    optimizer = torch_step.sgd_of(tensors, **how)
    tx = make_optimizer(OptimConfig(), optax.constant_schedule(0.01), batch_size=1, decayed=kernels)
    params, state = values, tx.init(values)
    for _ in range(4):
        for tensor, leaf in zip(tensors, jax.tree.leaves(values)):
            tensor.grad = torch.tensor(leaf)
        optimizer.step()
        updates, state = tx.update(values, state, params)
        params = optax.apply_updates(params, updates)
    theirs = [tensor.detach().numpy() for tensor in tensors]
    assert furthest(params, theirs) < 1e-6
    assert furthest(params, jax.tree.leaves(values)) > 0.1


def test_the_step_of_pytorch_trains(torch_step):
    candidate, _ = torch_step.torch_stepping(TINY, "bfloat16", 4, compiled=False)
    losses = [float(candidate.start()) for _ in range(20)]
    candidate.wait(None)
    assert losses[-1] < 0.5 * losses[0]  # of the same four images


@pytest.mark.parametrize("name", conv.PASSES)
@pytest.mark.parametrize("case", SMALL_CONVOLUTIONS, ids=str)
def test_the_convolution_of_pytorch_is_ours(torch_step, case, name):
    ours, theirs = (make(case, "float32", name)[0].start() for make in (conv.of_jax, conv.of_torch))
    found = {"forward": theirs, "input gradient": theirs[0], "kernel gradient": theirs[1]}[name].numpy()
    order = (2, 3, 1, 0) if name == "kernel gradient" else (0, 2, 3, 1)
    np.testing.assert_allclose(ours, found.transpose(order), rtol=1e-4, atol=1e-4)
