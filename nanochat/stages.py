"""The training stages, in order."""

from dataclasses import dataclass
from typing import Literal

StageName = Literal["base", "mid", "sft", "rl"]


@dataclass(frozen=True)
class Stage:
    name: StageName  # also the `source` of its checkpoints
    title: str
    script: str
    checkpoint_folder: str  # below the base directory


STAGES: dict[str, Stage] = {
    stage.name: stage
    for stage in (
        Stage("base", "pretraining", "./pretrain.sh", "base_checkpoints"),
        Stage("mid", "midtraining", "./midtrain.sh", "mid_checkpoints"),
        Stage("sft", "supervised fine-tuning", "./sft.sh", "chatsft_checkpoints"),
        Stage("rl", "reinforcement learning", "./rl.sh", "chatrl_checkpoints"),
    )
}


def previous(name: str) -> Stage:
    """The stage whose checkpoints `name` starts from. Raises KeyError for the first stage."""
    return dict(zip(list(STAGES)[1:], STAGES.values(), strict=False))[name]
