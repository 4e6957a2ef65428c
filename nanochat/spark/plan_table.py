"""The plan as a person reads it, in 80 columns."""

from collections.abc import Sequence

from nanochat.spark.plan import Machine, Stage


def stage_table(stages: Sequence[Stage], machines: Sequence[Machine], price_per_kwh: float | None) -> list[str]:
    """Time and energy of each stage on each machine, their sum, and what it costs if there is a price."""
    headings = [machine.name if machine.watts is None else f"{machine.name}, kWh" for machine in machines]
    lines = [_row("", "tokens", headings)]
    for stage in stages:
        lines.append(_row(stage.name, count(stage.tokens), [_cell(machine, [stage]) for machine in machines]))
    lines.append(_row("together", "", [_cell(machine, stages) for machine in machines]))
    if price_per_kwh is not None:
        energies = [_energy(machine, stages) for machine in machines]
        costs = ["?" if energy is None else f"{energy * price_per_kwh:,.2f}" for energy in energies]
        lines.append(_row(f"at {price_per_kwh:g} a kWh", "", costs))
    return lines


def count(number: float) -> str:
    """`11.2B`, `446M`, `23M`."""
    for unit, size in (("T", 1e12), ("B", 1e9), ("M", 1e6), ("K", 1e3)):
        if number >= 0.9995 * size:  # what would round to 1,000 of a unit is one of the next
            return f"{number / size:.3g}{unit}"
    return f"{number:.0f}"


def gigabytes(size: float) -> str:
    """Bytes in GB, with two digits that count below ten."""
    return f"{size / 1e9:,.1f} GB" if size < 10e9 else f"{size / 1e9:,.0f} GB"


def duration(hours: float) -> str:
    """`9.1 d`, `8.6 h`, `27 min`, `20 s`: of an estimate, two or three digits say enough."""
    for unit, size in (("d", 24.0), ("h", 1.0), ("min", 1 / 60)):
        if hours >= 2 * size:
            amount = hours / size
            return f"{amount:.1f} {unit}" if amount < 10 else f"{amount:,.0f} {unit}"
    return f"{hours * 3600:.0f} s"


def _cell(machine: Machine, stages: Sequence[Stage]) -> str:
    time = duration(sum(machine.hours(stage) for stage in stages))
    energy = _energy(machine, stages)
    if energy is None:
        return time
    kwh = "<0.1" if energy < 0.1 else f"{energy:,.0f}" if energy >= 10 else f"{energy:.1f}"
    return f"{time} {kwh:>4}"


def _energy(machine: Machine, stages: Sequence[Stage]) -> float | None:
    return None if machine.watts is None else sum(machine.kwh(stage) or 0.0 for stage in stages)


def _row(name: str, tokens: str, cells: Sequence[str]) -> str:
    return f"{name:<13}{tokens:>6}" + "".join(f"{cell:>15}" for cell in cells)
