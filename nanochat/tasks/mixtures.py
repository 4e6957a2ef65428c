"""What each stage is taught, in one place: tasks and how often each is shown."""

from nanochat import paths
from nanochat.data import embedded
from nanochat.tasks.arithmetic import Arithmetic
from nanochat.tasks.encyclopedia import Encyclopedia
from nanochat.tasks.identity import Identity
from nanochat.tasks.refusals import Refusals
from nanochat.tasks.smalltalk import SmallTalk
from nanochat.tasks.spelling import LetterCount, Spelling
from nanochat.tasks.task import Mixture, NumberTask, Split
from nanochat.tasks.word_problems import WordProblems

DEMO_WORDS = 3000
"""Spelling is practised on this many of the encyclopedia's most frequent words."""


def demo_mid() -> Mixture:
    """Midtraining on what comes with the installation."""
    words = embedded.frequent_words(DEMO_WORDS)
    return Mixture(
        [
            (Encyclopedia(), 0.15),
            (SmallTalk(), 0.6),
            (Identity(paths.identity_file()), 1.0),
            (Arithmetic("train", 2500), 1.0),
            (WordProblems("train", 1500), 1.0),
            (Spelling(words, "train"), 0.5),
            (LetterCount(words, "train"), 0.5),
        ],
        name="demo mid",
    )


def demo_sft() -> Mixture:
    """SFT on what comes with the installation: fewer and better, with refusals."""
    words = embedded.frequent_words(DEMO_WORDS)
    return Mixture(
        [
            (Encyclopedia(), 0.02),
            (SmallTalk(), 0.1),
            (Identity(paths.identity_file()), 0.3),
            (Refusals(), 1.0),
            (Arithmetic("train", 3500), 1 / 3.5),
            (WordProblems("train", 2500), 1 / 2.5),
            (Spelling(words, "train"), 0.4),
            (LetterCount(words, "train"), 0.2),
        ],
        name="demo sft",
    )


class Sums(Mixture, NumberTask):
    """Problems with checkable answers, sums and word problems by halves, solved with the python tool."""

    def __init__(self, split: Split, size: int) -> None:
        super().__init__([Arithmetic(split, size - size // 2), WordProblems(split, size // 2)], name="sums")
