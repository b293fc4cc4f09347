"""What every command shares: its parser, its output, and how an error ends.

A command module has one function `register(commands)` that adds its parsers with `add_command`. The function that
carries out a command takes the parsed arguments and returns an exit code (None counts as 0). It imports what it needs
when it is called, so that `heterosync --help` does not wait for torch.

Exit codes: 0 done · 1 the user can mend it (one line on stderr says how) · 2 the command line itself is wrong · 130
interrupted.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

from heterosync.errors import UserError, closest

DONE, FAILED, USAGE, INTERRUPTED = 0, 1, 2, 130


class Parser(argparse.ArgumentParser):
    """Its sub-commands' parsers are of this class too; argparse itself tells the nearest choice from Python 3.14 on."""

    def error(self, message: str) -> NoReturn:
        wrong = re.search(r"invalid choice: '([^']*)' \(choose from (.*)\)$", message)
        near = closest(wrong[1], re.findall(r"[\w-]+", wrong[2])) if wrong else None
        super().error(message.replace(" (choose from", f", did you mean '{near}'? (choose from") if near else message)


def add_command(
    commands: Any, name: str, summary: str, run: Callable[[argparse.Namespace], int | None], example: str
) -> argparse.ArgumentParser:
    """Add the command `name`; `example` is shown at the end of its help."""
    parser = _parser(commands, name, summary, example)
    parser.set_defaults(run=run)
    return parser


def _parser(commands: Any, name: str, summary: str, example: str) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = commands.add_parser(
        name,
        help=summary,
        description=summary[0].upper() + summary[1:] + ".",
        epilog="example:\n" + "\n".join(f"  {line}" for line in example.strip().splitlines()),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    return parser


def add_group(commands: Any, name: str, summary: str, example: str) -> Any:
    """Add a command that only holds others (`heterosync job …`); returns where to add them."""
    parser = _parser(commands, name, summary, example)
    return parser.add_subparsers(dest=f"{name}_command", metavar="COMMAND", required=True)


def add_json(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print JSON for a program instead of text")


def positive(text: str) -> int:
    """An argparse type: a whole number of at least one."""
    try:
        number = int(text)
    except ValueError:
        number = 0
    if number < 1:
        raise argparse.ArgumentTypeError(f"'{text}' is not a whole number of 1 or more")
    return number


def names(text: str) -> tuple[str, ...]:
    """An argparse type: `a,b,c`."""
    found = tuple(part.strip() for part in text.split(",") if part.strip())
    if not found:
        raise argparse.ArgumentTypeError("no name given")
    return found


def parse_settings(pairs: Sequence[str] | None) -> dict[str, Any]:
    """`["rounds=3", "weights=none"]` to `{"rounds": 3, "weights": "none"}`; values are read as JSON where they are
    JSON, and numbers with commas between them as a list: `patch=32,32,16` needs no quotes in a shell.

    Raises `UserError` for a pair without `=` or a name given twice. Whether a name is known is the settings' own
    matter.
    """
    settings: dict[str, Any] = {}
    for pair in pairs or ():
        name, equals, text = pair.partition("=")
        if not equals or not name:
            raise UserError(f"--set {pair}: write it as name=value, for example --set rounds=3")
        if name in settings:
            raise UserError(f"--set {name}: given twice; keep one")
        settings[name] = text
        for form in (text, f"[{text}]" if "," in text else text):
            try:
                settings[name] = json.loads(form)
                break
            except ValueError:
                pass
    return settings


def show(value: Any) -> None:
    """Print JSON on stdout."""
    print(json.dumps(value, indent=2, ensure_ascii=False))


def run_command(parser: argparse.ArgumentParser, argv: Sequence[str] | None) -> int:
    """Parse and carry out; the only place where an error becomes an exit code. A defect of ours keeps its traceback."""
    try:
        arguments = parser.parse_args(argv)
    except SystemExit as stop:  # argparse has printed its message: 0 after --help, 2 for a wrong command line
        return int(stop.code or 0) if not isinstance(stop.code, str) else USAGE
    try:
        result = arguments.run(arguments) or DONE
        sys.stdout.flush()
        return result
    except UserError as error:
        for line in str(error).splitlines():
            print(f"heterosync: {line}", file=sys.stderr)
        return FAILED
    except KeyboardInterrupt:
        print("heterosync: interrupted", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:  # the reader (`| head`) has gone; keep Python from complaining at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return FAILED
