"""Findings of ./nanochat.sh doctor and cluster: ok, warning or failed, with the command that fixes it."""

import textwrap
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

from rich.console import Console
from rich.text import Text

COLORS = {"ok": "green", "warning": "yellow", "failed": "red"}
MARGIN = 21
"""Columns of status and name."""


@dataclass(frozen=True)
class Check:
    """One finding."""

    name: str
    status: Literal["ok", "warning", "failed"]
    text: str
    fix: str = ""
    """a command or a sentence"""


def run_checks(checks: Mapping[str, Callable[[], Check | None]]) -> list[Check]:
    """Run all checks; those that do not apply return None. An exception in a check becomes a warning."""
    found = []
    for name, check in checks.items():
        try:
            result = check()
        except Exception as error:  # the doctor must not stop a run
            result = Check(name, "warning", f"check failed ({type(error).__name__}: {error})")
        if result:
            found.append(result)
    return found


def print_checks(console: Console, checks: Iterable[Check]) -> None:
    """Print one line per check, wrapped to the console, with its fix below."""
    for check in checks:
        width = max(console.width - MARGIN, 20)
        first, *rest = textwrap.wrap(check.text, width, break_on_hyphens=False) or [""]
        head = Text(f"{check.status:<8}", COLORS[check.status]) + Text(f"{check.name:<{MARGIN - 8}}{first}")
        lines = [head, *(Text(" " * MARGIN + line) for line in rest)]
        if check.fix:  # one line, so that it can be copied
            lines.append(Text(" " * MARGIN + check.fix, "bold"))
        for line in lines:
            console.print(line, soft_wrap=True)
