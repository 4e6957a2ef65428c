"""Find the interpreter processes of the calculator."""

import os
from pathlib import Path


def monty_workers() -> set[int]:
    """Process ids of the children of this process that are Monty workers."""
    found = set()
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            name, _, rest = stat.read_text().partition("(")[2].rpartition(")")
        except OSError:
            continue
        if name == "monty" and int(rest.split()[1]) == os.getpid():
            found.add(int(stat.parent.name))
    return found
