"""The training mixture of each stage: tasks and how often each is repeated.

The real mixtures use datasets that prepare.sh downloads; the demo's use data that comes with the installation. The
real ones follow the original nanochat (https://github.com/karpathy/nanochat), with refusals added.
"""

import math
from collections.abc import Sequence
from typing import Literal

from nanochat import conversations, paths
from nanochat.data import demo_data
from nanochat.data.packing import PackedRows
from nanochat.data.progress import track
from nanochat.data.token_files import TokenFile, write_conversations
from nanochat.locks import folder_lock
from nanochat.runtime import Runtime
from nanochat.tasks.arithmetic import Arithmetic, Sums, WordProblems
from nanochat.tasks.encyclopedia import Encyclopedia, Topics
from nanochat.tasks.gsm8k import GSM8K
from nanochat.tasks.hub_task import HubTask, SmolTalk
from nanochat.tasks.humaneval import HumanEval
from nanochat.tasks.multiple_choice import ARC, MMLU
from nanochat.tasks.spelling import LetterCount, Spelling, WordTask, read_words
from nanochat.tasks.task import DATA, ConversationList, GradedTask, Mixture, Task
from nanochat.tokenizer import Tokenizer

DEMO_WORDS = 3000  # the demo spells this many of the encyclopedia's most frequent words
DEMO_SFT_START, DEMO_RL_START = 10_000, 20_000
"""The problems of each demo stage are disjoint: numbered from here, those of midtraining from 0."""

HUB_TASKS: tuple[type[HubTask], ...] = (ARC, GSM8K, HumanEval, MMLU, SmolTalk)

Choice = Literal["real", "demo"]


def mid(choice: Choice) -> Mixture:
    """Midtraining teaches the chat format, multiple choice, the python tool, the model's identity and spelling."""
    if choice == "demo":
        words = demo_data.frequent_words(DEMO_WORDS)
        return Mixture(
            [
                (Encyclopedia(), 0.15),
                (Topics(), 0.05),
                (ConversationList("small talk", demo_data.chitchat("train")), 0.6),
                (identity(), 1.0),
                (Arithmetic("train", 1600), 1.0),
                (WordProblems("train", 1000), 1.0),
                (Spelling(words, "train"), 0.5),
                (LetterCount(words, "train"), 0.15),
            ],
            name="demo mid",
        )
    words = read_words(paths.words_file())
    return Mixture(  # 850K rows
        [
            (SmolTalk("train"), 1.0),  # 460K
            (MMLU("train"), 1.0),  # 100K
            (GSM8K("train"), 1.0),  # 7.5K
            (identity(), 2.0),
            take(200_000, Spelling, words),
            take(80_000, LetterCount, words),
        ],
        name="mid",
    )


def sft(choice: Choice) -> Mixture:
    """SFT uses fewer and better conversations, with refusals."""
    if choice == "demo":
        words = demo_data.frequent_words(DEMO_WORDS)
        return Mixture(
            [
                (Encyclopedia(), 0.05),
                (ConversationList("small talk", demo_data.chitchat("train")), 0.1),
                (identity(), 1.0),
                (refusals(), 1.0),
                (Arithmetic("train", 500, DEMO_SFT_START), 1.0),
                (WordProblems("train", 350, DEMO_SFT_START), 1.0),
                (Spelling(words, "train"), 0.3),
                (LetterCount(words, "train"), 0.45),
            ],
            name="demo sft",
        )
    words = read_words(paths.words_file())
    chats = SmolTalk("train")
    return Mixture(  # 23K rows
        [
            (ARC("Easy", "train"), 1.0),  # 2.3K
            (ARC("Challenge", "train"), 1.0),  # 1.1K
            (GSM8K("train"), 1.0),  # 7.5K
            (chats, 10_000 / max(10_000, len(chats))),
            (identity(), 1.0),
            (refusals(), 1.0),
            take(300, Spelling, words),
            take(300, LetterCount, words),
        ],
        name="sft",
    )


def rl(choice: Choice) -> GradedTask:
    """RL uses problems with checkable answers: 7,473 of GSM8K, or 10,000 of the demo's."""
    return GSM8K("train") if choice == "real" else Sums("train", 10_000, DEMO_RL_START)


def identity() -> Task:
    """The user's file. Raises UserError if it is unreadable or has an invalid line."""
    return ConversationList("identity", conversations.read(paths.identity_file()))


def refusals() -> Task:
    """Harmful requests with short, kind refusals, and harmless look-alikes with answers.

    The look-alikes keep the model from refusing everything that sounds alarming.
    """
    return ConversationList("refusals", conversations.read(DATA / "refusals.jsonl"))


def take(count: int, task: type[WordTask], words: Sequence[str]) -> tuple[WordTask, float]:
    """Return `count` rows about the train words, each repeat worded differently."""
    once = max(1, len(task(words, "train")))
    repeated = task(words, "train", math.ceil(count / once))
    return repeated, count / max(1, len(repeated))


def conversation_rows(
    mixture: Mixture, tokenizer: Tokenizer, sequence_len: int, runtime: Runtime, *, learn_all: bool, one_per_row: bool
) -> PackedRows:
    """Tokenize `mixture` into tokens/<its name> unless that is up to date, and pack it into rows."""
    folder = paths.tokens_dir(mixture.name.replace(" ", "-"))
    if runtime.world.is_main:
        print(f"{mixture}\n")
    if runtime.world.is_local_main:
        origin = f"{mixture.fingerprint} cut at {sequence_len}"
        folder.mkdir(parents=True, exist_ok=True)
        with folder_lock(folder):
            if not TokenFile.is_current(folder, "train", tokenizer, origin):
                rows = track(f"tokenizing {mixture.name}", mixture, len(mixture))
                write_conversations(folder, "train", tokenizer, rows, sequence_len, origin)
    runtime.world.barrier()
    file = TokenFile.open(folder, "train", tokenizer)
    return PackedRows(
        file, sequence_len, tokenizer.bos_id, learn_all=learn_all, documents_per_row=1 if one_per_row else None
    )
