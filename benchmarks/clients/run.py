"""Try the server with real clients, each installed in a separate environment, and print a table of the results.

python -m benchmarks.clients.run --url http://127.0.0.1:8000

Each script in scripts/ uses one client and fails if an answer is wrong. Its docstring has the packages, what it does,
and the setting that a user of the client types. Python packages come from PyPI, those of .mjs files from the npm
registry, which needs Node.js. lm-eval also needs NANOCHAT_EXPORT, the folder of the exported model.
"""

import ast
import json
import os
import subprocess
import sys
import urllib.request
import venv
from dataclasses import dataclass
from pathlib import Path

from nanochat import cli, paths
from nanochat.errors import UserError

SCRIPTS = sorted((Path(__file__).parent / "scripts").glob("*.*"))


@dataclass
class Options:
    """Try the server with real clients."""

    url: str = "http://127.0.0.1:8000"
    """server, started with chat.sh"""
    only: tuple[str, ...] = ()
    """names of scripts; default: all"""
    seconds: float = 600.0
    """time limit per script"""


def main(options: Options) -> None:
    scripts = [script for script in SCRIPTS if not options.only or script.stem in options.only]
    if len(scripts) < len(options.only):
        raise UserError(f"--only must be among {', '.join(script.stem for script in SCRIPTS)}")
    with urllib.request.urlopen(f"{options.url}/v1/models") as response:
        model = next(card["id"] for card in json.load(response)["data"] if card["nanochat"]["default"])
    environment = {**os.environ, "NANOCHAT_URL": options.url, "NANOCHAT_MODEL": model}
    failures = []
    print("| client | what was run | setting | result |\n|---|---|---|---|", flush=True)
    for script in scripts:
        packages, *description, setting = docstring(script).split("\n")
        command, versions = (prepare_node if script.suffix == ".mjs" else prepare_python)(script, packages.split())
        done = subprocess.run(
            command, env=environment, capture_output=True, text=True, timeout=options.seconds, stdin=subprocess.DEVNULL
        )
        result = "pass" if done.returncode == 0 else "**fail**"
        print(f"| {versions} | {' '.join(description).strip()} | `{setting}` | {result} |", flush=True)
        if done.returncode:
            failures.append(f"{script.stem}:\n{done.stderr[-2000:]}")
    if failures:
        print("\n".join(["", *failures]))
        sys.exit(1)


def docstring(script: Path) -> str:
    """Return the docstring of a Python script, or the first comment of a JavaScript one."""
    text = script.read_text()
    if script.suffix == ".py":
        return (ast.get_docstring(ast.parse(text)) or "").strip()
    return text.partition("/*")[2].partition("*/")[0].strip()


def prepare_python(script: Path, packages: list[str]) -> tuple[list[str], str]:
    """Install packages in a virtual environment. Return the command that runs the script, and the versions."""
    folder = environment_folder(script)
    python = folder / "bin" / "python"
    if not python.exists():
        venv.create(folder, with_pip=True)
    run([python, "-m", "pip", "install", "--quiet", *packages])
    listed = json.loads(run([python, "-m", "pip", "list", "--format", "json"]))
    installed = {entry["name"].lower().replace("_", "-"): entry["version"] for entry in listed}
    names = [package.partition("[")[0] for package in packages]
    return [str(python), "-P", str(script)], ", ".join(f"{name} {installed[name]}" for name in names)


def prepare_node(script: Path, packages: list[str]) -> tuple[list[str], str]:
    """Install packages in a folder of their own. Return the command that runs the script there, and the versions."""
    folder = environment_folder(script)
    folder.mkdir(parents=True, exist_ok=True)
    run(["npm", "install", "--silent", "--no-audit", "--prefix", folder, *packages])
    copy = folder / script.name  # Node.js looks for packages next to the script
    copy.write_text(script.read_text())
    manifests = [json.loads((folder / "node_modules" / name / "package.json").read_text()) for name in packages]
    return ["node", str(copy)], ", ".join(f"{entry['name']} {entry['version']} (npm)" for entry in manifests)


def environment_folder(script: Path) -> Path:
    return paths.base_dir() / "cache" / "clients" / script.stem


def run(command: list[str | Path]) -> str:
    """Return what a command prints. Raises UserError if it fails."""
    done = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    if done.returncode:
        raise UserError(f"{command[0]} failed: {done.stderr[-1000:]}")
    return done.stdout


if __name__ == "__main__":
    cli.run(main, Options)
