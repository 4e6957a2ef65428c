"""For the Python files that a person starts with whatever Python there is: go on in .venv."""

import os
import subprocess
import sys
from pathlib import Path
from typing import NoReturn

ROOT = Path(__file__).resolve().parent.parent


def run_in_venv(module: str) -> NoReturn:
    """Make .venv if it is missing or out of date, and become its `python -m module` with the same arguments.

    Uses nothing but the standard library, as nothing else may be installed.
    """
    made = subprocess.run([ROOT / "setup.sh", "--quiet"], check=False)
    if made.returncode:
        sys.exit(made.returncode)
    environment = os.environ | {
        "PYTHONPATH": str(ROOT),
        "PYTHONSAFEPATH": "1",
        "NANOCHAT_COMMAND": f"./{Path(sys.argv[0]).name}",
    }
    python = ROOT / ".venv/bin/python"
    os.execve(python, [str(python), "-m", module, *sys.argv[1:]], environment)
