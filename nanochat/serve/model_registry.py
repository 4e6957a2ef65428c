"""Which trained models there are to talk to."""

from collections.abc import Callable
from dataclasses import dataclass

from nanochat import paths
from nanochat.stages import STAGES
from nanochat.train import checkpoint
from nanochat.train.checkpoint import Checkpoint


@dataclass(frozen=True)
class ModelCard:
    """A trained model, without its weights."""

    source: str
    """base, mid, sft or rl"""
    model_tag: str
    step: int
    context: int
    """most tokens of conversation and reply together"""
    created: int = 0
    """seconds since 1970"""

    @property
    def id(self) -> str:
        """Its name in the API."""
        return f"nanochat-{self.model_tag}-{self.source}"

    @property
    def description(self) -> str:
        """For a person: `sft d4 step 300`."""
        return f"{self.source} {self.model_tag} step {self.step}"

    @classmethod
    def of(cls, found: Checkpoint) -> "ModelCard":
        """The card of a checkpoint."""
        context = found.meta["model_config"]["sequence_len"]
        return cls(found.source, found.tag, found.step, context, int(found.meta["saved_at"]))


def trained_models() -> list[ModelCard]:
    """The newest step of every model of every stage, the most advanced stage first."""
    cards = []
    for source in reversed(STAGES):
        folder = paths.checkpoints_dir(source)
        tags = sorted(entry.name for entry in folder.iterdir() if entry.is_dir()) if folder.is_dir() else []
        found = (checkpoint.newest(source, tag) for tag in tags)
        cards += [ModelCard.of(one) for one in found if one]
    return cards


class ModelRegistry:
    """The models that may be asked for: the one the server was started with, and what has been trained besides."""

    def __init__(self, default: ModelCard, others: Callable[[], list[ModelCard]] = list) -> None:
        """`others` is asked again each time, so that a stage that has just been trained_models is there."""
        self.default = default
        self._others = others

    def cards(self) -> list[ModelCard]:
        """All of them, the most advanced first."""
        cards = [self.default if card.id == self.default.id else card for card in self._others()]
        return cards if self.default in cards else [self.default, *cards]

    def find(self, name: str | None) -> ModelCard | None:
        """The model of that name in the API; without a name, the default."""
        if name in (None, "", self.default.id):
            return self.default
        return next((card for card in self.cards() if card.id == name), None)
