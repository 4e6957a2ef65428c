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

DEMO_WORDS = 2000
"""Spelling is practised on this many of the encyclopedia's most frequent words."""


def demo_mid() -> Mixture:
    """Midtraining on what comes with the installation."""
    words = embedded.frequent_words(DEMO_WORDS)
    return Mixture(
        [
            (Encyclopedia(), 0.5),
            (SmallTalk(), 1.0),
            (Identity(paths.identity_file()), 2.0),
            (Arithmetic("train", 9000), 1.0),
            (WordProblems("train", 6000), 1.0),
            (Spelling(words, "train"), 1.0),
            (LetterCount(words, "train"), 1.0),
        ],
        name="demo mid",
    )


def demo_sft() -> Mixture:
    """SFT on what comes with the installation: fewer and better, with refusals."""
    words = embedded.frequent_words(DEMO_WORDS)
    return Mixture(
        [
            (Encyclopedia(), 0.05),
            (SmallTalk(), 0.3),
            (Identity(paths.identity_file()), 1.0),
            (Refusals(), 1.0),
            (Arithmetic("train", 12000), 0.1),
            (WordProblems("train", 12000), 0.1),
            (Spelling(words, "train"), 0.3),
            (LetterCount(words, "train"), 0.1),
        ],
        name="demo sft",
    )


class Sums(Mixture, NumberTask):
    """Problems with checkable answers, sums and word problems by halves, solved with the python tool."""

    def __init__(self, split: Split, size: int) -> None:
        super().__init__([Arithmetic(split, size - size // 2), WordProblems(split, size // 2)], name="sums")
