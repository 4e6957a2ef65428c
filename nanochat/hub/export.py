"""Export a checkpoint to a folder that transformers loads without custom code, verified before it gets its name."""

import copy
import shutil
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
import transformers

from nanochat import paths
from nanochat.atomic import atomic_folder
from nanochat.hub import verify, verify_gguf
from nanochat.hub.card import Publisher, repository_name, write_card
from nanochat.hub.convert_model import round_weights, write_model
from nanochat.hub.convert_tokenizer import write_tokenizer
from nanochat.hub.gguf_file import write_gguf, write_ollama_files
from nanochat.report.history import pretraining_text, stages_until
from nanochat.tokenizer import Tokenizer
from nanochat.train.checkpoint import Checkpoint

OTHER_LICENSE = "Copyright {year} {name}\n\nLicense: {license}, see https://spdx.org/licenses\n"


def export_folder(checkpoint: Checkpoint, output: Path) -> Path:
    return output / repository_name(checkpoint.tag, checkpoint.source)


def export(
    checkpoint: Checkpoint,
    publisher: Publisher,
    output: Path,
    device: torch.device,
    log: Callable[[str], None],
    gguf: Sequence[str] = (),
    llama_server: str | None = None,
) -> Path:
    """Write a folder below `output`, compare it with the checkpoint, then replace any older folder; return it.

    `gguf`: types of the GGUF files to add; `llama_server`: program to check them with. Raises UserError if the
    checkpoint is damaged or unsupported, or if transformers or llama.cpp computes a different model.
    """
    tokenizer = Tokenizer.load(paths.tokenizer_dir())
    config = checkpoint.config
    model = checkpoint.load_model(device, torch.float32, tokenizer).eval()
    stages = stages_until(checkpoint)
    passages = verify.held_out_passages(pretraining_text(stages), tokenizer, config.sequence_len)
    folder = export_folder(checkpoint, output)
    with atomic_folder(folder) as partial:
        write_tokenizer(tokenizer, config.sequence_len, partial)
        rounded = copy.deepcopy(model)
        round_weights(rounded)
        result = verify.compare(model, rounded, passages)
        log(
            f"rounding to bfloat16: loss {result.loss:.4f} to {result.other_loss:.4f} nats, top token changed at "
            f"{1 - result.agreement:.2%}"
        )
        gguf_lines: list[str] = []
        for kind in gguf:
            path, original = partial / f"{folder.name}-{kind}.gguf", rounded if kind == "bf16" else model
            write_gguf(path, kind, original.state_dict(), config, publisher)
            for line in verify_gguf.check(path, kind, original, tokenizer, passages, llama_server):
                gguf_lines.append(f"- {line}")
                log(line)
        if gguf:
            write_ollama_files(partial / f"{folder.name}-{gguf[0]}.gguf", config, checkpoint.source)
        write_model(rounded.state_dict(), config, tokenizer, partial)
        result = verify.check_logits(rounded, partial, passages)
        tokens = f"{passages.tokens:,} tokens of held-out text"
        log(
            f"logits compared with transformers on {tokens} ({passages.origin}): largest difference "
            f"{result.largest:.1e}, same top token at {result.agreement:.2%}"
        )
        log(f"token ids: identical on {verify.check_token_ids(tokenizer, partial):,} texts")
        log(f"chat template: identical on {verify.check_chat_template(tokenizer, partial)} conversations")
        verified = (
            f"Verified with transformers {transformers.__version__}, torch {torch.__version__}: on {tokens} the logits "
            f"differ by at most {result.largest:.1e} from those of the trained model rounded to bfloat16."
        )
        write_card(checkpoint, stages, publisher, "\n".join([verified, "", *gguf_lines]), gguf, partial)
        text = Path(__file__).with_name("mit.txt").read_text() if publisher.license == "mit" else OTHER_LICENSE
        text = text.format(year=time.strftime("%Y"), name=publisher.name, license=publisher.license)
        (partial / "LICENSE").write_text(text)
        for path in partial.iterdir():
            path.chmod(0o644)  # safetensors creates files with mode 0600
        if folder.exists():  # --force
            shutil.rmtree(folder)
    return folder
