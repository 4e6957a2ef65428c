"""Export a checkpoint to a folder that transformers loads without custom code, verified before it gets its name."""

import shutil
import time
from collections.abc import Callable
from pathlib import Path

import torch
import transformers

from nanochat import paths
from nanochat.atomic import atomic_folder
from nanochat.hub import verify
from nanochat.hub.card import Publisher, repository_name, write_card
from nanochat.hub.convert_model import write_model
from nanochat.hub.convert_tokenizer import write_tokenizer
from nanochat.report.history import stages_until
from nanochat.tokenizer import Tokenizer
from nanochat.train.checkpoint import Checkpoint

OTHER_LICENSE = "Copyright {year} {name}\n\nLicense: {license}, see https://spdx.org/licenses\n"


def export_folder(checkpoint: Checkpoint, output: Path) -> Path:
    return output / repository_name(checkpoint.tag, checkpoint.source)


def export(
    checkpoint: Checkpoint, publisher: Publisher, output: Path, device: torch.device, log: Callable[[str], None]
) -> Path:
    """Write a folder below `output`, compare it with the checkpoint, then replace any older folder; return it.

    Raises UserError if the checkpoint is damaged or unsupported, or if transformers loads a different model.
    """
    tokenizer = Tokenizer.load(paths.tokenizer_dir())
    config = checkpoint.config
    model = checkpoint.load_model(device, torch.float32, tokenizer).eval()
    stages = stages_until(checkpoint)
    dataset = stages[0].facts["options"].get("dataset") if stages else None
    passages = verify.held_out_passages(dataset, tokenizer, config.sequence_len)
    folder = export_folder(checkpoint, output)
    with atomic_folder(folder) as partial:
        loss, rounded, changed = verify.round_to_bfloat16(model, passages)
        log(f"rounding to bfloat16: loss {loss:.4f} to {rounded:.4f} nats, top token changed at {changed:.2%}")
        write_model(model.state_dict(), config, tokenizer, partial)
        write_tokenizer(tokenizer, config.sequence_len, partial)
        difference, agreement = verify.check_logits(model, partial, passages)
        tokens = f"{passages.tokens:,} tokens of held-out text"
        log(
            f"logits compared with transformers on {tokens} ({passages.origin}): largest difference {difference:.1e}, "
            f"same top token at {agreement:.2%}"
        )
        log(f"token ids: identical on {verify.check_token_ids(tokenizer, partial):,} texts")
        log(f"chat template: identical on {verify.check_chat_template(tokenizer, partial)} conversations")
        verified = (
            f"Verified with transformers {transformers.__version__}, torch {torch.__version__}: on {tokens} the logits "
            f"differ by at most {difference:.1e} from those of the trained model rounded to bfloat16."
        )
        write_card(checkpoint, stages, publisher, verified, partial)
        text = Path(__file__).with_name("mit.txt").read_text() if publisher.license == "mit" else OTHER_LICENSE
        text = text.format(year=time.strftime("%Y"), name=publisher.name, license=publisher.license)
        (partial / "LICENSE").write_text(text)
        for path in partial.iterdir():
            path.chmod(0o644)  # safetensors creates files with mode 0600
        if folder.exists():  # --force
            shutil.rmtree(folder)
    return folder
