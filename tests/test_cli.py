"""The command line: every mistake gives one sentence and a non-zero exit code, and destroys nothing."""

import importlib.util
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from flax import nnx
from PIL import Image

from repopt_jax import fuse, interop, models
from repopt_jax.cli import huge_pages
from repopt_jax.cli.config import read_config
from repopt_jax.cli.main import main, parse
from repopt_jax.core import scales as scales_module
from repopt_jax.core.scales import save_scales
from repopt_jax.export import Metadata, to_stablehlo
from repopt_jax.models import registry
from repopt_jax.report import quickstart
from repopt_jax.train import load_config

# A network that compiles in a moment, on a folder of made-up images; `smoke` is what the tests shorten.
CONFIG = """
from repopt_jax import models
from repopt_jax.train.config import Config, DataConfig, ModelConfig, OptimConfig

TINY = models.VGGVariant("cli-tiny", (1, 1, 1, 1), (4, 4, 4, 4, 4), (1, 1, 2, 1, 1))
models.register(models.Entry("cli-tiny", models.vgg, TINY))

def get_config(arg=""):
    return Config(
        name="tiny", epochs=5, batch_size=8, eval_batch_size=8, log_every=1,
        model=ModelConfig(name="cli-tiny", mode=arg or "plain"),
        data=DataConfig(source="folder", data_dir={data!r}, image_size=8),
        optim=OptimConfig(learning_rate=0.05, clip_norm=5.0 if arg == "search" else None),
    )
"""


COMMANDS = (
    *("quickstart", "compare", "search", "train", "check-data", "prune", "eval", "predict", "deploy"),
    *("verify", "convert", "quantize", "export", "bench", "models", "completion"),
)
CACHE_OPTIONS = ("jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs")


def write_images(folder, *, classes=("cat", "dog"), train=8, test=5):
    rng = np.random.default_rng(0)
    for split, count in (("train", train), ("test", test)):
        for number, name in enumerate(classes):
            (folder / split / name).mkdir(parents=True)
            for i in range(count):
                pixels = rng.integers(0, 120, (8, 8)) + 100 * number
                Image.fromarray(pixels.astype(np.uint8), "L").save(folder / split / name / f"{i}.png")
    return folder


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with images in data/ and the config tiny.py."""
    folder = tmp_path_factory.mktemp("cli")
    data = write_images(folder / "data")
    (folder / "tiny.py").write_text(CONFIG.format(data=str(data)))
    yield folder
    registry.NETWORKS.pop("cli-tiny", None)


@pytest.fixture(scope="module")
def searched(place):
    """A finished search."""
    out = place / "search"
    assert main(["search", f"--config={place}/tiny.py:search", f"--out={out}"]) == 0
    return out


def files(folder):
    return {p: p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def refused(capsys, arguments, *parts, code=1):
    """Runs a command that must fail with one line on standard error that has all of `parts`."""
    capsys.readouterr()
    assert main([str(argument) for argument in arguments]) == code
    said = capsys.readouterr()
    assert said.out == ""
    # What takes long on a busy machine is said, with the time of day.
    lines = said.err.splitlines(keepends=True)
    assert_one_sentence("".join(line for line in lines if not re.match(r"\d\d:\d\d:\d\d ", line)), *parts)


def assert_one_sentence(err, *parts):
    assert err.startswith("repopt: ")
    assert err.count("\n") == 1
    assert err.endswith("\n")
    assert "Traceback" not in err
    for part in parts:
        assert part in err


@pytest.fixture
def train(place, tmp_path):
    """`train(...)`: arguments of a run into a new folder, with further ones."""

    def arguments(*more, mode="", out=None):
        mode = mode or ("repopt" if any(arg.startswith("--config.scales=") for arg in more) else "plain")
        return ["train", f"--config={place}/tiny.py:{mode}", f"--out={out or tmp_path / 'out'}", *more]

    return arguments


# -- help and the command line itself


def test_help_is_short_and_names_every_command(capsys):
    assert main(["--help"]) == 0
    overview = capsys.readouterr().out
    for command in COMMANDS:
        assert command in overview.split()
        assert main([command, "--help"]) == 0
        text = capsys.readouterr().out
        assert text.startswith(f"usage: repopt {command} ")
        assert len(text.splitlines()) < 40
    assert len(overview.splitlines()) < 40
    assert main(["train", "--out=x", "--nonsense", "-h"]) == 0  # help is given whatever else is
    assert capsys.readouterr().out.startswith("usage: repopt train ")
    assert main(["help"]) == 0
    assert capsys.readouterr().out == overview
    assert main(["--version"]) == 0
    assert capsys.readouterr().out.strip().count(".") == 2


def test_no_command_shows_the_help_and_fails(capsys):
    assert main([]) == 2
    assert "quickstart" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["trian"], ["unknown command 'trian' (did you mean 'train'?)"]),
        (["--verson"], ["unknown option --verson (did you mean '--version'?)"]),
        (["train", "--confg=x"], ["unknown option --confg (did you mean '--config'?)"]),
        (["train", "--out=x"], ["required: --config"]),
        (["train", "--config=digits"], ["required: --out"]),
        (["train", "--config=digits", "--out"], ["--out", "expected one argument"]),
        (["train", "--config=digits", "--out="], ["--out", "must not be empty"]),
        (["train", "--config=digits", "--out=a", "--out=b"], ["--out is given twice"]),
        (["train", "digits", "--config=digits", "--out=a"], ["unexpected argument 'digits'"]),
        (["train", "--config=digits", "--out=a", "--config.seed"], ["option --config.seed has no value"]),
        (["train", "--config=digits", "--out=a", "--processes=two"], ["--processes", "'two'"]),
        (["eval", "--run=x", "--config.seed=1"], ["unknown option --config.seed"]),
        (["quickstart", "--seeds=two"], ["--seeds", "invalid positive value: 'two'"]),
        (["verify"], ["one of --config", "and --check", "must be given"]),
        (["verify", "--config=digits", "--check=a.py"], ["one of --config"]),
        *(
            (["verify", "--config=digits", f"--tolerance={x}"], [f"above 0, not '{x}'"])
            for x in ("0", "-1", "nan")
        ),
        (["verify", "--check=a.py", "--config.seed=1"], ["--config.seed=1 changes a config"]),
        (["verify", "--config=digits", "--steps=0"], ["--steps", "must be at least 1, not 0"]),
        (["verify", "--config=digits", "--layers=few"], ["--layers", "'few'"]),
        (
            ["verify", "--config=digits", "--tolerance=small"],
            ["--tolerance", "must be a finite number above 0, not 'small'"],
        ),
        (["convert", "a.pth"], ["required: OUT"]),
        (["convert"], ["required: IN, OUT"]),
        (["convert", "a.pth", "b", "c"], ["unexpected argument 'c'"]),
        (["convert", "a.pth", "b", "--classes=two"], ["--classes", "invalid int value: 'two'"]),
    ],
)
def test_wrong_command_lines(capsys, arguments, parts):
    refused(capsys, arguments, *parts, code=2)


def test_options_in_one_argument_or_in_two():
    args = parse(
        ["train", "--config", "digits", "--config.seed", "-1", "--config.name=my run", "--out", "a b"]
    )
    assert (args.config, args.out) == ("digits", "a b")
    assert args.overrides == ["--config.seed=-1", "--config.name=my run"]
    assert args.command_line == (
        "repopt train --config digits --config.seed -1 '--config.name=my run' --out 'a b'"
    )
    args = parse(["bench", "--batch=8,16", "update,step", "--dtype", "bfloat16"])
    assert (args.parts, args.batches, args.dtypes) == (("update", "step"), (8, 16), ("bfloat16",))


def test_unknown_config_field_and_bad_value(capsys, train, tmp_path):
    refused(
        capsys,
        train("--config.optim.learning_rat=1"),
        "unknown config field optim.learning_rat (did you mean 'optim.learning_rate'?)",
        code=2,
    )
    refused(
        capsys, train("--config.nonsense=1"), "unknown config field nonsense; known are", "optim.*", code=2
    )
    refused(capsys, train("--config.optim.learning_rate=fast"), "--config.optim.learning_rate=fast", code=2)
    assert not (tmp_path / "out").exists()


def test_config_files_that_are_none(capsys, tmp_path):
    refused(capsys, ["train", "--config=nowhere", "--out=x"], "no config file 'nowhere'; shipped ones are")
    (tmp_path / "list.py").write_text("def get_config(arg=''):\n    return []\n")
    refused(
        capsys, ["train", f"--config={tmp_path}/list.py", "--out=x"], "list.py returned list, not `Config`"
    )


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("import nowhere\n", ("line 1: No module named 'nowhere'",)),
        ("\nimport torch_nowhere.nn\n", ("line 2: No module named 'torch_nowhere'",)),
        ("x = 1\ny = 1 / 0\n", ("line 2: ZeroDivisionError: division by zero",)),
        ("def get_config():\n    pass\n", ("line 1, must take 1 argument(s): too many positional",)),
        ("\ndef get_config(a, b):\n    pass\n", ("line 2, must take 1 argument(s): missing a required",)),
        ("def get_config(arg):\n    return {}['x']\n", ("line 2: KeyError: 'x'",)),
        ("def get_config(arg):\n    raise SystemExit\n", ("line 2: SystemExit",)),
        ("def get_config(arg):\n    open('/nowhere/x')\n", ("line 2: ", "/nowhere/x")),
        ("def get_config(arg):\n    return get_config(arg)\n", ("line 2: RecursionError: ",)),
        (
            "import sys\nsys.path.clear()\ndef get_config(arg):\n    return 3\n",
            ("returned int, not `Config`",),
        ),
        ("def get_config(arg):\n  return 3\n x", ("is not valid Python: ", "line 3")),
        ("get_config = 3\n", ("has no function `get_config`",)),
        ("\0", ("null bytes",)),
    ],
)
def test_whatever_a_config_file_does(capsys, tmp_path, text, parts, monkeypatch):
    monkeypatch.setattr(sys, "path", list(sys.path))
    (tmp_path / "mine.py").write_text(text)
    refused(capsys, ["train", f"--config={tmp_path}/mine.py", "--out=x"], str(tmp_path / "mine.py"), *parts)


def test_a_config_that_needs_an_extra(capsys, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn", None)
    (tmp_path / "mine.py").write_text("import sklearn\n")
    parts = ("sklearn is not installed", "mine.py, line 1", "pip install 'repopt_jax[digits]'")
    refused(capsys, ["train", f"--config={tmp_path}/mine.py", "--out=x"], *parts)


# -- runs that cannot be


def test_unknown_mode_and_network(capsys, train, tmp_path):
    refused(
        capsys,
        train("--config.model.mode=repvg"),
        "`model.mode`='repvg' must be one of plain, search, repopt",
    )
    refused(
        capsys, train("--config.model.name=repvgg-b9"), "`model.name`='repvgg-b9'", "did you mean 'repvgg-b"
    )
    assert not (tmp_path / "out").exists()


def test_batch_that_the_devices_cannot_share(capsys, train):
    refused(capsys, train("--config.batch_size=6"), "`batch_size`=6 is not divisible by the 4 devices")


def test_search_wants_a_search_config(capsys, place):
    arguments = ["search", f"--config={place}/tiny.py", f"--out={place}/no"]
    refused(capsys, arguments, "`model.mode` is 'plain'", "--config.model.mode=search")


@pytest.mark.parametrize(
    ("make", "parts"),
    [
        (lambda folder: None, ["is not a folder"]),
        (lambda folder: folder.mkdir(), ["has no folder train"]),
        (lambda folder: (folder / "train" / "cat").mkdir(parents=True), ["no folder test"]),
        (lambda folder: write_images(folder, classes=("cat",)), ["only the class 'cat'"]),
        (lambda folder: write_images(folder, train=0), ["train"]),
    ],
)
def test_data_folders_that_cannot_be_used(capsys, train, tmp_path, make, parts):
    make(tmp_path / "data")
    refused(capsys, train(f"--config.data.data_dir={tmp_path}/data"), str(tmp_path / "data"), *parts)
    assert not (tmp_path / "out").exists()


def test_an_unreadable_image_is_named(capsys, train, tmp_path):
    bad = write_images(tmp_path / "data") / "train" / "dog" / "3.png"
    bad.write_bytes(b"no image")
    refused(capsys, train(f"--config.data.data_dir={tmp_path}/data"), str(bad), "not an image")
    assert bad.read_bytes() == b"no image"


def test_scales_of_another_architecture(capsys, train, tmp_path):
    other = models.create("vgg-digits", num_classes=2, in_channels=1, rngs=nnx.Rngs(0))
    save_scales(tmp_path / "scales", other.unit_scales())
    before = files(tmp_path / "scales")
    refused(
        capsys,
        train(f"--config.scales={tmp_path}/scales"),
        "do not fit",
        "extra layers: stages/1/1/conv/kernel",
        "misshapen layers: stages/0/0/conv/kernel",
    )
    assert files(tmp_path / "scales") == before


@pytest.mark.once
def test_scales_that_lack_layers(capsys, place, searched, train, tmp_path):
    small = scales_module.load_scales(searched / "scales")
    entries = dict(small.entries)
    entries.pop("stages/4/0/conv/kernel")
    save_scales(tmp_path / "scales", scales_module.Scales(entries))
    refused(
        capsys,
        train(f"--config.scales={tmp_path}/scales"),
        "missing layers: stages/4/0/conv/kernel (3, 3, 4, 4)",
    )


def test_scales_that_are_not_finite(capsys, searched, train, tmp_path, monkeypatch):
    good = scales_module.load_scales(searched / "scales")
    first = good.entries["stages/2/0/conv/kernel"].vectors
    first["1x1"] = first["1x1"].at[0].set(np.nan)
    with monkeypatch.context() as patch:  # `save_scales` would not write them
        patch.setattr(scales_module, "check_finite", lambda *_, **__: None)
        save_scales(tmp_path / "scales", good)
    refused(capsys, train(f"--config.scales={tmp_path}/scales"), "NaN", "stages/2/0/conv/kernel/1x1")
    assert not (tmp_path / "out").exists()


def test_scales_that_are_nowhere(capsys, train):
    refused(capsys, train("--config.scales=nowhere"), "`scales`='nowhere'")


# -- output folders


def test_a_folder_with_another_run_is_left_alone(capsys, searched, train):
    before = files(searched)
    refused(capsys, train("--config.seed=7", out=searched), "holds another run", "seed (0 and 7)")
    assert files(searched) == before


def test_a_folder_with_other_files_is_left_alone(capsys, train, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("mine")
    refused(capsys, train(), "thesis.txt")
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["thesis.txt"]


def test_no_permission_to_write(capsys, train, tmp_path):
    # A path below a regular file cannot be made by anybody, root included.
    (tmp_path / "file").write_text("mine")
    refused(capsys, train(out=tmp_path / "file" / "out"), "cannot", "file")
    assert (tmp_path / "file").read_text() == "mine"


def test_class_count_that_does_not_fit(capsys, searched, tmp_path):
    other = write_images(tmp_path / "data", classes=("cat", "dog", "eel"))
    before = files(searched)
    refused(
        capsys,
        ["eval", f"--run={searched}", f"--data-dir={other}"],
        "trained on 2 classes",
        "have 3",
        "cat, dog, eel",
    )
    assert files(searched) == before


def test_deploying_what_is_no_run(capsys, place, tmp_path):
    refused(capsys, ["deploy", f"--run={tmp_path}", f"--out={tmp_path}/out"], "holds no run")
    refused(capsys, ["eval", f"--run={tmp_path}"], "holds no run")
    assert list(tmp_path.iterdir()) == []


def test_ctrl_c_before_the_first_step(capsys, train, monkeypatch):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("repopt_jax.train.run", interrupted)
    refused(capsys, train(), "interrupted", "run the same command again", code=130)


def test_what_does_not_fit_in_memory(capsys, train, monkeypatch):
    def full(*_, **__):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 8 bytes.\nmore")

    monkeypatch.setattr("repopt_jax.train.run", full)
    refused(capsys, train(), "Out of memory allocating 8 bytes.: it does not fit", "lower `batch_size`")


@pytest.mark.parametrize("command", ["prune", "eval", "deploy", "bench", "quickstart", "compare"])
def test_a_command_of_one_process_in_a_job_of_several(capsys, monkeypatch, command, tmp_path):
    monkeypatch.setenv("SLURM_STEP_NODELIST", "node[1-2]")
    monkeypatch.setenv("SLURM_NTASKS", "8")
    flags = {"eval": ["--run=x"], "deploy": ["--run=x", f"--out={tmp_path}/y"], "bench": ["update"]}
    flags["prune"] = flags["deploy"]
    flags["compare"] = ["--config=deep_digits", f"--out={tmp_path}/y"]
    refused(capsys, [command, *flags.get(command, [])], "one process", "srun -n1", code=2)


def test_the_traceback_can_be_asked_for(capsys, train, monkeypatch):
    monkeypatch.setenv("REPOPT_TRACEBACK", "1")
    assert main(train("--config.model.mode=x")) == 1
    assert "Traceback" in capsys.readouterr().err


# -- the way from search to deployment


@pytest.mark.once
def test_search_tells_its_verdict_and_the_next_command(capsys, place, searched):
    assert main(["search", f"--config={place}/tiny.py:search", f"--out={searched}"]) == 0
    said = capsys.readouterr().out
    assert "Already finished" in said
    assert "scale vectors" in said
    assert f"Scales: {searched / 'scales'}" in said
    assert (searched / "report" / "scales.png").read_bytes().startswith(b"\x89PNG")
    assert f"--config.scales={searched / 'scales'}" in said
    # The command that it prints is right: it trains with these scales, clipping left behind.
    (line,) = (line for line in said.splitlines() if line.startswith("Next: "))
    assert main(shlex.split(line)[2:]) == 0
    assert "test accuracy" in capsys.readouterr().out


def test_fields_that_may_be_none_are_set_to_none(place):
    config = f"{place}/tiny.py:search"
    assert read_config(config).optim.clip_norm == 5.0
    assert read_config(config, ["--config.optim.clip_norm=None"]).optim.clip_norm is None
    # The last one counts.
    both = ["--config.optim.clip_norm=None", "--config.optim.clip_norm=2"]
    assert read_config(config, both).optim.clip_norm == 2.0


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("tensorboard,wandb", ("tensorboard", "wandb")),
        ("tensorboard, wandb,", ("tensorboard", "wandb")),
        ("('tensorboard', 'wandb')", ("tensorboard", "wandb")),
        ("['wandb']", ("wandb",)),
        ("wandb", ("wandb",)),
        ("()", ()),
        ("", ()),
    ],
)
def test_texts_of_a_tuple_stand_between_commas(place, text, value):
    config = read_config(f"{place}/tiny.py:search", [f"--config.loggers={text}"])
    assert config.loggers == value
    paths = read_config(f"{place}/tiny.py:search", ["--config.quantize.keep_float=head/fc,stages/0/1/conv"])
    assert paths.quantize.keep_float == ("head/fc", "stages/0/1/conv")


def test_quickstart_leaves_foreign_folders_alone(capsys, place, tmp_path):
    (tmp_path / "report.html").write_text("mine")
    assert main(["quickstart", f"--config={place}/tiny.py", f"--out={tmp_path}"]) == 1
    assert "holds no comparison (it has report.html)" in capsys.readouterr().err
    assert [p.name for p in tmp_path.iterdir()] == ["report.html"]
    assert (
        main(["quickstart", f"--config={place}/tiny.py", f"--out={tmp_path}/q", "--config.scales=ones"]) == 1
    )
    assert "which quickstart sets itself" in capsys.readouterr().err
    assert not (tmp_path / "q").exists()


def test_train_eval_deploy_eval(capsys, searched, train, tmp_path):
    run, deployed = tmp_path / "out", tmp_path / "deployed"
    assert main(train(f"--config.scales={searched}/scales")) == 0
    assert f"Run: {run}" in capsys.readouterr().out
    summary = json.loads((run / "summary.json").read_text())

    assert main(["eval", f"--run={run}"]) == 0
    of_run = capsys.readouterr().out
    assert (
        f"test accuracy {summary['test_accuracy']:.2%} ({round(10 * summary['test_accuracy'])} of 10 images)"
        in of_run
    )

    assert main(["deploy", f"--run={run}", f"--out={deployed}"]) == 0
    said = capsys.readouterr().out
    assert "largest output difference" in said
    record = json.loads((deployed / "deploy.json").read_text())
    assert record["max_rel"] < 1e-5
    assert record["deploy_parameters"] < record["train_parameters"] == summary["train_parameters"]

    # The scales and the run may go: the deployment stands alone.
    assert main(["eval", f"--run={deployed}"]) == 0
    of_deployed = capsys.readouterr().out
    assert of_deployed.split(", loss")[0] == of_run.split(", loss")[0]

    # Damaged, it is refused in one sentence.
    for part, text, said in (
        ("weights", b"", "weights is damaged or not of the network of deploy.json"),
        ("deploy.json", json.dumps({**record, "quantized": 5}).encode(), "deploy.json is damaged"),
        ("deploy.json", json.dumps({**record, "shapes": [1]}).encode(), "deploy.json is damaged"),
    ):
        damaged = tmp_path / "damaged"
        shutil.copytree(deployed, damaged)
        for path in [damaged / part] if (damaged / part).is_file() else (damaged / part).rglob("*"):
            if path.is_file():
                path.write_bytes(text)
        refused(capsys, ["eval", f"--run={damaged}"], said, "deploy the run again")
        shutil.rmtree(damaged)

    # Another checkpoint than the last one: the best, or that of a step.
    steps = sorted(int(path.name) for path in (run / "checkpoints").iterdir())
    assert main(["eval", f"--run={run}", f"--checkpoint={steps[0]}"]) == 0
    assert f"step {steps[0]}" in capsys.readouterr().out
    for asked, parts in (
        ("7777", (f"no checkpoint of step 7777; there are {steps[0]}",)),
        ("newest", ("`checkpoint`='newest' must be latest, best or the number of a step",)),
    ):
        refused(capsys, ["eval", f"--run={run}", f"--checkpoint={asked}"], *parts)
    refused(capsys, ["eval", f"--run={deployed}", "--checkpoint=best"], "holds a deployed network")
    assert main(["deploy", f"--run={run}", f"--out={tmp_path}/best", "--checkpoint=best"]) == 0
    capsys.readouterr()
    accuracies = {
        record["step"]: record["accuracy"]
        for record in map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
        if record["kind"] == "eval" and record["step"] in steps
    }
    best = json.loads((tmp_path / "best" / "deploy.json").read_text())
    assert accuracies[best["step"]] == max(accuracies.values())

    before = files(deployed)
    assert main(["deploy", f"--run={run}", f"--out={deployed}"]) == 0
    assert "Already deployed" in capsys.readouterr().out
    refused(
        capsys, ["deploy", f"--run={searched}", f"--out={deployed}"], "holds another deployment", str(run)
    )
    refused(capsys, ["deploy", f"--run={searched}", f"--out={run}"], "is not empty and holds no deployment")
    assert files(deployed) == before


@pytest.mark.once
def test_verify_a_config(capsys, place):
    """The optimizer of the config, clipping and schedule included, on its own data."""
    arguments = [
        "verify",
        f"--config={place}/tiny.py:repopt",
        "--config.scales=depth",
        "--config.batch_size=4",
    ]
    assert main([*arguments, "--steps=2", "--config.optim.clip_norm=0.5", "--layers=3"]) == 0
    said = capsys.readouterr().out
    assert "Compared: 2 steps in float64, batch norm in training mode (5 layers)" in said
    assert "Equivalent: no difference above 1e-10" in said
    assert len([line for line in said.splitlines() if line.startswith("  stages/")]) <= 3


def test_verify_what_has_no_scales(capsys, place):
    refused(
        capsys,
        ["verify", f"--config={place}/tiny.py"],
        "`model.mode` is 'plain'",
        "add --config.model.mode=repopt",
    )


# A dense layer whose optimizer decays before the multiplier.
CHECK = """
import numpy as np, optax
from flax import nnx
from repopt_jax import Scales, default_branches, repopt_mask
from repopt_jax.verify import Check

def get_check():
    model = nnx.Sequential(nnx.Linear(4, 4, rngs=nnx.Rngs(0)), nnx.tanh, nnx.Linear(4, 3, rngs=nnx.Rngs(1)))
    path = "layers/0/kernel"
    scales = Scales.depth_rule({path: default_branches((4, 4))}, {path: 8})
    rng = np.random.default_rng(0)
    batches = [{"image": rng.normal(size=(6, 4)), "label": rng.integers(0, 3, 6)} for _ in range(3)]
    def wrong(rule):
        return optax.chain(optax.add_decayed_weights(0.1), rule, optax.sgd(0.1))
    return Check(model, scales, batches, wrong(repopt_mask(scales)), wrong(optax.identity()))
"""


def test_verify_a_check_that_fails_says_why(capsys, tmp_path):
    (tmp_path / "my_check.py").write_text(CHECK)
    assert main(["verify", f"--check={tmp_path}/my_check.py", "--layers=all"]) == 1
    said = capsys.readouterr()
    assert "NOT equivalent" in said.out
    assert "  layers/0/" in said.out.splitlines()[2]  # the worst first
    assert "layers/2/bias" in said.out
    assert_one_sentence(said.err, "not equivalent: the largest", "weight decay comes before the multiplier")
    # Within a large tolerance they are equal.
    assert main(["verify", f"--check={tmp_path}/my_check.py", "--tolerance=0.01", "--steps=1"]) == 0


def test_a_check_file_may_import_what_lies_beside_it(capsys, tmp_path):
    (tmp_path / "beside_the_check.py").write_text("STEPS = 3")
    example = (Path(__file__).parents[1] / "examples" / "verify_own_model.py").read_text()
    head = "from __future__ import annotations\nimport dataclasses\nimport beside_the_check\n"
    tail = """
@dataclasses.dataclass
class Settings:
    steps: int = beside_the_check.STEPS

_all = get_check

def get_check():
    return dataclasses.replace(_all(), batches=_all().batches[: Settings().steps])
"""
    file = tmp_path / "my_check.py"
    file.write_text(head + example + tail)
    assert main(["verify", f"--check={file}"]) == 0
    assert "Compared: 3 steps" in capsys.readouterr().out


def test_check_files_that_are_none(capsys, tmp_path):
    refused(capsys, ["verify", "--check=nowhere.py"], "no check file nowhere.py")
    file = tmp_path / "bad.py"
    for text, part in (
        ("x = 1", "has no function `get_check`"),
        ("def", "is not valid Python"),
        ("def get_check(): return 3", "returned int, not `verify.Check`"),
    ):
        file.write_text(text)
        refused(capsys, ["verify", f"--check={file}"], "bad.py", part)


def test_the_example_of_a_check(capsys):
    example = Path(__file__).parents[1] / "examples" / "verify_own_model.py"
    assert main(["verify", f"--check={example}", "--steps=3"]) == 0
    assert "Equivalent" in capsys.readouterr().out


def test_convert_there_and_back(capsys, searched, tmp_path):
    file, folder, again = (tmp_path / name for name in ("a.safetensors", "b", "c.pth"))
    assert main(["convert", str(searched), str(file)]) == 0
    said = capsys.readouterr().out
    assert "parameters: " in said
    assert " in PyTorch (repopt), " in said
    installed = importlib.util.find_spec("torch") is not None
    assert ("largest logit difference" if installed else "PyTorch is not installed") in said
    assert f"Written: {file}" in said
    before = files(searched)

    assert main(["convert", str(file), str(folder), "--model=cli-tiny", "--classes=2"]) == 0
    assert main(["convert", str(folder), str(again), "--to=repopt"]) == 0
    first, second = interop.read_tensors(file), interop.read_tensors(again)
    assert set(first) == set(second)
    assert all(np.array_equal(first[key], second[key]) for key in first)

    assert main(["convert", str(file), str(tmp_path / "scales"), "--to=scales"]) == 0
    assert "vectors for 5 layers" in capsys.readouterr().out
    expected = scales_module.load_scales(searched / "scales")
    found = scales_module.load_scales(tmp_path / "scales", expected.branch_sets)
    for path, vectors in expected.vectors.items():
        assert all(np.array_equal(vectors[name], v) for name, v in found.vectors[path].items())
    assert files(searched) == before


def test_convert_refuses_in_one_sentence(capsys, searched, tmp_path):
    file = tmp_path / "a.pth"
    assert main(["convert", str(searched), str(file)]) == 0
    written = file.read_bytes()
    for arguments, parts in (
        ([searched, file], ["exists: it is not overwritten"]),
        ([tmp_path / "nothing.pth", tmp_path / "b"], ["no file or folder at"]),
        ([searched, tmp_path / "b"], ["is a folder of ours", ".safetensors, .pth or .pt"]),
        (
            [searched, tmp_path / "b.pth", "--model=repvgg-A0", "--classes=5", "--to=timm"],
            ["says itself what it holds: leave out `model`='repvgg-A0', `classes`=5 (of files only)"],
        ),
        (
            [searched, tmp_path / "b.pth", "--to=scales"],
            ["leave out `to`='scales' (of files only); `to` may be repvgg, repopt, "],
        ),
        ([searched, tmp_path / "b.pth", "--to=timm"], ["'timm'", "no place for the layers stages/0/0/bn"]),
        ([file, tmp_path / "b"], ["`model` must name the file's architecture"]),
        ([file, tmp_path / "b", "--model=vgg16"], ["there is no network 'vgg16'"]),
        ([file, tmp_path / "b", "--model=cli-tiny", "--classes=9"], ["`classes` is 9"]),
        ([file, tmp_path / "b", "--model=vgg-digits"], ["misshapen", "missing"]),
        ([file, tmp_path / "b", "--model=cli-tiny", "--to=repopt"], ["is a folder of ours"]),
        ([file, tmp_path / "b", "--model=cli-tiny", "--key=ema"], [str(file), "'ema'"]),
        ([file, tmp_path / "b.pth", "--to=scales"], ["scales go into a folder"]),
        (
            [file, tmp_path / "b", "--to=scales", "--classes=3"],
            ["`classes`=3 does nothing"],
        ),
        ([file, tmp_path / "b.pth", "--model=cli-tiny", "--to=zz"], ["`to` is 'zz': it must be one of"]),
        ([file, tmp_path / "none" / "b.pth", "--model=cli-tiny"], ["`out`", "in no folder that exists"]),
    ):
        refused(capsys, ["convert", *arguments], *parts)
    assert [p.name for p in tmp_path.iterdir()] == ["a.pth"]
    assert file.read_bytes() == written


def test_quickstart_keeps_what_it_compiles(capsys, place, tmp_path, monkeypatch):
    """In its folder, unless the user has another place for it."""
    seen = []

    def look(base, out, **options):
        seen.append((jax.config.jax_compilation_cache_dir, str(out)))
        raise ValueError("far enough")

    before = {name: getattr(jax.config, name) for name in CACHE_OPTIONS}
    monkeypatch.setattr(quickstart, "quickstart", look)
    try:
        for name in ("here", "there"):
            assert main(["quickstart", f"--config={place}/tiny.py", f"--out={tmp_path / name}"]) == 1
            monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR", raising=False)
    finally:
        for name, value in before.items():
            jax.config.update(name, value)
    (first, _), (second, out) = seen
    assert first == before["jax_compilation_cache_dir"]
    assert second == f"{out}/compiled"


def test_what_a_comparison_sets_cannot_be_overridden(capsys, tmp_path):
    for name in ("name", "scales", "data.validation", "optim.learning_rate"):
        refused(
            capsys,
            ["compare", "--config=deep_digits", f"--out={tmp_path}/out", f"--config.{name}=1"],
            f"--config.{name} is set by the comparison",
            code=2,
        )
    assert not (tmp_path / "out").exists()


@pytest.mark.once
def test_quickstart_does_it_all_and_reuses_it(capsys, place, tmp_path):
    options = ["--seeds=1", "--workers=0"]
    arguments = ["quickstart", f"--config={place}/tiny.py", f"--out={tmp_path}/out", *options]
    assert main(arguments) == 0
    said = capsys.readouterr().out
    found = json.loads((tmp_path / "out" / "report.json").read_text())
    assert [row["label"] for row in found["rows"]][:2] == ["plain SGD", "RepOpt, searched scales"]
    assert set(found["deployed"]) == {"plain", "repopt", "depth", "repvgg", "search"}
    assert all(deployed["max_rel"] < 1e-5 for deployed in found["deployed"].values())
    assert found["equivalence"]["equivalent"]
    assert found["equivalence"]["max_difference"] < 1e-12
    assert found["equivalence"]["wrong_order_difference"] > 1e-6
    assert f"Report: {tmp_path}/out/report.html" in said
    for text in (
        "RepVGG",
        "largest output difference",
        "largest relative difference",
        "One seed says nothing of the spread",
    ):
        assert text in said
    # The config in a run's folder makes that run again.
    first = Path(found["runs"][0]["directory"])
    assert main(["train", f"--config={first}/config.json", "--print-config"]) == 0
    (tmp_path / "again.py").write_text(capsys.readouterr().out)
    assert load_config(f"{tmp_path}/again.py") == load_config(f"{first}/config.json")

    before = {
        p: c for p, c in files(tmp_path / "out").items() if "report" not in str(p.relative_to(tmp_path))
    }
    assert main(arguments) == 0
    said = capsys.readouterr().out
    assert said.count("(was there)") == 1 + 4 + 5  # search, runs, deployments
    assert said.count("reused: ") == 1
    after = files(tmp_path / "out")
    assert all(after[path] == content for path, content in before.items())


# -- real processes


def test_python_m_repopt_jax():
    done = subprocess.run(
        [sys.executable, "-m", "repopt_jax", "train", "--confg=x"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert_one_sentence(done.stderr, "did you mean '--config'")


@pytest.mark.once
@pytest.mark.parametrize("command", ["eval", "convert", "predict"])
def test_a_refusal_is_all_that_a_process_says(command, tmp_path):
    """No warning of another package, whose filters and loggers a test of its own would hide, is beside it."""
    (tmp_path / "damaged.pth").write_bytes(b"PK\x03\x04" + bytes(range(200)))
    if command == "predict":
        model = models.create("vgg-digits", num_classes=10, in_channels=1, rngs=nnx.Rngs(0))
        model.eval()
        metadata = Metadata(image_size=8, channels=1, mean=(0.5,), std=(0.5,))
        to_stablehlo(fuse(model), tmp_path / "network.stablehlo", metadata)
    arguments, said = {
        "eval": (["--run=none"], "none holds no run"),
        "convert": (["damaged.pth", "out", "--model=repvgg-a0"], "damaged.pth is truncated or damaged"),
        "predict": (
            ["picture.png", "--model=network.stablehlo"],
            "no image picture.png",
        ),
    }[command]
    done = subprocess.run(
        [sys.executable, "-m", "repopt_jax", command, *arguments],
        capture_output=True,
        text=True,
        check=False,
        cwd=tmp_path,
    )
    assert done.returncode == 1, done.stderr
    assert done.stdout == ""
    assert_one_sentence(done.stderr, said)


MADVISE = "always [madvise] never\n"


@pytest.mark.parametrize(
    ("tunables", "enabled", "libc", "expected"),
    [
        (None, MADVISE, "glibc 2.36", "glibc.malloc.hugetlb=1"),
        ("glibc.malloc.check=1", MADVISE, "glibc 2.36", "glibc.malloc.check=1:glibc.malloc.hugetlb=1"),
        ("glibc.malloc.hugetlb=0", MADVISE, "glibc 2.36", None),
        (None, "[always] madvise never", "glibc 2.36", None),
        (None, "always madvise [never]", "glibc 2.36", None),
        (None, MADVISE, "glibc 2.34", None),
        (None, MADVISE, "musl 1.2", None),
        (None, MADVISE, "", None),
    ],
)
def test_huge_pages_are_asked_for_where_that_helps(tunables, enabled, libc, expected):
    environment = {"HOME": "/"} | ({"GLIBC_TUNABLES": tunables} if tunables else {})
    found = huge_pages.with_huge_pages(environment, enabled, libc)
    assert found == (None if expected is None else environment | {"GLIBC_TUNABLES": expected})


def test_a_command_starts_anew_with_huge_pages_once(tmp_path):
    if huge_pages.with_huge_pages({}, MADVISE, os.confstr("CS_GNU_LIBC_VERSION") or "") is None:
        pytest.skip("this C library cannot ask for huge pages")
    (tmp_path / "enabled").write_text(MADVISE)
    program = f"""
import os, sys
from pathlib import Path
from repopt_jax.cli import huge_pages, main, options
huge_pages.ENABLED = Path({str(tmp_path / "enabled")!r})
quick = options.COMMANDS["verify"]._replace(run=lambda args: print("runs", end="") or 0)
options.COMMANDS["verify"] = quick
print(os.getpid(), os.environ.get("GLIBC_TUNABLES"), sys.argv[1:])
sys.exit(main())
"""
    environment = {name: value for name, value in os.environ.items() if name != "GLIBC_TUNABLES"}
    command = [sys.executable, "-c", program, "verify", "--config=a config"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr
    first, second, end = done.stdout.splitlines()
    assert end == "runs"
    pid, *rest = first.split(" ", 2)
    assert rest == ["None", "['verify', '--config=a config']"]
    assert second == " ".join([pid, "glibc.malloc.hugetlb=1", rest[1]])


@pytest.mark.once
def test_ctrl_c_leaves_a_whole_checkpoint(capsys, place, tmp_path):
    out = tmp_path / "out"
    command = ["train", f"--config={place}/tiny.py", f"--out={out}", "--config.epochs=100000"]
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "1"}
    with subprocess.Popen(
        [sys.executable, "-m", "repopt_jax", *command], stderr=subprocess.PIPE, text=True, env=environment
    ) as process:
        assert process.stderr is not None
        # A line is written at the end of each epoch and then its checkpoint: at line 3, the second is there.
        epochs = (line for line in iter(process.stderr.readline, "") if "epoch" in line)
        lines = [next(epochs) for _ in range(3)]
        assert all("tiny: epoch" in line for line in lines), lines
        process.send_signal(signal.SIGINT)
        err = process.stderr.read()
        assert process.wait(60) == 130
    assert "Traceback" not in err
    last = err.splitlines()[-1]
    assert last.startswith("repopt: stopped at step ")
    assert "is complete: run the same command again to continue" in last
    assert not (out / "summary.json").exists()
    assert (Path(out) / "checkpoints" / last.split("stopped at step ")[1].split(";")[0]).is_dir()
    assert main(["eval", f"--run={out}"]) == 0
    assert "of 10 images" in capsys.readouterr().out


INTERRUPTS = (1, 30, 200, 600, 1200)


@pytest.mark.once
@pytest.mark.parametrize("count", INTERRUPTS)
def test_ctrl_c_at_any_moment(place, tmp_path, count):
    """Python tells of each import on standard error; the signal comes after so many of them since one of
    our first."""
    program = [sys.executable, "-X", "importtime", "-m", "repopt_jax", "train"]
    command = [*program, f"--config={place}/tiny.py", f"--out={tmp_path}/out", "--config.epochs=100000"]
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "1"}
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment) as process:
        assert process.stderr is not None
        lines = iter(process.stderr.readline, "")
        next(line for line in lines if line.endswith("repopt_jax.cli.errors\n"))
        for _ in range(count):
            next(lines)
        process.send_signal(signal.SIGINT)
        said = [line for line in lines if not line.startswith("import time:")]
        assert process.wait(120) == 130, said
    assert not [line for line in said if "Traceback" in line or line.startswith(" ")], said
    assert said[-1].startswith("repopt: "), said


def test_another_error_made_of_ctrl_c(capsys, train, monkeypatch):
    def interrupted(*_, **__):
        raise SystemError("a callback returned a result with an exception set")

    monkeypatch.setattr("repopt_jax.train.run", interrupted)
    assert main(train(), interrupted=lambda: True) == 130
    assert capsys.readouterr().err == "repopt: interrupted; run the same command again\n"
    with pytest.raises(SystemError):  # and where there was no Ctrl-C
        main(train())


@pytest.mark.once
@pytest.mark.parametrize(
    ("pressed", "at_the_end", "code"), [("os.kill(os.getpid(), 2)", "os.abort", 130), ("0", "press", 0)]
)
def test_ctrl_c_and_the_end_of_the_interpreter(pressed, at_the_end, code):
    """After Ctrl-C nothing that is torn down can crash; when all is done, a Ctrl-C changes nothing."""
    program = f"""
import atexit, os, sys
import repopt_jax.__main__ as program
import repopt_jax.cli.main
def press(): os.kill(os.getpid(), 2)
sys.modules["repopt_jax.cli.main"].main = lambda **_: {pressed}
atexit.register({at_the_end})
sys.exit(program.run())
"""
    done = subprocess.run([sys.executable, "-c", program], stderr=subprocess.PIPE, text=True)
    assert done.returncode == code
    assert done.stderr == ("repopt: interrupted; run the same command again\n" if code else "")


@pytest.mark.once
@pytest.mark.parametrize(
    ("command", "count"),
    [
        pytest.param("verify", 2, marks=pytest.mark.long),
        ("verify", 70),
        pytest.param("verify", 110, marks=pytest.mark.long),
        pytest.param("eval", 1, marks=pytest.mark.long),
        pytest.param("export", 20, marks=pytest.mark.long),
    ],
)
def test_ctrl_c_while_programs_are_compiled(tmp_path, count, command):
    """JAX tells of each program on standard error."""
    arguments = ["--config=digits:depth,smoke"]
    if command != "verify":
        run = tmp_path / "run"
        assert main(["train", "--config=digits:plain,smoke", f"--out={run}"]) == 0
        arguments = [f"--run={run}"]
    if command == "export":
        arguments += ["--format=stablehlo", f"--out={tmp_path}/net.stablehlo"]
    program = [sys.executable, "-m", "repopt_jax", command, *arguments]
    environment = {
        **os.environ,
        "JAX_LOG_COMPILES": "1",
        "JAX_PLATFORMS": "cpu",
        "JAX_NUM_CPU_DEVICES": "1",
    }
    with subprocess.Popen(program, stderr=subprocess.PIPE, text=True, env=environment) as process:
        assert process.stderr is not None
        compiled = (line for line in iter(process.stderr.readline, "") if "Compiling jit" in line)
        for _ in range(count):
            next(compiled)
        process.send_signal(signal.SIGINT)
        said = process.stderr.read()
        assert process.wait(120) == 130, said
    assert "Traceback" not in said
    assert said.splitlines()[-1] == "repopt: interrupted; run the same command again"
