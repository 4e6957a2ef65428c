"""From a checkpoint to a folder that transformers loads as it is, proved before it takes its name."""

import contextlib
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from nanochat import paths
from nanochat.errors import UserError
from nanochat.hub import verify
from nanochat.hub.card import Publisher, repository_name, software, write_card
from nanochat.hub.convert_model import check_tensors, write_model
from nanochat.hub.convert_tokenizer import write_tokenizer
from nanochat.model.gpt import GPTConfig
from nanochat.report.history import stages_until
from nanochat.tokenizer import Tokenizer
from nanochat.train.checkpoint import MODEL_FILE, Checkpoint

Say = Callable[[str], None]
MIT = (Path(__file__).parent / "mit.txt").read_text()


def target(found: Checkpoint, output: Path) -> Path:
    """The folder of a checkpoint's export: it is called as its repository is."""
    return output / repository_name(found.tag, found.source)


def export(found: Checkpoint, publisher: Publisher, output: Path, device: torch.device, say: Say) -> Path:
    """Write the folder, load it with transformers, compare, and only then put it where an older one may be.

    Raises UserError if the checkpoint is damaged or of another kind, or if what transformers loads is another model.
    """
    tokenizer = Tokenizer.load(paths.tokenizer_dir())
    config = GPTConfig(**found.meta["model_config"])
    weights = found.folder / MODEL_FILE
    # What is wrong with a damaged file, load_model says.
    with contextlib.suppress(OSError, SafetensorError), safe_open(weights, framework="pt") as tensors:
        check_tensors(tensors.keys(), config, str(found.folder))
    model = found.load_model(device, torch.float32, tokenizer).eval()
    folder = target(found, output)
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        stages = stages_until(found)
        dataset = stages[0].facts["options"].get("dataset") if stages else None
        passages = verify.held_out_passages(dataset, tokenizer, config.sequence_len)
        say(f"rounding to bfloat16: {verify.round_to_bfloat16(model, passages)}")
        write_model(model.state_dict(), config, tokenizer, partial)
        write_tokenizer(tokenizer, config.sequence_len, partial)
        logits = verify.check_logits(model, partial, passages)
        say(f"logits against transformers, {len(passages.rows)} passages of {passages.origin}: {logits}")
        say(f"token ids: the same for {verify.check_token_ids(tokenizer, partial):,} texts")
        say(f"chat template: the same for {verify.check_chat_template(tokenizer, partial)} conversations")
        checked = (
            f"Checked with {software()}: on {logits.tokens:,} tokens of held-out text its logits differ by "
            f"{logits.max_difference:.1e} at most from those of the model that was trained, rounded to bfloat16."
        )
        write_card(found, stages, publisher, checked, partial)
        (partial / "LICENSE").write_text(licence_text(publisher))
        for path in partial.iterdir():
            path.chmod(0o644)  # safetensors' own is 0600
        _put(partial, folder)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    return folder


def _put(partial: Path, folder: Path) -> None:
    """Give the folder its name; an older one goes only when the new one is whole."""
    old = folder.with_name(f".{folder.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if folder.exists():
        folder.rename(old)
    partial.rename(folder)
    shutil.rmtree(old, ignore_errors=True)


def licence_text(publisher: Publisher) -> str:
    """What goes to the file LICENSE: MIT in full, of any other where it is to be read."""
    if publisher.license == "mit":
        return MIT.format(year=time.strftime("%Y"), name=publisher.name)
    return f"Copyright {time.strftime('%Y')} {publisher.name}\n\nLicence: {publisher.license}, see https://spdx.org/licenses\n"


def check_free(folders: list[Path], force: bool) -> None:
    """Raise UserError if one of the folders is there and is not to be replaced."""
    if not force and (there := [folder for folder in folders if folder.exists()]):
        raise UserError(f"{there[0]} is there already: --force replaces it")
