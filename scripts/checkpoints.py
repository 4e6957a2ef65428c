"""List, verify, prune, archive and restore checkpoints.

./nanochat.sh checkpoints
./nanochat.sh checkpoints verify --source base
./nanochat.sh checkpoints prune --keep-last 1 --keep-every 5000
./nanochat.sh checkpoints archive --source rl --file my-model.tar
./nanochat.sh checkpoints restore my-model.tar
"""

import time
from dataclasses import dataclass, field
from pathlib import Path

import tyro
from rich.console import Console
from rich.table import Table

from nanochat import cli, paths
from nanochat.errors import UserError
from nanochat.train import archive
from nanochat.train.checkpoint import Checkpoint, saved_steps
from nanochat.train.options import check_range
from nanochat.units import format_duration


@dataclass
class Show:
    """List stage, model, step, size, age, bits per byte, and whether all files match their checksums."""


@dataclass
class Verify:
    """Verify every file, list damaged ones, and exit with code 2 if there are any."""


@dataclass
class Prune:
    """Remove damaged checkpoints (if good ones exist), and all but the last good ones of each model."""

    keep_last: int = 1
    """good checkpoints of each model to keep"""
    keep_every: int = 0
    """also keep those whose step is a multiple of this; 0: none"""

    def __post_init__(self) -> None:
        check_range("keep_last", self.keep_last, 1)
        check_range("keep_every", self.keep_every, 0)


@dataclass
class Archive:
    """Write one checkpoint with its tokenizer and metrics into a tar file."""

    step: int | None = None
    """step to archive; default: the newest"""
    file: Path | None = None
    """a new file; default: <stage>-<tag>-<step>.tar in the current folder"""


@dataclass
class Restore:
    """Restore an archive, in this or another base directory."""

    file: tyro.conf.Positional[Path]


@dataclass
class Options:
    """List, verify, prune, archive and restore checkpoints."""

    command: Show | Verify | Prune | Archive | Restore = field(default_factory=Show)
    source: str | None = None
    """base, mid, sft or rl; default: all stages, or for an archive the latest"""
    model_tag: str | None = None
    """model; default: all, or for an archive the newest"""


def main(options: Options) -> None:
    console = Console(highlight=False, soft_wrap=True)
    command, source, tag = options.command, options.source, options.model_tag
    match command:
        case Show():
            show(all_saved(source, tag), console)
        case Verify():
            verify([checkpoint for _, _, checkpoint in all_saved(source, tag)], console)
        case Prune(keep_last, keep_every):
            removed = archive.prune(source, tag, keep_last, keep_every)
            for checkpoint in removed:
                console.print(f"removed {checkpoint.folder}")
            console.print(f"{len(removed)} removed")
        case Archive(step, file):
            console.print(f"wrote {archive.archive(source, tag, step, file)}")
        case Restore(file):
            console.print(f"restored {archive.restore(file).folder}")


def all_saved(source: str | None = None, tag: str | None = None) -> list[tuple[str, str, Checkpoint]]:
    """Stage, name of the model and checkpoint, for each saved step."""
    return [
        (stage, name, found) for stage, name, folder in archive.models(source, tag) for found in saved_steps(folder)
    ]


def show(saved: list[tuple[str, str, Checkpoint]], console: Console) -> None:
    """Verify every file; print a table of the checkpoints, and any damage below it."""
    if not saved:
        raise UserError(f"no checkpoints in {paths.base_dir()}: run ./pretrain.sh first")
    table, notes = Table("stage", "model", "step", "size", "age", "bits/byte", "files"), []
    for column in table.columns[2:6]:
        column.justify = "right"
    for source, tag, checkpoint in saved:
        damage = checkpoint.damage()
        if not checkpoint.folder.exists():  # pruned meanwhile by a running stage
            continue
        meta = checkpoint.meta if checkpoint.is_readable() else {}
        bpb = meta.get("results", {}).get("bpb")
        size = sum(file.lstat().st_size for file in checkpoint.folder.iterdir())
        age = time.time() - float(meta.get("saved_at") or checkpoint.folder.stat().st_mtime)
        table.add_row(
            source,
            tag,
            f"{checkpoint.step:,}",
            f"{size / 1e6:,.0f} MB",
            format_duration(age),
            "" if bpb is None else f"{bpb:.3f}",
            "damaged" if damage else "good",
        )
        if damage:
            notes.append(f"{checkpoint.folder}: {damage}")
    console.print(table, *notes, sep="\n")


def verify(saved: list[Checkpoint], console: Console) -> None:
    """Print the state of each checkpoint. Raises UserError if any is damaged."""
    damaged = 0
    for checkpoint in saved:
        damage = checkpoint.damage()
        if not checkpoint.folder.exists():  # pruned meanwhile by a running stage
            continue
        damaged += damage is not None
        console.print(f"{checkpoint.folder}: {damage or 'good'}")
    if damaged:
        raise UserError(
            f"{damaged} of {len(saved)} checkpoints are damaged: remove them with ./nanochat.sh checkpoints prune"
        )


DEMO = Options()

if __name__ == "__main__":
    cli.run(main, Options, demo=DEMO)
