"""The table that shows what each stage taught: bits per byte, identity, arithmetic with the tool, spelling."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass

from rich.table import Table

from nanochat import paths
from nanochat.data import embedded
from nanochat.data.packing import StreamRows
from nanochat.data.token_shards import TokenShards
from nanochat.eval.bits_per_byte import bits_per_byte
from nanochat.eval.candidate import Candidate
from nanochat.eval.chat_tasks import score
from nanochat.eval.scores import TaskScore
from nanochat.inference.sampling_params import SamplingParams
from nanochat.tasks.identity import IdentityQuestions
from nanochat.tasks.mixtures import DEMO_WORDS, Sums
from nanochat.tasks.spelling import LetterCount, Spelling
from nanochat.units import format_duration

GREEDY = SamplingParams(max_tokens=64, temperature=0)
IDENTITY_QUESTIONS = 5


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

    def task_scores(self, effort: "Effort") -> list[TaskScore]:
        """Its shares with the number of problems behind each; `effort` is what it was measured with."""
        return [
            TaskScore("identity", IDENTITY_QUESTIONS, self.identity, 0.0),
            TaskScore("arithmetic", effort.problems, self.arithmetic, 0.0),
            TaskScore("spelling", 2 * effort.words, self.spelling, 0.0),
        ]


@dataclass(frozen=True)
class Effort:
    """How much is measured."""

    dataset: str
    """held-out text for bits per byte"""
    eval_tokens: int
    """most tokens of it"""
    problems: int
    """held-out sums"""

    @property
    def words(self) -> int:
        """Held-out words to spell, and as many to count letters of."""
        return self.problems // 5


def measure(candidate: Candidate, effort: Effort) -> StageResult:
    """The result of one checkpoint: the one that is kept in report/, or a new one, which is kept there.

    Replies are greedy. Raises UserError if the checkpoint or the text cannot be used.
    """
    return StageResult(**candidate.result("", asdict(effort), lambda: asdict(_evaluate(candidate, effort))))


def _evaluate(candidate: Candidate, effort: Effort) -> StageResult:
    found, chat = candidate.found, candidate.chat
    shards = TokenShards.open(paths.tokens_dir(effort.dataset), "val", chat.tokenizer)
    rows = StreamRows(shards, chat.context, chat.tokenizer.bos_id)
    words = embedded.frequent_words(DEMO_WORDS)
    spelling, counting = (score(chat, task(words, "test"), GREEDY, effort.words) for task in (Spelling, LetterCount))
    return StageResult(
        source=found.source,
        tag=found.tag,
        step=found.step,
        bits_per_byte=bits_per_byte(
            chat.engine.model,
            chat.tokenizer,
            rows,
            candidate.device_batch_size,
            effort.eval_tokens,
            candidate.runtime,
        ),
        identity=score(chat, IdentityQuestions(), GREEDY, IDENTITY_QUESTIONS),
        arithmetic=score(chat, Sums("test", effort.problems), GREEDY, effort.problems),
        spelling=(spelling + counting) / 2,
        seconds=found.meta["seconds"],
    )


def table(results: Sequence[StageResult]) -> Table:
    """The results as a table for the terminal, 80 columns wide at most."""
    drawn = Table(title="What each stage taught")
    for heading in ("stage", "step", "bits/byte", "identity", "arithmetic", "spelling", "time"):
        drawn.add_column(heading, justify="left" if heading == "stage" else "right")
    for r in results:
        shares = (f"{share:.1%}" for share in (r.identity, r.arithmetic, r.spelling))
        drawn.add_row(r.source, str(r.step), f"{r.bits_per_byte:.3f}", *shares, format_duration(r.seconds))
    return drawn
