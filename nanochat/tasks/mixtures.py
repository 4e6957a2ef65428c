"""What each stage is taught, in one place: tasks and how often each is shown.

Each stage has the real mixture, from data sets that prepare.sh fetches, and the demo's, from what comes with the
installation. The real ones are those of nanochat's seed (https://github.com/karpathy/nanochat) with refusals added.
"""

from collections.abc import Callable
from typing import Literal

from nanochat import paths
from nanochat.data import embedded
from nanochat.data.words import read_words
from nanochat.tasks import arc, gsm8k, humaneval, mmlu, smoltalk
from nanochat.tasks.arc import ARC
from nanochat.tasks.arithmetic import Arithmetic
from nanochat.tasks.encyclopedia import Encyclopedia
from nanochat.tasks.gsm8k import GSM8K
from nanochat.tasks.hub_task import HubFiles
from nanochat.tasks.identity import Identity
from nanochat.tasks.mmlu import MMLU
from nanochat.tasks.refusals import Refusals
from nanochat.tasks.smalltalk import SmallTalk
from nanochat.tasks.smoltalk import SmolTalk
from nanochat.tasks.spelling import LetterCount, Spelling
from nanochat.tasks.task import GradedTask, Mixture, NumberTask, Split, Task
from nanochat.tasks.topics import Topics
from nanochat.tasks.word_problems import WordProblems

DEMO_WORDS = 3000
"""Spelling is practised on this many of the encyclopedia's most frequent words."""
DEMO_SFT_FIRST, DEMO_RL_FIRST, DEMO_RL_SIZE = 10_000, 20_000, 10_000
"""The sums of each of the demo's stages are its own: numbered from here, midtraining's from 0."""

HUB_FILES: list[HubFiles] = [
    files for task in (arc, gsm8k, humaneval, mmlu, smoltalk) for files in dict(task.FILES).values()
]
"""What the real mixtures and the evaluation read."""

Choice = Literal["real", "demo"]


def mid(choice: Choice) -> Mixture:
    """Midtraining: the chat format, multiple choice, the tool, who the model is, letters."""
    return {"real": real_mid, "demo": demo_mid}[choice]()


def sft(choice: Choice) -> Mixture:
    """SFT: fewer and better."""
    return {"real": real_sft, "demo": demo_sft}[choice]()


def rl(choice: Choice) -> GradedTask:
    """RL: problems with checkable answers, GSM8K's 7,473 or 10,000 of the demo's."""
    return GSM8K("train") if choice == "real" else Sums("train", DEMO_RL_SIZE, DEMO_RL_FIRST)


def real_mid() -> Mixture:
    """850K conversations, a third of them letters."""
    words = read_words(paths.words_file())
    return Mixture(
        [
            (SmolTalk("train"), 1.0),  # 460K
            (MMLU("train"), 1.0),  # 100K
            (GSM8K("train"), 1.0),  # 7.5K
            (Identity(paths.identity_file()), 2.0),
            some(200_000, lambda repeats: Spelling(words, "train", repeats)),
            some(80_000, lambda repeats: LetterCount(words, "train", repeats)),
        ],
        name="mid",
    )


def real_sft() -> Mixture:
    """23K conversations."""
    words = read_words(paths.words_file())
    talk = SmolTalk("train")
    return Mixture(
        [
            (ARC("Easy", "train"), 1.0),  # 2.3K
            (ARC("Challenge", "train"), 1.0),  # 1.1K
            (GSM8K("train"), 1.0),  # 7.5K
            (talk, 10_000 / max(10_000, len(talk))),
            (Identity(paths.identity_file()), 1.0),
            (Refusals(), 1.0),
            some(300, lambda repeats: Spelling(words, "train", repeats)),
            some(300, lambda repeats: LetterCount(words, "train", repeats)),
        ],
        name="sft",
    )


def some(count: int, make: Callable[[int], Task]) -> tuple[Task, float]:
    """`count` rows of a task that words its rows anew at each repeat: `make(repeats)`."""
    once = max(1, len(make(1)))
    task = make(-(-count // once))
    return task, count / max(1, len(task))


def demo_mid() -> Mixture:
    """Midtraining on what comes with the installation."""
    words = embedded.frequent_words(DEMO_WORDS)
    return Mixture(
        [
            (Encyclopedia(), 0.15),
            (Topics(), 0.05),
            (SmallTalk(), 0.6),
            (Identity(paths.identity_file()), 1.0),
            (Arithmetic("train", 1600), 1.0),
            (WordProblems("train", 1000), 1.0),
            (Spelling(words, "train"), 0.5),
            (LetterCount(words, "train"), 0.15),
        ],
        name="demo mid",
    )


def demo_sft() -> Mixture:
    """SFT on what comes with the installation: fewer and better, with refusals."""
    words = embedded.frequent_words(DEMO_WORDS)
    return Mixture(
        [
            (Encyclopedia(), 0.05),
            (SmallTalk(), 0.1),
            (Identity(paths.identity_file()), 1.0),
            (Refusals(), 1.0),
            (Arithmetic("train", 500, DEMO_SFT_FIRST), 1.0),
            (WordProblems("train", 350, DEMO_SFT_FIRST), 1.0),
            (Spelling(words, "train"), 0.3),
            (LetterCount(words, "train"), 0.45),
        ],
        name="demo sft",
    )


class Sums(Mixture, NumberTask):
    """Problems with checkable answers, sums and word problems by halves, solved with the python tool."""

    def __init__(self, split: Split, size: int, first: int = 0) -> None:
        halves = Arithmetic(split, size - size // 2, first), WordProblems(split, size // 2, first)
        super().__init__(halves, name="sums")
