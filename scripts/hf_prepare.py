"""Export trained models to folders that transformers loads without custom code, and verify each one.

./hf_prepare.sh --author ada
./hf_prepare.sh --author ada --stage sft --tag d20 --force
./hf_prepare.sh --author ada --gguf                                   # and bf16 and q8_0 files for llama.cpp and Ollama
./hf_prepare.sh --author ada --gguf q8_0,f16 --check-with ~/llama.cpp/build/bin/llama-server
"""

import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import torch
import tyro

from nanochat import cli, paths
from nanochat.errors import UserError
from nanochat.hub.card import Publisher
from nanochat.hub.export import export, export_folder
from nanochat.hub.gguf_file import DEFAULT_TYPES, TYPES, check_supported
from nanochat.runtime import resolve_device_type
from nanochat.stages import STAGES, StageName
from nanochat.tokenizer import Tokenizer
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
    gguf: Annotated[tuple[str, ...] | None, tyro.conf.arg(metavar="[TYPE,...]")] = None
    """also write GGUF files, of types f32, f16, bf16 or q8_0, separated by commas; without a value: bf16,q8_0"""
    check_with: str = ""
    """llama-server to check the GGUF files with; default: the one on PATH, if any"""
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
    types = gguf_types(options.gguf)
    llama_server = find_llama_server(options.check_with, bool(types))
    device = torch.device(resolve_device_type(options.device_type))
    found = select(options.stage, options.tag)
    publisher = Publisher(options.author, options.author_name or options.author, options.license)
    folders = [export_folder(c, options.output) for c in found]
    if not options.force and (existing := [folder for folder in folders if folder.exists()]):
        raise UserError(f"{existing[0]} already exists: pass --force to replace it")
    for c in found if types else []:
        check_supported(c.config, Tokenizer.load(paths.tokenizer_dir()), c.describe())
    for c in found:
        print(f"{c.describe()}:", flush=True)

        def log(line: str) -> None:
            print(f"  {line}", flush=True)

        folder = export(c, publisher, options.output, device, log, types, llama_server)
        print(f"  ready: {folder}\n", flush=True)
    print(f"review each README.md, then run: python upload_to_hf.py --username {options.author} --dry-run")


def gguf_types(values: tuple[str, ...] | None) -> list[str]:
    """Types of GGUF files to write. Raises UserError if one is unknown."""
    if values is None:
        return []
    names = [name for value in values for name in value.split(",")] or DEFAULT_TYPES
    if unknown := [name for name in names if name not in TYPES]:
        raise UserError(f'--gguf must be one or more of {",".join(TYPES)}, got "{unknown[0]}"')
    return [name for name in TYPES if name in names]


def find_llama_server(check_with: str, has_gguf: bool) -> str | None:
    """Path of the program that checks GGUF files. Raises UserError if `check_with` is not executable."""
    if check_with and not has_gguf:
        raise UserError("--check-with checks GGUF files: pass --gguf too")
    program = shutil.which(Path(check_with or "llama-server").expanduser())
    if check_with and not program:
        raise UserError(f"--check-with must be an executable llama-server, got {check_with}")
    return program if has_gguf else None


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
