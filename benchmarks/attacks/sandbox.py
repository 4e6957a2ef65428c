"""Programs that try to leave the sandbox of model-written code."""

from collections.abc import Iterator
from pathlib import Path

from nanochat.sandbox.runner import run_program


def jail(folder: Path) -> Iterator[tuple[str, bool]]:
    """Reach files, processes and the network from inside the jail."""
    secret = folder / "secret"
    secret.write_text("secret")
    for name, program in {"read a file": f"open({str(secret)!r}).read()"}.items():
        yield name, run_program(program).passed
