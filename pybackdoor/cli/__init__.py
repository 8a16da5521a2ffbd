"""The ``pybackdoor`` command.

Exit codes: 0 fine, 1 a finding (a trigger fires, or a planted one does not), 2 failure, 130 Ctrl-C,
143 SIGTERM.
"""

from __future__ import annotations

import argparse
import difflib
import json
import os
import re
import sys
import warnings
from collections.abc import Sequence
from functools import partial
from typing import Any, NoReturn

from .. import __version__
from ..distributed import Ranks
from ..options import add_flags, resolve


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns its exit code."""
    from ..engine.interrupts import Terminated
    from .commands import COMMANDS

    given = parser().parse_args(arguments)
    command = COMMANDS[given.command]
    outcome = None
    try:
        with warnings.catch_warnings():
            warnings.showwarning = partial(_show_warning, given.command)
            outcome = command.run(resolve(command.config, given))
        leader = Ranks().rank == 0
        Ranks.finish()
        if leader:
            if given.json:
                print(json.dumps(outcome.result, indent=2, allow_nan=False))
            else:
                print(outcome.text)
            sys.stdout.flush()
    except KeyboardInterrupt as stop:
        said = str(stop)
        if Ranks().rank > 0:
            said = "stopped; the first process says what was kept"
        elif said in ("", "terminated"):
            said = f"{said or 'interrupted'}; nothing was saved"
        print(f"pybackdoor {given.command}: {said}", file=sys.stderr)
        return 143 if isinstance(stop.__cause__ or stop, Terminated) else 130
    except BrokenPipeError:  # the reader of the output has gone, as in `... | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except Exception as error:
        if given.debug:
            raise
        said = str(error) or type(error).__name__
        if isinstance(error, OSError) and error.filename is not None:
            said = _about_file(error, given)
        print(f"pybackdoor {given.command}: error: {said}", file=sys.stderr)
        return 2
    return 0 if outcome is None else outcome.code


def parser() -> argparse.ArgumentParser:
    """Of all commands and their options."""
    from . import teaching
    from .commands import COMMANDS

    found = _Parser(
        prog="pybackdoor",
        description="Remove backdoors from CLIP models, and measure what is left.",
        epilog=teaching.ALL,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    found.add_argument("--version", action="version", version=f"pybackdoor {__version__}")
    commands = found.add_subparsers(dest="command", required=True, metavar="command")
    for name, command in COMMANDS.items():
        about = command.about
        sub = commands.add_parser(
            name, help=about, description=about, epilog=teaching.BELOW.get(name),
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )  # fmt: skip
        sub.add_argument("--json", action="store_true", help="print the result as JSON")
        sub.add_argument("--debug", action="store_true", help="show the traceback of an error")
        add_flags(sub, command.config)
    return found


class _Parser(argparse.ArgumentParser):
    """Says what is wrong, and not again what there is: of that a command has pages."""

    def error(self, message: str) -> NoReturn:
        if found := re.search(r"invalid choice: '(.*?)' \(choose from (.*)\)", message):
            known = [name.strip(" '") for name in found[2].split(",")]
            if close := difflib.get_close_matches(found[1], known, 1):
                message += f"; did you mean {close[0]!r}?"
        self.exit(2, f"{self.prog}: error: {message}\n{self.prog} --help lists the options\n")


def _about_file(error: OSError, given: argparse.Namespace) -> str:
    """Names the options whose file it is."""
    names = [name for name, value in vars(given).items() if value == str(error.filename)]
    options = "".join(f"--{name.replace('_', '-')} " for name in names)
    return f"{options}{error.filename}: {error.strerror}"


def _show_warning(command: str, message: Warning | str, *about: Any, **more: Any) -> None:
    print(f"pybackdoor {command}: warning: {message}", file=sys.stderr, flush=True)
