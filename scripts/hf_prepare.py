"""Trained models as folders that transformers loads as they are, each proved to be the model that it was made from.

./hf_prepare.sh --author ada
./hf_prepare.sh --author ada --stage sft --tag d20 --force
"""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from nanochat import cli
from nanochat.errors import UserError
from nanochat.hub.card import Publisher
from nanochat.hub.export import check_free, export, target
from nanochat.runtime import resolve_device_type
from nanochat.stages import STAGES
from nanochat.train import checkpoint
from nanochat.train.checkpoint import Checkpoint


@dataclass
class Options:
    """Make folders for the Hugging Face Hub. Nothing is sent anywhere: python upload_to_hf.py does that."""

    author: str = ""
    """your name on the hub, or your organisation's: the models will be NAME/nanochat-..."""
    stage: Literal["base", "mid", "sft", "rl", "all"] = "all"
    """which stage; all: each that there is"""
    tag: str | None = None
    """which model, such as d20; by default the newest"""
    output: Path = Path("hf_models")
    """where the folders go"""
    license: str = "mit"
    """the hub's name for it"""
    author_name: str = ""
    """your name as people write it, for licence and citation; by default --author"""
    force: bool = False
    """replace folders that are there"""
    device_type: str = "auto"
    """cuda or cpu, for the comparison"""


DEMO = Options()


def main(options: Options) -> None:
    if not re.fullmatch(r"(?!.*(--|\.\.))[A-Za-z0-9][A-Za-z0-9_.-]*", options.author):
        raise UserError("--author is missing or no name of the hub: pass yours, such as --author ada")
    if not re.fullmatch(r"[a-z0-9][a-z0-9.+-]*", options.license):
        raise UserError(
            f"--license {options.license} is none of the hub's: choose one such as mit, apache-2.0 or cc-by-4.0"
        )
    device = torch.device(resolve_device_type(options.device_type))
    found = chosen(options.stage, options.tag)
    publisher = Publisher(options.author, options.author_name or options.author, options.license)
    check_free([target(c, options.output) for c in found], options.force)
    for c in found:
        print(f"{c.describe()}:", flush=True)
        folder = export(c, publisher, options.output, device, lambda line: print(f"  {line}", flush=True))
        print(f"  ready: {folder}\n", flush=True)
    print(f"look at the README.md in each; then: python upload_to_hf.py --username {options.author} --dry-run")


def chosen(stage: str, tag: str | None) -> list[Checkpoint]:
    """The last checkpoint of each stage asked for, all of one model. Raises UserError if there is none."""
    if stage != "all":
        return [checkpoint.find(stage, tag)]
    stages = [found for source in STAGES if (found := checkpoint.newest(source, tag))]
    if not stages:
        checkpoint.find(None, tag)  # says what is missing
    newest = max(stages, key=lambda found: float(found.meta["saved_at"])).tag
    return [found for source in STAGES if (found := checkpoint.newest(source, newest))]


if __name__ == "__main__":
    cli.run(main, Options, demo=DEMO)
