"""What the doctor finds: one line each, ok, warning or failed, with the command that mends it."""

import textwrap
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

from rich.console import Console
from rich.text import Text

COLOURS = {"ok": "green", "warning": "yellow", "failed": "red"}
MARGIN = 21
"""Columns before a line's text: status and name."""


@dataclass(frozen=True)
class Check:
    """One thing looked at."""

    name: str
    status: Literal["ok", "warning", "failed"]
    text: str
    mend: str = ""
    """the command, or the sentence, that mends it"""


def run_checks(checks: Mapping[str, Callable[[], Check | None]]) -> list[Check]:
    """What each check finds; None where there is nothing to look at. A check that breaks is itself a finding."""
    found = []
    for name, check in checks.items():
        try:
            result = check()
        except Exception as error:  # whatever it is: the doctor must not stop a run
            result = Check(name, "warning", f"could not be looked at ({type(error).__name__}: {error})")
        if result:
            found.append(result)
    return found


def print_checks(console: Console, checks: Iterable[Check]) -> None:
    """A line for each, wrapped to the console, with what mends it below."""
    for check in checks:
        width = max(console.width - MARGIN, 20)
        first, *rest = textwrap.wrap(check.text, width, break_on_hyphens=False) or [""]
        head = Text(f"{check.status:<8}", COLOURS[check.status]) + Text(f"{check.name:<{MARGIN - 8}}{first}")
        console.print(head, soft_wrap=True)
        for line in rest:
            console.print(Text(" " * MARGIN + line), soft_wrap=True)
        if check.mend:  # unbroken, so that it can be copied
            console.print(Text(f"{' ' * MARGIN}{check.mend}", "bold"), soft_wrap=True)
