"""Export a checkpoint to a folder that transformers loads without custom code, verified before it gets its name."""

import contextlib
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from nanochat import paths
from nanochat.atomic import atomic_folder
from nanochat.errors import UserError
from nanochat.hub import verify
from nanochat.hub.card import Publisher, repository_name, software, write_card
from nanochat.hub.convert_model import check_tensors, write_model
from nanochat.hub.convert_tokenizer import write_tokenizer
from nanochat.model.gpt import GPTConfig
from nanochat.report.history import stages_until
from nanochat.tokenizer import Tokenizer
from nanochat.train.checkpoint import MODEL_FILE, Checkpoint

MIT = (Path(__file__).parent / "mit.txt").read_text()


def export_folder(checkpoint: Checkpoint, output: Path) -> Path:
    """The folder to export a checkpoint to. It has the name of the repository."""
    return output / repository_name(checkpoint.tag, checkpoint.source)


def check_free(folders: list[Path], force: bool) -> None:
    """Raise UserError if a folder exists and `force` is not set."""
    if not force and (existing := [folder for folder in folders if folder.exists()]):
        raise UserError(f"{existing[0]} already exists: pass --force to replace it")


def export(
    checkpoint: Checkpoint, publisher: Publisher, output: Path, device: torch.device, log: Callable[[str], None]
) -> Path:
    """Write a folder below `output`, compare it with the checkpoint, then replace any older folder; return it.

    Raises UserError if the checkpoint is damaged or unsupported, or if transformers loads a different model.
    """
    tokenizer = Tokenizer.load(paths.tokenizer_dir())
    config = GPTConfig(**checkpoint.meta["model_config"])
    # load_model reports a damaged file.
    with (
        contextlib.suppress(OSError, SafetensorError),
        safe_open(checkpoint.folder / MODEL_FILE, framework="pt") as tensors,
    ):
        check_tensors(tensors.keys(), config, str(checkpoint.folder))
    model = checkpoint.load_model(device, torch.float32, tokenizer).eval()
    stages = stages_until(checkpoint)
    dataset = stages[0].facts["options"].get("dataset") if stages else None
    passages = verify.held_out_passages(dataset, tokenizer, config.sequence_len)
    folder = export_folder(checkpoint, output)
    with atomic_folder(folder) as partial:
        log(f"rounding to bfloat16: {verify.round_to_bfloat16(model, passages)}")
        write_model(model.state_dict(), config, tokenizer, partial)
        write_tokenizer(tokenizer, config.sequence_len, partial)
        logits = verify.check_logits(model, partial, passages)
        log(f"logits compared with transformers on {len(passages.rows)} passages of {passages.origin}: {logits}")
        log(f"token ids: identical on {verify.check_token_ids(tokenizer, partial):,} texts")
        log(f"chat template: identical on {verify.check_chat_template(tokenizer, partial)} conversations")
        verified = (
            f"Verified with {software()}: on {logits.tokens:,} tokens of held-out text the logits differ by at most "
            f"{logits.max_difference:.1e} from those of the trained model rounded to bfloat16."
        )
        write_card(checkpoint, stages, publisher, verified, partial)
        (partial / "LICENSE").write_text(license_text(publisher))
        for path in partial.iterdir():
            path.chmod(0o644)  # safetensors creates files with mode 0600
        if folder.exists():  # --force
            shutil.rmtree(folder)
    return folder


def license_text(publisher: Publisher) -> str:
    """Content of LICENSE: MIT in full, any other license by its name."""
    year = time.strftime("%Y")
    if publisher.license == "mit":
        return MIT.format(year=year, name=publisher.name)
    return f"Copyright {year} {publisher.name}\n\nLicense: {publisher.license}, see https://spdx.org/licenses\n"
