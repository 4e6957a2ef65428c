"""Export trained models to folders that transformers loads without custom code, and verify each one.

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
from nanochat.hub.export import export, export_folder
from nanochat.runtime import resolve_device_type
from nanochat.stages import STAGES, StageName
from nanochat.train import checkpoint
from nanochat.train.checkpoint import Checkpoint


@dataclass
class Options:
    """Write folders for the Hugging Face Hub. Nothing is sent: python upload_to_hf.py does that."""

    author: str = ""
    """your user name or organization on the hub: the models will be NAME/nanochat-..."""
    stage: Literal[StageName, "all"] = "all"
    """stage to export; all: every trained stage"""
    tag: str | None = None
    """model to export, such as d20; default: the newest"""
    output: Path = Path("hf_models")
    """folder to write to"""
    license: str = "mit"
    """license, by the hub's identifier for it"""
    author_name: str = ""
    """your full name, for license and citation; default: --author"""
    force: bool = False
    """replace existing folders"""
    device_type: str = "auto"
    """device for the comparison: cuda or cpu"""


DEMO = Options()


def main(options: Options) -> None:
    if not re.fullmatch(r"(?!.*(--|\.\.))[A-Za-z0-9][A-Za-z0-9_.-]*", options.author):
        raise UserError(f'--author must be a user name on the hub, such as ada, got "{options.author}"')
    if not re.fullmatch(r"[a-z0-9][a-z0-9.+-]*", options.license):
        raise UserError(f'--license must be an identifier such as mit or apache-2.0, got "{options.license}"')
    device = torch.device(resolve_device_type(options.device_type))
    found = select(options.stage, options.tag)
    publisher = Publisher(options.author, options.author_name or options.author, options.license)
    folders = [export_folder(c, options.output) for c in found]
    if not options.force and (existing := [folder for folder in folders if folder.exists()]):
        raise UserError(f"{existing[0]} already exists: pass --force to replace it")
    for c in found:
        print(f"{c.describe()}:", flush=True)
        folder = export(c, publisher, options.output, device, lambda line: print(f"  {line}", flush=True))
        print(f"  ready: {folder}\n", flush=True)
    print(f"review each README.md, then run: python upload_to_hf.py --username {options.author} --dry-run")


def select(stage: str, tag: str | None) -> list[Checkpoint]:
    """The last checkpoint of one stage, or of each stage of the model. Raises UserError if there is none."""
    if stage != "all":
        return [checkpoint.find(stage, tag)]
    newest = [found for source in STAGES if (found := checkpoint.newest(source, tag))]
    if not newest:
        checkpoint.find(None, tag)  # raises
    tag = max(newest, key=lambda found: float(found.meta["saved_at"])).tag
    return [found for source in STAGES if (found := checkpoint.newest(source, tag))]


if __name__ == "__main__":
    cli.run(main, Options, demo=DEMO)
