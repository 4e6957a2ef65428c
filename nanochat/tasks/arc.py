"""ARC: science questions from school exams, Easy and Challenge (https://arxiv.org/abs/1803.05457)."""

from typing import Literal

from nanochat.tasks.hub_task import HubFiles
from nanochat.tasks.multiple_choice import CategoricalTask, Choices

FILES = {
    (subset, split): HubFiles("allenai/ai2_arc", [f"ARC-{subset}/{split}-00000-of-00001.parquet"])
    for subset in ("Easy", "Challenge")
    for split in ("train", "test")
}


class ARC(CategoricalTask):
    """Three to five choices. The exams' labels, some of them 1 to 4, are replaced by letters in their order."""

    def __init__(self, subset: Literal["Easy", "Challenge"], split: Literal["train", "test"]) -> None:
        self.name = f"arc {subset.lower()}"
        super().__init__(FILES[subset, split])

    def choices(self, index: int) -> Choices:
        row = self.rows[index]
        answer = row["choices"]["label"].index(row["answerKey"])
        return Choices(row["question"].strip(), row["choices"]["text"], answer)
