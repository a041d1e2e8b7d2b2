"""The program `repopt`: its command line, and the dispatch to the functions of `commands`.

A mistake of the user is one sentence on standard error, with exit code 2 if it is on the command line and 1
otherwise; Ctrl-C gives 130, SIGTERM 143. Nothing here imports JAX, so that help and mistyped commands are
answered at once.
"""

import argparse
import shlex
import sys
from collections.abc import Callable, Sequence

from repopt_jax.cli import commands, completion, huge_pages
from repopt_jax.cli.errors import UsageError, fail, report
from repopt_jax.cli.options import parsers as make_parsers
from repopt_jax.hints import did_you_mean


def main(argv: Sequence[str] | None = None, *, interrupted: Callable[[], bool] = lambda: False) -> int:
    """Runs one command and returns its exit code.

    Args:
      argv: without the program's name; by default that of this process.
      interrupted: whether Ctrl-C was pressed. Libraries make other errors of a KeyboardInterrupt that is
        raised inside them.
    """
    if completion.asked():
        completion.answer(make_parsers()[0])
    try:
        args = parse(sys.argv[1:] if argv is None else argv)
    except UsageError as error:
        return fail(error, code=2)
    except SystemExit as done:  # argparse has printed help or the version
        return int(done.code or 0)
    try:
        if args.print_config:
            return commands.print_config(args)
        if argv is None and args.computes:  # as a program of its own, not called by one
            huge_pages.restart()
        return args.command(args)
    except BaseException as error:
        if interrupted() and not isinstance(error, KeyboardInterrupt):
            error = KeyboardInterrupt()
        code = report(error)
        if code is None:
            raise
        return code


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """Parses the options of the command in `argv`.

    Besides its options, the namespace has `command`, the function that carries it out; `print_config`,
    whether the config is only to be printed; `overrides`, each `--config.FIELD=VALUE` as typed; and
    `command_line`, for a shell.

    Raises:
      UsageError: an unknown command or option; an option that is repeated, has no value or a bad one; too few
        or too many arguments.
      SystemExit: help or the version was asked for and has been printed.
    """
    program, parsers = make_parsers()
    if not argv:
        program.print_help(sys.stderr)
        program.exit(2)
    first, *rest = ("--help",) if argv[0] == "help" else argv
    if first.startswith("-"):
        program.check_options([first])
    elif first not in parsers:
        raise UsageError(
            f"unknown command {first!r}{did_you_mean(first, parsers)}; one of {', '.join(parsers)}"
        )
    elif "-h" in rest or "--help" in rest:
        rest = ["--help"]
    else:
        parsers[first].check_options(rest)
        if "--print-config" in rest:
            parsers[first].asked_for_config()
    args, extras = program.parse_known_args([first, *rest])
    args.overrides = _overrides(extras)
    args.print_config = getattr(args, "print_config", False)
    args.command_line = shlex.join(["repopt", *argv])
    return args


def _overrides(extras: Sequence[str]) -> list[str]:
    """Returns the overrides `--config.FIELD=VALUE`, which may be typed as two arguments, from `extras`."""
    overrides = []
    arguments = iter(extras)
    for argument in arguments:
        if not argument.startswith("--config."):
            raise UsageError(f"unexpected argument {argument!r}: options are written --name=value")
        if "=" not in argument:
            value = next(arguments, "--")
            if value.startswith("--"):
                raise UsageError(f"option {argument} has no value: write {argument}=VALUE")
            argument = f"{argument}={value}"
        overrides.append(argument)
    return overrides
