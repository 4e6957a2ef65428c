"""The table that shows what each stage taught: bits per byte, identity, arithmetic with the tool, spelling."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from rich.table import Table

from nanochat import paths
from nanochat.checkpoint import Checkpoint
from nanochat.data import embedded
from nanochat.data.packing import StreamRows
from nanochat.data.token_shards import TokenShards
from nanochat.eval.bits_per_byte import bits_per_byte
from nanochat.eval.chat_tasks import score
from nanochat.inference.chat import ChatModel
from nanochat.inference.sampling import Sampling
from nanochat.runtime import Runtime
from nanochat.tasks.identity import IdentityQuestions
from nanochat.tasks.mixtures import DEMO_WORDS, Sums
from nanochat.tasks.spelling import LetterCount, Spelling
from nanochat.tracking import format_seconds

GREEDY = Sampling(max_tokens=64, temperature=0)


@dataclass
class StageResult:
    """One line of the table. Shares are 0 to 1."""

    source: str
    tag: str
    step: int
    bits_per_byte: float
    identity: float
    arithmetic: float
    spelling: float
    seconds: float
    """spent training this stage"""


def evaluate_stage(
    found: Checkpoint, chat: ChatModel, runtime: Runtime, dataset: str, device_batch_size: int, problems: int
) -> StageResult:
    """Measure one checkpoint: greedy replies to `problems` held-out sums, a fifth as many words, five questions."""
    rows = StreamRows(
        TokenShards.open(paths.tokens_dir(dataset), "val", chat.tokenizer), chat.context, chat.tokenizer.bos_id
    )
    words = embedded.frequent_words(DEMO_WORDS)
    spelling, counting = Spelling(words, "test"), LetterCount(words, "test")
    return StageResult(
        source=found.source,
        tag=found.tag,
        step=found.step,
        bits_per_byte=bits_per_byte(
            chat.engine.model, chat.tokenizer, rows, device_batch_size, len(rows) * chat.context, runtime
        ),
        identity=score(chat, IdentityQuestions(), GREEDY, 5),
        arithmetic=score(chat, Sums("test", problems), GREEDY, problems),
        spelling=(score(chat, spelling, GREEDY, problems // 5) + score(chat, counting, GREEDY, problems // 5)) / 2,
        seconds=found.meta["seconds"],
    )


def results_file(found: Checkpoint) -> Path:
    """Where a checkpoint's result is kept."""
    return paths.report_dir() / f"{found.source}-{found.tag}-{found.step:06d}.json"


def save_result(found: Checkpoint, result: StageResult, problems: int) -> None:
    """Keep a result, with the checkpoint it belongs to."""
    paths.report_dir().mkdir(parents=True, exist_ok=True)
    kept = {"saved_at": found.meta["saved_at"], "problems": problems, **asdict(result)}
    results_file(found).write_text(json.dumps(kept, indent=2) + "\n")


def load_result(found: Checkpoint, problems: int) -> StageResult | None:
    """The result kept for this very checkpoint and as many problems, if there is one."""
    try:
        kept = json.loads(results_file(found).read_text())
    except FileNotFoundError:
        return None
    if kept.pop("saved_at") != found.meta["saved_at"] or kept.pop("problems") != problems:
        return None
    return StageResult(**kept)


def table(results: Sequence[StageResult]) -> Table:
    """The results as a table for the terminal, 80 columns wide at most."""
    drawn = Table(title="What each stage taught")
    for heading in ("stage", "step", "bits/byte", "identity", "arithmetic", "spelling", "time"):
        drawn.add_column(heading, justify="left" if heading == "stage" else "right")
    for r in results:
        shares = (f"{share:.1%}" for share in (r.identity, r.arithmetic, r.spelling))
        drawn.add_row(r.source, str(r.step), f"{r.bits_per_byte:.3f}", *shares, format_seconds(r.seconds))
    return drawn
