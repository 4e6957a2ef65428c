"""List, verify, prune, archive and restore checkpoints."""

import shutil
import tarfile
import tempfile
from collections.abc import Iterator
from pathlib import Path

from nanochat import locks, paths
from nanochat.atomic import atomic_write
from nanochat.errors import UserError
from nanochat.stages import STAGES
from nanochat.telemetry.run_log import FACTS_FILE, METRICS_FILE, SAMPLES_FILE
from nanochat.tokenizer import Tokenizer
from nanochat.train import checkpoint
from nanochat.train.checkpoint import SUMS_FILE, Checkpoint, find, read_sums, saved_steps, sha256

TOKENIZER = "tokenizer"  # folder of the tokenizer in an archive
LOGS = (FACTS_FILE, METRICS_FILE, SAMPLES_FILE)


def models(source: str | None = None, tag: str | None = None) -> Iterator[tuple[str, str, Path]]:
    """Stage, name and folder of all models, or those of one stage or name.

    A model that was set aside has a name such as aside/d20.20260101-120000.
    """
    for stage in [source] if source else STAGES:
        folder = paths.checkpoints_dir(stage)
        for found in sorted({path.parent for pattern in ("*", "aside/*") for path in folder.glob(f"{pattern}/step_*")}):
            if tag in (None, name := str(found.relative_to(folder))):
                yield stage, name, found


def prune(source: str | None, tag: str | None, keep_last: int, keep_every: int) -> list[Checkpoint]:
    """Keep the last `keep_last` undamaged checkpoints of each model and every `keep_every`-th step; remove the rest.

    Damaged ones are removed if an undamaged one remains. Raises UserError if a model is being trained, since its run
    prunes its checkpoints itself.
    """
    removed: list[Checkpoint] = []
    for stage, name, folder in models(source, tag):
        if holder := locks.hold(paths.run_lock(stage, name.replace("/", "-"))):
            raise UserError(f"{holder} is training the {stage} model {name}: stop it, or prune others with --model-tag")
        found = saved_steps(folder)
        damaged = [candidate for candidate in found if candidate.damage()]
        if len(damaged) < len(found):  # else keep them: there is nothing better
            removed += checkpoint.remove(damaged)
            removed += checkpoint.prune(folder, keep_last, keep_every)
    return removed


def archive(source: str | None, tag: str | None, step: int | None, file: Path | None) -> Path:
    """Verify a checkpoint and write it with its tokenizer and logs into a tar file.

    Raises UserError if the checkpoint is missing, damaged or of another tokenizer, or if the file already exists.
    """
    found = find(source, tag, step)
    if damage := found.damage():
        raise UserError(f"{found.folder} is damaged ({damage}): choose another with --step")
    if Tokenizer.load(paths.tokenizer_dir()).hash != found.meta["tokenizer"]:
        raise UserError(f"{found.folder} needs a different tokenizer from {paths.tokenizer_dir()}: restore that one")
    file = file or Path(f"{found.source}-{found.tag}-{found.step:06d}.tar")
    if file.exists():
        raise UserError(f"{file} already exists: choose another with --file")
    model = f"{STAGES[found.source].checkpoint_folder}/{found.tag}"
    with tempfile.TemporaryDirectory() as temporary, atomic_write(file, "wb") as whole:
        logs = [Path(shutil.copy(log, temporary)) for name in LOGS if (log := found.folder.parent / name).exists()]
        (Path(temporary) / SUMS_FILE).write_text("".join(f"{sha256(log)}  {log.name}\n" for log in logs))
        with tarfile.open(fileobj=whole, mode="w") as tar:  # weights do not compress
            tar.add(temporary, model)
            tar.add(found.folder, f"{model}/{found.folder.name}")
            tar.add(paths.tokenizer_dir(), TOKENIZER)
    return file


def restore(file: Path) -> Checkpoint:
    """Restore an archived checkpoint, and its logs and tokenizer if they are missing here.

    Logs without checksums, as in archives of version 0.1.0, are left out. Raises UserError if the archive is damaged,
    if the checkpoint already exists, or if this base directory has a different tokenizer.
    """
    if not file.is_file():
        raise UserError(f"{file} is not a file: pass an archive written by ./nanochat.sh checkpoints archive")
    with tempfile.TemporaryDirectory(dir=paths.base_dir(), prefix=".restoring-") as temporary:
        unpacked = Path(temporary)
        try:
            with tarfile.open(file, "r:") as tar:  # uncompressed, so that it is not larger than it looks
                if any(member.issparse() or not (member.isfile() or member.isdir()) for member in tar):
                    raise ValueError("it holds links, devices or sparse files")
                if any(name.startswith("/") or ".." in name.split("/") for name in tar.getnames()):
                    raise ValueError("it holds files that belong outside its folder")
                tar.extraction_filter = getattr(tarfile, "data_filter", None)  # Debian 12's Python 3.11.2 has none
                tar.extractall(unpacked)
            ((found,),) = map(saved_steps, unpacked.glob("*_checkpoints/*"))
            folder = found.folder
            tokenizer = Tokenizer.load(unpacked / TOKENIZER)
            paths.check_tag(folder.parent.name, "the name of the model")
            sums = read_sums(folder.parent / SUMS_FILE) if (folder.parent / SUMS_FILE).exists() else {}
            for name in sums.keys() & set(LOGS):
                if sha256(folder.parent / name) != sums[name]:
                    raise ValueError(f"{name} does not match its checksum")
        except Exception as error:  # a damaged file can raise anything
            raise UserError(f"{file} is not a complete checkpoint archive ({error}): use another copy") from None
        damage = found.damage()
        if not damage and STAGES[found.source].checkpoint_folder != folder.parts[-3]:
            damage = "its folder is of another stage"
        if damage:
            raise UserError(f"the checkpoint in {file} is damaged ({damage}): use another copy")
        if not paths.tokenizer_dir().exists():
            (unpacked / TOKENIZER).rename(paths.tokenizer_dir())
        elif Tokenizer.load(paths.tokenizer_dir()).hash != tokenizer.hash:
            text = f"{file} has a different tokenizer from {paths.tokenizer_dir()}"
            raise UserError(f"{text}: set NANOCHAT_BASE_DIR to restore it elsewhere")
        model = paths.base_dir() / folder.parent.relative_to(unpacked)
        if (model / folder.name).exists():
            raise UserError(f"{model / folder.name} already exists: move it away first")
        model.mkdir(parents=True, exist_ok=True)
        for name in sums.keys() & set(LOGS):
            if not (model / name).exists():
                (folder.parent / name).rename(model / name)
        return Checkpoint(folder.rename(model / folder.name))
