"""The trained models that can be served."""

from collections.abc import Callable
from dataclasses import dataclass

from nanochat import paths
from nanochat.stages import STAGES
from nanochat.train import checkpoint
from nanochat.train.checkpoint import Checkpoint


@dataclass(frozen=True)
class ModelCard:
    """A trained model, without its weights."""

    source: str  # base, mid, sft or rl
    model_tag: str
    step: int
    context: int  # maximum tokens of conversation and reply together
    created: int = 0  # Unix time
    num_parameters: int = 0

    @property
    def id(self) -> str:
        return f"nanochat-{self.model_tag}-{self.source}"

    @property
    def description(self) -> str:
        """Readable name: `sft d4 step 300`."""
        return f"{self.source} {self.model_tag} step {self.step}"

    @classmethod
    def from_checkpoint(cls, found: Checkpoint) -> "ModelCard":
        meta = found.meta
        context = meta["model_config"]["sequence_len"]
        return cls(found.source, found.tag, found.step, context, int(meta["saved_at"]), meta["num_parameters"])


def trained_models() -> list[ModelCard]:
    """List the newest step of every model of every stage, the most advanced stage first."""
    cards = []
    for source in reversed(STAGES):
        folder = paths.checkpoints_dir(source)
        tags = sorted(entry.name for entry in folder.iterdir() if entry.is_dir()) if folder.is_dir() else []
        cards += [ModelCard.from_checkpoint(found) for tag in tags if (found := checkpoint.newest(source, tag))]
    return cards


class ModelRegistry:
    """The server's default model and all others that requests can name."""

    def __init__(self, default: ModelCard, list_models: Callable[[], list[ModelCard]] = list) -> None:
        """list_models: called for each request, so that a newly trained model is available without a restart."""
        self.default = default
        self.list_models = list_models

    def cards(self) -> list[ModelCard]:
        """List all models, the most advanced first."""
        cards = [self.default if card.id == self.default.id else card for card in self.list_models()]
        return cards if self.default in cards else [self.default, *cards]

    def find(self, name: str | None) -> ModelCard | None:
        """Return the model with this name, or None. The default has the names "nanochat" and "" too."""
        name = (name or "nanochat").removesuffix(":latest")  # which Ollama's clients append
        if name in ("nanochat", self.default.id):
            return self.default
        return next((card for card in self.cards() if card.id == name), None)
