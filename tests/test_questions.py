"""docs/questions.md: every question has commands or lines of Python, and all of them run, in their order.

Trainings are the recipe's `,smoke`; everything else is as on the page. Runs and files are real ones, in a
temporary folder. That takes a minute and is `long`; every time, the lines that need no run are run, and the
commands are read.
"""

import re
import shlex
from pathlib import Path

import pytest

from repopt_jax.cli.main import main, parse

PAGE = Path(__file__).parents[1] / "docs" / "questions.md"
QUESTIONS = 20
# Question -> what its commands must print, so that an answer is not true of an empty run.
SAYS = {
    0: ("Lambda", "runs/search/scales"),
    2: ("3x3 + 1x1 + identity", "left as they are"),
    5: ("Lambda",),
    6: ("Too short",),
    8: ("digits digits", "expected (3, 3, 192, 192), found (3, 3, 64, 64)"),
    9: ("int8",),
    10: ("dB",),
    12: ("max_abs=",),
    16: ("ShapeDtypeStruct",),
    18: ("finished",),
    19: ("network_int8.onnx",),
}


def parts():
    """Number -> text; 0 is what comes before the first question."""
    first, *questions = re.split(r"^## ", PAGE.read_text(), flags=re.MULTILINE)
    return {0: first} | {int(text.partition(".")[0]): text for text in questions}


def blocks(text):
    """(language, lines) of each block, in order."""
    return re.findall(r"^```(\w+)\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL)


def shortened(command, digits):
    """The arguments of a command of the page, of a training or a search those of its `,smoke`."""
    program, *arguments = shlex.split(command, comments=True)
    assert program == "repopt", command
    found = [re.sub(r"^(--config=\w+:\w+)$", r"\1,smoke", argument) for argument in arguments]
    if any(argument.startswith("--config=") for argument in found):
        found.append(f"--config.data.data_dir={digits}")
    return found


def commands(lines):
    """The commands of the library in a block, each on one line."""
    found = lines.replace("\\\n", " ").splitlines()
    return [command for command in found if not command.startswith("pip ")]


def needs_a_run(language, lines):
    return language == "bash" or '"runs/' in lines


def test_every_question_has_something_to_run():
    found = parts()
    assert list(found) == list(range(QUESTIONS + 1))
    for number, text in found.items():
        assert {language for language, _ in blocks(text)} <= {"bash", "python"}
        assert blocks(text), f"question {number} has no command"
        assert number == 0 or text.splitlines()[0].endswith("?"), f"question {number} is not a question"
        assert number == 0 or "https://github.com/" in text, f"question {number} names no thread"


@pytest.mark.once
def test_the_lines_that_need_no_run_run(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    names, checked = {}, []
    for number, text in parts().items():
        found = blocks(text)
        for language, lines in found:
            if not needs_a_run(language, lines):
                exec(compile(lines, f"question {number}", "exec"), names)
        said = capsys.readouterr().out
        if number in SAYS and not any(needs_a_run(*block) for block in found):
            checked.append(number)
            assert [words for words in SAYS[number] if words not in said] == [], number
    assert checked == [2, 16]


def test_the_commands_have_the_options_that_they_are_given(digits, monkeypatch, tmp_path, capsys):
    """Of a training or a search also the fields of its config."""
    monkeypatch.chdir(tmp_path)
    found = [
        command
        for text in parts().values()
        for language, lines in blocks(text)
        if language == "bash"
        for command in commands(lines)
    ]
    for command in found:
        arguments = shortened(command, digits)
        if parse(arguments).overrides:
            assert main([*arguments, "--print-config"]) == 0, (command, capsys.readouterr())
    assert len(found) > 10


@pytest.mark.long
def test_the_answers_run(digits, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    names = {}
    for number, text in parts().items():
        for language, lines in blocks(text):
            if language == "python":
                exec(compile(lines, f"question {number}", "exec"), names)
                continue
            for command in commands(lines):
                assert main(shortened(command, digits)) == 0, (number, command, capsys.readouterr())
        said = capsys.readouterr()
        for words in SAYS.get(number, ()):
            assert words in said.out + said.err, (number, words, said)
    assert Path("network_int8.onnx").exists()


@pytest.mark.parametrize("missing", [1, 20])
def test_a_question_without_a_command_is_noticed(missing, monkeypatch, tmp_path):
    """The negative control of the first test."""
    text = parts()[missing]
    bare = re.sub(r"^```.*?^```\n", "", text, flags=re.MULTILINE | re.DOTALL)
    page = tmp_path / "questions.md"
    page.write_text(PAGE.read_text().replace(text, bare))
    monkeypatch.setattr("test_questions.PAGE", page)
    with pytest.raises(AssertionError, match="has no command"):
        test_every_question_has_something_to_run()
