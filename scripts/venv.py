"""Restart a Python file under .venv, whichever Python it was run with. Uses only the standard library."""

import os
import subprocess
import sys
from pathlib import Path
from typing import NoReturn

ROOT = Path(__file__).resolve().parent.parent


def run_in_venv(module: str) -> NoReturn:
    """Create or update .venv, then replace this process with its `python -m module` and the same arguments."""
    setup = subprocess.run([ROOT / "setup.sh", "--quiet"], check=False)
    if setup.returncode:
        sys.exit(setup.returncode)
    environment = os.environ | {
        "PYTHONPATH": str(ROOT),
        "PYTHONSAFEPATH": "1",
        "NANOCHAT_COMMAND": f"./{Path(sys.argv[0]).name}",
    }
    python = ROOT / ".venv/bin/python"
    os.execve(python, [str(python), "-m", module, *sys.argv[1:]], environment)
