"""Completion: what a real shell makes of a line when the tabulator key is pressed."""

import json
import os
import pty
import re
import select
import shutil
import subprocess
import sys
from pathlib import Path

import programs
import pytest

from repopt_jax import bench, train
from repopt_jax.bench.settings import NETWORKS
from repopt_jax.cli import completion
from repopt_jax.cli.main import main, make_parsers
from repopt_jax.deploy import exporting
from repopt_jax.export.metadata import LAYOUTS
from repopt_jax.models import registry
from repopt_jax.train.config import settings_of

ROOT = Path(__file__).parents[1]
KEPT = json.loads(completion.FILE.read_text())
PROGRAM = f"#!{sys.executable}\nimport sys\nfrom repopt_jax.__main__ import run\nsys.exit(run())\n"
SHOW = "\x18"  # Ctrl-X, which shows the line


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with the program in bin/ and some files to complete."""
    folder = tmp_path_factory.mktemp("completion")
    program = folder / "bin" / "repopt"
    program.parent.mkdir()
    program.write_text(PROGRAM)
    program.chmod(0o755)
    for name in ("runs/first", "runs/second", "pictures"):
        (folder / name).mkdir(parents=True)
    (folder / "pictures" / "a b.png").touch()
    (folder / "mine.py").touch()
    return folder


def environment(place):
    path = f"{place / 'bin'}{os.pathsep}{os.environ['PATH']}"
    return os.environ | {"PATH": path, "PYTHONPATH": str(ROOT), "TERM": "dumb", "HISTFILE": ""}


def script_of(place, shell):
    command = [place / "bin" / "repopt", "completion", shell]
    return subprocess.run(command, env=environment(place), capture_output=True).stdout


class Bash:
    """An interactive bash at a terminal, with the script that `repopt completion bash` prints."""

    def __init__(self, place):
        (place / "repopt.bash").write_bytes(script_of(place, "bash"))
        keys = [
            "set bell-style none",
            "set enable-bracketed-paste off",
            '"\\C-t": insert-completions',
        ]
        start = "".join(f"bind '{key}'\n" for key in keys)
        start += f"""bind -x '"{SHOW}": printf "<<%s>>" "$READLINE_LINE"'\nPS1=ready\nsource repopt.bash\n"""
        (place / "start.bash").write_text(start)
        self.terminal, inside = pty.openpty()
        self.process = subprocess.Popen(
            ["bash", "--noprofile", "--rcfile", "start.bash", "-i"],
            cwd=place,
            env=environment(place),
            start_new_session=True,
            **dict.fromkeys(("stdin", "stdout", "stderr"), inside),
        )
        os.close(inside)
        self.until("ready")

    def until(self, pattern):
        seen = ""
        while not (found := re.search(pattern, seen, re.DOTALL)):
            if not select.select([self.terminal], [], [], 120)[0]:
                raise AssertionError(f"bash said nothing for two minutes after {seen!r}")
            seen += os.read(self.terminal, 4096).decode()
        return found

    def typed(self, line, key):
        """The line after a key has been pressed at its end."""
        os.write(self.terminal, f"{line}{key}{SHOW}".encode())
        found = self.until("<<(.*?)>>")[1]
        os.write(self.terminal, b"\x15")  # Ctrl-U empties the line
        return found

    def tab(self, line):
        return self.typed(line, "\t")

    def all(self, line):
        """The words that could stand at the end of a line."""
        before = line[: line.rindex(" ") + 1]
        return self.typed(line, "\x14").removeprefix(before).split()

    def close(self):
        os.write(self.terminal, b"exit\n")
        self.process.wait()
        os.close(self.terminal)


@pytest.fixture(scope="module")
def bash(place):
    shell = Bash(place)
    yield shell
    shell.close()


@pytest.mark.skipif(shutil.which("bash") is None, reason="there is no bash")
@pytest.mark.parametrize(
    ("line", "completed"),
    [
        ("repopt tr", "repopt train "),
        ("repopt check", "repopt check-data "),
        ("repopt train --ou", "repopt train --out="),
        ("repopt export --deco", "repopt export --decode "),
        ("repopt train --config=cifar100", "repopt train --config=cifar100 "),
        ("repopt train --config=dig", "repopt train --config=digits "),
        ("repopt train --config=mi", "repopt train --config=mine.py "),
        ("repopt train --config=digits:se", "repopt train --config=digits:search "),
        ("repopt train --config dig", "repopt train --config digits "),
        ("repopt train --config.opt", "repopt train --config.optim."),
        ("repopt train --config.optim.le", "repopt train --config.optim.learning_rate="),
        ("repopt train --config=digits --config.see", "repopt train --config=digits --config.seed="),
        ("repopt search --config.optim.name=ada", "repopt search --config.optim.name=adamw "),
        ("repopt train --config.model.name=repvgg-d", "repopt train --config.model.name=repvgg-d2se "),
        ("repopt train --config.data.flip=T", "repopt train --config.data.flip=True "),
        ("repopt train --config.scales=runs/f", "repopt train --config.scales=runs/first/"),
        ("repopt export --format=s", "repopt export --format=stablehlo "),
        ("repopt eval --run=runs/s", "repopt eval --run=runs/second/"),
        ("repopt eval --run runs/s", "repopt eval --run runs/second/"),
        ("repopt predict pictures/", "repopt predict pictures/a\\ b.png "),
        ("repopt models repvgg-d", "repopt models repvgg-d2se "),
        ("repopt bench update,infe", "repopt bench update,inference "),
        ("repopt completion f", "repopt completion fish "),
        ("repopt eval --checkpoint=b", "repopt eval --checkpoint=best "),
        # Nothing: no such command, no such option, a number, a file where a folder is wanted.
        ("repopt nonsense", "repopt nonsense"),
        ("repopt eval --config", "repopt eval --config"),
        ("repopt train --config.optim.learning_rate=", "repopt train --config.optim.learning_rate="),
        ("repopt eval --run=mi", "repopt eval --run=mi"),
    ],
)
def test_bash_completes(bash, line, completed):
    assert bash.tab(line) == completed


@pytest.mark.skipif(shutil.which("bash") is None, reason="there is no bash")
def test_bash_lists(bash):
    parsers = make_parsers()[1]
    assert set(bash.all("repopt ")) == {*parsers, "--help", "--version"}
    assert set(bash.all("repopt eval --")) == {"--help", "--run=", "--model=", "--checkpoint=", "--data-dir="}
    left = bash.all("repopt eval --run=runs/first --")
    assert "--run=" not in left
    assert "--model=" in left
    sections = bash.all("repopt train --config.")
    assert {"--config.optim.", "--config.seed=", "--config.model."} <= set(sections)
    assert not [word for word in sections if "learning_rate" in word]
    ways = bash.all("repopt quantize --calibration=")
    assert ways == ["--calibration=abs-max", "entropy", "mse", "percentile"]
    inside = bash.all("repopt train --config.mesh.")
    assert set(inside) == {"--config.mesh.data=", "--config.mesh.fsdp=", "--config.mesh.statistics="}


def asked(place, line, shell, **settings):
    """What the program writes for a shell, in its order."""
    out = place / "answer"
    out.unlink(missing_ok=True)
    settings = {"_ARGCOMPLETE_IFS": "\n", "_ARGCOMPLETE_SUPPRESS_SPACE": "1", **settings}
    env = environment(place) | {
        **{"_ARGCOMPLETE": "1", "_ARGCOMPLETE_SHELL": shell, "_ARGCOMPLETE_STDOUT_FILENAME": str(out)},
        **{"COMP_LINE": line, "COMP_POINT": str(len(line)), "COMP_TYPE": ""},
        **settings,
    }
    done = subprocess.run([place / "bin" / "repopt"], env=env, cwd=place, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return out.read_text().split("\n")


def test_zsh_and_fish_are_given_descriptions(place):
    assert asked(place, "repopt tra", "zsh") == ["train:Train a network"]
    (option,) = asked(place, "repopt deploy --out", "zsh")
    assert option == "--out=:folder of the deployment; new or empty"
    assert asked(place, "repopt train --config=digits:se", "zsh") == [r"--config=digits\:search:"]
    (option,) = asked(place, "repopt deploy --run", "fish", _ARGCOMPLETE_DFS="\t")
    assert option == "--run=\tfolder of the run"


@pytest.mark.skipif(shutil.which("fish") is None, reason="there is no fish")
def test_fish_completes(place):
    (place / "repopt.fish").write_bytes(script_of(place, "fish"))
    lines = ("repopt tra", "repopt train --config.optim.learning_r")
    for line, word in zip(lines, ("train", "--config.optim.learning_rate=")):
        ask = ["fish", "--no-config", "-c", f"source repopt.fish; complete --do-complete '{line}'"]
        done = subprocess.run(ask, env=environment(place), cwd=place, capture_output=True, text=True)
        assert done.stdout.split("\t")[0].strip() == word


@pytest.mark.skipif(shutil.which("zsh") is None, reason="there is no zsh")
def test_zsh_takes_the_script(place):
    (place / "_repopt").write_bytes(script_of(place, "zsh"))
    code = "fpath=($PWD $fpath); autoload -Uz compinit; compinit -u -D; print $_comps[repopt]"
    done = subprocess.run(
        ["zsh", "-f", "-c", code], env=environment(place), cwd=place, capture_output=True, text=True
    )
    assert done.stdout.strip() == "_repopt"


@pytest.mark.parametrize("shell", completion.SHELLS)
def test_scripts_are_printed(capsys, shell):
    assert main(["completion", shell]) == 0
    text = capsys.readouterr().out
    assert "repopt" in text
    assert ("#compdef repopt" in text) == (shell in ("bash", "zsh"))
    assert main(["completion", "tcsh"]) == 2
    assert "invalid choice: 'tcsh'" in capsys.readouterr().err


class Absent:
    """Finds that argcomplete is not installed."""

    def find_spec(self, name, path=None, target=None):
        if name == "argcomplete":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)


def test_without_its_package_there_is_a_sentence(capsys, monkeypatch):
    for name in [name for name in sys.modules if name.partition(".")[0] == "argcomplete"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(sys, "meta_path", [Absent(), *sys.meta_path])
    assert main(["completion", "bash"]) == 1
    sentence = "repopt: argcomplete is not installed: pip install 'repopt_jax[train]'\n"
    assert capsys.readouterr().err == sentence


def test_an_answer_imports_no_jax(place):
    code = """
import os, sys
os._exit = lambda code: sys.exit(code)
from repopt_jax.cli.main import main
try:
    main([])
finally:
    found = {name.partition(".")[0] for name in sys.modules} - set(sys.stdlib_module_names)
    print(*sorted(name for name in found if not name.startswith("_")))
"""
    for line in ("repopt train --config.optim.le", "repopt train --config.model.name=rep"):
        env = environment(place) | {
            **{"_ARGCOMPLETE": "1", "_ARGCOMPLETE_SHELL": "bash", "COMP_LINE": line},
            **{"COMP_POINT": str(len(line)), "_ARGCOMPLETE_STDOUT_FILENAME": os.devnull},
        }
        done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
        imported = set(done.stdout.split())
        assert {"argcomplete", "repopt_jax"} <= imported
        assert not imported & {"jax", "numpy", "flax", "ml_collections", "absl"}


# -- what is offered is what there is


def test_the_kept_words_are_those_of_the_configs_and_their_fields():
    found = programs.load("scripts/tables.py").words()
    own = {name for name in found["fields"]["model.name"] if name in registry._entries()}
    found["fields"]["model.name"] = [name for name in found["fields"]["model.name"] if name in own]
    assert found == KEPT, "run scripts/tables.py"
    assert set(KEPT["fields"]) == {setting.name for setting in settings_of(train.Config())}
    assert KEPT["configs"]["digits"] == ["plain", "search", "repopt", "depth", "repvgg"]


@pytest.mark.parametrize(
    ("command", "option", "known"),
    [
        ("export", "--format", exporting.FORMATS),
        ("export", "--layout", LAYOUTS),
        ("export", "--preprocess", exporting.PREPROCESS),
        ("export", "--weights", exporting.WEIGHTS),
        ("quantize", "--weights", exporting.WEIGHTS),
        ("bench", "PARTS", (*bench.PARTS, "all")),
        ("bench", "--networks", NETWORKS),
    ],
)
def test_offered_values_are_the_known_ones(command, option, known):
    actions = make_parsers()[1][command]._actions
    action = next(a for a in actions if option in a.option_strings or a.metavar == option)
    assert action.completer(prefix="") == list(known)  # pyright: ignore[reportAttributeAccessIssue]


def test_names_of_options_have_one_spelling():
    """Words with a dash between them; the fields of a config have the names of Python."""
    _, parsers = make_parsers()
    assert not [name for parser in parsers.values() for name in parser.options if "_" in name]
