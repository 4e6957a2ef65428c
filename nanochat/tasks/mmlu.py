"""MMLU: four choices in 57 subjects (https://arxiv.org/abs/2009.03300)."""

from typing import Literal

from nanochat.tasks.hub_task import HubFiles
from nanochat.tasks.multiple_choice import CategoricalTask, Choices

REPOSITORY = "cais/mmlu"
FILES = {
    "train": HubFiles(REPOSITORY, ["auxiliary_train/train-00000-of-00001.parquet"]),
    "test": HubFiles(REPOSITORY, ["all/test-00000-of-00001.parquet"]),
}


class MMLU(CategoricalTask):
    """`train` is the auxiliary set: 100K questions from other exams, disjoint from `test`."""

    def __init__(self, split: Literal["train", "test"]) -> None:
        self.name = "mmlu auxiliary" if split == "train" else "mmlu"
        super().__init__(FILES[split])

    def choices(self, index: int) -> Choices:
        row = self.rows[index]
        row = row.get("train", row)  # the auxiliary file wraps each row in a struct of that name
        return Choices(row["question"].strip(), row["choices"], row["answer"])

    def subject(self, index: int) -> str:
        """Subject of a test row, such as abstract_algebra."""
        return str(self.rows[index]["subject"])
