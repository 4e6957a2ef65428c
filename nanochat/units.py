"""Numbers and text formatted for people: durations, sizes of files, amounts of memory, lines for a terminal."""

import math
import unicodedata
from collections.abc import Sequence


def format_duration(seconds: float) -> str:
    """`42s`, `3m05s`, `2h10m`, `9d04h`; `?` if not finite."""
    if not math.isfinite(seconds):
        return "?"
    whole = round(seconds)
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m{whole % 60:02d}s"
    if whole < 86400:
        return f"{whole // 3600}h{whole % 3600 // 60:02d}m"
    return f"{whole // 86400}d{whole % 86400 // 3600:02d}h"


def format_bytes(count: float) -> str:
    """Decimal units, as disks and downloads use: `980 B`, `1.5 kB`, `23 MB`, `24.0 GB`, `1,234 GB`."""
    if count < 1e3:
        return f"{count:.0f} B"
    unit, size = ("kB", 1e3) if count < 1e6 else ("MB", 1e6) if count < 1e9 else ("GB", 1e9)
    return f"{count / size:,.1f} {unit}" if count < 100 * size else f"{count / size:,.0f} {unit}"


def format_table(rows: Sequence[Sequence[str]]) -> str:
    """Aligned columns, the first and the last to the left, those between them to the right."""
    first, *middle, _ = (max(map(len, column)) for column in zip(*rows, strict=True))
    return "\n".join(
        "  ".join([row[0].ljust(first), *map(str.rjust, row[1:-1], middle), row[-1]]).rstrip() for row in rows
    )


def format_gib(count: float) -> str:
    """Memory in GiB with two significant digits or one decimal: `0.031 GiB`, `1.5 GiB`, `119.6 GiB`."""
    return f"{count / 2**30:.1f} GiB" if count >= 2**30 else f"{count / 2**30:.2g} GiB"


def printable(text: str) -> str:
    """Remove control characters, which could move the cursor or change the window title, and lone surrogates."""
    return "".join(c for c in text if c in "\n\t" or unicodedata.category(c) not in ("Cc", "Cs"))
