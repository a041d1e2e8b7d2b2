"""`--print-config`: what is printed is a config file that gives the same config; nothing is run for it."""

import dataclasses
import math
import subprocess
import sys

import numpy as np
import pytest
from test_configs import COMPARED, FILES, arguments

from repopt_jax import train
from repopt_jax.cli.main import main
from repopt_jax.cli.printed import python_file
from repopt_jax.report.comparison import load_comparison
from repopt_jax.report.quickstart import comparison_of
from repopt_jax.surgery.prepare import Mode


def printed(capsys, *arguments):
    capsys.readouterr()
    assert main([*arguments, "--print-config"]) == 0, capsys.readouterr().err
    return capsys.readouterr().out


@pytest.fixture
def loaded(capsys, tmp_path, monkeypatch):
    """`loaded(load, *arguments)`: what a command prints, read by `load` from a file in an empty folder."""
    monkeypatch.chdir(tmp_path)

    def read(load, *arguments):
        text = printed(capsys, *arguments)
        assert list(tmp_path.iterdir()) == []  # neither a run nor its folder
        file = tmp_path / "mine.py"
        file.write_text(text)
        try:
            return load(str(file))
        finally:
            file.unlink()

    return read


@pytest.mark.parametrize("name", FILES)
def test_every_config_is_printed_as_a_file_that_gives_it_again(loaded, name):
    for arg in arguments(name):
        for option in ("", ",smoke"):
            config = f"{name}:{arg}{option}"
            assert loaded(train.load_config, "train", f"--config={config}") == train.load_config(config)


@pytest.mark.parametrize("command", ["compare", "quickstart"])
@pytest.mark.parametrize("name", COMPARED)
def test_every_comparison_is(loaded, name, command):
    expected = load_comparison(name)
    assert loaded(load_comparison, command, f"--config={name}", "--seeds=2") == dataclasses.replace(
        expected, seeds=2
    )


def test_the_comparisons_are_there():
    assert "deep_digits" in COMPARED


@pytest.mark.parametrize("command", ["train", "search", "check-data", "verify"])
def test_overrides_are_in_it(loaded, command):
    overrides = (
        *("--config.optim.learning_rate=0.5", '--config.name=it\'s "mine" \\', "--config.optim.clip_norm=2"),
        *("--config.data.area=(0.5,1.0)", "--config.optim.b1=None", "--config.data.flip=True"),
    )
    found = loaded(train.load_config, command, "--config=digits:search", *overrides)
    expected = train.load_config("digits:search")
    assert found != expected
    expected.optim.learning_rate, expected.name, expected.optim.clip_norm = 0.5, 'it\'s "mine" \\', 2.0
    expected.data.area, expected.data.flip = (0.5, 1.0), True
    assert found == expected


def test_a_plain_config_is_printed_as_the_comparison_that_quickstart_makes(loaded):
    found = loaded(load_comparison, "quickstart", "--config=digits", "--config.epochs=3")
    base = train.load_config("digits")
    base.epochs = 3
    assert found == comparison_of(base)


def test_the_config_of_a_pruning(loaded, tmp_path_factory, digits):
    from training import tiny_config

    run = tmp_path_factory.mktemp("pruned") / "run"
    train.run(tiny_config("plain", digits, epochs=1), run, progress=False)
    arguments = ("prune", f"--run={run}", "--target=0.4", "--config.prune.strength=0.01")
    found = loaded(train.load_config, *arguments)
    assert (found.prune.run, found.prune.target, found.prune.strength) == (str(run), 0.4, 0.01)
    assert found.optim.learning_rate == 0.01


def test_the_config_of_a_run_is_printed_too(loaded, tmp_path_factory):
    config = train.load_config("scenes:repopt")
    file = tmp_path_factory.mktemp("run") / "config.json"
    file.write_text(train.to_json(config))
    assert loaded(train.load_config, "train", f"--config={file}") == config


def test_numbers_and_texts_of_other_classes():
    config = train.Config(epochs=np.int64(3), name=Mode.PLAIN)
    config.optim.learning_rate, config.optim.ema = np.float32(0.25), math.inf
    config.data.mean = [0.5, 0.25]  # what `validate` refuses stays as it is
    namespace: dict = {}
    exec(python_file(config, "a\ncommand"), namespace)
    found = namespace["get_config"]()
    assert (type(found.epochs), type(found.name), type(found.optim.learning_rate)) == (int, str, float)
    assert (found.epochs, found.name, found.optim.ema) == (3, "plain", math.inf)
    assert found.data.mean == [0.5, 0.25]
    config.data.mean = {1}
    with pytest.raises(ValueError, match="`mean` is of type set"):
        python_file(config, "")


@pytest.mark.parametrize(
    ("arguments", "parts", "code"),
    [
        (["train", "--print-config"], "required: --config", 2),
        (["verify", "--check=a.py", "--print-config"], "of --config, which is missing", 2),
        (["train", "--config=digitz", "--print-config"], "no config file 'digitz'", 1),
        (["train", "--config=digits", "--config.sed=1", "--print-config"], "unknown config field sed", 2),
        (["eval", "--run=x", "--print-config"], "unknown option --print-config", 2),
        (["train", "--config=digits", "--print-config=1"], "ignored explicit argument", 2),
    ],
)
def test_mistakes(capsys, arguments, parts, code):
    assert main(arguments) == code
    said = capsys.readouterr()
    assert said.out == ""
    assert parts in said.err
    assert said.err.count("\n") == 1


def test_no_device_is_looked_for(tmp_path):
    """A machine without its accelerators, such as a login node, can print a config."""
    code = """
import sys
from repopt_jax.cli.main import main
code = main(["train", "--config=digits", "--print-config"])
from jax._src import xla_bridge
sys.exit(code or xla_bridge.backends_are_initialized())
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "get_config" in done.stdout
    assert list(tmp_path.iterdir()) == []
