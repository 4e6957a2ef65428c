"""Look over the checkpoints, check them, thin them out, archive them and bring them back.

./nanochat.sh checkpoints                                       list them, each file checked
./nanochat.sh checkpoints verify --source base
./nanochat.sh checkpoints prune --keep-last 1 --keep-every 5000
./nanochat.sh checkpoints archive --source rl --file my-model.tar
./nanochat.sh checkpoints restore my-model.tar
"""

from dataclasses import dataclass, field
from pathlib import Path

import tyro
from rich.console import Console
from rich.table import Table

from nanochat import cli, paths
from nanochat.errors import UserError
from nanochat.train import archive
from nanochat.train.archive import Saved
from nanochat.train.options import check_range
from nanochat.units import format_duration


@dataclass
class Show:
    """List them: stage, model, step, size, age, bits per byte, and whether all their files are as they were written."""


@dataclass
class Verify:
    """Check every file, name what is damaged, and exit with 2 if anything is."""


@dataclass
class Prune:
    """Remove damaged checkpoints, where there are good ones, and all but the last good ones of each model."""

    keep_last: int = 1
    """good checkpoints of each model to keep"""
    keep_every: int = 0
    """keep besides those whose step is a multiple of this; 0: none"""

    def __post_init__(self) -> None:
        check_range("keep_last", self.keep_last, 1)
        check_range("keep_every", self.keep_every, 0)


@dataclass
class Archive:
    """Write one checkpoint with its tokenizer and metrics into a tar file."""

    step: int | None = None
    """which; by default the newest"""
    file: Path | None = None
    """a new file; by default <stage>-<tag>-<step>.tar here"""


@dataclass
class Restore:
    """Put an archive back where it was, in this or another base directory."""

    file: tyro.conf.Positional[Path]


@dataclass
class Options:
    """Look over the checkpoints, check them, thin them out, archive them and bring them back."""

    command: Show | Verify | Prune | Archive | Restore = field(default_factory=Show)
    source: str | None = None
    """base, mid, sft or rl; by default all, and for an archive the most advanced"""
    model_tag: str | None = None
    """which model; by default all, and for an archive the newest"""


def main(options: Options) -> None:
    console = Console(highlight=False, soft_wrap=True)
    command, source, tag = options.command, options.source, options.model_tag
    match command:
        case Show():
            show(list(archive.all_saved(source, tag)), console)
        case Verify():
            verify(list(archive.all_saved(source, tag)), console)
        case Prune(keep_last, keep_every):
            removed = archive.prune(source, tag, keep_last, keep_every)
            for checkpoint in removed:
                console.print(f"removed {checkpoint.folder}")
            console.print(f"{len(removed)} removed")
        case Archive(step, file):
            console.print(f"written: {archive.archive(source, tag, step, file)}")
        case Restore(file):
            console.print(f"restored: {archive.restore(file).folder}")


def show(saved: list[Saved], console: Console) -> None:
    """A table of them, each file read and compared with its digest, and below it what is wrong."""
    if not saved:
        raise UserError(f"there is no such checkpoint in {paths.base_dir()}: run ./pretrain.sh first")
    table, notes = Table("stage", "model", "step", "size", "age", "bits/byte", "files"), []
    for column in table.columns[2:6]:
        column.justify = "right"
    for one in saved:
        bpb, damage = one.bits_per_byte, one.checkpoint.damage()
        if not one.checkpoint.folder.exists():  # a run that goes on has pruned it meanwhile
            continue
        table.add_row(
            one.source,
            one.tag,
            f"{one.checkpoint.step:,}",
            f"{one.size / 1e6:,.0f} MB",
            format_duration(one.age_seconds),
            "" if bpb is None else f"{bpb:.3f}",
            "damaged" if damage else "good",
        )
        if damage:
            notes.append(f"{one.checkpoint.folder}: {damage}")
    console.print(table, *notes, sep="\n")


def verify(saved: list[Saved], console: Console) -> None:
    """Name what is damaged. Raises UserError if anything is."""
    damaged = 0
    for one in saved:
        damage = one.checkpoint.damage()
        if not one.checkpoint.folder.exists():  # a run that goes on has pruned it meanwhile
            continue
        damaged += damage is not None
        console.print(f"{one.checkpoint.folder}: {damage or 'good'}")
    if damaged:
        raise UserError(
            f"{damaged} of {len(saved)} checkpoints are damaged: ./nanochat.sh checkpoints prune removes them"
        )


DEMO = Options()

if __name__ == "__main__":
    cli.run(main, Options, demo=DEMO)
